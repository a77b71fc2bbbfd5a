"The report: what it reads, its numbers on scores that can be counted by hand, its verdicts and its words."
import ast, io, json, re
from dataclasses import dataclass
from pathlib import Path
import nbformat, numpy as np, pandas as pd, pytest
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from IPython.display import Markdown
from matplotlib.colors import to_rgb
from mgsr_nb.files import write_json
from mgsr_nb.study import records, pages, tables
from mgsr_nb.study.records import Results, read_results, write_toy_run
from mgsr_nb.study.statistics import FAILS, HOLDS, METRICS, NOT_RUN, OPEN, Estimate, Sample, better_by, draws_of, estimate, paired, resampled, sample, verdict
from mgsr_nb.study.tables import BEFORE, TEACHER, results_csv, results_table, score_table, suite_claims, suite_effects, suite_logs, suite_scores, where_limits_ended, write_results_csv
from mgsr_nb.study.figures import costs, effect_plot, learning_curves, limits_plot, metrics_plot, small_png, weight_grid
from mgsr_nb.study.findings import clipping_answer, clipping_pairs, each_run, metrics_apart, sharpness_answer, rank_correlation, weights_answer
from mgsr_nb.study.pages import best_cell, claims_sentence, failures_markdown, gaps, setting, suite_figures, suite_markdown, summary_markdown

ROOT = Path(__file__).resolve().parents[1]

@dataclass(frozen=True)
class Claim:
    text: str
    better: str
    worse: str
    source: str = 'Table 9'

@dataclass(frozen=True)
class Suite:
    cells: dict
    reference: str
    question: str = 'Does it matter?'
    claims: tuple = ()

def cells(*names): return dict.fromkeys(names, {})

SUITES = {'loss_weights': Suite(cells('no_span', 'half', 'one'), 'one', claims=(Claim('all weights 1', 'one', 'no_span'), Claim('all rather than half', 'one', 'half'))),
          'fixed_clipping': Suite(cells('learned', 'quantile', 'quantile_mass', 'learned_mass', 'all'), 'learned', claims=(Claim('learned', 'learned', 'quantile'),)),
          'spans': Suite(cells('phrases', 'none'), 'phrases', claims=(Claim('phrases', 'phrases', 'none'),))}
WEIGHTS = {'one': (1., 1.), 'half': (1., .5), 'no_span': (1., 0.)}
CLIPS = {'learned': ('learned', 'value'), 'learned_mass': ('learned', 'mass'), 'quantile': ('fixed_quantile', 'value'), 'quantile_mass': ('fixed_quantile', 'mass'), 'all': ('none', 'value')}

def two_sets(shift=0., seed=0, kl=0., rouge=0.):
    """Scores of a run on two sets, `shift` nats worse than the plain ones. Plain NLL: set a (1*3 + 5*1)/4 = 2, set b (2 + 4)/2 = 3, mean 2.5; each seed is 0.1 higher.

    KL 0.5 everywhere, ROUGE-L 10 and 20 in set a, 30 in set b: mean (15 + 30)/2 = 22.5."""
    up = shift + 0.1 * seed
    return {'a': dict(nll=[1 + up, 5 + up], kl=[0.5 + kl] * 2, rouge_l=[10. + rouge, 20. + rouge], tokens=[3, 1]), 'b': dict(nll=[2 + up, 4 + up], kl=[0.5 + kl] * 2, rouge_l=[30. + rouge] * 2, tokens=[5, 5])}

def add(runs, suite, cell, seed, shift=0., log=None, rouge=0., **more):
    config = dict(preset='laptop-dolly', teacher='t', max_steps=24)
    if cell in WEIGHTS: config |= dict(zip(('dac_weight', 'span_weight'), WEIGHTS[cell]))
    if cell in CLIPS: config |= dict(zip(('clip', 'clip_reading'), CLIPS[cell]))
    folder = write_toy_run(runs, suite, cell, seed, two_sets(shift, seed, rouge=rouge), config=config, machine=dict(precision='bfloat16', torch='2.9', device_type='cpu', threads=2),
                           data=dict(notes=['uinst: NOT its set']), **more)
    if log is not None: pd.DataFrame(log).to_csv(folder/'log.csv', index=False)
    return folder

def weights(runs, seeds=3, half=-0.2, no_span=0.3):
    for k in range(seeds):
        for cell, shift in (('one', 0.), ('half', half), ('no_span', no_span)): add(runs, 'loss_weights', cell, k, shift)

def clipping(runs, shifts, seeds=3):
    for k in range(seeds):
        for cell, shift in shifts.items(): add(runs, 'fixed_clipping', cell, k, shift)

@pytest.fixture
def results(tmp_path):
    weights(tmp_path)
    return read_results(tmp_path, SUITES)


# ---- reading

def test_runs_come_in_the_order_of_the_suites_and_cells_whatever_the_disk_says(tmp_path):
    for seed in (10, 2):
        for suite, cell in (('zoo', 'y'), ('spans', 'none'), ('spans', 'phrases'), ('loss_weights+quickstart', 'one'), ('loss_weights', 'one'), ('loss_weights', 'unknown'), ('loss_weights', 'no_span')):
            add(tmp_path, suite, cell, seed)
    found = read_results(tmp_path, SUITES)
    assert found.names == ['loss_weights', 'loss_weights+quickstart', 'spans', 'zoo']
    assert [(r.cell, r.seed) for r in found.runs if r.suite == 'loss_weights'] == [('no_span', 2), ('no_span', 10), ('one', 2), ('one', 10), ('unknown', 2), ('unknown', 10)]
    assert [r.cell for r in found.runs if r.suite == 'spans'] == ['phrases'] * 2 + ['none'] * 2

def test_other_folders_are_no_suites(tmp_path):
    for other in ('examples', 'performance'): add(tmp_path, other, 'quickstart', 0)
    write_json(tmp_path/'mine'/'metrics.json', {})                       # one run, no suite
    write_json(tmp_path/'spans'/'none'/'seed'/'metrics.json', {})        # no number
    write_json(tmp_path/'spans'/'none'/'.seed0.lock', {})
    assert read_results(tmp_path, SUITES).runs == []

def test_a_suite_of_another_preset_has_the_description_of_its_suite(tmp_path):
    add(tmp_path, 'loss_weights+quickstart', 'one', 0)
    found = read_results(tmp_path, SUITES)
    assert found.described('loss_weights+quickstart') is SUITES['loss_weights'] and 'loss_weights' not in found.not_run

def test_an_unknown_suite_is_shown_against_its_first_cell(tmp_path):
    for cell in 'ba': add(tmp_path, 'zoo', cell, 0)
    found = read_results(tmp_path, SUITES)
    assert found.described('zoo').reference == 'a' and '`b`' in suite_markdown(found, 'zoo') and len(suite_figures(found, 'zoo')) == 2

def failing(runs):
    add(runs, 'spans', 'phrases', 0)
    write_json(runs/'spans'/'none'/'seed0'/'error.json', {'error': 'RuntimeError: out of | memory\nmore', 'traceback': '...', 'config': {}})
    (runs/'spans'/'none'/'seed1').mkdir()
    (runs/'spans'/'none'/'seed2').mkdir()
    (runs/'spans'/'none'/'seed2'/'metrics.json').write_text('{"half": ')
    old = add(runs, 'spans', 'phrases', 1)
    metrics = json.loads((old/'metrics.json').read_text())
    del metrics['student']['test']['b']['nll_per_prompt']
    write_json(old/'metrics.json', metrics)
    return read_results(runs, SUITES)

def test_runs_that_failed_are_named_and_not_used(tmp_path):
    found = failing(tmp_path)
    by = {(r.cell, r.seed): r for r in found.runs}
    assert by['none', 0].error.startswith('RuntimeError') and 'cannot be read' in by['none', 2].error and 'no nll_per_prompt of b' in by['phrases', 1].error
    assert not by['none', 1].error and by['none', 1].metrics is None
    assert found.cells('spans') == {'phrases': [by['phrases', 0]]}
    text = suite_markdown(found, 'spans')
    for said in ('**Failed:** `none`, seed 0: RuntimeError: out of | memory', 'Begun, not finished: `none` seed 1', 'A single training seed'): assert said in text
    assert 'out of \\| memory more' in failures_markdown(found)           # a | would end the table's cell
    assert failures_markdown(read_results(tmp_path/'nothing', SUITES)) == 'No run failed.'

def test_a_finished_run_wins_over_an_old_error(tmp_path):
    write_json(add(tmp_path, 'spans', 'none', 0)/'error.json', {'error': 'E: x'})
    assert read_results(tmp_path, SUITES).runs[0].usable

def test_missing_cells_are_named(tmp_path):
    add(tmp_path, 'loss_weights', 'one', 0)
    assert 'Not run: `no_span`, `half`' in gaps(read_results(tmp_path, SUITES), 'loss_weights').replace(' and ', ', ')


# ---- scores

def test_scores_by_hand(results):
    one, half = results.cells('loss_weights')['one'], results.cells('loss_weights')['half']
    assert sample(one, 'nll').by_seed() == pytest.approx([2.5, 2.6, 2.7])
    assert sample(half, 'nll').by_seed() == pytest.approx([2.3, 2.4, 2.5])
    assert sample(one, 'nll', 'a').by_seed() == pytest.approx([2.0, 2.1, 2.2])            # tokens weigh prompts
    assert sample(one, 'rouge_l').by_seed() == pytest.approx([22.5] * 3)                  # prompts count alike, sets count alike
    assert sample(one, 'nll', 'validation').by_seed() == pytest.approx([2.0, 2.1, 2.2])   # the toy's validation is its first set

def test_scores_equal_those_that_the_run_wrote(results):
    for r in results.runs:
        for metric in METRICS: assert sample([r], metric).by_seed() == pytest.approx([r.metrics['student']['average'][metric]])

def test_mean_and_standard_deviation_over_seeds(results):
    e = estimate(sample(results.cells('loss_weights')['one'], 'nll'))
    assert (e.mean, e.sd) == pytest.approx((2.6, 0.1)) and e.by_seed == pytest.approx({0: 2.5, 1: 2.6, 2: 2.7})
    assert np.isnan(estimate(sample(results.cells('loss_weights')['one'][:1], 'nll')).sd)

def test_rows_of_student_before_and_teacher_are_those_models_scores(tmp_path):
    scores = json.loads((write_toy_run(tmp_path/'x', 's', 'c', 0, two_sets(1.))/'metrics.json').read_text())['student']
    add(tmp_path, 'loss_weights', 'one', 0, student_start=scores)
    found = suite_scores(read_results(tmp_path, SUITES), 'loss_weights').query("metric == 'nll' and where == 'test'").set_index('cell')['mean']
    assert found[BEFORE] == pytest.approx(3.5) and found[TEACHER] == found['one'] == pytest.approx(2.5)

def test_two_runs_are_compared_prompt_by_prompt_whatever_their_seeds(tmp_path, results):
    one, two = (add(tmp_path, 'spans', cell, seed, shift) for cell, seed, shift in (('none', 0, 0.), ('phrases', 3, 0.25)))
    found = pages.compare(one, two)
    assert list(found.columns) == ['seed0', 'seed3', 'better by'] and list(found.index)[0].startswith('NLL')
    a, b = (sample([records.read_run(p)], 'nll').by_seed()[0] for p in (one, two))
    assert (float(found.iloc[0, 0]), float(found.iloc[0, 1])) == pytest.approx((a, b), abs=6e-4) and float(found.iloc[0, 2].split(' [')[0]) == pytest.approx(a - b, abs=6e-4)
    with pytest.raises(ValueError, match='no finished run, there is no metrics.json'): pages.compare(one, tmp_path)
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    with pytest.raises(ValueError, match='not evaluated on the same prompts'): pages.compare(one, write_toy_run(tmp_path, 'spans', 'whole', 0, changed))

def test_runs_on_other_prompts_are_named_and_left_out(tmp_path):
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    write_toy_run(tmp_path, 'spans', 'phrases', 0, changed)
    for cell, seed in (('none', 0), ('phrases', 1)): add(tmp_path, 'spans', cell, seed)
    found = read_results(tmp_path, SUITES)
    assert {(r.cell, r.seed): r.usable for r in found.runs} == {('phrases', 0): False, ('phrases', 1): True, ('none', 0): True}
    assert 'other prompts' in suite_markdown(found, 'spans')

def test_runs_with_another_teacher_are_named_and_left_out(tmp_path):
    "Tuned again it is another one; a cell that asks for another teacher is no mistake."
    def add_with(nll, *where, **config):
        done = write_toy_run(tmp_path, 'spans', *where, two_sets(), config=config)/'metrics.json'
        metrics = json.loads(done.read_text())
        metrics['teacher']['average']['nll'] = nll
        done.write_text(json.dumps(metrics))
    for seed, nll in enumerate((2.0, 2.0004, 2.1)): add_with(nll, 'none', seed)
    add_with(1.5, 'phrases', 0, teacher='larger')
    found = read_results(tmp_path, SUITES)
    assert {(r.cell, r.seed): r.usable for r in found.runs} == {('none', 0): True, ('none', 1): True, ('none', 2): False, ('phrases', 0): True}
    assert 'its teacher is not that of most' in suite_markdown(found, 'spans')

def test_runs_in_another_precision_are_named_and_left_out(tmp_path):
    "Where it was left to the machine; a precision that was asked for is no mistake, and compares with the machines that chose it."
    def add_in(precision, *where, asked='auto', teacher=2.0):
        done = write_toy_run(tmp_path, 'spans', *where, two_sets(), config=dict(precision=asked), machine=dict(precision=precision))/'metrics.json'
        metrics = json.loads(done.read_text())
        metrics['teacher']['average']['nll'] = teacher
        done.write_text(json.dumps(metrics))
    for seed, precision in enumerate(('float32', 'float32', 'bfloat16')): add_in(precision, 'none', seed)
    add_in('float32', 'phrases', 0, asked='float32')
    add_in('float32', 'phrases', 1, asked='float32', teacher=2.1)
    add_in('bfloat16', 'phrases', 2, asked='bfloat16', teacher=2.1)
    found = read_results(tmp_path, SUITES)
    assert {(r.cell, r.seed): r.error.split()[0] for r in found.runs if not r.usable} == {('none', 2): 'it', ('phrases', 1): 'its'}
    assert 'computed in bfloat16, most of its suite in float32: run it again with -p precision float32' in suite_markdown(found, 'spans')

@pytest.mark.parametrize('metric', METRICS)
def test_different_prompts_are_never_compared(tmp_path, metric):
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    runs = [records.read_run(add(tmp_path, 'spans', 'none', 0)), records.read_run(write_toy_run(tmp_path, 'spans', 'phrases', 0, changed))]
    with pytest.raises(ValueError, match='same prompts'): better_by(runs[:1], runs[1:], metric)
    with pytest.raises(ValueError, match='same prompts'): sample(runs, metric)


# ---- bootstrap

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


# ---- pairs

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


# ---- the rule

@pytest.mark.parametrize('low, high, seeds, expected', [
    (.01, .3, (.1, .2, .3), HOLDS), (-.3, -.01, (-.1, -.2, -.3), FAILS), (-.01, .3, (.1, .2, .3), OPEN), (-.3, .01, (-.1, -.2, -.3), OPEN),
    (.01, .3, (.1, .2, -.01), OPEN), (-.3, -.01, (-.1, -.2, .01), OPEN), (.01, .3, (.1, .2), 'not resolved (2 seeds)'), (.01, .3, (.1,), 'not resolved (1 seed)'),
    (-.3, -.01, (-.1, -.2), 'not resolved (2 seeds)'), (0., .3, (.1, .2, .3), OPEN), (0., 0., (0., 0., 0.), OPEN), (.01, .3, (.1,) * 4, HOLDS)])
def test_rule(low, high, seeds, expected): assert verdict(Estimate((low + high) / 2, 0.1, low, high, dict(enumerate(seeds)))) == expected

def test_equal_cells_are_not_resolved(tmp_path):
    weights(tmp_path, half=0.)
    assert verdict(paired(read_results(tmp_path, SUITES), 'loss_weights', 'half', 'one')) == OPEN

def test_claims_have_their_verdict_by_nll_and_the_others_beside_it(results):
    found = suite_claims(results, 'loss_weights')
    assert list(found.nll_verdict) == [HOLDS, FAILS] and list(found.rouge_l_verdict) == [OPEN, OPEN] and list(found.seeds) == [3, 3]
    text = suite_markdown(results, 'loss_weights')
    assert '2 claims tested here' in text and re.search(r'all weights 1 .*Table 9 \| 3 \| \*\*holds\*\* \| \+0\.300 \[\+0\.300, \+0\.300\]', text)
    said = claims_sentence(results)
    assert "2 claims were tested in all. By NLL, which decides: holds 1, does not hold 1. By ROUGE-L, the paper's metric: not resolved 2." in said and 'contradict' not in said

def test_claims_on_which_the_metrics_contradict_each_other_are_named(tmp_path):
    for seed in range(3):
        add(tmp_path, 'spans', 'phrases', seed)
        add(tmp_path, 'spans', 'none', seed, shift=-.2, rouge=-5.)
    assert '**The two contradict each other** in 1: phrases (does not hold, holds).' in claims_sentence(read_results(tmp_path, SUITES))

def test_claims_with_few_seeds_are_counted_apart(tmp_path):
    weights(tmp_path)
    for cell in ('phrases', 'none'): add(tmp_path, 'spans', cell, 0)
    said = claims_sentence(read_results(tmp_path, SUITES))
    assert '3 claims were tested in all, 1 of them with fewer than 3 training seeds' in said and said.endswith('0.1 to 0.2 of 2.')
    few = claims_sentence(Results([r for r in read_results(tmp_path, SUITES).runs if r.suite == 'spans'], SUITES))
    assert few.startswith('1 claim was tested in all, 1 of them') and 'corrected for' not in few

def test_a_claim_about_a_cell_without_runs_is_not_run(tmp_path):
    add(tmp_path, 'spans', 'phrases', 0)
    found = read_results(tmp_path, SUITES)
    assert list(suite_claims(found, 'spans').nll_verdict) == [NOT_RUN] and '**not run**' in suite_markdown(found, 'spans') and claims_sentence(found) == ''


# ---- what goes with what

def with_distinct(folder, value):
    metrics = json.loads((folder/'metrics.json').read_text())
    for scores in metrics['student']['test'].values(): scores['distinct_2'] = value
    write_json(folder/'metrics.json', metrics)

def runs_that_rise(tmp_path, sign=1):
    "Eleven runs whose NLL and, by `sign`, ROUGE-L rise while distinct-2 falls; five of them are of `half`, which trains DAC-KL."
    for k in range(11): with_distinct(add(tmp_path, 'loss_weights', 'half' if k < 5 else f'other{k}', k if k < 5 else 0, shift=k, rouge=sign * k), 0.9 - k / 100)

def test_ranks_not_values_are_correlated():
    assert rank_correlation(pd.Series([1., 2., 3., 1000.]), pd.Series([4., 3., 2., 1.])) == pytest.approx(-1)
    assert rank_correlation(pd.Series([1., 2., 3.]), pd.Series([2., 3., 1.])) == pytest.approx(-0.5)      # 1 - 6 (1 + 1 + 4) / (3 * 8)

@pytest.mark.parametrize('key, other', [('preset', 'quickstart'), ('student_layers', 18), ('eval_temperature', 0.7)])
def test_each_run_counts_once_and_only_those_of_the_usual_setting(tmp_path, key, other):
    runs_that_rise(tmp_path)
    with_distinct(add(tmp_path, 'spans', 'phrases', 0, shift=6, rouge=6), 0.84)       # what `other6` is, in another suite
    folder = add(tmp_path, 'spans', 'none', 0)
    metrics = json.loads((folder/'metrics.json').read_text())
    metrics['config'][key] = other
    write_json(folder/'metrics.json', metrics)
    found = each_run(read_results(tmp_path, SUITES))
    assert len(found) == 11 and found.dac.sum() == 5 and list(found.columns[-3:]) == list(METRICS)

@pytest.mark.parametrize('sign', [1, -1])
def test_correlations_are_said_and_explained_only_if_they_part(tmp_path, sign):
    runs_that_rise(tmp_path, sign)
    said = metrics_apart(read_results(tmp_path, SUITES))
    a, b = ('-1.00', '+1.00') if sign == 1 else ('+1.00', '-1.00')
    assert 'over the 11 different runs of one preset and student' in said and f'distinct-2 is {a} (5 with DAC-KL: {a}, 6 without DAC-KL: {a}), with NLL {b} (' in said
    assert ('more alike' in said) == (sign == 1) and 'not a test' in said and said in summary_markdown(results=read_results(tmp_path, SUITES))

def test_nothing_is_said_of_few_runs_or_without_distinct_2(tmp_path):
    assert len(each_run(read_results(tmp_path, SUITES))) == 0 and metrics_apart(read_results(tmp_path, SUITES)) == ''
    runs_that_rise(tmp_path)
    add(tmp_path, 'loss_weights', 'other5', 0, shift=5)                               # written again, without distinct-2
    assert metrics_apart(read_results(tmp_path, SUITES)) == ''

def drawn_at(tmp_path, method, temperature, rouge, seeds=3):
    for seed in range(seeds):
        folder = add(tmp_path, 'temperature', f'{method},T={temperature:g}', seed, rouge=rouge)
        metrics = json.loads((folder/'metrics.json').read_text())
        metrics['config'] |= dict(method=method, eval_temperature=temperature)
        if temperature == 1: del metrics['config']['eval_temperature']              # a copy of a run from before the parameter
        write_json(folder/'metrics.json', metrics)

def test_sharpness_compares_both_at_one_temperature_and_across(tmp_path):
    assert sharpness_answer(read_results(tmp_path, SUITES)) == ''
    drawn_at(tmp_path, 'mgsr', 1., 2.)
    assert sharpness_answer(read_results(tmp_path, SUITES)) == ''                   # nothing to compare
    for method, temperature, rouge in (('kd', 1., 0.), ('kd', .7, 3.), ('mgsr', .5, 9.)): drawn_at(tmp_path, method, temperature, rouge)
    said = sharpness_answer(read_results(tmp_path, SUITES))
    assert 'same temperature (0: the likeliest token each time): at 1 +2.0 [+2.0, +2.0] (better). MGSR drawn at 1, than KD drawn otherwise: at 0.7 -1.0 [-1.0, -1.0] (worse).' in said
    assert 'sharpness?** At this scale: KD drawn at 0.7 passes MGSR drawn at 1. ROUGE-L' in said
    drawn_at(tmp_path, 'kd', .5, 1.)
    assert 'At this scale: KD drawn at 0.7 passes MGSR drawn at 1; sharpness is not all of it: drawn alike at 0.5, MGSR is still better. ' in sharpness_answer(read_results(tmp_path, SUITES))
    drawn_at(tmp_path, 'kd', 0., 3., seeds=2)
    assert 'at 0 -1.0 [-1.0, -1.0] (not resolved (2 seeds))' in sharpness_answer(read_results(tmp_path, SUITES))

def test_sharpness_with_few_seeds_is_not_resolved(tmp_path):
    for method, rouge in (('mgsr', 2.), ('kd', 0.)):
        for temperature in (1., 0.): drawn_at(tmp_path, method, temperature, rouge + 9 * (temperature == 0), seeds=2)
    said = sharpness_answer(read_results(tmp_path, SUITES))
    assert 'Not resolved at this scale. ROUGE-L' in said and said in summary_markdown(results=read_results(tmp_path, SUITES))
    assert 'Distinct-2' not in said
    for method, value in (('mgsr', .25), ('kd', .5)):
        for folder in (tmp_path/'temperature').glob(f'{method},*/seed*'): with_distinct(folder, value)
    assert 'Distinct-2: MGSR 0.25 at 1, 0.25 at 0; KD 0.50 at 1, 0.50 at 0.' in sharpness_answer(read_results(tmp_path, SUITES))

def test_the_plot_has_a_dot_a_run_in_its_group(tmp_path):
    runs_that_rise(tmp_path)
    left, right = metrics_plot(each_run(read_results(tmp_path, SUITES))).axes
    for ax in (left, right): assert [len(line.get_xdata()) for line in ax.lines] == [5, 6]
    assert list(right.lines[0].get_ydata()) == pytest.approx([22.5 + k for k in range(5)])


# ---- words

def test_numbers_are_rounded_without_a_negative_zero():
    assert tables._number(-0.0004, 3) == '0.000' and tables._number(0.0004, 3, True) == '0.000' and tables._number(-0.0006, 3) == '-0.001' and tables._number(0.25, 1, True) == '+0.2'

def test_score_table_by_hand(results):
    row = next(l for l in score_table(suite_scores(results, 'loss_weights'), 'one').splitlines() if '`one`' in l)
    assert row.startswith('| **`one`** | 3 | 2.600&nbsp;±&nbsp;0.100<br>[') and row.count('| 15.0&nbsp;±&nbsp;0.0<br>') == 1

def test_best_cell_is_the_one_with_the_lowest_nll(results): assert best_cell(results, 'loss_weights') == 'half'

def test_weights_answer_when_the_balance_matters(results):
    text = weights_answer(results)
    assert 'Yes, at this scale: (1, 0.5) is better than (1, 1).' in text and '(1, 0.5) +0.200 [+0.200, +0.200] (better)' in text
    assert 'Leaving a loss out: (1, 0) -0.300 [-0.300, -0.300] (worse)' in text and '3 of 3 cells, 3 training seeds, 4 prompts of 2 sets' in text and 'ROUGE-L resolves 0 of the 2' in text

def test_answer_says_where_the_two_metrics_contradict_each_other(tmp_path):
    for cell, shift, rouge in (('learned', .1, 5.), ('quantile', 0., 0.)):
        for seed in range(3): add(tmp_path, 'fixed_clipping', cell, seed, shift, rouge=rouge)
    text = clipping_answer(read_results(tmp_path, SUITES))
    assert 'ROUGE-L resolves 1 of the 1' in text and '`quantile` +5.0' in text and 'contradict each other** for `quantile`' in text

def uneven(runs, seeds=3, jump=.4):
    "Cell `none` is 0.1 nats better than `phrases`; on set b, of 2 tokens, seeds are 1 nat apart, and the difference `jump` more with each."
    for cell, better, more in (('phrases', 0., 0.), ('none', .1, jump)):
        for k in range(seeds):
            sets = dict(a=dict(nll=[2 - better, 5 - better], tokens=[30, 10]), b=dict(nll=[4 + k - better + more * (k - 1)], tokens=[2]))
            write_toy_run(runs, 'spans', cell, k, {name: dict(x, kl=[.5] * len(x['nll']), rouge_l=[10.] * len(x['nll'])) for name, x in sets.items()})
    return read_results(runs, SUITES)

def test_sensitivity_leaves_out_the_set_on_which_seeds_differ_most(tmp_path):
    found = uneven(tmp_path)
    np.testing.assert_allclose(tables.spread_of_sets(found, 'spans')[['b', 'a']], [1.2, 0], atol=1e-12)      # 1 in one cell, 1.4 in the other
    text = tables.sensitivity(found, 'spans', {'whole': ('none', 'phrases')})
    assert 'differ most on `b`, whose references have 2 tokens' in text and 'whole +0.100 [+0.100, +0.100].' in text and text in suite_markdown(found, 'spans').replace('`none`', 'whole')
    assert verdict(paired(found, 'spans', 'none', 'phrases')) == OPEN         # the rule still goes by all sets

def test_sensitivity_of_one_seed_or_an_unknown_pair_is_empty(tmp_path):
    found = uneven(tmp_path, seeds=1)
    assert tables.spread_of_sets(found, 'spans').empty and tables.sensitivity(found, 'spans', {'whole': ('none', 'phrases')}) == ''
    assert tables.sensitivity(uneven(tmp_path), 'spans', {'x': ('unknown', 'phrases')}) == ''

def test_answers_say_how_much_one_set_decides(results):
    assert 'Without it, NLL is better by: (1, 0) -0.300 [-0.300, -0.300]; (1, 0.5) +0.200 [+0.200, +0.200].' in weights_answer(results)

def test_weights_answer_when_only_leaving_out_matters(tmp_path):
    weights(tmp_path, half=0.)
    text = weights_answer(read_results(tmp_path, SUITES))
    assert 'Not resolved at this scale' in text and 'Yes' not in text and '(1, 0) -0.300' in text

def test_weights_answer_with_too_few_seeds_says_so(tmp_path):
    weights(tmp_path, seeds=1)
    text = weights_answer(read_results(tmp_path, SUITES))
    assert 'Not resolved' in text and 'asks for 3 training seeds, there is 1' in text and 'reach to 0.200 nats' in text and '1 training seed,' in text

def test_weights_answer_worse(tmp_path):
    weights(tmp_path, half=0.1)
    assert '(1, 0.5) is worse than (1, 1)' in weights_answer(read_results(tmp_path, SUITES))

def test_answers_without_runs(tmp_path):
    found = read_results(tmp_path, SUITES)
    assert 'Not run yet' in weights_answer(found) and 'Not run yet' in clipping_answer(found)
    add(tmp_path, 'loss_weights', 'one', 0); add(tmp_path, 'fixed_clipping', 'learned', 0)
    found = read_results(tmp_path, SUITES)
    assert 'Not run yet' in weights_answer(found) and 'Not run yet' in clipping_answer(found)

def test_fixed_clipping_meets_the_learned_clipping_of_its_reading(tmp_path):
    clipping(tmp_path, dict.fromkeys(CLIPS, 0.), seeds=1)
    assert clipping_pairs(read_results(tmp_path, SUITES)) == {'quantile': 'learned', 'quantile_mass': 'learned_mass'}

@pytest.mark.parametrize('shifts, said', [
    (dict(learned=0., learned_mass=0., quantile=.1, quantile_mass=.2), 'Yes, at this scale: it is better than each of 2.'),
    (dict(learned=0., learned_mass=0., quantile=-.1, quantile_mass=-.2), 'No, at this scale: each of 2 is better than it.'),
    (dict(learned=0., learned_mass=0., quantile=.1, quantile_mass=-.2), 'Not in general, at this scale: it is better than `quantile` and worse than `quantile_mass`.'),
    (dict(learned=0., learned_mass=0., quantile=0., quantile_mass=0.), 'Not resolved at this scale: it differs from none of 2 by our rule.'),
    (dict(learned=0., learned_mass=-.5, quantile=.1, quantile_mass=-.2), 'Yes, at this scale')])
def test_clipping_answer(tmp_path, shifts, said):
    clipping(tmp_path, shifts)
    assert said in clipping_answer(read_results(tmp_path, SUITES))

def test_clipping_answer_tells_fixed_limits_from_none(tmp_path):
    clipping(tmp_path, dict(learned=0., quantile=.1, all=-.4))
    text = clipping_answer(read_results(tmp_path, SUITES))
    assert 'Yes, at this scale: it is better than each of 1' in text and 'Than no clipping at all: `all` -0.400' in text

LOG = dict(step=[0, 1, 2], validation_nll=[3., None, 2.], validation_kl=[1., None, .5], clip_upper=[None, .9, .8], clip_upper_sd=[None, .01, .01], clip_lower=[None, .1, .3],
           clip_lower_sd=[None, .02, .02], kept_mass=[None, .5, .25])

def test_where_limits_ended_is_the_mean_over_seeds_of_the_last_step(tmp_path):
    for seed in range(2): add(tmp_path, 'fixed_clipping', 'learned', seed, log=LOG | dict(clip_upper=[None, .9, .8 - .2 * seed]))
    add(tmp_path, 'fixed_clipping', 'quantile', 0, log=LOG | dict(clip_upper=[None, .1, .1]))
    assert where_limits_ended(read_results(tmp_path, SUITES), 'fixed_clipping').startswith('The learned limits (u, l) went from (0.90, 0.10) to (0.70, 0.30); the kept classes had 50% of the teacher\'s mass at first and 25%')

def test_setting_names_every_value_that_runs_recorded(tmp_path):
    add(tmp_path, 'spans', 'none', 0)
    write_toy_run(tmp_path, 'spans', 'none', 1, two_sets(), config=dict(max_steps=12), machine=dict(torch='2.10'))
    assert '12 and 24 steps' in setting(read_results(tmp_path, SUITES), 'spans') and 'torch 2.10 and 2.9' in setting(read_results(tmp_path, SUITES), 'spans')

def test_notes_of_the_data_are_printed_once(results): assert suite_markdown(results, 'loss_weights').count('uinst: NOT its set') == 1

def test_suite_without_runs_says_so(results):
    assert '**Not run yet:** `mgsr-ablate spans`' in suite_markdown(results, 'spans')
    assert results.not_run == ['fixed_clipping', 'spans']

def test_summary_names_what_ran_and_what_did_not(tmp_path):
    weights(tmp_path)
    text = summary_markdown(tmp_path, SUITES)
    assert '| `loss_weights` | 3 of 3 | 3 | `half`<br>+0.200 [+0.200, +0.200] than `one`, **better** | holds: 1, does not hold: 1 | not resolved: 2 |' in text
    assert 'Not run yet: `fixed_clipping` and `spans`.' in text and 'Does the balance' in text and 'learned clipping beat' in text
    assert 'Does the balance' not in summary_markdown(tmp_path, SUITES, answers=False)

@pytest.mark.parametrize('seeds, said', [((('one', 0), ('half', 0)), '`one`, the reference |'), ((('half', 0),), '`half`<br>no seed in common with `one` |')])
def test_summary_of_a_suite_whose_reference_is_the_best_or_was_not_run(tmp_path, seeds, said):
    for cell, k in seeds: add(tmp_path, 'loss_weights', cell, k, shift=0.1 * (cell == 'half'))
    assert said in summary_markdown(tmp_path, SUITES)


# ---- results.csv

def test_results_csv_has_a_row_for_every_run_that_ended(tmp_path):
    failing(tmp_path)
    table = results_table(tmp_path, SUITES)
    assert [tuple(x) for x in table[['cell', 'seed']].values] == [('phrases', 0), ('phrases', 1), ('none', 0), ('none', 2)]
    first = table.iloc[0]
    assert (first.nll, first.rouge_l, first.nll_a, first.rouge_l_b, first.seconds_training, first.torch, first.precision) == (2.5, 22.5, 2.0, 30.0, 60.0, '2.9', 'bfloat16')
    assert table.error.isna().tolist() == [True, False, False, False]

def test_results_csv_is_the_same_every_time(tmp_path):
    failing(tmp_path)
    path = write_results_csv_of(tmp_path)
    assert path.read_text(encoding='utf-8') == results_csv(tmp_path, SUITES) == results_csv(tmp_path, SUITES)
    assert pd.read_csv(path)['digest'].isna().sum() == 2

def write_results_csv_of(runs):
    path = write_results_csv(runs)
    assert path == runs/'results.csv'
    return path

def test_results_csv_without_runs_can_be_written(tmp_path): assert results_csv(tmp_path, SUITES).strip() == ''


# ---- figures

def test_figures_show_the_numbers(tmp_path):
    weights(tmp_path)
    for r in read_results(tmp_path, SUITES).runs: pd.DataFrame(LOG).to_csv(r.folder/'log.csv', index=False)
    found = read_results(tmp_path, SUITES)
    effects, grid, heat, curves, cost = effect_plot(suite_effects(found, 'loss_weights'), 'one'), weight_grid(found), *suite_figures(found, 'loss_weights')[1:]
    marks = next(l for l in effects.axes[0].lines if l.get_marker() == '|')
    assert list(marks.get_xdata()) == pytest.approx([-0.3, 0.2]) and [t.get_text() for t in effects.axes[0].get_yticklabels()] == ['no_span', 'half']
    assert grid.set_index(['dac', 'span']).nll.to_dict() == pytest.approx({(1, 0): 2.9, (1, .5): 2.4, (1, 1): 2.6})
    assert {t.get_text() for t in heat.axes[0].texts} == {'2.900', '2.400', '2.600'}
    assert list(curves.axes[0].lines[0].get_ydata()) == [3, 2] and len(cost.axes) == 2
    assert len(suite_figures(found, 'loss_weights')) == 4 and len(suite_figures(found, 'spans')) == 0

def test_limits_are_drawn_for_learned_cells_only(tmp_path):
    clipping(tmp_path, dict(learned=0., quantile=0.), seeds=1)
    for r in read_results(tmp_path, SUITES).runs: pd.DataFrame(LOG).to_csv(r.folder/'log.csv', index=False)
    found = read_results(tmp_path, SUITES)
    figure = limits_plot(suite_logs(found, 'fixed_clipping'))
    assert [a.get_title() for a in figure.axes] == ['learned'] and list(figure.axes[0].lines[0].get_ydata()) == [.9, .8]
    assert len(suite_figures(found, 'fixed_clipping')) == 4

def test_small_png_is_a_png_with_few_colours(results):
    from PIL import Image
    data = small_png(effect_plot(suite_effects(results, 'loss_weights')))
    assert Image.open(io.BytesIO(data)).mode == 'P' and len(data) < 20_000

def test_small_png_keeps_the_colour_of_every_line():
    from PIL import Image
    figure, ax = plt.subplots(figsize=(9, 3), dpi=80)
    for k in range(8):                   # bands over each other: more shades than the picture may have colours
        ax.fill_between([0, 1, 2], [3, 2 - k / 20, 1 - k / 30], [3, 2.3 - k / 20, 1.5 - k / 40], color=f'C{k}', alpha=.15, lw=0)
        ax.plot([0, 1, 2], [3, 2.15 - k / 20, 1.2 - k / 30], 'o-', ms=3, color=f'C{k}')
    plt.close(figure)
    shown = np.asarray(Image.open(io.BytesIO(small_png(figure))).convert('RGB')).reshape(-1, 3).astype(int)
    far = {line.get_color(): np.abs(shown - 255 * np.array(to_rgb(line.get_color()))).max(1).min() for line in ax.lines}
    assert max(far.values()) <= 12, far       # of 255; 26 if the 64 most frequent shades are kept

def test_learning_curves_show_the_paired_difference():
    log = pd.DataFrame([dict(step=t, cell=c, seed=seed, validation_nll=4 + seed - d * t, validation_kl=2 - d * t) for c, d in (('a', 0), ('b', .1)) for seed in (0, 1) for t in (0, 5)])
    nll, kl, better_nll, better_kl = learning_curves(log, 'a').axes
    assert [list(line.get_ydata()) for line in nll.lines] == [[4.5, 4.5], [4.5, 4.]]
    for ax in (better_nll, better_kl): np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[0, 0], [0, .5]])
    np.testing.assert_allclose(better_nll.collections[1].get_paths()[0].vertices[:, 1].max(), .5)      # the seeds differ by 1, their differences do not

def test_learning_curves_without_runs_of_the_reference():
    log = pd.DataFrame([dict(step=t, cell='b', seed=0, validation_nll=4 - t, validation_kl=2) for t in (0, 1)])
    figure = learning_curves(log, 'a')
    assert list(figure.axes[0].lines[0].get_ydata()) == [4, 3] and len(figure.axes[2].lines[0].get_ydata()) == 0

def test_every_figure_of_a_suite_says_what_it_shows(results):
    assert all(len(f.get_label().split()) > 10 for f in suite_figures(results, 'loss_weights'))

def test_a_suspended_step_is_not_counted_as_work(tmp_path):
    add(tmp_path, 'spans', 'none', 0, log=dict(step=[0, 1, 2, 3, 4, 5], seconds=[None, 2., 3., 2., 1000., 2.]))
    assert costs(read_results(tmp_path, SUITES), 'spans').seconds.tolist() == [10.]

def test_costs_have_a_row_for_every_run(results): assert list(costs(results, 'loss_weights').groupby('cell').size()) == [3, 3, 3] and costs(results, 'loss_weights').seconds.unique() == [60]


# ---- what is committed

def outputs(notebook='report'): return [o.data['text/markdown'] for c in nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', as_version=4).cells if c.cell_type == 'code' for o in c.outputs if 'text/markdown' in o.get('data', {})]

@pytest.fixture(scope='module')
def committed():
    "The runs that results.csv lists. Others are the reader's own."
    path = ROOT/'runs'/'results.csv'
    if not path.is_file() or not path.read_text(encoding='utf-8').strip(): pytest.skip('no results are committed yet')
    listed = set(pd.read_csv(path, dtype={'cell': str})[['suite', 'cell', 'seed']].itertuples(index=False, name=None))
    found = read_results(ROOT/'runs')
    return Results([r for r in found.runs if (r.suite, r.cell, r.seed) in listed], found.suites)

def test_committed_csv_is_that_of_the_runs(committed):
    assert (ROOT/'runs'/'results.csv').read_text(encoding='utf-8') == results_csv(results=committed), 'run `make report`'

def test_committed_report_is_that_of_the_runs(committed):
    shown = outputs()
    for name in committed.names: assert suite_markdown(committed, name) in shown, f'{name}: run `make report`'
    assert summary_markdown(results=committed, answers=False) in shown
    assert weights_answer(committed) + '\n\n' + clipping_answer(committed) in shown

def test_committed_overview_is_that_of_the_runs(committed):
    "The README is made from it, which test_project compares."
    assert summary_markdown(results=committed) in outputs('index'), 'run `make report`'

def test_committed_overview_is_that_of_the_quickstart(monkeypatch):
    monkeypatch.chdir(ROOT/'nbs')
    *before, last = ast.parse(next(c.source for c in nbformat.read('index.ipynb', as_version=4).cells if 'runs/examples/quickstart/metrics.json' in c.source)).body
    names = dict(json=json, Path=Path, Markdown=Markdown)
    exec(compile(ast.Module(before, []), 'index', 'exec'), names)
    assert eval(compile(ast.Expression(last.value), 'index', 'eval'), names).data in outputs('index'), 'run `make report`'

def test_report_notebook_has_its_parameter():
    tagged = [c for c in nbformat.read(ROOT/'nbs'/'report.ipynb', as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1 and tagged[0].source.startswith('runs_dir = ')

def test_report_has_a_section_for_every_suite():
    from mgsr_nb.study.suites import SUITES as known
    source = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/'report.ipynb', as_version=4).cells)
    assert re.findall(r'^show\("(\w+)"\)$', source, re.M) and set(re.findall(r'^show\("(\w+)"\)$', source, re.M)) == set(known)
