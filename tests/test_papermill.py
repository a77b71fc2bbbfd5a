"""The training notebook as a command: what papermill does with it, what it refuses, what it leaves behind. Tiny models; a kernel for each run."""
import json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin
import nbformat, pytest
from tiny_runs import tiny_parameters
from mgsr_nb.run import asked, command as mgsr_run
from mgsr_nb.config import RunConfig, resolve
from mgsr_nb.run.folder import finished, open_run

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FIELDS = RunConfig.model_fields
WRONG = {  # what is typed -> the parameter that the message begins with, and a word of the message
    "typo": ("-p dac_wieght 0.5", "dac_wieght", "did you mean 'dac_weight'?"), "word": ("-p dac_weight high", "dac_weight", "allowed: a number >= 0"),
    "negative": ("-p dac_weight -1", "dac_weight", "allowed: a number >= 0"), "limits": ("-p clip_upper 0.1 -p clip_lower 0.9", "clip_lower", "clip_upper: 0.1"),
    "preset": ("-p preset nope", "preset", "allowed: one of quickstart"), "text": ("-p scrg true", "scrg", "True or False")}

def flags(parameters): return [word for name, value in parameters.items() for word in ("-p", name, str(value))]

@pytest.fixture(scope="module")
def project(tmp_path_factory, local_models, shared_cache):
    """A copy of what a clone has (the notebook and nothing else), the parameters of a tiny run, and the environment of its commands.

    `guarded` is an environment in which importing torch is an error."""
    root = tmp_path_factory.mktemp("project")
    (root/"nbs").mkdir()
    shutil.copy(ROOT/"nbs"/"train.ipynb", root/"nbs")
    guard = tmp_path_factory.mktemp("guard")
    (guard/"torch").mkdir(); (guard/"torch"/"__init__.py").write_text("raise SystemError('torch was imported')")
    env = {**os.environ, "MGSR_CACHE": str(shared_cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    env.pop("MPLBACKEND", None)   # `make test` sets it for figures outside of a kernel; a kernel draws inline by itself
    parameters = tiny_parameters("runs", local_models["llama"][0])
    return SimpleNamespace(root=root, parameters=parameters, env=env, guarded={**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(guard), env.get("PYTHONPATH"))))}, ipython=Path(env["IPYTHONDIR"]))

def command(project, *words, env=None, **kw):
    return subprocess.run([str(BIN/words[0]), *words[1:]], cwd=project.root, env=env or project.env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=170, **kw)

def config_of(project, **more):
    "The configuration of a run of the project, for calls in this process."
    return resolve(project.parameters | dict(runs_dir=str(project.root/"runs")) | more)

def errors(notebook): return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]

def text_of(notebook): return "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)

# --- the parameters cell

def parameters_cell():
    notebook = nbformat.read(ROOT/"nbs"/"train.ipynb", 4)
    return next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))

@pytest.mark.pitfall(41, 42)
def test_pitfall_41_the_parameters_cell_is_the_configuration():
    "Names, order, types, defaults, and comments: what a reader edits and what is validated cannot drift apart."
    source = parameters_cell()
    assert source == asked.parameters_cell(), "paste what mgsr_nb.run.asked.parameters_cell() returns"
    found = dict(re.findall(r"^(\w+): (.*?)(?=\n\w|\n# ---|\Z)", source, re.M | re.S))      # with the lines in which a comment goes on
    for name, field in FIELDS.items():
        kinds = get_args(field.annotation)
        literal = get_origin(field.annotation) is Literal
        kind = "str" if literal else "float" if type(None) in kinds else field.annotation.__name__
        expected = f"{kind} = {field.default!r}  # {field.description}" + (f" [{', '.join(kinds)}]" if literal else "")
        assert re.sub(r"\n +#", "", found[name]) == expected
    assert list(found) == list(FIELDS) and max(map(len, source.splitlines())) <= 100

# --- wrong parameters

@pytest.fixture(scope="module")
def refused(project):
    "All wrong command lines, two at a time: {name: (finished process, executed notebook)}. Torch cannot be imported there."
    def one(name):
        out = project.root/f"refused-{name}.ipynb"
        done = command(project, "papermill", "nbs/train.ipynb", out.name, "--no-progress-bar", *WRONG[name][0].split(), env=project.guarded)
        return name, (done, nbformat.read(out, 4))
    with ThreadPoolExecutor(2) as pool: return dict(pool.map(one, WRONG))

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", WRONG)
def test_pitfall_42_papermill_fails_and_names_the_parameter_before_torch_is_imported(project, refused, name):
    done, notebook = refused[name]
    assert done.returncode not in (0, None)
    [error] = errors(notebook)
    assert error.ename == "ConfigError" and error.evalue.startswith(f"{WRONG[name][1]}: ") and WRONG[name][2] in error.evalue
    assert f"ConfigError: {WRONG[name][1]}: " in done.stderr
    cells = [c for c in notebook.cells if c.cell_type == "code" and "papermill-error" not in str(c.metadata.get("tags", []))]
    ran = [c for c in cells if c.execution_count]
    assert "from_notebook(In, globals())" in ran[-1].source and "from mgsr_nb.run.setup" not in "".join(c.source for c in ran)
    assert not list(project.root.rglob("*nope*")) and not list(project.root.rglob("*dac_wieght*"))

@pytest.mark.pitfall(42)
def test_pitfall_42_the_guard_against_torch_works(project):
    done = command(project, "python", "-c", "import mgsr_nb.config, mgsr_nb.run.command, mgsr_nb.study.suites, mgsr_nb.run.trainer", env=project.guarded)
    assert "torch was imported" in done.stderr
    assert command(project, "python", "-c", "import mgsr_nb.config, mgsr_nb.run.command, mgsr_nb.study.suites", env=project.guarded).returncode == 0

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", WRONG)
def test_pitfall_42_mgsr_run_refuses_with_status_2_and_without_a_kernel(project, name, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(sys, "argv", ["mgsr-run", *WRONG[name][0].split()])
    before = sorted(project.root.rglob("*"))
    with pytest.raises(SystemExit) as end: mgsr_run.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.startswith(f"mgsr-run: {WRONG[name][1]}: ") and WRONG[name][2] in said.err and "Traceback" not in said.err
    assert not said.out and sorted(project.root.rglob("*")) == before

@pytest.mark.pitfall(42)
def test_pitfall_42_the_console_script_says_it_in_a_terminal(project):
    done = command(project, "mgsr-run", "-p", "dac_wieght", "0.5", env=project.guarded)
    assert done.returncode == 2 and done.stderr.startswith("mgsr-run: dac_wieght: there is no such parameter (did you mean 'dac_weight'?)")

def test_mgsr_run_outside_of_a_project_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(sys, "argv", ["mgsr-run"])
    with pytest.raises(SystemExit) as end: mgsr_run.main()
    assert end.value.code == 2 and "inside a clone of the project" in capsys.readouterr().err

def test_mgsr_run_help_lists_the_parameters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mgsr-run", "--help"])
    mgsr_run.main()
    said = capsys.readouterr().out
    for name, field in FIELDS.items(): assert re.search(rf"^  {name} +{re.escape(field.description)} \[.*; default {re.escape(repr(field.default))}\]$", said, re.M), name
    assert "[one of value, rank, mass; default 'value']" in said

def test_an_interrupted_run_says_what_the_same_command_will_do(tmp_path, monkeypatch, capsys):
    "Ctrl-C reaches papermill, which click turns into its own exception."
    import click
    def interrupted(folder, execute): raise click.exceptions.Abort
    monkeypatch.setattr(mgsr_run, "execute_whole", interrupted)
    for steps, words in (([], "begins again, since there is no checkpoint"), ([2, 10], "goes on behind step 10")):
        for n in steps: (tmp_path/"x"/"checkpoints"/f"step-{n:06d}").mkdir(parents=True)
        monkeypatch.setattr(sys, "argv", ["mgsr-run", "-p", "runs_dir", str(tmp_path), "-p", "run_name", "x"])
        with pytest.raises(SystemExit) as end: mgsr_run.main()
        said = capsys.readouterr().err
        assert end.value.code == 130 and "mgsr-run: interrupted; the same command " + words in said and "Traceback" not in said

def test_what_the_notebook_refuses_is_one_sentence_and_the_place_of_the_rest(project, tmp_path):
    "Data that are not as they should be are noticed in the kernel."
    (tmp_path/"dolly").mkdir()
    for name in ("databricks-dolly-15k", "dev", "valid"): (tmp_path/"dolly"/f"{name}.jsonl").write_text('{"instruction": 3}\n')
    done = command(project, "mgsr-run", *flags(project.parameters | dict(run_name="own", data="dolly", eval_sets="dolly", data_dir=str(tmp_path))))
    last = done.stderr.strip().splitlines()[-2:]
    assert done.returncode == 2 and "Traceback" not in done.stderr.split("mgsr-run: ")[-1], done.stderr[-2000:]
    assert last[0].startswith("mgsr-run: ") and "line 1, field 'response': missing" in last[0] and last[1].endswith("own/train.partial.ipynb)"), last

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("typed,value", [("0.5", 0.5), ("1", 1.0)])
def test_pitfall_42_flags_become_what_papermill_makes_of_them(project, monkeypatch, typed, value):
    monkeypatch.chdir(project.root)
    found = mgsr_run.typed_parameters(["-p", "dac_weight", typed, "-p", "scrg", "False", "-p", "eval_seeds", "10", "-r", "run_name", "007"])
    c = resolve(found)
    assert (c.dac_weight, c.scrg, c.eval_seeds, c.run_name) == (value, False, "10", "007")

# --- runs

@pytest.fixture(scope="module")
def executed(project):
    "papermill nbs/train.ipynb runs/w05/train.ipynb -p dac_weight 0.5, in a folder that was made before."
    (project.root/"runs"/"w05").mkdir(parents=True)
    parameters = project.parameters | dict(run_name="w05", dac_weight=0.5)
    done = command(project, "papermill", "nbs/train.ipynb", "runs/w05/train.ipynb", "--no-progress-bar", *flags(parameters))
    return done, project.root/"runs"/"w05", parameters

@pytest.mark.pitfall(41)
def test_pitfall_41_papermill_runs_the_notebook_with_what_was_asked_for(project, executed):
    done, folder, parameters = executed
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(folder/"train.ipynb", 4)
    assert not errors(notebook) and all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)
    tags = [set(c.metadata.get("tags", [])) & {"parameters", "injected-parameters"} for c in notebook.cells]
    place = tags.index({"parameters"})
    assert tags[place + 1] == {"injected-parameters"} and "dac_weight = 0.5" in notebook.cells[place + 1].source
    metrics = json.loads((folder/"metrics.json").read_text())
    assert metrics["config"]["dac_weight"] == 0.5 and metrics["digest"] == config_of(project, **{k: parameters[k] for k in ("run_name", "dac_weight")}).digest
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "log.csv", "metrics.json", "samples.jsonl", "student", "train.ipynb"]

def test_the_notebook_shows_what_a_reader_wants_to_see(executed):
    notebook = nbformat.read(executed[1]/"train.ipynb", 4)
    data = [o.data for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    html = "".join(d.get("text/html", "") for d in data)
    assert ("student:" in html and "revised:" in html) or "nothing to correct" in html       # the correction
    assert all(words in html for words in ("student before", "student after", "teacher", "validation NLL", "tiny ROUGE-L"))
    assert sum("image/png" in d for d in data) == 1 and "shared classes" in text_of(notebook)

def test_the_notebook_computes_what_run_computes(project, executed, monkeypatch, tmp_path):
    "The cells of the notebook and `mgsr_nb.run.results.run` are the same run."
    import torch
    from mgsr_nb.run.results import run
    if torch.cuda.is_available(): pytest.skip("the notebook used another device")
    monkeypatch.setenv("MGSR_CACHE", project.env["MGSR_CACHE"])
    ours, theirs = run(config_of(project, runs_dir=str(tmp_path), dac_weight=0.5), cpu=True), json.loads((executed[1]/"metrics.json").read_text())
    assert ours["digest"] == theirs["digest"]
    for who in ("student_start", "student", "teacher"):
        for name, value in theirs[who]["validation"].items(): assert ours[who]["validation"][name] == pytest.approx(value, rel=1e-5, abs=2e-5), name

@pytest.mark.pitfall(43)
def test_pitfall_43_the_form_without_an_output_path_writes_the_notebook_to_stdout(project, executed):
    "`papermill nbs/train.ipynb -p dac_weight 0.5 > runs/w05.ipynb`; the run is finished already, so its results are shown."
    source, parameters = project.root/"nbs"/"train.ipynb", executed[2]
    before, metrics = source.read_bytes(), (executed[1]/"metrics.json").stat()
    with open(project.root/"runs"/"w05.ipynb", "w") as out:
        done = subprocess.run([str(BIN/"papermill"), "nbs/train.ipynb", *flags(parameters)], cwd=project.root, env=project.env, stdin=subprocess.DEVNULL, stdout=out,
                              stderr=subprocess.PIPE, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(project.root/"runs"/"w05.ipynb", 4)
    assert not errors(notebook) and "This run is finished already" in text_of(notebook) and "training" not in done.stderr
    assert any("tiny ROUGE-L" in o.get("data", {}).get("text/html", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert source.read_bytes() == before and (executed[1]/"metrics.json").stat().st_mtime_ns == metrics.st_mtime_ns

@pytest.mark.pitfall(32, 44)
def test_pitfall_44_mgsr_run_makes_the_folder_and_goes_on_with_an_interrupted_run(project, monkeypatch):
    from mgsr_nb.run.setup import prepare
    from mgsr_nb.run.trainer import Trainer
    monkeypatch.setenv("MGSR_CACHE", project.env["MGSR_CACHE"])
    more = dict(checkpoint_every=1, seed=3)
    c = config_of(project, **more)
    trainer = Trainer(prepare(c, cpu=True), open_run(c))
    def stop(row): trainer.checkpoints.save(); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): trainer.fit(stop)
    parameters = project.parameters | more
    done = command(project, "mgsr-run", *flags({k: v for k, v in parameters.items() if k != "runs_dir"}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert trainer.folder.parent == project.root/"runs" and f"results: {trainer.folder.relative_to(project.root)}" in done.stdout and "student after" in done.stdout
    assert {"train.ipynb", "metrics.json"} <= {p.name for p in trainer.folder.iterdir()} and not (trainer.folder/"train.partial.ipynb").exists()
    notebook = nbformat.read(trainer.folder/"train.ipynb", 4)
    assert not errors(notebook) and "resumed at step 1" in text_of(notebook)
    assert [line.split(",")[0] for line in (trainer.folder/"log.csv").read_text().splitlines()] == ["step", "0", "1", "2"]
    assert [p.name for p in (project.root/"nbs").iterdir()] == ["train.ipynb"]

@pytest.mark.pitfall(32, 46)
def test_pitfall_46_a_run_that_papermill_cuts_off_is_not_finished_and_goes_on(project, monkeypatch):
    "Papermill's own record may call it completed; metrics.json does not exist. Modules are imported before the clock of the cells runs."
    from mgsr_nb.run.setup import prepare
    from mgsr_nb.run.trainer import Trainer
    startup = project.ipython/"profile_default"/"startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup/"00.py").write_text("import mgsr_nb.run.trainer, pandas, matplotlib.pyplot")
    more = dict(max_steps=1_000_000, checkpoint_every=1, log_every=1000, run_name="cut", seed=4)
    (project.root/"runs"/"cut").mkdir(parents=True)
    folder = project.root/"runs"/"cut"
    try:
        for _ in range(5):      # eight seconds may be over before the first checkpoint on a machine that is busy
            done = command(project, "papermill", "nbs/train.ipynb", "runs/cut/train.ipynb", "--no-progress-bar", "--execution-timeout", "8", *flags(project.parameters | more))
            if list(folder.glob("checkpoints/*/digests.json")): break
    finally: (startup/"00.py").unlink()
    assert done.returncode not in (0, None) and "CellTimeoutError" in done.stderr
    assert not finished(folder) and not (folder/"samples.jsonl").exists() and (folder/"config.json").exists()
    monkeypatch.setenv("MGSR_CACHE", project.env["MGSR_CACHE"])
    c = config_of(project, **more)
    trainer = Trainer(prepare(c, cpu=True), open_run(c))
    reached = trainer.checkpoints.resume()
    assert reached >= 1 and trainer.step()["step"] == reached + 1

@pytest.mark.parametrize("flags", [["-p", "dac_weight"], ["--nonsense"], ["stray"]])
def test_a_command_line_that_papermill_refuses_ends_in_words(flags):
    done = subprocess.run([str(Path(sys.executable).parent/"mgsr-run"), *flags], capture_output=True, text=True, cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-300:]

@pytest.mark.pitfall(42)
def test_pitfall_42_help_notebook_lists_every_parameter_with_its_meaning(project):
    "Its first line, if the meaning is longer: papermill reads no further."
    done = command(project, "papermill", "--help-notebook", "nbs/train.ipynb")
    said = " ".join(done.stdout.split())
    for name in FIELDS:
        line = next(line for line in parameters_cell().splitlines() if line.startswith(f"{name}: "))
        assert re.search(rf"\b{name}: ", said) and line.split("  # ")[1] in said, name
    assert done.returncode == 0


def test_sample_answers_of_prompts_that_share_an_instruction(project, tmp_path):
    (tmp_path/"sinst").mkdir()
    (tmp_path/"sinst/valid.jsonl").write_text("".join(json.dumps(dict(instruction="Same task.", input=f"text {i}", output="x y z")) + "\n" for i in range(3)))
    parameters = project.parameters | dict(eval_sets="sinst", data_dir=tmp_path, run_name="same", max_steps=1, sft_weight=1.0)
    (project.root/"runs"/"same").mkdir(parents=True)
    done = command(project, "papermill", "nbs/train.ipynb", "runs/same/train.ipynb", "--no-progress-bar", *flags(parameters))
    assert done.returncode == 0, done.stderr[-500:]
