"""Objective: Eq. 11 in chunks equals the definitions, written naively below in probability space and float64, in value and in every gradient."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from tiny_models import EOS, KINDS, PAD, tiny_model
from mgsr_nb import objective as O
from mgsr_nb.dac_kl import CLASSES, DACKL, REMAINDERS, TARGETS, FixedClip, LearnedClip, NoClip, SubNetwork, TopFraction
from mgsr_nb.data import collate, labels, supervised
from mgsr_nb.divergences import DIVERGENCES
from mgsr_nb.models import head_logits, hidden_states
from mgsr_nb.objective import DAC, NLL, Divergence, Objective, Span, Text
from mgsr_nb.span import RELATIONS, pair_weights

LENGTHS, SPANS = (5, 1, 5), [[(0, 2), (2, 5)], [(0, 1)], [(1, 4)]]      # N = 11 rows of three responses, four spans
N, V, H = 11, 6, 4

def rand(*shape, seed=0, scale=1.): return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(a, b, tol=1e-10): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

# ------------------------------------------------------------------------------------------------ the definitions
def naive_limits(net, q, p):
    "Eq. 6: an MLP on [p; sort p; q], or on the k most likely classes."
    k = net.top_k
    top = p.argsort(-1, descending=True)[:, :k]
    x = (torch.cat([p, p.sort(-1, descending=True).values, q], -1) if net.inputs == "full" else
         torch.cat([p.gather(-1, top), q.gather(-1, top), q.sort(-1, descending=True).values[:, :k]], -1))
    linear = [m for m in net.mlp if isinstance(m, nn.Linear)]
    for m in linear[:-1]:
        x = x @ m.weight.T + m.bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = 1 / (1 + torch.exp(-(x @ linear[-1].weight.T + linear[-1].bias)))
    return x[:, 0], torch.minimum(x[:, 1], x[:, 0])

def naive_mask(clip, q, p):
    "Eq. 7: how much each class is kept, without a gradient to either distribution."
    q, p = q.detach(), p.detach()
    if isinstance(clip, NoClip): return torch.ones_like(p)
    if isinstance(clip, TopFraction): return (p >= p.sort(-1, descending=True).values[:, [math.ceil(clip.fraction * p.shape[-1]) - 1]]).double()
    u, l = naive_limits(clip.sub_network, q, p) if isinstance(clip, LearnedClip) else (p.new_full(p.shape[:1], clip.upper), p.new_full(p.shape[:1], clip.lower))
    below = at_most = p
    if clip.reading != "value":
        weight = p if clip.reading == "mass" else torch.full_like(p, 1 / p.shape[-1])
        less, equal = p[:, :, None] > p[:, None, :], p[:, :, None] >= p[:, None, :]       # (N, class, other class)
        below, at_most = (less * weight[:, None]).sum(-1), (equal * weight[:, None]).sum(-1)
    if clip.temperature == 0: return ((at_most >= l[:, None]) & (below <= u[:, None])).double()
    soft = lambda x: 1 / (1 + torch.exp(-x / clip.temperature))
    return soft(at_most - l[:, None]) * soft(u[:, None] - below)

def naive_dac(dac, q, p):
    "Eq. 8, the kept classes as a list of (weight, p, q), the target class at its end; no kept class gives 0, and so does an empty rest."
    mask, t = naive_mask(dac.clip, q, p), p.argmax(-1, keepdim=True)
    if dac.classes == "target": mask = mask * 0
    p_t, q_t = p.gather(-1, t), q.gather(-1, t)
    mask_t = mask.gather(-1, t) if (dac.target, dac.remainder) != ("twice", "bucket") else torch.zeros_like(p_t)    # the bucket counts it once
    extra = {"once": [torch.ones_like(mask_t)], "twice": [mask_t, torch.ones_like(mask_t)], "none": []}[dac.target]
    w, a, b = torch.cat([mask.scatter(-1, t, 0.), *extra], -1), torch.cat([p] + [p_t] * len(extra), -1), torch.cat([q] + [q_t] * len(extra), -1)
    if dac.remainder == "as_printed": return (w * a * torch.log(a / b)).sum(-1)
    if dac.remainder == "renormalise":
        w, a, b = (x[w.sum(-1) > 0] for x in (w, a, b))
        P, Q = ((w * x).sum(-1, keepdim=True) for x in (a, b))
        return (w * a / P * torch.log((a / P) / (b / Q))).sum(-1)
    dropped = (1 - mask).scatter(-1, t, 1. if dac.target == "none" else 0.)
    some = dropped.sum(-1) > 0
    P, Q = ((dropped * x).sum(-1)[some] for x in (p, q))
    return torch.cat([(w * a * torch.log(a / b)).sum(-1), P * torch.log(P / Q)])

def naive_pair(relation, a, b, c, d):
    "Distance of the student's pair (a, b) and the teacher's (c, d), each (V,)."
    if relation == "hadamard": return ((a * b - c * d) ** 2).sum().sqrt()
    if relation == "outer": return ((a[:, None] * b - c[:, None] * d) ** 2).sum().sqrt()
    cos = lambda x, y: (x * y).sum() / (x * x).sum().sqrt() / (y * y).sum().sqrt()
    return (cos(a, b) - cos(c, d)).abs()

def naive_span(relation, q, p, lengths, spans):
    "Eq. 9, 10 times the number of spans: a loop over responses, spans and neighbours."
    total, start = q.new_zeros(()), 0
    for n, found in zip(lengths, spans):
        for first, stop in found:
            for j in range(start + first, start + stop - 1): total = total + naive_pair(relation, q[j], q[j + 1], p[j], p[j + 1]) / (stop - first)
        start += n
    return total

def naive_sums(terms, q, p, ids, lengths=LENGTHS, spans=SPANS):
    kl = lambda a, b: (a * torch.log(a / b)).sum()
    sums = {}
    for name, term in terms.items():
        if isinstance(term, NLL): sums[name] = -torch.log(q[range(len(ids)), ids]).sum()
        elif isinstance(term, DAC): sums[name] = naive_dac(term.dac_kl, q, p).sum()
        elif isinstance(term, Span): sums[name] = naive_span(term.relation, q, p, lengths, spans)
        else: sums[name] = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "tvd": (p - q).abs().sum() / 2}[term.between.__name__]
    return sums

# ------------------------------------------------------------------------------------------------ both sides of the comparison
def f_sub(seed=3, **kw):
    net = SubNetwork(V, width=5, upper=0.6, lower=0.1, **kw).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.add_(rand(*p.shape, seed=seed + i, scale=0.3))   # the last layer starts at 0: no gradient would pass it
    return net

CLIPS = {
    "learned": lambda: LearnedClip(f_sub(inputs="topk", top_k=3), "value", 0.1), "learned_full": lambda: LearnedClip(f_sub(), "value", 0.1),
    "learned_rank": lambda: LearnedClip(f_sub(inputs="topk", top_k=3, hidden_layers=0), "rank", 0.2), "learned_mass": lambda: LearnedClip(f_sub(hidden_layers=2), "mass", 0.2),
    "fixed": lambda: FixedClip(0.5, 0.1), "fixed_soft": lambda: FixedClip(0.5, 0.1, "value", 0.05), "fixed_rank": lambda: FixedClip(0.93, 0.37, "rank"),
    "fixed_mass": lambda: FixedClip(0.8, 0.2, "mass", 0.1), "top": lambda: TopFraction(0.37), "none": NoClip}

def relations(): return {f"span_{r}": Span(r) for r in RELATIONS}

class Setting:
    "Hidden states, heads and labels of N rows; every tensor that may get a gradient."
    def __init__(self, n=N, v=V, lengths=LENGTHS, spans=SPANS, seed=0):
        self.hidden, self.head = rand(n, H, seed=seed).requires_grad_(), rand(v, H, seed=seed + 1).requires_grad_()
        self.t_hidden, self.t_head = rand(n, H + 1, seed=seed + 2).requires_grad_(), rand(v, H + 1, seed=seed + 3).requires_grad_()
        self.ids, self.lengths, self.spans = torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed)), lengths, spans

    def text(self, **kw):
        weights = torch.tensor(sum((pair_weights(s, n)[0] for s, n in zip(self.spans, self.lengths)), []), dtype=torch.float64)
        return Text(self.hidden, self.ids, lambda h: h @ self.head.T, self.t_hidden, lambda h: h @ self.t_head.T, weights, **kw)

    def naive(self, terms):
        softmax = lambda z: torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
        return naive_sums(terms, softmax(self.hidden @ self.head.T), softmax(self.t_hidden @ self.t_head.T).detach(), self.ids, self.lengths, self.spans)

def value_and_gradients(sums, setting, terms):
    "The sums, and the gradients of their sum with different weights for the student's hidden states, its head, and f_sub."
    net = [p for t in terms.values() for p in t.parameters()]
    loss = sum((i + 1) * s for i, s in enumerate(sums.values()))
    return {k: s.detach() for k, s in sums.items()}, torch.autograd.grad(loss, [setting.hidden, setting.head, *net], allow_unused=True)

def compare(terms, setting, chunks):
    sums, gradients = value_and_gradients(setting.naive(terms), setting, terms)
    for chunk in chunks:
        found, _ = Objective(terms, {}, chunk)(setting.text(), list(terms))
        assert list(found) == list(terms)
        for name, (a, b) in {k: (found[k].detach(), sums[k]) for k in sums}.items(): close(a, b)
        for a, b in zip(value_and_gradients(found, setting, terms)[1], gradients, strict=True):
            if b is None: assert a is None or not a.any()
            else: close(a, b)
    return gradients

# ------------------------------------------------------------------------------------------------ the tests
@pytest.mark.pitfall(3, 16)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("clip", CLIPS)
def test_pitfall_16_chunked_equals_dense_and_naive_for_every_clip_remainder_target_relation(clip, remainder, target, relation):
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS[clip](), target, remainder)), "span": Span(relation)}
    gradients = compare(terms, Setting(), (4, N))       # chunks of 4, 4, 3 rows cut through spans
    if "learned" in clip: assert all(g.abs().max() > 1e-6 for g in gradients)

@pytest.mark.pitfall(3, 16)
@pytest.mark.parametrize("clip", ["learned", "learned_full", "fixed", "none"])
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_pitfall_16_every_chunk_size(clip, remainder):
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS[clip](), "once", remainder)), **relations(), **{n: Divergence(n) for n in ("forward_kl", "reverse_kl", "tvd")}}
    compare(terms, Setting(seed=5), (1, 2, 5, 7, N - 1, N, N + 1, 100))

@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("clip", ["learned", "fixed", "top"])
def test_the_parts_of_dac_kl(clip, classes):
    compare({"dac": DAC(DACKL(CLIPS[clip](), "once", "as_printed", classes))}, Setting(seed=2), (4, N))

def test_a_mean_of_chunk_means_would_be_noticed():
    "The comparison can fail: with chunks of 7 and 4 rows the mean of means is another number."
    setting = Setting()
    means = [Objective({"sft": NLL()}, {})(Text(setting.hidden[a:b], setting.ids[a:b], lambda h: h @ setting.head.T), ["sft"])[0]["sft"] / (b - a) for a, b in ((0, 7), (7, N))]
    assert abs(sum(means) / 2 - setting.naive({"sft": NLL()})["sft"] / N) > 1e-3

@st.composite
def layouts(draw):
    "Vocabulary, responses (some empty), spans of each (some of one token), and a chunk size."
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    spans = []
    for n in lengths:
        borders = sorted(draw(st.sets(st.integers(0, n), max_size=4)))
        spans.append([pair for pair in zip(borders, borders[1:]) if draw(st.booleans())])
    return draw(st.integers(2, 9)), lengths, spans, draw(st.integers(1, 22)), draw(st.integers(0, 10**6))

@pytest.mark.pitfall(16, 17)
@settings(max_examples=150, deadline=None)
@given(layout=layouts(), clip=st.sampled_from(["fixed", "fixed_rank", "fixed_mass", "top", "none"]), target=st.sampled_from(TARGETS), remainder=st.sampled_from(REMAINDERS))
def test_any_shape_and_any_spans(layout, clip, target, remainder):
    v, lengths, spans, chunk, seed = layout
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS[clip](), target, remainder)), "kd": Divergence("reverse_kl"), **relations()}
    setting = Setting(sum(lengths), v, lengths, spans, seed)
    compare(terms, setting, (chunk,))

# --- padding, batches, responses

def model_sums(student, teacher, pairs, pad=PAD, side="right", width=0, chunk=5, spans=None):
    "Sums of all terms on a real batch: two models, supervised rows, spans of three tokens."
    batch = collate(pairs, pad, side, width=width)
    rows = supervised(batch)
    spans = spans or [[(a, min(a + 3, len(y))) for a in range(0, len(y), 3)] for _, y in pairs]
    weights = torch.tensor(sum((pair_weights(s, len(y))[0] for s, (_, y) in zip(spans, pairs)), []), dtype=torch.float64)
    with torch.no_grad(): t_hidden = hidden_states(teacher, batch)[rows]
    text = Text(hidden_states(student, batch)[rows], labels(batch), lambda h: head_logits(student, h, 60), t_hidden, lambda h: head_logits(teacher, h, 60), weights)
    terms = {"sft": NLL(), "dac": DAC(DACKL(FixedClip(0.9, 0.001))), "kd": Divergence("forward_kl"), **relations()}
    sums, _ = Objective(terms, {}, chunk)(text, list(terms))
    gradient = torch.autograd.grad(sum(sums.values()), [p for p in student.parameters()], allow_unused=True)
    return {k: s.detach() for k, s in sums.items()}, [g for g in gradient if g is not None]

PAIRS = [([11, 12, 13], [21, 22, 23, EOS]), ([14], [22, 23, EOS]), ([15, 16, 2, 17, 18], [24]), ([9, 8], [7, 6, 5, 4, 3, 30])]

@pytest.mark.pitfall(14, 16, 22)
@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_14_padding_columns_and_splitting_the_batch_change_nothing(kind):
    student, teacher = tiny_model(kind, 2, dtype=torch.float64, seed=1), tiny_model(kind, 3, dtype=torch.float64, seed=2)
    sums, gradients = model_sums(student, teacher, PAIRS)
    for other in (dict(width=17), dict(side="left"), dict(side="left", width=17, pad=EOS), dict(pad=33, chunk=100)):
        found, g = model_sums(student, teacher, PAIRS, **other)
        for k in sums: close(found[k], sums[k])
        for a, b in zip(g, gradients, strict=True): close(a, b)
    parts = [model_sums(student, teacher, part) for part in (PAIRS[:1], PAIRS[1:3], PAIRS[3:])]
    for k in sums: close(sum(p[0][k] for p in parts), sums[k])
    for i, b in enumerate(gradients): close(sum(p[1][i] for p in parts), b)

@pytest.mark.pitfall(14)
def test_pitfall_14_vocabulary_padding_changes_nothing():
    setting = Setting()
    terms = {"sft": NLL(), "dac": DAC(DACKL(FixedClip(0.9, 0.05))), "kd": Divergence("forward_kl"), **relations()}
    text, wide = setting.text(), setting.text()
    more = lambda head: lambda h: nn.functional.pad(head(h), (0, 3), value=-torch.inf)
    wide.student_head, wide.teacher_head = more(text.student_head), more(text.teacher_head)
    for chunk in (4, N):
        found = [value_and_gradients(Objective(terms, {}, chunk)(t, list(terms))[0], setting, terms) for t in (text, wide)]
        for k in terms: close(found[0][0][k], found[1][0][k])
        for a, b in zip(found[0][1], found[1][1]): close(a, b)

@pytest.mark.pitfall(14)
def test_pitfall_14_the_mean_is_over_tokens_and_spans():
    terms = {"sft": NLL(), "dac": DAC(DACKL(NoClip())), "span": Span()}
    o = Objective(terms, dict(sft=1., dac=0.5, span=2.), 4)
    sums, _ = o(Setting().text(), list(terms))
    counts = dict(data_tokens=torch.tensor(7), distilled_tokens=11, distilled_spans=torch.tensor(4.))
    close(o.weighted(sums, counts), sums["sft"] / 7 + 0.5 * sums["dac"] / 11 + 2 * sums["span"] / 4)
    close(o.weighted({"dac": sums["dac"]}, counts), 0.5 * sums["dac"] / 11)
    assert [float(o.denominator(n, dict(data_tokens=0, distilled_tokens=torch.tensor(0), distilled_spans=0))) for n in terms] == [1, 1, 1]

@pytest.mark.pitfall(15)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_pitfall_15_no_supervised_rows_give_zero_with_a_graph(clip, remainder):
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS[clip](), "once", remainder)), "kd": Divergence("forward_kl"), **relations()}
    setting = Setting(0, V, (), ())
    setting.text = lambda: Text(setting.hidden, setting.ids, lambda h: h @ setting.head.T, setting.t_hidden.detach(), lambda h: h @ setting.t_head.T, torch.zeros(0).double())
    o = Objective(terms, {n: 1. for n in terms}, 4)
    sums, notes = o(setting.text(), list(terms))
    loss = o.weighted(sums, dict(data_tokens=0, distilled_tokens=0, distilled_spans=0))
    assert loss == 0 and loss.requires_grad and all(s == 0 and s.requires_grad for s in sums.values()) and all(v == 0 for v in notes.values())
    loss.backward()
    for p in (setting.head, *o.parameters()): assert p.grad is not None and not p.grad.any()       # zeros, neither None nor NaN: processes stay in step

@pytest.mark.pitfall(15)
def test_pitfall_15_a_batch_of_empty_responses_gives_zero_with_a_graph():
    student = tiny_model("gpt2", dtype=torch.float64)
    batch = collate([([5, 6], []), ([7], [])], PAD)
    rows = supervised(batch)
    text = Text(hidden_states(student, batch)[rows], labels(batch), lambda h: head_logits(student, h, 60))
    o = Objective({"sft": NLL()}, {"sft": 1.})
    loss = o.weighted(o(text, ["sft"])[0], dict(data_tokens=0))
    loss.backward()
    assert loss == 0 and not any(p.grad.any() or p.grad.isnan().any() for p in student.parameters() if p.grad is not None)
    assert student.get_output_embeddings().weight.grad is not None

@pytest.mark.pitfall(17)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("chunk", [1, 4, 5, N])
def test_pitfall_17_a_span_never_crosses_responses(relation, chunk):
    "Responses of 5, 1 and 5 tokens, each one span: together they give the sum of what they give alone, and no response feels its neighbours' rows."
    whole = Setting(spans=[[(0, n)] for n in LENGTHS])
    o = Objective({"span": Span(relation)}, {}, chunk)
    together, start = o(whole.text(), ["span"])[0]["span"], 0
    alone = []
    for n in LENGTHS:
        part = Text(whole.hidden[start:start + n], whole.ids[start:start + n], lambda h: h @ whole.head.T, whole.t_hidden[start:start + n], lambda h: h @ whole.t_head.T,
                    torch.tensor(pair_weights([(0, n)], n)[0], dtype=torch.float64))
        alone.append(o(part, ["span"])[0]["span"])
        start += n
    close(sum(alone), together)
    assert alone[1] == 0 and alone[0] > 0
    gradient = torch.autograd.grad(together, whole.hidden, retain_graph=True)[0]
    assert not gradient[5].any() and gradient[4].any() and gradient[6].any()       # the response of one token has no pair
    only_first = Setting(spans=[[(0, 5)], [], []])
    gradient = torch.autograd.grad(o(only_first.text(), ["span"])[0]["span"], only_first.hidden)[0]
    assert gradient[:5].any(-1).all() and not gradient[5:].any()

# --- who gets a gradient, and what costs

@pytest.mark.pitfall(4, 27)
@pytest.mark.parametrize("chunk", [4, N])
@pytest.mark.parametrize("clip", [c for c in CLIPS if "learned" in c])
def test_pitfall_4_gradient_reaches_student_and_f_sub_and_never_the_teacher(clip, chunk):
    setting, terms = Setting(), {"dac": DAC(DACKL(CLIPS[clip]())), "kd": Divergence("reverse_kl"), **relations()}
    o = Objective(terms, {}, chunk)
    sum(o(setting.text(), list(terms))[0].values()).backward()
    assert setting.t_hidden.grad is None and setting.t_head.grad is None
    assert setting.hidden.grad.any(-1).all() and setting.head.grad.any()
    assert list(o.parameters()) and all(p.grad is not None and p.grad.any() for p in o.parameters())

@pytest.mark.pitfall(28)
def test_pitfall_28_no_cross_entropy_on_text_that_a_student_wrote():
    o = Objective({"sft": NLL(), "dac": DAC(DACKL(NoClip())), "span": Span(), "kd": Divergence("tvd")}, {})
    assert o.on("data") == ["sft"] and o.on("distilled") == ["dac", "span", "kd"] and o.on("data", "distilled") == ["sft", "dac", "span", "kd"] and o.on() == []
    assert [t.needs_teacher for t in o.terms.values()] == [False, True, True, True]

def never(h): raise AssertionError("the teacher's head was called")

@pytest.mark.parametrize("chunk", [4, N])
def test_without_a_term_that_needs_it_the_teacher_is_not_called(chunk):
    setting = Setting()
    text = Text(setting.hidden, setting.ids, lambda h: h @ setting.head.T, teacher_head=never)
    sums, notes = Objective({"sft": NLL()}, {"sft": 1.}, chunk)(text, ["sft"])
    close(sums["sft"], setting.naive({"sft": NLL()})["sft"])
    assert notes == {}

@pytest.mark.parametrize("chunk", [4, N])
def test_a_teacher_that_no_named_term_needs_is_not_called(chunk):
    "The text has a teacher, and another term would need it; the NLL alone must not pay for its head."
    setting = Setting()
    text = setting.text()
    text.teacher_head = never
    objective = Objective({"sft": NLL(), "kd": Divergence("tvd")}, {"sft": 1., "kd": 1.}, chunk)
    close(objective(text, ["sft"])[0]["sft"], setting.naive({"sft": NLL()})["sft"])
    with pytest.raises(AssertionError, match="the teacher's head was called"): objective(text, ["sft", "kd"])

def test_only_the_named_terms_are_computed():
    class Never(nn.Module):
        text, per, needs_teacher = "distilled", "tokens", True
        def forward(self, rows): raise AssertionError("computed")
    setting = Setting()
    sums, _ = Objective({"sft": NLL(), "dac": Never()}, {}, 4)(setting.text(), ["sft"])
    assert list(sums) == ["sft"]

@pytest.mark.pitfall(16)
@pytest.mark.parametrize("chunk,forward", [(4, [5, 5, 3]), (N, [N]), (100, [N]), (1, [2] * 10 + [1])])
def test_no_more_than_a_chunk_of_logits_exists_at_once(chunk, forward, monkeypatch):
    "Each head sees a chunk and its right neighbour, once in the forward pass; each softmax is taken once a chunk, whatever the number of terms."
    setting, text, calls, softmaxes = Setting(), None, {"student": [], "teacher": []}, []
    text = setting.text()
    def watched(name, head):
        def call(h): calls[name].append(len(h)); return head(h)
        return call
    text.student_head, text.teacher_head = watched("student", text.student_head), watched("teacher", text.teacher_head)
    log_probs = O.log_probs
    monkeypatch.setattr(O, "log_probs", lambda z: softmaxes.append(len(z)) or log_probs(z))
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS["learned"]())), "kd": Divergence("forward_kl"), **relations()}
    sums, _ = Objective(terms, {}, chunk)(text, list(terms))
    assert calls["student"] == calls["teacher"] == forward and len(softmaxes) == 2 * len(forward)
    sum(sums.values()).backward()
    again = 1 if len(forward) == 1 else 2       # several chunks are computed once more in the backward pass
    assert sorted(calls["student"]) == sorted(calls["teacher"]) == sorted(forward * again)

# --- diagnostics and precision

@pytest.mark.parametrize("chunk", [1, 4, N])
@pytest.mark.parametrize("clip,names", [("learned", {"kept_mass", "kept_classes", "clip_upper", "clip_lower"}), ("fixed", {"kept_mass", "kept_classes", "clip_upper", "clip_lower"}),
                                        ("top", {"kept_mass", "kept_classes"})])
def test_diagnostics_are_sums_over_all_rows(clip, names, chunk):
    setting, dac = Setting(), DACKL(CLIPS[clip]())
    _, notes = Objective({"dac": DAC(dac), "sft": NLL()}, {}, chunk)(setting.text(), ["dac", "sft"])
    log_q, log_p = ((h @ w.T).log_softmax(-1) for h, w in ((setting.hidden, setting.head), (setting.t_hidden, setting.t_head)))
    _, rows = dac(log_q, log_p)
    assert notes.keys() == {n + s for n in names for s in ("", "_squared")} and not any(v.requires_grad for v in notes.values())
    for name in names:
        close(notes[name], rows[name].sum())
        close(notes[f"{name}_squared"], (rows[name] ** 2).sum())

@pytest.mark.pitfall(9)
@pytest.mark.parametrize("chunk", [4, N])
@pytest.mark.parametrize("clip", ["learned", "fixed_rank", "none"])
def test_pitfall_9_bfloat16_autocast_is_finite_and_close_to_float32(clip, chunk):
    setting = Setting(seed=1)
    hidden, t_hidden = (x.detach().float() for x in (setting.hidden, setting.t_hidden))
    heads = [nn.Linear(w.shape[1], V, bias=False) for w in (setting.head, setting.t_head)]
    with torch.no_grad():
        for m, w in zip(heads, (setting.head, setting.t_head)): m.weight.copy_(w)
    terms = {"sft": NLL(), "dac": DAC(DACKL(CLIPS[clip]().float(), remainder="bucket")), "kd": Divergence("forward_kl"), **relations()}
    o = Objective(terms, {}, chunk)
    def run(autocast):
        o.zero_grad(); h = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sums, _ = o(Text(h, setting.ids, heads[0], t_hidden, heads[1], setting.text().pair_weight.float()), list(terms))
        assert all(s.dtype == torch.float32 for s in sums.values())
        sum(sums.values()).backward()
        return sums, h.grad
    (low, low_grad), (high, high_grad) = run(True), run(False)
    assert not torch.equal(low_grad, high_grad)       # autocast did something
    for k in high: torch.testing.assert_close(low[k], high[k], rtol=0.02, atol=0.02)
    torch.testing.assert_close(low_grad, high_grad, rtol=0.05, atol=0.03)

@pytest.mark.pitfall(8)
@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_pitfall_8_extreme_logits_give_finite_values_and_gradients(remainder, chunk):
    z = torch.tensor([[500., -500, 0, 1], [-500, 500, 0, 1], [0, 0, 0, 0], [-torch.inf, 2, 1, -torch.inf]])
    hidden, teacher = z.clone().requires_grad_(), z.flip(0).clone()
    terms = {"sft": NLL(), "dac": DAC(DACKL(FixedClip(0.95, 0.05), remainder=remainder)), **{n: Divergence(n) for n in DIVERGENCES}, **relations()}
    same = lambda h: h
    sums, _ = Objective(terms, {}, chunk)(Text(hidden, torch.tensor([0, 0, 3, 1]), same, teacher, same, torch.tensor([.5, .5, .5, 0])), list(terms))
    sum(sums.values()).backward()
    assert all(s.isfinite() for s in sums.values()) and hidden.grad.isfinite().all()

def test_options_reach_the_divergence():
    setting = Setting()
    run = lambda name, **kw: Objective({"kd": Divergence(name, **kw)}, {})(setting.text(), ["kd"])[0]["kd"]
    logits = (setting.hidden @ setting.head.T, setting.t_hidden @ setting.t_head.T)
    for name, kw in (("jsd", dict(beta=0.2)), ("skew_forward_kl", dict(alpha=0.7)), ("skew_reverse_kl", dict(alpha=0.7))):
        close(run(name, **kw), DIVERGENCES[name](*logits, **kw).sum())
        assert abs(run(name, **kw) - run(name)) > 1e-3
