"What a run leaves is read as it was written, and a place that cannot be written is named."
import json, os
from pathlib import Path
import nbformat, pytest
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.folder import open_run
from mgsr_nb.run.results import read_samples

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["42", "007", "1e5", "-3.5", "NaN", "Infinity", "true", "null", "2026-01-01", "", "a\u2028b",
    "c\x85d"]

def samples(folder, texts):
    "samples.jsonl as a run writes it, with these predictions of all three models."
    rows = [{"of": who, "set": "tiny", "seed": 10, "id": str(i), "instruction": f"Task {i}.",
        "prediction": text, "date": text} for who in ("student_start", "student", "teacher")
        for i, text in enumerate(texts)]
    (folder/"samples.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        + "\n", encoding="utf-8")
    return rows

def last_cell():
    notebook = nbformat.read(ROOT/"nbs"/"train.ipynb", 4)
    return next(c.source for c in notebook.cells if "samples" in c.source and ".pivot(" in c.source)

def test_answers_are_read_as_the_text_that_they_are(tmp_path):
    rows = samples(tmp_path, TEXTS)
    assert read_samples(tmp_path) == rows
    assert all(type(r["prediction"]) is type(r["id"]) is str for r in read_samples(tmp_path))

@pytest.mark.parametrize("texts", [["42", "7", "0", "13"], ["1.5", "2e3"], ["true", "false"],
    ["NaN", "null"], ["2026-01-01"], TEXTS], ids=["whole", "float", "bool", "none", "date", "mixed"])
def test_the_last_cell_of_the_notebook_shows_answers_that_look_like_something_else(texts, tmp_path):
    "All of a kind, so that a reader which guesses types would guess one."
    import pandas as pd
    samples(tmp_path, texts)
    seen = []
    exec(last_cell(), {"folder": tmp_path, "pd": pd, "read_samples": read_samples,
        "display": seen.append})
    [table] = seen
    assert list(table.data["student"]) == texts[:4] and "Task 0." in table.to_html()

@pytest.mark.parametrize("overwrite", [False, True])
def test_runs_that_cannot_be_written_are_one_sentence(overwrite, tmp_path):
    (tmp_path/"runs").write_text("a file", encoding="utf-8")
    c = resolve(runs_dir=str(tmp_path/"runs"), overwrite=overwrite)
    with pytest.raises(ConfigError, match="^runs_dir: the run's folder .* cannot be written"):
        open_run(c)

def test_an_unfinished_run_of_somebody_else_is_refused_and_a_finished_one_is_read(tmp_path,
        monkeypatch):
    c = resolve(runs_dir=str(tmp_path))
    folder = open_run(c)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="^runs_dir: .*another user's"): open_run(c)
    (folder/"metrics.json").write_text("{}", encoding="utf-8")
    assert open_run(c) == folder
