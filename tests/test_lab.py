"""The laboratory's pair: one token a word, one truth a token, the same start on every call."""
import copy, math
from collections import Counter
import pytest, torch
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.data import Example, load_eval_set
from mgsr_nb.evaluation import evaluate, response_states, truth_kl
from mgsr_nb.grammar import answers_of
from mgsr_nb.lab import lab_config, lab_sizes, lab_tokenizer, true_tokens
from mgsr_nb.models import load_model, load_tokenizer, model_path
from mgsr_nb.run.artefacts import model_key
from mgsr_nb.run.blueprints import architecture, conventions
from mgsr_nb.sampling import sampler
from mgsr_nb.tokens import encode
from mgsr_nb.world import OPEN, lab_splits

@pytest.fixture(scope="module")
def tokenizer(): return lab_tokenizer()

def ids(text, tokenizer): return tokenizer(text, add_special_tokens=False).input_ids

def test_a_word_is_one_token_wherever_it_stands(tokenizer):
    words = {w for r in lab_splits()["train"] for w in r["input"].split(", ") if r["category"] == "reverse"}
    assert len(words) > 30
    for w in words:
        (first,), inside, after = ids(w, tokenizer), ids(f"A {w}", tokenizer), ids(f"A\n{w}", tokenizer)
        assert inside[-1] == after[-1] == first, w

def test_any_text_comes_back(tokenizer):
    for text in ("The fox sleeps.", "naïve 猫 \t x", "12, 7"): assert tokenizer.decode(ids(text, tokenizer)).strip() == text
    assert len(tokenizer) <= 1000 and tokenizer.eos_token_id == 0 != tokenizer.pad_token_id

@pytest.mark.parametrize("kind", OPEN)
def test_the_truth_of_every_token_is_that_of_enumeration(kind, tokenizer):
    examples = [encode(e, tokenizer, "plain") for e in load_eval_set("lab_open") if e.category == kind][:3]
    for e in examples:
        known = [(encode(Example("", "", references=(text,)), tokenizer, "plain").response_ids, p)
            for text, p in answers_of(*OPEN[kind](*e.example.about))]
        for t, row in enumerate(true_tokens(e, tokenizer)):
            expected = Counter()
            for other, p in known:
                if other[:t] == e.response_ids[:t]: expected[other[t]] += p
            assert row.keys() == expected.keys()
            assert all(row[i] == pytest.approx(expected[i] / expected.total(), abs=1e-9) for i in row)

def test_the_truth_of_every_example_is_known_and_allows_it(tokenizer):
    for name in ("lab", "lab_wordings", "lab_longer", "lab_combinations", "lab_open"):
        for e in load_eval_set(name)[:130]:
            e = encode(e, tokenizer, "plain")
            truth = true_tokens(e, tokenizer)
            assert len(truth) == len(e.response_ids)
            assert all(row[i] > 0 and sum(row.values()) == pytest.approx(1) for row, i in zip(truth, e.response_ids))

def test_a_cut_answer_has_no_known_truth(tokenizer):
    with pytest.raises(ValueError): true_tokens(encode(load_eval_set("lab_open")[1], tokenizer, "plain", 24, 25), tokenizer)

@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path))
    return load_model("lab-32x1")

def test_kl_from_the_truth_is_plain_sums_over_plain_logits(model, tokenizer):
    examples = [encode(e, tokenizer, "plain") for e in load_eval_set("lab")[:12]]
    found = truth_kl(model, examples, tokenizer, len(tokenizer), response_states(model, examples, tokenizer.pad_token_id))
    total = tokens = 0
    for e, per_token in zip(examples, found["truth_kl_per_prompt"]):
        with torch.no_grad(): logs = model(torch.tensor([e.prompt_ids + e.response_ids])).logits[0].double().log_softmax(-1)
        kl = sum(p * (math.log(p) - float(logs[len(e.prompt_ids) - 1 + t, i])) for t, row in enumerate(true_tokens(e, tokenizer)) for i, p in row.items())
        assert kl / len(e.response_ids) == pytest.approx(per_token, abs=2e-5)
        total, tokens = total + kl, tokens + len(e.response_ids)
    assert found["truth_kl"] == pytest.approx(total / tokens, abs=1e-5)
    assert truth_kl(model, [encode(Example("1", "a", references=("b",)), tokenizer, "plain")], tokenizer, len(tokenizer), []) == {}

def test_an_evaluation_scores_greedy_answers_beside_sampled_ones(model, tokenizer):
    examples = [encode(e, tokenizer, "plain") for e in load_eval_set("lab")[:12]]
    draw = lambda t: sampler(model, [0], tokenizer.pad_token_id, len(tokenizer), None, t)
    found, records, _ = evaluate(model, None, {"lab": examples}, draw(1.), tokenizer, len(tokenizer), [10], 8, greedy=draw(0.))
    alone, *_ = evaluate(model, None, {"lab": examples}, draw(0.), tokenizer, len(tokenizer), [10], 8)
    for key in ("rouge_l", "rouge_l_per_prompt", "exact", "exact_per_prompt"): assert found["lab"][f"greedy_{key}"] == alone["lab"][key]
    assert [r["seed"] for r in records] == [10] * 12 + ["greedy"] * 12
    assert list(found["lab"]["rouge_l_per_seed"]) == ["10"]

def test_a_name_makes_a_model_once_and_the_same(model, tmp_path, monkeypatch):
    place = model_path("lab-32x1")
    assert place == model_path("lab-32x1") and load_tokenizer("lab-32x1").eos_token_id == model.config.eos_token_id == 0
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"other"))
    again = load_model("lab-32x1")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert model_key("lab-32x1") == {"lab": "lab-32x1", "version": 1}
    assert architecture("lab-32x1").hidden_size == 32 and conventions("lab-32x1", "teacher").pads

@pytest.mark.parametrize("name", ["lab-8x1", "lab-40x2", "lab-1024x2", "lab-64x0", "lab-64x13"])
def test_sizes_that_cannot_be_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}; allowed: lab-WIDTHxLAYERS"): lab_sizes(name)
    assert lab_sizes("gpt2") is None is lab_sizes("lab-x") and lab_config("lab-48x2", 900).num_attention_heads == 3

def test_the_expected_exact_match_is_how_often_the_right_tokens_are_drawn(model, tokenizer):
    example = encode(load_eval_set("lab")[0], tokenizer, "plain")
    # 2,000 draws of one question by a model that was taught it half way
    taught = copy.deepcopy(model).train()
    optimizer, n = torch.optim.Adam(taught.parameters(), 3e-3), len(example.prompt_ids)
    ids = torch.tensor([example.prompt_ids + example.response_ids])
    for _ in range(500):
        loss = torch.nn.functional.cross_entropy(taught(ids).logits[0, n - 1:-1], ids[0, n:])
        if loss * len(example.response_ids) < math.log(2): break
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    else: pytest.fail("it did not learn one answer in 500 updates")
    sample = sampler(taught.eval(), [0], tokenizer.pad_token_id, len(tokenizer), None, 1.)
    found, _, drawn = evaluate(taught, None, {"lab": [example] * 2000}, sample, tokenizer, len(tokenizer), [10], 8, 500)
    p, hits = found["lab"]["expected_exact"] / 100, sum(x == example.response_ids for x in drawn["lab"])
    assert .45 < p < .7 and (hits - 2000 * p)**2 / (2000 * p * (1 - p)) < 10.8      # chi-square, p = 0.001
    assert found["lab"]["expected_exact_by_category"] == pytest.approx({example.example.category: 100 * p})
    cold, *_ = evaluate(taught, None, {"lab": [example]}, sample, tokenizer, len(tokenizer), [10], 8, temperature=0.7)
    assert "expected_exact" not in cold["lab"]      # it would be of other draws
