"""Sampling: draws follow the distribution, and a row's text is a function of its key, whatever else is in the batch."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from tiny_models import arrival_times, EOS, KINDS, naive_noise, PAD, splitmix64, tiny_model
from mgsr_nb import decoding as S
from mgsr_nb.data import Example
from mgsr_nb.tokens import Encoded, collate, supervised
from mgsr_nb.models import add_lora, base_model, decoder, hidden_states
from mgsr_nb.decoding import Reading, draw_tokens, evaluating, few_rows, generate, generator_for, noise, starts_of
from mgsr_nb.sampling import Fixed, Mixed, OnPolicy, sampler

every_kind = pytest.mark.parametrize("kind", KINDS)
V = 60
PROMPTS = [[11, 12, 13], [14], [15, 16, 2, 17, 18, 19, 20], [9, 8], [1, 1, 30], [33] * 5, [40, 41], [50]]
KEYS = [("row", b) for b in range(len(PROMPTS))]

def run(model, rows=range(len(PROMPTS)), limits=12, stops=(EOS,), pad=PAD, vocab=V):
    limits = [limits] * len(PROMPTS) if isinstance(limits, int) else limits
    return generate(model, [PROMPTS[b] for b in rows], [KEYS[b] for b in rows], [limits[b] for b in rows], stops, pad, vocab)

def naive(model, prompt, key, limit, stops=(EOS,), vocab=V):
    "One sequence: no cache, no padding, no mask, no positions; the same random numbers, and the race as it is told: the first to arrive."
    ids = []
    while len(ids) < limit and not (ids and ids[-1] in stops):
        with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :vocab].softmax(-1)
        ids.append(int((arrival_times(vocab, key, len(ids)) / p).argmin()))
    return ids

def chi_square(counts, p):
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())

# --- random numbers and one draw

@pytest.mark.pitfall(30)
def test_pitfall_30_a_generator_is_a_function_of_its_key():
    keys = [(0, "sample", 7, 2), (0, "sample", 7, 3), (0, "sample", 8, 2), (1, "sample", 7, 2), (0, "mixed", 7, 2), (0, "sample", 72), ("0", "sample", 7, 2)]
    seeds = [generator_for(*k).initial_seed() for k in keys]
    assert len(set(seeds)) == len(keys) and seeds == [generator_for(*k).initial_seed() for k in keys]
    assert seeds[0] == 809693137022491137      # the same on every machine, whatever PYTHONHASHSEED is
    torch.manual_seed(5); state = torch.get_rng_state()
    assert torch.equal(torch.rand(3, generator=generator_for("k")), torch.rand(3, generator=generator_for("k")))
    assert torch.equal(torch.get_rng_state(), state)

def test_the_counter_is_splitmix64():
    "Against plain integers, whose first outputs for seed 1234567 are those that implementations of SplitMix64 publish."
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for key, place in ((("k", 1), 7), ((0, "sample", 3, 2), 0)):
        assert torch.equal(noise(starts_of([key]), place, 5)[0], naive_noise(key, place, 5).float())

def test_a_row_of_noise_depends_on_its_key_and_place_alone():
    starts = starts_of([("k", i) for i in range(3)])
    rows = noise(starts, 4, 5)
    for i in range(3): assert torch.equal(noise(starts_of([("k", i)]), 4, 5)[0], rows[i])
    assert torch.equal(noise(starts, torch.tensor([4, 4, 4]), 5), rows) and torch.equal(noise(starts, 4, 3), rows[:, :3])
    numbers = torch.cat([noise(starts, t, 5) for t in range(6)]).flatten().tolist()
    assert len(set(numbers)) == len(numbers) and 0 <= min(numbers) and max(numbers) <= 1

@pytest.mark.parametrize("numbers", [
    lambda starts: noise(starts, 0, 500).flatten(), lambda starts: noise(starts, 3, 1).flatten(),
    lambda starts: torch.stack([noise(starts[:1], t, 1)[0, 0] for t in range(2000)]),
    lambda starts: noise(starts, torch.arange(len(starts)), 1).flatten()], ids=["all", "rows", "places", "both"])
def test_noise_is_uniform(numbers):
    "Chi-square of 20 equal bins, below its mean plus four standard deviations, over classes, rows and places."
    u = numbers(starts_of([("k", i) for i in range(2000)]))
    counts = torch.histc(u, 20, 0, 1)
    assert counts.sum() == len(u) and chi_square(counts, torch.full((20,), 1 / 20, dtype=torch.float64)) < 19 + 4 * math.sqrt(38)

def test_neighbours_in_the_noise_know_nothing_of_each_other():
    starts = starts_of([("k", i) for i in range(2000)])
    here, later = noise(starts, 0, 500), noise(starts, 1, 500)
    pairs = {"class": (here[:, 1:], here[:, :-1]), "row": (here[1:], here[:-1]), "place": (here, later)}
    for name, (a, b) in pairs.items():
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(r) < 4 / a.numel() ** 0.5, (name, r)

@pytest.mark.pitfall(39)
def test_rare_tokens_are_drawn_as_often_as_they_should():
    """A class of probability p beats one of nearly 1 if its number is below p -log(1 - u) of the other. Multiples of 2^-24,
    which were used once, draw it at 95 %, 58 % and 1.5 % of that rate for p of 6e-7, 6e-8 and 1e-8."""
    grid = torch.arange(1, 2 ** 24 + 1, dtype=torch.float64) * 2 ** -24
    for p, share in ((6e-7, 0.95), (6e-8, 0.58), (1e-8, 0.015)):
        assert ((-grid[:-1]).log1p() / p).exp().sum().item() * 2 ** -24 / p == pytest.approx(share, rel=0.05)
        limit = p * math.log(2)
        races = torch.tensor([[0.5, 0.99 * limit], [0.5, 1.01 * limit]])
        assert draw_tokens(torch.tensor([1 - p, p]).log().expand(2, 2), races).tolist() == [1, 0]
    u = torch.cat([noise(starts_of([("tail", row) for row in range(64)]), place, 49152).flatten() for place in range(4)])
    small = u[u < 2 ** -12].double()
    mean = len(u) * 2 ** -12
    assert abs(len(small) - mean) < 4 * mean ** 0.5
    assert (small * 2 ** 24 % 1 != 0).double().mean() > 0.99 and len(small.unique()) == len(small)
    bins = torch.histc(small * 2 ** 12, 10, 0, 1)
    assert chi_square(bins, torch.full((10,), 0.1, dtype=torch.float64)) < 9 + 4 * math.sqrt(18)

@pytest.mark.parametrize("p", [[0.5, 0.3, 0.2], [0.9, 0.05, 0.03, 0.02], [0.25] * 4, [0.001, 0.999], [0.4, 0.3, 0.1, 0.08, 0.06, 0.03, 0.02, 0.01]])
def test_draws_follow_the_distribution(p):
    "Pearson's chi-square of 100,000 draws, with V - 1 degrees of freedom, below its mean plus four standard deviations."
    p, n = torch.tensor(p, dtype=torch.float64), 100_000
    drawn = draw_tokens(p.log().float().expand(n, -1), torch.rand(n, len(p), generator=generator_for("draws")))
    assert drawn.shape == (n,) and chi_square(drawn.bincount(minlength=len(p)), p) < len(p) - 1 + 4 * math.sqrt(2 * (len(p) - 1))

def test_the_chi_square_can_fail():
    p, n = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 100_000
    u = torch.rand(n, 3, generator=generator_for("draws"))
    for wrong in ((p.log() / 0.95).float(), p.float()): assert chi_square(draw_tokens(wrong.expand(n, -1), u).bincount(minlength=3), p) > 2 + 4 * 2

@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_draws_at_a_temperature_follow_the_sharpened_distribution(temperature):
    p, n = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 100_000
    sharpened = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    u = torch.rand(n, 4, generator=generator_for("temperature"))
    count = draw_tokens(p.log().float().expand(n, -1), u, temperature).bincount(minlength=4)
    assert chi_square(count, sharpened) < 3 + 4 * math.sqrt(6) < chi_square(count, p)

def test_temperature_0_takes_the_likeliest_and_1_is_the_plain_draw():
    z, u = torch.randn(50, 9, generator=generator_for("z")), torch.rand(50, 9, generator=generator_for("u"))
    assert torch.equal(draw_tokens(z, u, 0), z.argmax(-1)) and torch.equal(draw_tokens(z, u, 0.01), draw_tokens(100 * z, u))
    assert torch.equal(draw_tokens(z, u, 1.), draw_tokens(z, u)) and not torch.equal(draw_tokens(z, u), z.argmax(-1))

@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.floats(-20, 20, width=32) | st.just(-math.inf), min_size=2, max_size=8).filter(lambda z: max(z) > -math.inf), seed=st.integers(0, 99))
def test_a_class_of_probability_zero_is_never_drawn(logits, seed):
    z = torch.tensor(logits)
    drawn = draw_tokens(z.expand(500, -1), torch.rand(500, len(z), generator=generator_for("zero", seed)))
    assert (z[drawn] > -math.inf).all()

def test_a_uniform_number_of_exactly_zero_cannot_make_the_impossible_happen():
    "`torch.rand` gives 0 once in 2^24 draws: the class that it belongs to arrives last, not never."
    assert draw_tokens(torch.tensor([-torch.inf, 0.]), torch.tensor([0.5, 0.])) == 1
    assert draw_tokens(torch.tensor([-torch.inf, 0., -torch.inf]), torch.zeros(3)) == 1

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999))
def test_a_draw_depends_on_the_probabilities_only(seed):
    g = generator_for("shift", seed)
    z, u = torch.randn(20, 7, generator=g), torch.rand(20, 7, generator=g)
    order = torch.randperm(7, generator=g)
    drawn = draw_tokens(z, u)
    assert torch.equal(order[draw_tokens(z[:, order], u[:, order])], drawn)
    assert torch.equal(draw_tokens(z.double(), u.double()), drawn) and torch.equal(draw_tokens(z.reshape(4, 5, 7), u.reshape(4, 5, 7)), drawn.reshape(4, 5))

@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_0_texts_are_those_of_greedy_search_by_transformers(kind):
    model, prompt = tiny_model(kind), [11, 12, 13]
    greedy = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=8, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)[0, 3:].tolist()
    ours = generate(model, [prompt], [("any",)], [8], [EOS], PAD, model.config.vocab_size, temperature=0.)[0]
    assert ours == greedy != generate(model, [prompt], [("any",)], [8], [EOS], PAD, model.config.vocab_size)[0]

def test_a_generated_token_follows_the_models_distribution():
    model, n, v = tiny_model("llama"), 3000, 8
    with torch.no_grad(): p = model(input_ids=torch.tensor([[11, 12, 13]])).logits[0, -1, :v].double().softmax(-1)
    drawn = torch.tensor(generate(model, [[11, 12, 13]] * n, [("first", i) for i in range(n)], [1] * n, [EOS], PAD, v)).flatten()
    assert p.min() > 0.005 and chi_square(drawn.bincount(minlength=v), p) < v - 1 + 4 * math.sqrt(2 * (v - 1))

# --- a batch of responses

@pytest.mark.pitfall(21)
@every_kind
def test_pitfall_21_generate_equals_a_naive_loop_without_cache_and_padding(kind):
    model, limits = tiny_model(kind), [12, 3, 12, 0, 1, 9, 5, 12]
    for stops in ((EOS,), (EOS, 19, 21, 33), ()):
        texts = run(model, limits=limits, stops=stops)
        assert texts == [naive(model, PROMPTS[b], KEYS[b], limits[b], stops) for b in range(len(PROMPTS))]
    assert [len(t) for t in texts] == limits

@every_kind
def test_a_text_depends_neither_on_the_batch_nor_on_its_place(kind):
    model = tiny_model(kind)
    texts = run(model)
    assert [run(model, [b])[0] for b in range(len(PROMPTS))] == texts
    for rows in ([7, 6, 5, 4, 3, 2, 1, 0], [2, 5], [3, 3, 0], [1, 4, 6]): assert run(model, rows) == [texts[b] for b in rows]

@every_kind
@pytest.mark.parametrize("pad", [EOS, 0, 59])
def test_a_text_does_not_depend_on_the_padding(kind, pad):
    model = tiny_model(kind)
    assert run(model, pad=pad) == run(model)

@every_kind
def test_rows_that_end_early_leave_the_batch_and_the_others_do_not_notice(kind, monkeypatch):
    model, limits, left, keep = tiny_model(kind), [1, 1, 2, 30, 3, 30, 7, 18], [], S._keep
    def watched(cache, tensors, rows):
        left.append(len(rows))
        return keep(cache, tensors, rows)
    monkeypatch.setattr(S, "_keep", watched)
    texts = run(model, limits=limits, stops=())
    assert left[0] < 8 and left[-1] <= 2 and left == sorted(left, reverse=True) and len(left) >= 3
    monkeypatch.setattr(S, "_keep", None)
    assert texts == [run(model, [b], limits, ())[0] for b in range(len(PROMPTS))]

def test_generation_stops_when_all_rows_have_ended():
    model, calls = tiny_model("gpt2"), []
    model.register_forward_hook(lambda *a: calls.append(1))
    run(model, limits=64, stops=range(V))
    assert len(calls) == 1

@pytest.mark.pitfall(20)
@every_kind
def test_pitfall_20_a_text_ends_with_the_first_of_several_stop_ids(kind):
    model = tiny_model(kind)
    free = run(model, limits=20, stops=())
    stops = [free[0][3], free[1][0], free[2][7], free[3][19]]
    texts = run(model, limits=20, stops=stops)
    for all_ids, text in zip(free, texts):
        where = [i for i, token in enumerate(all_ids) if token in stops]
        assert text == (all_ids[:where[0] + 1] if where else all_ids)
    assert len(texts[0]) <= 4 and len(texts[1]) == 1 and texts[1][-1] == stops[1]

@pytest.mark.pitfall(19)
def test_pitfall_19_the_closing_eos_is_kept_also_when_it_is_the_padding():
    model = tiny_model("opt")
    for pad in (PAD, EOS):
        texts = run(model, limits=60, pad=pad)
        ended = [t for t in texts if EOS in t]
        assert len(ended) >= 2 and all(t.index(EOS) == len(t) - 1 for t in ended) and all(len(t) == 60 for t in texts if EOS not in t)

def test_each_row_has_its_own_limit():
    model, limits = tiny_model("llama"), [0, 1, 2, 3, 0, 9, 5, 4]
    long, texts = run(model, limits=9, stops=()), run(model, limits=limits, stops=())
    assert texts == [t[:n] for t, n in zip(long, limits)]
    assert run(model, limits=0) == [[]] * len(PROMPTS) and run(model, [], limits) == []

def test_rows_that_have_ended_do_not_run_beyond_the_models_positions():
    "Each text fits in 24 positions (20 + 4, 4 + 20); the row that has ended stays in the batch for a while, and must not go on counting."
    model, prompts = tiny_model("gpt2", positions=24), [[3] * 20] + [[3] * 4] * 4
    texts = generate(model, prompts, [(i,) for i in range(5)], [4] + [20] * 4, [], PAD, V)
    assert [len(t) for t in texts] == [4, 20, 20, 20, 20] and texts == [naive(model, p, (i,), n, ()) for i, (p, n) in enumerate(zip(prompts, [4] + [20] * 4))]

@every_kind
@pytest.mark.parametrize("vocab", [1, 10])
def test_only_the_shared_vocabulary_is_drawn(kind, vocab):
    model = tiny_model(kind)
    texts = run(model, vocab=vocab, stops=(20,))
    assert all(len(t) == 12 and max(t) < vocab for t in texts)
    assert texts == [naive(model, p, k, 12, (20,), vocab) for p, k in zip(PROMPTS, KEYS)]

def test_the_prompts_are_not_changed():
    prompts = [list(p) for p in PROMPTS]
    generate(tiny_model("gpt2"), prompts, KEYS, [5] * 8, [EOS], PAD, V)
    assert prompts == PROMPTS

# --- teacher-mixed sampling

MIXED_LIMITS = [1, 1, 2, 30, 3, 30, 7, 18]

def teacher(kind, **options): return tiny_model(kind, 3, seed=5, **options)

def mixed(model, other, alpha, rows=range(len(PROMPTS)), limits=12, stops=(EOS,), vocab=V):
    limits = [limits] * len(PROMPTS) if isinstance(limits, int) else limits
    return generate(model, [PROMPTS[b] for b in rows], [KEYS[b] for b in rows], [limits[b] for b in rows], stops, PAD, vocab, mix=(other, alpha))

def naive_mixture(model, other, alpha, prompt, key, limit, stops=(EOS,), vocab=V):
    "As `naive`, from alpha p + (1 - alpha) q in probability space."
    ids = []
    while len(ids) < limit and not (ids and ids[-1] in stops):
        with torch.no_grad(): q, p = (m(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :vocab].double().softmax(-1) for m in (model, other))
        ids.append(int((arrival_times(vocab, key, len(ids)) / (alpha * p + (1 - alpha) * q)).argmin()))
    return ids

@pytest.mark.parametrize("kinds", [*zip(KINDS, KINDS), ("gpt2", "llama")])
def test_mixed_text_equals_a_naive_loop_without_cache_and_padding(kinds):
    model, other = tiny_model(kinds[0]), teacher(kinds[1])
    for alpha in (0.2, 0.7):
        texts = mixed(model, other, alpha)
        assert texts == [naive_mixture(model, other, alpha, p, k, 12) for p, k in zip(PROMPTS, KEYS)]
        assert texts != run(model) and texts != run(other) and texts != mixed(other, model, alpha)

@every_kind
def test_without_a_teachers_share_the_draws_are_the_students_and_the_teacher_is_not_asked(kind):
    model = tiny_model(kind)
    class Unasked(nn.Module):
        def forward(self, **inputs): raise AssertionError("the teacher was asked")
    assert mixed(model, Unasked(), 0.) == mixed(model, Unasked(), 0) == run(model)
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    mixed(model, Unasked(), 0.); once = len(calls)
    run(model)
    assert len(calls) == 2 * once

@every_kind
def test_a_share_near_one_draws_what_the_teacher_would(kind):
    model, other = tiny_model(kind), teacher(kind)
    assert mixed(model, other, 1 - 1e-9) == run(other) != run(model)
    assert mixed(model, other, 1e-9) == run(model)

@every_kind
def test_rows_that_end_early_leave_both_caches_and_the_others_do_not_notice(kind, monkeypatch):
    model, other, seen, keep = tiny_model(kind), teacher(kind), [], S._keep
    def watched(caches, tensors, rows):
        seen.append((len({id(c) for c in caches}), len(rows)))
        return keep(caches, tensors, rows)
    monkeypatch.setattr(S, "_keep", watched)
    texts = mixed(model, other, 0.3, limits=MIXED_LIMITS, stops=())
    assert len(seen) >= 3 and all(caches == 2 for caches, _ in seen) and seen[-1][1] <= 2
    assert texts == [mixed(model, other, 0.3, [b], MIXED_LIMITS, ())[0] for b in range(len(PROMPTS))]
    assert texts == [naive_mixture(model, other, 0.3, PROMPTS[b], KEYS[b], MIXED_LIMITS[b], ()) for b in range(len(PROMPTS))]

def test_a_mixed_token_follows_the_mixture():
    "Chi-square against alpha p + (1 - alpha) q, and the same draws fail against either model and against the mixture the other way round."
    model, other, n, v, alpha = tiny_model("llama"), teacher("llama"), 4000, 8, 0.3
    with torch.no_grad(): q, p = (m(input_ids=torch.tensor([[11, 12, 13]])).logits[0, -1, :v].double().softmax(-1) for m in (model, other))
    drawn = torch.tensor(generate(model, [[11, 12, 13]] * n, [("first", i) for i in range(n)], [1] * n, [EOS], PAD, v, (other, alpha))).flatten().bincount(minlength=v)
    limit = v - 1 + 4 * math.sqrt(2 * (v - 1))
    assert chi_square(drawn, alpha * p + (1 - alpha) * q) < limit
    for wrong in (p, q, (1 - alpha) * p + alpha * q): assert chi_square(drawn, wrong) > limit

def test_a_teacher_with_a_larger_table_draws_shared_ids_only():
    model, other = tiny_model("gpt2"), teacher("gpt2", vocab=75)
    texts = mixed(model, other, 0.9, limits=40, stops=())
    assert max(i for t in texts for i in t) < V
    assert texts == [naive_mixture(model, other, 0.9, p, k, 40, ()) for p, k in zip(PROMPTS, KEYS)]

@pytest.mark.pitfall(29)
def test_pitfall_29_neither_model_drops_out_while_they_write_together():
    model, other = tiny_model("gpt2"), teacher("opt")
    expected, seen = mixed(model, other, 0.4), []
    other.train()
    for m in (model, other): m.register_forward_pre_hook(lambda m, a: seen.append((m.training, torch.is_grad_enabled())))
    assert mixed(model, other, 0.4) == expected and set(seen) == {(False, False)}
    assert all(m.training for m in other.modules()) and not model.training

@pytest.mark.parametrize("alpha", [1., -0.1, 1.5])
def test_a_share_outside_zero_to_one_is_refused(alpha):
    with pytest.raises(ValueError, match=f"mixture weight {alpha}"): mixed(tiny_model("gpt2"), teacher("gpt2"), alpha)

def test_the_sampler_passes_the_mixture_on():
    model, other = tiny_model("gpt2"), teacher("gpt2")
    assert sampler(model, [EOS], PAD, V, mix=(other, 0.3))(PROMPTS, KEYS, [12] * 8) == mixed(model, other, 0.3)
    assert sampler(model, [EOS], PAD, V)(PROMPTS, KEYS, [12] * 8) == run(model)

# --- modes

@pytest.mark.pitfall(29)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_pitfall_29_without_dropout_while_generating_and_back_in_train_after(kind):
    model = tiny_model(kind)
    expected, seen = run(model), []
    assert not model.training
    model.train()
    model.register_forward_pre_hook(lambda m, a: seen.append((m.training, torch.is_grad_enabled())))
    assert run(model) == expected and set(seen) == {(False, False)}
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

@pytest.mark.pitfall(29)
def test_pitfall_29_modes_come_back_after_an_error():
    a, b = nn.Dropout().train(), nn.Dropout().eval()
    with pytest.raises(KeyError):
        with evaluating(a, b):
            assert not a.training and not b.training and not torch.is_grad_enabled()
            raise KeyError
    assert a.training and not b.training and torch.is_grad_enabled()

# --- sources

def examples(): return [Encoded(p, [21, 22, b, EOS], Example(str(b), "?")) for b, p in enumerate(PROMPTS)]

def sources(model, seed=0):
    on_policy = OnPolicy(sampler(model, [EOS], PAD, V), seed, 6)
    return {"fixed": Fixed(), "on_policy": on_policy, "mixed": Mixed(on_policy, 0.5, seed)}

@pytest.mark.pitfall(36)
@pytest.mark.parametrize("name", ["fixed", "on_policy", "mixed"])
def test_pitfall_36_two_processes_that_share_the_batch_get_the_rows_of_one(name):
    source, all_rows = sources(tiny_model("gpt2"))[name], examples()
    flags = set()
    for step in range(6):
        whole, origin = source(step, all_rows, range(8))
        first, a = source(step, all_rows[:4], range(4))
        second, b = source(step, all_rows[4:], range(4, 8))
        assert [*first, *second] == [*whole] and a == b == origin
        interleaved = [source(step, all_rows[r::2], range(r, 8, 2))[0] for r in (0, 1)]
        assert [interleaved[i % 2][i // 2] for i in range(8)] == [*whole]
        flags.add(origin)
    assert flags == {"fixed": {"data"}, "on_policy": {"student"}, "mixed": {"data", "student"}}[name]

def test_fixed_gives_the_ground_truth_and_on_policy_the_students_text():
    model, found = tiny_model("gpt2"), sources(tiny_model("gpt2"))
    assert found["fixed"](3, examples(), range(8)) == ([(e.prompt_ids, e.response_ids) for e in examples()], "data")
    pairs, origin = found["on_policy"](3, examples(), range(8))
    assert origin == "student" and pairs == [(p, naive(model, p, (0, "sample", 3, b), 6)) for b, p in enumerate(PROMPTS)]

def test_each_step_row_and_seed_writes_another_text():
    model = tiny_model("gpt2")
    same = [Encoded(PROMPTS[0], [EOS], Example("0", "?"))] * 4
    texts = [tuple(y) for seed in (0, 1) for step in (0, 1) for _, y in sources(model, seed)["on_policy"](step, same, range(4))[0]]
    assert len(set(texts)) == 16
    again = [tuple(y) for seed in (0, 1) for step in (0, 1) for _, y in sources(model, seed)["on_policy"](step, same, range(4))[0]]
    assert again == texts

@pytest.mark.pitfall(30)
def test_pitfall_30_the_draw_between_sources_is_a_function_of_seed_and_step():
    mixed = lambda fraction, seed: Mixed(OnPolicy(None, seed, 6), fraction, seed)
    draws = [mixed(0.3, 0).draws_student(s) for s in range(2000)]
    torch.manual_seed(9); torch.rand(100)
    assert [mixed(0.3, 0).draws_student(s) for s in reversed(range(2000))] == draws[::-1]    # no matter what came before, as after a resume
    assert abs(sum(draws) / 2000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    other = [mixed(0.3, 1).draws_student(s) for s in range(2000)]
    assert 0.3 < sum(a != b for a, b in zip(draws, other)) / 2000 < 0.55                  # 2 * 0.3 * 0.7 = 0.42 for independent seeds
    assert not any(mixed(0., 0).draws_student(s) for s in range(200)) and all(mixed(1., 0).draws_student(s) for s in range(200))

@pytest.mark.pitfall(30)
def test_pitfall_30_mixed_returns_what_the_drawn_source_returns():
    found = sources(tiny_model("gpt2"))
    for step in range(8):
        source = found["on_policy"] if found["mixed"].draws_student(step) else found["fixed"]
        assert found["mixed"](step, examples(), range(8)) == source(step, examples(), range(8))

# --- readings

CLOSE = {"gpt2": 1e-10, "opt": 1e-10, "llama": 1e-5}      # LLaMA's normalisation rounds to float32, whatever the model's type
FULL = {kind: tiny_model(kind, dtype=torch.float64) for kind in KINDS}

def alone(model, text):
    "Hidden states (n, H) of one text by itself: no cache, no padding, no mask, no positions."
    with torch.no_grad(): return decoder(model)(input_ids=torch.tensor([text]))[0][0]

def check_reading(kind, reading, texts):
    assert [sorted(places[places >= 0].tolist()) for places in reading.columns] == [list(range(len(t))) for t in texts]     # each place once
    for b, text in enumerate(texts):
        if text: torch.testing.assert_close(reading.hidden[b, :len(text)], alone(FULL[kind], text), rtol=0, atol=CLOSE[kind])

def sent(model):
    "Shapes (B, width) of what the model's decoder is sent from now on, call by call."
    shapes = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    return shapes, handle

ids_of = lambda low, high: st.lists(st.integers(0, 59), min_size=low, max_size=high)

@st.composite
def histories(draw, low=0):
    "Texts, and rounds of (what to do, a place and an ending for each text, the texts afterwards)."
    texts = draw(st.lists(ids_of(low, 6), min_size=1, max_size=4).filter(lambda ts: any(ts)))
    first, rounds = [list(t) for t in texts], []
    for do in draw(st.lists(st.sampled_from(["cut", "cut some", "replace", "replace"]), min_size=1, max_size=5)):
        starts = [draw(st.integers(min(low, len(t)), len(t))) for t in texts]
        endings = [draw(st.just([]) | ids_of(0, 9)) for _ in texts] if do == "replace" else [[]] * len(texts)
        some = draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, unique=True)) if do == "cut some" else range(len(texts))
        texts = [t[:s] + e if b in some else t for b, (t, s, e) in enumerate(zip(texts, starts, endings))]
        rounds.append((do, [starts[b] for b in some], some, endings, texts))
    return first, rounds

def follow(reading, rounds):
    for do, starts, some, endings, texts in rounds:
        if do == "replace": reading.replace(starts, endings)
        elif do == "cut": reading.cut(starts)
        else: reading.cut(starts, torch.tensor(some))
        yield texts

@pytest.mark.pitfall(21)
@every_kind
@settings(max_examples=30, deadline=None)
@given(history=histories())
def test_pitfall_21_a_reading_that_goes_on_is_a_reading_of_the_final_texts(kind, history):
    "Any cuts and new endings, of no token, fewer tokens than before or more, after which nothing need be left of a text."
    texts, rounds = history
    reading = Reading(FULL[kind], texts, PAD)
    check_reading(kind, reading, texts)
    for texts in follow(reading, rounds): check_reading(kind, reading, texts)
    assert not reading.hidden.requires_grad

@every_kind
@pytest.mark.parametrize("pad", [EOS, 0, 59])
def test_a_reading_does_not_depend_on_the_padding(kind, pad):
    a, b = (Reading(FULL[kind], PROMPTS, p) for p in (pad, PAD))
    for r in (a, b): r.replace([1] * 8, [[20 + i] * i for i in range(8)])
    for row in range(8): assert torch.equal(a.hidden[row, :1 + row], b.hidden[row, :1 + row]) and a.hidden[row, :1 + row].any()

@every_kind
def test_a_reading_reads_new_tokens_only(kind):
    model = tiny_model(kind)
    shapes, _ = sent(model)
    reading = Reading(model, PROMPTS, PAD)
    reading.replace([1] * 8, [[20] * n for n in (0, 3, 1, 0, 2, 0, 0, 0)])
    reading.cut([1] * 8)
    reading.replace([1] * 8, [[]] * 8)
    reading.replace([1, 0, 1, 1, 1, 1, 1, 1], [[21]] * 8)
    assert shapes == [(8, 7), (8, 3), (8, 1)]

@pytest.mark.pitfall(18)
@every_kind
@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(ids_of(1, 6), ids_of(0, 6)), min_size=1, max_size=4))
def test_pitfall_18_the_states_that_predict_a_response_are_those_of_a_collated_batch(kind, pairs):
    "Those that `supervised` selects, in its order."
    batch = collate(pairs, PAD)
    with torch.no_grad(): expected = hidden_states(FULL[kind], batch)[supervised(batch)]
    found = Reading(FULL[kind], [x + y for x, y in pairs], PAD).predicting([len(x) for x, _ in pairs], [len(y) for _, y in pairs])
    assert found.shape == (sum(len(y) for _, y in pairs), 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[kind])

@pytest.mark.pitfall(4, 29)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_pitfall_29_a_reading_is_made_without_dropout_and_keeps_no_graph(kind):
    def read(model):
        reading = Reading(model, PROMPTS, PAD)
        reading.replace([1] * 8, [[20 + i] * i for i in range(8)])
        return reading
    model = tiny_model(kind)
    expected, seen = read(model), []
    assert not model.training
    model.train()
    model.register_forward_pre_hook(lambda m, a: seen.append("the head"))       # (B, T, V) logits of a whole text are not wanted
    decoder(model).register_forward_pre_hook(lambda m, a: seen.append((m.training, torch.is_grad_enabled())))
    reading = read(model)
    assert torch.equal(reading.hidden, expected.hidden) and seen == [(False, False)] * 2
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    kept = [reading.hidden, *(t for layer in reading.cache.layers for t in (layer.keys, layer.values))]
    assert len(kept) == 5 and not any(t.requires_grad for t in kept)

# --- writing on from a reading

def write(model, prompts, limits, past=None, stops=(EOS, 19, 33), **kw):
    return generate(model, prompts, [("past", b) for b in range(len(prompts))], limits, stops, PAD, V, past=past, **kw)

@pytest.mark.pitfall(21)
@every_kind
@settings(max_examples=25, deadline=None)
@given(history=histories(), news=st.lists(ids_of(0, 5), min_size=4, max_size=4), limits=st.lists(st.sampled_from([0, 0, 1, 2, 5, 14]), min_size=4, max_size=4))
def test_pitfall_21_writing_on_from_a_reading_draws_the_same_tokens(kind, history, news, limits):
    "Whatever was cut and replaced before, in whole or in part; texts that get something new, or nothing, or that are not written on."
    texts, rounds = history
    reading = Reading(FULL[kind], texts, PAD)
    for texts in follow(reading, rounds): pass
    prompts = [t + new or [7] for t, new in zip(texts, news)]
    copies = [list(p) for p in prompts]
    expected = write(FULL[kind], prompts, limits[:len(prompts)])
    assert write(FULL[kind], prompts, limits[:len(prompts)], reading) == expected and prompts == copies

@every_kind
def test_rows_that_leave_early_leave_a_reading_too(kind, monkeypatch):
    left, keep, limits = [], S._keep, [1, 0, 2, 30, 3, 30, 0, 18]
    monkeypatch.setattr(S, "_keep", lambda caches, tensors, rows: (left.append(len(rows)), keep(caches, tensors, rows))[1])
    reading = Reading(FULL[kind], [p + [41, 42, 43] for p in PROMPTS], PAD)
    reading.replace([len(p) for p in PROMPTS], [[], [8], [8, 9], [], [8, 9, 10, 11, 12], [], [8], [9]])
    reading.cut([len(p) - b % 2 for b, p in enumerate(PROMPTS)])
    texts = write(FULL[kind], PROMPTS, limits, reading, ())
    assert len(left) >= 3 and left[0] < 6 and left[-1] <= 2
    assert texts == write(FULL[kind], PROMPTS, limits, stops=()) and [len(t) for t in texts] == limits

@every_kind
def test_what_has_been_read_is_not_sent_again(kind):
    "One new token a row: one token is read, then what is written. Where there is nothing new, the last token is read again, since something has to predict."
    model = tiny_model(kind)
    shapes, _ = sent(model)
    for new in ([9], []):
        reading, prompts = Reading(model, PROMPTS, PAD), [p + new for p in PROMPTS]
        shapes.clear()
        expected = write(model, prompts, [4] * 8, stops=())
        assert shapes == [(8, 7 + len(new))] + [(8, 1)] * 3
        shapes.clear()
        assert write(model, prompts, [4] * 8, reading, stops=()) == expected and shapes == [(8, 1)] * 4
    reading, prompts = Reading(model, PROMPTS, PAD), [p + [20] * b for b, p in enumerate(PROMPTS)]
    shapes.clear()
    assert write(model, prompts, [1] * 8, reading) == write(model, prompts, [1] * 8) and shapes == [(8, 7), (8, 10)]      # 7 new tokens at most, 10 in all

def test_with_nothing_to_write_a_reading_is_left_as_it_is():
    model = FULL["gpt2"]
    reading = Reading(model, PROMPTS, PAD)
    before = reading.columns.clone()
    assert write(model, PROMPTS, [0] * 8, reading) == [[]] * 8 and torch.equal(reading.columns, before)
    assert write(model, PROMPTS, [6] * 8, reading) == write(model, PROMPTS, [6] * 8)

@every_kind
def test_a_mixture_reads_its_prompts_from_their_start(kind):
    "A reading of other texts is not even looked at; with a share of 0 it is the student's past as ever."
    model, other = FULL[kind], teacher(kind, dtype=torch.float64)
    wrong = Reading(model, [[5] * 30] * 8, PAD)
    before, width = wrong.columns.clone(), wrong.cache.get_seq_length()
    assert write(model, PROMPTS, [9] * 8, wrong, mix=(other, 0.4)) == write(model, PROMPTS, [9] * 8, mix=(other, 0.4)) != write(model, PROMPTS, [9] * 8)
    assert torch.equal(wrong.columns, before) and wrong.cache.get_seq_length() == width
    shapes, handle = sent(model)
    reading = Reading(model, PROMPTS, PAD)
    text = write(model, PROMPTS, [9] * 8, reading, mix=(other, 0.))
    handle.remove()
    assert all(shape[1] == 1 for shape in shapes[1:]) and text == write(model, PROMPTS, [9] * 8)

def test_the_sampler_passes_a_reading_on():
    model = tiny_model("gpt2")
    shapes, _ = sent(model)
    reading, sample = Reading(model, PROMPTS, PAD), sampler(model, [EOS], PAD, V)
    shapes.clear()
    texts = sample(PROMPTS, KEYS, [12] * 8, reading)
    assert all(width == 1 for _, width in shapes) and texts == sample(PROMPTS, KEYS, [12] * 8)

@pytest.mark.pitfall(29)
def test_pitfall_29_a_student_in_training_writes_on_without_dropout():
    model = tiny_model("gpt2")
    expected = write(model, PROMPTS, [9] * 8)
    model.train()
    reading = Reading(model, PROMPTS, PAD)
    assert write(model, PROMPTS, [9] * 8, reading) == expected and all(m.training for m in model.modules())

@every_kind
def test_a_model_with_adapters_writes_on_from_what_they_made_it_read(kind):
    model = add_lora(tiny_model(kind), 2, 4, 0.1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.copy_(torch.randn(p.shape, generator=generator_for(name)))
    shapes, _ = sent(base_model(model))
    reading = Reading(model, [p + [20, 21] for p in PROMPTS], PAD)
    reading.cut([len(p) for p in PROMPTS])
    texts = write(model, PROMPTS, [9] * 8, reading)
    assert all(width == 1 for _, width in shapes[1:])
    assert texts == write(model, PROMPTS, [9] * 8) != write(tiny_model(kind), PROMPTS, [9] * 8)

@every_kind
def test_a_reading_under_autocast_is_finite_and_can_be_written_on(kind):
    model = tiny_model(kind)
    whole = Reading(model, PROMPTS, PAD).hidden
    with torch.autocast("cpu", torch.bfloat16):
        reading = Reading(model, [p + [20, 21] for p in PROMPTS], PAD)
        reading.replace([len(p) for p in PROMPTS], [[], [22], [23, 24], [], [], [25] * 4, [], [26]])
        reading.cut([len(p) for p in PROMPTS])
        texts = write(model, PROMPTS, [5] * 8, reading, stops=())
    assert reading.hidden.isfinite().all() and all(len(t) == 5 and max(t) < V for t in texts)
    for b, p in enumerate(PROMPTS): assert (reading.hidden[b, :len(p)].float() - whole[b, :len(p)]).abs().max() < 0.1 * whole[b, :len(p)].abs().max()


# --- a few rows on a CPU

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(1,), (4, 1), (2, 3, 5), (33,)])
def test_few_rows_computes_what_linear_computes_and_leaves_no_trace(bias, shape):
    layer = nn.Linear(7, 5, bias=bias).double()
    x = torch.randn(*shape, 7, dtype=torch.float64)
    usual = layer(x)
    with few_rows(layer): found = layer(x)
    assert found.shape == usual.shape and torch.allclose(found, usual, atol=1e-12, rtol=0) and 'forward' not in vars(layer)

def test_few_rows_leaves_other_layers_alone():
    class Own(nn.Linear): pass
    own, patched = Own(3, 3), nn.Linear(3, 3)
    patched.forward = lambda x: 'mine'
    with few_rows(own, patched): assert 'forward' not in vars(own) and patched(None) == 'mine'
    assert patched(None) == 'mine'
