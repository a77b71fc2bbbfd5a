"The laboratory's rule: t over seeds, Holm, equivalence, metrics that must agree."
import pytest
from scipy.stats import ttest_1samp
from mgsr_nb.study.statistics import (
    FAILS, HOLDS, NEGLIGIBLE, OPEN, agreed, holm, lab_verdicts, seed_test)


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
