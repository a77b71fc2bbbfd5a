"""The project's own promises: library, configuration, notebooks, README and packaging agree with each other."""
import ast, importlib.metadata as metadata, json, os, re, shutil, subprocess, sys, tomllib
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import check_export, make_readme

NBS, LIB = ROOT/'nbs', ROOT/'mgsr_nb'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))
COMPONENTS = [nb for nb in NOTEBOOKS if re.match(r'\d\d[a-z]?_', nb.name)]
# notebooks that are no component: the front page, the training run, the report of the reproduction, and pages of the documentation
OTHERS = {'index.ipynb', 'train.ipynb', 'report.ipynb', 'details.ipynb', 'usage.ipynb', 'equations.ipynb', 'troubleshooting.ipynb',
          'explorer.ipynb', 'explorer_divergences.ipynb', 'explorer_scrg.ipynb', 'explorer_step.ipynb'}
# installed for a person or a format, not for an import in the library or in a notebook
NOT_IMPORTED = {'jupyterlab': 'where the notebooks are read', 'ipykernel': 'the kernel they run in',
                'ipywidgets': 'progress bars', 'papermill': 'the runner', 'nbformat': 'notebook files',
                'nbclient': 'executes notebooks', 'gguf': "transformers reads the teacher's file with it",
                'datasets': 'the hub', 'click': 'command line', 'tqdm': 'progress bars'}


def settings():
    "The section of settings.ini, read as setup.py reads it."
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def pyproject(): return tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))

def read(path): return nbformat.read(path, as_version=4)

def code(nb): return [c for c in nb.cells if c.cell_type == 'code']

def tracked():
    "Every file of the project: committed, or new and not ignored. New runs do not count: they are the reader's own."
    if not shutil.which('git') or not (ROOT/'.git').exists(): pytest.skip('not a git checkout')
    def listed(*flags):
        return subprocess.run(['git', 'ls-files', '-z', *flags], cwd=ROOT, capture_output=True, check=True,
                              text=True).stdout.split('\0')
    new = [f for f in listed('--others', '--exclude-standard') if not f.startswith('runs/')]
    return [ROOT/f for f in sorted({*listed('--cached'), *new}) if f and (ROOT/f).is_file()]

def normal(name): return re.sub(r'[-_.]+', '-', name).lower()

def requirement_names(key): return [normal(re.match(r'[\w.-]+', r)[0]) for r in settings()[key].split()]


# ---- the library is the export of the notebooks

def test_library_equals_a_fresh_export_byte_for_byte(tmp_path):
    command = [str(Path(sys.executable).parent/'nbdev-export')]
    assert check_export.differences(check_export.modules(LIB), check_export.fresh_export(tmp_path, command)) == []

def test_export_check_finds_missing_orphaned_and_changed_modules():
    found = check_export.differences({'a.py': b'1', 'b.py': b'1'}, {'b.py': b'2', 'c.py': b'1'})
    assert [line.split(':')[0] for line in found] == ['mgsr_nb/a.py', 'mgsr_nb/b.py', 'mgsr_nb/c.py']

def test_every_component_exports_a_module_of_its_own():
    exported = {}
    for path in COMPONENTS:
        names = re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in code(read(path))), re.M)
        assert len(names) == 1, f'{path.name}: {len(names)} default_exp'
        assert names[0] not in exported, f'{path.name} and {exported[names[0]]} both export {names[0]}'
        exported[names[0]] = path.name
    modules = {p.relative_to(LIB).with_suffix('').as_posix().replace('/', '.') for p in LIB.rglob('*.py')}
    assert set(exported) == modules - {'__init__', '_modidx', 'run.__init__', 'study.__init__'}


# ---- configuration

def test_settings_and_pyproject_agree():
    cfg, project = settings(), pyproject()
    nbdev, meta = project['tool']['nbdev'], project['project']
    assert nbdev['tst_flags'].split() == cfg['tst_flags'].split() == ['notest', 'slow']
    assert nbdev['allowed_cell_metadata_keys'] == cfg['allowed_cell_metadata_keys'].split() == ['tags']
    assert nbdev['lib_path'] == cfg['lib_path'] == 'mgsr_nb' and nbdev['nbs_path'] == cfg['nbs_path']
    assert nbdev['update_pyproject'] is False and cfg['update_pyproject'] == 'False'
    assert meta['name'] == cfg['lib_name']
    assert meta['requires-python'] == f">={cfg['min_python']}"
    assert meta['authors'][0]['name'] == cfg['author']
    assert (meta['license'], cfg['license']) == ('Apache-2.0', 'apache2')
    assert meta.get('urls', {}).get('Repository', '') == cfg['git_url']

def test_pyproject_repeats_nothing_that_settings_hold():
    meta = pyproject()['project']
    from_settings = {'version', 'description', 'keywords', 'dependencies', 'optional-dependencies', 'scripts', 'entry-points'}
    assert set(meta['dynamic']) == from_settings
    assert not from_settings & meta.keys()

def test_one_version_everywhere():
    version = settings()['version']
    init = re.search(r'^__version__ = "(.*)"$', (LIB/'__init__.py').read_text(), re.M)[1]
    citation = re.search(r'^version: (.*)$', (ROOT/'CITATION.cff').read_text(), re.M)[1]
    assert init == citation == version

def test_installed_metadata_are_those_of_settings():
    cfg, dist = settings(), metadata.distribution('mgsr_nb')
    assert dist.version == cfg['version'] and dist.metadata['Summary'] == cfg['description']
    required = {normal(re.match(r'[\w.-]+', r)[0]) for r in dist.requires if 'extra ==' not in r}
    assert required == set(requirement_names('requirements'))
    scripts = {f'{e.name}={e.value}' for e in dist.entry_points if e.group == 'console_scripts'}
    assert scripts == set(cfg['console_scripts'].split())

def test_console_scripts_name_functions_that_exist():
    import importlib
    for script in settings()['console_scripts'].split():
        module, function = script.split('=')[1].split(':')
        assert callable(getattr(importlib.import_module(module), function)), script

def test_constraints_allow_the_requirements():
    from packaging.requirements import Requirement
    wanted = {normal(r.name): r for r in map(Requirement, settings()['requirements'].split())}
    for line in (ROOT/'constraints.txt').read_text().split():
        name, version = line.split('==')
        assert wanted[normal(name)].specifier.contains(version), line


# ---- what is imported is declared, what is declared is used

def imports(source):
    "Top-level names of the modules that a source text imports, relative imports excepted."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {a.name.split('.')[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.split('.')[0])
    return names

def module_level_imports(path):
    "Like `imports`, without those that a function makes when it is called."
    body = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return imports('\n'.join(map(ast.unparse, body)))

@lru_cache
def providers(): return metadata.packages_distributions()      # reads the records of all that is installed

def distributions(names):
    "Distributions that provide these modules: what the standard library and the project provide left out."
    provided = providers()
    third = {n for n in names if n not in sys.stdlib_module_names and n != 'mgsr_nb'}
    return {n: {normal(d) for d in provided.get(n, [n])} for n in third}

def test_every_import_of_the_library_is_declared():
    declared = set(requirement_names('requirements'))
    for path in sorted(LIB.rglob('*.py')):
        for module, dists in distributions(module_level_imports(path)).items():
            assert dists & declared, f'{path.name} imports {module}; settings.ini requires none of {sorted(dists)}'

def test_every_requirement_is_used():
    names = set().union(*(imports(p.read_text(encoding='utf-8')) for p in LIB.rglob('*.py')))
    for path in NOTEBOOKS:
        for cell in code(read(path)):
            try: names |= imports(cell.source)
            except SyntaxError: pass                                   # a shell line or a magic
    used = set().union(*distributions(names).values(), set())
    unused = set(requirement_names('requirements')) - used - set(NOT_IMPORTED)
    assert not unused, f'required by settings.ini, imported nowhere: {sorted(unused)}'


# ---- notebooks

@pytest.mark.pitfall(44)
def test_no_executed_copy_lies_between_the_notebooks():
    "Pitfall 44: a copy carries the `default_exp` of its original and would replace the module."
    stray = [p.relative_to(ROOT).as_posix() for p in NBS.rglob('*.ipynb')
             if p not in COMPONENTS and p.name not in OTHERS and '.ipynb_checkpoints' not in p.parts]
    assert not stray, f'{stray}: runs belong in runs/'

@pytest.mark.pitfall(45)
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_kernelspec_has_name_and_language(path):
    "Pitfall 45: papermill needs both."
    spec = read(path).metadata.get('kernelspec', {})
    assert (spec.get('name'), spec.get('language')) == ('python3', 'python')

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_error_output(path):
    nb = read(path)
    nbformat.validate(nb)
    errors = [c.id for c in code(nb) for o in c.outputs if o.output_type == 'error']
    assert not errors, f'cells {errors} end in an error'

@pytest.mark.parametrize('path', COMPONENTS, ids=lambda p: p.stem)
def test_component_shows_what_it_computes(path):
    "A component is committed with its outputs, and opens with a title and a one-line summary."
    nb = read(path)
    first = next(c for c in nb.cells if c.cell_type == 'markdown').source
    assert re.match(r'# .+\n+> .+', first), f'{path.name} opens with {first[:40]!r}'
    assert any(c.outputs for c in code(nb)), f'{path.name} has no stored output'

@pytest.mark.parametrize('path', COMPONENTS, ids=lambda p: p.stem)
def test_component_imports_only_from_lower_numbers(path):
    number = {re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in code(read(p))), re.M)[1]: p.name.split('_')[0]
              for p in COMPONENTS}
    for cell in code(read(path)):
        for module in re.findall(r'^\s*(?:from|import)\s+mgsr_nb\.([\w.]+)', cell.source, re.M):
            assert number[module] < path.name.split('_')[0], f'{path.name} imports {module} of notebook {number[module]}'

@pytest.fixture
def train():
    path = NBS/'train.ipynb'
    assert path.exists(), 'nbs/train.ipynb is missing'
    return read(path)

@pytest.mark.pitfall(41)
def test_train_notebook_has_one_parameters_cell(train):
    "Pitfall 41: without the tag papermill injects above the defaults and silently runs with them."
    tagged = [c for c in train.cells if 'parameters' in c.metadata.get('tags', [])]
    assert [c.cell_type for c in tagged] == ['code']
    names = [t.id for n in ast.parse(tagged[0].source).body if isinstance(n, (ast.Assign, ast.AnnAssign))
             for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    assert {'preset', 'run_name', 'seed', 'dac_weight', 'span_weight'} <= set(names) and len(names) == len(set(names))

def test_train_notebook_has_no_outputs(train):
    assert not [c.id for c in code(train) if c.outputs or c.execution_count], 'outputs belong in runs/'

def test_train_notebook_is_not_executed_by_nbdev_test(train):
    first = train.cells[0]
    assert first.cell_type == 'raw' and re.search(r'^skip_exec:\s*true$', first.source, re.M), 'no skip_exec front matter'

@pytest.mark.pitfall(41)
def test_nbdev_clean_changes_no_notebook_and_keeps_the_parameters_tag(tmp_path):
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    shutil.copytree(NBS, tmp_path/'nbs', ignore=shutil.ignore_patterns('.*'))
    (tmp_path/'mgsr_nb').mkdir()
    subprocess.run([str(Path(sys.executable).parent/'nbdev-clean')], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    changed = [p.name for p in NOTEBOOKS if (tmp_path/'nbs'/p.name).read_bytes() != p.read_bytes()]
    assert not changed, f'{changed}: run `make export`'


def test_no_notebook_carries_the_state_of_its_widgets():
    "Hundreds of kilobytes that no page shows: sliders live in a kernel."
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        kinds = {kind for c in notebook.cells if c.cell_type == 'code' for o in c.outputs for kind in o.get('data', {})}
        assert 'widgets' not in notebook.metadata and not any('widget' in kind for kind in kinds), path.name


# ---- README and the files of the repository

def test_readme_equals_its_notebook():
    assert (NBS/'index.ipynb').exists(), 'nbs/index.ipynb is missing'
    assert make_readme.main(check=True) == 0

def test_readme_links_lead_to_files():
    markdown = make_readme.FENCE.sub('', (ROOT/'README.md').read_text(encoding='utf-8'))
    targets = [m[1].split('#')[0] for m in make_readme.LINK.findall(markdown)]
    broken = [t for t in targets if t and not re.match(r'[a-z]+:', t) and not (ROOT/t).exists()]
    assert not broken, f'README.md links to {broken}'

def test_readme_links_are_moved_from_nbs_to_the_root():
    moved = make_readme.move_links('[a](03_x.ipynb) ![b](images/m.svg) <img src="images/m.svg"> [c](../runs/t.md) '
                                   '[d](https://x.org/y) [e](#f) `[g](h)`')
    assert moved == ('[a](nbs/03_x.ipynb) ![b](nbs/images/m.svg) <img src="nbs/images/m.svg"> [c](runs/t.md) '
                     '[d](https://x.org/y) [e](#f) `[g](h)`')

def test_no_path_of_a_machine_in_the_files():
    folders = '|'.join(['root', 'work', 'home', 'Users'])              # joined: this file is searched too
    machine = re.compile(rb'(?<![\w.~-])/(?:' + folders.encode() + rb')/|/tmp/ipykernel_')
    own = Path(__file__).resolve()
    found = [f.relative_to(ROOT).as_posix() for f in tracked()
             if f != own and f.suffix not in {'.png', '.woff2'} and machine.search(f.read_bytes())]
    assert not found, f'machine paths in {found}'

def test_only_the_ci_script_knows_a_folder_beside_the_clone():
    sibling = b'../' + b'shared'
    assert [f.relative_to(ROOT).as_posix() for f in tracked() if sibling in f.read_bytes()] in ([], ['.ci/run'])

def test_no_large_file():
    large = {f.relative_to(ROOT).as_posix(): f.stat().st_size for f in tracked() if f.stat().st_size > 1_500_000}
    assert not large

def test_no_weights_are_committed():
    weights = [f.name for f in tracked() if f.suffix in {'.safetensors', '.gguf', '.bin', '.pt', '.pth', '.ckpt', '.pkl'}]
    assert not weights

def test_scripts_can_be_run():
    assert os.access(ROOT/'.ci/run', os.X_OK)
    assert (ROOT/'.ci/run').read_text().startswith('#!/usr/bin/env bash\n')

def test_the_licence_text_is_whole():
    text = (ROOT/'LICENSE').read_text()
    assert 'Apache License' in text and 'END OF TERMS AND CONDITIONS' in text


# ---- what an installation carries

def test_the_embedded_data_are_package_data():
    from importlib.resources import files
    folder = files('mgsr_nb')/'tiny_instruct'
    for name in ('train', 'validation', 'test'):
        lines = (folder/f'{name}.jsonl').read_text(encoding='utf-8').splitlines()
        assert lines and {'instruction', 'output'} <= json.loads(lines[0]).keys()
    patterns = pyproject()['tool']['setuptools']['package-data']['mgsr_nb']
    assert set(patterns) == {'tiny_instruct/*.jsonl', 'tiny_instruct/README.md'}
