"Paired comparisons and their bootstrap; the laboratory's rule: t over seeds, Holm, equivalence, metrics that must agree."
import numpy as np, pytest
from scipy.stats import ttest_1samp
from mgsr_nb.study import records
from mgsr_nb.study.records import read_results, write_toy_run
from mgsr_nb.study.statistics import (
    FAILS, HOLDS, METRICS, NEGLIGIBLE, NOT_RUN, OPEN, Estimate, Sample, agreed, better_by, draws_of, estimate, holm,
    lab_verdicts, paired, resampled, sample, seed_test, verdict)
from mgsr_nb.study.tables import suite_effects
from toy_suites import SUITES, add, results, two_sets, weights


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
def test_verdicts(x, said): assert lab_verdicts({'one': seed_test(x, .01)}) == {'one': said}


def test_holm_takes_back_what_one_test_alone_would_give():
    test = seed_test([.03, .05, .01, .04, .004], .001)
    assert lab_verdicts({'one': test}) == {'one': HOLDS}
    assert set(lab_verdicts({str(k): test for k in range(20)}).values()) == {OPEN}


@pytest.mark.parametrize('found, signs, kl, said', [
    (HOLDS, [1, 2], OPEN, HOLDS), (HOLDS, [1, -2], HOLDS, OPEN), (HOLDS, [1], FAILS, OPEN),
    (FAILS, [-1, -1], FAILS, FAILS), (NEGLIGIBLE, [1], FAILS, NEGLIGIBLE)])
def test_metrics_must_agree(found, signs, kl, said): assert agreed(found, signs, kl) == said


# ---- the bootstrap, pairs, and the older rule

@pytest.mark.parametrize('metric', METRICS)
def test_different_prompts_are_never_compared(tmp_path, metric):
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    runs = [records.read_run(add(tmp_path, 'spans', 'none', 0)), records.read_run(write_toy_run(tmp_path, 'spans', 'phrases', 0, changed))]
    with pytest.raises(ValueError, match='same prompts'): better_by(runs[:1], runs[1:], metric)
    with pytest.raises(ValueError, match='same prompts'): sample(runs, metric)

def naive(x, draws, seed=0):
    "The bootstrap as a loop, with the same draws."
    by_set, by_seed = draws_of(tuple(len(w) for w in x.weights.values()), len(x.seeds), draws, seed)
    found = []
    for d in range(draws):
        total = 0.
        for k in range(len(x.seeds)):
            scores = []
            for counts, s in zip(by_set, x.values):
                chosen = np.repeat(np.arange(counts.shape[1]), counts[d].astype(int))
                scores.append(np.average(x.values[s][k, chosen], weights=x.weights[s][chosen]))
            total += by_seed[d, k] * np.mean(scores)
        found.append(total)
    return np.array(found)

def random_sample(seed=0, seeds=3):
    rng = np.random.default_rng(seed)
    return Sample(tuple(range(seeds)), {s: rng.normal(size=(seeds, n)) for s, n in (('a', 7), ('b', 11))}, {s: rng.integers(1, 9, n).astype(float) for s, n in (('a', 7), ('b', 11))})

def test_resampled_equals_a_loop(): assert resampled(random_sample(), 40) == pytest.approx(naive(random_sample(), 40))

def test_draws_are_whole_and_repeatable():
    by_set, by_seed = draws_of((7, 11), 3, 200)
    assert all((c.sum(1) == n).all() and (c == c.round()).all() for c, n in zip(by_set, (7, 11)))
    assert by_seed.sum(1) == pytest.approx(1) and len(np.unique(by_seed[:, 0])) == 4
    draws_of.cache_clear()
    again = draws_of((7, 11), 3, 200)
    assert all(np.array_equal(a, b) for a, b in zip(by_set, again[0])) and np.array_equal(by_seed, again[1])
    assert not np.array_equal(by_set[0], draws_of((7, 7), 3, 200)[0][1])            # sets are drawn apart

def test_interval_of_many_prompts_is_that_of_the_normal_theory():
    rng = np.random.default_rng(0)
    x = Sample((0,), {'a': rng.normal(5, 2, (1, 2000))}, {'a': np.ones(2000)})
    e, se = estimate(x), x.values['a'].std() / 2000 ** 0.5
    assert (e.low, e.high) == pytest.approx((e.mean - 1.96 * se, e.mean + 1.96 * se), abs=0.2 * se)

def test_interval_knows_seeds_as_well_as_prompts():
    flat = {'a': np.array([[0.] * 50, [1.] * 50, [2.] * 50])}            # prompts alike, seeds not
    e = estimate(Sample((0, 1, 2), flat, {'a': np.ones(50)}))
    assert e.low <= 0.34 and e.high >= 1.66
    e = estimate(Sample((0,), {'a': flat['a'][:1]}, {'a': np.ones(50)}))
    assert (e.low, e.high) == (0, 0)

def test_prompts_are_drawn_within_their_set():
    "A large set does not lend prompts to a small one: two constant sets have no width."
    e = estimate(Sample((0,), {'a': np.zeros((1, 3)), 'b': np.ones((1, 90))}, {'a': np.ones(3), 'b': np.ones(90)}))
    assert (e.low, e.mean, e.high) == pytest.approx((0.5, 0.5, 0.5))

def test_positive_is_better_in_every_metric(tmp_path):
    write_toy_run(tmp_path, 'spans', 'phrases', 0, two_sets(-0.2, kl=-0.1, rouge=3.))
    write_toy_run(tmp_path, 'spans', 'none', 0, two_sets())
    found = read_results(tmp_path, SUITES)
    assert [paired(found, 'spans', 'phrases', 'none', m).mean for m in METRICS] == pytest.approx([0.2, 0.1, 3.0])
    assert [paired(found, 'spans', 'none', 'phrases', m).mean for m in METRICS] == pytest.approx([-0.2, -0.1, -3.0])

def test_pairs_have_common_seeds_only_and_match_them(tmp_path):
    for seed, shift in ((0, 0.), (1, 0.), (3, 0.)): add(tmp_path, 'spans', 'none', seed, shift)
    for seed, shift in ((1, -0.3), (2, -9.), (3, -0.5)): add(tmp_path, 'spans', 'phrases', seed, shift)
    d = paired(read_results(tmp_path, SUITES), 'spans', 'phrases', 'none')
    assert d.by_seed == pytest.approx({1: 0.3, 3: 0.5}) and verdict(d) == 'not resolved (2 seeds)'

def test_pairing_takes_out_what_prompts_share(results):
    d, score = paired(results, 'loss_weights', 'half', 'one'), estimate(sample(results.cells('loss_weights')['one'], 'nll'))
    assert (d.low, d.high) == pytest.approx((0.2, 0.2)) and score.high - score.low > 1

def test_no_common_seed_is_not_run(tmp_path):
    add(tmp_path, 'spans', 'none', 0); add(tmp_path, 'spans', 'phrases', 1)
    found = read_results(tmp_path, SUITES)
    assert better_by(found.cells('spans')['none'], found.cells('spans')['phrases'], 'nll') is None
    assert verdict(paired(found, 'spans', 'phrases', 'none')) == NOT_RUN
    assert suite_effects(found, 'spans').empty

@pytest.mark.parametrize('low, high, seeds, expected', [
    (.01, .3, (.1, .2, .3), HOLDS), (-.3, -.01, (-.1, -.2, -.3), FAILS), (-.01, .3, (.1, .2, .3), OPEN), (-.3, .01, (-.1, -.2, -.3), OPEN),
    (.01, .3, (.1, .2, -.01), OPEN), (-.3, -.01, (-.1, -.2, .01), OPEN), (.01, .3, (.1, .2), 'not resolved (2 seeds)'), (.01, .3, (.1,), 'not resolved (1 seed)'),
    (-.3, -.01, (-.1, -.2), 'not resolved (2 seeds)'), (0., .3, (.1, .2, .3), OPEN), (0., 0., (0., 0., 0.), OPEN), (.01, .3, (.1,) * 4, HOLDS)])
def test_rule(low, high, seeds, expected): assert verdict(Estimate((low + high) / 2, 0.1, low, high, dict(enumerate(seeds)))) == expected

def test_equal_cells_are_not_resolved(tmp_path):
    weights(tmp_path, half=0.)
    assert verdict(paired(read_results(tmp_path, SUITES), 'loss_weights', 'half', 'one')) == OPEN
