import os, shutil, sys
os.environ["HF_HUB_OFFLINE"] = "1"          # before huggingface_hub is imported: no test may ask the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
torch.set_num_threads(1)    # the models are tiny: more threads only wait for each other

@pytest.fixture(scope="session")
def local_models(tmp_path_factory):
    "Folders of a tiny teacher and a tiny student of each architecture: {kind: (teacher, student)}."
    from tiny_runs import save_pair
    from tiny_models import KINDS
    return {kind: save_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}

@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    "One cache of artefacts for all tests that do not look at it: teachers are tuned once."
    return tmp_path_factory.mktemp("cache")

@pytest.fixture
def config(request, tmp_path, monkeypatch, local_models, shared_cache):
    """`config(kind, **parameters)`: a tiny run below tmp_path; artefacts are shared by the tests of this session.

    Without a kind it is the file's `KIND`, else llama. `student="local"` is the saved student of the kind; where a method replays, its schedule begins where it does."""
    from mgsr_nb.presets import METHODS
    from mgsr_nb.config import resolve
    from tiny_runs import tiny_parameters
    monkeypatch.setenv("MGSR_CACHE", str(shared_cache))
    def make(kind=getattr(request.module, "KIND", "llama"), **more):
        teacher, student = local_models[kind]
        if more.get("student") == "local": more["student"] = student
        replays = "off_policy" in (more.get("sampling"), METHODS[more.get("method", "mgsr")].get("sampling"))
        return resolve(tiny_parameters(tmp_path/"runs", teacher, **{**(dict(threshold_start=0.9, buffer_size=4) if replays else {}), **more}))
    return make

@pytest.fixture(scope="module")
def project(tmp_path_factory, local_models, shared_cache):
    """A copy of what a clone has (the notebook and nothing else), the parameters of a tiny run, and
    the environment of its commands.

    `guarded` is an environment in which importing torch is an error."""
    from tiny_runs import tiny_parameters
    from commands import ROOT
    root, guard = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("guard")
    (root/"nbs").mkdir()
    shutil.copy(ROOT/"nbs"/"train.ipynb", root/"nbs")
    (guard/"torch").mkdir()
    (guard/"torch"/"__init__.py").write_text("raise SystemError('torch was imported')")
    ipython = tmp_path_factory.mktemp("ipython")
    env = {**os.environ, "MGSR_CACHE": str(shared_cache), "OMP_NUM_THREADS": "1",
           "PYTHONWARNINGS": "ignore", "IPYTHONDIR": str(ipython),
           "MPLBACKEND": "agg"}       # as on many clusters: the notebook has its figures all the same
    guarded = os.pathsep.join(filter(None, [str(guard), os.environ.get("PYTHONPATH")]))
    return SimpleNamespace(root=root, env=env, guarded={**env, "PYTHONPATH": guarded},
                           ipython=ipython,
                           parameters=tiny_parameters("runs", local_models["llama"][0]))

@pytest.fixture(scope="module")
def loaded(): return {}

@pytest.fixture
def trainer(config, loaded):
    "`trainer(kind, **parameters)`: a trainer in memory. What `LOADED` names is loaded once for all tests of a file, and each gets copies of the models."
    from mgsr_nb.run.setup import prepare
    from mgsr_nb.run.trainer import Trainer
    from tiny_runs import LOADED
    def make(kind="llama", dtype=None, change=lambda setup: None, **more):
        c = config(kind, **more)
        key = (kind, *(getattr(c, name) for name in LOADED))
        if key not in loaded: loaded[key] = prepare(c, cpu=True)
        setup = loaded[key]
        setup = replace(setup, config=c, stops=list(setup.stops), student=deepcopy(setup.student), teacher=deepcopy(setup.teacher))
        if dtype: setup.student, setup.teacher = setup.student.to(dtype), setup.teacher.to(dtype)
        change(setup)
        found = Trainer(setup)
        if dtype: found.distiller.to(dtype)
        return found
    return make

# --- the command

@pytest.fixture
def ends(monkeypatch, capsys):
    "`ends(*words)`: status, output and error output of the command, in this process."
    def run(*words):
        from mgsr_nb.run import command as mgsr_run
        monkeypatch.setattr(sys, "argv", ["mgsr-run", *words])
        status = 0
        try: mgsr_run.main()
        except SystemExit as end: status = end.code or 0
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err
    return run

# --- figures that a run of the tests shows at its end

FIGURES = {"killed": "make test-slow", "two processes": "tests/test_processes.py", "bad configurations": "tests/test_hostile.py", "pinned run": "tests/test_pinned.py"}

@pytest.fixture
def figure(request):
    "`figure(kind, text)`: what was measured, for the summary at the end; a kind is one of `FIGURES`."
    def note(kind, text):
        assert kind in FIGURES, kind
        request.node.user_properties.append(("figure", (kind, text)))      # travels with the report, also from one of several test processes
    return note

def pytest_terminal_summary(terminalreporter):
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", None) == "call"]
    found = [tuple(value) for r in reports for name, value in r.user_properties if name == "figure"]
    if not found: return
    terminalreporter.section("figures")
    for kind, where in FIGURES.items():
        for text in [t for k, t in found if k == kind] or [f"not measured in this run ({where})"]: terminalreporter.write_line(f"{kind}: {text}")
