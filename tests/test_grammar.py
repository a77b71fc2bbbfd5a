"""The grammar's mathematics against plain enumeration of all answers."""
import math, random
from collections import Counter
import pytest
from scipy.stats import chisquare
from mgsr_nb.grammar import answers_of, draw, entropy, kl_from_truth, next_tokens
from mgsr_nb.world import OPEN

def branching(state):
    "Two steps, the second depends on the first; one text is written in two ways."
    if state == "first": return [(0.5, "a", "x"), (0.3, "b", "y"), (0.2, "c", None)]
    if state == "x": return [(0.25, " d", None), (0.75, " e f", None)]
    return [(1.0, " d", None)]

ABOUT = {"sentence": ("fox", "barn"), "story": ("Anna", "crow"), "plan": ("Ben", "key")}

def test_probabilities_of_all_answers_sum_to_1():
    assert sum(p for _, p in answers_of(branching, "first")) == pytest.approx(1)
    for kind, about in ABOUT.items():
        assert sum(p for _, p in answers_of(*OPEN[kind](*about))) == pytest.approx(1, abs=1e-12)

def test_entropy_is_that_of_the_enumerated_answers():
    for rules, start in [(branching, "first"), *(OPEN[k](*a) for k, a in ABOUT.items())]:
        known = Counter()
        for text, p in answers_of(rules, start): known[text] += p
        assert entropy(rules, start) == pytest.approx(-sum(p * math.log(p) for p in known.values()))

@pytest.mark.parametrize("kind", ABOUT)
def test_drawn_answers_have_the_stated_frequencies(kind):
    "Chi-square over the answers expected at least five times; p below 1e-4 would be a fault."
    rules, start = OPEN[kind](*ABOUT[kind])
    n, rng, known = 20_000, random.Random(7), Counter()
    for text, p in answers_of(rules, start): known[text] += p
    seen = Counter(draw(rules, start, rng) for _ in range(n))
    assert set(seen) <= set(known)
    often = [t for t, p in known.items() if n * p >= 5]
    expected = [n * known[t] for t in often]
    observed = [seen[t] for t in often]
    rest = n - sum(expected)
    if rest > 5: expected, observed = [*expected, rest], [*observed, n - sum(observed)]
    else: expected = [x * sum(observed) / sum(expected) for x in expected]
    assert chisquare(observed, expected).pvalue > 1e-4

LETTERS = {c: i for i, c in enumerate("abcdef ", 1)}
def letters(text): return [LETTERS[c] for c in text]

def by_enumeration(rules, start, ids, t, end):
    "The distribution of token t after the first t of `ids`, from all answers."
    found = Counter()
    for text, p in answers_of(rules, start):
        other = [*letters(text), end]
        if other[:t] == list(ids[:t]): found[other[t]] += p
    return {i: p / found.total() for i, p in found.items()}

@pytest.mark.parametrize("text", ["a d", "a e f", "b d", "c"])
def test_next_tokens_are_those_of_enumeration(text):
    ids = [*letters(text), 0]
    found = next_tokens(branching, "first", ids, letters, 0)
    assert len(found) == len(ids)
    for t, row in enumerate(found):
        expected = by_enumeration(branching, "first", ids, t, 0)
        assert row.keys() == expected.keys()
        assert all(row[i] == pytest.approx(expected[i]) for i in row)

def test_an_answer_that_the_grammar_cannot_write_is_refused():
    for text in ("a b", "f", "a d d"):
        with pytest.raises(ValueError): next_tokens(branching, "first", [*letters(text), 0], letters, 0)
    with pytest.raises(ValueError): next_tokens(branching, "first", letters("a d"), letters, 0)

def test_kl_from_truth_by_hand_and_by_enumeration():
    "0 for the truth; for a model of independent tokens, the sum over an answer's tokens is right in the mean over answers."
    row = {1: 0.5, 2: 0.5}
    assert kl_from_truth([row], [{1: math.log(0.5), 2: math.log(0.5)}]) == [0]
    assert kl_from_truth([row], [{1: math.log(0.25), 2: math.log(0.75)}]) == pytest.approx([0.5 * math.log(4 / 3)])
    q = {i: math.log((i + 1) / 36) for i in range(8)}       # whatever came before
    texts = Counter()
    for text, p in answers_of(branching, "first"): texts[text] += p
    whole = sum(p * (math.log(p) - sum(q[i] for i in [*letters(t), 0])) for t, p in texts.items())
    by_token = 0
    for text, p in texts.items():
        truth = next_tokens(branching, "first", [*letters(text), 0], letters, 0)
        by_token += p * sum(kl_from_truth(truth, [{i: q[i] for i in row} for row in truth]))
    assert by_token == pytest.approx(whole)
