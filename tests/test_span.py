import math, random, socket
import pytest, torch
from hypothesis import given, settings, strategies as st
from toy_tokenizers import byte_level, sentence_piece
from mgsr_nb import span as S
from mgsr_nb.config import ConfigError
from mgsr_nb.span import RELATIONS, SpanFinder, align_spans, pair_weights, parsed_phrases, phrase_chunker, phrase_spans, response_text, scatter, span_distance, span_loss, token_offsets

TEXT = "The old mill in the valley has been visited by millions. It doesn't work/run (anymore)."
HARD = ["The old mill — “naïve” 😀👩‍🔬 in the valley,\n\n  has been visited.\n", "日本語 and ünïcödé", "a  b   c\t\td", "\n\nParis\r\n", "😀", " ", "...", "e\u0301 combining", ""]
TOKENIZERS = {"byte_level": byte_level, "sentence_piece": sentence_piece}
every_tokenizer = pytest.mark.parametrize("tokenizer", [f() for f in TOKENIZERS.values()], ids=TOKENIZERS)
every_relation = pytest.mark.parametrize("relation", RELATIONS)

def ids_of(text, tokenizer): return tokenizer(text, add_special_tokens=False).input_ids
def phrases(text, **kw): return [(kind, text[s:e]) for s, e, kind in phrase_spans(text, **kw)]
def rows(n, V=11, seed=0, sharp=1.0):
    g = torch.Generator().manual_seed(seed)
    return tuple((sharp * torch.randn(n, V, generator=g, dtype=torch.float64)).log_softmax(-1) for _ in range(2))

# --- phrases

def test_phrases_of_a_sentence():
    assert phrases(TEXT)[:5] == [("NP", "The old mill"), ("PP", "in the valley"), ("VP", "has been visited"), ("PP", "by millions"), ("NP", "It")]

def test_prepositional_phrase_with_and_without_its_noun_phrase():
    assert phrases("The mill in the valley") == [("NP", "The mill"), ("PP", "in the valley")]
    assert phrases("The mill in the valley", join_prepositions=False) == [("NP", "The mill"), ("PP", "in"), ("NP", "the valley")]

def test_phrases_do_not_cross_sentences_or_lines():
    found = [t for _, t in phrases("He lives in France. It is nice\nThe dog\nthe cat")]
    assert "in France" in found and "It" in found and "The dog" in found and "the cat" in found

def test_numbers_are_no_prepositions():
    assert phrases("2. The mill")[0] == ("NP", "The mill") and phrases("I have 2 cats")[-1] == ("NP", "2 cats")

@pytest.mark.parametrize("text", HARD + [TEXT, "the mill the mill the mill", "and/or http://a.b/c?x=1&y=2 &slash; x/y", "don’t stop", "<|im_end|> __init__ a_b", "\ufffd\ufffd a", "\u2028a b\x0bc"])
def test_phrase_intervals_are_ordered_and_begin_and_end_with_a_word(text):
    spans = phrase_spans(text)
    assert all(0 <= s < e <= len(text) for s, e, _ in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert {k for _, _, k in spans} <= {"NP", "VP", "PP"}
    assert all(text[s].isalnum() or any(c.isalnum() for c in text[s:e]) for s, e, _ in spans)

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_phrases_of_any_text(text):
    spans = phrase_spans(text)
    assert all(0 <= s < e <= len(text) for s, e, _ in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))

def test_repeated_words_get_their_own_places():
    assert [s for s, _, _ in phrase_spans("The mill. The mill. The mill.")] == [0, 10, 20]

def test_phrases_need_no_network_and_no_corpora(monkeypatch):
    def refuse(*a, **kw): raise AssertionError("network")
    monkeypatch.setattr(socket, "socket", refuse)
    import nltk.data
    monkeypatch.setattr(nltk.data, "find", refuse); monkeypatch.setattr(nltk.data, "load", refuse)
    assert phrases("The lamp stood on the table.")[0] == ("NP", "The lamp")

# --- offsets

def by_prefixes(ids, tokenizer):
    "The definition: how far the text has grown, told only where no character is incomplete."
    ends, waiting = [], 0
    for i in range(1, len(ids) + 1):
        text, waiting = response_text(ids[:i], tokenizer), waiting + 1
        if text.endswith("\ufffd") and i < len(ids): continue
        ends += [len(text)] * waiting; waiting = 0
    return ends

@every_tokenizer
@pytest.mark.parametrize("text", HARD + [TEXT])
def test_offsets_equal_cumulative_decoding(tokenizer, text):
    ids = ids_of(text, tokenizer)
    decoded, offsets = response_text(ids, tokenizer), token_offsets(ids, tokenizer)
    assert len(offsets) == len(ids) and [e for _, e in offsets] == by_prefixes(ids, tokenizer)
    assert all(0 <= s <= e <= len(decoded) for s, e in offsets) and all(a[1] <= b[1] for a, b in zip(offsets, offsets[1:]))
    assert all(s == e or not decoded[s].isspace() for s, e in offsets)
    covered = {i for s, e in offsets for i in range(s, e)}
    assert all(c.isspace() for i, c in enumerate(decoded) if i not in covered)

@every_tokenizer
def test_tokens_of_an_emoji_share_its_character(tokenizer):
    ids = ids_of("mill 😀 mill", tokenizer)
    text, offsets = response_text(ids, tokenizer), token_offsets(ids, tokenizer)
    parts = [o for o in offsets if text[slice(*o)] == "😀"]
    assert len(parts) >= 2 and len(set(parts)) == 1 and text[slice(*offsets[-1])] and offsets[-1][1] == len(text)

def test_offsets_of_random_bytes_cover_the_text():
    "A student may sample bytes that are no characters."
    tokenizer, rng = byte_level(), random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(4, len(tokenizer)) for _ in range(30)]
        offsets = token_offsets(ids, tokenizer)
        assert len(offsets) == 30 and offsets[-1][1] == len(response_text(ids, tokenizer))
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(offsets, offsets[1:]))

@every_tokenizer
def test_finder_survives_random_ids(tokenizer):
    rng = random.Random(1)
    for kind in S.SPAN_KINDS:
        finder = SpanFinder(tokenizer, kind)
        for _ in range(30):
            ids = [rng.randrange(len(tokenizer)) for _ in range(40)]
            spans = finder(ids)
            assert all(0 <= a < b <= 40 for a, b in spans) and all(x[1] <= y[0] for x, y in zip(spans, spans[1:]))

def test_offset_cost_grows_in_proportion():
    "The number of decoded ids, not a time: at most a few for each token."
    tokenizer, seen = byte_level(), []
    class Counting:
        def decode(self, ids, **kw): seen.append(len(ids)); return tokenizer.decode(ids, **kw)
    ids = ids_of(TEXT * 10, tokenizer)
    token_offsets(ids, Counting())
    assert sum(seen) <= 4 * len(ids)

# --- alignment

def test_alignment_by_hand():
    # "The old mill is in the valley."  tokens: The| old| mi|ll| is| in| the| valley|.
    offsets = [(0, 3), (4, 7), (8, 10), (10, 12), (13, 15), (16, 18), (19, 22), (23, 29), (29, 30)]
    assert align_spans([(0, 12, "NP"), (13, 15, "VP"), (16, 29, "PP")], offsets) == [(0, 4), (4, 5), (5, 8)]

def test_alignment_of_partly_covered_tokens():
    assert align_spans([(1, 4)], [(0, 4), (5, 6)]) == []                       # begins before the phrase: outside
    assert align_spans([(0, 3), (4, 9)], [(0, 6), (6, 9)]) == [(0, 1), (1, 2)] # the first character decides
    assert align_spans([(0, 4)], [(0, 2), (2, 6)]) == [(0, 2)]                 # reaches out of the phrase: inside
    assert align_spans([(0, 2), (2, 4)], [(0, 4)]) == [(0, 1)]                 # a phrase without a token of its own is no span

def test_alignment_keeps_white_space_tokens_inside_and_drops_them_at_the_border():
    offsets = [(0, 3), (4, 4), (5, 9), (10, 10), (11, 14)]                      # "old", " ", " mill", " ", "the"
    assert align_spans([(0, 9), (11, 14)], offsets) == [(0, 3), (4, 5)]

def test_alignment_of_nothing(): assert align_spans([], [(0, 1)]) == [] == align_spans([(0, 1)], [])

@every_tokenizer
def test_aligned_tokens_spell_their_phrases(tokenizer):
    ids = ids_of(TEXT, tokenizer)
    text = response_text(ids, tokenizer)
    spans = align_spans(phrase_spans(text), token_offsets(ids, tokenizer))
    assert [response_text(ids[a:b], tokenizer).strip() for a, b in spans][:4] == ["The old mill", "in the valley", "has been visited", "by millions"]

# --- finder

@pytest.mark.pitfall(17)
@every_tokenizer
def test_pitfall_17_special_tokens_are_in_no_span(tokenizer):
    eos, part = tokenizer.eos_token_id, ids_of("The old mill in the valley", tokenizer)
    ids = [eos, *part, eos, *part, eos, eos]
    n = len(part)
    for kind in S.SPAN_KINDS:
        spans = SpanFinder(tokenizer, kind)(ids)
        assert spans and all(eos not in ids[a:b] for a, b in spans)
    assert SpanFinder(tokenizer, "whole")(ids) == [(1, 1 + n), (2 + n, 2 + 2 * n)]
    found = SpanFinder(tokenizer)(ids)
    assert found[len(found) // 2:] == [(a + n + 1, b + n + 1) for a, b in found[:len(found) // 2]]

def test_added_special_tokens_are_in_no_span():
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert SpanFinder(tokenizer, "whole")([*ids_of("mill", tokenizer), end])[0][1] == len(ids_of("mill", tokenizer))

def test_fixed_spans():
    assert SpanFinder(byte_level(), "fixed", length=4)(list(range(10, 20))) == [(0, 4), (4, 8), (8, 10)]
    assert SpanFinder(byte_level(), "fixed", length=3)([10]) == [(0, 1)] and SpanFinder(byte_level(), "fixed")([]) == []

def test_random_spans_have_the_lengths_of_the_phrases_and_are_a_function_of_seed_and_ids():
    tokenizer = byte_level(); ids = ids_of(TEXT, tokenizer)
    lengths = lambda spans: sorted(b - a for a, b in spans)
    found = {seed: SpanFinder(tokenizer, "random", seed=seed)(ids) for seed in range(6)}
    for spans in found.values():
        assert lengths(spans) == lengths(SpanFinder(tokenizer)(ids)) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    finder = SpanFinder(tokenizer, "random", seed=0); finder(ids_of("The mill", tokenizer)); random.seed(5)
    assert finder(ids) == found[0] and len({tuple(s) for s in found.values()}) > 1

@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 10), st.integers(0, 99))
def test_scatter_places_every_interval_without_overlap(lengths, free, seed):
    n = sum(lengths) + free
    spans = scatter(lengths, n, random.Random(seed))
    assert sorted(b - a for a, b in spans) == sorted(lengths) and all(0 <= a < b <= n for a, b in spans)
    assert all(x[1] <= y[0] for x, y in zip(spans, spans[1:]))

def test_finder_cache_is_used_bounded_and_safe_to_change(monkeypatch):
    tokenizer = byte_level()
    finder, calls = SpanFinder(tokenizer, cache_size=2), []
    find = finder._find
    monkeypatch.setattr(finder, "_find", lambda ids: calls.append(ids) or find(ids))
    a, b, c = (ids_of(t, tokenizer) for t in ("The mill", "The dog in the valley", "A cat"))
    first = finder(a); first.append("changed by the caller")
    assert finder(a) == first[:-1] and len(calls) == 1
    finder(b); finder(c)
    assert len(finder.cache) == 2 and len(calls) == 3
    finder(a); assert len(calls) == 4

def test_finder_errors():
    with pytest.raises(ValueError, match="allowed: phrases, fixed, random, whole"): SpanFinder(byte_level(), "words")
    with pytest.raises(ValueError, match="at least 1"): SpanFinder(byte_level(), "fixed", length=0)

# --- loss

def naive_loss(log_q, log_p, spans):
    "Eq. 9 and 10 in plain Python floats."
    q, p = log_q.double().exp().tolist(), log_p.double().exp().tolist()
    total = 0.0
    for first, stop in spans:
        s = 0.0
        for j in range(first, stop - 1):
            s += math.sqrt(sum((q[j][k] * q[j + 1][k] - p[j][k] * p[j + 1][k]) ** 2 for k in range(len(q[0]))))
        total += s / (stop - first)
    return total / len(spans)

@pytest.mark.parametrize("spans", [[(0, 9)], [(0, 3), (3, 4), (5, 9)], [(2, 3)], [(7, 9)]])
def test_span_loss_equals_a_naive_loop(spans):
    log_q, log_p = rows(9)
    assert abs(span_loss(log_q, log_p, spans).item() - naive_loss(log_q, log_p, spans)) < 1e-12
    assert abs(span_loss(log_q.float(), log_p.float(), spans).item() - naive_loss(log_q, log_p, spans)) < 1e-6

def test_span_loss_gradient_equals_finite_differences():
    log_q, log_p = rows(5, V=4)
    loss = lambda z: span_loss(z.log_softmax(-1), log_p, [(0, 3), (3, 5)])
    assert torch.autograd.gradcheck(loss, log_q.clone().requires_grad_())

@every_relation
def test_distance_by_hand_and_shape(relation):
    q = torch.tensor([[.8, .1, .1], [.5, .5, 0.]]); p = torch.tensor([[.5, .5, 0.], [.2, .8, 0.]])
    expected = {"hadamard": math.sqrt(.3**2 + .35**2),
                "cosine": abs(.45 / math.sqrt(.66 * .5) - .5 / math.sqrt(.5 * .68)),
                "outer": torch.linalg.matrix_norm(torch.outer(*q) - torch.outer(*p)).item()}[relation]
    d = span_distance(q.log(), p.log(), relation)
    assert d.shape == (1,) and abs(d.item() - expected) < 1e-6

@pytest.mark.pitfall(11)
@every_relation
def test_pitfall_11_gradient_finite_at_equality(relation):
    for z in (torch.randn(6, 20), torch.zeros(6, 20), 500 * torch.randn(6, 20)):
        log_q = z.log_softmax(-1).clamp(min=-1e4).requires_grad_()
        d = span_distance(log_q, log_q.detach(), relation)
        d.sum().backward()
        assert d.abs().max() < 1e-3 and log_q.grad.isfinite().all()

@pytest.mark.pitfall(8)
@every_relation
def test_pitfall_8_extreme_rows_have_finite_value_and_gradient(relation):
    z = torch.tensor([[500., -500, 0, 0], [-500, 500, 0, -1e4], [0, 0, 500, 500]])
    log_q, log_p = (x.log_softmax(-1).clamp(min=-1e4) for x in (z, z.flip(0)))
    log_q.requires_grad_()
    d = span_distance(log_q, log_p, relation); d.sum().backward()
    assert d.isfinite().all() and log_q.grad.isfinite().all()

@pytest.mark.pitfall(10)
@every_relation
def test_pitfall_10_permuting_the_vocabulary_changes_nothing(relation):
    log_q, log_p = rows(6); order = torch.randperm(11)
    assert torch.allclose(span_distance(log_q, log_p, relation), span_distance(log_q[:, order], log_p[:, order], relation))

@pytest.mark.pitfall(14)
@every_relation
def test_pitfall_14_vocabulary_padding_changes_nothing(relation):
    log_q, log_p = rows(6); pad = torch.nn.functional.pad
    assert torch.allclose(span_distance(log_q, log_p, relation), span_distance(pad(log_q, (0, 5), value=-1e4), pad(log_p, (0, 5), value=-1e4), relation))

@pytest.mark.pitfall(4)
@every_relation
def test_pitfall_4_gradient_reaches_the_student_only_through_its_rows(relation):
    log_q, log_p = rows(4, sharp=3)
    log_q.requires_grad_()
    span_loss(log_q, log_p, [(1, 3)], relation).backward()
    touched = log_q.grad.abs().sum(-1) > 0
    assert touched.tolist() == [False, True, True, False]

@pytest.mark.pitfall(15)
def test_pitfall_15_no_spans_give_zero_with_a_graph():
    log_q, log_p = rows(3); log_q.requires_grad_()
    for loss in (span_loss(log_q, log_p, []), span_loss(log_q, log_p, [(0, 1)])):
        assert loss.item() == 0 and loss.requires_grad
        loss.backward(); assert (log_q.grad == 0).all()
    with_nan = torch.full((3, 4), float("nan"))
    assert span_loss(with_nan, with_nan, []).item() == 0

def test_pair_weights_by_hand():
    assert pair_weights([(0, 3), (3, 4), (5, 7)], 8) == ([1 / 3, 1 / 3, 0, 0, 0, 1 / 2, 0, 0], 3)
    assert pair_weights([], 2) == ([0, 0], 0) and pair_weights([], 0) == ([], 0)
    with pytest.raises(ValueError, match="outside of 3 tokens"): pair_weights([(1, 4)], 3)

@given(st.integers(1, 20), st.integers(0, 1000))
def test_pair_weights_give_the_span_loss(n, seed):
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(n + 1), rng.randint(2, min(n + 1, 6)) if n > 1 else 2))
    spans = [(a, b) for a, b in zip(cuts, cuts[1:]) if rng.random() < 0.7]
    log_q, log_p = rows(n, seed=seed)
    weights, k = pair_weights(spans, n)
    assert len(weights) == n and weights[-1] == 0 and k == len(spans)
    summed = (torch.tensor(weights[:-1], dtype=torch.float64) * span_distance(log_q, log_p)).sum() / max(k, 1)
    assert abs(summed.item() - span_loss(log_q, log_p, spans).item()) < 1e-12

def test_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="allowed: hadamard, cosine, outer"): span_distance(*rows(2), relation="dot")

# ------------------------------------------------------------------------------------------------ spaCy, where it is installed
def test_an_unknown_chunker_or_a_missing_model_is_refused_in_words():
    with pytest.raises(ConfigError, match="chunker: 'nltk' is unknown; allowed: textblob, spacy"): phrase_chunker("nltk")
    with pytest.raises(ConfigError, match="chunker: spacy needs the package spacy and its model no_such_model"): phrase_chunker("spacy", "no_such_model")
    assert phrase_chunker("textblob") is phrase_spans

def test_a_run_with_a_chunker_that_is_missing_stops_before_a_model_loads(monkeypatch, tmp_path):
    from mgsr_nb import run as R
    import mgsr_nb.run.artefacts
    import mgsr_nb.run.checks
    from mgsr_nb.config import resolve
    def missing(name): raise ConfigError(f"chunker: {name} is not here")
    monkeypatch.setattr(R.checks, "phrase_chunker", missing)
    monkeypatch.setattr(R.artefacts, "load_model", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match="chunker: spacy is not here"): R.checks.check_tools(resolve(chunker="spacy"))

def spacy_doc(words, pos, heads, deps):
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from spacy.tokens import Doc
    return Doc(spacy.blank("en").vocab, words=words, pos=pos, heads=heads, deps=deps)

def test_phrases_of_a_spacy_parse():
    words = "The old mill in the valley has been visited .".split()
    doc = spacy_doc(words, "DET ADJ NOUN ADP DET NOUN AUX AUX VERB PUNCT".split(), [2, 2, 8, 2, 5, 3, 8, 8, 8, 8], "det amod nsubjpass prep det pobj aux auxpass ROOT punct".split())
    assert [(doc.text[a:b], kind) for a, b, kind in parsed_phrases(doc)] == [("The old mill", "NP"), ("in the valley", "PP"), ("has been visited", "VP")]

def test_the_finder_uses_the_chunker_that_was_named(monkeypatch):
    import mgsr_nb.span as span
    monkeypatch.setattr(span, "phrase_chunker", lambda name: (lambda text: [(0, len(text), "NP")]) if name == "spacy" else phrase_spans)
    tokenizer = byte_level()
    ids = tokenizer("the mill, it runs").input_ids
    assert SpanFinder(tokenizer, chunker="spacy")(ids) == [(0, len(ids))] != SpanFinder(tokenizer)(ids)
