"""Data: records, files, and splits that share no question."""
import json, os
from collections import Counter
from pathlib import Path
import pytest
from mgsr_nb import data as D
from mgsr_nb.parameters import PAPER_SET_NAMES
from mgsr_nb.data import DataError, Example, blank_note, load_eval_set, load_train, normalised, place_of, read_jsonl, subset_note, without_overlap
from mgsr_nb.tokens import alpaca_prompt

def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path

def test_missing_file_names_path_and_data_dir(tmp_path):
    with pytest.raises(FileNotFoundError) as e: load_eval_set("vicuna", tmp_path)
    assert str(tmp_path / "vicuna/valid.jsonl") in str(e.value) and "data_dir" in str(e.value)
    with pytest.raises(FileNotFoundError, match="databricks-dolly-15k.jsonl"): load_train("dolly", tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"): read_jsonl(tmp_path / "nothing.jsonl")

GOOD = {"instruction": "a", "input": "", "output": "b"}
@pytest.mark.parametrize("content,message", [
    (b"", "no records"), (b"\n \n", "no records"),
    (json.dumps(GOOD).encode() + b'\n{"instruction": \n', "line 2: not JSON"),
    (json.dumps(GOOD).encode() + b"\n\n[1]\n", "line 3: a JSON list"),
    (b'{"instruction": "caf\xe9", "input": "", "output": "b"}\n', "line 1: not UTF-8"),
    (json.dumps({"instruction": "a", "input": ""}).encode(), "line 1, field 'output': missing"),
    (json.dumps({**GOOD, "input": ["x"]}).encode(), "line 1, field 'input': expected a string, found list"),
    (json.dumps({**GOOD, "category": 3, "id": 1.5}).encode(), "line 1, field 'id': expected a string, found float"),
    (json.dumps({**GOOD, "instruction": None}).encode(), "line 1, field 'instruction': expected a string, found NoneType"),
    (json.dumps({"instruction": "a", "context": "x", "output": "b"}).encode(), "the input is read from the field 'input', which no record has, and there are texts in 'context': rename it"),
    (json.dumps({**GOOD, "instruction": 3}).encode(), "line 1, field 'instruction': expected a string, found int"),
    (json.dumps({**GOOD, "output": None}).encode(), "line 1, field 'output': expected a string, found NoneType"),
    (json.dumps({**GOOD, "output": ["a", 1]}).encode(), "line 1, field 'output': expected a string, found int"),
    (json.dumps({**GOOD, "output": []}).encode(), "line 1, field 'output': an empty list"),
    (b'{"instruction": "\\ud83d", "input": "", "output": "b"}', "line 1, field 'instruction': has an unpaired surrogate"),
], ids=range(15))
def test_bad_files_are_refused_with_line_and_field(tmp_path, content, message):
    (tmp_path / "sinst").mkdir(); (tmp_path / "sinst/valid.jsonl").write_bytes(content)
    with pytest.raises(DataError) as e: load_eval_set("sinst", tmp_path)
    assert message in str(e.value) and str(tmp_path / "sinst/valid.jsonl") in str(e.value)

def test_records_keep_every_character(tmp_path):
    row = {"instruction": "line\u2028separator  ", "input": "{x}\r\n", "output": [" a ", "😀"], "topic": "t"}
    (tmp_path / "sinst").mkdir(); (tmp_path / "sinst/valid.jsonl").write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    [e] = load_eval_set("sinst", tmp_path)
    assert (e.instruction, e.input, e.references, e.id) == (row["instruction"], row["input"], (" a ", "😀"), "sinst-00001")

def test_vicuna_has_no_input_and_unni_has_a_limit(tmp_path, monkeypatch):
    write(tmp_path / "vicuna/valid.jsonl", [{"instruction": "Why?", "category": "fermi", "prompt": "", "output": "So."}])
    assert load_eval_set("vicuna", tmp_path) == [Example("vicuna-00001", "Why?", "", ("So.",), "fermi")]
    write(tmp_path / "uinst/valid.jsonl", [{**GOOD, "instruction": str(i)} for i in range(10_003)])
    assert [e.instruction for e in load_eval_set("uinst", tmp_path)][-1] == "9999"

def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="allowed: tiny, dolly, self_inst, vicuna, sinst, uinst"): load_eval_set("self-inst")
    with pytest.raises(ValueError, match="allowed: tiny, dolly"): load_train("Dolly")

def test_subset_note():
    short, long = Example("1", "a", references=("one",)), Example("2", "a", references=("w " * 11,))
    assert "NOT" in subset_note("uinst", [short]) and "1 word;" in subset_note("uinst", [short])
    assert subset_note("uinst", [short, long]) == "" and subset_note("dolly", [short]) == ""

def test_data_of_ones_own_need_no_category(tmp_path):
    "Only the question, what it is about, and the answer."
    write(tmp_path/"dolly/databricks-dolly-15k.jsonl", [{"instruction": f"What is {n}?", "context": "", "response": "A number."} for n in range(4)])
    for name in ("dev", "valid"): write(tmp_path/f"dolly/{name}.jsonl", [{"instruction": f"{name}?", "input": "", "output": "r"}])
    splits = load_train("dolly", tmp_path)
    assert [e.instruction for e in splits.train] == [f"What is {n}?" for n in range(4)] and {e.category for e in splits.train} == {""}
    assert load_eval_set("dolly", tmp_path)[0].references == ("r",)
    write(tmp_path/"dolly/databricks-dolly-15k.jsonl", [{"instruction": "a", "context": "", "response": "r", "category": 3}])
    with pytest.raises(DataError, match="field 'category': expected a string"): load_train("dolly", tmp_path)

def tiny_dolly(folder: Path):
    row = lambda i, c="", **kw: {"instruction": i, "context": c, "response": "r", "category": "open_qa", **kw}
    held = lambda i, x="": {"instruction": i, "input": x, "output": "r", "prompt": ""}
    write(folder / "dolly/databricks-dolly-15k.jsonl", [
        row("Who was Ada?", "A mathematician."),   # the dev record itself
        row("who was ADA", "A mathematician.[1]"), # its twin in other spelling
        row("Who was Ada?[2]"),                    # and with a citation mark
        row("What is 2+2?"),                       # the test record
        row("Who was Alan?"), row("What is 2 apples?")])
    write(folder / "dolly/dev.jsonl", [held("Who was Ada?", "A mathematician."), held("what is 2 + 2")])
    write(folder / "dolly/valid.jsonl", [held("What is 2+2?")])
    return folder

def test_dolly_training_records_that_share_a_question_with_dev_or_test_are_dropped(tmp_path):
    splits = load_train("dolly", tiny_dolly(tmp_path))
    assert [e.instruction for e in splits.train] == ["Who was Alan?", "What is 2 apples?"]
    assert [e.id for e in splits.train] == ["dolly-train-00005", "dolly-train-00006"]
    assert [e.instruction for e in splits.validation] == ["Who was Ada?", "what is 2 + 2"]
    assert splits.report == dict(data="dolly", records=6, train=2, validation=2, test=1, dropped=4, dropped_exact=2, validation_in_test=1, categories={"open_qa": 2},
                                 files={"train": "dolly/databricks-dolly-15k.jsonl", "validation": "dolly/dev.jsonl", "test": "dolly/valid.jsonl"},
                                 notes=["dolly: 4 of 6 training records (66.7%) are dropped: they ask a question of validation or test"])

# --- what is a question of the test

def own(folder, train, held=("Held?",)):
    "Data of one's own in the places of Dolly: records are instructions, or (instruction, input)."
    def fields(record): return (record, "") if isinstance(record, str) else record
    write(folder/"dolly/databricks-dolly-15k.jsonl", [{"instruction": i, "context": c, "response": "r"} for i, c in map(fields, train)])
    for name in ("dev", "valid"): write(folder/f"dolly/{name}.jsonl", [{"instruction": i, "input": c, "output": "r"} for i, c in map(fields, held)])
    return load_train("dolly", folder)

def test_templated_instructions_are_other_questions_with_other_inputs(tmp_path):
    "A tenth of 2,000 records is held out, and each comes twice: what goes are these, and no kind of task."
    templates = ("Summarise the text.", "List the names.", "Translate into French.", "Is it good or bad?")
    records = [(templates[i % 4], f"Text number {i} of a few words.") for i in range(2000)]
    splits = own(tmp_path, records, records[::10])
    assert splits.report["dropped"] == splits.report["dropped_exact"] == 200 and splits.report["notes"] == []
    assert {e.instruction for e in splits.train} == set(templates) and not {(e.instruction, e.input) for e in splits.train} & set(records[::10])

@pytest.mark.parametrize("held,left", [
    (("Sum up.", "one two three four five six"), [("Sum up.", "another text")]),                   # a few inputs, all of them others
    (("Sum up.", "ONE  two three[2] four five six"), [("Sum up.", "another text")]),               # another spelling
    (("Sum up.", "one two three four five six seven eight"), [("Sum up.", "another text")]),       # cut
    (("sum up", ""), []),                                                                                                      # no input: the instruction is the question
    (("Sum.", "another text"), [("Sum up.", "one two three four five six"), ("Sum up.", "another text")])])
def test_near_duplicates_of_a_question_are_dropped(held, left):
    train = [Example("x", *pair) for pair in [("Sum up.", "one two three four five six"), ("Sum up.", "another text")]]
    assert [(e.instruction, e.input) for e in without_overlap(train, [Example("y", *held)])] == left

def test_signs_tell_the_inputs_of_a_template_apart():
    train = [Example("x", "Compute.", f"{a} {sign} {b}") for a in (1, 2) for b in (3, 4) for sign in "+-*"]
    assert [e.input for e in without_overlap(train, [Example("y", "Compute.", "1 + 3")])] == [e.input for e in train if e.input != "1 + 3"]

def test_a_record_without_an_input_does_not_take_a_whole_template_with_it():
    train = [Example("x", "Sum up.", f"text {i}") for i in range(9)]
    assert without_overlap(train, [Example("y", "Sum up.", "")]) == train

@pytest.mark.parametrize("n,loud", [(1, False), (2, True)])
def test_losing_more_than_a_tenth_is_said(tmp_path, n, loud):
    splits = own(tmp_path, [f"Question {i}?" for i in range(10)], [f"Question {i}?" for i in range(n)])
    assert len(splits.train) == 10 - n and bool(splits.report["notes"]) is loud
    if loud: assert splits.report["notes"] == ["dolly: 2 of 10 training records (20.0%) are dropped: they ask a question of validation or test"]

def test_an_empty_training_set_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="dolly/databricks-dolly-15k.jsonl: no training record is left: all 3 ask a question of validation or test"):
        own(tmp_path, ["A?", "a?", "A"], ["A?"])

# --- files of one's own

def test_the_longer_file_is_read_where_it_lies_beside_the_short_one(tmp_path):
    "And the run's record says so; neither of the other places knows it."
    write(tmp_path/"uinst/valid.jsonl", [{**GOOD, "output": "No"}])
    source = D.EVAL_SETS["uinst"]
    assert load_eval_set("uinst", tmp_path)[0].references == ("No",) and place_of(source, tmp_path) == "uinst/valid.jsonl"
    write(tmp_path/"uinst_11/valid.jsonl", [{**GOOD, "output": "w " * 20}] * 2)
    assert len(load_eval_set("uinst", tmp_path)) == 2 and place_of(source, tmp_path) == "uinst_11/valid.jsonl" and place_of(source) == "MiniLLM/uinst/11_/valid.jsonl"
    (tmp_path/"uinst/valid.jsonl").unlink()
    assert len(load_eval_set("uinst", tmp_path)) == 2
    with pytest.raises(DataError, match="uinst_11/valid.jsonl, line 1, field 'output'"):
        write(tmp_path/"uinst_11/valid.jsonl", [{**GOOD, "output": 3}])
        load_eval_set("uinst", tmp_path)

def test_what_means_nothing_is_nothing(tmp_path):
    "Null and missing inputs, categories and ids; numbers as ids; the mark that some editors begin a file with."
    rows = [{"instruction": "a", "context": None, "response": "r", "category": None, "id": 7}, {"instruction": "b", "response": "r", "id": None}, {"instruction": "c", "context": "x", "response": "r", "id": 0}]
    path = write(tmp_path/"dolly/databricks-dolly-15k.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for name in ("dev", "valid"): write(tmp_path/f"dolly/{name}.jsonl", [{"instruction": f"{name}?", "output": "r"}])
    found = load_train("dolly", tmp_path).train
    assert [(e.id, e.instruction, e.input, e.category) for e in found] == [("7", "a", "", ""), ("dolly-train-00002", "b", "", ""), ("0", "c", "x", "")]

def test_an_id_is_the_same_as_a_number_and_as_text(tmp_path):
    write(tmp_path/"sinst/valid.jsonl", [{**GOOD, "id": 7}, {**GOOD, "id": "7"}])
    with pytest.raises(DataError, match="line 2, field 'id': '7' is that of line 1 too"): load_eval_set("sinst", tmp_path)

def test_references_of_white_space_are_counted(tmp_path):
    write(tmp_path/"dolly/databricks-dolly-15k.jsonl", [{"instruction": f"{i}?", "response": r} for i, r in enumerate(["r", " ", "\n\t", ""])])
    for name in ("dev", "valid"): write(tmp_path/f"dolly/{name}.jsonl", [{"instruction": "held?", "output": "r"}])
    assert load_train("dolly", tmp_path).report["notes"] == ["dolly, training: 3 of 4 references are white space only"]
    assert blank_note("x", [Example("1", "a", references=("r", " "))]) == ""

def test_normalised():
    assert normalised("  Who_was  Ada-Lovelace?![12] ") == "who was ada lovelace" == normalised("who was ADA: Lovelace")
    assert normalised("What is C++?") != normalised("What is it?") and normalised("???") != normalised("!!!")
    assert normalised("Wer ist Jürgen?") == "wer ist jürgen"

def test_tiny_needs_nothing_and_shares_no_question():
    splits, test = load_train("tiny"), load_eval_set("tiny")
    assert splits.report["dropped"] == splits.report["validation_in_test"] == 0 and splits.report["test"] == len(test)
    ids = Counter(e.id for e in [*splits.train, *splits.validation, *test])
    assert max(ids.values()) == 1 and all(e.references[0].strip() for e in [*splits.train, *test])
    assert load_train("tiny", "/no/such/folder").train == splits.train  # ships with the package, whatever data_dir says

def test_without_data_dir_the_hub_is_asked_by_name(monkeypatch):
    import datasets
    asked = []
    def fake(repo, data_files, split):
        asked.append((repo, data_files, split))
        if repo.startswith("databricks"): return [{"instruction": "a?", "context": "", "response": "r", "category": "c"}, {"instruction": "b", "context": "", "response": "r", "category": "c"}]
        return [{"instruction": "A", "input": "", "output": "r"}]
    monkeypatch.setattr(datasets, "load_dataset", fake)
    splits = load_train("dolly")
    assert [e.instruction for e in splits.train] == ["b"]
    for name in ("self_inst", "sinst", "uinst"): load_eval_set(name)
    assert asked == [("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl", "train"), ("MiniLLM/dolly", "raw.jsonl", "train[:1000]"),
                     ("MiniLLM/dolly", "valid.jsonl", "train"), ("MiniLLM/self-inst", "valid.jsonl", "train"),
                     ("MiniLLM/sinst", "11_/valid.jsonl", "train"), ("MiniLLM/uinst", "11_/valid.jsonl", "train")]

def test_a_hub_that_fails_is_an_error_that_says_what_to_do(monkeypatch):
    import datasets
    def fail(*a, **kw): raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"MiniLLM/Vicuna.*offline.*data_dir.*vicuna/valid.jsonl"): load_eval_set("vicuna")

REAL = os.environ.get("MGSR_TEST_DATA_DIR", "")
@pytest.mark.skipif(not REAL, reason="set MGSR_TEST_DATA_DIR to a folder with the real files")
def test_real_data():
    splits = load_train("dolly", REAL)
    wanted = dict(records=15_011, train=13_442, validation=1_000, test=500, dropped=1_569, dropped_exact=1_406, validation_in_test=2)
    assert {k: splits.report[k] for k in wanted} == wanted
    sizes = {name: len(load_eval_set(name, REAL)) for name in PAPER_SET_NAMES}
    long = (Path(REAL)/"uinst_11").is_dir()
    assert sizes == dict(dolly=500, self_inst=242, vicuna=80, sinst=1_694, uinst=135 if long else 1_050)
    assert bool(subset_note("uinst", load_eval_set("uinst", REAL))) is not long and not subset_note("sinst", load_eval_set("sinst", REAL))
    for name, source in {**D.EVAL_SETS, "dev": D.TRAIN_SETS["dolly"]["validation"]}.items():  # our prompts are the files' own
        if not source.repo: continue
        for _, row in read_jsonl(Path(REAL) / source.path): assert alpaca_prompt(row["instruction"], row.get("input", "")) == row["prompt"]

