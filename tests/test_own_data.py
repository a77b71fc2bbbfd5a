"""Data of one's own: files as people have them, data sets of the hub, and a run on them. What cannot be understood is refused
in one sentence, and nothing ends in a traceback."""
import json
import pytest
from tiny_runs import save_pair, tiny_parameters
from user_files import GOOD, N, PAIRS, QUESTION, REFUSED, TURNS, lines, rows
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.data import DataError
from mgsr_nb.own_data import load_own, load_splits

@pytest.fixture
def file(tmp_path):
    def write(name, content):
        (tmp_path/name).write_bytes(content)
        return str(tmp_path/name)
    return write

def everything(splits): return splits.train + splits.validation + splits.test

def test_the_table_is_large():
    "At least 40 files, and each suffix among those that are read and among those that are refused."
    assert len(GOOD) + len(TURNS) + len(REFUSED) >= 70
    for cases in (GOOD, REFUSED): assert {n.rpartition(".")[2] for n in cases} >= {"jsonl", "json", "csv", "parquet"}

@pytest.mark.parametrize("name", GOOD)
def test_a_file_is_understood_and_the_line_says_how(file, name):
    content, kept, words = GOOD[name]
    splits = load_own(file(name, content))
    said, found = splits.report["understood"], everything(splits)
    assert said.startswith(f"{name}: ") and words in said, said
    assert len(found) + splits.report["dropped"] == kept and min(map(len, (splits.train, splits.validation, splits.test))) > 0
    assert splits.report["records"] == kept + sum(splits.report["lost"].values()) and not any(e.turns for e in found)
    assert len({e.id for e in found}) == len(found) and all(e.references[0].strip() for e in found)
    assert bool(splits.report["lost"]) == bool([note for note in splits.report["notes"] if "left out" in note])
    asked = {e.instruction for e in found}
    assert {QUESTION, PAIRS[2][0]} <= asked, asked

@pytest.mark.parametrize("name", TURNS)
def test_chats_keep_their_turns_and_need_a_chat_template(file, name):
    content, roles = TURNS[name]
    path = file(name, content)
    found = everything(load_own(path))
    assert len(found) == N and {tuple(r for r, _ in e.turns) for e in found} == {tuple(roles)}
    assert {(e.turns[-1][1], e.references[0]) for e in found} == set(PAIRS)
    with pytest.raises(DataError, match=f"^template: {N} records .* alpaca cannot write; allowed: chat$"): load_splits(path, template="alpaca")

@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_understood_is_refused_in_a_sentence_that_names_the_file(file, name):
    content, words = REFUSED[name]
    path = file(name, content)
    with pytest.raises(DataError) as e: load_own(path)
    assert path in str(e.value) and words in str(e.value) and "\n" not in str(e.value), str(e.value)

def test_tables_keep_what_was_written(file):
    "007 is text, NA is text, and a text of several lines is one."
    found = {e.references[0] for e in everything(load_own(file("x.csv", GOOD["words that pandas takes for nothing.csv"][0])))}
    assert found == {"NA", "null", "nan", "007"}
    assert all(e.references[0].endswith('\n"so", he said') for e in everything(load_own(file("y.csv", GOOD["line breaks and quotes.csv"][0]))))
    assert {e.references[0] for e in everything(load_own(file("z.jsonl", GOOD["numbers.jsonl"][0])))} == {str(i) for i in range(N)}

def test_squads_answers_and_several_are_references(file):
    assert {e.references for e in everything(load_own(file("x.jsonl", GOOD["several answers.jsonl"][0])))} == {(a, "x") for _, a in PAIRS}
    assert {(e.input, e.references) for e in everything(load_own(file("y.jsonl", GOOD["squad.jsonl"][0])))} == {("c", (a,)) for _, a in PAIRS}

# --- the split

def ids(splits): return [[e.id for e in part] for part in (splits.train, splits.validation, splits.test)]

def test_the_split_is_a_function_of_the_seed_and_questions_stay_on_one_side(file):
    asked = [{"question": f"Q{i // 2}", "answer": str(i)} for i in range(400)]
    path = file("x.jsonl", lines(asked))
    first, again, other = load_own(path, 0), load_own(path, 0), load_own(path, 1)
    assert ids(first) == ids(again) != ids(other)
    assert [len(x) for x in ids(first)] == [320, 40, 40]
    sides = [{e.instruction for e in part} for part in (first.train, first.validation, first.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])

def test_at_most_a_thousand_questions_are_held_out(file):
    splits = load_own(file("x.jsonl", lines([{"question": f"What is {i} plus {i}?", "answer": str(i)} for i in range(12_000)])))
    assert [len(x) for x in ids(splits)] == [10_000, 1000, 1000]

# --- the hub

@pytest.fixture
def hub(monkeypatch):
    "`hub(splits)`: what `datasets` loads, whatever it is asked for; a list of what it was asked for."
    import datasets
    asked = []
    def be(splits):
        def load(*args, **kw):
            asked.append(args)
            if isinstance(splits, Exception): raise splits
            return datasets.DatasetDict({name: datasets.Dataset.from_list(found) for name, found in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked
    return be

def test_a_data_set_of_the_hub_keeps_its_own_splits_and_lacks_none(hub):
    asked = hub({"train": rows(), "test": [{"question": "Why?", "answer": "So."}], "extra": rows()})
    splits = load_own("some/questions:main")
    assert asked == [("some/questions", "main")] and [e.instruction for e in splits.test] == ["Why?"]
    said = splits.report["understood"]
    assert len(splits.train) == 18 and len(splits.validation) == 2 and "splits not used: extra" in said and "cut by split_seed 0" in said

def test_a_single_split_is_the_training_set_whatever_it_is_called(hub):
    hub({"all": rows()})
    assert [len(x) for x in ids(load_own("some/questions"))] == [16, 2, 2]
    hub({"one": rows(), "two": rows()})
    with pytest.raises(DataError, match="has the splits one, two, and none is called train"): load_own("some/questions")

def test_what_the_hub_refuses_is_a_sentence(hub):
    hub(ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"))
    with pytest.raises(DataError) as e: load_own("openai/gsm8k")
    assert str(e.value).startswith("data: cannot load openai/gsm8k from the hub (ValueError: Config name is missing. Please pick") and "\n" not in str(e.value)

# --- runs

@pytest.fixture
def no_kernel(monkeypatch):
    import papermill
    def start(*args, **kw): raise AssertionError("a kernel was started")
    monkeypatch.setattr(papermill.clientwrap.PapermillNotebookClient, "execute", start)

def test_mgsr_run_refuses_a_file_before_a_kernel_starts(file, tmp_path, monkeypatch, ends, no_kernel):
    monkeypatch.chdir(tmp_path)
    for name, (content, words) in list(REFUSED.items())[::4]:
        file(name, content)
        status, _, error = ends("-p", "data", name, "-p", "runs_dir", "runs")
        assert status == 2 and words in error and len(error.splitlines()) == 1
    file("two turns.jsonl", TURNS["two turns.jsonl"][0])
    status, _, error = ends("-p", "data", "two turns.jsonl")
    assert status == 2 and "template: 20 records" in error and not (tmp_path/"runs").exists()

@pytest.mark.parametrize("data,words", [
    ("missing.csv", "data: 'missing.csv': there is no such file"), ("mine.xlsx", "data: got 'mine.xlsx'; allowed: tiny, dolly, lab, a file that ends with .jsonl"), ("dolyl", "did you mean 'dolly'?"),
    ("folder", "data: got 'folder', which is a folder"), ("folder.json", "is a folder"), ("a/b", "data: 'a/b' is a folder")])
def test_what_is_no_file_and_no_hub_id_is_refused(tmp_path, monkeypatch, data, words):
    for name in ("folder", "folder.json", "a/b"): (tmp_path/name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as e: resolve(data=data)
    assert words in str(e.value)

def test_a_run_on_a_file_scores_its_own_test_part_and_records_what_was_understood(file, config, tmp_path):
    from mgsr_nb.run.results import read_samples, run
    path = file("mine.jsonl", lines([*rows(), {"question": "Why?", "answer": " "}]))
    with pytest.warns(UserWarning, match="mine.jsonl: 1 left out"): metrics = run(config(data=path, run_name="own"), cpu=True)
    assert list(metrics["student"]["test"]) == ["own"] and metrics["data"]["eval_files"] == {"own": "mine.jsonl"} and metrics["data"]["train"] == 16
    assert metrics["data"]["lost"] == {"with an answer of white space only": 1} and str(tmp_path) not in json.dumps(metrics["data"])
    test = {e.instruction for e in load_own(path).test}
    assert {s["instruction"] for s in read_samples(tmp_path/"runs"/"own")} == test and len(test) == 2

def test_a_run_on_chats_trains_on_their_last_answers(file, tmp_path, monkeypatch):
    "The tokenizer's own template writes the turns, system message included."
    from transformers import AutoTokenizer
    from mgsr_nb.run.results import run
    from mgsr_nb.run.setup import load_data
    from mgsr_nb.models import load_tokenizer
    teacher = save_pair(tmp_path/"pair", "llama")[0]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant> "
    tokenizer.save_pretrained(teacher)
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    path = file("chats.jsonl", TURNS["two turns.jsonl"][0])
    c = resolve(tiny_parameters(tmp_path/"runs", teacher, data=path, template="chat", max_prompt_tokens=90))
    train, *_ = load_data(c, load_tokenizer(teacher))
    assert "<user> Hello.\n<assistant> Hi.\n<user> What is" in tokenizer.decode(train[0].prompt_ids)
    assert run(c, cpu=True)["student"]["test"].keys() == {"own"}
    tokenizer.chat_template = "{{ raise_exception('no such turns') if messages|length > 1 else '' }}<assistant>"
    tokenizer.save_pretrained(teacher)
    with pytest.raises(DataError, match="refuses turns of user, assistant, user .no such turns"): load_data(c, load_tokenizer(teacher))
