"""Data: prompts, records, files, and splits that share no question."""
import json, os
from collections import Counter
from pathlib import Path
import pytest
from toy_tokenizers import byte_level
from mgsr_nb import data as D
from mgsr_nb.data import DataError, Example, alpaca_prompt, load_eval_set, load_train, make_prompt, normalised, read_jsonl, subset_note

PARIS = Example("1", "What is the capital of France?", references=("Paris is the capital.", "Paris"))
CHAT = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path

def test_prompt_with_and_without_input():
    assert alpaca_prompt("Do it.") == ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
                                       "### Instruction:\nDo it.\n\n### Response:\n")
    assert alpaca_prompt("Do it.", "x") == ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
                                            "appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nx\n\n### Response:\n")
    assert make_prompt(PARIS) == alpaca_prompt(PARIS.instruction)

def test_chat_prompt_and_its_errors():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="chat template"): make_prompt(PARIS, "chat", tokenizer)
    with pytest.raises(ValueError, match="allowed: alpaca, chat"): make_prompt(PARIS, "llama")
    tokenizer.chat_template = CHAT
    try: assert make_prompt(Example("1", "Sum up.", "A text."), "chat", tokenizer) == "<s>Sum up.\n\nA text.\nanswer:"
    finally: tokenizer.chat_template = None

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
    (json.dumps({"instruction": "a", "output": "b"}).encode(), "line 1, field 'input': missing"),
    (json.dumps({**GOOD, "instruction": 3}).encode(), "line 1, field 'instruction': expected a string, found int"),
    (json.dumps({**GOOD, "output": None}).encode(), "line 1, field 'output': expected a string, found NoneType"),
    (json.dumps({**GOOD, "output": ["a", 1]}).encode(), "line 1, field 'output': expected a string, found int"),
    (json.dumps({**GOOD, "output": []}).encode(), "line 1, field 'output': an empty list"),
    (b'{"instruction": "\\ud83d", "input": "", "output": "b"}', "line 1, field 'instruction': has an unpaired surrogate"),
], ids=range(12))
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
    assert splits.report == dict(data="dolly", records=6, train=2, validation=2, test=1, dropped=4, dropped_exact=2, validation_in_test=1, categories={"open_qa": 2})

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
    wanted = dict(records=15_011, train=13_420, validation=1_000, test=500, dropped=1_591, dropped_exact=1_406, validation_in_test=4)
    assert {k: splits.report[k] for k in wanted} == wanted
    sizes = {name: len(load_eval_set(name, REAL)) for name in D.EVAL_SETS if name != "tiny"}
    assert sizes == dict(dolly=500, self_inst=242, vicuna=80, sinst=1_694, uinst=1_050)
    assert subset_note("uinst", load_eval_set("uinst", REAL)) and not subset_note("sinst", load_eval_set("sinst", REAL))
    for name, source in {**D.EVAL_SETS, "dev": D.TRAIN_SETS["dolly"]["validation"]}.items():  # our prompts are the files' own
        if name == "tiny": continue
        for _, row in read_jsonl(Path(REAL) / source.path): assert alpaca_prompt(row["instruction"], row.get("input", "")) == row["prompt"]

