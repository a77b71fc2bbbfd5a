"""MiniLLM: the term's gradient is that of the reverse KL of whole responses, counted out over all of them; what is approximated is approximated as stated."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from tiny_models import EOS, PAD, tiny_model
from mgsr_nb.divergences import log_probs
from mgsr_nb.minillm import Policy, PolicyGradient, importance, make_policy, returns
from mgsr_nb.objective import Objective, Text, whole_rows
from mgsr_nb.decoding import generate

INF = math.inf
each_form = pytest.mark.parametrize("single_step", [True, False])

def rows_of(log_q, log_p, labels, policy): return whole_rows(log_q, log_p, labels, policy=policy)

# --- returns by hand and by loops

def naive_returns(rewards, lengths, normalise, own):
    found, start = [], 0
    for n in lengths:
        for t in range(n):
            rest = rewards[start + t + (0 if own else 1):start + n]
            found.append(math.fsum(rest) / (len(rest) if normalise and rest else 1))
        start += n
    return found

def test_returns_by_hand():
    rewards = torch.tensor([-1., -2., 1., -3., 5.])
    assert returns(rewards, [4, 1], False).tolist() == [-4, -2, -3, 0, 0]
    assert returns(rewards, [4, 1], False, own=True).tolist() == [-5, -4, -2, -3, 5]
    assert returns(rewards, [4, 1]).tolist() == pytest.approx([-4 / 3, -1, -3, 0, 0])       # three, two and one tokens follow
    assert returns(rewards, [4, 1], own=True).tolist() == pytest.approx([-5 / 4, -4 / 3, -1, -3, 5])

@settings(max_examples=100, deadline=None)
@given(responses=st.lists(st.lists(st.floats(-20, 20), max_size=6), max_size=5), normalise=st.booleans(), own=st.booleans())
def test_returns_equal_a_loop(responses, normalise, own):
    rewards, lengths = [r for y in responses for r in y], [len(y) for y in responses]
    found = returns(torch.tensor(rewards, dtype=torch.float64), lengths, normalise, own)
    assert found.shape == (len(rewards),) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(naive_returns(rewards, lengths, normalise, own), abs=1e-9)

def test_a_response_does_not_see_its_neighbours():
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for own in (True, False):
        whole = returns(rewards, [3, 1, 5], True, own)
        assert torch.equal(whole, torch.cat([returns(r, [len(r)], True, own) for r in rewards.split([3, 1, 5])]))

def test_returns_of_a_long_response_in_float32():
    rewards = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(returns(rewards, [2000], False), returns(rewards.double(), [2000], False).float(), atol=1e-3, rtol=1e-4)

def test_a_last_token_has_no_return_however_large_its_reward():
    assert returns(torch.tensor([1e8, 3., 1e8]), [2, 1], False).tolist() == [3, 0, 0]

def test_no_tokens():
    for lengths in ([], [0, 0]):
        assert returns(torch.zeros(0), lengths).shape == (0,)
        assert [x.shape for x in make_policy(torch.zeros(0), torch.zeros(0), lengths, 0.2)] == [(0,)] * 4

def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(RuntimeError, match="sum exactly"): returns(torch.zeros(5), [2, 2])

# --- importance weights and the policy

def test_importance_by_hand():
    q, p = torch.tensor([0.5, 0.5, 0.5, 0.1]), torch.tensor([0.5, 1.0, 0.0, 0.9])
    assert importance(q.log(), p.log(), 0.2).tolist() == pytest.approx([1, 0.5 / 0.6, 1.25, 0.1 / 0.26])
    assert importance(q.log(), p.log(), 0).tolist() == importance(q.log(), p.log(), 0.).tolist() == [1, 1, 1, 1]

@settings(max_examples=100, deadline=None)
@given(log_q=st.floats(-1e4, 0), log_p=st.floats(-1e4, 0), alpha=st.floats(0.01, 0.99))
def test_importance_is_finite_and_bounded(log_q, log_p, alpha):
    w = float(importance(torch.tensor(log_q, dtype=torch.float64), torch.tensor(log_p, dtype=torch.float64), alpha))
    assert 0 <= w <= 1 / (1 - alpha) * (1 + 1e-9)

@pytest.mark.parametrize("alpha", [-0.1, 1., 2.])
def test_a_share_that_is_none_is_refused(alpha):
    with pytest.raises(ValueError, match="mixture weight"): importance(torch.zeros(1), torch.zeros(1), alpha)

def test_the_policy_holds_constants():
    log_q, log_p = (torch.randn(5, requires_grad=True) for _ in range(2))
    policy = make_policy(log_q, log_p, [3, 2], 0.2, normalise=True)
    assert not any(x.requires_grad for x in policy)
    q, p = log_q.detach(), log_p.detach()
    assert torch.equal(policy.old_log_q, q) and torch.equal(policy.importance, importance(q, p, 0.2))
    assert torch.equal(policy.returns, returns(p - q, [3, 2])) and torch.equal(policy.whole, returns(p - q, [3, 2], own=True))
    assert torch.equal(make_policy(log_q, log_p, [3, 2], normalise=False).whole, returns(p - q, [3, 2], False, True))
    assert make_policy(log_q, log_p, [5]).importance.tolist() == [1] * 5

# --- a world of 15 responses: 3 tokens, 0 ends a response, none is longer than 3

def responses(prefix=()):
    if prefix and (prefix[-1] == 0 or len(prefix) == 3): return [prefix]
    return [y for token in range(3) for y in responses(prefix + (token,))]

WORLD = responses()
PREFIXES = sorted({y[:t] for y in WORLD for t in range(len(y))})
LINE, IDS, LENGTHS = torch.tensor([PREFIXES.index(y[:t]) for y in WORLD for t in range(len(y))]), torch.tensor([i for y in WORLD for i in y]), [len(y) for y in WORLD]

def tables(seed=0):
    "Student (7, 3), with gradient, and teacher."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(7, 3, generator=g, dtype=torch.float64).requires_grad_(), 1.5 * torch.randn(7, 3, generator=g, dtype=torch.float64)

def token(table, y, t): return table[PREFIXES.index(y[:t])].log_softmax(-1)[y[t]]

def sequence_kl(student, teacher):
    "KL(q || p) of responses, in probability space."
    probability = lambda table, y: torch.stack([token(table, y, t).exp() for t in range(len(y))]).prod()
    return sum(probability(student, y) * torch.log(probability(student, y) / probability(teacher, y)) for y in WORLD)

def gradient(loss, student): return torch.autograd.grad(loss, student)[0]

def expected(term, student, teacher, alpha=0., normalise=False, policy=None):
    "Mean gradient of `term` over what the mixture writes."
    of_tokens = lambda table: log_probs(table)[LINE, IDS]
    policy = policy or make_policy(of_tokens(student), of_tokens(teacher), LENGTHS, alpha, normalise)
    values, _ = term(rows_of(log_probs(student)[LINE], log_probs(teacher)[LINE], IDS, policy))
    writer = (alpha * of_tokens(teacher).exp() + (1 - alpha) * of_tokens(student).exp()).detach()
    chance = torch.cat([w.prod().expand(len(w)) for w in writer.split(LENGTHS)])
    return gradient((chance * values).sum(), student)

def naive(student, teacher, alpha, weight, kl_weight, normalise=False, own=False):
    """Mean gradient, token by token. The reward of s in the return of t < s counts `weight(w, t, s)` times and the KL at t `kl_weight(w, t)` times, where w are
    the response's ratios; with `own` the reward of t as well, and there is no KL."""
    total = torch.zeros_like(student)
    for y in WORLD:
        log_q, log_p = ([token(table, y, t) for t in range(len(y))] for table in (student, teacher))
        chosen = [(float(q.detach().exp()), float(p.exp())) for q, p in zip(log_q, log_p)]
        mix = [alpha * p + (1 - alpha) * q for q, p in chosen]
        chance, w = math.prod(mix), [q / m for (q, _), m in zip(chosen, mix)]
        for t in range(len(y)):
            follow = range(t + (0 if own else 1), len(y))
            gain = sum(weight(w, t, s) * math.log(chosen[s][1] / chosen[s][0]) for s in follow) / (max(len(follow), 1) if normalise else 1)
            total -= chance * gain * gradient(log_q[t], student)
            if not own:
                q, p = (table[PREFIXES.index(y[:t])].log_softmax(-1) for table in (student, teacher))
                total += chance * kl_weight(w, t) * gradient((q.exp() * (q - p)).sum(), student)
    return total

one = lambda w, *at: 1.
ratio = lambda w, t, *s: w[t]                                   # MiniLLM's approximation
up_to_t = lambda w, t, *s: math.prod(w[:t + 1])                 # Eq. 5 as printed
up_to_reward = lambda w, t, s: math.prod(w[:s + 1])
before_t = lambda w, t: math.prod(w[:t])

def relative(found, exact): return float((found - exact).norm() / exact.norm())

def test_the_world_is_complete():
    assert len(WORLD) == 15 and len(PREFIXES) == 7 and len(IDS) == 41 and sum(y[-1] != 0 for y in WORLD) == 8    # eight end without a stop
    student, _ = tables()
    assert sum(math.prod(float(token(student, y, t).detach().exp()) for t in range(len(y))) for y in WORLD) == pytest.approx(1, abs=1e-12)

@each_form
@pytest.mark.parametrize("clip", [INF, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_is_that_of_the_kl_of_responses(seed, clip, single_step):
    "alpha = 0: the ratio is 1, so no clip matters either."
    student, teacher = tables(seed)
    exact = gradient(sequence_kl(student, teacher), student)
    found = expected(PolicyGradient(clip, single_step), student, teacher)
    assert exact.norm() > 0.1 and torch.allclose(found, exact, rtol=0, atol=1e-10)

def test_a_constant_added_to_the_return_changes_no_expectation():
    "The -1 of Eq. 2."
    student, teacher = tables()
    of_tokens = lambda table: log_probs(table)[LINE, IDS]
    policy = make_policy(of_tokens(student), of_tokens(teacher), LENGTHS, normalise=False)
    found = expected(PolicyGradient(INF, False), student, teacher, policy=policy._replace(whole=policy.whole - 1))
    assert torch.allclose(found, gradient(sequence_kl(student, teacher), student), rtol=0, atol=1e-10)

@each_form
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("alpha", [0., 0.2])
def test_the_expected_gradient_equals_the_formula_token_by_token(single_step, normalise, alpha):
    student, teacher = tables(1)
    found = expected(PolicyGradient(INF, single_step), student, teacher, alpha, normalise)
    assert torch.allclose(found, naive(student, teacher, alpha, ratio, one, normalise, own=not single_step), rtol=0, atol=1e-10)

def test_length_normalisation_is_another_objective():
    student, teacher = tables()
    exact = gradient(sequence_kl(student, teacher), student)
    assert relative(expected(PolicyGradient(INF), student, teacher, normalise=True), exact) > 0.1

# --- the teacher writes along

@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_products_of_all_ratios_give_the_exact_gradient(alpha):
    student, teacher = tables()
    exact = gradient(sequence_kl(student, teacher), student)
    assert torch.allclose(naive(student, teacher, alpha, up_to_reward, before_t), exact, rtol=0, atol=1e-10)
    assert torch.allclose(naive(student, teacher, alpha, up_to_reward, None, own=True), exact, rtol=0, atol=1e-10)

def test_the_weight_of_the_token_on_its_kl_changes_no_expectation():
    "So the term leaves it off."
    student, teacher = tables()
    both = naive(student, teacher, 0.3, ratio, ratio)
    assert torch.allclose(both, naive(student, teacher, 0.3, ratio, one), rtol=0, atol=1e-10)
    assert torch.allclose(both, expected(PolicyGradient(INF), student, teacher, 0.3), rtol=0, atol=1e-10)

def test_the_bias_of_the_single_ratio_and_of_the_product_up_to_the_token():
    "Measured: relative error of the mean gradient, alpha = 0.2. Neither is unbiased; both are first order in alpha."
    student, teacher = tables()
    exact = gradient(sequence_kl(student, teacher), student)
    error = lambda alpha, *weights: relative(naive(student, teacher, alpha, *weights), exact)
    assert error(0.2, ratio, one) == pytest.approx(0.382, abs=1e-3) and error(0.2, up_to_t, up_to_t) == pytest.approx(0.378, abs=1e-3)
    assert error(0.02, ratio, one) / error(0.01, ratio, one) == pytest.approx(2, rel=0.05)
    assert error(1e-6, ratio, one) < 1e-5
    assert error(0.2, up_to_reward, before_t) < 1e-12

def test_clipping_adds_a_bias_of_its_own_once_a_ratio_leaves_the_range():
    student, teacher = tables()
    inside, outside = (expected(PolicyGradient(clip), student, teacher, 0.2) for clip in (5., 0.2))
    assert torch.equal(inside, expected(PolicyGradient(INF), student, teacher, 0.2)) and (outside - inside).norm() > 0.01

def test_the_writer_of_the_weights_is_the_sampler():
    "E[w f] over mixed samples is E[f] over the student's: w = q / (alpha p + (1 - alpha) q) has mean 1, and not the other way round."
    student, teacher, n, v, alpha = tiny_model("llama"), tiny_model("llama", 3, seed=5), 4000, 8, 0.3
    with torch.no_grad(): log_q, log_p = (log_probs(m(input_ids=torch.tensor([[11, 12, 13]])).logits[0, -1, :v].double()) for m in (student, teacher))
    ids = torch.tensor(generate(student, [[11, 12, 13]] * n, [("w", i) for i in range(n)], [1] * n, [EOS], PAD, v, (teacher, alpha))).flatten()
    w = importance(log_q[ids], log_p[ids], alpha)
    near = lambda x, mean: abs(float(x.mean()) - mean) < 4 * float(x.std()) / math.sqrt(n)
    assert near(w, 1) and near(w * (log_p - log_q)[ids], float((log_q.exp() * (log_p - log_q)).sum()))
    assert not near(importance(log_p[ids], log_q[ids], alpha), 1) and not near(importance(log_q[ids], log_p[ids], 0.6), 1)

# --- clipping, by hand

def slope(gain, importance, clip=0.2, log_ratio=0., single_step=True):
    "Value, its derivative by the token's log q, and the note, of a token whose log q has moved by `log_ratio` since it was written."
    old = torch.tensor([0.3], dtype=torch.float64).log()
    now = (old + log_ratio).requires_grad_()
    log_q = torch.cat([now, torch.tensor([0.7], dtype=torch.float64).log()])[None]
    constants = [old, *(torch.tensor([x], dtype=torch.float64) for x in (importance, gain, gain))]
    value, notes = PolicyGradient(clip, single_step=False)(rows_of(log_q, log_q.detach(), torch.tensor([0]), Policy(*constants)))
    return float(value.detach()), float(torch.autograd.grad(value.sum(), now)[0]), float(notes["pg_clipped"])

@pytest.mark.parametrize("gain, weight, value, derivative, clipped", [
    (2., 1.0, -2.0, -2.0, 0), (-2., 1.0, 2.0, 2.0, 0),        # inside
    (2., 1.15, -2.3, -2.3, 0), (-2., 0.85, 1.7, 1.7, 0),
    (2., 1.25, -2.4, 0.0, 1), (-2., 1.25, 2.5, 2.5, 0),       # the student's token: not pushed up, still pushed down
    (2., 0.5, -1.0, -1.0, 0), (-2., 0.5, 1.6, 0.0, 1),        # the teacher's token: still pushed up, not pushed down
    (0., 1.25, 0.0, 0.0, 0)])
def test_clipping_by_hand(gain, weight, value, derivative, clipped):
    assert slope(gain, weight) == pytest.approx((value, derivative, clipped))

@settings(max_examples=150, deadline=None)
@given(gain=st.floats(-5, 5), weight=st.floats(0.05, 4), clip=st.floats(0.01, 2), move=st.floats(-0.5, 0.5))
def test_clipping_equals_the_rule_in_words(gain, weight, clip, move):
    "The gradient is gain x ratio, unless the ratio is beyond the border towards which the gain pushes it."
    rho = math.exp(move) * weight
    dropped = rho > 1 + clip and gain > 0 or rho < 1 - clip and gain < 0
    border = 1 + clip if rho > 1 + clip else 1 - clip
    if min(abs(rho - 1 - clip), abs(rho - 1 + clip)) < 1e-9: return
    assert slope(gain, weight, clip, move) == pytest.approx((-gain * (border if dropped else rho), 0. if dropped else -gain * rho, float(dropped)), abs=1e-9)

# --- the term

def batch(N=9, V=5, seed=0, lengths=(4, 1, 4), alpha=0.2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(N, V, generator=g, dtype=dtype) for _ in range(2))
    labels = torch.randint(V, (N,), generator=g)
    of = lambda x: log_probs(x).gather(-1, labels[:, None]).squeeze(-1)
    return q, p, labels, make_policy(of(q), of(p), lengths, alpha)

@each_form
def test_shapes_and_diagnostics(single_step):
    q, p, labels, policy = batch(seed=2)
    values, notes = PolicyGradient(single_step=single_step)(rows_of(log_probs(q.requires_grad_()), log_probs(p), labels, policy))
    assert values.shape == (9,) and values.requires_grad
    assert notes.keys() == {"pg_return", "pg_reverse_kl", "pg_clipped"} and all(x.shape == (9,) and not x.requires_grad for x in notes.values())
    kl = (log_probs(q).exp() * (log_probs(q) - log_probs(p))).sum(-1)
    gain, w = policy.returns if single_step else policy.whole, policy.importance
    assert torch.equal(notes["pg_return"], gain) and torch.allclose(notes["pg_reverse_kl"], kl)
    assert torch.equal(notes["pg_clipped"], ((gain > 0) & (w > 1.2) | (gain < 0) & (w < 0.8)).double()) and 0 < notes["pg_clipped"].sum() < 9

def test_it_is_a_term_of_the_distilled_text():
    term = PolicyGradient()
    assert (term.text, term.per, term.needs_teacher, term.clip, term.single_step) == ("distilled", "tokens", True, 0.2, True)
    assert list(term.parameters()) == []

def test_a_response_of_one_token_has_its_next_token_kl_only():
    q, p, labels, policy = batch(3, lengths=[1, 1, 1])
    q.requires_grad_()
    values, _ = PolicyGradient()(rows_of(log_probs(q), log_probs(p), labels, policy))
    kl = (log_probs(q).exp() * (log_probs(q) - log_probs(p))).sum(-1)
    assert torch.allclose(values, kl) and torch.allclose(gradient(values.sum(), q), gradient(kl.sum(), q))
    assert torch.allclose(policy.whole, (log_probs(p) - log_probs(q)).gather(-1, labels[:, None]).squeeze(-1))

@pytest.mark.pitfall(11)
@each_form
def test_pitfall_11_a_student_that_equals_its_teacher_gets_no_gradient_from_any_sample(single_step):
    q, _, labels, _ = batch()
    chosen = log_probs(q).gather(-1, labels[:, None]).squeeze(-1)
    policy = make_policy(chosen, chosen, [4, 1, 4], 0.2)
    q.requires_grad_()
    values, _ = PolicyGradient(single_step=single_step)(rows_of(log_probs(q), log_probs(q).detach(), labels, policy))
    assert torch.allclose(policy.importance, torch.ones(9, dtype=torch.float64)) and values.abs().max() < 1e-12
    assert gradient(values.sum(), q).abs().max() < 1e-12

@pytest.mark.pitfall(15)
@each_form
def test_pitfall_15_no_tokens_give_zero_with_a_graph(single_step):
    hidden = torch.zeros(0, 4, requires_grad=True)
    policy = make_policy(torch.zeros(0), torch.zeros(0), [], 0.2)
    values, notes = PolicyGradient(single_step=single_step)(rows_of(log_probs(hidden), log_probs(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long), policy))
    assert values.shape == (0,) and values.sum().item() == 0 and gradient(values.sum(), hidden).shape == (0, 4)
    text = Text(hidden, torch.zeros(0, dtype=torch.long), nn.Identity(), torch.zeros(0, 4), nn.Identity(), policy=policy)
    found = Objective({"pg": PolicyGradient(single_step=single_step)}, {"pg": 1.})(text, ["pg"], dict(distilled_tokens=torch.tensor(0)))
    found.loss.backward()
    assert found.loss.item() == 0

def test_rows_without_a_policy_are_refused():
    q, p, labels, _ = batch()
    with pytest.raises(ValueError, match="make_policy"): PolicyGradient()(rows_of(log_probs(q), log_probs(p), labels, None))

@pytest.mark.pitfall(16)
@each_form
@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 9, 100])
def test_pitfall_16_a_policy_cut_into_chunks_gives_the_same_sum(chunk, single_step):
    q, p, labels, policy = batch()
    dense = q.clone().requires_grad_()
    values, notes = PolicyGradient(single_step=single_step)(rows_of(log_probs(dense), log_probs(p), labels, policy))
    values.sum().backward()
    parts = [PolicyGradient(single_step=single_step)(rows_of(log_probs(q[a:a + chunk]), log_probs(p[a:a + chunk]), labels[a:a + chunk], Policy(*(x[a:a + chunk] for x in policy))))
             for a in range(0, 9, chunk)]
    assert torch.allclose(torch.cat([v for v, _ in parts]), values, rtol=0, atol=1e-14)
    hidden = q.clone().requires_grad_()
    text = Text(hidden, labels, nn.Identity(), p, nn.Identity(), policy=policy)
    found = Objective({"pg": PolicyGradient(single_step=single_step)}, {"pg": 0.5}, chunk)(text, ["pg"], dict(distilled_tokens=torch.tensor(9)))
    found.loss.backward()
    assert torch.allclose(found.sums["pg"], values.sum()) and torch.allclose(hidden.grad, dense.grad * 0.5 / 9, rtol=0, atol=1e-14)
    assert all(torch.allclose(found.notes[name], note.sum()) for name, note in notes.items())

@pytest.mark.pitfall(8)
@each_form
def test_pitfall_8_extreme_logits_give_finite_values_and_gradients(single_step):
    q, p, labels, _ = batch(dtype=torch.float32)
    labels[:] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    q[:, 4], p[:, 4], q[0, 1], p[1, 1], q[2] = -INF, -INF, 500., -500., torch.tensor([500., -500., -500., 0., -INF])
    p[3] = torch.tensor([500., 0., -500., -INF, -INF])            # the teacher excludes what the student wrote
    of = lambda x: log_probs(x).gather(-1, labels[:, None]).squeeze(-1)
    policy = make_policy(of(q), of(p), [4, 1, 4], 0.2)
    q.requires_grad_()
    values, notes = PolicyGradient(single_step=single_step)(rows_of(log_probs(q), log_probs(p), labels, policy))
    assert all(x.isfinite().all() for x in [*policy, values, gradient(values.sum(), q), *notes.values()])

def test_float32_is_close_to_float64():
    q, p, labels, _ = batch()
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b = q.to(dtype), p.to(dtype)
        of = lambda x: log_probs(x).gather(-1, labels[:, None]).squeeze(-1)
        values, notes = PolicyGradient()(rows_of(log_probs(a), log_probs(b), labels, make_policy(of(a), of(b), [4, 1, 4], 0.2)))
        assert {x.dtype for x in [values, *notes.values()]} == {dtype}
        found.append(values.double())
    assert torch.allclose(*found, atol=1e-5)

# --- it learns

@pytest.mark.parametrize("alpha, normalise, clip, single_step", [(0., False, INF, True), (0., False, INF, False), (0.2, True, 0.2, True), (0., True, 0.2, True)])
def test_descent_along_the_expected_gradient_reaches_the_teacher(alpha, normalise, clip, single_step):
    student, teacher = tables()
    start = float(sequence_kl(student, teacher).detach())
    for _ in range(150):
        step = expected(PolicyGradient(clip, single_step), student, teacher, alpha, normalise)
        student = (student - 3 * step).detach().requires_grad_()
    assert float(sequence_kl(student, teacher).detach()) < 0.02 * start
