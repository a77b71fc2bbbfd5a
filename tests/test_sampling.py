"""Sampling: draws follow the distribution, and a row's text is a function of its key, whatever else is in the batch."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from tiny_models import EOS, KINDS, PAD, tiny_model
from mgsr_nb import sampling as S
from mgsr_nb.data import Encoded, Example
from mgsr_nb.sampling import Fixed, Mixed, OnPolicy, draw_tokens, evaluating, generate, generator_for, noise, sampler

every_kind = pytest.mark.parametrize("kind", KINDS)
V = 60
PROMPTS = [[11, 12, 13], [14], [15, 16, 2, 17, 18, 19, 20], [9, 8], [1, 1, 30], [33] * 5, [40, 41], [50]]
KEYS = [("row", b) for b in range(len(PROMPTS))]

def run(model, rows=range(len(PROMPTS)), limits=12, stops=(EOS,), pad=PAD, vocab=V):
    limits = [limits] * len(PROMPTS) if isinstance(limits, int) else limits
    return generate(model, [PROMPTS[b] for b in rows], [KEYS[b] for b in rows], [limits[b] for b in rows], stops, pad, vocab)

def naive(model, prompt, key, limit, stops=(EOS,), vocab=V):
    "One sequence: no cache, no padding, no mask, no positions; the same random numbers, and the race as it is told: the first to arrive."
    generator, ids = generator_for(*key), []
    while len(ids) < limit and not (ids and ids[-1] in stops):
        with torch.no_grad(): p = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :vocab].softmax(-1)
        ids.append(int((-torch.rand(vocab, generator=generator).log() / p).argmin()))
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

def test_each_row_of_noise_comes_from_its_own_generator():
    rows = noise([generator_for("k", i) for i in range(3)], 5)
    for i in range(3): assert torch.equal(rows[i], torch.rand(5, generator=generator_for("k", i)))
    g = generator_for("k")
    assert torch.equal(noise([g, g], 5).flatten(), torch.rand(10, generator=generator_for("k")))

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
