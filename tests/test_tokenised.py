"Tokenised data as an artefact: the same ids as without, made once, and another key for whatever changes them."
import pytest
from mgsr_nb import run as R
import mgsr_nb.run.setup
from mgsr_nb.config import resolve
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
