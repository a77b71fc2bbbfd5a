"What is read from the disk, in which order, and what is left out and said."
import json
from mgsr_nb.files import write_json
from mgsr_nb.study.overview import failures_markdown
from mgsr_nb.study.pages import suite_markdown
from mgsr_nb.study.records import read_results, write_toy_run
from toy_suites import SUITES, add, failing, two_sets

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
