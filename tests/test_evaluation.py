"""Evaluation: ROUGE-L on cases that a reader can count, answers in their order, sampling as the paper does it, and held-out numbers against a plain loop."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_models import EOS, KINDS, PAD, tiny_model
from mgsr_nb.config import PRESETS, resolve
from mgsr_nb.data import Encoded, Example
from mgsr_nb.evaluation import answers, distinct_n, evaluate, held_out, rouge_l, score_answers
from mgsr_nb.sampling import generator_for, sampler

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

# --- ROUGE-L

@pytest.mark.pitfall(37)
@pytest.mark.parametrize("prediction,references,score", [
    ("the cat sat", ["the cat sat"], 100), ("the cat sat", ["the cat ran"], 200 / 3),           # 2 of 3 words on both sides
    ("the cat", ["the cat sat on the mat"], 50),                                                # precision 1, recall 2/6: F = 0.5
    ("the cat sat on the mat", ["the cat"], 50), ("a b c d", ["d c b a"], 25),                  # in order, only one word is common
    ("a x b y c", ["a b c"], 75),                                                               # gaps are allowed: 3/5 and 3/3
    ("c d\na b", ["a b\nc d"], 50),                                                             # the whole text is one sequence, lines do not count (rougeLsum: 100)
    ("he was running with dogs", ["he was run with dog"], 100),                                 # stemmed
    ("The CAT, sat!", ["the cat sat"], 100),                                                    # lower case, no punctuation
    ("dog", ["cat", "dog", "cat dog"], 100), ("a b", ["a", "b c d e"], 200 / 3),                # the best reference
    ("", ["a b"], 0), ("...", ["a b"], 0), ("x", ["y"], 0)])
def test_pitfall_37_rouge_l_counted_by_hand(prediction, references, score):
    assert rouge_l(prediction, references) == pytest.approx(score, abs=1e-9)

@pytest.mark.pitfall(37)
@settings(max_examples=100, deadline=None)
@given(prediction=st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), references=st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), min_size=1, max_size=3))
def test_pitfall_37_rouge_l_equals_a_longest_common_subsequence(prediction, references):
    def lcs(a, b): return 0 if not a or not b else 1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))
    def f(reference):
        n = lcs(prediction[:6], reference[:6])
        return 200 * n / (len(prediction[:6]) + len(reference[:6]))     # 2 P R / (P + R)
    assert rouge_l(" ".join(prediction[:6]), [" ".join(r[:6]) for r in references]) == pytest.approx(max(map(f, references)))

def test_rouge_l_without_references_is_an_error():
    with pytest.raises(ValueError, match="no references"): rouge_l("a", [])

def test_distinct_n_by_hand():
    texts = ["The cat the cat", "the dog"]
    assert distinct_n(texts, 1) == 3 / 6 and distinct_n(texts, 2) == 3 / 4 and distinct_n(texts, 4) == 1 and distinct_n(texts, 5) == 0
    assert distinct_n([], 1) == 0 and distinct_n(["", " "], 1) == 0
    assert distinct_n(["a b", "c"], 2) == 1      # no n-gram goes from one text to the next

# --- answers: number, order, empty ones

def tell(prompts, keys, limits):
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
def test_pitfall_38_an_empty_prediction_scores_zero_and_is_counted():
    examples = [e.example for e in encoded(["w1 w2"])]
    found = score_answers(["w1 w2", "", "w1 w2", "", "", "w9", "w1"], examples)
    assert found["empty"] == 3 and found["each"] == pytest.approx([100, 0, 100, 0, 0, 0, 200 / 3]) and found["rouge_l"] == pytest.approx((200 + 200 / 3) / 7)

@pytest.mark.pitfall(38)
def test_pitfall_38_an_answer_of_nothing_but_eos_is_empty_and_is_counted_over_all_seeds():
    def sample(prompts, keys, limits): return [[EOS] if k[-1] % 2 else [5, EOS] for k in keys]
    metrics, records = evaluate(tiny_model("gpt2"), None, {"a": encoded(["w5"])}, sample, Words(), V, [10, 20], NEW)
    assert metrics["a"]["empty"] == 6 and metrics["a"]["rouge_l"] == pytest.approx(400 / 7) and [r["prediction"] for r in records[:2]] == ["w5", ""]

@pytest.mark.pitfall(38)
@pytest.mark.parametrize("n", [6, 8, 0])
def test_pitfall_38_another_number_of_predictions_is_an_error(n):
    with pytest.raises(ValueError, match=f"{n} predictions for 7 examples"): score_answers(["x"] * n, [e.example for e in encoded()])

@pytest.mark.pitfall(38)
def test_pitfall_38_records_belong_to_their_examples():
    examples = encoded()
    metrics, records = evaluate(tiny_model("gpt2"), None, {"a": examples, "b": examples[2:4]}, tell, Words(), V, [10, 20], NEW, batch_size=3)
    expected = [(s, seed, e.example.id, e.example.instruction, "  ".join(f"w{i}" for i in e.prompt_ids)) for s, es in (("a", examples), ("b", examples[2:4])) for seed in (10, 20) for e in es]
    assert [(r["set"], r["seed"], r["id"], r["instruction"], r["prediction"]) for r in records] == expected
    assert [metrics[s]["prompts"] for s in "ab"] == [7, 2] and len(metrics["a"]["rouge_l_per_prompt"]) == 7

def test_the_mean_is_over_prompts_and_seeds():
    "One seed answers all prompts right, the other none."
    def sample(prompts, keys, limits): return [[5] if k[0] == 10 else [6] for k in keys]
    metrics, records = evaluate(tiny_model("gpt2"), None, {"a": encoded(["w5"])}, sample, Words(), V, [10, 20], NEW)
    assert metrics["a"]["rouge_l"] == 50 and metrics["a"]["rouge_l_per_seed"] == {"10": 100, "20": 0} and metrics["a"]["rouge_l_per_prompt"] == [50] * 7
    assert "kl" not in metrics["a"] and {r["seed"]: r["rouge_l"] for r in records} == {10: 100, 20: 0}

# --- sampling as the paper does it

def naive_answers(model, seed, new=NEW):
    "One sequence at a time, the whole softmax at temperature 1, no cache."
    texts = []
    for i, prompt in enumerate(PROMPTS):
        generator, ids = generator_for(seed, "answer", i), []
        while len(ids) < new and EOS not in ids:
            with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].softmax(-1)
            ids.append(int((-torch.rand(V, generator=generator).log() / p).argmin()))
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
    for batch_size, chunk in ((1, 1), (2, 7), (3, 256), (16, 5)):
        assert held_out(student, teacher, encoded(), PAD, V, batch_size, chunk) == pytest.approx(expected, rel=1e-10)
    assert held_out(student, None, encoded(), PAD, V) == pytest.approx({k: v for k, v in expected.items() if k != "kl"}, rel=1e-10)

@every_kind
def test_a_model_is_at_no_distance_from_itself_and_leaves_evaluation_as_it_came(kind):
    model = tiny_model(kind).train()
    assert held_out(model, model, encoded(), PAD, V)["kl"] == 0 and model.training      # with dropout it would not be 0
    assert all(p.grad is None for p in model.parameters())

def test_no_examples_give_zero_tokens(): assert held_out(tiny_model("gpt2"), None, [], PAD, V) == {"nll": 0., "tokens": 0}
