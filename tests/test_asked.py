"""What somebody asked for: the cells of the notebook, papermill's injected one among them; in a kernel, and from the file."""
import json
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient
from tiny_runs import tiny_parameters
from other_parameters import FIELDS, OTHER, with_needs
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.asked import from_file, from_notebook, parameters_cell

PARAMETERS = parameters_cell()

def notebook(*cells, parameters=PARAMETERS):
    "What `from_notebook` sees after these cells, in IPython's numbering; it is called in the cell after them."
    cells, variables = ["", "import os, sys\nfrom mgsr_nb.run.asked import from_notebook", parameters, *cells], {}
    for cell in cells: exec(cell, variables)
    return from_notebook([*cells, "config = from_notebook(In, globals())"], variables)

@pytest.mark.pitfall(42)
def test_pitfall_42_an_injected_cell_counts_and_nothing_else():
    assert notebook() == resolve()
    assert notebook("# Parameters\ndac_weight = 0.5\nseed = 3") == resolve(dac_weight=0.5, seed=3)

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("cell,words", [
    ("dac_wieght = 0.5", "dac_wieght: there is no such parameter (did you mean 'dac_weight'?)"), ("scrg = 'true'", "scrg: got 'true' (str)"),
    ("dac_weight = '0.5'", "dac_weight: got '0.5' (str)"), ("dac_weight = -1", "dac_weight: got -1 (int)"), ("sft_weight = True", "sft_weight: got True (bool)"),
    (f"max_steps = {FIELDS['max_steps'].default}.0", f"max_steps: got {FIELDS['max_steps'].default}.0 (float)"), ("overwrite = 0", "overwrite: got 0 (int)"), ("preset = 'nope'", "preset: got 'nope'")])
def test_pitfall_42_what_papermill_only_warns_about_is_refused(cell, words):
    "Also where the wrong type equals the default: True == 1.0, 24.0 == 24."
    with pytest.raises(ConfigError) as e: notebook(cell)
    assert words in str(e.value)

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", [n for n in FIELDS if n != "run_name"])
def test_pitfall_42_every_parameter_can_be_injected(name):
    assert getattr(notebook("\n".join(f"{n} = {v!r}" for n, v in with_needs(name).items())), name) == OTHER[name]

def test_an_injected_default_wins_over_the_preset():
    assert notebook("preset = 'smollm2-dolly'").max_steps == 120
    general = FIELDS["max_steps"].default
    assert notebook(f"preset = 'smollm2-dolly'\nmax_steps = {general}").max_steps == general != 120

def test_an_edited_parameters_cell_counts_like_an_injected_one():
    edited = PARAMETERS.replace("preset: str = 'quickstart'", "preset: str = 'smollm2-dolly'").replace("\nseed: int = 0", "\nseed: int = 7")
    assert notebook(parameters=edited) == resolve(preset="smollm2-dolly", seed=7)
    with pytest.raises(ConfigError, match="dac_wieght"): notebook(parameters=PARAMETERS + "\ndac_wieght = 0.5")

def test_a_parameters_cell_run_again_sets_nothing_by_itself():
    "In JupyterLab the same cell is run many times, also with a line less; what was typed before it is gone."
    edited = PARAMETERS.replace("preset: str = 'quickstart'", "preset: str = 'smollm2-dolly'")
    assert notebook(edited, edited, parameters=edited) == resolve(preset="smollm2-dolly")
    assert notebook(PARAMETERS, PARAMETERS) == resolve()
    general = FIELDS["max_steps"].default
    assert notebook(edited, f"max_steps = {general}").max_steps == general
    assert notebook(f"max_steps = {general}", edited).max_steps == 120
    all_but_one = "\n".join(line for line in edited.splitlines() if not line.startswith("seed:"))
    assert notebook(all_but_one) == resolve(preset="smollm2-dolly")
    assert notebook(all_but_one, parameters=edited.replace("\nseed: int = 0", "\nseed: int = 7")).seed == 7

def test_the_value_is_the_last_one_assigned():
    assert notebook("seed = 1", "seed = 2").seed == 2 and notebook("seed = 1", "seed: int = 0").seed == 0

def test_papermills_own_names_and_cells_that_are_no_python_are_let_through():
    cells = ["", "%matplotlib inline", "!ls", "def f():\n    x = 1", PARAMETERS, "PAPERMILL_OUTPUT_PATH = 'runs/x.ipynb'", "broken ("]
    variables = {n: f.default for n, f in FIELDS.items()} | {"PAPERMILL_OUTPUT_PATH": "runs/x.ipynb"}
    assert from_notebook([*cells, ""], variables) == resolve()

@pytest.mark.parametrize("cell", ["scratch = 5", "step = 3\nmodels = []", "a, b = 1, 2", "for seedling in range(3): pass", "gone = 1; del gone"])
def test_names_of_ones_own_are_nobodys_business(cell):
    "Above the parameters, between them and the question, and left over from an earlier run of all cells."
    assert notebook(cell) == notebook(parameters=f"{cell}\n") == notebook(cell, PARAMETERS, cell) == resolve()
    before = ["", cell, PARAMETERS, "config = from_notebook(In, globals())", "trained = 1", PARAMETERS, cell]
    assert from_notebook([*before, ""], {n: f.default for n, f in FIELDS.items()} | dict(config=1, trained=1)) == resolve()

@pytest.mark.parametrize("cell,name", [("dac_wieght = 0.5", "dac_weight"), ("learning_rates = [1e-3]", "learning_rate"), ("x, eval_prompt = 1, 5", "eval_prompts")])
def test_a_slip_in_a_cell_of_ones_own_is_refused(cell, name):
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"): notebook(cell)

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", ["scratch", "xyzzy"])
def test_pitfall_42_papermills_cell_is_judged_whole(name):
    with pytest.raises(ConfigError, match=f"{name}: there is no such parameter; all names: preset"): notebook(f"# Parameters\n{name} = 5")
    with pytest.raises(ConfigError, match=f"{name}: there is no such parameter"): notebook(parameters=f"{PARAMETERS}\n{name} = 5")

def test_several_names_at_once():
    assert notebook("seed, dac_weight = 3, 0.5") == resolve(seed=3, dac_weight=0.5) == notebook("[seed, *rest] = [3]\ndac_weight = other = 0.5")
    assert notebook("preset = 'smollm2-dolly'\nmax_steps, seed = 20, 0").max_steps == 20

def test_the_cell_that_asks_may_assign_any_name():
    variables = {n: f.default for n, f in FIELDS.items()}
    assert from_notebook(["", PARAMETERS, "anything = 1\nconfig = from_notebook(In, globals())"], variables) == resolve()

def test_it_reads_what_ipython_keeps():
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in ("from mgsr_nb.run.asked import from_notebook", PARAMETERS, "dac_weight = 0.5", "config = from_notebook(In, globals())"):
        shell.run_cell(cell, store_history=True).raise_error()
    assert shell.user_ns["config"] == resolve(dac_weight=0.5)

# --- in a real kernel

TRAIN = Path(__file__).resolve().parents[1]/"nbs"/"train.ipynb"

def edited(source, **values):
    "The source of the parameters cell with other values."
    lines = source.splitlines()
    for i, line in enumerate(lines):
        name = line.split(":")[0]
        if name in values: lines[i] = f"{name} = {values[name]!r}"
    return "\n".join(lines)

class Lab:
    "The training notebook in one kernel, as in JupyterLab: `run_all`, change a cell, `run_all`."
    def __init__(self, folder):
        (folder/"nbs").mkdir(exist_ok=True)
        self.book = nbformat.read(TRAIN, 4)
        nbformat.write(self.book, folder/"nbs"/"train.ipynb")
        self.client = NotebookClient(self.book, timeout=170, kernel_name="python3", resources={"metadata": {"path": str(folder/"nbs")}})
        self.cells = [c for c in self.book.cells if c.cell_type == "code"]
        self.parameters = self.cells[0]
    def run(self, *cells):
        for c in cells or self.cells: self.client.execute_cell(c, self.book.cells.index(c) if c in self.book.cells else 0)
    def value(self, expression):
        cell = nbformat.v4.new_code_cell(f"print({expression})")
        self.run(cell)
        return cell.outputs[0].text.strip()

@pytest.mark.pitfall(42)
def test_pitfall_42_run_all_another_value_run_all(local_models, shared_cache, tmp_path, monkeypatch):
    "Both runs train, and the second is the one with the new value; then a cell alone, a slip, and the same without it."
    monkeypatch.setenv("MGSR_CACHE", str(shared_cache))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path/"ipython"))
    tiny = tiny_parameters("runs", local_models["llama"][0], max_steps=1)
    lab = Lab(tmp_path)
    with lab.client.setup_kernel():
        lab.run(nbformat.v4.new_code_cell("scratch = 5"))
        lab.parameters.source = edited(lab.parameters.source, **tiny)
        lab.run()
        lab.parameters.source = edited(parameters_cell(), **tiny, dac_weight=0.5)
        lab.run()
        assert lab.value("config.dac_weight") == "0.5" and lab.value("config.span_weight") == "1.0"
        lab.run(lab.parameters, *lab.cells[1:3])
        ask = lab.cells[2]
        assert "from_notebook(In" in ask.source and lab.value("done") == "True"
        slip = nbformat.v4.new_code_cell("dac_wieght = 0.25")
        lab.run(lab.parameters, slip)
        with pytest.raises(Exception, match="did you mean 'dac_weight'"): lab.run(ask)
        lab.run(lab.parameters, ask)
    runs = [json.loads((f/"metrics.json").read_text(encoding="utf-8"))["config"]["dac_weight"] for f in (tmp_path/"runs").iterdir()]
    assert sorted(runs) == [0.5, 1.0]

# --- from the file

def saved(folder, *cells, parameters=PARAMETERS, typed=None):
    "A training notebook with these cells behind its parameters cell, as papermill prepares it."
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(c) for c in (parameters, *cells, "config = from_notebook(In, globals())", "seed = 99")]
    if typed: book.metadata["papermill"] = {"parameters": typed}
    nbformat.write(book, folder/"train.ipynb")
    return folder/"train.ipynb"

def test_the_file_has_the_configuration_that_the_notebook_will_have(tmp_path):
    assert from_file(TRAIN) == resolve() == from_file(saved(tmp_path))
    mine = edited(PARAMETERS, max_train_examples=7, preset="smollm2-dolly")
    for cells, typed in (([], None), (["# Parameters\nseed = 3\n"], {"seed": 3}), (["# Parameters\nmax_train_examples = 0"], {"max_train_examples": 0}),
                         (["# Parameters\nseed = 3", "import os\nscratch = os.getpid()\nseed = 4"], {"seed": 3})):
        assert from_file(saved(tmp_path, *cells, parameters=mine, typed=typed)) == notebook(*cells, parameters=mine)

def test_what_papermill_typed_is_taken_from_its_record(tmp_path):
    "Also what its cell writes as an expression."
    with pytest.raises(ConfigError, match="dac_weight: got nan"): from_file(saved(tmp_path, "# Parameters\ndac_weight = float('nan')", typed={"dac_weight": float("nan")}))
    with pytest.raises(ConfigError, match="did you mean 'dac_weight'"): from_file(saved(tmp_path, "# Parameters\ndac_wieght = 1.0", typed={"dac_wieght": 1.0}))

@pytest.mark.parametrize("line", ["seed: int = 3 + 4", "seed, chunker = 3, 'spacy'", "seed = scratch"])
def test_what_the_notebook_computes_cannot_be_read(tmp_path, line):
    with pytest.raises(ConfigError, match="^seed: the notebook computes it"): from_file(saved(tmp_path, parameters=f"{PARAMETERS}\n{line}"))
