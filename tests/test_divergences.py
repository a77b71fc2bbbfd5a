"""Divergences: each test is named after the pitfall it pins. References are written from the definition, in probability space and float64."""
import inspect, itertools, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from mgsr_nb.divergences import DIVERGENCES, adaptive_kl, alpha_beta, forward_kl, in_head, jsd, log_mixture, log_probs, masked_mean, reverse_kl, skew_forward_kl, skew_reverse_kl, symmetric_kl, tvd

ALL = pytest.mark.parametrize('name', sorted(DIVERGENCES))
KL = lambda a, b: (a * (a / b).log()).sum(-1)
def naive_adaptive(q, p, mass):
    "Row by row with loops: the head is filled from the likeliest class on; the weights are numbers."
    if p.dim() > 1: return torch.stack([naive_adaptive(a, b, mass) for a, b in zip(q, p)])
    head, total = set(), 0.
    for k in sorted(range(len(p)), key=lambda k: -float(p[k])):
        total += float(p[k])
        if head and total > mass: break
        head.add(k)
    gaps = [abs(a - b) for a, b in zip(q.tolist(), p.tolist())]
    share = sum(gaps[k] for k in head) / sum(gaps)
    return share * KL(p, q) + (1 - share) * KL(q, p)

def naive_alpha_beta(q, p, a, b):
    "As printed, and the two limits with their own formulas."
    if b == 0: return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    if a == 0: return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
    return -(p**a * q**b - a / (a + b) * p**(a + b) - b / (a + b) * q**(a + b)).sum(-1) / (a * b)

NAIVE = {   # probabilities (q, p), student first
    'forward_kl': lambda q, p: KL(p, q),
    'reverse_kl': lambda q, p: KL(q, p),
    'symmetric_kl': lambda q, p: (KL(p, q) + KL(q, p)) / 2,
    'jsd': lambda q, p, beta=.5: beta * KL(p, beta*p + (1-beta)*q) + (1-beta) * KL(q, beta*p + (1-beta)*q),
    'tvd': lambda q, p: (p - q).abs().sum(-1) / 2,
    'skew_forward_kl': lambda q, p, alpha=.1: KL(p, alpha*p + (1-alpha)*q),
    'skew_reverse_kl': lambda q, p, alpha=.1: KL(q, (1-alpha)*p + alpha*q),
    'adaptive_kl': lambda q, p, head_mass=.5: naive_adaptive(q, p, head_mass),
    'alpha_beta': lambda q, p, alpha=.2, beta=.7: naive_alpha_beta(q, p, alpha, beta),
}
OPTIONS = {'jsd': [{}, {'beta': .1}, {'beta': .9}], 'skew_forward_kl': [{}, {'alpha': .7}], 'skew_reverse_kl': [{}, {'alpha': .7}], 'adaptive_kl': [{}, {'head_mass': .2}, {'head_mass': .9}],
           'alpha_beta': [{}, *({'alpha': a, 'beta': b} for a, b in ((.5, .5), (1., 1.), (1., 0.), (0., 1.), (0., .6), (.4, 0.), (.01, 1.5)))]}
CASES = [pytest.param(n, o, id=f'{n}-{o}') for n in sorted(DIVERGENCES) for o in OPTIONS.get(n, [{}])]

# Three classes for hand calculation: p = (3/4, 1/8, 1/8), q = (1/4, 1/4, 1/2).
P3 = torch.tensor([6., 1., 1.], dtype=torch.float64).log()
Q3 = torch.tensor([1., 1., 2.], dtype=torch.float64).log()
LN2, LN3 = math.log(2), math.log(3)


def pair(*shape, seed=0, scale=3., dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in 'qp')


def grad(loss, student, *args, **kw):
    z = student.clone().requires_grad_()
    value = loss(z, *args, **kw)
    value.sum().backward()
    return value.detach(), z.grad


def close(a, b, tol=1e-12): torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tol, atol=tol)


logit_rows = st.integers(2, 8).flatmap(lambda v: st.tuples(*[st.lists(st.floats(-30, 30), min_size=v, max_size=v)] * 2))


@pytest.mark.pitfall(1)
@ALL
@settings(max_examples=60, deadline=None)
@given(rows=logit_rows)
def test_01_divergences_are_nonnegative_and_zero_at_equality(name, rows):
    q, p = torch.tensor(rows, dtype=torch.float64)
    f = DIVERGENCES[name]
    assert f(q, p) >= -1e-14
    assert abs(f(p, p)) <= 1e-14
    assert abs(f(p + 7., p)) <= 1e-13          # a shift of all logits is no change


@pytest.mark.pitfall(1)
@ALL
def test_01_unequal_distributions_are_apart(name):
    assert DIVERGENCES[name](Q3, P3) > .04


def test_01_forward_kl_is_not_the_cross_entropy():
    p, q = P3.softmax(-1), Q3.softmax(-1)
    cross_entropy, entropy = -(p * q.log()).sum(), -(p * p.log()).sum()
    close(forward_kl(Q3, P3), cross_entropy - entropy)
    assert entropy > .7


@pytest.mark.pitfall(2)
@pytest.mark.parametrize('f, options, by_hand', [
    (forward_kl, {}, 3/4*LN3 - 3/8*LN2),
    (reverse_kl, {}, 5/4*LN2 - 1/4*LN3),
    (symmetric_kl, {}, (7/8*LN2 + 1/2*LN3) / 2),
    (tvd, {}, 1/2),
    # m = (1/2, 3/16, 5/16)
    (jsd, {}, (3/4*math.log(3/2) + 1/8*math.log(2/3) + 1/8*math.log(2/5) + 1/4*math.log(1/2) + 1/4*math.log(4/3) + 1/2*math.log(8/5)) / 2),
    # alpha = 1/2: the same mixture, one side
    (skew_forward_kl, {'alpha': .5}, 3/4*math.log(3/2) + 1/8*math.log(2/3) + 1/8*math.log(2/5)),
    (skew_reverse_kl, {'alpha': .5}, 1/4*math.log(1/2) + 1/4*math.log(4/3) + 1/2*math.log(8/5)),
    # alpha = 1/3: p/3 + 2q/3 = (5/12, 5/24, 3/8);   2p/3 + q/3 = (7/12, 1/6, 1/4)
    (skew_forward_kl, {'alpha': 1/3}, 3/4*math.log(9/5) + 1/8*math.log(3/5) + 1/8*math.log(1/3)),
    (skew_reverse_kl, {'alpha': 1/3}, 1/4*math.log(3/7) + 1/4*math.log(3/2) + 1/2*math.log(2)),
    # the head is the first class, and half of the gap
    (adaptive_kl, {}, (7/8*LN2 + 1/2*LN3) / 2),
    (alpha_beta, {'alpha': 1., 'beta': 1.}, 13/64),
    (alpha_beta, {'alpha': .5, 'beta': .5}, 4 - 3**.5 - 2**-.5 - 1),
    (alpha_beta, {'alpha': 1., 'beta': 0.}, 3/4*LN3 - 3/8*LN2), (alpha_beta, {'alpha': 0., 'beta': 1.}, 5/4*LN2 - 1/4*LN3),
], ids=lambda x: getattr(x, '__name__', None))
def test_02_direction_by_a_hand_computed_example(f, options, by_hand):
    close(f(Q3, P3, **options), by_hand)


@pytest.mark.pitfall(3)
@pytest.mark.parametrize('name, options', CASES)
def test_03_value_and_gradient_equal_a_naive_float64_reference(name, options):
    q, p = pair(4, 5, 11)
    naive = lambda zq, zp: NAIVE[name](zq.softmax(-1), zp.softmax(-1), **options)
    for ours, reference in zip(grad(DIVERGENCES[name], q, p, **options), grad(naive, q, p)): close(ours, reference)


@pytest.mark.pitfall(3)
@pytest.mark.parametrize('name, options', CASES)
def test_03_from_log_probs_is_the_same_function(name, options):
    q, p = pair(6, 9)
    f = DIVERGENCES[name]
    assert torch.equal(f.from_log_probs(log_probs(q), log_probs(p), **options), f(q, p, **options))


@pytest.mark.pitfall(4)
@ALL
def test_04_gradient_reaches_the_student_and_not_the_teacher(name):
    q, p = (x.requires_grad_() for x in pair(3, 7))
    DIVERGENCES[name](q, p).sum().backward()
    assert p.grad is None
    assert (q.grad.abs().sum(-1) > 1e-3).all()


@pytest.mark.pitfall(4)
@pytest.mark.parametrize('name', ['forward_kl', 'reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'alpha_beta'])
def test_04_swapping_student_and_teacher_changes_the_loss(name):
    f = DIVERGENCES[name]
    assert abs(f(Q3, P3) - f(P3, Q3)) > 1e-3


@pytest.mark.pitfall(4)
@pytest.mark.parametrize('name', ['symmetric_kl', 'tvd', 'jsd'])
def test_04_symmetric_losses_keep_the_value_and_not_the_gradient_when_swapped(name):
    f = DIVERGENCES[name]
    close(f(Q3, P3), f(P3, Q3))
    assert (grad(f, Q3, P3)[1] - grad(f, P3, Q3)[1]).abs().max() > 1e-3


@pytest.mark.pitfall(5)
def test_05_jsd_beta_weighs_the_teacher_in_the_mixture():
    # opposite certainties: m = (beta, 1 - beta), so KL(p||m) = -ln beta and KL(q||m) = -ln(1 - beta)
    p, q = torch.tensor([0., -1e3], dtype=torch.float64), torch.tensor([-1e3, 0.], dtype=torch.float64)
    close(jsd(q, p, beta=.2), -.2*math.log(.2) - .8*math.log(.8))
    # a fixed asymmetric pair tells the teacher's weight from the student's
    assert abs(jsd(Q3, P3, beta=.1) - jsd(P3, Q3, beta=.1)) > 1e-3
    close(jsd(Q3, P3, beta=.1), jsd(P3, Q3, beta=.9))
    close(jsd(Q3, P3), jsd(P3, Q3))


@pytest.mark.pitfall(5)
def test_05_jsd_limits_are_forward_and_reverse_kl():
    q, p = pair(20, 6, scale=1.)
    gap = lambda b: ((jsd(q, p, beta=b) / b - forward_kl(q, p)).abs().max(), (jsd(q, p, beta=1-b) / b - reverse_kl(q, p)).abs().max())
    for b in (1e-2, 1e-3, 1e-4): assert max(gap(b)) < 20 * b     # linear in beta: it goes to 0
    assert max(gap(1e-4)) < 1e-2 * max(gap(1e-1))


@pytest.mark.pitfall(5)
@pytest.mark.parametrize('f, option', [(jsd, 'beta'), (skew_forward_kl, 'alpha'), (skew_reverse_kl, 'alpha')])
@pytest.mark.parametrize('weight', [0., 1., -.1, 1.5, math.nan])
def test_05_mixture_weight_outside_the_open_interval_is_refused(f, option, weight):
    with pytest.raises(ValueError, match='strictly between 0 and 1'): f(Q3, P3, **{option: weight})


@pytest.mark.pitfall(2)
def test_02_limits_of_the_alpha_beta_divergence():
    "Linear in the parameter that vanishes, value and gradient, and the two KLs themselves at its end; swapping the pair swaps alpha and beta."
    q, p = pair(20, 6, scale=1.)
    def gap(e):
        ends = [(grad(alpha_beta, q, p, alpha=1., beta=e), grad(forward_kl, q, p)), (grad(alpha_beta, q, p, alpha=e, beta=1.), grad(reverse_kl, q, p))]
        return max((a - b).abs().max() for pairs in ends for a, b in zip(*pairs))
    assert all(gap(e) < 20 * e for e in (1e-2, 1e-3, 1e-4)) and gap(0.) < 1e-14
    assert gap(1e-4) < 1e-2 * gap(1e-1)
    for a, b in ((.2, .7), (1., 0.), (.3, 0.)): close(alpha_beta(q, p, alpha=a, beta=b), alpha_beta(p, q, alpha=b, beta=a))
    H2 = 1 - (q.softmax(-1) * p.softmax(-1)).sqrt().sum(-1)
    close(alpha_beta(q, p, alpha=.5, beta=.5), 4 * H2)

@pytest.mark.pitfall(2)
def test_02_adaptive_kl_is_the_kl_of_where_the_student_is_wrong():
    six = torch.tensor([.25, .2, .2, .15, .1, .1], dtype=torch.float64).log()
    in_the_head, in_the_tail = (torch.tensor(x, dtype=torch.float64).log() for x in ([.2, .25, .2, .15, .1, .1], [.25, .2, .2, .2, .1, .05]))
    close(adaptive_kl(in_the_head, six), forward_kl(in_the_head, six))
    close(adaptive_kl(in_the_tail, six), reverse_kl(in_the_tail, six))
    for f, z, g in ((adaptive_kl, in_the_head, forward_kl), (adaptive_kl, in_the_tail, reverse_kl)): close(grad(f, z, six)[1], grad(g, z, six)[1])
    q, p = pair(40, 9)
    low, high = torch.minimum(forward_kl(q, p), reverse_kl(q, p)), torch.maximum(forward_kl(q, p), reverse_kl(q, p))
    assert ((adaptive_kl(q, p) >= low) & (adaptive_kl(q, p) <= high)).all()

@pytest.mark.pitfall(10)
def test_10_classes_that_are_as_likely_are_on_the_same_side_of_the_head():
    p = torch.tensor([.3, .15, .15, .15, .15, .1], dtype=torch.float64)
    for order in itertools.permutations(range(6)): assert torch.equal(in_head(p[list(order)], .5), (p > .12)[list(order)])
    assert in_head(torch.full((4,), .25), .1).all()                    # one class at least, and its equals
    assert in_head(torch.tensor([.9, .1]), .5).tolist() == [True, False] and in_head(torch.tensor([.3, .3, .2, .2]), .7).tolist() == [True, True, False, False]

@pytest.mark.parametrize('options', [dict(alpha=0., beta=0.), dict(alpha=-.1), dict(beta=-1.), dict(alpha=math.nan)])
def test_powers_without_a_divergence_are_refused(options):
    with pytest.raises(ValueError, match='expected numbers >= 0'): alpha_beta(Q3, P3, **options)

@pytest.mark.pitfall(6)
def test_06_skew_kl_is_a_kl_to_a_mixture_not_a_mixture_of_kls():
    a = .1
    assert abs(skew_forward_kl(Q3, P3) - (1-a) * forward_kl(Q3, P3)) > .05
    assert abs(skew_reverse_kl(Q3, P3) - (1-a) * reverse_kl(Q3, P3)) > .05
    # forward: alpha weighs the teacher, reverse: the student. Opposite certainties reach the bound -ln alpha in both.
    p, q = torch.tensor([0., -1e3], dtype=torch.float64), torch.tensor([-1e3, 0.], dtype=torch.float64)
    for f in (skew_forward_kl, skew_reverse_kl): close(f(q, p, alpha=.25), -math.log(.25))


@pytest.mark.pitfall(6)
def test_06_skew_default_alpha_is_distillms():
    close(skew_forward_kl(Q3, P3), skew_forward_kl(Q3, P3, alpha=.1))
    close(skew_reverse_kl(Q3, P3), skew_reverse_kl(Q3, P3, alpha=.1))


@pytest.mark.pitfall(6)
@settings(max_examples=100, deadline=None)
@given(rows=logit_rows, w=st.floats(.01, .99))
def test_06_log_mixture_is_the_log_of_the_mixture(rows, w):
    a, b = log_probs(torch.tensor(rows, dtype=torch.float64))
    close(log_mixture(a, b, w), (w * a.exp() + (1-w) * b.exp()).log())


@pytest.mark.pitfall(7)
@settings(max_examples=100, deadline=None)
@given(rows=logit_rows, w=st.floats(.01, .99))
def test_07_bounds_of_the_bounded_losses(rows, w):
    q, p = torch.tensor(rows, dtype=torch.float64)
    eps = 1e-12
    assert tvd(q, p) <= 1 + eps and jsd(q, p) <= LN2 + eps
    assert skew_forward_kl(q, p, alpha=w) <= -math.log(w) + eps and skew_reverse_kl(q, p, alpha=w) <= -math.log(w) + eps


@pytest.mark.pitfall(7)
def test_07_bounds_are_reached_by_disjoint_distributions():
    p, q = torch.tensor([500., -500.]), torch.tensor([-500., 500.])
    assert tvd(q, p) == 1
    close(jsd(q, p), LN2, 1e-6)


EXTREME = {
    'opposite certainties': ([-500., 500., 0.], [500., -500., 0.]),
    'equal certainties': ([500., -500., -500.], [500., -500., -500.]),
    'masked in both': ([1., 2., -torch.inf], [2., 1., -torch.inf]),
    'masked in the student': ([1., -torch.inf, 3.], [2., 1., 0.]),
    'masked in the teacher': ([2., 1., 0.], [1., -torch.inf, 3.]),
    'one class left': ([-torch.inf, 0., -torch.inf], [-torch.inf, 0., -torch.inf]),
    'least float32': ([1., 2., torch.finfo(torch.float32).min], [2., 1., torch.finfo(torch.float32).min]),
}


@pytest.mark.pitfall(8)
@ALL
@pytest.mark.parametrize('case', EXTREME)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_08_extreme_logits_give_finite_value_and_gradient(name, case, dtype):
    q, p = (torch.tensor(x).to(dtype) for x in EXTREME[case])
    value, gradient = grad(DIVERGENCES[name], q, p)
    assert value.isfinite() and gradient.isfinite().all() and value >= -1e-6
    assert (gradient[q == -torch.inf] == 0).all()


@pytest.mark.pitfall(8)
def test_08_extreme_values_are_right_not_only_finite():
    p, q = torch.tensor([500., -500.]), torch.tensor([-500., 500.])
    assert forward_kl(q, p) == reverse_kl(q, p) == symmetric_kl(q, p) == 1000
    assert log_probs(torch.tensor([0., -torch.inf])).exp().tolist() == [1., 0.]
    assert NAIVE['forward_kl'](q.softmax(-1), p.softmax(-1)).isnan()      # what the textbook formula does


@pytest.mark.pitfall(8)
def test_08_a_nan_logit_is_not_hidden():
    assert forward_kl(torch.tensor([1., torch.nan]), torch.tensor([1., 2.])).isnan()


@pytest.mark.pitfall(9)
@ALL
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_09_low_precision_logits_are_upcast_before_the_softmax(name, dtype):
    q, p = (x.to(dtype) for x in pair(4, 300))
    f = DIVERGENCES[name]
    value, gradient = grad(f, q, p)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    exact, exact_gradient = grad(f, q.float(), p.float())
    assert torch.equal(value, exact) and torch.equal(gradient, exact_gradient.to(dtype))


@pytest.mark.pitfall(9)
def test_09_the_upcast_matters():
    q, p = (x.bfloat16() for x in pair(4, 300))
    late = forward_kl.from_log_probs(q.log_softmax(-1), p.log_softmax(-1)).float()
    reference = forward_kl(q.double(), p.double())
    assert (late - reference).abs().max() > 100 * (forward_kl(q, p) - reference).abs().max()


@pytest.mark.pitfall(9)
@ALL
def test_09_float64_stays_float64(name): assert DIVERGENCES[name](*pair(2, 3)).dtype == torch.float64


def test_09_nan_to_num_would_not_have_helped():
    p = torch.tensor([500., -500.])
    value, gradient = grad(lambda z: NAIVE['forward_kl'](z.softmax(-1), p.softmax(-1)).nan_to_num(), p)
    assert value == 0 and gradient.isnan().all()
    assert grad(forward_kl, p, p)[1].tolist() == [0, 0]


@pytest.mark.pitfall(10)
@ALL
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), permutation=st.permutations(range(9)))
def test_10_permuting_the_vocabulary_changes_nothing(name, seed, permutation):
    q, p = pair(3, 9, seed=seed)
    f = DIVERGENCES[name]
    value, gradient = grad(f, q, p)
    permuted_value, permuted_gradient = grad(f, q[:, permutation], p[:, permutation])
    close(permuted_value, value, 1e-13); close(permuted_gradient, gradient[:, permutation], 1e-13)


@pytest.mark.pitfall(10)
@ALL
def test_10_permuting_only_one_side_is_noticed(name):
    f = DIVERGENCES[name]
    assert abs(f(Q3.flip(0), P3) - f(Q3, P3)) > 1e-2


@pytest.mark.pitfall(11)
@ALL
@pytest.mark.parametrize('row', [[1., 2., 3.], [500., -500., 0.], [0., -torch.inf, 1.], [0., 0., 0.]])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_11_student_equal_to_teacher_gives_zero_and_zero_gradient(name, row, dtype):
    z = torch.tensor(row, dtype=dtype)
    value, gradient = grad(DIVERGENCES[name], z, z.clone())
    tol = 8 * torch.finfo(dtype).eps
    assert abs(value) <= tol and gradient.abs().max() <= tol


@pytest.mark.pitfall(13)
@pytest.mark.parametrize('name, options', CASES)
@pytest.mark.parametrize('temperature', [.5, 1., 4.])
def test_13_both_sides_are_taken_as_they_are_given(name, options, temperature):
    "No temperature of its own: logits that were divided by one on both sides give the divergence of those distributions, and on one side another value."
    q, p = (z / temperature for z in pair(4, 7))
    close(DIVERGENCES[name](q, p, **options), NAIVE[name](q.softmax(-1), p.softmax(-1), **options), 1e-9)
    if temperature != 1: assert (DIVERGENCES[name](q * temperature, p, **options) - DIVERGENCES[name](q, p, **options)).abs().max() > 1e-3


@pytest.mark.pitfall(14)
@ALL
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_14_padding_the_vocabulary_changes_nothing(name, dtype):
    q, p = pair(4, 6, dtype=dtype)
    pad = lambda x: torch.nn.functional.pad(x, (0, 3), value=-torch.inf)
    f = DIVERGENCES[name]
    value, gradient = grad(f, q, p)
    padded_value, padded_gradient = grad(f, pad(q), pad(p))
    tol = 8 * torch.finfo(dtype).eps
    close(padded_value, value, tol); close(padded_gradient[:, :6], gradient, tol)
    assert (padded_gradient[:, 6:] == 0).all()


@pytest.mark.pitfall(14)
@ALL
def test_14_more_padded_columns_change_nothing(name):
    q, p = pair(2, 3, 5)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    more = lambda x: torch.cat([x, torch.full((2, 4, 5), torch.nan, dtype=x.dtype)], 1)
    mask_more = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
    f = DIVERGENCES[name]
    close(masked_mean(f(more(q), more(p)), mask_more), masked_mean(f(q, p), mask))


@pytest.mark.pitfall(14)
def test_14_the_mean_is_over_supervised_tokens():
    values, mask = torch.arange(12.).view(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = mask[2, 2] = True
    assert masked_mean(values, mask) == (1 + 11 + 10) / 3


@pytest.mark.pitfall(15)
def test_15_without_supervised_tokens_zero_with_a_graph():
    q, p = pair(2, 3, 4)
    q.requires_grad_()
    loss = masked_mean(forward_kl(q, p), torch.zeros(2, 3, dtype=torch.bool))
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.pitfall(15)
def test_15_an_empty_selection_gives_zero_with_a_graph():
    values = torch.zeros(0, requires_grad=True)
    loss = masked_mean(values, torch.zeros(0, dtype=torch.bool))
    assert loss == 0 and loss.requires_grad
    loss.backward()


@pytest.mark.pitfall(15)
@ALL
def test_15_a_fully_masked_row_among_others_contributes_nothing(name):
    q, p = pair(3, 2, 4)
    q[1], p[1] = torch.nan, torch.nan
    mask = torch.tensor([[True] * 2, [False] * 2, [True] * 2])
    value, _ = grad(lambda z: masked_mean(DIVERGENCES[name](z, p), mask), q)
    close(value, DIVERGENCES[name](q[[0, 2]], p[[0, 2]]).mean())


@pytest.mark.pitfall(15)
def test_15_nan_at_masked_positions_reaches_neither_value_nor_gradient():
    values = torch.tensor([1., torch.nan, 5., torch.inf], requires_grad=True)
    loss = masked_mean(values, torch.tensor([True, False, True, False]))
    loss.backward()
    assert loss == 3 and values.grad.tolist() == [.5, 0, .5, 0]


def test_masked_mean_refuses_what_would_be_silently_wrong():
    with pytest.raises(TypeError, match='bool'): masked_mean(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match='equal'): masked_mean(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))


@ALL
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=name): DIVERGENCES[name](torch.zeros(4, 5), torch.zeros(1, 5))


@ALL
@pytest.mark.parametrize('shape', [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_one_value_per_position(name, shape): assert DIVERGENCES[name](torch.zeros(shape), torch.zeros(shape)).shape == shape[:-1]


@ALL
def test_the_signature_says_what_is_passed(name):
    parameters = list(inspect.signature(DIVERGENCES[name]).parameters)
    assert parameters[:2] == ['student_logits', 'teacher_logits']
    assert list(inspect.signature(DIVERGENCES[name].from_log_probs).parameters)[:2] == ['log_q', 'log_p']


def test_the_table_lists_all_by_name():
    assert {n: f.__name__ for n, f in DIVERGENCES.items()} == {n: n for n in NAIVE}
    # different functions: no two agree on a generic pair
    values = {n: f(*pair(1, 6, seed=3)).item() for n, f in DIVERGENCES.items()}
    assert all(abs(values[a] - values[b]) > 1e-4 for a, b in itertools.combinations(values, 2))


@ALL
def test_the_loss_stays_on_its_device_and_reads_no_value_back(name):
    # on the meta device an `.item()`, a branch on a value or a tensor made elsewhere raises
    q, p = torch.zeros(3, 5, device='meta', requires_grad=True), torch.zeros(3, 5, device='meta')
    masked_mean(DIVERGENCES[name](q, p), torch.ones(3, dtype=torch.bool, device='meta')).backward()
    assert q.grad.device.type == 'meta'


@pytest.mark.pitfall(8)
@pytest.mark.parametrize("shift", (-2e4, -1e6, 2e4))
def test_a_shift_of_all_logits_changes_nothing(shift):
    "Logits were cut at -1e4 before their maximum was taken away: the KL of the first pair was 0."
    z, w = torch.tensor([1., 2.], dtype=torch.float64), torch.tensor([2., 1.], dtype=torch.float64)
    assert forward_kl(z + shift, w + shift).item() == pytest.approx(0.462117, abs=1e-6)
    masked = torch.tensor([0., 1., -torch.inf], dtype=torch.float64)
    assert torch.allclose(log_probs(masked + shift).exp(), log_probs(masked).exp(), atol=1e-9)
    assert log_probs(torch.full((3,), -torch.inf)).exp().tolist() == pytest.approx([1 / 3] * 3)
