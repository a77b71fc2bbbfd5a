import json, os
from collections import Counter
from pathlib import Path
import pytest, torch
from toy_tokenizers import byte_level, sentence_piece
from mgsr_nb import data as D
from mgsr_nb.data import DataError, Example, alpaca_prompt, load_eval_set, load_train, make_prompt, normalised, read_jsonl, subset_note
from mgsr_nb.tokens import Batch, batch_indices, bos_ids, collate, continuation_ids, cut_at_stop, encode, labels, prompt_ids, supervised

PARIS = Example("1", "What is the capital of France?", references=("Paris is the capital.", "Paris"))
CHAT = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
TOKENIZERS = {"byte_level": byte_level, "bos": lambda: byte_level(bos=True), "sentence_piece": sentence_piece}
every_tokenizer = pytest.mark.parametrize("tokenizer", [f() for f in TOKENIZERS.values()], ids=TOKENIZERS)
PAIRS = [([11, 12, 13], [21, 2]), ([14], [22, 23, 2]), ([15, 16], [24])]

def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path

def random_model(kind):
    "A tiny random causal model with learned absolute positions."
    from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig
    torch.manual_seed(0)
    if kind == "gpt2": config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    else: config = OPTConfig(vocab_size=50, max_position_embeddings=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)  # the default initialisation is too small to show a wrong position
    return model

def logits_of(model, batch):
    with torch.no_grad(): return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits

# --- pitfalls

@pytest.mark.pitfall(14)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_14_more_padding_columns_change_nothing(side):
    narrow = collate(PAIRS, 0, side)
    for wide in (collate(PAIRS, 0, side, width=11), collate([*PAIRS, ([1] * 9, [3] * 9)], 0, side)):
        T = narrow.input_ids.shape[1]
        cut = slice(-T, None) if side == "left" else slice(0, T)
        same = Batch(*(getattr(wide, n)[:3, cut] for n in ("input_ids", "attention_mask", "position_ids", "response_mask")))
        for name in ("input_ids", "attention_mask", "position_ids", "response_mask"):
            assert torch.equal(getattr(same, name), getattr(narrow, name)), name
        assert torch.equal(labels(wide)[:len(labels(narrow))], labels(narrow))
        assert supervised(wide)[:3].sum() == supervised(narrow).sum()

@pytest.mark.pitfall(17)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_17_no_pair_of_supervised_rows_crosses_a_border(side):
    "Supervised rows of a sequence are contiguous, start at its last prompt token and end before EOS: no pad, no other prompt token."
    batch = collate(PAIRS, 2, side)
    for (prompt, response), rows, ids, real in zip(PAIRS, supervised(batch), batch.input_ids, batch.attention_mask.bool()):
        where = rows.nonzero().flatten()
        assert where.tolist() == list(range(int(where[0]), int(where[0]) + len(response)))
        assert real[where].all() and ids[where[0]] == prompt[-1]
        assert ids[where + 1].tolist() == response

@pytest.mark.pitfall(18)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_18_poisoned_logits_change_only_the_term_of_the_next_token(side):
    batch = collate(PAIRS, 0, side)
    torch.manual_seed(0)
    logits = torch.randn(*batch.input_ids.shape, 30)
    def terms(z): return -z[supervised(batch)].log_softmax(-1).gather(-1, labels(batch)[:, None]).flatten()
    clean, order = terms(logits), supervised(batch).nonzero().tolist()
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            poisoned = logits.clone(); poisoned[b, t, 7] += 50
            changed = (terms(poisoned) != clean).nonzero().flatten().tolist()
            next_is_response = t + 1 < logits.shape[1] and bool(batch.response_mask[b, t + 1])
            assert changed == ([order.index([b, t])] if next_is_response else [])

@pytest.mark.pitfall(18)
def test_pitfall_18_first_response_token_supervised_prompt_not_after_eos_not():
    batch = collate([([11, 12], [21, 2])], 0, width=7)
    assert supervised(batch).tolist() == [[False, True, True, False, False, False, False]]
    assert labels(batch).tolist() == [21, 2]

@pytest.mark.pitfall(19)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_19_pad_equal_to_eos_keeps_the_closing_eos(side):
    eos = 2
    with_eos, other = collate(PAIRS, eos, side), collate(PAIRS, 49, side)
    for name in ("attention_mask", "position_ids", "response_mask"): assert torch.equal(getattr(with_eos, name), getattr(other, name))
    assert labels(with_eos).tolist() == [21, 2, 22, 23, 2, 24] == labels(other).tolist()
    assert with_eos.attention_mask.sum(1).tolist() == [5, 4, 3]  # the closing EOS is attended, later pads are not

@pytest.mark.pitfall(20)
def test_pitfall_20_cut_after_the_first_of_several_stop_ids():
    assert cut_at_stop([5, 6, 9, 7, 2, 8], [2, 9]) == [5, 6, 9]
    assert cut_at_stop([5, 6, 2, 2], {9, 2}) == [5, 6, 2]
    assert cut_at_stop((2, 5), [2]) == [2]
    assert cut_at_stop([5, 6], [2, 9]) == [5, 6] and cut_at_stop([], [2]) == [] and cut_at_stop([5], []) == [5]
    assert cut_at_stop([5, 9, 2], iter([2, 9])) == [5, 9]

@pytest.mark.pitfall(21)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_21_position_ids_make_padded_logits_equal_the_unpadded(kind, side):
    model, batch = random_model(kind), collate(PAIRS, 2, side, width=9)
    padded = logits_of(model, batch)
    for i, pair in enumerate(PAIRS):
        alone = logits_of(model, collate([pair], 2))[0]
        assert torch.allclose(padded[i][batch.attention_mask[i].bool()], alone, atol=1e-5)
    if side == "left" and kind == "gpt2":  # the check can fail: counting from the first column moves the logits
        batch.position_ids = torch.arange(9).expand(3, 9)
        assert (logits_of(model, batch) - padded)[batch.attention_mask.bool()].abs().max() > 0.1

@pytest.mark.pitfall(22)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_22_every_response_token_counts_whatever_the_prompt_length(side):
    pairs = [([1] * p, [2] * r) for p in (1, 2, 7) for r in (1, 3, 6)]
    batch = collate(pairs, 0, side)
    assert supervised(batch).sum(1).tolist() == [len(r) for _, r in pairs]
    assert len(labels(batch)) == sum(len(r) for _, r in pairs) and (labels(batch) == 2).all()

@pytest.mark.pitfall(23)
@every_tokenizer
@pytest.mark.parametrize("limit", [8, 12, 20])
def test_pitfall_23_truncation_keeps_the_end_of_the_template_and_a_response_token(tokenizer, limit):
    long = Example("1", "Count " + "the sheep " * 300, references=("one two three " * 200,))
    end = prompt_ids(make_prompt(long), tokenizer)[-limit + 1:]
    for max_tokens in (limit + 1, limit + 5):
        e = encode(long, tokenizer, max_prompt_tokens=limit, max_tokens=max_tokens)
        assert len(e.prompt_ids) == limit and e.prompt_ids[1:] == end
        assert len(e.response_ids) == max_tokens - limit and tokenizer.eos_token_id not in e.response_ids

@pytest.mark.pitfall(23)
@every_tokenizer
def test_pitfall_23_a_response_that_fits_ends_with_eos(tokenizer):
    e = encode(PARIS, tokenizer)
    n = len(e.prompt_ids) + len(e.response_ids)
    assert e.response_ids[-1] == tokenizer.eos_token_id and e.response_ids.count(tokenizer.eos_token_id) == 1
    exact, cut = (encode(PARIS, tokenizer, max_prompt_tokens=n - 2, max_tokens=m) for m in (n, n - 1))
    assert exact.response_ids == e.response_ids and cut.response_ids == e.response_ids[:-1]
    empty = encode(Example("2", "Say nothing.", references=("",)), tokenizer)
    assert empty.response_ids == [tokenizer.eos_token_id]

@pytest.mark.pitfall(24)
@every_tokenizer
@pytest.mark.parametrize("limit", [10, 400])
def test_pitfall_24_same_special_tokens_in_training_and_evaluation(tokenizer, limit):
    "What generation starts from (the prompt's ids) is what training puts before the response, BOS by the tokenizer's own convention."
    e = encode(PARIS, tokenizer, max_prompt_tokens=limit, max_tokens=600)
    expected = [tokenizer.bos_token_id] if tokenizer("x").input_ids[0] == tokenizer.bos_token_id else []
    assert bos_ids(tokenizer) == expected and e.prompt_ids[:len(expected)] == expected
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [i for i in e.prompt_ids if i in special] == expected
    assert [i for i in e.response_ids if i in special] == [tokenizer.eos_token_id]
    assert encode(PARIS, tokenizer, max_prompt_tokens=limit, max_tokens=limit + 1).prompt_ids == e.prompt_ids

@pytest.mark.pitfall(24)
def test_pitfall_24_a_chat_template_with_bos_does_not_double_it():
    tokenizer = byte_level(bos=True)
    tokenizer.chat_template = CHAT
    try: ids = encode(PARIS, tokenizer, template="chat").prompt_ids
    finally: tokenizer.chat_template = None
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id

# --- prompts and tokens

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

@every_tokenizer
def test_text_that_spells_a_special_token_is_text(tokenizer):
    e = encode(Example("1", "What does </s> mean?", references=("The tag </s> ends <s>.",)), tokenizer)
    special = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert not special & set(e.response_ids[:-1]) and not special & set(e.prompt_ids[len(bos_ids(tokenizer)):])
    assert tokenizer.decode(e.response_ids[:-1]) == "The tag </s> ends <s>."

@every_tokenizer
def test_prompt_and_response_join_to_the_whole_text(tokenizer):
    e = encode(PARIS, tokenizer)
    joined = tokenizer.decode(e.prompt_ids[len(bos_ids(tokenizer)):] + e.response_ids[:-1])
    assert joined == make_prompt(PARIS) + PARIS.references[0]

def test_a_response_after_a_line_break_has_no_space_of_its_own():
    tokenizer = sentence_piece()
    assert tokenizer.convert_ids_to_tokens(tokenizer("Paris", add_special_tokens=False).input_ids)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(continuation_ids("Paris", tokenizer))[0].startswith("▁")

@pytest.mark.parametrize("limits", [(1, 5), (5, 5), (6, 5)])
def test_encode_refuses_limits_without_room(limits):
    with pytest.raises(ValueError, match="max_prompt_tokens"): encode(PARIS, byte_level(), "alpaca", *limits)

# --- batches

def test_position_ids_of_left_and_right_padding():
    assert collate(PAIRS, 0, "right").position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert collate(PAIRS, 0, "left").position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]

def test_collate_by_hand_and_dtypes():
    batch = collate(PAIRS[:2], 0, "left")
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 2], [0, 14, 22, 23, 2]]
    assert batch.attention_mask.tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.position_ids.dtype} == {torch.int64} and batch.response_mask.dtype == torch.bool
    assert all(getattr(batch.to("meta"), n).is_meta for n in ("input_ids", "attention_mask", "position_ids", "response_mask"))

def test_collate_prompts_alone_for_generation():
    batch = collate([([1, 2], []), ([3], [])], 0, "left")
    assert batch.input_ids.tolist() == [[1, 2], [0, 3]] and not supervised(batch).any() and labels(batch).shape == (0,)

def test_collate_errors():
    with pytest.raises(ValueError, match="allowed: left, right"): collate(PAIRS, 0, "middle")
    with pytest.raises(ValueError, match="empty prompt"): collate([([], [1])], 0)
    with pytest.raises(ValueError, match="no sequences"): collate([], 0)

@pytest.mark.parametrize("n,size", [(5, 2), (7, 3), (3, 8), (4, 4), (1, 1)])
def test_batch_indices_cover_every_example_once_an_epoch(n, size):
    flat = [i for s in range(4 * n) for i in batch_indices(n, size, s, seed=3)]
    for epoch in range(len(flat) // n): assert sorted(flat[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert all(len(batch_indices(n, size, s, 3)) == size for s in range(5))

def test_batch_indices_is_a_pure_function():
    forwards = [batch_indices(100, 8, s, seed=1) for s in range(40)]
    D._epoch_order.cache_clear()
    import random
    random.seed(123); state = random.getstate()
    assert [batch_indices(100, 8, s, seed=1) for s in reversed(range(40))] == forwards[::-1]
    assert random.getstate() == state
    assert batch_indices(100, 8, 0, seed=2) != forwards[0]
    assert forwards[0] != batch_indices(100, 8, 25, seed=1)[4:]  # another epoch, another order

def test_batch_indices_are_the_same_on_every_machine():
    assert [batch_indices(5, 2, s, seed=0) for s in range(5)] == [[2, 3], [4, 1], [0, 4], [3, 2], [1, 0]]

# --- files

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

@pytest.mark.parametrize('n, size, buckets', [(40, 4, 5), (7, 3, 4), (1, 2, 3), (64, 4, 16)])
def test_length_buckets_move_examples_inside_a_window_only(n, size, buckets):
    lengths = [(7 * i) % 13 for i in range(n)]
    for window in range(3):
        steps = range(window * buckets, (window + 1) * buckets)
        plain, bucketed = ([batch_indices(n, size, s, 1, *more) for s in steps] for more in ((), (lengths, buckets)))
        assert sorted(sum(plain, [])) == sorted(sum(bucketed, []))
        spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in bucketed)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))      # batches do not overlap in length

def test_length_buckets_come_in_random_order():
    lengths = list(range(64))
    firsts = [[lengths[batch_indices(64, 4, s, seed, lengths, 16)[0]] for s in range(16)] for seed in range(3)]
    assert all(f != sorted(f) for f in firsts) and firsts[0] != firsts[1]
