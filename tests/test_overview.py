"What came of all suites together, where the metrics part, and two runs compared."
import json
import pandas as pd, pytest
from mgsr_nb.files import write_json
from mgsr_nb.study.overview import compare, correlations, each_run, rank_correlation, summary_table
from mgsr_nb.study import records
from mgsr_nb.study.records import read_results, write_toy_run
from mgsr_nb.study.statistics import METRICS, sample
from toy_suites import SUITES, add, results, runs_that_rise, two_sets, weights, with_distinct

def test_two_runs_are_compared_prompt_by_prompt_whatever_their_seeds(tmp_path, results):
    one, two = (add(tmp_path, 'spans', cell, seed, shift) for cell, seed, shift in (('none', 0, 0.), ('phrases', 3, 0.25)))
    found = compare(one, two)
    assert list(found.columns) == ['seed0', 'seed3', 'better by'] and list(found.index)[0].startswith('NLL')
    a, b = (sample([records.read_run(p)], 'nll').by_seed()[0] for p in (one, two))
    assert (float(found.iloc[0, 0]), float(found.iloc[0, 1])) == pytest.approx((a, b), abs=6e-4) and float(found.iloc[0, 2].split(' ±')[0]) == pytest.approx(a - b, abs=6e-4)
    with pytest.raises(ValueError, match='no finished run, there is no metrics.json'): compare(one, tmp_path)
    changed = two_sets()
    changed['a']['tokens'] = [2, 1]
    with pytest.raises(ValueError, match='not evaluated on the same prompts'): compare(one, write_toy_run(tmp_path, 'spans', 'whole', 0, changed))

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

def test_correlations_are_a_table_of_all_runs_and_of_each_kind(tmp_path):
    runs_that_rise(tmp_path)
    lines = correlations(read_results(tmp_path, SUITES)).splitlines()[2:]
    assert lines == ['| all | 11 | -1.00 | +1.00 |', '| with DAC-KL | 5 | -1.00 | +1.00 |', '| without | 6 | -1.00 | +1.00 |']

def test_nothing_is_said_of_few_runs_or_without_distinct_2(tmp_path):
    assert len(each_run(read_results(tmp_path, SUITES))) == 0 and correlations(read_results(tmp_path, SUITES)) == ''
    runs_that_rise(tmp_path)
    add(tmp_path, 'loss_weights', 'other5', 0, shift=5)                               # written again, without distinct-2
    assert correlations(read_results(tmp_path, SUITES)) == ''

def test_summary_has_a_line_a_suite_with_what_became_of_its_comparisons(tmp_path):
    for cell, shift in (('one', 0.), ('half', -.2), ('no_span', .3)):
        for k in range(5): add(tmp_path, 'loss_weights', cell, k, shift + (cell != 'one') * 1e-3 * k)
    for cell, shift in (('none', 0.), ('phrases', .1)):
        for k in range(5): add(tmp_path, 'spans', cell, k, shift)
    for k in range(5): add(tmp_path, 'f_sub', 'hidden=1', k, 0.), add(tmp_path, 'f_sub', 'hidden=0', k, (-.2, .2, .1, 0, 0)[k])
    table = summary_table(read_results(tmp_path, SUITES), 'nll').splitlines()
    assert table[0] == '| suite | cells | seeds | better | worse | no difference | better by one metric, worse by another | not resolved | open: at most, nats |'
    assert '| `loss_weights` | 3 of 3 | 5 | 1 | 1 | 0 | 0 | 0 |  |' in table and '| `spans` | 2 of 2 | 5 | 0 | 1 | 0 | 0 | 0 |  |' in table
    # by hand: mean 0.02, sd 0.1483, half of the interval 2.776 * 0.1483 / 5 ** 0.5
    assert next(line for line in table if 'f_sub' in line).endswith('| 0 | 0 | 0 | 0 | 1 | 0.204 |')
    assert table[-1] == '| all |  |  | 1 | 2 | 0 | 0 | 1 |  |' and summary_table(read_results(tmp_path/'nothing', SUITES), 'nll') == ''
