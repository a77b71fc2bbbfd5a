"""The ablation runner with real processes, real kernels and papermill, on a toy training notebook that takes a moment and writes down that it ran."""
import contextlib, io, json, signal, subprocess, sys, time
from types import SimpleNamespace
import nbformat, pytest
from mgsr_nb.study.suites import SUITES, After, Suite
from mgsr_nb.presets import METHODS, PRESETS
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.files import write_json
from mgsr_nb.run.folder import finished, open_run
from mgsr_nb.study.jobs import jobs_of, lock_of, locked, state
from mgsr_nb.study.progress import plan, time_left
from mgsr_nb.study.engines import Processes
from mgsr_nb.study.runner import ablate, at_a_time, main, slots_of, threads_of

CELLS = list(SUITES['loss_weights'].cells)
TRAIN = """
import os, time, json
from pathlib import Path
from mgsr_nb.run.asked import from_notebook
from mgsr_nb.files import cache_id, write_json
from mgsr_nb.run.folder import finished, open_run
config = from_notebook(In, globals())
folder = open_run(config)
if not finished(folder):
    held = Path("hold").exists() and Path("hold").read_text() in config.run_name
    with open("ran.txt", "a") as f: f.write(f"{config.run_name} {os.environ['OMP_NUM_THREADS']}\\n")
    time.sleep(100 if held else config.max_steps / 10)
    if config.weight_decay == 0.5 and config.dac_weight == 0: raise ValueError("this cell must fail")
    if config.weight_decay == 0.25 and config.dac_weight == 0: os._exit(3)
    numbers = {"nll": 2.5, "kl": 0.5, "rouge_l": 20.0}
    write_json(folder/"metrics.json", {"digest": config.digest, "student": {"average": numbers}, "seconds": {"preparation": 50.0, "training": 2.0, "evaluation": 1.0}, "machine": {"cache": cache_id()}})
"""

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project whose training notebook is TRAIN, as the current folder."
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    nb.cells = [nbformat.v4.new_code_cell('preset = "quickstart"', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(TRAIN)]
    (tmp_path/'nbs').mkdir()
    nbformat.write(nb, tmp_path/'nbs'/'train.ipynb')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MGSR_CACHE', str(tmp_path/'cache'))
    return tmp_path

def ran(project): return [line.split()[0] for line in (project/'ran.txt').read_text().splitlines()] if (project/'ran.txt').exists() else []
def folder(project, cell): return project/'runs'/'loss_weights+quickstart'/cell/'seed0'
TYPED = 'loss_weights', '--preset', 'quickstart', '-p', 'max_steps', '3'
def command(*args): return [sys.executable, '-c', 'from mgsr_nb.study.runner import main; main()', *TYPED, *args]
def hold(project, cell):
    "From now on this cell sleeps until it is killed; None: no cell does."
    (project/'hold').unlink(missing_ok=True)
    if cell: (project/'hold').write_text(cell)
def start(*args):
    "A shell that runs the tests in the background has Ctrl-C ignored, also by what they start: it is not ignored here."
    return subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
def call(*args):
    "The same command, without a process of its own: its cells have theirs."
    class Out(io.StringIO):
        def reconfigure(self, **how): pass
    out, err, status, terminated = Out(), io.StringIO(), 0, signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main([*TYPED, *args])
        except SystemExit as e: status = e.code or 0
        finally: signal.signal(signal.SIGTERM, terminated)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited too long'
        time.sleep(.05)


def test_the_plan_says_how_many_cells_share_a_gpu():
    assert [at_a_time(d) for d in ([None], [None, None], [0, 1], [0, 0, 0, 0], [0, 1, 0])] == ["1 at a time", "2 at a time", "2 at a time", "4 at a time, 4 on each GPU", "3 at a time, 2 on each GPU"]

def test_every_suite_is_valid_under_every_preset():
    for name, suite in SUITES.items():
        for preset in PRESETS:
            jobs = jobs_of(name, (0, 7), preset)
            assert [j.cell for j in jobs] == 2 * list(suite.cells)
            assert all(j.folder.parent.parent == jobs[0].folder.parent.parent for j in jobs) and len({j.folder for j in jobs}) == len(jobs)
            assert all(resolve(j.params).save_student is False for j in jobs)

def test_suites_have_what_was_asked_for():
    assert {'loss_weights', 'fixed_clipping', 'components', 'sampling', 'dac_parts', 'divergences', 'baselines', 'corrections', 'f_sub', 'spans', 'capacity', 'temperature', 'readings', 'sizes', 'relatives', 'alpha_beta', 'updates', 'longer', 'small'} == set(SUITES)
    weights = {(resolve(c).dac_weight, resolve(c).span_weight) for c in SUITES['loss_weights'].cells.values()}
    assert weights == {(1, 0), (0, 1), (.5, .5), (1, .5), (.5, 1), (1, 1)}
    clips = {n: resolve(c) for n, c in SUITES['fixed_clipping'].cells.items() if isinstance(c, dict)}
    assert (clips['fixed_quantile'].limits, clips['fixed_percentile'].limits) == ((.95, .05), (.90, .10))
    assert set(SUITES['baselines'].cells) == set(METHODS)

def test_cells_of_a_suite_differ_from_its_reference_only_where_they_say():
    for suite in SUITES.values():
        usual = resolve().model_dump()
        for cell in suite.cells.values():
            own = cell.fixed if isinstance(cell, After) else cell
            method = METHODS[own.get('method', 'mgsr')]
            assert {k for k, v in resolve(own).model_dump().items() if v != usual[k]} <= set(own) | set(method)

def test_a_cell_is_no_other_cell(monkeypatch):
    monkeypatch.setitem(SUITES, 'twice', Suite({'a': {}, 'b': dict(dac_weight=1.0)}, 'a', '?'))
    with pytest.raises(ConfigError, match="'a' and 'b' are the same run"): jobs_of('twice')

@pytest.mark.parametrize('args, said', [(dict(suite='los_weights'), "did you mean 'loss_weights'"), (dict(suite='spans', cells=['hole']), "did you mean 'whole'"), (dict(suite='spans', seeds=[]), 'seeds'),
                                        (dict(suite='spans', preset='quickstrat'), "did you mean 'quickstart'"), (dict(suite='spans', name='../out'), 'run_name'), (dict(suite='spans', params={'max_steps': 0}), 'max_steps')])
def test_wrong_input_is_named_before_anything_starts(args, said, project):
    with pytest.raises(ConfigError, match=said): jobs_of(**args)
    assert not (project/'runs').exists()


def test_a_suite_with_a_cell_that_fails(project):
    args = '--cells', ';'.join(CELLS[:3]), '-p', 'weight_decay', '0.5'
    done = call(*args)
    assert done.returncode == 1 and 'failed: loss_weights/dac=0,span=1/seed0' in done.stderr and 'ValueError: this cell must fail' in done.stdout
    assert [state(j) for j in jobs_of('loss_weights', preset='quickstart', params=dict(max_steps=3, weight_decay=.5))] == ['finished', 'failed', 'finished', *4 * ['missing']]
    record = json.loads((folder(project, CELLS[1])/'error.json').read_text())
    assert record['error'] == 'ValueError: this cell must fail' and 'config.dac_weight == 0' in record['traceback'] and '\x1b' not in record['traceback']
    assert sorted(p.name for p in folder(project, CELLS[0]).iterdir()) == ['config.json', 'metrics.json', 'train.ipynb']
    assert not (folder(project, CELLS[1])/'train.ipynb').exists()
    assert len(ran(project)) == 3
    again = call(*args)
    assert again.returncode == 1 and len(ran(project)) == 3
    retried = call(*args, '--retry-failed')
    assert retried.returncode == 1 and ran(project)[3:] == ['loss_weights+quickstart/dac=0,span=1/seed0']

def test_a_kernel_that_dies_is_a_failure_with_its_reason(project):
    done = call('-p', 'weight_decay', '0.25', '--cells', ';'.join(CELLS[:2]))
    assert done.returncode == 1 and finished(folder(project, CELLS[0]))
    assert 'DeadKernel' in json.loads((folder(project, CELLS[1])/'error.json').read_text())['error']

def test_other_parameters_in_the_same_folder(project):
    assert call('--cells', CELLS[0]).returncode == 0
    refused = call('--cells', ';'.join(CELLS[:2]), '-p', 'learning_rate', '0.5')
    assert refused.returncode == 2 and 'overwrite' in refused.stderr and len(ran(project)) == 1
    assert call('--cells', ';'.join(CELLS[:2]), '-p', 'learning_rate', '0.5', '--overwrite').returncode == 0 and len(ran(project)) == 3
    assert json.loads((folder(project, CELLS[0])/'config.json').read_text())['learning_rate'] == .5
    assert call('--cells', CELLS[0], '-p', 'learning_rate', '0.5', '--overwrite').returncode == 0 and len(ran(project)) == 3      # finished: not run again

def test_a_suite_goes_on_in_its_precision(project, monkeypatch):
    "Seed 0 was finished on a machine whose auto was float32; here it is bfloat16."
    monkeypatch.setattr('mgsr_nb.models.resolve_precision', lambda precision, device: 'bfloat16')
    settings = dict(preset='quickstart', cells=CELLS[:2], say=lambda text: None)
    for job in jobs_of('loss_weights', preset='quickstart', cells=CELLS[:2], params=dict(max_steps=1)):
        metrics = {'digest': resolve(job.params).digest, 'machine': {'precision': 'float32'}, 'student': {'average': dict(nll=2.5, kl=0.5, rouge_l=20.)}, 'seconds': {'training': 2.}}
        write_json(open_run(resolve(job.params))/'metrics.json', metrics)
    with pytest.raises(ConfigError, match='^precision: the finished runs computed in float32, and auto is bfloat16 on this machine; allowed: -p precision float32'):
        ablate('loss_weights', seeds=2, params=dict(max_steps=1), **settings)
    assert not ran(project)
    assert list(ablate('loss_weights', seeds=1, params=dict(max_steps=1), **settings).state) == 2 * ['finished']           # nothing is left to run
    assert list(ablate('loss_weights', seeds=2, params=dict(max_steps=1, precision='float32'), **settings).state) == 4 * ['finished']
    assert [r.split('/')[1:] for r in ran(project)] == [[c, 'seed1'] for c in CELLS[:2]]
    with pytest.raises(ConfigError, match='hold runs with other parameters'): ablate('loss_weights', seeds=1, params=dict(max_steps=1, precision='bfloat16'), **settings)

def test_a_dry_run_starts_nothing(project):
    done = call('--dry-run')
    assert done.returncode == 0 and done.stdout.count('missing') == 7 and 'unknown' in done.stdout and not ran(project) and not (project/'runs').exists()


def test_two_runners_run_each_cell_once(project):
    both = [start('--cells', ';'.join(CELLS[:3])) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted(ran(project)) == sorted(f'loss_weights+quickstart/{c}/seed0' for c in CELLS[:3])

def test_killed_and_started_again(project):
    "The second of three cells, which does not end by itself, is killed."
    args = '--cells', ';'.join(CELLS[:3])
    hold(project, CELLS[1])
    first = start(*args)
    wait_for(lambda: finished(folder(project, CELLS[0])) and len(ran(project)) == 2)
    first.kill(); first.communicate()
    wait_for(lambda: not locked(folder(project, CELLS[1])))      # the cell's process follows its runner
    assert not (folder(project, CELLS[1])/'error.json').exists() and not finished(folder(project, CELLS[1]))
    hold(project, None)
    assert call(*args).returncode == 0
    assert [r.split('/')[1] for r in ran(project)] == [CELLS[0], CELLS[1], CELLS[1], CELLS[2]]

def test_ctrl_c(project):
    args = '--cells', CELLS[0]
    hold(project, CELLS[0])
    first = start(*args)
    wait_for(lambda: len(ran(project)) == 1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130 and 'goes on from here' in err, (first.returncode, out[-1000:], err[-2000:])
    hold(project, None)
    assert not list(project.glob('runs/*/*/*/error.json')) and not list(project.glob('runs/**/*.part'))
    assert call(*args).returncode == 0

def test_several_jobs_share_the_threads(project, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    begin = time.time()
    table = ablate('loss_weights', preset='quickstart', cells=CELLS[:2], params=dict(max_steps=20), jobs=2, say=lambda text: None)
    assert list(table.state) == 2 * ['finished'] and time.time() - begin < 60
    assert {line.split()[1] for line in (project/'ran.txt').read_text().splitlines()} == {'2'}
    ended = [(folder(project, c)/'metrics.json').stat().st_mtime for c in CELLS[:2]]
    assert abs(ended[0] - ended[1]) < 2        # one after the other would be 2 s and a start of a kernel apart

def test_each_gpu_has_its_own_slot(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,GPU-ab')
    assert slots_of(0) == (2, [0, 1]) and slots_of(4) == (4, [0, 1, 0, 1])
    engine = Processes([0, 1], 1)
    assert [engine.environment(d)['CUDA_VISIBLE_DEVICES'] for d in (0, 1)] == ['3', 'GPU-ab']

def test_a_cell_that_takes_its_parameters_from_another(project, monkeypatch):
    monkeypatch.setitem(SUITES, 'chain', Suite({'late': After('early', lambda f: {'learning_rate': json.loads((f/'metrics.json').read_text())['seconds']['training']}), 'early': {}}, 'early', '?'))
    table = ablate('chain', preset='quickstart', params=dict(max_steps=1), say=lambda text: None)
    assert list(table.state) == ['finished', 'finished'] and [r.split('/')[1] for r in ran(project)] == ['early', 'late']
    assert json.loads((project/'runs/chain+quickstart/late/seed0/config.json').read_text())['learning_rate'] == 2.0

def test_a_cell_whose_source_failed_fails(project, monkeypatch):
    monkeypatch.setitem(SUITES, 'chain', Suite({'late': After('early', lambda f: {}), 'early': dict(dac_weight=0., weight_decay=.5)}, 'early', '?'))
    table = ablate('chain', preset='quickstart', params=dict(max_steps=1), say=lambda text: None)
    assert list(table.state) == ['failed', 'failed']
    assert 'early' in json.loads((project/'runs/chain+quickstart/late/seed0/error.json').read_text())['error']

@pytest.mark.parametrize('make', [lambda f: json.loads((f/'nothing.json').read_text()), lambda f: {'learning_rate': -1.0}], ids=['raises', 'refused'])
def test_a_cell_that_gets_no_parameters_fails_alone(project, monkeypatch, make):
    monkeypatch.setitem(SUITES, 'chain', Suite({'late': After('early', make), 'early': {}, 'other': dict(dac_weight=.5)}, 'early', '?'))
    table = ablate('chain', preset='quickstart', params=dict(max_steps=1), say=lambda text: None)
    assert list(table.state) == ['failed', 'finished', 'finished']
    record = json.loads((project/'runs/chain+quickstart/late/seed0/error.json').read_text())
    assert record['error'].startswith('no parameters from early: ') and 'Traceback' in record['traceback']

def test_a_run_that_another_suite_has_is_not_repeated(project, monkeypatch):
    "Only the same configuration counts: another seed, another weight or an unfinished run is trained."
    monkeypatch.setitem(SUITES, 'first', Suite({'all': {}}, 'all', '?'))
    monkeypatch.setitem(SUITES, 'second', Suite({'same': {}, 'half': dict(dac_weight=.5)}, 'same', '?'))
    settings = dict(preset='quickstart', params=dict(max_steps=1), say=lambda text: None)
    ablate('first', seeds=1, **settings)
    before = plan(jobs_of('second', (0, 1), 'quickstart', params=dict(max_steps=1)))
    assert list(before.state) == ['elsewhere', 'missing', 'missing', 'missing']
    assert time_left(before, 1) == 3 * before.seconds[0] == 9        # what ran elsewhere says how long a cell takes
    assert list(ablate('second', seeds=2, **settings).state) == 4 * ['finished']
    assert ran(project) == ['first+quickstart/all/seed0', 'second+quickstart/half/seed0', 'second+quickstart/same/seed1', 'second+quickstart/half/seed1']
    taken = json.loads((project/'runs/second+quickstart/same/seed0/metrics.json').read_text())
    assert taken['taken_from'] == 'first+quickstart/all/seed0' and taken['run_name'] == 'second+quickstart/same/seed0'
    assert taken['student'] == json.loads((project/'runs/first+quickstart/all/seed0/metrics.json').read_text())['student']

def test_a_run_of_another_cache_is_not_taken_over(project, monkeypatch):
    "Its teacher was tuned elsewhere: it may be another teacher."
    monkeypatch.setitem(SUITES, 'first', Suite({'all': {}}, 'all', '?'))
    monkeypatch.setitem(SUITES, 'second', Suite({'same': {}}, 'same', '?'))
    settings = dict(preset='quickstart', params=dict(max_steps=1), say=lambda text: None)
    ablate('first', **settings)
    assert list(plan(jobs_of('second', (0,), 'quickstart', params=dict(max_steps=1))).state) == ['elsewhere']
    monkeypatch.setenv('MGSR_CACHE', str(project/'another'))
    assert list(plan(jobs_of('second', (0,), 'quickstart', params=dict(max_steps=1))).state) == ['missing']
    ablate('second', **settings)
    assert ran(project) == ['first+quickstart/all/seed0', 'second+quickstart/same/seed0']

def test_time_left_and_steps_from_the_folders(project):
    job = jobs_of('loss_weights', preset='quickstart', params=dict(max_steps=3))[0]
    assert call('--cells', ';'.join(CELLS[:2])).returncode == 0
    table = plan(jobs_of('loss_weights', preset='quickstart', params=dict(max_steps=3)))
    assert list(table.state) == ['finished', 'finished', *5 * ['missing']] and time_left(table, 2) == 7.5
    with lock_of(jobs_of('loss_weights', preset='quickstart', params=dict(max_steps=3))[2].folder): assert locked(folder(project, CELLS[2]))

def test_ray(project):
    pytest.importorskip('ray', reason='ray is not installed')
    done = call('--engine', 'ray', '--cells', ';'.join(CELLS[:2]))
    assert done.returncode == 0, done.stderr
    assert sorted(ran(project)) == sorted(f'loss_weights+quickstart/{c}/seed0' for c in CELLS[:2])

def test_ray_that_is_missing_is_said(project, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ConfigError, match='pip install ray'): ablate('loss_weights', preset='quickstart', engine='ray', say=lambda text: None)
