"""What somebody asked for: the cells of the notebook, papermill's injected one among them."""
import pytest
from other_parameters import FIELDS, OTHER, with_needs
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.asked import from_notebook, parameters_cell

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
    edited = PARAMETERS.replace("preset: str = 'quickstart'", "preset: str = 'smollm2-dolly'").replace("seed: int = 0", "seed: int = 7")
    assert notebook(parameters=edited) == resolve(preset="smollm2-dolly", seed=7)
    with pytest.raises(ConfigError, match="dac_wieght"): notebook(parameters=PARAMETERS + "\ndac_wieght = 0.5")

def test_a_parameters_cell_run_again_sets_nothing_by_itself():
    "In JupyterLab the same cell is run many times; only a cell with fewer names says that its values are meant."
    edited = PARAMETERS.replace("preset: str = 'quickstart'", "preset: str = 'smollm2-dolly'")
    assert notebook(edited, edited, parameters=edited) == resolve(preset="smollm2-dolly")
    assert notebook(PARAMETERS, PARAMETERS) == resolve()
    general = FIELDS["max_steps"].default
    assert notebook(f"max_steps = {general}", edited).max_steps == general
    all_but_one = "\n".join(line for line in edited.splitlines() if not line.startswith("seed:"))
    assert notebook(all_but_one, parameters=edited) == resolve({n: f.default for n, f in FIELDS.items() if n != "seed"}, preset="smollm2-dolly")

def test_the_value_is_the_last_one_assigned():
    assert notebook("seed = 1", "seed = 2").seed == 2 and notebook("seed = 1", "seed: int = 0").seed == 0

def test_papermills_own_names_and_cells_that_are_no_python_are_let_through():
    cells = ["", "%matplotlib inline", "!ls", "def f():\n    x = 1", PARAMETERS, "PAPERMILL_OUTPUT_PATH = 'runs/x.ipynb'", "broken ("]
    variables = {n: f.default for n, f in FIELDS.items()} | {"PAPERMILL_OUTPUT_PATH": "runs/x.ipynb"}
    assert from_notebook([*cells, ""], variables) == resolve()

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
