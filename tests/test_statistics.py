"Paired comparisons; the rule: t over seeds, Holm, equivalence, metrics that must agree; the bootstrap over prompts."
import numpy as np, pytest
from scipy.stats import ttest_1samp
from mgsr_nb.study import records
from mgsr_nb.study.records import read_results, write_toy_run
from mgsr_nb.study.statistics import (
    FAILS, HOLDS, METRICS, NEGLIGIBLE, OPEN, PARTED, Sample, agreed, better_by, holm, prompt_interval, sample, seed_test, verdicts)
from toy_suites import SUITES, add, results, two_sets


def test_seed_test_is_the_paired_t_test():
    x = [0.01, 0.03, -0.01, 0.02, 0.04]
    found, theirs = seed_test(x, 0.05), ttest_1samp(x, 0)
    assert found.p_none == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval()
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    inside = max(ttest_1samp(x, 0.05, alternative='less').pvalue,
                 ttest_1samp(x, -0.05, alternative='greater').pvalue)
    assert found.p_margin == pytest.approx(inside)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match='two'): seed_test([0.1], 0.01)


def test_holm_never_falls_below_a_smaller_one():
    assert holm(dict(a=.01, b=.04, c=.03)) == pytest.approx(dict(a=.03, b=.06, c=.06))
    assert holm({}) == {}


@pytest.mark.parametrize('x, said', [
    ([.10, .12, .11, .09, .10], HOLDS), ([-.10, -.12, -.11, -.09, -.10], FAILS),
    ([.001, -.001, 0, .002, -.002], NEGLIGIBLE), ([.1, -.1, .05, 0, .02], OPEN),
    ([.10, .12, .11], f'{OPEN} (3 seeds)')])
def test_verdicts(x, said): assert verdicts({'one': seed_test(x, .01)}) == {'one': said}


def test_holm_takes_back_what_one_test_alone_would_give():
    test = seed_test([.03, .05, .01, .04, .004], .001)
    assert verdicts({'one': test}) == {'one': HOLDS}
    assert set(verdicts({str(k): test for k in range(20)}).values()) == {OPEN}


@pytest.mark.parametrize('found, signs, kl, said', [
    (HOLDS, [1, 2], OPEN, HOLDS), (HOLDS, [1, -2], HOLDS, PARTED), (HOLDS, [1], FAILS, PARTED),
    (FAILS, [-1, -1], FAILS, FAILS), (NEGLIGIBLE, [1], FAILS, NEGLIGIBLE)])
def test_metrics_must_agree(found, signs, kl, said): assert agreed(found, signs, kl) == said


# ---- pairs, and the bootstrap over prompts

@pytest.mark.parametrize('metric', METRICS)
def test_different_prompts_are_never_compared(tmp_path, metric):
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    runs = [records.read_run(add(tmp_path, 'spans', 'none', 0)), records.read_run(write_toy_run(tmp_path, 'spans', 'phrases', 0, changed))]
    with pytest.raises(ValueError, match='same prompts'): better_by(runs[:1], runs[1:], metric)
    with pytest.raises(ValueError, match='same prompts'): sample(runs, metric)

def test_positive_is_better_in_every_metric(tmp_path):
    one = [records.read_run(write_toy_run(tmp_path, 'spans', 'phrases', 0, two_sets(-0.2, kl=-0.1, rouge=3.)))]
    other = [records.read_run(write_toy_run(tmp_path, 'spans', 'none', 0, two_sets()))]
    for sign, pair in ((1, (one, other)), (-1, (other, one))):
        assert [float(better_by(*pair, m).by_seed()[0]) for m in METRICS] == pytest.approx([sign * 0.2, sign * 0.1, sign * 3.0])

def test_pairs_have_common_seeds_only_and_match_them(tmp_path):
    for seed, shift in ((0, 0.), (1, 0.), (3, 0.)): add(tmp_path, 'spans', 'none', seed, shift)
    for seed, shift in ((1, -0.3), (2, -9.), (3, -0.5)): add(tmp_path, 'spans', 'phrases', seed, shift)
    cells = read_results(tmp_path, SUITES).cells('spans')
    d = better_by(cells['phrases'][::-1], cells['none'], 'nll')
    assert d.seeds == (1, 3) and d.by_seed() == pytest.approx([0.3, 0.5])

def test_pairing_takes_out_what_prompts_share(results):
    one, half = (results.cells('loss_weights')[c] for c in ('one', 'half'))
    assert prompt_interval(better_by(half, one, 'nll')) == pytest.approx((0.2, 0.2))
    low, high = prompt_interval(sample(one, 'nll'))
    assert high - low > 1

def naive(x, draws, seed=0):
    "The bootstrap as a loop, with the same draws."
    rng, found = np.random.default_rng(seed), np.zeros(draws)
    for s, weights in x.weights.items():
        n, values = len(weights), x.values[s].mean(0)
        for d, counts in enumerate(rng.multinomial(n, np.full(n, 1 / n), size=draws)):
            chosen = np.repeat(np.arange(n), counts)
            found[d] += np.average(values[chosen], weights=weights[chosen]) / len(x.weights)
    return tuple(np.percentile(found, [2.5, 97.5]))

def test_the_bootstrap_equals_a_loop():
    rng = np.random.default_rng(0)
    x = Sample((0, 1), {s: rng.normal(size=(2, n)) for s, n in (('a', 7), ('b', 11))}, {s: rng.integers(1, 9, n).astype(float) for s, n in (('a', 7), ('b', 11))})
    assert prompt_interval(x, 40) == pytest.approx(naive(x, 40)) and prompt_interval(x, 40) == prompt_interval(x, 40)
    assert prompt_interval(x, 40, seed=1) != prompt_interval(x, 40)

def test_interval_of_many_prompts_is_that_of_the_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, (1, 2000))
    (low, high), se = prompt_interval(Sample((0,), {'a': values}, {'a': np.ones(2000)})), values.std() / 2000 ** 0.5
    assert (low, high) == pytest.approx((values.mean() - 1.96 * se, values.mean() + 1.96 * se), abs=0.2 * se)

def test_prompts_are_drawn_within_their_set():
    "A large set does not lend prompts to a small one: two constant sets have no width."
    x = Sample((0,), {'a': np.zeros((1, 3)), 'b': np.ones((1, 90))}, {'a': np.ones(3), 'b': np.ones(90)})
    assert prompt_interval(x) == pytest.approx((0.5, 0.5))
