"""mgsr-run: what it makes of its flags, what it refuses in a sentence, what it leaves behind. Tiny
models; a kernel for each run."""
import json, os, pwd, re, shutil, subprocess, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
import nbformat, papermill, pytest
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from commands import (
    BIN, FIELDS, ROOT, WRONG, code_cells, command, config_of, errors, flags, text_of)
from mgsr_nb import files
from mgsr_nb.config import resolve
from mgsr_nb.run import command as mgsr_run
from mgsr_nb.run.folder import open_run

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

def test_mgsr_run_outside_of_a_project_executes_the_installed_notebook(tmp_path, monkeypatch, ends):
    monkeypatch.chdir(tmp_path)
    status, out, _ = ends("--prepare-only", "-p", "run_name", "here")
    assert status == 0 and out == "prepared, and not executed: runs/here/train.prepared.ipynb\n"
    shutil.rmtree(tmp_path/"runs")
    monkeypatch.setattr(files, "files", lambda package: tmp_path/"site-packages"/package)
    status, _, error = ends()
    assert status == 2 and "there is no notebook train.ipynb in " in error and "its wheel" in error

@pytest.mark.parametrize("typed,words", [
    ("--notebook", "takes one path"), ("--notebook a.ipynb -p seed 1", "takes one path"),
    ("-p seed 1 --notebook a.ipynb", "takes one path"), ("--notebook file", "is there already"),
    ("--notebook file/a.ipynb", "cannot be written")])
def test_a_copy_of_the_notebook_that_cannot_be_is_refused(place, ends, typed, words):
    before = content(place)
    status, _, error = ends(*typed.split())
    assert status == 2 and error.startswith("mgsr-run: --notebook: ") and words in error
    assert content(place) == before

@pytest.mark.parametrize("path", ["own.ipynb", "a/details.ipynb"])
def test_a_copy_of_the_notebook_is_the_notebook(place, ends, path):
    assert ends("--notebook", path)[0] == 0
    name = "details.ipynb" if "details" in path else "train.ipynb"
    assert (place/path).read_bytes() == files.notebook(name).read_bytes()

def test_mgsr_run_help_lists_the_parameters(ends):
    _, said, _ = ends("--help")
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
    call = mgsr_run.papermill_call(["-y", "{learning_rate: 1e-3, dac_weight: 2.5e1}"])
    c = mgsr_run.asked_for(call)
    assert (c.learning_rate, c.dac_weight) == (1e-3, 25.)

# --- flags and places that cannot work: one sentence, status 2, no kernel, nothing left

REFUSED = {  # what is typed, in a folder with the files below -> words of the sentence
    "a folder to work in that is not there": ("--cwd nowhere", "--cwd: there is no folder 'now"),
    "a file to work in": ("--cwd file", "--cwd: there is no folder 'file'"),
    "an unknown kernel": ("-k nokernel", "--kernel: there is no kernel 'nokernel'; allowed: "),
    "an unknown engine": ("--engine nope", "No engine named 'nope' found"),
    "an unknown language": ("-l nolang", "for kernel 'python3' or language 'nolang'"),
    "a missing file": ("-f missing.yaml", "No such file or directory: 'missing.yaml'"),
    "a folder for a file": ("-f nbs", "Is a directory"),
    "a broken file": ("-f broken.yaml", "that cannot be read (while parsing"),
    "a file that is a list": ("-f list.yaml", "that cannot be read (cannot convert"),
    "a file that is no UTF-8": ("-f latin.yaml", "can't decode byte 0xfc"),
    "broken text": ("-y {a", "that cannot be read (while parsing"),
    "text that is a number": ("-y 3", "that cannot be read ('int'"),
    "broken base64": ("-b YQ", "that cannot be read (Incorrect padding)"),
    "half a pair": ("-p seed", "requires 2 arguments"),
    "an unknown flag": ("--nonsense", "No such option"),
    "a stray word": ("stray", "unexpected extra argument"),
    "a word for a number": ("--execution-timeout soon", "'soon' is not a valid integer"),
    "an output that cannot be": ("-p runs_dir file/runs", "runs_dir: the run's folder /"),
    "a file for a run's folder": ("-p run_name taken -p runs_dir .", "runs_dir: the run's folder"),
    "a damaged record": ("-p run_name old -p runs_dir .", "run_name: the config.json of "),
    "an unknown parameter with paths": ("--inject-paths -p sede 1", "did you mean 'seed'?"),
    "a dry run that keeps something": ("--prepare-only -p dry_run True", "a dry run keeps nothing")}

@pytest.fixture
def place(project, tmp_path, monkeypatch):
    "A project with some files that are not what they should be; no kernel can be started in it."
    (tmp_path/"nbs").mkdir()
    shutil.copy(project.root/"nbs"/"train.ipynb", tmp_path/"nbs")
    for name in ("file", "taken"): (tmp_path/name).touch()
    (tmp_path/"broken.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path/"list.yaml").write_text("[1, 2]", encoding="utf-8")
    (tmp_path/"latin.yaml").write_bytes("run_name: fünf".encode("latin-1"))
    (tmp_path/"old").mkdir()
    (tmp_path/"old"/"config.json").write_text("{", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    (tmp_path/"cache").mkdir()
    def start(*args, **kw): raise AssertionError("a kernel was started")
    monkeypatch.setattr(papermill.clientwrap.PapermillNotebookClient, "execute", start)
    return tmp_path

def content(folder): return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}

@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_sentence_with_status_2_and_leaves_nothing(place, ends, case):
    typed, words = REFUSED[case]
    before = content(place)
    status, out, error = ends(*typed.split())
    assert status == 2 and not out and words in error, error
    said = error[error.index("mgsr-run: "):]
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    assert content(place) == before

def unset_home(monkeypatch):
    "As a user in a container whose number no list of users knows."
    def nobody(uid): raise KeyError(uid)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)

def test_a_user_without_a_home_is_refused_by_the_variable(place, ends, monkeypatch):
    unset_home(monkeypatch)
    before = content(place)
    status, _, error = ends()
    assert status == 2 and error.startswith("mgsr-run: HOME: "), error
    assert content(place) == before

def test_a_notebook_that_is_none_is_named(place, ends):
    (place/"nbs"/"train.ipynb").write_text("{", encoding="utf-8")
    status, _, error = ends()
    assert status == 2 and "the training notebook: " in error and not (place/"runs").exists()

@pytest.mark.parametrize("typed,words", [
    ("--version", "mgsr_nb "), ("--help-notebook", "Parameters inferred for notebook"),
    ("--prepare-only -p run_name ready", "prepared, and not executed: runs/ready/train.prepared"),
    ("--prepare-only --inject-paths -p run_name ready", "train.prepared.ipynb"),
    ("--prepare-only --cwd old -p run_name ready", "runs/ready/train.prepared.ipynb")])
def test_papermills_other_flags_work(place, ends, typed, words):
    status, out, error = ends(*typed.split())
    assert status == 0 and words in out and "mgsr-run: " not in error
    made = [p for p in place.rglob("*.ipynb") if p.parent.name == "ready"]
    assert [p.name for p in made] == ["train.prepared.ipynb"] * ("ready" in typed)
    for path in made:
        notebook = nbformat.read(path, 4)
        assert not any(c.outputs or c.execution_count for c in code_cells(notebook))
        [given] = [c.source for c in code_cells(notebook) if "injected" in str(c.metadata.tags)]
        assert 'run_name = "ready"' in given and (path.parent/"config.json").is_file()
        if "inject" in typed: assert f'"{os.path.relpath(path)}"' in given

def test_flags_are_read_once_from_a_pipe_and_the_folder_is_where_the_kernel_works(
        project, place, tmp_path_factory):
    "In the C locale, from an old-fashioned shell: everything at once, and a kernel."
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    words = " ".join(flags({k: v for k, v in project.parameters.items() if k != "runs_dir"}))
    line = (f"{BIN}/mgsr-run {words} --cwd {elsewhere} --inject-paths --no-progress-bar "
            "-f <(echo run_name: piped)")
    env = {**project.env, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["bash", "-c", line], cwd=place, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = elsewhere/"runs"/"piped"
    assert done.stdout.endswith(f"results: {os.path.relpath(folder, place)}\n")
    names = {p.name for p in folder.iterdir()}
    assert {"train.ipynb", "metrics.json"} <= names and not (place/"runs").exists()

# --- runs

@pytest.fixture
def fails(monkeypatch):
    "`fails(error, begun)`: papermill raises it, in a run that has `begun` its log; no kernel."
    prepare = papermill.execute_notebook
    def with_error(error, begun=False):
        def execute(output_path, prepare_only, **kw):
            if prepare_only: return prepare(output_path=output_path, prepare_only=True, **kw)
            if begun: (mgsr_run.Path(output_path).parent/"log.csv").touch()
            mgsr_run.Path(output_path).touch()
            raise error
        monkeypatch.setattr(papermill, "execute_notebook", execute)
    return with_error

def cell_error(name): return PapermillExecutionError(1, 1, "", name, "seed: too many", [])

@pytest.mark.parametrize("steps,words", [
    ([], "begins again, since there is no checkpoint"), ([2, 10], "goes on behind step 10")])
def test_an_interrupted_run_says_what_the_same_command_will_do(place, fails, ends, steps, words):
    fails(KeyboardInterrupt())
    for n in steps: (place/"runs"/"x"/"checkpoints"/f"step-{n:06d}").mkdir(parents=True)
    status, _, error = ends("-p", "run_name", "x")
    assert status == 130 and f"mgsr-run: interrupted; the same command {words}" in error
    assert error.endswith(": mgsr-run -p run_name x\n")

NO_REFUSALS = {"RuntimeError: seed: too many": cell_error("RuntimeError"),
               "the kernel died": DeadKernelError("Kernel died"),
               "A cell timed out": CellTimeoutError("A cell timed out"),
               "No space left on device": OSError(28, "No space left on device", "runs/x")}

@pytest.mark.parametrize("words", NO_REFUSALS)
def test_a_run_that_fails_names_the_place_and_the_command_that_goes_on(place, fails, ends, words):
    fails(NO_REFUSALS[words], begun=True)
    status, _, error = ends("-p", "run_name", "x")
    assert status == 1 and words in error
    assert "\n(where it came from: runs/x/train.partial.ipynb)\nthe same command begins" in error
    assert error.endswith(": mgsr-run -p run_name x\n")

@pytest.mark.parametrize("error", [*NO_REFUSALS.values(), cell_error("ConfigError"),
                                   KeyboardInterrupt()], ids=repr)
def test_a_failed_start_leaves_no_folder(place, fails, ends, error):
    fails(error)
    before = content(place)
    assert ends("-p", "run_name", "a/b")[0] != 0
    assert content(place) == before

def test_what_is_begun_or_was_there_before_stays(place, fails, ends):
    fails(cell_error("ConfigError"), begun=True)
    status, _, error = ends("-p", "run_name", "a")
    assert status == 2 and "mgsr-run: seed: too many\n" in error
    assert {p.name for p in (place/"runs"/"a").iterdir()} == {"config.json", "log.csv",
                                                             "train.partial.ipynb"}
    fails(cell_error("ConfigError"))
    (place/"runs"/"b").mkdir()
    ends("-p", "run_name", "b")
    assert (place/"runs"/"b"/"config.json").is_file()

def test_an_error_that_is_no_refusal_is_shown_whole_if_its_notebook_goes(place, fails, ends):
    fails(cell_error("RuntimeError"))
    status, _, error = ends()
    assert status == 1 and 'Exception encountered at "In [1]"' in error

def test_what_the_notebook_refuses_is_one_sentence_and_leaves_no_folder(project, tmp_path):
    "Data that are not as they should be are noticed in the kernel."
    (tmp_path/"dolly").mkdir()
    for name in ("databricks-dolly-15k", "dev", "valid"):
        (tmp_path/"dolly"/f"{name}.jsonl").write_text('{"instruction": 3}\n')
    more = dict(run_name="own", data="dolly", eval_sets="dolly", data_dir=str(tmp_path))
    done = command(project, "mgsr-run", *flags(project.parameters | more))
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence.startswith("mgsr-run: ") and "line 1, field 'response': missing" in sentence
    assert not (project.root/"runs"/"own").exists()

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

@pytest.mark.parametrize("name", ["ConfigError", "FileNotFoundError", "ValueError"])
def test_what_a_dry_run_refuses_is_said_in_a_line(place, monkeypatch, fails, ends, name):
    monkeypatch.setattr(tempfile, "tempdir", str(place/"cache"))
    fails(cell_error(name))
    before = content(place)
    status, out, error = ends(*LLAMA2, "-p", "max_tokens", "2000")
    assert status == 2 and error.endswith("mgsr-run: seed: too many\n")
    assert not out and content(place) == before

def test_a_dry_run_that_fails_is_shown_whole(place, fails, ends):
    fails(cell_error("RuntimeError"))
    status, _, error = ends(*LLAMA2)
    assert status == 1 and 'Exception encountered at "In [1]"' in error
    assert error.endswith("mgsr-run: RuntimeError: seed: too many\n")


# --- the kernel's sockets

def test_a_kernel_talks_through_sockets_of_its_own_and_says_nothing_about_it(tmp_path, capfd):
    cell = "import json, ipykernel; print(open(ipykernel.get_connection_file()).read())"
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)],
        metadata=kernel), tmp_path/"a.ipynb")
    with mgsr_run.local_kernel() as options:
        done = papermill.execute_notebook(str(tmp_path/"a.ipynb"), str(tmp_path/"b.ipynb"),
            progress_bar=False, **options)
        place = Path(options["config"].KernelManager.ip).parent
    connection = json.loads(done.cells[-1].outputs[0].text)
    assert connection["transport"] == "ipc" and connection["ip"].startswith(str(place))
    assert "TCP" not in capfd.readouterr().err
    assert not place.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "b.ipynb"]

@pytest.mark.parametrize("name, value", [("name", "nt"), ("temporary", "x" * 100)])
def test_where_sockets_cannot_be_it_is_tcp(name, value, tmp_path, monkeypatch):
    if name == "name": monkeypatch.setattr(mgsr_run.os, "name", value)
    else:
        (tmp_path/value).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/value))
    try:
        with mgsr_run.local_kernel() as options: assert options == {}
    finally: monkeypatch.undo()
