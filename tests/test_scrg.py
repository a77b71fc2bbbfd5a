"""SCRG: the error is found where Eq. 3 says, only what Eq. 4 says changes, and it ends where it must."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_models import EOS, KINDS, PAD, tiny_model
from mgsr_nb.config import RunConfig
from mgsr_nb.divergences import forward_kl, reverse_kl
from mgsr_nb.sampling import OnPolicy, generator_for, sampler
from mgsr_nb.scrg import DIRECTIONS, SCRG, Revision, Scorer, Scores, correction_html, corrected_prefix, error_position

every_kind = pytest.mark.parametrize("kind", KINDS)
V, NEW = 60, 10
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

def test_corrected_prefix_by_hand():
    response = [5, 6, 7, 8]
    assert corrected_prefix(response, 2, 9) == [5, 6, 9] and corrected_prefix(response, 0, 9) == [9] and corrected_prefix(response, 3, 9) == [5, 6, 7, 9]
    assert response == [5, 6, 7, 8]

# --- correction, with scores and a writer given by hand

class Given:
    "A scorer that says what it is told, and a writer that always writes 90, 91, ... up to its limit; both remember what they were asked."
    def __init__(self, *turns):
        self.turns, self.scored, self.wrote = list(turns), [], []
    def scorer(self, pairs, keys):
        self.scored.append((pairs, keys))
        kl, teacher = self.turns[len(self.scored) - 1]
        student = [i for _, y in pairs for i in y]
        assert len(kl) == len(teacher) == len(student)
        return Scores(torch.tensor(kl), torch.tensor(teacher), torch.tensor(student), [len(y) for _, y in pairs])
    def sample(self, prompts, keys, limits):
        self.wrote.append((prompts, keys, limits))
        return [list(range(90, 90 + n)) for n in limits]
    def scrg(self, corrections=1, stops=(EOS, 77), new=6): return SCRG(self.scorer, self.sample, stops, seed=5, max_new_tokens=new, corrections=corrections)

@pytest.mark.pitfall(40)
def test_pitfall_40_only_what_follows_the_error_changes():
    "Tokens before j unchanged, token j the teacher's, then the student's new text up to the limit; the prompt untouched."
    pairs = [([10, 11], [20, 21, 22, 23]), ([12], [30, 31])]
    given = Given(([0.1, 2., 3., 1.] + [0.5, 0.4], [20, 50, 22, 51] + [52, 31]))
    revision = given.scrg()(0, pairs, range(2))
    assert revision.pairs == [([10, 11], [20, 50, 90, 91, 92, 93]), ([12], [52, 90, 91, 92, 93, 94])]
    assert (revision.position, revision.student_id, revision.teacher_id) == ([1, 0], [21, 30], [50, 52]) and revision.kl == pytest.approx([2., 0.5])
    assert given.wrote[0][0] == [[10, 11, 20, 50], [12, 52]] and given.wrote[0][2] == [4, 5]
    assert pairs == [([10, 11], [20, 21, 22, 23]), ([12], [30, 31])]

@pytest.mark.pitfall(40)
def test_pitfall_40_nothing_differs_unchanged_and_counted():
    pairs = [([10], [20, 21]), ([11], [30, 31, EOS]), ([12], [40])]
    given = Given(([9., 9., 1., 5., 2., 3.], [20, 21, 30, 55, EOS, 40]))
    revision = given.scrg()(0, pairs, range(3))
    assert [revision.pairs[b] for b in (0, 2)] == [pairs[b] for b in (0, 2)] and revision.position == [-1, 1, -1]
    assert given.wrote[0][2] == [0, 4, 0]          # nothing is written after an unchanged text, although there is room
    assert revision.summary() == {"scrg_corrected": pytest.approx(1 / 3), "scrg_position": 1., "scrg_kl": pytest.approx(5.)}

def test_the_summary_of_nothing(): assert Revision([], [], [], [], []).summary() == {"scrg_corrected": 0., "scrg_position": 0., "scrg_kl": 0.}

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
    keys = [k for _, asked in given.scored for k in asked] + [k for _, asked, _ in given.wrote for k in asked]
    assert len(set(keys)) == 6 and all(k[0] == 5 for k in keys)      # fresh random numbers in each round, for teacher and student

@pytest.mark.pitfall(40)
def test_pitfall_40_a_text_that_only_a_later_round_changes_is_counted():
    given = Given(([1., 1.], [20, 21]), ([1., 3.], [20, 50]))
    revision = given.scrg(corrections=2)(0, [([10], [20, 21])], [0])
    assert revision.pairs[0][1][:2] == [20, 50] and (revision.position, revision.student_id, revision.teacher_id, revision.kl) == ([1], [21], [50], [3.])
    assert revision.summary() == {"scrg_corrected": 1., "scrg_position": 1., "scrg_kl": 3.}

def test_keys_are_functions_of_seed_step_and_row():
    def keys(step, rows):
        given = Given(([1.] * len(rows), [50] * len(rows)))
        given.scrg()(step, [([10], [20])] * len(rows), rows)
        return [given.scored[0][1], given.wrote[0][1]]
    whole = keys(3, [0, 1, 2, 3])
    assert keys(3, [2, 3]) == [k[2:] for k in whole] and not set(sum(whole, [])) & set(sum(keys(4, [0, 1, 2, 3]), [])) and len(set(sum(whole, []))) == 8

# --- scoring, with models

def models(kind, vocab=V): return tiny_model(kind, 2, vocab=vocab, seed=1), tiny_model(kind, 3, vocab=vocab + 4, seed=2)

def students_text(student, seed=0):
    pairs, _ = OnPolicy(sampler(student, [EOS], PAD, V), seed, NEW)(0, [type("E", (), {"prompt_ids": p}) for p in PROMPTS], range(len(PROMPTS)))
    return pairs

def naive_scores(student, teacher, pair, key, direction="student_teacher", greedy=False):
    "Token by token, without padding: KL from the definition in float64, and the teacher's token, the first to arrive of the race with its generator."
    (x, y), generator, kl, ids = pair, generator_for(*key), [], []
    for i in range(len(y)):
        with torch.no_grad(): q, p = (m(input_ids=torch.tensor([x + y[:i]])).logits[0, -1, :V].double().softmax(-1) for m in (student, teacher))
        a, b = (q, p) if direction == "student_teacher" else (p, q)
        kl.append(float((a * (a / b).log()).sum()))
        ids.append(int(p.argmax()) if greedy else int((-torch.rand(V, generator=generator).log() / p).argmin()))
    return kl, ids

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
    assert scores.teacher_ids.tolist() == [i for _, ids in expected for i in ids]
    torch.testing.assert_close(scores.kl.double(), torch.tensor([v for kl, _ in expected for v in kl], dtype=torch.float64), rtol=1e-5, atol=1e-5)
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
        torch.testing.assert_close(part.kl, whole.kl, rtol=1e-5, atol=1e-6)

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
    assert found == expected and all(m.training for m in student.modules()) and not any(m.training for m in teacher.modules())
    teacher.train()
    assert scrg(0, pairs, range(len(PROMPTS))) == expected and all(m.training for m in teacher.modules())
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())

# --- the whole revision, with models

def build(student, teacher, corrections=1, new=NEW, **kw):
    return SCRG(Scorer(student, teacher, PAD, V, **kw), sampler(student, [EOS], PAD, V), [EOS], seed=0, max_new_tokens=new, corrections=corrections)

def naive_write(model, prompt, key, limit):
    generator, ids = generator_for(*key), []
    while len(ids) < limit and EOS not in ids:
        with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :V].softmax(-1)
        ids.append(int((-torch.rand(V, generator=generator).log() / p).argmin()))
    return ids

def naive_revision(student, teacher, pair, step, row, corrections, **kw):
    "Eq. 3 and 4 for one response, as a story."
    x, y = pair
    for turn in range(corrections):
        kl, teacher_ids = naive_scores(student, teacher, (x, y), (0, "teacher", step, row, turn), **kw)
        errors = [i for i in range(len(y)) if y[i] != teacher_ids[i]]
        if not errors: continue
        j = max(errors, key=lambda i: kl[i])
        y = y[:j] + [teacher_ids[j]]
        if y[-1] != EOS: y = y + naive_write(student, x + y, (0, "rewrite", step, row, turn), NEW - len(y))
    return x, y

@pytest.mark.pitfall(40)
@every_kind
@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize("options", [{}, {"direction": "teacher_student", "teacher_token": "greedy"}], ids=["printed", "other"])
def test_pitfall_40_the_revision_equals_a_naive_one(kind, corrections, options):
    student, teacher = models(kind)
    pairs = students_text(student)
    revision = build(student, teacher, corrections, **options)(3, pairs, range(len(PROMPTS)))
    naive = {} if not options else {"direction": "teacher_student", "greedy": True}
    assert revision.pairs == [naive_revision(student, teacher, pair, 3, row, corrections, **naive) for row, pair in enumerate(pairs)]
    assert revision.pairs != pairs

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
@pytest.mark.parametrize("corrections", [1, 2])
def test_pitfall_36_two_processes_that_share_the_batch_make_the_revisions_of_one(corrections):
    student, teacher = models("opt")
    pairs, scrg = students_text(student), build(student, teacher, corrections)
    whole = scrg(1, pairs, range(6))
    for split in ([[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[5], [0, 1, 2, 3, 4]]):
        for rows in split:
            part = scrg(1, [pairs[r] for r in rows], rows)
            assert part.pairs == [whole.pairs[r] for r in rows]
            assert (part.position, part.teacher_id, part.student_id) == tuple([getattr(whole, n)[r] for r in rows] for n in ("position", "teacher_id", "student_id"))

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

def test_correction_html_escapes_text_and_says_when_there_is_nothing():
    class Letters:
        def decode(self, ids): return "".join(chr(i) for i in ids)
    ids = lambda text: [ord(c) for c in text]
    shown = correction_html(Letters(), ids("ab<c>"), ids("abX&y\n"), 2)
    assert "&lt;" in shown and "c&gt;" in shown and ">X<" in shown and "&amp;y↵" in shown and "<c>" not in shown
    assert "nothing to correct" in correction_html(Letters(), ids("ab"), ids("ab"), -1)
