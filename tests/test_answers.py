"""Scores of answers: ROUGE-L on cases that a reader can count, in all scripts; exact match; how varied answers are."""
import pytest
from hypothesis import given, settings, strategies as st
from mgsr_nb.answers import (
    answer_metrics, distinct_n, exact_match, repetition, rouge_l, score_answers, wordless,
    wordless_note, words_of)
from mgsr_nb.data import Example

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

@pytest.mark.parametrize("texts,n,rate", [
    (["a b c d a b c d"], 4, 1 - 4 / 5),                            # abcd, bcda, cdab, dabc, abcd
    (["A b", "a B a b"], 2, (0 + 1 - 2 / 3) / 2),                   # lower case; each text alone, then the mean
    (["the cat sat down"] * 3, 4, 0),                               # the same text thrice repeats nothing within a text
    (["x x x x x x x x", "x x"], 2, (6 / 7 + 0) / 2),               # texts of different length weigh the same
    (["a b c", "", "a a a a a"], 4, (0 + 0 + 1 / 2) / 3),           # too short for an n-gram: 0, and counted
    ([], 4, 0)])
def test_repetition_by_hand(texts, n, rate): assert repetition(texts, n) == pytest.approx(rate, abs=1e-12)

# --- words of all scripts

@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_unicode_words_are_the_english_ones_on_ascii(text): assert words_of(text, "unicode") == words_of(text)

@pytest.mark.parametrize("text,words", [
    ("Η γάτα κοιμάται.", ["η", "γάτα", "κοιμάται"]), ("हिन्दी में", ["हिन्दी", "में"]), ("猫が好き。", ["猫", "が", "好", "き"]),
    ("cafe\u0301s", ["cafés"]), ("ภาษา", ["ภ", "า", "ษ", "า"]), ("dogs, 犬", ["dog", "犬"]), ("... _", [])])
def test_words_of_other_scripts(text, words): assert words_of(text, "unicode") == words

@pytest.mark.parametrize("text", ["Η γάτα κοιμάται.", "猫が好き", "हिन्दी में"])
def test_a_right_answer_in_another_script_scores_only_with_its_words(text):
    assert rouge_l(text, [text]) == 0 and rouge_l(text, [text], "unicode") == 100

def asks(*references): return [Example(str(i), "?", references=(r,)) for i, r in enumerate(references)]

def test_references_without_a_word_are_counted_and_said():
    ours = asks("γάτα", "cat", "犬 7")
    assert wordless(ours) == 1 and wordless(ours, "unicode") == 0 and wordless(asks("...", "!"), "unicode") == 2
    assert wordless_note("ours", ours).startswith("ours: 1 of 3 references have no word that rouge_words english reads")
    assert wordless_note("ours", ours, "unicode") == "" == wordless_note("ours", asks("a"))

# --- exact match

def test_exact_match_is_to_the_letter_and_only_where_there_is_one_right_answer():
    one = Example("1", "?", references=("7 cats.",), exact=True)
    assert [exact_match(p, one) for p in ("7 cats.", "7 cats", "7 Cats.", "")] == [100, 0, 0, 0]
    assert exact_match("7 cats.", Example("1", "?", references=("7 cats.",))) is None

def test_exact_match_by_category_over_seeds():
    examples = [Example("1", "?", references=("7",), category="add", exact=True), Example("2", "?", references=("a b",), category="sort", exact=True),
        Example("3", "?", references=("x",), category="story"), Example("4", "?", references=("8",), category="add", exact=True)]
    found = answer_metrics({s: score_answers(p, examples) for s, p in {10: ["7", "a b", "x", "9"], 20: ["7", "b a", "x", "8"]}.items()})
    assert found["exact_per_prompt"] == [100, 50, None, 50]
    assert found["exact"] == pytest.approx(200 / 3) and found["exact_by_category"] == {"add": 75, "sort": 50}
    assert not any("exact" in k for k in answer_metrics({10: score_answers(["x"], examples[2:3])}))
