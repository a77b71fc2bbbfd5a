"""Tokens and batches: ids, masks, the shift by one, and the order of the data."""
import random
import pytest, torch
from toy_tokenizers import byte_level, sentence_piece
from mgsr_nb import tokens as T
from mgsr_nb.data import Example, make_prompt
from mgsr_nb.tokens import Batch, batch_indices, bos_ids, collate, continuation_ids, cut_at_stop, encode, labels, prompt_ids, supervised

PARIS = Example("1", "What is the capital of France?", references=("Paris is the capital.", "Paris"))
CHAT = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
TOKENIZERS = {"byte_level": byte_level, "bos": lambda: byte_level(bos=True), "sentence_piece": sentence_piece}
every_tokenizer = pytest.mark.parametrize("tokenizer", [f() for f in TOKENIZERS.values()], ids=TOKENIZERS)
PAIRS = [([11, 12, 13], [21, 2]), ([14], [22, 23, 2]), ([15, 16], [24])]

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
    T._epoch_order.cache_clear()
    random.seed(123); state = random.getstate()
    assert [batch_indices(100, 8, s, seed=1) for s in reversed(range(40))] == forwards[::-1]
    assert random.getstate() == state
    assert batch_indices(100, 8, 0, seed=2) != forwards[0]
    assert forwards[0] != batch_indices(100, 8, 25, seed=1)[4:]  # another epoch, another order

def test_batch_indices_are_the_same_on_every_machine():
    assert [batch_indices(5, 2, s, seed=0) for s in range(5)] == [[2, 3], [4, 1], [0, 4], [3, 2], [1, 0]]

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
