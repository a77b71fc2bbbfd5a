"""The laboratory's questions: the same everywhere, apart from each other, and right."""
import re, subprocess, sys
from collections import Counter
import pytest
from mgsr_nb.data import load_eval_set, load_train
from mgsr_nb.lab import LAB, lab_digest
from mgsr_nb.parameters import LAB_SET_NAMES
from mgsr_nb.world import (
    EXACT, IN_TRAINING, JOBS, KINDS, LAB_SETS, NUMBERS, OPEN, OPPOSITES, PAST, PER_SET, TRAINED,
    is_held_out, job_of, lab_splits, town_of)
from mgsr_nb.grammar import answers_of

DIGESTS = {1: "53349ba533c689c0"}

def test_the_world_is_the_one_of_its_version():
    "A change of the questions makes other models: raise `LAB` and add the digest."
    assert lab_digest() == DIGESTS[LAB]

def test_another_process_with_another_hash_seed_makes_the_same_world():
    code = "from mgsr_nb.lab import lab_digest; print(lab_digest())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)})
    assert found.stdout.strip() == lab_digest()

def test_no_question_is_in_two_splits_or_in_a_test_set_twice():
    asked = {name: [(r["instruction"], r["input"]) for r in rows] for name, rows in lab_splits().items()}
    for name, questions in asked.items():
        if name != "train": assert len(set(questions)) == len(questions) == PER_SET
        for other in asked:
            if other != name: assert not set(questions) & set(asked[other])
    assert len(asked["train"]) == IN_TRAINING

def test_the_sets_are_what_they_say():
    sets = lab_splits()
    trained = [w.split("{")[0] for k in KINDS.values() for w in k.wordings[:TRAINED]]
    def wording(r):     # which of its kind's wordings it is
        return next(i for i, w in enumerate(KINDS[r["category"]].wordings)
            if re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(w)), r["instruction"]))
    for name, rows in sets.items():
        new = [wording(r) >= TRAINED for r in rows]
        assert all(new) if name == "lab_wordings" else not any(new)
    assert {r["category"] for r in sets["lab_open"]} == set(OPEN)
    longest = max(r["input"].count(",") for r in sets["train"])
    assert min(r["input"].count(",") for r in sets["lab_longer"] if r["category"] == "position") == longest + 1
    assert {r["category"] for r in sets["lab"]} == set(KINDS)
    assert Counter(r["category"] for r in sets["lab"]) == dict.fromkeys(KINDS, PER_SET // len(KINDS))

def test_held_out_combinations_are_in_one_set_only():
    for name, rows in lab_splits().items():
        held = {is_held_out(r["category"], r["about"]) for r in rows if r["category"] in OPEN}
        assert held == ({True} if name == "lab_combinations" else {False} if held else set())

def _right(r: dict) -> str:
    "The answer, worked out again from the question's text alone."
    kind, asked, text = r["category"], r["instruction"], r["input"]
    items, names = text.split(", "), re.findall(r"\b[A-Z][a-z]+\b", asked)[1:]
    if kind == "add": return str(sum(map(int, re.findall(r"\d+", asked))))
    if kind == "sort": return ", ".join(sorted(items, key=int))
    if kind == "reverse": return ", ".join(items[::-1])
    if kind == "position": return items[0] if "first" in asked else items[-1]
    if kind == "count": return NUMBERS[len(items) - 1]
    if kind == "opposite": return re.sub(r"(\w+)\.$", lambda m: OPPOSITES[m[1]] + ".", text)
    if kind == "past": return re.sub(r"^(\w+) (\w+)", lambda m: f"{m[1]} {PAST[m[2]]}", text)
    a, b = names[-2:]
    if kind == "towns": return f"{a} lives in {town_of(a)} and {b} in {town_of(b)}."
    return f"{a} is a {job_of(a)} and {b} a {job_of(b)}."

@pytest.mark.parametrize("kind", EXACT)
def test_the_right_answers_are_right(kind):
    rows = [r for rows in lab_splits().values() for r in rows if r["category"] == kind]
    assert len(rows) > 1000
    for r in rows: assert r["exact"] and r["references"] == (_right(r),), r

@pytest.mark.parametrize("kind", OPEN)
def test_open_answers_are_the_grammars(kind):
    known = {}
    for r in (r for rows in lab_splits().values() for r in rows[:400] if r["category"] == kind):
        assert not r["exact"]
        if r["about"] not in known: known[r["about"]] = {t for t, _ in answers_of(*OPEN[kind](*r["about"]))}
        assert r["references"][0] in known[r["about"]]
        assert not re.search(r"\ba [aeiou]", r["references"][0])

def test_the_data_part_reads_the_world():
    splits = load_train("lab")
    assert (splits.report["dropped"], splits.report["records"]) == (0, IN_TRAINING)
    assert tuple(n for n in LAB_SETS if n != "validation") == LAB_SET_NAMES
    example = load_eval_set("lab_open")[0]
    assert example.about and not example.exact and example.category in OPEN
