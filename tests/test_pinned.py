"""Whole tiny runs have the numbers of pinned_run.json, on any CPU; the same seed makes them again bit for bit, another seed makes others.

The tolerance is 2e-4 of a number, and of 0.01 for smaller ones. Other CPUs, threads and BLAS libraries add in another order: in float32 that is 1e-7 of a sum, and six updates enlarge it, since
Adam divides a gradient by its own size. Measured: 1.3e-6 with two threads for one, 2.2e-5 with torch's code for CPUs without vector instructions. What one changes by mistake is farther away: the last
tests try. A sampled token turns only where two classes arrive that close to each other; if it does somewhere, everything after it differs by far more than the tolerance."""
import json
import pytest, torch
import pinned_run
from pinned_run import METHODS, PINNED, distances, one

TOLERANCE = 2e-4

@pytest.fixture(scope="module")
def pinned(): return json.loads(PINNED.read_text())

@pytest.fixture
def a_run(tmp_path, monkeypatch):
    "`a_run(name, method, **parameters)`: a whole run with a cache of its own, its numbers."
    monkeypatch.setenv("MGSR_CACHE", "set by the run, restored after the test")
    return lambda name, method, **more: one(tmp_path/name, method, **more)

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "Each method once, as pinned."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MGSR_CACHE", "")
        return {method: one(tmp_path_factory.mktemp(method), method) for method in METHODS}

@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run_has_the_pinned_numbers(first, pinned, method, figure):
    found = distances(first[method], pinned[method])
    figure("pinned run", f"{method}: {len(found)} numbers, the farthest {max(found.values()):.1e} from its own")
    apart = {k: d for k, d in found.items() if not d <= TOLERANCE}
    assert not apart, f"{len(apart)} numbers differ, the first {list(apart.items())[:5]}; if they should, python tests/pinned_run.py --write"

def test_what_is_pinned_is_a_run_in_which_everything_happens(pinned):
    assert pinned.keys() == METHODS.keys() and all([row["step"] for row in found["log"]] == list(range(7)) for found in pinned.values())
    assert {(r["by_student"], r["new_text"]) for r in pinned["off_policy"]["log"][1:]} == {(0, 0), (1, 1), (1, 0)}
    for method in ("on_policy", "off_policy"):
        assert all(r["dac"] > 0.1 for r in pinned[method]["log"][1:]) and sum(r["span"] > 1e-4 for r in pinned[method]["log"][1:]) >= 4 and any(r.get("scrg_corrected") for r in pinned[method]["log"])
        assert len({r["clip_upper"] for r in pinned[method]["log"][1:]}) == 6       # f_sub trains

@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_makes_the_same_numbers_bit_for_bit(first, a_run, method):
    "Nothing is shared but the parameters, and the global generator stands elsewhere."
    torch.manual_seed(999); torch.rand(7)
    assert a_run("again", method) == first[method]

@pytest.mark.parametrize("method", METHODS)
def test_another_seed_makes_other_numbers(first, a_run, method):
    "From the first step: other examples. The teacher, tuned and measured without the seed, stays as it was."
    other = a_run("other", method, seed=1)
    assert other["log"][0] == first[method]["log"][0] and all(a["loss"] != b["loss"] for a, b in zip(other["log"][1:], first[method]["log"][1:]))
    assert other["metrics"]["teacher/validation"] == first[method]["metrics"]["teacher/validation"] and other["metrics"]["student/test"] != first[method]["metrics"]["student/test"]

@pytest.mark.parametrize("change", [dict(dac_weight=1.01), dict(span_weight=1.5), dict(learning_rate=3.03e-3), dict(sub_learning_rate=1.01e-3), dict(span_length=3), dict(weight_decay=0.02), dict(eval_seeds="11")], ids=lambda c: "=".join(map(str, *c.items())))
def test_a_small_change_of_the_method_is_farther_away_than_the_tolerance(a_run, pinned, change):
    assert max(distances(a_run("changed", "on_policy", **change), pinned["on_policy"]).values()) > 2 * TOLERANCE

def test_a_number_more_or_less_is_noticed(pinned):
    found = json.loads(PINNED.read_text())
    del found["sft"]["log"][2]["loss"]
    assert max(distances(found, pinned).values()) == float("inf")
