"The laboratory's study: pairs by seed, the rule, tables that say what the runs hold."
import json
from dataclasses import replace
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from mgsr_nb.files import write_json
from mgsr_nb.study.laboratory import (
    BETTER, EXPECTED, SAME, SCORES, WORSE, against_reference, better_by_seed, lab_costs, effect_table, effects_of, lab_map, effect_plot, lab_score, largest,
    lab_table, of_claims, read_costs, read_lab)
from mgsr_nb.study.statistics import FAILS, HOLDS, NEGLIGIBLE, OPEN, PARTED, SeedTest
from mgsr_nb.study.records import read_results
from mgsr_nb.study.suites import SUITES

BASE = dict(exact=60., greedy_exact=70., truth_kl=.3, kl=.2, nll=1., rouge_l=60., greedy_rouge_l=70.)
NOISE = [.3, -.2, .1, -.3, .1]

def write(root, cell, seeds=5, **gains):
    for k in range(seeds):
        average = {s: v + gains.get(s, 0) + NOISE[k] * (.01 if v < 2 else 1) * (cell != 'none') + k for s, v in BASE.items()}
        write_json(root/f'components+lab/{cell}/seed{k}/metrics.json', {'config': {'save_prompts': False}, 'student_start': {'average': BASE, 'test': {}},
            'student': {'average': average, 'test': {'lab': dict(exact=average['exact'] + 1)}}, 'teacher': {'average': BASE, 'test': {}}})

@pytest.fixture
def results(tmp_path):
    write(tmp_path, 'none')
    write(tmp_path, 'scrg', exact=5, greedy_exact=4, truth_kl=-.1)
    write(tmp_path, 'scrg+dac', exact=5, greedy_exact=-4)            # a sharper student, not a better one
    write(tmp_path, 'dac', exact=5, greedy_exact=4, truth_kl=.1)     # farther from the truth
    write(tmp_path, 'span', seeds=3, exact=5, greedy_exact=4)
    write(tmp_path, 'scrg+dac+span', exact=-6, greedy_exact=-4, truth_kl=.1)
    return read_lab(tmp_path)

def test_effects_and_verdicts(results):
    found = {e.better: e for e in effects_of(results, 'components', against_reference(results, 'components'))}
    assert {c: e.verdict for c, e in found.items()} == {'scrg': HOLDS, 'scrg+dac': PARTED, 'dac': PARTED, 'span': f'{OPEN} (3 seeds)', 'scrg+dac+span': FAILS}
    t = found['scrg'].tests['exact']
    assert found['scrg'].by_seed['exact'] == pytest.approx({k: 5 + n for k, n in enumerate(NOISE)})
    low, high = ttest_1samp([5 + n for n in NOISE], 0).confidence_interval()
    assert (t.mean - t.half, t.mean + t.half) == pytest.approx((low, high))
    assert found['scrg'].tests['truth_kl'].mean == pytest.approx(.1)        # lower is better

def test_a_small_difference_is_a_finding(tmp_path):
    write(tmp_path, 'none'), write(tmp_path, 'scrg')
    (found,) = effects_of(read_lab(tmp_path), 'components', [('scrg', 'none')])
    assert found.verdict == NEGLIGIBLE

def test_pairs_are_of_the_same_seed(tmp_path):
    write(tmp_path, 'none', seeds=2), write(tmp_path, 'scrg', seeds=4, exact=1)
    found = read_lab(tmp_path)
    assert better_by_seed(found, 'components', 'scrg', 'none', 'exact') == pytest.approx({0: 1.3, 1: .8})
    assert better_by_seed(found, 'components', 'scrg', 'nobody', 'exact') == {}
    assert effects_of(found, 'components', [('scrg', 'nobody')]) == []
    assert lab_score(found.runs[0], 'exact', where='lab') == lab_score(found.runs[0], 'exact') + 1

def test_pairs_have_one_teacher(tmp_path):
    "A teacher that was tuned again on another machine is another one; its student's scores are not compared."
    write(tmp_path, 'none'), write(tmp_path, 'scrg', exact=5)
    for cell in ('none', 'scrg'):
        for k in (0, 1) if cell == 'none' else (1, 2):
            path = tmp_path/f'components+lab/{cell}/seed{k}/metrics.json'
            metrics = json.loads(path.read_text())
            metrics['teacher']['average'] = BASE | dict(nll=BASE['nll'] + .002)
            write_json(path, metrics)
    assert list(better_by_seed(read_lab(tmp_path), 'components', 'scrg', 'none', 'exact')) == [1, 3, 4]

def test_tables_hold_every_cell_and_comparison(results):
    table = lab_table(results, 'components').splitlines()
    assert [line.split('|')[1].strip() for line in table[2:]] == ['`none`', '`scrg`', '`scrg+dac`', '`scrg+dac+span`', '`dac`', '`span`', '(start)', '(teacher)']
    assert '62.0&nbsp;±&nbsp;1.6' in table[2] and all(m.label in table[0] for m in SCORES.values())
    effects = effects_of(results, 'components', of_claims(results, 'components'))
    lines = effect_table(effects).splitlines()[2:]
    assert len(lines) == len(effects) == 3 and '`scrg`' in lines[0] and '**better**' in lines[0] and '+5.0&nbsp;±&nbsp;0.3' in lines[0]
    assert len(effect_plot(effects).axes) == 2

def test_an_open_comparison_says_how_large_it_can_be_and_others_do_not(results):
    (effect,) = effects_of(results, 'components', [('scrg', 'none')])
    table = effect_table([replace(effect, verdict=OPEN), effect]).splitlines()
    test = effect.tests['exact']
    assert f'**not resolved**: at most {abs(test.mean) + test.half:.1f} points' in table[2] and 'at most' not in table[3]
    assert largest(SeedTest(5, -2., .5, 0, 0)) == 2.5

def test_exact_match_is_the_expected_one_where_a_run_has_it(tmp_path):
    write(tmp_path, 'none')
    before = lab_table(read_lab(tmp_path), 'components')
    for k in range(5):
        path = tmp_path/f'components+lab/none/seed{k}/metrics.json'
        metrics = json.loads(path.read_text())
        for who in ('student_start', 'student', 'teacher'): metrics[who]['average']['expected_exact'] = 12.5
        write_json(path, metrics)
    found = read_lab(tmp_path)
    assert lab_score(found.runs[0], 'exact') == 12.5 and lab_score(found.runs[0], 'greedy_exact') == found.runs[0].metrics['student']['average']['greedy_exact']
    assert '| exact match of draws |' in before and '| exact match |' in lab_table(found, 'components') and '12.5' not in before

def test_the_other_reader_leaves_them_alone(tmp_path):
    write(tmp_path, 'none')
    assert read_results(tmp_path).runs == []

@pytest.mark.parametrize('suite', EXPECTED)
def test_what_was_expected_is_of_cells_that_there_are(suite):
    said = SUITES[suite]
    assert EXPECTED[suite].cells.keys() <= said.cells.keys() - ({said.reference} if said.against_reference else set())
    assert set(EXPECTED[suite].cells.values()) <= {BETTER, WORSE}
    assert EXPECTED[suite].why

def test_a_table_says_what_was_expected(results):
    (effect,) = effects_of(results, 'components', [('dac', 'none')])
    assert '| worse |' in effect_table([effect], 'components') and '| worse |' not in effect_table([effect])

def test_costs_are_those_measured_and_kls_at_equal_updates_and_at_equal_seconds(results, tmp_path):
    log = lambda kls: pd.DataFrame({'step': range(len(kls)), 'validation_kl': kls})
    for cell, seed, kls in (('none', 0, [1., .8, None, .5, .4]), ('none', 1, [1., .9, .7, .6, .6]), ('scrg', 0, [1., .7, None, .3, .2])):
        log(kls).to_csv(tmp_path/f'components+lab/{cell}/seed{seed}/log.csv', index=False)
    assert lab_costs(results, 'components', read_costs(tmp_path)) == ''
    write_costs = pd.DataFrame([dict(suite=s, cell=c, base='none', ratio=r, teacher_ratio=2 * r) for s, c, r in (('components', 'none', 1.), ('components', 'scrg', 2.), ('components', 'dac', 1.), ('spans', 'none', 3.))])
    (tmp_path/'performance').mkdir()
    write_costs.to_csv(tmp_path/'performance/costs.csv', index=False)
    header, _, *rows = lab_costs(results, 'components', read_costs(tmp_path)).splitlines()
    assert header == "| cell | update, to `none` | teacher's tokens | KL, equal updates | KL, equal seconds |"
    assert rows == ['| `none` | 1.00 | 2.00 | 0.500 | 0.500 |', '| `scrg` | 2.00 | 4.00 | 0.200 | 0.500 |']        # half of four updates: between .7 and .3

def test_the_map_has_each_cell_at_its_powers(tmp_path):
    cells = SUITES['alpha_beta'].cells
    for i, cell in enumerate(cells):
        for seed in (0, 1): write_json(tmp_path/f'alpha_beta+lab/{cell}/seed{seed}/metrics.json', dict.fromkeys(('student_start', 'student', 'teacher'), {'average': BASE | {'exact': 50. + i + seed}, 'test': {}}))
    ax, _ = lab_map(read_lab(tmp_path)).axes
    at = {tuple(a.xy): a.get_text() for a in ax.texts}
    assert at == {(c['ab_alpha'], c['ab_beta']): f'{50.5 + i:.1f}' for i, c in enumerate(cells.values())} and len(at) == 9
