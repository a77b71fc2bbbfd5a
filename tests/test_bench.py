"""The benchmark script at sizes that take seconds: it measures what it says, and its table is whole. The numbers themselves mean nothing here."""
import csv, importlib.util, os, subprocess, sys
from pathlib import Path
import pytest, torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT/'tools'/'bench.py'
PEERS = {'trl': 'trl', 'liger': 'liger_kernel'}
MB = 2 ** 20

os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'    # its trainers warn at import
spec = importlib.util.spec_from_file_location('bench', SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def options(part, *more): return bench.options([part, '--out', 'nowhere.csv', '--threads', '1', '--rounds', '2', *more])

def installed(case): return all(importlib.util.find_spec(module) for prefix, module in PEERS.items() if case.startswith(prefix))


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "The rows of one call of the script: 512 rows of 8192 classes, so that the logits of one model take 16 MB, and ours in chunks of 32 rows."
    out = tmp_path_factory.mktemp('bench')/'new'/'loss.csv'
    done = subprocess.run([sys.executable, SCRIPT, 'loss', '--out', out, '--rows', '512', '--vocab', '8192', '--hidden', '8', '--chunk-tokens', '32', '--rounds', '2',
                           '--threads', '1', '--cases', 'mgsr'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(out, newline='') as f: rows = list(csv.DictReader(f))
    return {r['case']: r for r in rows}, done.stdout


def test_the_table_has_its_columns_our_row_and_the_row_that_ratios_are_to(table):
    rows, said = table
    assert list(rows) == ['dense_forward_kl', 'mgsr']
    for row in rows.values():
        assert list(row) == bench.COLUMNS
        assert (row['N'], row['V'], row['H'], row['dtype'], row['device'], row['threads'], row['rounds']) == ('512', '8192', '8', 'float32', 'cpu', '1', '2')
        assert row['machine'] and row['torch'] == torch.__version__ and row['relative_to'] == 'dense_forward_kl'
        assert 0 < float(row['seconds_min']) <= float(row['seconds_median']) and float(row['value']) > 0
        assert row['case'] in said


def test_ratios_are_those_of_the_columns(table):
    base, ours = table[0]['dense_forward_kl'], table[0]['mgsr']
    assert float(base['ratio']) == float(base['peak_ratio']) == 1
    for ratio, column in (('ratio', 'seconds_median'), ('peak_ratio', 'peak_mb')):
        assert float(ours[ratio]) == pytest.approx(float(ours[column]) / float(base[column]), rel=.02)


def test_peak_memory_is_that_of_the_work(table):
    "At least both models' log-probabilities and the gradient of one are there at once where the logits of all rows are made; in chunks of 32 rows there is a fraction."
    logits, rows = 16, table[0]
    assert 3 * logits < float(rows['dense_forward_kl']['peak_mb']) < 9 * logits
    assert float(rows['mgsr']['peak_mb']) < logits


def test_the_peak_counts_what_was_held_in_between_and_not_what_was_there_before():
    "In a process of its own, as in a measurement: what earlier tests have freed may still be held by this one."
    code = """
import torch, bench
MB = 2 ** 20
kept, earlier = torch.ones(40 * MB // 4), torch.ones(400 * MB // 4)
del earlier
peak = bench.Peak('cpu')
passing = torch.ones(80 * MB // 4)
del passing
print(peak.bytes(), len(kept))
"""
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(Path(bench.__file__).parent)}, capture_output=True, text=True, check=True)
    assert 79 * MB <= int(done.stdout.split()[0]) <= 90 * MB


def test_every_implementation_does_the_same_work():
    "Each case at N=48, V=96: equal divergences where the name says so, and gradients in hidden states and head; missing libraries are named."
    o = options('loss', '--chunk-tokens', '16', '--hidden', '6')
    found = bench.measure_time(o, (48, 96))
    assert found['left_out'].keys() == {name for name in o.cases if not installed(name)}
    assert found['seconds'].keys() == set(o.cases) - found['left_out'].keys()
    assert all(len(s) == 2 and min(s) > 0 for s in found['seconds'].values())
    for kind in ('forward_kl', 'jsd'):
        values = {name: v for name, v in found['values'].items() if kind in name}
        assert len(values) >= 1 and list(values.values()) == pytest.approx([next(iter(values.values()))] * len(values), rel=1e-4)
    assert found['values']['mgsr'] > found['values']['mgsr_nb_forward_kl'] > found['values']['mgsr_nb_jsd'] > 0


def test_gradients_agree():
    "The engine's gradients are those of the dense forward KL."
    inputs = bench.Rows(options('loss', '--chunk-tokens', '16'), 48, 96, 6)
    steps, _ = bench.make_cases(options('loss', '--cases', 'dense_forward_kl,mgsr_nb_forward_kl'), inputs)
    found = []
    for step in steps.values():
        inputs.clear(); step(); inputs.check('')
        found.append((inputs.hidden.grad.clone(), inputs.head.weight.grad.clone()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_spans_have_four_tokens():
    inputs = bench.Rows(options('loss'), 8, 16, 4)
    assert inputs.pair_weight.tolist() == [.25, .25, .25, 0] * 2 and inputs.counts == dict(data_tokens=8, distilled_tokens=8, distilled_spans=2)


def test_a_case_that_leaves_no_gradient_is_an_error():
    inputs = bench.Rows(options('loss'), 8, 16, 4)
    with pytest.raises(RuntimeError, match='lazy: a gradient'): inputs.check('lazy')


def test_a_missing_library_leaves_its_cases_out(monkeypatch):
    imported = [m for m in sys.modules if m.split('.')[0] in PEERS.values()]
    for module in [*PEERS.values(), *imported]: monkeypatch.setitem(sys.modules, module, None)
    o = options('loss', '--cases', 'dense_forward_kl,trl_dense_jsd,trl_chunked_jsd,liger_jsd')
    steps, left_out = bench.make_cases(o, bench.Rows(o, 8, 16, 4))
    assert list(steps) == ['dense_forward_kl'] and left_out.keys() == {'trl_dense_jsd', 'trl_chunked_jsd', 'liger_jsd'}
    assert all('is not installed' in why for why in left_out.values())


def test_a_case_without_room_is_left_out_and_nothing_is_compared_with_it():
    def too_large(): raise torch.OutOfMemoryError('no room')
    steps, left_out = {'dense': too_large, 'ours': lambda: 0.}, {}
    inputs = type('', (), dict(clear=lambda s: None, check=lambda s, name: None))()
    bench.warm_up(inputs, steps, left_out)
    assert list(steps) == ['ours'] and left_out == {'dense': 'out of memory'}
    row = bench.ratios('ours', ['dense'], dict(ours=[2.]), dict(ours=MB))
    assert (row['seconds_median'], row['ratio'], row['peak_mb'], row['peak_ratio']) == ('2', '', '1.0', '')


def test_our_case_is_the_method_with_its_defaults(monkeypatch):
    "The three terms of Eq. 11, and a sub-network that learns."
    o, seen = options('loss', '--chunk-tokens', '5'), []
    monkeypatch.setattr(bench, 'ours', lambda x, objective: seen.append(objective))
    bench.make_cases(options('loss', '--cases', 'mgsr'), bench.Rows(o, 8, 80, 4))
    (objective,) = seen
    assert set(objective.terms) == {'sft', 'dac', 'span'} and set(objective.weights.values()) == {1.} and objective.chunk_tokens == 5
    dac = objective.terms['dac'].dac_kl
    assert (dac.clip.reading, dac.clip.temperature, dac.remainder, dac.target, dac.clip.sub_network.inputs) == ('value', .01, 'as_printed', 'once', 'topk')
    assert any(p.requires_grad for p in objective.parameters())


def test_the_variants_change_one_thing_each():
    "Blocks change no number; without the span term, or with a fixed clip, the value is another."
    o = options('loss', '--chunk-tokens', '16', '--hidden', '6', '--cases', ','.join(c for c in bench.CASES['loss'] if c.startswith('mgsr') and not c.startswith('mgsr_nb')))
    values = bench.measure_time(o, (48, 96))['values']
    assert [values.pop('mgsr_block_4'), values.pop('mgsr_block_64')] == pytest.approx([values['mgsr']] * 2, rel=1e-5)
    assert len(values) == 3 and values['mgsr_without_span'] < values['mgsr'] != pytest.approx(values['mgsr_fixed_clip'], rel=1e-5)


def test_the_profile_has_every_kind_of_operation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import profile_objective
    out = tmp_path/'new'/'profile.csv'
    profile_objective.main(['--out', str(out), '--rounds', '2', '--threads', '1', '--rows', '48', '--vocab', '96', '--hidden', '6', '--chunk-tokens', '16'])
    with open(out, newline='') as f: rows = list(csv.DictReader(f))
    kinds = {r['kind']: float(r['calls']) for r in rows if r['case'] == 'mgsr'}
    assert kinds.keys() == {*profile_objective.KINDS, 'element by element'} and {r['case'] for r in rows} == {'mgsr', 'mgsr_nb_forward_kl', 'dense_forward_kl'}
    assert all(float(r['seconds']) > 0 for r in rows) and kinds['top k'] == 2 * 48 / 16      # of both models, once a block of 16


def pair_options(part, local_models, *more):
    teacher, student = local_models['llama']
    return options(part, '--teacher', teacher, '--student', student, '--batch', '2', '--prompt-tokens', '20', '--new-tokens', '6', *more)


@pytest.fixture
def cache(shared_cache, monkeypatch): monkeypatch.setenv('MGSR_CACHE', str(shared_cache))


def test_scrg_is_measured_on_texts_of_full_length(local_models, cache):
    "Sampling writes 6 tokens for each response, whatever they are; SCRG writes on from the teacher's token."
    found = bench.measure_time(pair_options('scrg', local_models), (2, 6))
    assert found['values']['generate'] == 6
    assert 6 < found['values']['generate_and_scrg'] <= 12


def test_every_method_takes_a_step(local_models, cache):
    "All but the pass that is compiled, which takes a minute; test_training.py compiles a student."
    o = pair_options('step', local_models, '--cases', ','.join(c for c in bench.CASES['step'] if c != 'floor_student_compiled'))
    found = bench.measure_time(o, (2, 6))
    assert found['left_out'].keys() == {name for name in o.cases if not installed(name)}
    assert found['seconds'].keys() == set(o.cases) - found['left_out'].keys()
    assert all(v > 0 for name, v in found['values'].items() if not name.startswith('floor'))
    inputs = bench.Pair(o, 2, 6)
    assert inputs.setup.stops == []      # nothing ends a text early
    assert {(len(e.prompt_ids), len(e.response_ids)) for e in inputs.setup.train} == {(20, 6)} and inputs.tokens().shape == (2, 26)


def test_a_ratio_is_to_the_sum_of_the_floors():
    seconds = dict(a=[3., 1., 2.], b=[4.] * 3, c=[20., 30., 10.])
    assert bench.ratios('c', ['a', 'a', 'b'], seconds, dict(a=8 * MB, b=5 * MB, c=4 * MB)) == dict(seconds_median='20', seconds_min='10', ratio='2.5', peak_mb='4.0', peak_ratio='0.5')
    assert bench.RELATIVE['step']['mgsr'] == ['floor_student', 'floor_student', 'floor_teacher', 'floor_decode']
    assert bench.RELATIVE['step']['kd'] == ['floor_student', 'floor_teacher']
    for part, cases in bench.CASES.items(): assert set().union(*bench.RELATIVE[part].values()) <= set(cases)


def test_each_round_begins_with_another_case():
    names = ['a', 'b', 'c']
    assert [bench.rotated(names, n) for n in range(4)] == [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['a', 'b', 'c']]


def test_sizes_grow_one_at_a_time_from_the_main_one():
    assert bench.sizes([256, 512, 1024], [10, 20]) == [(1024, 20), (256, 20), (512, 20), (1024, 10)]
    assert bench.sizes([4], [48]) == [(4, 48)]


def test_an_unknown_case_is_refused_in_words(capsys):
    with pytest.raises(SystemExit): options('loss', '--cases', 'mgrs')
    assert 'mgrs unknown; loss has' in capsys.readouterr().err
