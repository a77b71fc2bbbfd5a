"""Our divergences against those of two public libraries, value and gradient, on the same random numbers. Each test says which of their settings is which of ours.

Both are optional: a test is skipped where its library is not installed. They need no GPU and no compiler: `pip install --no-deps trl liger-kernel`."""
import importlib, importlib.metadata, os
import pytest, torch
from packaging.version import Version
from mgsr_nb.divergences import forward_kl, jsd, masked_mean, reverse_kl

B, T, V, H = 3, 7, 23, 5
BETAS = pytest.mark.parametrize('beta', [0., .1, .5, .8, 1.])
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
MASKS = pytest.mark.parametrize('masked', ['nothing', 'some', 'everything'])
IGNORED = -100


TRL = '1.16'     # older ones give NaN where no label counts, and have no chunked divergence
LIGER = '0.7'    # older ones count the labels that are -100


def peer(package, at_least, module):
    "The module of an optional package, or a skip that says what is missing."
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'    # its trainers warn at import
    install = f'to compare with it: pip install --no-deps "{package}>={at_least}"'
    pytest.importorskip(module.split('.')[0], reason=f'{package} is not installed; {install}')
    version = importlib.metadata.version(package)
    if Version(version) < Version(at_least): pytest.skip(f'{package} {version} is too old; {install}')
    return importlib.import_module(module)


@pytest.fixture
def trl_loss(): return peer('trl', TRL, 'trl.experimental.gkd').GKDTrainer.generalized_jsd_loss

@pytest.fixture
def trl_chunked(): return peer('trl', TRL, 'trl.kernels.chunked_divergence').ChunkedDivergenceFunction.apply

@pytest.fixture
def liger(): return peer('liger-kernel', LIGER, 'liger_kernel.chunked_loss').LigerFusedLinearJSDLoss


def ours(beta, student, teacher):
    "(..., V) logits -> (...) nats: what both libraries call beta is ours, and their ends are two other functions of ours, since our jsd is 0 there."
    return forward_kl(student, teacher) if beta == 0 else reverse_kl(student, teacher) if beta == 1 else jsd(student, teacher, beta=beta)


def random(*shape, seed, dtype, scale=2.):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_labels(masked, seed=5):
    "(B, T) ids, -100 where the position does not count: nowhere, at a prompt and at padding of different lengths, everywhere."
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    if masked == 'everything': ids[:] = IGNORED
    if masked == 'some':
        for row, (prompt, end) in enumerate([(1, 7), (3, 6), (0, 2)]): ids[row, :prompt], ids[row, end:] = IGNORED, IGNORED
    return ids


def value_and_gradients(loss, *inputs):
    "Value of a scalar loss and its gradients in the inputs."
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def same(found, expected, dtype, value_dtype=None):
    "Equal up to rounding; `value_dtype` where a library sums the value in another type than it computes in. A missing term, another weight or a shift is far larger."
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        tol = tolerance[(value_dtype or dtype) if i == 0 else dtype]
        torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol * max(b.abs().max().item(), 1e-3))


@pytest.mark.pitfall(5, 14)
@MASKS
@DTYPES
@BETAS
def test_trl_generalized_jsd(trl_loss, beta, dtype, masked):
    """TRL `GKDTrainer.generalized_jsd_loss`: its beta is ours, the weight of the teacher in the mixture and of the teacher's KL; 0 is our forward_kl, 1 our reverse_kl.

    Its labels are shifted already: the label at a position belongs to the logits at that position, -100 does not count. With labels its `batchmean` is our masked_mean."""
    student, teacher = (random(B, T, V, seed=s, dtype=dtype) for s in (1, 2))
    labels = random_labels(masked)
    theirs = value_and_gradients(lambda z: trl_loss(z, teacher, labels=labels, beta=beta), student)
    same(value_and_gradients(lambda z: masked_mean(ours(beta, z, teacher), labels != IGNORED), student), theirs, dtype)
    assert (theirs[0] > .05) == (masked != 'everything')


@pytest.mark.pitfall(5)
@DTYPES
@BETAS
def test_trl_per_token(trl_loss, beta, dtype):
    "TRL with `reduction='none'` gives one number for each class, (B, T, V); their sum over the classes is our value of the token."
    student, teacher = (random(B, T, V, seed=s, dtype=dtype) for s in (3, 4))
    weight = random(B, T, seed=5, dtype=dtype)      # a gradient of its own for every token
    theirs = value_and_gradients(lambda z: (weight * trl_loss(z, teacher, beta=beta, reduction='none').sum(-1)).sum(), student)
    same(value_and_gradients(lambda z: (weight * ours(beta, z, teacher)).sum(), student), theirs, dtype)


@pytest.mark.pitfall(14)
def test_trl_without_labels_divides_by_sequences(trl_loss):
    "TRL without labels divides by the batch size B, not by the B T tokens: T times our mean. Only with labels are the two means one."
    student, teacher = (random(B, T, V, seed=s, dtype=torch.float64) for s in (1, 2))
    theirs, all_tokens = trl_loss(student, teacher, beta=.3), torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(theirs, T * masked_mean(jsd(student, teacher, beta=.3), all_tokens))


@pytest.mark.pitfall(5)
def test_the_other_convention_would_be_noticed(trl_loss):
    "With beta read as the weight of the student (1 - ours) the numbers are far apart where the teacher is the surer one: the agreement above is no accident."
    student, teacher = random(B, T, V, seed=1, dtype=torch.float64, scale=.5), random(B, T, V, seed=2, dtype=torch.float64, scale=5.)
    labels = random_labels('some')
    mask = labels != IGNORED
    for beta in (.1, .3, .8):
        theirs = trl_loss(student, teacher, labels=labels, beta=beta)
        assert abs(masked_mean(jsd(student, teacher, beta=1 - beta), mask) / theirs - 1) > .03


def heads(dtype):
    "Student hidden states (N, H) and head (V, H), and the teacher's with another width."
    return (random(B * T, H, seed=1, dtype=dtype, scale=1.), random(V, H, seed=2, dtype=dtype, scale=1.),
            random(B * T, H + 2, seed=3, dtype=dtype, scale=1.), random(V, H + 2, seed=4, dtype=dtype, scale=1.))


@pytest.mark.pitfall(5, 14, 16)
@pytest.mark.parametrize('chunk', [1, 4, 1024])
@MASKS
@DTYPES
@BETAS
def test_liger_chunked_jsd(liger, beta, dtype, masked, chunk):
    """Liger `LigerFusedLinearJSDLoss`: its beta is ours, 0 is our forward_kl and 1 our reverse_kl. Its loss is weight_hard_loss NLL + weight_soft_loss JSD,
    each a mean over the labels that are not -100; with weights 0 and 1 it is our masked_mean of the logits of both heads. It sums the value in float32, always.

    21 rows in chunks of at least 1, 4 (5 chunks, the last one shorter) or all at once."""
    hidden, head, teacher_hidden, teacher_head = heads(dtype)
    labels = random_labels(masked).flatten()
    soft = liger(weight_hard_loss=0., weight_soft_loss=1., beta=beta, ignore_index=IGNORED, temperature=1., compiled=False, chunk_size=chunk)
    theirs = value_and_gradients(lambda h, w: soft(h, w, teacher_hidden, teacher_head, labels), hidden, head)
    mean = lambda h, w: masked_mean(ours(beta, h @ w.T, teacher_hidden @ teacher_head.T), labels != IGNORED)
    same(value_and_gradients(mean, hidden, head), theirs, dtype, value_dtype=torch.float32)
    assert (theirs[0] > .05) == (masked != 'everything')


@pytest.mark.pitfall(5)
@BETAS
def test_trl_chunked_divergence(trl_chunked, beta):
    "TRL `ChunkedDivergenceFunction`, the loss of its DistillationTrainer: beta as in the dense one, a value for each token, float32 inside whatever comes in."
    hidden, head, teacher_hidden, teacher_head = heads(torch.float32)
    weight = random(B * T, seed=5, dtype=torch.float32)
    theirs = value_and_gradients(lambda h, w: (weight * trl_chunked(h, w, None, teacher_hidden, teacher_head, None, beta)[0]).sum(), hidden, head)
    same(value_and_gradients(lambda h, w: (weight * ours(beta, h @ w.T, teacher_hidden @ teacher_head.T)).sum(), hidden, head), theirs, torch.float32)
