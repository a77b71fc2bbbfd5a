"""mgsr-run: what it makes of its flags, what it refuses in a sentence, what it leaves behind. Tiny
models; a kernel for each run."""
import re, shutil, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
import click, nbformat, pytest
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError
from commands import FIELDS, ROOT, WRONG, code_cells, command, config_of, errors, flags, text_of
from mgsr_nb.config import resolve
from mgsr_nb.run import command as mgsr_run
from mgsr_nb.run.folder import open_run

@pytest.fixture
def ends(monkeypatch, capsys):
    "`ends(*words)`: status, output and error output of the command that does not end well."
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mgsr-run", *words])
        with pytest.raises(SystemExit) as end: mgsr_run.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return end.value.code, said.out, said.err
    return run

# --- wrong parameters

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", WRONG)
def test_pitfall_42_mgsr_run_refuses_with_status_2_and_without_a_kernel(project, name, monkeypatch,
                                                                        ends):
    typed, parameter, word = WRONG[name]
    monkeypatch.chdir(project.root)
    before = sorted(project.root.rglob("*"))
    status, out, error = ends(*typed.split())
    assert status == 2 and error.startswith(f"mgsr-run: {parameter}: ") and word in error
    assert not out and sorted(project.root.rglob("*")) == before

@pytest.mark.pitfall(42)
def test_pitfall_42_the_console_script_says_it_in_a_terminal(project):
    done = command(project, "mgsr-run", "-p", "dac_wieght", "0.5", env=project.guarded)
    words = "mgsr-run: dac_wieght: there is no such parameter (did you mean 'dac_weight'?)"
    assert done.returncode == 2 and done.stderr.startswith(words)

@pytest.mark.parametrize("words", [["-p", "dac_weight"], ["--nonsense"], ["stray"]])
def test_a_command_line_that_papermill_refuses_ends_in_words(project, monkeypatch, ends, words):
    monkeypatch.chdir(project.root)
    status, _, error = ends(*words)
    assert status == 2 and error.startswith("mgsr-run: ") and "mgsr-run --help" in error

def test_mgsr_run_outside_of_a_project_says_so(tmp_path, monkeypatch, ends):
    monkeypatch.chdir(tmp_path)
    status, _, error = ends()
    assert status == 2 and "inside a clone of the project" in error

def test_mgsr_run_help_lists_the_parameters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mgsr-run", "--help"])
    mgsr_run.main()
    said = capsys.readouterr().out
    for name, field in FIELDS.items():
        words, default = re.escape(field.description), re.escape(repr(field.default))
        assert re.search(rf"^  {name} +{words} \[.*; default {default}\]$", said, re.M), name
    assert "[one of value, rank, mass; default 'value']" in said

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("typed,value", [("0.5", 0.5), ("1", 1.0)])
def test_pitfall_42_flags_become_what_papermill_makes_of_them(project, monkeypatch, typed, value):
    monkeypatch.chdir(project.root)
    words = flags(dict(dac_weight=typed, scrg=False, eval_seeds=10))
    c = resolve(mgsr_run.typed_parameters([*words, "-r", "run_name", "007"]))
    assert (c.dac_weight, c.scrg, c.eval_seeds, c.run_name) == (value, False, "10", "007")

def test_numbers_of_a_yaml_text_are_what_was_meant(project, monkeypatch):
    monkeypatch.chdir(project.root)
    c = mgsr_run.asked_for(["-y", "{learning_rate: 1e-3, dac_weight: 2.5e1}"])
    assert (c.learning_rate, c.dac_weight) == (1e-3, 25.)

# --- runs

@pytest.mark.parametrize("steps,words", [
    ([], "begins again, since there is no checkpoint"), ([2, 10], "goes on behind step 10")])
def test_an_interrupted_run_says_what_the_same_command_will_do(tmp_path, monkeypatch, ends, steps,
                                                               words):
    "Ctrl-C reaches papermill, which click turns into its own exception."
    def interrupted(folder, execute): raise click.exceptions.Abort
    monkeypatch.setattr(mgsr_run, "execute_whole", interrupted)
    monkeypatch.chdir(ROOT)
    for n in steps: (tmp_path/"x"/"checkpoints"/f"step-{n:06d}").mkdir(parents=True)
    status, _, error = ends(*flags(dict(runs_dir=tmp_path, run_name="x")))
    assert status == 130 and f"mgsr-run: interrupted; the same command {words}" in error

def test_what_the_notebook_refuses_is_one_sentence_and_the_place_of_the_rest(project, tmp_path):
    "Data that are not as they should be are noticed in the kernel."
    (tmp_path/"dolly").mkdir()
    for name in ("databricks-dolly-15k", "dev", "valid"):
        (tmp_path/"dolly"/f"{name}.jsonl").write_text('{"instruction": 3}\n')
    more = dict(run_name="own", data="dolly", eval_sets="dolly", data_dir=str(tmp_path))
    done = command(project, "mgsr-run", *flags(project.parameters | more))
    assert done.returncode == 2 and "Traceback" not in done.stderr.split("mgsr-run: ")[-1]
    sentence, place = done.stderr.strip().splitlines()[-2:]
    assert sentence.startswith("mgsr-run: ") and "line 1, field 'response': missing" in sentence
    assert place.endswith("own/train.partial.ipynb)")

@pytest.mark.pitfall(32, 44)
def test_pitfall_44_mgsr_run_makes_the_folder_and_goes_on_with_an_interrupted_run(project,
                                                                                  monkeypatch):
    from mgsr_nb.run.setup import prepare
    from mgsr_nb.run.trainer import Trainer
    monkeypatch.setenv("MGSR_CACHE", project.env["MGSR_CACHE"])
    more = dict(checkpoint_every=1, seed=3)
    c = config_of(project, **more)
    trainer = Trainer(prepare(c, cpu=True), open_run(c))
    folder = trainer.folder
    def stop(row):
        trainer.checkpoints.save()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): trainer.fit(stop)
    typed = {k: v for k, v in (project.parameters | more).items() if k != "runs_dir"}
    done = command(project, "mgsr-run", *flags(typed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert folder.parent == project.root/"runs" and "student after" in done.stdout
    assert f"results: {folder.relative_to(project.root)}" in done.stdout
    names = {p.name for p in folder.iterdir()}
    assert {"train.ipynb", "metrics.json"} <= names and "train.partial.ipynb" not in names
    notebook = nbformat.read(folder/"train.ipynb", 4)
    assert not errors(notebook) and "resumed at step 1" in text_of(notebook)
    lines = (folder/"log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "0", "1", "2"]
    assert [p.name for p in (project.root/"nbs").iterdir()] == ["train.ipynb"]

# --- dry runs

LLAMA2 = flags(dict(preset="llama2-dolly", dry_run=True))

@pytest.fixture(scope="module")
def dry(project, tmp_path_factory):
    "papermill and mgsr-run, at the same time in a copy of what a clone has."
    root, cache = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("cache")
    for name in ("nbs", "out", "temporary"): (root/name).mkdir()
    shutil.copy(ROOT/"nbs"/"train.ipynb", root/"nbs")
    here = SimpleNamespace(root=root, cache=cache, done={}, env={
        **project.env, "MGSR_CACHE": str(cache), "TMPDIR": str(root/"temporary")})
    lines = [["papermill", "nbs/train.ipynb", "out/x.ipynb", "--no-progress-bar", *LLAMA2],
             ["mgsr-run", *LLAMA2]]
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda line: command(here, *line), lines)
        here.done = {line[0]: done for line, done in zip(lines, ended)}
    return here

def test_papermill_runs_the_notebook_dry(dry):
    done = dry.done["papermill"]
    assert done.returncode == 0, done.stderr[-2000:]
    code = code_cells(nbformat.read(dry.root/"out"/"x.ipynb", 4))
    assert all(c.execution_count for c in code if c.source)
    # the other cells do nothing
    [said] = [o.text for c in code for o in c.outputs if o.get("name") != "stderr"]
    assert said.startswith("dry run of preset llama2-dolly, method mgsr: sound")
    assert "13,015.9 M parameters" in said and "26.0 GB" in said

def test_mgsr_run_prints_the_report(dry):
    done = dry.done["mgsr-run"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("dry run of preset llama2-dolly, method mgsr: sound")
    assert "largest: " in done.stdout and "results:" not in done.stdout

def test_the_commands_leave_nothing_but_the_notebook_that_was_asked_for(dry):
    assert {p.name for p in dry.root.iterdir()} == {"nbs", "out", "temporary"}
    assert not list(dry.cache.iterdir())
    assert [p.name for p in (dry.root/"out").iterdir()] == ["x.ipynb"]
    left = [p.suffix for p in (dry.root/"temporary").rglob("*")]
    assert not set(left) & {".ipynb", ".safetensors", ".json"}

@pytest.fixture
def fails(monkeypatch):
    "`fails(name)`: papermill reports the error `name` of a cell; the kernel is left out."
    prepare = papermill.main
    def with_error(name):
        def main(words, **kw):
            if "--prepare-only" in words: return prepare(words, **kw)
            raise PapermillExecutionError(1, 1, "", name, "max_tokens: too many", [])
        monkeypatch.setattr(papermill, "main", main)
    return with_error

@pytest.mark.parametrize("name", ["ConfigError", "FileNotFoundError"])
def test_what_the_notebook_refuses_mgsr_run_says_in_a_line(monkeypatch, tmp_path, fails, ends,
                                                           name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fails(name)
    before = sorted(ROOT.glob("runs/*"))
    status, out, error = ends(*LLAMA2, "-p", "max_tokens", "2000")
    assert status == 2 and error.endswith("mgsr-run: max_tokens: too many\n")
    assert not out and not list(tmp_path.iterdir()) and sorted(ROOT.glob("runs/*")) == before

def test_an_error_that_is_no_refusal_is_shown_as_it_is(monkeypatch, fails):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["mgsr-run", *LLAMA2])
    fails("RuntimeError")
    with pytest.raises(PapermillExecutionError): mgsr_run.main()
