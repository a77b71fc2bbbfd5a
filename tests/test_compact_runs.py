"What is committed of a run: six digits and four, the student's texts of one seed, no weights, and no more than a reader can load."
import json, shutil, sys
from pathlib import Path
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import compact_runs

def a_run(folder, number=0.123456789):
    folder.mkdir(parents=True)
    (folder/'config.json').write_text('{"learning_rate": 0.0020000001}', encoding='utf-8')
    (folder/'log.csv').write_text(f'step,loss,seconds,text\n10,{number},,"a, b"\n-20,1e-09,nan,\n', encoding='utf-8')
    (folder/'metrics.json').write_text(json.dumps({'steps': 1234567, 'test': {'nll': number, 'each': [number, 2, None, 'ü'], 'done': True}}), encoding='utf-8')
    (folder/'samples.jsonl').write_text('{"of": "student_start"}\n{"of": "student", "prediction": "ü\u2028"}\n{"of": "teacher"}\n', encoding='utf-8')
    (folder/'model.safetensors').write_text('weights', encoding='utf-8')
    return folder

def test_scores_keep_six_digits_the_log_four_and_all_else_stays(tmp_path):
    run, out = a_run(tmp_path/'suite/cell/seed0'), tmp_path/'out'
    compact_runs.compact(run, out)
    assert json.loads((out/'metrics.json').read_text('utf-8')) == {'steps': 1234567, 'test': {'nll': 0.123457, 'each': [0.123457, 2, None, 'ü'], 'done': True}}
    assert (out/'log.csv').read_text('utf-8') == 'step,loss,seconds,text\n10,0.1235,,"a, b"\n-20,1e-09,nan,\n'
    assert (out/'config.json').read_bytes() == (run/'config.json').read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'log.csv', 'metrics.json', 'samples.jsonl']

def test_texts_are_the_students(tmp_path):
    run = a_run(tmp_path/'suite/cell/seed0')
    compact_runs.compact(run, run)
    assert (run/'samples.jsonl').read_text('utf-8') == '{"of": "student", "prediction": "ü\u2028"}\n'

def test_texts_are_kept_of_one_seed_and_a_second_time_changes_nothing(tmp_path):
    for seed in (0, 1): a_run(tmp_path/f'suite/cell/seed{seed}')
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for _ in range(2):
        for seed in (0, 1): compact_runs.compact(*[tmp_path/f'suite/cell/seed{seed}']*2)
        assert (tmp_path/'suite/cell/seed0/samples.jsonl').exists() and not (tmp_path/'suite/cell/seed1/samples.jsonl').exists()
        before = files()
    assert files() == before

def test_data_start_and_teacher_are_kept_whole_of_one_seed(tmp_path):
    whole = {who: {'average': {'nll': 1.0}, 'validation': {'nll': 2.0}, 'test': {'lab': {'nll': 1.0}}} for who in ('student_start', 'student', 'teacher')} | {'data': {'train': 3}}
    for seed in (0, 1):
        run = a_run(tmp_path/f'cell/seed{seed}')
        (run/'metrics.json').write_text(json.dumps(whole), encoding='utf-8')
        compact_runs.compact(run, run)
    of = lambda seed: json.loads((tmp_path/f'cell/seed{seed}/metrics.json').read_text('utf-8'))
    assert of(0) == whole and of(1) == {who: part | ({} if who == 'student' else {'test': {}}) for who, part in whole.items() if who != 'data'}

def test_what_config_json_says_is_not_said_twice_and_read_from_there(tmp_path):
    from mgsr_nb.study.records import read_run
    for seed, said in enumerate(({'learning_rate': 0.0020000001}, {'learning_rate': 0.3}, {'run_name': 'x'})):
        run = a_run(tmp_path/f'suite/cell/seed{seed}')
        (run/'metrics.json').write_text(json.dumps({'config': said}), encoding='utf-8')
        compact_runs.compact(run, run)
        kept = json.loads((run/'metrics.json').read_text('utf-8'))
        assert kept == ({} if seed == 0 else {'config': said}), seed
        assert read_run(run).metrics['config'] == {'learning_rate': 0.0020000001} | said
    (run/'config.json').unlink()
    assert read_run(run).metrics['config'] == {'run_name': 'x'}

def test_a_run_that_was_made_small_has_its_configuration_and_its_card(tmp_path):
    from mgsr_nb.run.folder import read_metrics
    from mgsr_nb.run.results import run_card
    whole, small = ROOT/'runs'/'examples'/'lab', shutil.copytree(ROOT/'runs'/'examples'/'lab', tmp_path/'seed0')
    compact_runs.compact(small, small)
    assert 'config' not in json.loads((small/'metrics.json').read_text('utf-8'))
    assert read_metrics(small)['config'] == read_metrics(whole)['config'] == json.loads((whole/'metrics.json').read_text('utf-8'))['config']
    assert run_card(small).cost == run_card(whole).cost

def test_a_log_keeps_its_validations(tmp_path):
    log = 'step,loss,validation_nll\n0,,2.0\n10,1.5,\n20,1.25,nan\n30,1.0,0.5\n40,0.5,\n'
    for seed in (0, 1):
        run = a_run(tmp_path/f'cell/seed{seed}')
        (run/'log.csv').write_text(log, encoding='utf-8')
        compact_runs.compact(run, run)
    of = lambda seed: (tmp_path/f'cell/seed{seed}/log.csv').read_text('utf-8')
    assert of(0) == log and of(1) == 'step,loss,validation_nll\n0,,2.0\n30,1.0,0.5\n40,0.5,\n'

def test_only_finished_runs_are_brought(tmp_path, monkeypatch, capsys):
    a_run(tmp_path/'suite/cell/seed0')
    (a_run(tmp_path/'suite/cell/seed1')/'metrics.json').unlink()
    monkeypatch.setattr(sys, 'argv', ['compact_runs.py', str(tmp_path/'suite'), '--to', str(tmp_path/'runs')])
    compact_runs.main()
    assert capsys.readouterr().out == 'suite: 1 runs\n' and [p.name for p in (tmp_path/'runs/suite/cell').iterdir()] == ['seed0']

def test_the_laboratorys_runs_are_many_and_small():
    runs = [p.parent for p in (ROOT/'runs').glob('*+lab/*/seed*/metrics.json')]
    sizes = [sum(p.stat().st_size for p in run.iterdir() if p.is_file()) for run in runs]
    assert len(runs) >= 300 and sum(sizes) <= 15e6, (len(runs), sum(sizes))
    assert not any(p.suffix in ('.safetensors', '.bin', '.pt') for run in runs for p in run.iterdir())
