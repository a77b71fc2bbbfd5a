"""SCRG: the error is found where Eq. 3 says, only what Eq. 4 says changes, it ends where it must, and no token is read twice."""
import math, re
import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_models import arrival_times, EOS, KINDS, naive_noise, PAD, tiny_model
from mgsr_nb.config import RunConfig
from mgsr_nb.tokens import collate, supervised
from mgsr_nb.divergences import forward_kl, reverse_kl
from mgsr_nb.models import hidden_states
from mgsr_nb.decoding import Reading
from mgsr_nb.sampling import OnPolicy, sampler
from mgsr_nb.scrg import DIRECTIONS, SCRG, AnyDifference, FirstAbove, MaxKL, Revision, Scorer, Scores, correction_html, corrected_prefix, error_position

every_kind = pytest.mark.parametrize("kind", KINDS)
V, NEW = 60, 10
CLOSE = {"gpt2": 1e-10, "opt": 1e-10, "llama": 1e-5}            # of float64 models; LLaMA's normalisation rounds to float32 whatever the type
THRESHOLD = {"gpt2": 1.4, "opt": 1.95, "llama": 2.0}            # nats that some of the students' texts below reach somewhere, and some do not
PROMPTS = [[11, 12, 13], [14], [15, 16, 2, 17, 18, 19, 20], [9, 8], [3, 30], [33] * 5]

# --- detection by hand

KL = torch.tensor([0.1, 3.0, 0.9, 0.5])

def test_the_error_is_the_largest_kl_where_the_tokens_differ():
    ids = lambda *i: torch.tensor(i)
    assert error_position(KL, ids(7, 8, 4, 2), ids(7, 8, 5, 3)) == 2      # not 1, where both wrote 8
    assert error_position(KL, ids(7, 8, 4, 2), ids(7, 9, 5, 3)) == 1
    assert error_position(KL, ids(7, 8, 4, 2), ids(6, 8, 4, 2)) == 0      # the smallest KL of all, but the only difference
    assert error_position(KL, ids(7, 8, 4, 2), ids(7, 8, 4, 3)) == 3

@pytest.mark.pitfall(40)
def test_pitfall_40_where_nothing_differs_there_is_no_error():
    same = torch.tensor([7, 8, 4, 2])
    assert error_position(KL, same, same) == -1
    assert error_position(torch.stack([KL, KL]), torch.stack([same, same]), torch.stack([same, same + 1])).tolist() == [-1, 1]

def test_a_difference_of_kl_zero_is_still_an_error():
    assert error_position(torch.tensor([0., 0., 5.]), torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])) == 1
    assert error_position(torch.tensor([-1e-7, 5.]), torch.tensor([1, 2]), torch.tensor([9, 2])) == 0     # rounding below 0 does not lose it

@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8, unique_by=lambda r: r[0]))
def test_error_position_equals_a_loop(rows):
    best = -1
    for i, (kl, s, t) in enumerate(rows):
        if s != t and (best < 0 or kl > rows[best][0]): best = i
    assert error_position(*(torch.tensor(c) for c in ([float(r[0]) for r in rows], [r[1] for r in rows], [r[2] for r in rows]))) == best

# --- other detectors, by hand

def detected(detect, kl, student_ids, teacher_ids, u=None):
    kl = torch.as_tensor(kl)
    return error_position(detect(kl, torch.zeros_like(kl) if u is None else torch.as_tensor(u)), torch.tensor(student_ids), torch.tensor(teacher_ids)).tolist()

def test_max_kl_is_eq_3_and_what_an_scrg_does_unless_told():
    for kl in (KL, torch.stack([KL, -KL])): assert torch.equal(MaxKL()(kl, torch.rand(kl.shape)), kl)
    assert isinstance(SCRG(None, None, [EOS], 0, 6).round.detect, MaxKL) and RunConfig().scrg_detect == "max_kl"

def test_the_first_position_above_a_threshold():
    student, teacher = [7, 8, 4, 2], [7, 9, 5, 3]
    assert [detected(FirstAbove(t), KL, student, teacher) for t in (0., 0.5, 0.9, 3.)] == [1, 1, 1, 1]       # the earliest, not the largest
    assert [detected(FirstAbove(t), KL, student, [7, 8, 5, 3]) for t in (0.5, 0.51, 0.9, 0.91)] == [2, 2, 2, -1]     # 3 nats, but the same token; 0.9 is enough
    assert [detected(FirstAbove(t), KL, student, [7, 8, 4, 3]) for t in (0.5, 0.51)] == [3, -1]
    assert detected(FirstAbove(0.), KL, student, student) == -1
    assert detected(FirstAbove(0.5), torch.stack([KL, KL.flip(0), KL / 10]), [student] * 3, [[0] * 4] * 3) == [1, 0, -1]

@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), threshold=st.integers(-1, 10))
def test_first_above_equals_a_loop(rows, threshold):
    kl, student, teacher = zip(*rows)
    expected = next((i for i, (k, s, t) in enumerate(rows) if s != t and k >= threshold), -1)
    assert detected(FirstAbove(threshold), [float(k) for k in kl], student, teacher) == expected

def test_any_difference_looks_at_the_random_numbers_and_not_at_the_kl():
    assert detected(AnyDifference(), KL, [7, 8, 4, 2], [7, 9, 5, 3], [0.9, 0.2, 0.8, 0.3]) == 2      # 0.9 is the largest, but there nothing differs
    assert detected(AnyDifference(), KL, [7, 8, 4, 2], [7, 9, 4, 2], [0.9, 0., 0.8, 0.3]) == 1       # `torch.rand` may be 0
    assert detected(AnyDifference(), KL, [7, 8, 4, 2], [7, 8, 4, 2], [0.9, 0.2, 0.8, 0.3]) == -1

def test_corrected_prefix_by_hand():
    response = [5, 6, 7, 8]
    assert corrected_prefix(response, 2, 9) == [5, 6, 9] and corrected_prefix(response, 0, 9) == [9] and corrected_prefix(response, 3, 9) == [5, 6, 7, 9]
    assert response == [5, 6, 7, 8]

# --- correction, with scores and a writer given by hand

def known(reading): return (reading.columns.amax(1) + 1).tolist()    # tokens of each text that count as read

class Given:
    """A scorer that says what it is told, and a writer that always writes 90, 91, ... up to its limit; both remember what they were asked.

    A turn is (KL, teacher's ids) or (KL, teacher's ids, the teacher's log-probabilities). The readings are real, of a model of no importance."""
    models = (tiny_model("gpt2", 1, vocab=100),) * 2
    pad_id, read = PAD, Scorer.read
    def __init__(self, *turns):
        self.turns, self.scored, self.wrote = list(turns), [], []
    def __call__(self, pairs, keys, readings):
        assert all(known(r) == [len(x) + len(y) for x, y in pairs] for r in readings)
        self.scored.append((pairs, keys))
        kl, teacher, *log_p = self.turns[len(self.scored) - 1]
        student = [i for _, y in pairs for i in y]
        log_p = log_p[0] if log_p else [0.] * len(kl)
        assert len(kl) == len(teacher) == len(student) == len(log_p)
        return Scores(torch.tensor(kl), torch.tensor(teacher), torch.tensor(student), torch.zeros(len(kl)), torch.tensor(log_p), [len(y) for _, y in pairs])
    def sample(self, prompts, keys, limits, past):
        self.wrote.append((prompts, keys, limits, known(past)))
        return [list(range(90, 90 + n)) for n in limits]
    def scrg(self, corrections=1, stops=(EOS, 77), new=6, seed=5, detect=MaxKL()):
        return SCRG(self, self.sample, stops, seed=seed, max_new_tokens=new, corrections=corrections, detect=detect)

@pytest.mark.pitfall(40)
def test_pitfall_40_only_what_follows_the_error_changes():
    "Tokens before j unchanged, token j the teacher's, then the student's new text up to the limit; the prompt untouched."
    pairs = [([10, 11], [20, 21, 22, 23]), ([12], [30, 31])]
    given = Given(([0.1, 2., 3., 1.] + [0.5, 0.4], [20, 50, 22, 51] + [52, 31]))
    revision = given.scrg()(0, pairs, range(2))
    assert revision.pairs == [([10, 11], [20, 50, 90, 91, 92, 93]), ([12], [52, 90, 91, 92, 93, 94])]
    assert (revision.position, revision.student_id, revision.teacher_id) == ([1, 0], [21, 30], [50, 52]) and revision.kl == pytest.approx([2., 0.5])
    assert given.wrote[0][0] == [[10, 11, 20, 50], [12, 52]] and given.wrote[0][2] == [4, 5]
    assert given.wrote[0][3] == [3, 1]             # of the student's reading, what stands before the teacher's token counts
    assert pairs == [([10, 11], [20, 21, 22, 23]), ([12], [30, 31])]

@pytest.mark.pitfall(40)
def test_pitfall_40_nothing_differs_unchanged_and_counted():
    pairs = [([10], [20, 21]), ([11], [30, 31, EOS]), ([12], [40])]
    given = Given(([9., 9., 1., 5., 2., 3.], [20, 21, 30, 55, EOS, 40]))
    revision = given.scrg()(0, pairs, range(3))
    assert [revision.pairs[b] for b in (0, 2)] == [pairs[b] for b in (0, 2)] and revision.position == [-1, 1, -1]
    assert given.wrote[0][2:] == ([0, 4, 0], [3, 2, 2])          # nothing is written after an unchanged text, although there is room
    assert revision.summary() == {"scrg_corrected": pytest.approx(1 / 3), "scrg_position": 1., "scrg_kl": pytest.approx(5.)}

def test_the_summary_of_nothing(): assert Revision([], [], [], [], [], []).summary() == {"scrg_corrected": 0., "scrg_position": 0., "scrg_kl": 0.}

@pytest.mark.pitfall(40)
@pytest.mark.parametrize("stop", [EOS, 77])
def test_pitfall_40_the_teachers_stop_ends_the_text(stop):
    given = Given(([0., 4., 1., 0.], [20, stop, 22, 23]))
    revision = given.scrg()(0, [([10], [20, 21, 22, 23])], [0])
    assert revision.pairs == [([10], [20, stop])] and given.wrote[0][2] == [0]

@pytest.mark.pitfall(40)
def test_pitfall_40_the_students_eos_is_replaced_and_the_text_goes_on():
    given = Given(([0., 1., 4.], [20, 21, 60]))
    revision = given.scrg()(0, [([10], [20, 21, EOS])], [0])
    assert revision.pairs == [([10], [20, 21, 60, 90, 91, 92])] and (revision.student_id, revision.teacher_id) == ([EOS], [60])

@pytest.mark.pitfall(40)
@pytest.mark.parametrize("new,room", [(3, 0), (4, 1), (2, 0), (1, 0), (9, 6)])
def test_pitfall_40_a_revision_is_never_longer_than_the_limit_allows(new, room):
    given = Given(([0., 1., 4.], [20, 21, 60]))
    revision = given.scrg(new=new)(0, [([10], [20, 21, 22])], [0])
    assert given.wrote[0][2] == [room] and len(revision.pairs[0][1]) == 3 + room

def test_several_corrections_revise_the_revision_and_report_the_first():
    given = Given(([0., 4., 1.], [20, 50, 22]), ([9., 8., 7., 1., 6., 0.], [20, 50, 90, 91, 51, 93]), ([0.] * 6, [20, 50, 90, 91, 51, 90]))
    revision = given.scrg(corrections=3)(2, [([10], [20, 21, 22])], [7])
    assert [pairs for pairs, _ in given.scored] == [[([10], [20, 21, 22])], [([10], [20, 50, 90, 91, 92, 93])], [([10], [20, 50, 90, 91, 51, 90])]]
    assert revision.pairs == [([10], [20, 50, 90, 91, 51, 90])] and (revision.position, revision.teacher_id, revision.student_id) == ([1], [50], [21])
    keys = [k for _, asked in given.scored for k in asked] + [k for _, asked, *_ in given.wrote for k in asked]
    assert len(set(keys)) == 6 and all(k[0] == 5 for k in keys)      # fresh random numbers in each round, for teacher and student

@pytest.mark.pitfall(40)
def test_pitfall_40_a_text_that_only_a_later_round_changes_is_counted():
    given = Given(([1., 1.], [20, 21]), ([1., 3.], [20, 50]))
    revision = given.scrg(corrections=2)(0, [([10], [20, 21])], [0])
    assert revision.pairs[0][1][:2] == [20, 50] and (revision.position, revision.student_id, revision.teacher_id, revision.kl) == ([1], [21], [50], [3.])
    assert revision.summary() == {"scrg_corrected": 1., "scrg_position": 1., "scrg_kl": 3.}

def test_a_threshold_that_nothing_reaches_leaves_the_text_and_is_counted():
    pairs = [([10], [20, 21, 22]), ([11], [30, 31])]
    given = Given(([0.1, 0.4, 0.6, 0.4, 0.3], [50, 51, 52, 53, 54]))
    revision = given.scrg(detect=FirstAbove(0.5))(0, pairs, range(2))
    assert revision.pairs == [([10], [20, 21, 52, 90, 91, 92]), pairs[1]] and (revision.position, given.wrote[0][2]) == ([2, -1], [3, 0])
    assert revision.summary() == {"scrg_corrected": 0.5, "scrg_position": 2., "scrg_kl": pytest.approx(0.6)}

def test_with_a_threshold_several_corrections_go_from_left_to_right_and_stop_by_themselves():
    turns = [([0.1, 2., 3.], [50, 51, 52]), ([0.1, 2., 0.2, 9., 4., 0.1], [50, 51, 52, 53, 54, 55]), ([0.1, 2., 0.2, 9., 0.4, 0.1], [50, 51, 52, 53, 54, 55])]
    def revised(corrections):
        given = Given(*turns[:corrections], *[turns[-1]] * (corrections - 3))
        return given.scrg(corrections, detect=FirstAbove(1.))(0, [([10], [20, 21, 22])], [0]), given
    assert [revised(n)[0].pairs[0][1] for n in (1, 2, 3, 6)] == [[20, 51, 90, 91, 92, 93], [20, 51, 90, 53, 90, 91], [20, 51, 90, 53, 90, 91], [20, 51, 90, 53, 90, 91]]
    revision, given = revised(6)
    assert revision.position == [1] and [limits for _, _, limits, _ in given.wrote] == [[4], [2], [0], [0], [0], [0]]

CANDIDATES = [1, 3, 4]     # where the teacher of the texts below says something else

def any_difference(rows, seed=0, step=0, turn=0, longer=0):
    "First positions that a random choice corrects in `rows`, all of 6 tokens, beside `longer` texts of 40; for `turn` 1, nothing differs in turn 0."
    rows = [*rows, *range(10**6, 10**6 + longer)]
    pairs = [([10], [20 + i for i in range(6 if b < len(rows) - longer else 40)]) for b in range(len(rows))]
    student = [i for _, y in pairs for i in y]
    teacher = [70 + i - 20 if i - 20 in CANDIDATES else i for i in student]
    given = Given(*[([9.] * len(student), student)] * turn, (list(range(len(student))), teacher))
    revision = given.scrg(turn + 1, seed=seed, detect=AnyDifference(), new=6)(step, pairs, rows)
    return revision.position[:len(rows) - longer]

def test_any_difference_chooses_each_position_that_differs_equally_often():
    found = any_difference(range(3000))
    assert set(found) == set(CANDIDATES)
    assert sum((found.count(j) - 1000) ** 2 / 1000 for j in CANDIDATES) < 2 + 4 * 2       # chi-square of two degrees of freedom, mean plus four deviations

@pytest.mark.pitfall(30, 36)
def test_pitfall_30_the_random_position_is_a_function_of_seed_step_row_and_turn():
    def naive(row, seed, step, turn):
        u = naive_noise((seed, "detect", step, row, turn), 0, 6)
        return max(CANDIDATES, key=lambda j: u[j])
    rows, asked = [3, 0, 17, *range(100, 150)], [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [any_difference(rows, *a) for a in asked]
    assert found == [[naive(row, *a) for row in rows] for a in asked]
    for i in range(4):
        for other in found[:i]: assert sum(a != b for a, b in zip(found[i], other)) > 20      # two thirds of 53 for independent numbers
    assert any_difference(rows[::-1]) == found[0][::-1] and [any_difference([row])[0] for row in rows[:5]] == found[0][:5]
    assert any_difference(rows, longer=2) == found[0]           # a wider batch has more random numbers a row

def test_the_teachers_opinion_of_what_is_thrown_away():
    "The mean of log p behind j, of the text as it was: not of the token at j, nor of other texts, and of nothing where nothing stands behind j."
    given = Given(([0., 4., 1., 1., 0.5, 9., 2., 0.], [20, 50, 22, 23, 30, 51, 40, 41], [-1., -2., -3., -7., -11., -13., -17., -19.]))
    revision = given.scrg()(0, [([10], [20, 21, 22, 23]), ([11], [30, 31]), ([12], [40, 41])], range(3))
    assert revision.position == [1, 1, -1] and revision.rest_log_p[0] == -5. and all(map(math.isnan, revision.rest_log_p[1:]))

def test_several_corrections_keep_the_first_opinion():
    "Text 0 is corrected twice, text 1 in the second round only, text 2 never."
    turns = [([4., 0., 0., 1., 1., 1.], [50, 21, 22, 30, 31, 40], [-1., -2., -4., -8., -9., -10.]),
             ([0., 9., 0., 0., 0., 0., 5., 0., 0.], [50, 60, 91, 92, 93, 94, 51, 31, 40], [-20.] * 6 + [-30., -31., -32.])]
    pairs = [([10], [20, 21, 22]), ([11], [30, 31]), ([12], [40])]
    one, two = Given(turns[0]).scrg()(0, pairs, range(3)), Given(*turns).scrg(2)(0, pairs, range(3))
    assert (one.position, two.position, two.kl[:2]) == ([0, -1, -1], [0, 0, -1], [4., 5.]) and two.pairs[0][1][:2] == [50, 60]
    assert (one.rest_log_p[0], two.rest_log_p[:2]) == (-3., [-3., -31.]) and math.isnan(one.rest_log_p[1]) and math.isnan(two.rest_log_p[2])

def test_keys_are_functions_of_seed_step_and_row():
    def keys(step, rows):
        given = Given(([1.] * len(rows), [50] * len(rows)))
        given.scrg()(step, [([10], [20])] * len(rows), rows)
        return [given.scored[0][1], given.wrote[0][1]]
    whole = keys(3, [0, 1, 2, 3])
    assert keys(3, [2, 3]) == [k[2:] for k in whole] and not set(sum(whole, [])) & set(sum(keys(4, [0, 1, 2, 3]), [])) and len(set(sum(whole, []))) == 8

# --- scoring, with models

def models(kind, vocab=V, dtype=torch.float32): return tiny_model(kind, 2, vocab=vocab, seed=1, dtype=dtype), tiny_model(kind, 3, vocab=vocab + 4, seed=2, dtype=dtype)

def students_text(student, seed=0, stops=(EOS,)):
    pairs, _ = OnPolicy(sampler(student, stops, PAD, V), seed, NEW)(0, [type("E", (), {"prompt_ids": p}) for p in PROMPTS], range(len(PROMPTS)))
    return pairs

def naive_scores(student, teacher, pair, key, direction="student_teacher", greedy=False):
    """Token by token, without padding: KL from the definition in float64; the teacher's token, the first to arrive of the race with its generator;
    and the log-probability of the student's token by the student and by the teacher."""
    (x, y), found = pair, []
    for i in range(len(y)):
        with torch.no_grad(): q, p = (m(input_ids=torch.tensor([x + y[:i]])).logits[0, -1, :V].double().softmax(-1) for m in (student, teacher))
        a, b = (q, p) if direction == "student_teacher" else (p, q)
        token = int(p.argmax()) if greedy else int((arrival_times(V, key, i) / p).argmin())
        found.append((float((a * (a / b).log()).sum()), token, float(q[y[i]].log()), float(p[y[i]].log())))
    return list(zip(*found))

def sent(model):
    "Shapes (B, width) of what the model's decoder is sent from now on, call by call."
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    return shapes

@pytest.mark.pitfall(18, 21, 22)
@every_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("token", ["sample", "greedy"])
def test_scores_equal_a_naive_loop(kind, direction, token):
    "Every response token is scored by the row before it, the first one by the prompt's last, whatever the prompt's length."
    student, teacher = models(kind)
    pairs, keys = students_text(student), [("score", b) for b in range(len(PROMPTS))]
    scores = Scorer(student, teacher, PAD, V, direction, token)(pairs, keys)
    assert scores.lengths == [len(y) for _, y in pairs] and scores.student_ids.tolist() == [i for _, y in pairs for i in y]
    expected = [naive_scores(student, teacher, pair, key, direction, token == "greedy") for pair, key in zip(pairs, keys)]
    assert scores.teacher_ids.tolist() == [i for _, ids, *_ in expected for i in ids]
    for name, column in (("kl", 0), ("log_q", 2), ("log_p", 3)):
        values = torch.tensor([v for e in expected for v in e[column]], dtype=torch.float64)
        torch.testing.assert_close(getattr(scores, name).double(), values, rtol=1e-5, atol=1e-5)
        for b, row in enumerate(scores.padded(name)):
            n = scores.lengths[b]
            assert row[:n].tolist() == getattr(scores, name)[sum(scores.lengths[:b]):sum(scores.lengths[:b + 1])].tolist() and not row[n:].any()
    assert not scores.kl.requires_grad and max(scores.teacher_ids) < V

def test_the_directions_are_named_by_their_first_argument():
    p, q = torch.tensor([[0.50, 0.4999, 0.0001], [0.96, 0.02, 0.02]]), torch.tensor([[0.50, 0.10, 0.40], [0.01, 0.495, 0.495]])
    differ = torch.tensor([0, 0]), torch.tensor([1, 1])
    found = {name: error_position(f.from_log_probs(q.log(), p.log()), *differ).item() for name, f in DIRECTIONS.items()}
    assert found == {"student_teacher": 0, "teacher_student": 1} and DIRECTIONS == {"student_teacher": reverse_kl, "teacher_student": forward_kl}
    assert RunConfig().scrg_direction == "student_teacher" and RunConfig().scrg_teacher_token == "sample"      # as printed

@pytest.mark.pitfall(16)
@pytest.mark.parametrize("token", ["sample", "greedy"])
def test_pitfall_16_the_chunk_size_changes_nothing(token):
    student, teacher = models("gpt2")
    pairs, keys = students_text(student), [("score", b) for b in range(len(PROMPTS))]
    whole = Scorer(student, teacher, PAD, V, teacher_token=token, chunk_tokens=1000)(pairs, keys)
    n = sum(whole.lengths)
    for chunk in (1, 7, n - 1, n, n + 1):
        part = Scorer(student, teacher, PAD, V, teacher_token=token, chunk_tokens=chunk)(pairs, keys)
        assert torch.equal(part.teacher_ids, whole.teacher_ids) and torch.equal(part.student_ids, whole.student_ids)
        for name in ("kl", "log_q", "log_p"): torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-5, atol=1e-6)

@every_kind
def test_readings_that_exist_are_scored_without_another_pass(kind):
    student, teacher = models(kind)
    scorer, pairs, keys = Scorer(student, teacher, PAD, V), students_text(student), [("score", b) for b in range(len(PROMPTS))]
    expected, readings = scorer(pairs, keys), scorer.read(pairs)
    assert [r.model for r in readings] == [student, teacher]
    seen = sent(student), sent(teacher)
    found = scorer(pairs, keys, readings)
    assert seen == ([], []) and found.lengths == expected.lengths
    for name in ("kl", "teacher_ids", "student_ids", "log_q", "log_p"): assert torch.equal(getattr(found, name), getattr(expected, name))
    scorer(pairs, keys)
    assert [len(s) for s in seen] == [1, 1]

def test_the_teachers_draws_depend_on_the_key_and_greedy_ones_do_not():
    student, teacher = models("llama")
    pairs = students_text(student)
    ids = lambda token, name: Scorer(student, teacher, PAD, V, teacher_token=token)(pairs, [(name, b) for b in range(len(PROMPTS))]).teacher_ids
    assert torch.equal(ids("sample", "a"), ids("sample", "a")) and not torch.equal(ids("sample", "a"), ids("sample", "b")) and torch.equal(ids("greedy", "a"), ids("greedy", "b"))

@pytest.mark.pitfall(4, 29)
def test_pitfall_29_the_modes_of_both_models_come_back():
    student, teacher = models("gpt2")
    scrg = build(student, teacher)
    pairs = students_text(student)
    expected = scrg(0, pairs, range(len(PROMPTS)))
    assert not student.training and not teacher.training
    student.train()
    found = scrg(0, pairs, range(len(PROMPTS)))
    assert same(found, expected) and all(m.training for m in student.modules()) and not any(m.training for m in teacher.modules())
    teacher.train()
    assert same(scrg(0, pairs, range(len(PROMPTS))), expected) and all(m.training for m in teacher.modules())
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters()) and not expected.teacher_hidden.requires_grad

# --- the whole revision, with models

def build(student, teacher, corrections=1, new=NEW, detect=MaxKL(), stops=(EOS,), **kw):
    return SCRG(Scorer(student, teacher, PAD, V, **kw), sampler(student, stops, PAD, V), stops, seed=0, max_new_tokens=new, corrections=corrections, detect=detect)

def same(a, b):
    "Two revisions are equal to the bit, the NaN of one standing where the other's does."
    numbers = lambda r: torch.tensor([r.kl, r.rest_log_p], dtype=torch.float64)
    return all(getattr(a, n) == getattr(b, n) for n in ("pairs", "position", "student_id", "teacher_id")) and torch.equal(a.teacher_hidden, b.teacher_hidden) and \
        torch.equal(numbers(a).nan_to_num(nan=1.), numbers(b).nan_to_num(nan=1.))

def naive_write(model, prompt, key, limit):
    ids = []
    while len(ids) < limit and EOS not in ids:
        with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :V].softmax(-1)
        ids.append(int((arrival_times(V, key, len(ids)) / p).argmin()))
    return ids

def detector(name, kind):
    "A detector, and how it is told: from the positions that differ, the KL, and the row's random numbers."
    t = THRESHOLD[kind]
    return {"max_kl": (MaxKL(), lambda errors, kl, u: max(errors, key=lambda i: kl[i])),
            "threshold": (FirstAbove(t), lambda errors, kl, u: next((i for i in errors if kl[i] >= t), -1)),
            "random": (AnyDifference(), lambda errors, kl, u: max(errors, key=lambda i: u[i]))}[name]

OTHER = {"direction": "teacher_student", "teacher_token": "greedy"}

def naive_revision(student, teacher, pair, step, row, corrections, pick, **kw):
    "Eq. 3 and 4 for one response, as a story: (pair, the first position, its KL, mean log p of what stood behind it)."
    (x, y), first = pair, (-1, None, math.nan)
    for turn in range(corrections):
        kl, teacher_ids, _, log_p = naive_scores(student, teacher, (x, y), (0, "teacher", step, row, turn), **kw)
        errors = [i for i in range(len(y)) if y[i] != teacher_ids[i]]
        j = pick(errors, kl, naive_noise((0, "detect", step, row, turn), 0, len(y))) if errors else -1
        if j < 0: continue
        if first[0] < 0: first = j, kl[j], sum(log_p[j + 1:]) / (len(y) - 1 - j) if j < len(y) - 1 else math.nan
        y = y[:j] + [teacher_ids[j]]
        if y[-1] != EOS: y = y + naive_write(student, x + y, (0, "rewrite", step, row, turn), NEW - len(y))
    return (x, y), *first

@pytest.mark.pitfall(40)
@every_kind
@pytest.mark.parametrize("corrections,detect,options", [(1, "max_kl", {}), (3, "max_kl", {}), (1, "max_kl", OTHER), (3, "max_kl", OTHER), (3, "threshold", {}), (3, "random", {})],
                         ids=["printed-1", "printed-3", "other-1", "other-3", "threshold-3", "random-3"])
def test_pitfall_40_the_revision_equals_a_naive_one(kind, corrections, detect, options):
    student, teacher = models(kind)
    pairs, (detect, pick) = students_text(student), detector(detect, kind)
    revision = build(student, teacher, corrections, detect=detect, **options)(3, pairs, range(len(PROMPTS)))
    naive = {} if not options else {"direction": "teacher_student", "greedy": True}
    expected, position, kl, rest = zip(*[naive_revision(student, teacher, pair, 3, row, corrections, pick, **naive) for row, pair in enumerate(pairs)])
    assert revision.pairs == list(expected) and revision.position == list(position)
    assert revision.pairs != pairs and [v for v, j in zip(revision.kl, position) if j >= 0] == pytest.approx([v for v in kl if v is not None], abs=1e-5)
    assert revision.rest_log_p == pytest.approx(rest, rel=1e-5, abs=1e-5, nan_ok=True) and sum(r == r for r in rest) >= 2

@pytest.mark.pitfall(40)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), step=st.integers(0, 5), kind=st.sampled_from(KINDS))
def test_pitfall_40_what_must_hold_for_every_correction(seed, step, kind):
    student, teacher = models(kind)
    pairs = students_text(student, seed)
    revision = build(student, teacher)(step, pairs, range(len(PROMPTS)))
    for (x, old), (x2, new), j, s, t in zip(pairs, revision.pairs, revision.position, revision.student_id, revision.teacher_id):
        assert x2 == x and 1 <= len(new) <= NEW and EOS not in new[:-1]
        if j < 0: assert new == old
        else: assert new[:j] == old[:j] and (old[j], new[j]) == (s, t) and s != t
        assert len(new) == NEW or new[-1] == EOS or new == old
    assert revision.summary()["scrg_corrected"] == sum(j >= 0 for j in revision.position) / len(PROMPTS)

@pytest.mark.pitfall(36)
@pytest.mark.parametrize("corrections,detect", [(1, "max_kl"), (2, "max_kl"), (2, "random")])
def test_pitfall_36_two_processes_that_share_the_batch_make_the_revisions_of_one(corrections, detect):
    student, teacher = models("opt")
    pairs, scrg = students_text(student), build(student, teacher, corrections, detect=detector(detect, "opt")[0])
    whole = scrg(1, pairs, range(6))
    for split in ([[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[5], [0, 1, 2, 3, 4]]):
        for rows in split:
            part = scrg(1, [pairs[r] for r in rows], rows)
            assert part.pairs == [whole.pairs[r] for r in rows]
            assert (part.position, part.teacher_id, part.student_id) == tuple([getattr(whole, n)[r] for r in rows] for n in ("position", "teacher_id", "student_id"))
            for name in ("kl", "rest_log_p"): assert getattr(part, name) == pytest.approx([getattr(whole, name)[r] for r in rows], rel=1e-4, abs=1e-4, nan_ok=True)

@pytest.mark.pitfall(40)
@every_kind
def test_pitfall_40_a_student_equal_to_its_teacher_is_left_alone(kind):
    "Greedy text and a greedy teacher: nothing differs anywhere, and KL is 0."
    _, teacher = models(kind)
    texts = []
    for x in PROMPTS:
        y = []
        while len(y) < 4:
            with torch.no_grad(): y.append(int(teacher(input_ids=torch.tensor([x + y])).logits[0, -1, :V].argmax()))
        texts.append((x, y))
    revision = build(teacher, teacher, teacher_token="greedy")(0, texts, range(len(PROMPTS)))
    assert revision.pairs == texts and revision.position == [-1] * len(PROMPTS) and revision.summary()["scrg_corrected"] == 0

def test_a_revision_under_autocast_is_finite_and_close():
    student, teacher = models("gpt2")
    pairs, rows = students_text(student), range(len(PROMPTS))
    with torch.autocast("cpu", torch.bfloat16): revision = build(student, teacher, corrections=2)(0, pairs, rows)
    assert revision.summary()["scrg_corrected"] == 1. and all(map(math.isfinite, revision.kl)) and revision.teacher_hidden.isfinite().all()
    for (_, old), (_, new), j, t in zip(pairs, revision.pairs, revision.position, revision.teacher_id): assert old[:j] == new[:j] and len(new) <= NEW and old[j] != t
    exact = fresh_states(teacher, revision.pairs)
    assert (revision.teacher_hidden.float() - exact).abs().max() < 0.1 * exact.abs().max()

# --- no token is read twice

def recorded(scrg):
    "What the `SCRG` asks to be written, and gets, turn by turn: (texts to go on with, limits, what was written)."
    turns, sample = [], scrg.round.sample
    def watched(prompts, keys, limits, past):
        turns.append((prompts, limits, sample(prompts, keys, limits, past)))
        return turns[-1][2]
    scrg.round.sample = watched
    return turns

def new_tokens(text, prompt, rest):
    "How many tokens of the revision (`prompt`, which ends with the teacher's token if there is one, and `rest`) the teacher had not read in `text`."
    return 0 if prompt + rest == text else 1 + len(rest)

@every_kind
@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize("detect", ["max_kl", "threshold"])
def test_the_teacher_reads_each_text_once_and_then_the_endings(kind, corrections, detect):
    student, teacher = models(kind)
    pairs, scrg = students_text(student), build(student, teacher, corrections, detect=detector(detect, kind)[0])
    shapes, turns = sent(teacher), recorded(scrg)
    revision, texts = scrg(0, pairs, range(6)), [x + y for x, y in pairs]
    expected = [(6, max(map(len, texts)))]
    for prompts, _, rests in turns:
        width = max(map(new_tokens, texts, prompts, rests))
        if width: expected.append((6, width))
        texts = [p + z for p, z in zip(prompts, rests)]
    assert shapes == expected and len(shapes) > 1 and texts == [x + y for x, y in revision.pairs]

@every_kind
def test_one_text_alone_has_no_padding_to_hide_behind(kind):
    "Tokens that either model is sent, all told: the text and the new tokens; the student need not be asked what follows its last one."
    student, teacher = models(kind)
    scrg, written = build(student, teacher), []
    of_student, of_teacher, turns = sent(student), sent(teacher), recorded(scrg)
    for row, (x, y) in enumerate(students_text(student)):
        for calls in (of_student, of_teacher, turns): calls.clear()
        scrg(0, [(x, y)], [row])
        (prompts, _, rests), = turns
        new = new_tokens(x + y, prompts[0], rests[0])
        assert sum(width for _, width in of_teacher) == len(x) + len(y) + new and len(of_teacher) == 1 + (new > 0)
        read = sum(width for _, width in of_student) - len(x) - len(y)
        assert 0 <= read - len(rests[0]) <= 3        # `generate` looks whether all have ended at every fourth token only
        written.append(len(rests[0]))
    assert max(written) > 4 and len(written) == 6

@every_kind
def test_the_student_writes_on_from_the_teachers_token_without_reading_its_text_again(kind):
    student, teacher = models(kind)
    pairs, scrg = students_text(student), build(student, teacher)
    shapes, turns = sent(student), recorded(scrg)
    scrg(0, pairs, range(6))
    (_, limits, _), = turns
    assert shapes[0] == (6, max(len(x) + len(y) for x, y in pairs)) and {width for _, width in shapes[1:]} == {1}
    assert shapes[1][0] == sum(n > 0 for n in limits) and 1 < len(shapes) <= 1 + max(limits)

def fresh_states(teacher, pairs):
    batch = collate(pairs, PAD)
    with torch.no_grad(): return hidden_states(teacher, batch)[supervised(batch)]

@every_kind
@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize("detect", ["max_kl", "threshold", "random"])
def test_the_teachers_states_are_those_of_a_fresh_pass_over_the_revision(kind, corrections, detect):
    "With many stop ids, so that texts have all lengths, and revisions are shorter or longer than what they revise."
    stops, (student, teacher), longer = range(3, 9), models(kind, dtype=torch.float64), set()
    scrg = build(student, teacher, corrections, detect=detector(detect, kind)[0], stops=stops)
    wanted = {(True, True, False), (True, False, True)}
    for step in range(20):
        if step >= 4 and wanted <= longer: break
        pairs = students_text(student, seed=step, stops=stops)
        revision = scrg(step, pairs, range(6))
        expected = fresh_states(teacher, revision.pairs)
        assert revision.teacher_hidden.shape == (sum(len(y) for _, y in revision.pairs), 16) and not revision.teacher_hidden.requires_grad
        torch.testing.assert_close(revision.teacher_hidden, expected, rtol=0, atol=CLOSE[kind])
        longer |= {(j >= 0, len(new) > len(old), len(new) < len(old)) for (_, old), (_, new), j in zip(pairs, revision.pairs, revision.position)}
    assert wanted <= longer
    if (detect, corrections) == ("threshold", 1): assert (False, False, False) in longer       # corrected texts beside others

@every_kind
def test_a_greedy_teacher_with_a_threshold_goes_from_left_to_right_and_stops(kind):
    student, teacher = models(kind)
    pairs, revised = students_text(student), {}
    for corrections in (1, NEW, NEW + 2):
        scrg = build(student, teacher, corrections, detect=FirstAbove(THRESHOLD[kind]), teacher_token="greedy")
        turns = recorded(scrg)
        revised[corrections] = scrg(0, pairs, range(6)).pairs
    assert revised[1] != revised[NEW] == revised[NEW + 2]
    scores, texts = scrg.scorer(revised[NEW], [(b,) for b in range(6)]), [[x + y for x, y in pairs], *([p + z for p, z in zip(ps, zs)] for ps, _, zs in turns)]
    assert not (scores.kl >= THRESHOLD[kind])[scores.teacher_ids != scores.student_ids].any()
    for b in range(6):
        corrected = [len(ps[b]) for t, (ps, _, zs) in enumerate(turns) if ps[b] != texts[t][b]]
        assert corrected == sorted(set(corrected))
    assert [ps for ps, _, _ in turns[-2:]] == [texts[-1]] * 2 and all(limits == [0] * 6 for _, limits, _ in turns[-2:])

def test_correction_html_escapes_text_and_says_when_there_is_nothing():
    class Letters:
        def decode(self, ids): return "".join(chr(i) for i in ids)
    ids = lambda text: [ord(c) for c in text]
    before = ids("ab<c>"), ids("ab")
    revision = Revision([([], ids("abX&y\n")), ([], before[1])], [2, -1], [1.25, 0.], [ord("<"), -1], [ord("X"), -1], [math.nan] * 2)
    shown = correction_html(Letters(), before[0], revision, prompt="which <one>?")
    assert "&lt;" in shown and "c&gt;" in shown and ">X<" in shown and "&amp;y↵" in shown and "<c>" not in shown
    assert "which &lt;one&gt;?" in shown and "token 3, KL 1.25 nats" in shown
    assert "nothing to correct" in correction_html(Letters(), before[1], revision, 1)

def test_the_worst_token_is_underlined_without_its_space():
    class Words:
        def decode(self, ids): return "".join((" red", " blue", " sky")[i] for i in ids)
    shown = correction_html(Words(), [0, 2], Revision([([], [1, 2])], [0], [1.], [0], [1], [math.nan]))
    assert re.search(r' <span style="[^"]*underline[^"]*">red</span>', shown)
