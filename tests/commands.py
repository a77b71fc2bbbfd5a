"Programs as a user starts them, and what they leave in an executed notebook."
import subprocess, sys
from pathlib import Path
from mgsr_nb.config import RunConfig, resolve

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FIELDS = RunConfig.model_fields
# what is typed -> the parameter that the message begins with, and a word of the message
WRONG = {
    "typo": ("-p dac_wieght 0.5", "dac_wieght", "did you mean 'dac_weight'?"),
    "word": ("-p dac_weight high", "dac_weight", "allowed: a number >= 0"),
    "negative": ("-p dac_weight -1", "dac_weight", "allowed: a number >= 0"),
    "limits": ("-p clip_upper 0.1 -p clip_lower 0.9", "clip_lower", "clip_upper: 0.1"),
    "preset": ("-p preset nope", "preset", "allowed: one of quickstart"),
    "text": ("-p scrg true", "scrg", "True or False")}

def flags(parameters):
    "Papermill's words for parameters."
    return [word for name, value in parameters.items() for word in ("-p", name, str(value))]

def command(project, *words, env=None, **kw):
    "A program of the environment, run in the `project` of that fixture."
    options = dict(cwd=project.root, env=env or project.env, capture_output=True, text=True,
                   stdin=subprocess.DEVNULL, timeout=170) | kw
    return subprocess.run([str(BIN/words[0]), *words[1:]], **options)

def config_of(project, **more):
    "The configuration of a run of the project, for calls in this process."
    return resolve(project.parameters | dict(runs_dir=str(project.root/"runs")) | more)

def code_cells(notebook): return [c for c in notebook.cells if c.cell_type == "code"]

def errors(notebook):
    return [o for c in code_cells(notebook) for o in c.outputs if o.output_type == "error"]

def text_of(notebook):
    return "".join(o.get("text", "") for c in code_cells(notebook) for o in c.outputs)
