"""Other systems: what is written has names that Windows can have; badges, and the image, say what the project says."""
import ast, re, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest
from mgsr_nb.config import PRESETS, METHODS, resolve
from mgsr_nb.files import from_here
from mgsr_nb.models import GGUF_INSTALL
from mgsr_nb.names import DEVICE
from mgsr_nb.run.folder import run_name
from mgsr_nb.study.suites import SUITES
from other_parameters import FIELDS, with_needs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import badges

URL = 'https://github.com/somebody/mgsr_nb'

def windows_has(part): return not (re.search(r'[<>:"/\\|?*\0-\x1f]', part) or part.endswith((' ', '.')) or DEVICE.fullmatch(part))

def test_the_rule_knows_what_windows_refuses():
    assert all(map(windows_has, ['dac=1,span=0', 'a+b', 'seed0', 'console', 'n.u.l'])) and not any(map(windows_has, ['a:b', 'a?', 'nul', 'COM1.txt', 'x.', 'x ', 'a\\b']))

@pytest.mark.parametrize('name', FIELDS)
def test_default_names_of_runs_are_names_on_windows(name):
    assert windows_has(run_name(resolve(with_needs(name)))) or name == 'run_name'

def test_names_of_suites_cells_presets_and_committed_runs_are_names_on_windows():
    names = [*SUITES, *(cell for suite in SUITES.values() for cell in suite.cells), *PRESETS, *METHODS, *(part for p in (ROOT/'runs').rglob('*') for part in p.relative_to(ROOT).parts)]
    assert [n for n in set(names) if not windows_has(n)] == []

def test_no_file_of_the_project_differs_from_another_by_its_case_alone():
    names = [p.relative_to(ROOT).as_posix() for folder in ('mgsr_nb', 'nbs', 'tests', 'tools', 'runs') for p in (ROOT/folder).rglob('*') if '__pycache__' not in p.parts]
    assert len({n.lower() for n in names}) == len(names)

def test_a_path_on_another_drive_is_shown_whole(monkeypatch, tmp_path):
    def other_drive(path): raise ValueError('path is on mount')
    monkeypatch.setattr('os.path.relpath', other_drive)
    assert from_here(tmp_path) == str(tmp_path)

# ---- badges

@pytest.fixture
def clone(tmp_path):
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*'))
    def with_url(url): (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text(encoding='utf-8').replace('git_url =', f'git_url = {url}'), encoding='utf-8')
    with_url(URL)
    return tmp_path, with_url

def notebooks(root): return {p.name: p.read_bytes() for p in (root/'nbs').glob('*.ipynb')}

def test_with_an_address_every_chapter_gets_its_badges_and_without_one_they_go(clone):
    root, with_url = clone
    before = notebooks(root)
    badges.main(root)
    once = notebooks(root)
    badges.main(root)
    assert notebooks(root) == once
    changed = {n for n in once if once[n] != before[n]}
    assert changed == {n for n in once if badges.OPENED.match(Path(n).stem)} and {'train.ipynb', '14_dac_kl.ipynb'} <= changed
    for name in changed:
        text = once[name].decode('utf-8')
        for page in (f'colab.research.google.com/github/somebody/mgsr_nb/blob/main/nbs/{name}', f'src=https://github.com/somebody/mgsr_nb/blob/main/nbs/{name}'): assert text.count(page) == 1
    with_url('')
    badges.main(root)
    assert notebooks(root) == before

def test_the_cell_that_installs_does_nothing_where_the_package_is(clone):
    "And it assigns nothing at its top, where the parameters of the training notebook are looked for."
    root, _ = clone
    badges.main(root)
    book = nbformat.read(root/'nbs'/'train.ipynb', 4)
    first = next(c for c in book.cells if c.cell_type == 'code').source
    assert 'git+' + URL in first and not any(isinstance(node, ast.Assign) for node in ast.parse(first).body)
    guarded = f'import subprocess\ndef run(*a, **k): print("installs", a[0][4:])\nsubprocess.run = run\n'
    assert subprocess.run([sys.executable, '-c', guarded + first], capture_output=True, text=True, check=True).stdout == ''
    away = 'import importlib.util\nimportlib.util.find_spec = lambda name: None\n'
    said = subprocess.run([sys.executable, '-c', guarded + away + first], capture_output=True, text=True, check=True).stdout
    assert "'git+" + URL in said and GGUF_INSTALL.split()[-1] in said and said.count('installs') == 2
    from mgsr_nb.run.asked import from_file
    assert from_file(root/'nbs'/'train.ipynb') == resolve()

# ---- the image

def test_the_image_installs_what_the_project_says_and_runs_its_command():
    text = (ROOT/'Dockerfile').read_text(encoding='utf-8')
    python = re.search(r'^min_python = (.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert f'FROM python:{python}-slim' in text and GGUF_INSTALL.removeprefix('pip install ') in text and 'ENTRYPOINT ["mgsr-run"]' in text
    ignored = (ROOT/'.dockerignore').read_text(encoding='utf-8').split()
    assert {'.git', 'runs', '.venv*'} <= set(ignored) and not {'nbs', 'mgsr_nb', 'settings.ini', 'constraints.txt', 'README.md'} & set(ignored)
