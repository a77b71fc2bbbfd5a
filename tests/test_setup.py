"""Data that ROUGE-L cannot read is said, and nothing is chosen by a score that is 0 whatever the answer."""
import pytest
from mgsr_nb import run as R
import mgsr_nb.run.results
import mgsr_nb.run.setup
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.data import Example, Splits
from toy_tokenizers import byte_level

GREEK = [Example(f"g{i}", f"Ask {i}", references=("Η γάτα κοιμάται.",)) for i in range(6)]
PLAIN = [Example(f"p{i}", f"Say {i}", references=("the cat sleeps",)) for i in range(6)]

@pytest.fixture
def load(monkeypatch):
    "`load(validation, test, **parameters)`: `load_data` of these examples."
    def make(validation, test, **more):
        monkeypatch.setattr(R.setup, "load_splits", lambda *a: Splits(PLAIN, validation, {"notes": []}))
        monkeypatch.setattr(R.setup, "load_eval_set", lambda *a: test)
        return R.setup.load_data(resolve(max_prompt_tokens=190, max_tokens=260, **more), byte_level())
    return make

def test_references_without_a_word_are_said(load):
    with pytest.warns(UserWarning, match="tiny: 6 of 6 references have no word that rouge_words english reads"):
        *_, report = load(PLAIN, GREEK)
    assert any("rouge_words unicode reads all scripts" in note for note in report["notes"])
    assert load(PLAIN, GREEK, rouge_words="unicode")[-1]["notes"] == [] == load(PLAIN, PLAIN)[-1]["notes"]

def test_weights_are_not_chosen_by_a_score_that_is_always_0(load):
    with pytest.raises(ConfigError, match="^select: rouge_l, but 6 of 6 validation references have no word.*allowed: nll or kl, or rouge_words unicode"):
        load(GREEK, PLAIN, select="rouge_l")
    load(GREEK, PLAIN, select="rouge_l", rouge_words="unicode")
    load(GREEK, PLAIN, select="nll")
    load([*GREEK[:3], *PLAIN[:3]], PLAIN, select="rouge_l")       # half of them can be read

def test_scores_of_single_prompts_are_left_out_on_demand():
    part = {"nll": 1., "nll_per_prompt": [1.], "prompts": 1}
    scores = {"validation": part, "test": {"a": part}, "average": {"nll": 1.}, "answers": [], "ids": {}}
    assert R.results._kept(scores, True) == {"validation": part, "test": {"a": part}, "average": {"nll": 1.}}
    less = {"nll": 1., "prompts": 1}
    assert R.results._kept(scores, False) == {"validation": less, "test": {"a": less}, "average": {"nll": 1.}}

def test_the_mean_of_a_score_is_over_the_sets_that_have_it():
    test = {"a": {"nll": 1., "kl": 0., "rouge_l": 10., "exact": 50.}, "b": {"nll": 3., "kl": 1., "rouge_l": 30.}}
    assert R.results.average_of(test) == {"nll": 2., "kl": .5, "rouge_l": 20., "exact": 50.}
