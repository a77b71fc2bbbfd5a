"Numbers of a suite on scores that can be counted by hand, and the file with a row a run."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest
from mgsr_nb.study import tables
from mgsr_nb.study.records import Results, read_results, write_toy_run
from mgsr_nb.study.statistics import METRICS, sample
from mgsr_nb.study.tables import BEFORE, TEACHER, results_csv, results_table, score_table, suite_scores, where_limits_ended, write_results_csv
from toy_suites import LOG, SUITES, add, failing, results, two_sets, uneven

ROOT = Path(__file__).resolve().parents[1]

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

def test_mean_and_standard_deviation_over_seeds(results, tmp_path):
    of = lambda found: found.query("cell == 'one' and metric == 'nll' and where == 'test'").iloc[0]
    assert tuple(of(suite_scores(results, 'loss_weights'))[['mean', 'sd']]) == pytest.approx((2.6, 0.1))
    add(tmp_path/'single', 'loss_weights', 'one', 0)
    assert np.isnan(of(suite_scores(read_results(tmp_path/'single', SUITES), 'loss_weights')).sd)

def test_rows_of_student_before_and_teacher_are_those_models_scores(tmp_path):
    scores = json.loads((write_toy_run(tmp_path/'x', 's', 'c', 0, two_sets(1.))/'metrics.json').read_text())['student']
    add(tmp_path, 'loss_weights', 'one', 0, student_start=scores)
    found = suite_scores(read_results(tmp_path, SUITES), 'loss_weights').query("metric == 'nll' and where == 'test'").set_index('cell')['mean']
    assert found[BEFORE] == pytest.approx(3.5) and found[TEACHER] == found['one'] == pytest.approx(2.5)

def test_numbers_are_rounded_without_a_negative_zero():
    assert tables._number(-0.0004, 3) == '0.000' and tables._number(0.0004, 3, True) == '0.000' and tables._number(-0.0006, 3) == '-0.001' and tables._number(0.25, 1, True) == '+0.2'

def test_where_limits_ended_is_the_mean_over_seeds_of_the_last_step(tmp_path):
    for seed in range(2): add(tmp_path, 'fixed_clipping', 'learned', seed, log=LOG | dict(clip_upper=[None, .9, .8 - .2 * seed]))
    add(tmp_path, 'fixed_clipping', 'quantile', 0, log=LOG | dict(clip_upper=[None, .1, .1]))
    assert where_limits_ended(read_results(tmp_path, SUITES), 'fixed_clipping').startswith('The learned limits (u, l) went from (0.90, 0.10) to (0.70, 0.30); the kept classes had 50% of the teacher\'s mass at first and 25%')

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

def test_score_table_by_hand(results):
    row = next(l for l in score_table(suite_scores(results, 'loss_weights'), 'one').splitlines() if '`one`' in l)
    assert row.startswith('| **`one`** | 3 | 2.600&nbsp;±&nbsp;0.100 |') and row.count('| 15.0&nbsp;±&nbsp;0.0 |') == 1

def test_sensitivity_leaves_out_the_set_on_which_seeds_differ_most(tmp_path):
    found = uneven(tmp_path)
    np.testing.assert_allclose(tables.spread_of_sets(found, 'spans')[['b', 'a']], [1.2, 0], atol=1e-12)      # 1 in one cell, 1.4 in the other
    *_, row = tables.sensitivity_table(found, 'spans', [('none', 'phrases')]).splitlines()
    all_sets, without = row.split('|')[3:5]
    assert without.strip() == '+0.100 ± 0.000' and float(all_sets.split('±')[1]) > 0.1

def test_sensitivity_of_one_seed_or_an_unknown_pair_is_empty(tmp_path):
    found = uneven(tmp_path, seeds=1)
    assert tables.spread_of_sets(found, 'spans').empty and tables.sensitivity_table(found, 'spans', [('none', 'phrases')]) == ''
    assert tables.sensitivity_table(uneven(tmp_path), 'spans', [('unknown', 'phrases')]) == ''
