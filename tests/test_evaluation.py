"""Evaluation: answers in their order, sampling as the paper does it, losses of every token and
the excess accumulated error against plain loops."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_models import arrival_times, EOS, KINDS, PAD, tiny_model
from mgsr_nb.presets import PRESETS
from mgsr_nb.config import resolve
from mgsr_nb.data import Example
from mgsr_nb.tokens import Encoded
from mgsr_nb.answers import repetition, score_answers
from mgsr_nb.evaluation import accumulated_error, answers, evaluate, excess_error, excess_errors, exposure, held_out, response_states, token_losses, usable_length, written, written_and_read
from mgsr_nb.sampling import sampler

every_kind = pytest.mark.parametrize("kind", KINDS)
V, NEW = 60, 8
PROMPTS = [[11, 12, 13], [14], [15, 16, 2, 17, 18, 19, 20], [9, 8], [3, 30], [33] * 5, [40, 41, 42, 43]]
RESPONSES = [[21, EOS], [22, 23, EOS], [24], [25, 26, 27, 28, 29, EOS], [EOS], [31] * 9, [32, 34, 35, EOS]]

def encoded(references=("a reference",)):
    return [Encoded(p, r, Example(f"id-{i}", f"question {i}", references=tuple(references))) for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES))]

class Words:
    "A tokenizer whose text is the ids themselves; EOS is special."
    pad_token_id = PAD
    def decode(self, ids, skip_special_tokens=False): return " " + "  ".join(f"w{i}" for i in ids if not (skip_special_tokens and i == EOS)) + "\n"

def test_repetition_counts_four_words_unless_told_otherwise_and_stands_beside_distinct():
    texts = ["a b a b a b", "a b c d", "", "w w w w w", "x", "y", "z"]
    rates = (1 / 3 + 0 + 0 + 1 / 2) / 7
    assert repetition(texts) == pytest.approx(rates)
    assert score_answers(texts, [e.example for e in encoded()])["repetition_4"] == pytest.approx(rates)

def test_repetition_is_averaged_over_the_seeds():
    def sample(prompts, keys, limits, past=None): return [[5] * 8 if k[0] == 10 else [6, 7, 8, 9] for k in keys]
    metrics, *_ = evaluate(tiny_model("gpt2"), None, {"a": encoded()}, sample, Words(), V, [10, 20], NEW)
    assert metrics["a"]["repetition_4"] == pytest.approx((4 / 5 + 0) / 2)

# --- answers: number, order, empty ones

def tell(prompts, keys, limits, past=None):
    "A sampler that answers with the prompt itself."
    return [[*p, EOS] for p in prompts]

@pytest.mark.pitfall(38)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_pitfall_38_each_answer_stands_where_its_prompt_stood(batch_size):
    asked = []
    def sample(prompts, keys, limits):
        asked.extend(zip(keys, limits))
        return tell(prompts, keys, limits)
    found = answers(sample, encoded(), Words(), 10, NEW, batch_size)
    assert found == ["  ".join(f"w{i}" for i in p) for p in PROMPTS]
    assert sorted(k[-1] for k, _ in asked) == list(range(7)) and len({k for k, _ in asked}) == 7 and {n for _, n in asked} == {NEW}

@pytest.mark.pitfall(38)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_pitfall_38_written_ids_stand_where_their_prompt_stood_and_keep_their_stop(batch_size):
    examples = encoded()
    found = written(tell, examples, 10, NEW, batch_size)
    assert found == [[*p, EOS] for p in PROMPTS]
    assert answers(tell, examples, Words(), 10, NEW, batch_size) == [Words().decode(ids, skip_special_tokens=True).strip() for ids in found]

@pytest.mark.pitfall(38)
def test_pitfall_38_an_empty_prediction_scores_zero_and_is_counted():
    examples = [e.example for e in encoded(["w1 w2"])]
    found = score_answers(["w1 w2", "", "w1 w2", "", "", "w9", "w1"], examples)
    assert found["empty"] == 3 and found["each"] == pytest.approx([100, 0, 100, 0, 0, 0, 200 / 3]) and found["rouge_l"] == pytest.approx((200 + 200 / 3) / 7)

@pytest.mark.pitfall(38)
def test_pitfall_38_an_answer_of_nothing_but_eos_is_empty_and_is_counted_over_all_seeds():
    def sample(prompts, keys, limits, past=None): return [[EOS] if k[-1] % 2 else [5, EOS] for k in keys]
    metrics, records, _ = evaluate(tiny_model("gpt2"), None, {"a": encoded(["w5"])}, sample, Words(), V, [10, 20], NEW)
    assert metrics["a"]["empty"] == 6 and metrics["a"]["rouge_l"] == pytest.approx(400 / 7) and [r["prediction"] for r in records[:2]] == ["w5", ""]

@pytest.mark.pitfall(38)
@pytest.mark.parametrize("n", [6, 8, 0])
def test_pitfall_38_another_number_of_predictions_is_an_error(n):
    with pytest.raises(ValueError, match=f"{n} predictions for 7 examples"): score_answers(["x"] * n, [e.example for e in encoded()])

@pytest.mark.pitfall(38)
def test_pitfall_38_records_belong_to_their_examples():
    examples = encoded()
    metrics, records, _ = evaluate(tiny_model("gpt2"), None, {"a": examples, "b": examples[2:4]}, tell, Words(), V, [10, 20], NEW, batch_size=3)
    expected = [(s, seed, e.example.id, e.example.instruction, "  ".join(f"w{i}" for i in e.prompt_ids)) for s, es in (("a", examples), ("b", examples[2:4])) for seed in (10, 20) for e in es]
    assert [(r["set"], r["seed"], r["id"], r["instruction"], r["prediction"]) for r in records] == expected
    assert [metrics[s]["prompts"] for s in "ab"] == [7, 2] and len(metrics["a"]["rouge_l_per_prompt"]) == 7

def test_the_mean_is_over_prompts_and_seeds():
    "One seed answers all prompts right, the other none."
    def sample(prompts, keys, limits, past=None): return [[5] if k[0] == 10 else [6] for k in keys]
    metrics, records, _ = evaluate(tiny_model("gpt2"), None, {"a": encoded(["w5"])}, sample, Words(), V, [10, 20], NEW)
    assert metrics["a"]["rouge_l"] == 50 and metrics["a"]["rouge_l_per_seed"] == {"10": 100, "20": 0} and metrics["a"]["rouge_l_per_prompt"] == [50] * 7
    assert "kl" not in metrics["a"] and {r["seed"]: r["rouge_l"] for r in records} == {10: 100, 20: 0}

# --- sampling as the paper does it

def naive_answers(model, seed, new=NEW):
    "One sequence at a time, the whole softmax at temperature 1, no cache."
    texts = []
    for i, prompt in enumerate(PROMPTS):
        ids = []
        while len(ids) < new and EOS not in ids:
            with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].softmax(-1)
            ids.append(int((arrival_times(V, (seed, "answer", i), len(ids)) / p).argmin()))
        texts.append(Words().decode(ids, skip_special_tokens=True).strip())
    return texts

@pytest.mark.pitfall(39)
@every_kind
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_pitfall_39_answers_are_drawn_from_the_whole_softmax_whatever_the_batch(kind, batch_size):
    model = tiny_model(kind, dtype=torch.float64)
    found = answers(sampler(model, [EOS], PAD, V), encoded(), Words(), 10, NEW, batch_size)
    assert found == naive_answers(model, 10) and len(set(found)) > 1

@pytest.mark.pitfall(39)
def test_pitfall_39_the_models_own_generation_settings_do_not_count():
    model = tiny_model("llama", dtype=torch.float64)
    sample = sampler(model, [EOS], PAD, V)
    plain = answers(sample, encoded(), Words(), 10, NEW)
    g = model.generation_config
    g.do_sample, g.temperature, g.top_k, g.top_p, g.repetition_penalty = True, 0.01, 1, 0.1, 5.
    assert answers(sample, encoded(), Words(), 10, NEW) == plain
    assert answers(sample, encoded(), Words(), 20, NEW) != plain      # another seed, another draw

@pytest.mark.pitfall(39)
def test_pitfall_39_rare_classes_are_drawn_too():
    "With top_k=50 or top_p=0.9 some of 60 equally likely classes would never come."
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad(): model.get_output_embeddings().weight.zero_()
    sample = sampler(model, [], PAD, V)
    drawn = {i for seed in range(20) for row in sample(PROMPTS, [(seed, "answer", i) for i in range(7)], [NEW] * 7) for i in row}
    assert drawn == set(range(V))

@pytest.mark.pitfall(39)
def test_pitfall_39_the_papers_seeds():
    assert resolve(preset="gpt2-dolly").eval_seed_list == [10, 20, 30, 40, 50] and PRESETS["gpt2-dolly"]["eval_prompts"] == 0

@every_kind
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_reading_the_references_on_the_way_changes_neither_answers_nor_states(kind, batch_size):
    model = tiny_model(kind, dtype=torch.float64).train()
    sample = sampler(model, [EOS], PAD, V)
    found, states = written_and_read(model, sample, encoded(), 10, NEW, PAD, batch_size)
    assert found == written(sample, encoded(), 10, NEW, batch_size) and model.training
    for ours, expected in zip(states, response_states(model, encoded(), PAD), strict=True): torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)

def test_an_evaluation_reads_a_prompt_once():
    "Of the tokens of a prompt that the student reads, only the last comes twice: it predicts the first token of the answer."
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    read = []
    student.model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    example = encoded()[:1]
    prompt, reference = example[0].prompt_ids, example[0].response_ids
    evaluate(student, teacher, {"a": example}, sampler(student, [EOS], PAD, V), Words(), V, [10], NEW)
    assert read[:2] == [[[*prompt, *reference]], [prompt[-1:]]] and all(len(ids[0]) == 1 for ids in read[1:])

# --- held-out numbers

def naive_held_out(student, teacher, examples):
    "Token by token, one sequence at a time: no padding, no mask, no chunks."
    nll, kl, n = 0., 0., 0
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        with torch.no_grad(): q, p = (m(input_ids=ids).logits[0, :, :V].softmax(-1) for m in (student, teacher))
        for i, token in enumerate(e.response_ids):
            row = len(e.prompt_ids) - 1 + i
            nll -= math.log(q[row, token])
            kl += sum(float(p[row, k]) * math.log(p[row, k] / q[row, k]) for k in range(V))
            n += 1
    return {"nll": nll / n, "kl": kl / n, "tokens": n}

@every_kind
def test_held_out_equals_a_naive_loop(kind):
    student, teacher = tiny_model(kind, dtype=torch.float64, seed=1), tiny_model(kind, 3, vocab=V + 4, dtype=torch.float64, seed=2)
    expected = naive_held_out(student, teacher, encoded())
    assert expected["tokens"] == sum(map(len, RESPONSES)) and expected["kl"] > 0.1
    whole = lambda found: {k: v for k, v in found.items() if not k.endswith("_per_prompt")}
    for batch_size, chunk in ((1, 1), (2, 7), (3, 256), (16, 5)):
        assert whole(held_out(student, teacher, encoded(), PAD, V, batch_size, chunk)) == pytest.approx(expected, rel=1e-10)
        known = response_states(teacher, encoded(), PAD, batch_size)
        assert [x.shape for x in known] == [(len(r), teacher.config.hidden_size) for r in RESPONSES]
        assert whole(held_out(student, teacher, encoded(), PAD, V, batch_size, chunk, known)) == pytest.approx(expected, rel=1e-10)
    assert whole(held_out(student, None, encoded(), PAD, V)) == pytest.approx({k: v for k, v in expected.items() if k != "kl"}, rel=1e-10)

@every_kind
def test_each_prompt_has_its_own_losses(kind):
    student, teacher = tiny_model(kind, dtype=torch.float64, seed=1), tiny_model(kind, 3, vocab=V + 4, dtype=torch.float64, seed=2)
    found, alone = held_out(student, teacher, encoded(), PAD, V), [naive_held_out(student, teacher, [e]) for e in encoded()]
    for name in ("nll", "kl"): assert found[f"{name}_per_prompt"] == pytest.approx([a[name] for a in alone], abs=6e-6)      # five decimals are kept
    assert found["tokens_per_prompt"] == [a["tokens"] for a in alone]

def test_known_states_spare_the_teacher_from_reading():
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    known = response_states(teacher, encoded(), PAD)
    teacher.model.forward = None        # only its head may be used
    expected = held_out(student, teacher, encoded(), PAD, V, known=known)
    own = response_states(student, encoded(), PAD)
    student.model.forward = None
    assert held_out(student, teacher, encoded(), PAD, V, known=known, student_known=own) == expected

@every_kind
def test_a_model_is_at_no_distance_from_itself_and_leaves_evaluation_as_it_came(kind):
    model = tiny_model(kind).train()
    assert held_out(model, model, encoded(), PAD, V)["kl"] == 0 and model.training      # with dropout it would not be 0
    assert all(p.grad is None for p in model.parameters())

def test_no_examples_give_zero_tokens(): assert held_out(tiny_model("gpt2"), None, [], PAD, V) == {"nll": 0., "nll_per_prompt": [], "tokens": 0, "tokens_per_prompt": []}

# --- the losses of every token

def naive_kl(student, teacher, prompt, response):
    "Token by token, each from a forward pass over nothing but what stands before it."
    found = []
    for t in range(len(response)):
        ids = torch.tensor([[*prompt, *response[:t]]])
        with torch.no_grad(): q, p = (m(input_ids=ids).logits[0, -1, :V].softmax(-1) for m in (student, teacher))
        found.append(sum(float(p[k]) * math.log(p[k] / q[k]) for k in range(V)))
    return found

def two_models(kind="llama", dtype=torch.float64): return tiny_model(kind, dtype=dtype, seed=1), tiny_model(kind, 3, vocab=V + 4, dtype=dtype, seed=2)

@every_kind
def test_token_losses_are_those_of_a_naive_loop_token_by_token(kind):
    student, teacher = two_models(kind)
    pairs = list(zip(PROMPTS, [*RESPONSES[:5], [], RESPONSES[6]]))      # one response is empty
    expected = [naive_kl(student, teacher, *pair) for pair in pairs]
    for batch_size, chunk in ((1, 1), (2, 7), (3, 256), (16, 5)):
        nll, kl = token_losses(student, teacher, pairs, PAD, V, batch_size, chunk)
        assert [k.tolist() for k in kl] == [pytest.approx(e, rel=1e-9) for e in expected]
        for (prompt, response), found in zip(pairs, nll):
            with torch.no_grad(): logs = student(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            assert found.tolist() == pytest.approx([-logs[len(prompt) - 1 + t, i].item() for t, i in enumerate(response)], rel=1e-9)

def test_token_losses_without_a_teacher_without_pairs_without_tokens():
    student, teacher = two_models()
    alone = token_losses(student, None, list(zip(PROMPTS, RESPONSES)), PAD, V)
    assert len(alone) == 1 and [x.tolist() for x in alone[0]] == [x.tolist() for x in token_losses(student, teacher, list(zip(PROMPTS, RESPONSES)), PAD, V)[0]]
    assert token_losses(student, teacher, [], PAD, V) == [[], []]
    assert [[x.tolist() for x in each] for each in token_losses(student, teacher, [([3, 4], []), ([5], [])], PAD, V)] == [[[], []]] * 2

def test_token_losses_are_float64_whatever_the_models_are_and_leave_them_as_they_came():
    student, teacher = two_models("gpt2", torch.float32)
    expected = token_losses(student, teacher, list(zip(PROMPTS, RESPONSES)), PAD, V)
    student.train()
    losses = token_losses(student, teacher, list(zip(PROMPTS, RESPONSES)), PAD, V)
    assert [[x.tolist() for x in each] for each in losses] == [[x.tolist() for x in each] for each in expected]     # no dropout
    assert {x.dtype for each in losses for x in each} == {torch.float64} and student.training and not teacher.training
    assert all(not x.requires_grad for each in losses for x in each)

def test_the_head_never_sees_more_rows_than_a_chunk():
    student, teacher = two_models()
    rows = []
    for m in (student, teacher): m.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    token_losses(student, teacher, list(zip(PROMPTS, RESPONSES)), PAD, V, batch_size=16, chunk_tokens=5)
    tokens = sum(map(len, RESPONSES))
    assert max(rows) == 5 and sum(rows) == 2 * tokens       # each row once for each model

# --- the excess accumulated error

lists = st.lists(st.lists(st.floats(0, 5), max_size=6), min_size=1, max_size=5).filter(lambda kls: max(map(len, kls)) > 0)

def naive_accumulated(kls, length):
    total, found = 0., []
    for t in range(length):
        there = [k[t] for k in kls if len(k) > t]
        total += sum(there) / len(there)
        found.append(total)
    return found

@settings(max_examples=100, deadline=None)
@given(lists)
def test_accumulated_error_equals_a_naive_loop(kls):
    longest = max(map(len, kls))
    assert accumulated_error(kls, longest).tolist() == pytest.approx(naive_accumulated(kls, longest), abs=1e-12)
    assert accumulated_error([torch.tensor(k, dtype=torch.float64) for k in reversed(kls)], longest).tolist() == pytest.approx(naive_accumulated(kls, longest), abs=1e-12)

@pytest.mark.parametrize("student,teacher,length,percent", [
    ([[1, 3]], [[1, 1]], 2, 100), ([[1, 3]], [[1, 1]], 1, 0),
    ([[1, 3], [1]], [[1, 1], [1, 1]], 2, 100),              # the ended response is left out; counted as 0 it would be 25
    ([[1, 1]], [[1, 3], [1]], 2, -50),                      # in the teacher's text as well
    ([[2], [4, 1, 1]], [[1, 1, 1]], 3, 100 * (5 - 3) / 3),
    ([[1, 1, 9]], [[1, 1, 1]], 2, 0)])                      # what stands after `length` does not count
def test_excess_error_by_hand(student, teacher, length, percent):
    assert excess_error(student, teacher, length) == pytest.approx(percent, abs=1e-12)
    assert excess_errors(student, teacher, length)[-1] == pytest.approx(percent, abs=1e-12) and len(excess_errors(student, teacher, length)) == length

@settings(max_examples=100, deadline=None)
@given(lists)
def test_the_same_text_has_no_excess_and_more_error_on_the_own_text_has_more(kls):
    longest = max(map(len, kls))
    assert excess_errors(kls, kls, longest).tolist() == [0] * longest
    teachers = [[k + 0.5 for k in response] for response in kls]
    found = [excess_error([[k * c + 0.5 for k in response] for response in kls], teachers, longest) for c in (0, 1, 2, 4)]
    assert found[1] == 0 and found == sorted(found)
    if any(k > 1e-6 for response in kls for k in response): assert found[0] < 0 < found[2] < found[3]
    more = [[k + 0.5 + (t == longest - 1) for t, k in enumerate(response)] for response in kls]      # a nat more at the last position
    assert excess_error(more, teachers, longest) == pytest.approx(100 / accumulated_error(teachers, longest)[-1].item())

@settings(max_examples=50, deadline=None)
@given(lists, st.floats(0.01, 100))
def test_the_unit_of_the_error_does_not_count(kls, c):
    longest, student = max(map(len, kls)), [[k + 1 for k in response] for response in kls]
    teacher = [[0.5 + t for t in range(longest)]]
    scaled = [[[k * c for k in response] for response in text] for text in (student, teacher)]
    assert excess_error(*scaled, longest) == pytest.approx(excess_error(student, teacher, longest), rel=1e-9, abs=1e-9)

def test_zero_over_zero_is_no_excess_and_something_over_zero_is_infinite():
    assert excess_error([[0, 0], [0]], [[0, 0]], 2) == 0
    assert excess_errors([[0, 1]], [[0, 0]], 2).tolist() == [0, math.inf]
    assert excess_error([[0, 1, 1]], [[0, 0, 1]], 3) == 100
    assert excess_error([], [], 0) == excess_error([[1]], [[2]], 0) == 0

def test_accumulated_error_adds_in_float64():
    assert accumulated_error([torch.tensor([2. ** 24, 1.])], 2).tolist() == [2 ** 24, 2 ** 24 + 1]      # float32 loses the 1
    assert accumulated_error([torch.tensor([2. ** 24]), torch.tensor([1.])], 1).tolist() == [(2 ** 24 + 1) / 2]

@pytest.mark.parametrize("kls,length", [([[1, 2], [3]], 3), ([[1, 2]], -1), ([], 1), ([[]], 1)])
def test_a_length_that_no_response_has_is_an_error(kls, length):
    with pytest.raises(ValueError, match=f"length {length};.*responses has"): accumulated_error(kls, length)
    if length > 0:
        for texts in ((kls, [[1] * 9]), ([[1] * 9], kls)):
            with pytest.raises(ValueError, match=f"length {length};"): excess_error(*texts, length)

def test_a_nan_is_not_hidden(): assert math.isnan(excess_error([[1, math.nan], [1, 1]], [[1, 1]], 2))

@pytest.mark.parametrize("lengths,usable", [([[4]], 4), ([[5, 3]], 5), ([[5, 3, 2]], 3), ([[2, 9, 4, 7]], 7), ([[9, 1, 1]], 1), ([[9, 9, 0, 0, 0]], 0),
                                            ([[5, 5], [3, 2]], 3), ([[3, 2], [5, 5]], 3), ([[]], 0), ([[4], []], 0), ([], 0)])
def test_the_usable_length_is_reached_by_half_of_both(lengths, usable):
    assert usable_length(*[[[7] * n for n in text] for text in lengths]) == usable

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=15))
def test_the_usable_length_is_the_largest(lengths):
    found = usable_length([[0] * n for n in lengths])
    assert 2 * sum(n >= found for n in lengths) >= len(lengths) > 2 * sum(n >= found + 1 for n in lengths)

# --- ... of models

def both_texts(student, teacher, seed=10): return [written(sampler(m, [EOS], PAD, V), encoded(), seed, NEW) for m in (student, teacher)]

@every_kind
def test_the_excess_error_of_models_equals_a_naive_loop(kind):
    student, teacher = two_models(kind)
    texts = both_texts(student, teacher)
    length = min(sorted(map(len, text))[3] for text in texts)       # the middle one of seven: four reach it
    ours, theirs = ([naive_kl(student, teacher, p, r) for p, r in zip(PROMPTS, text)] for text in texts)
    expected = [0 if a == b else 100 * (a - b) / b for a, b in zip(naive_accumulated(ours, length), naive_accumulated(theirs, length))]
    assert length > 1 and abs(expected[-1]) > 0.1
    for batch_size, chunk in ((1, 3), (3, 256)):
        found = exposure(student, teacher, encoded(), *texts, PAD, V, batch_size, chunk)
        assert found["excess_error_length"] == length and found["excess_error"] == pytest.approx(expected[-1], rel=1e-8)
        assert found["excess_error_curve"] == pytest.approx(expected, abs=2e-3) and found["excess_error_curve"][0] == 0      # the first token follows the same prompt

@every_kind
def test_equal_models_have_no_excess_on_any_text(kind):
    student, teacher = two_models(kind, torch.float32)
    texts = both_texts(student, teacher)
    assert texts[0] != texts[1]
    nothing = exposure(teacher, teacher, encoded(), *texts, PAD, V)
    assert nothing["excess_error"] == 0 and set(nothing["excess_error_curve"]) == {0}
    same = exposure(student, teacher, encoded(), texts[0], texts[0], PAD, V)
    assert same["excess_error"] == 0 and set(same["excess_error_curve"]) == {0} and same["excess_error_length"] > 1

def test_no_examples_have_no_excess():
    assert exposure(*two_models(), [], [], [], PAD, V) == {"excess_error": 0, "excess_error_length": 0, "excess_error_curve": []}

def test_evaluate_gives_the_ids_of_the_first_seed_and_takes_the_teachers():
    student, teacher = two_models()
    sets = {"a": encoded(), "b": encoded()[2:5]}
    of = lambda m, **k: evaluate(m, teacher, sets, sampler(m, [EOS], PAD, V), Words(), V, [20, 10], NEW, batch_size=3, **k)
    _, _, teachers = of(teacher)
    assert teachers == {s: written(sampler(teacher, [EOS], PAD, V), es, 20, NEW) for s, es in sets.items()} != {s: written(sampler(teacher, [EOS], PAD, V), es, 10, NEW) for s, es in sets.items()}
    plain, records, _ = of(student)
    with_text, records_with, students = of(student, teacher_text=teachers)
    assert records_with == records and students["a"] == written(sampler(student, [EOS], PAD, V), sets["a"], 20, NEW)
    for name, examples in sets.items():
        new = exposure(student, teacher, examples, students[name], teachers[name], PAD, V)
        assert set(new) == {"excess_error", "excess_error_length", "excess_error_curve"} and not set(new) & set(plain[name])
        assert with_text[name]["excess_error"] == pytest.approx(new["excess_error"]) and abs(new["excess_error"]) > 0.1
        assert {k: v for k, v in with_text[name].items() if k not in new} == plain[name]

def test_the_teachers_own_text_has_no_excess():
    student, teacher = two_models()
    of = lambda **k: evaluate(teacher, teacher, {"a": encoded()}, sampler(teacher, [EOS], PAD, V), Words(), V, [10], NEW, **k)
    metrics, *_ = of(teacher_text=of()[2])
    assert metrics["a"]["excess_error"] == 0 and metrics["a"]["kl"] == 0

@pytest.mark.parametrize("text,message", [({"a": RESPONSES[:6]}, "6 responses for the 7 examples of 'a'"), ({"b": RESPONSES}, "0 responses for the 7 examples of 'a'"), (None, "without the teacher")])
def test_a_teachers_text_that_does_not_fit_is_refused_before_anything_is_sampled(text, message):
    def sample(*_): raise AssertionError("sampled")
    student, teacher = two_models()
    with pytest.raises(ValueError, match=message):
        evaluate(student, None if text is None else teacher, {"a": encoded()}, sample, Words(), V, [10], NEW, teacher_text=text or {"a": RESPONSES})
