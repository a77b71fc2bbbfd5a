"""The training notebook as a command: what papermill does with it, what it refuses, what it leaves behind. Tiny models; a kernel for each run."""
import ast, json, re, subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args, get_origin
import nbformat, pytest
from commands import BIN, FIELDS, ROOT, WRONG, command, config_of, errors, flags, text_of
from mgsr_nb.run import asked
from mgsr_nb.run.folder import finished, open_run

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

def test_an_edited_and_saved_default_is_the_commands_too(project, tmp_path):
    "It trains in the folder that it announced."
    source = project.root/"nbs"/"train.ipynb"
    before = source.read_text(encoding="utf-8")
    parameters = {k: v for k, v in project.parameters.items() if k not in ("runs_dir", "max_train_examples")} | dict(max_steps=1, eval_prompts=1)
    try:
        source.write_text(before.replace("max_train_examples: int = 0", "max_train_examples: int = 7"), encoding="utf-8")
        done = command(project, "mgsr-run", *flags(parameters | dict(seed=3)))
        assert done.returncode == 0, done.stderr[-2000:]
        announced = re.search(r"^mgsr-run: (\S+) \(each step", done.stderr, re.M)[1]
        assert f"results: {announced}" in done.stdout
        metrics = json.loads((project.root/announced/"metrics.json").read_text(encoding="utf-8"))
        assert metrics["config"]["max_train_examples"] == 7 and metrics["config"]["seed"] == 3 and metrics["digest"] == config_of(project, **parameters, seed=3, max_train_examples=7).digest
    finally: source.write_text(before, encoding="utf-8")

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

def test_no_cell_of_the_notebook_gives_a_parameter_another_meaning():
    "`from mgsr_nb.run.dry_run import dry_run` would replace the parameter of that name, and running the cells again would fail."
    cells = [c for c in nbformat.read(ROOT/"nbs"/"train.ipynb", 4).cells if c.cell_type == "code"]
    after = cells[1 + next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])):]
    bound = set()
    for node in (n for c in after for n in ast.walk(ast.parse(c.source))):
        if isinstance(node, (ast.Import, ast.ImportFrom)): bound |= {a.asname or a.name for a in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): bound.add(node.id)
    assert not bound & set(FIELDS)
