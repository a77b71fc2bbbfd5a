"Tokenised data as an artefact: the same ids as without, made once, and another key for whatever changes them."
import json
import pytest
from mgsr_nb import run as R
import mgsr_nb.run.setup
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.data import Example
from mgsr_nb.tokens import encode
from toy_tokenizers import byte_level

MANY = [Example(f"e{i}", f"Add {i} and {i * 7 % 13}.", "", (f"It is {i + i * 7 % 13}.", "no")) for i in range(1000)]

@pytest.fixture
def counted(tmp_path, monkeypatch):
    "The examples that were encoded one by one."
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(R.setup, "encode", lambda e, *args: calls.append(e.id) or encode(e, *args))
    return calls

def test_ids_are_those_of_encode_and_made_once(counted):
    tokenizer, config = byte_level(), resolve(max_prompt_tokens=60, max_tokens=100)
    expected = [encode(e, tokenizer, "alpaca", 60, 100) for e in MANY]
    assert R.setup.tokenised(MANY, tokenizer, config) == expected and len(counted) == 1000
    assert R.setup.tokenised(MANY, byte_level(), config) == expected and len(counted) == 1000

@pytest.mark.parametrize("change", ["limits", "tokenizer", "text", "references"])
def test_another_key_for_whatever_changes_the_ids(change, counted):
    tokenizer, config, examples = byte_level(), resolve(max_prompt_tokens=60, max_tokens=100), MANY
    R.setup.tokenised(examples, tokenizer, config)
    if change == "limits": config = resolve(max_prompt_tokens=61, max_tokens=100)
    if change == "tokenizer": tokenizer = byte_level(bos=True)
    if change == "text": examples = [*MANY[:-1], Example("e999", "Another one.", "", ("x",))]
    if change == "references": examples = [*MANY[:-1], Example("e999", MANY[-1].instruction, "", ("x",))]
    assert R.setup.tokenised(examples, tokenizer, config) == [encode(e, tokenizer, "alpaca", config.max_prompt_tokens, 100) for e in examples]
    assert len(counted) == 2000

def test_a_few_examples_are_not_worth_a_file(counted, tmp_path):
    R.setup.tokenised(MANY[:999], byte_level(), resolve())
    assert not list(tmp_path.rglob("*.json"))

LONG = "A text of a few words that goes on and on. " * 40

def mixed(n):
    "Every third prompt is shortened, every fifth does not fit."
    return [Example(f"e{i}", "Count " + "them " * (200 * (i % 5 == 4)), LONG if i % 3 == 0 else "", ("x",)) for i in range(n)]

SHORT = dict(max_prompt_tokens=100, max_tokens=120)

def test_prompts_that_do_not_fit_are_none_also_from_the_artefact(counted):
    config, tokenizer, few, many = resolve(SHORT), byte_level(), mixed(20), mixed(1005)
    assert [e is None for e in R.setup.tokenised(few, tokenizer, config)] == [i % 5 == 4 for i in range(20)]
    first, again = (R.setup.tokenised(many, tokenizer, config) for _ in range(2))
    assert first == again and first[:20] == R.setup.tokenised(few, tokenizer, config) and len(counted) == 20 + 1005 + 20
    assert [e.cut for e in again if e] == [i % 3 == 0 for i in range(1005) if i % 5 != 4]

@pytest.mark.parametrize("change", [dict(shorten="end"), dict(shorten="beginning"), dict(template="chat", chat_date="2030-01-31")])
def test_another_key_for_another_treatment(change, counted):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}:"
    try:
        base = {k: "chat" for k in change if k == "template"}
        a, b = (R.setup.tokenised(mixed(1000), tokenizer, resolve(SHORT | p)) for p in (base, change))
    finally: tokenizer.chat_template = None
    assert len(counted) == 2000 and a != b

def test_the_next_ones_take_the_place_of_those_that_do_not_fit(counted):
    found = R.setup.tokenised(mixed(50), byte_level(), resolve(SHORT), wanted=8)
    assert [e.example.id for e in found if e] == ["e0", "e1", "e2", "e3", "e5", "e6", "e7", "e8"] and len(found) == 9 == len(counted)

def own(folder, **sets):
    "A folder of data: {file: records}."
    for name, rows in sets.items():
        path = folder/{"train": "dolly/databricks-dolly-15k.jsonl", "dev": "dolly/dev.jsonl"}.get(name, f"{name}/valid.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"response": "r", "output": "r", **r}) + "\n" for r in rows), encoding="utf-8")

def records(name, n, long=0, too_long=0):
    return [{"instruction": f"{name} {i}" + " word" * (300 * (i < too_long)), "input": (x := LONG if too_long <= i < too_long + long else ""), "context": x} for i in range(n)]

def test_a_run_says_how_many_prompts_were_shortened_and_dropped_and_which_files_were_read(counted, tmp_path):
    own(tmp_path/"d", train=records("t", 30, 4, 2), dev=records("v", 5), dolly=records("x", 6, 1), uinst=records("u", 4, 0, 3), uinst_11=records("w", 8, 2, 3))
    config = resolve(SHORT, data="dolly", data_dir=str(tmp_path/"d"), eval_sets="dolly,uinst", eval_prompts=4)
    with pytest.warns(UserWarning, match="uinst: 3 of 7 prompts are dropped: template and instruction alone are longer than max_prompt_tokens") as said:
        train, validation, tests, report = R.setup.load_data(config, byte_level())
    assert report["prompts"] == {"training": {"shortened": 4, "dropped": 2}, "validation": {"shortened": 0, "dropped": 0}, "dolly": {"shortened": 1, "dropped": 0}, "uinst": {"shortened": 2, "dropped": 3}}
    assert [len(train), len(validation), {n: len(e) for n, e in tests.items()}] == [28, 4, {"dolly": 4, "uinst": 4}]
    assert report["eval_files"] == {"dolly": "dolly/valid.jsonl", "uinst": "uinst_11/valid.jsonl"} and report["files"]["train"] == "dolly/databricks-dolly-15k.jsonl"
    assert report["notes"] == [str(w.message) for w in said] and any(n.startswith("uinst: references of at most 1 word;") for n in report["notes"])
    assert json.loads(json.dumps(report)) == report

@pytest.mark.parametrize("empty,name", [("train", "training"), ("dev", "validation"), ("uinst", "uinst")])
def test_a_set_of_which_nothing_is_left_is_refused_by_its_name(counted, tmp_path, empty, name):
    sets = {"train": records("t", 3), "dev": records("v", 3), "dolly": records("x", 3), "uinst": records("u", 3)}
    own(tmp_path/"d", **sets | {empty: records(empty, 3, 0, 3)})
    config = resolve(SHORT, data="dolly", data_dir=str(tmp_path/"d"), eval_sets="dolly,uinst")
    with pytest.raises(ConfigError, match=f"^max_prompt_tokens: none of the 3 prompts of {name} fits into 100 tokens"): R.setup.load_data(config, byte_level())

def test_a_whole_run_with_shortened_prompts_says_so(config):
    "Of the first nine examples six fit, two lose the middle of their input, and one has too long an instruction."
    from mgsr_nb.run.results import run
    metrics = run(config("llama", shorten="middle", max_prompt_tokens=110, max_tokens=124), cpu=True)
    assert metrics["data"]["prompts"]["training"] == {"shortened": 2, "dropped": 1} and metrics["config"]["shorten"] == "middle"
    assert metrics["data"]["prompts"].keys() == {"training", "validation", "tiny"} and metrics["data"]["eval_files"] == {"tiny": "tiny_instruct/test.jsonl"}
