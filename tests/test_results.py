"What a run leaves is read as it was written, and a place that cannot be written is named."
import html.parser, json, os
from pathlib import Path
import nbformat, pytest
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.folder import open_run
from mgsr_nb.run.folder import read_metrics
from mgsr_nb.run.results import WHO, Card, read_samples, run_card, shortened

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


# ---- the card

EXAMPLE = ROOT/"runs"/"examples"/"quickstart"

class Shown(html.parser.HTMLParser):
    "Text, tags and attributes of a piece of HTML; every tag that opens must close."
    def __init__(self, text):
        super().__init__()
        self.words, self.found, self.open = "", [], []
        self.feed(text)
        assert self.open == []
    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.found.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.words += data

def test_the_card_has_the_scores_the_texts_and_the_cost_of_the_run():
    import pandas as pd
    metrics, log = read_metrics(EXAMPLE), pd.read_csv(EXAMPLE/"log.csv")
    card, answers = run_card(EXAMPLE), read_samples(EXAMPLE)
    first = [a["prediction"] for a in answers if a["id"] == answers[0]["id"]]
    assert len(first) == len(set(first)) == 3
    for text in (str(card), Shown(card._repr_html_()).words):
        for who, name in WHO.items():
            m = metrics[who]
            assert name in text and f"{m['validation']['nll']:.3f}" in text
            assert f"{m['validation']['kl']:.3f}" in text and f"{m['average']['rouge_l']:.1f}" in text
        for prediction in first: assert shortened(prediction) in text
        assert f"{round(log.data_tokens.sum() + log.distilled_tokens.sum()):,} trained" in text
        assert f"{sum(metrics['seconds'].values()) / 60:.1f} minutes" in text and "20 steps of 4" in text

def test_the_card_needs_nothing_else_and_its_curve_is_that_of_the_log():
    import pandas as pd
    log = pd.read_csv(EXAMPLE/"log.csv")
    shown = Shown(run_card(EXAMPLE)._repr_html_())
    assert not {"script", "img", "link", "style"} & {tag for tag, _ in shown.found}
    assert not [a for _, a in shown.found if {"src", "href", "class"} & set(a)]
    lines = [a["points"].split() for tag, a in shown.found if tag == "polyline"]
    assert [len(line) for line in lines] == [log[c].notna().sum()
        for c in ("loss", "validation_nll", "validation_kl")]
    heights = [[110 - float(p.split(",")[1]) for p in line] for line in lines]
    assert heights[2][-1] / heights[1][0] == pytest.approx(log.validation_kl.iloc[-1]
        / log.validation_nll[0], abs=.01)
    [alt] = [a["aria-label"] for tag, a in shown.found if tag == "svg"]
    assert f"{log.validation_kl[0]:.2f} to {log.validation_kl.iloc[-1]:.2f} nats" in alt

def test_a_text_that_looks_like_html_stays_text():
    scores = {name: (1., 2., 3.) for name in WHO.values()}
    card = Card("<b>x</b>", scores, {}, "1 < 2", {"teacher": "<script>alert(1)</script>"}, "a & b")
    shown = Shown(card._repr_html_())
    assert "<script>alert(1)</script>" in shown.words and "a & b" in shown.words
    assert "script" not in {tag for tag, _ in shown.found}

def test_a_long_text_is_cut_behind_a_word():
    assert shortened("one\n two") == "one two" and shortened("word " * 100, 12) == "word word …"

def test_the_training_notebook_ends_with_the_card():
    last = nbformat.read(ROOT/"nbs"/"train.ipynb", 4).cells[-1].source
    seen = []
    exec(last, {"folder": EXAMPLE, "run_card": run_card, "display": seen.append})
    assert isinstance(seen[0], Card)
    exec(last, {"folder": None, "run_card": run_card, "display": seen.append})
    assert len(seen) == 1
