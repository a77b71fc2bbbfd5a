"""Methods near MGSR: speculative distillation, other divergences, contrastive text, dense rewards, a teacher of whom only some classes are known. Each against a naive reference, in whole updates, and after an interruption."""
import math
import pytest, torch
from torch import nn
from tiny_models import EOS, KINDS, PAD, tiny_model
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.tokens import collate
from mgsr_nb.divergences import DIVERGENCES, forward_kl, log_probs, reverse_kl, sampled_classes, top_classes
from mgsr_nb.objective import Divergence, Objective, Text, whole_rows
from mgsr_nb.minillm import SampledReverseKL
from mgsr_nb.sampling import Known, context_keys
from mgsr_nb.decoding import generate, noise, starts_of, within_top
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer
from tiny_runs import Interrupted, interrupt_at, plain, save_pair, tiny_parameters

every_kind = pytest.mark.parametrize("kind", KINDS)
V = 60
PROMPTS = [[11, 12, 13], [14], [15, 16, 2, 17, 18, 19, 20], [9, 8], [1, 1, 30], [33] * 5]
KEYS = [("row", b) for b in range(len(PROMPTS))]

# --- speculative distillation: who writes which token

def pair(kind): return tiny_model(kind, seed=1), tiny_model(kind, 3, seed=5)

def both(student, teacher, k, limit=12, stops=(EOS,), temperature=1., rows=range(len(PROMPTS)), replaced=None):
    return generate(student, [PROMPTS[b] for b in rows], [KEYS[b] for b in rows], [limit] * len(rows), stops, PAD, V, (teacher, 0., k, replaced), temperature=temperature)

def naive(student, teacher, k, prompt, key, limit=12, stops=(EOS,)):
    "One row, no cache, no padding: Algorithm 1 as it is printed, in probability space. -> its tokens, and which were replaced."
    ids, replaced, [start] = [], [], starts_of([key])[None]
    def first(p, place): return int((-torch.log1p(-noise(start, place, V)[0].double()) / p).argmin())
    while len(ids) < limit and not (ids and ids[-1] in stops):
        with torch.no_grad(): q, p = (m(input_ids=torch.tensor([prompt + ids])).logits[0, -1, :V].double().softmax(-1) for m in (student, teacher))
        y = first(q, len(ids))
        out = y not in p.argsort(descending=True)[:k].tolist()
        replaced.append(out)
        ids.append(first(p, -1 - len(ids)) if out else y)
    return ids, replaced

@every_kind
@pytest.mark.parametrize("k", [1, 3, 25])
def test_skd_text_equals_a_naive_loop_and_counts_what_was_replaced(kind, k):
    student, teacher = pair(kind)
    counted, found = [], [naive(student, teacher, k, p, key) for p, key in zip(PROMPTS, KEYS)]
    assert both(student, teacher, k, replaced=counted) == [ids for ids, _ in found]
    assert sum(int(r.sum()) for r in counted) == sum(sum(r) for _, r in found) > 0

@every_kind
def test_skd_with_all_classes_is_the_students_own_text(kind):
    student, teacher = pair(kind)
    alone = generate(student, PROMPTS, KEYS, [12] * len(PROMPTS), [EOS], PAD, V)
    counted = []
    for k in (V, V + 100): assert both(student, teacher, k, replaced=counted) == alone
    assert not any(r.any() for r in counted) and both(student, teacher, 1) != alone

@every_kind
def test_skd_with_one_class_keeps_only_the_teachers_best_and_is_its_greedy_text_at_temperature_0(kind):
    student, teacher = pair(kind)
    assert both(student, teacher, 1, temperature=0.) == generate(teacher, PROMPTS, KEYS, [12] * len(PROMPTS), [EOS], PAD, V, temperature=0.)
    for prompt, key in zip(PROMPTS, KEYS):
        ids, replaced = naive(student, teacher, 1, prompt, key)
        with torch.no_grad(): best = teacher(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1, :V].argmax(-1).tolist()
        assert all(r or i == b for i, b, r in zip(ids, best, replaced))

def test_a_row_of_skd_does_not_see_its_neighbours_and_stops_at_a_stop():
    student, teacher = pair("gpt2")
    texts = both(student, teacher, 4, 30, range(3, V, 9))
    assert texts == [both(student, teacher, 4, 30, range(3, V, 9), rows=[b])[0] for b in range(len(PROMPTS))]
    assert all(not set(t[:-1]) & set(range(3, V, 9)) for t in texts) and len({len(t) for t in texts}) > 2

def test_a_token_of_skd_follows_its_distribution():
    "q inside the teacher's best, plus p times what q has outside; Pearson's chi-square, which a draw from q, p or a renormalised p would fail."
    student, teacher = pair("llama")
    n, v, k = 4000, 8, 3
    with torch.no_grad(): q, p = (m(input_ids=torch.tensor([[11, 12, 13]])).logits[0, -1, :v].double().softmax(-1) for m in (student, teacher))
    inside = within_top(torch.arange(v), p.expand(v, v), k)
    right = q * inside + (q * ~inside).sum() * p
    drawn = torch.tensor(generate(student, [[11, 12, 13]] * n, [("first", i) for i in range(n)], [1] * n, [EOS], PAD, v, (teacher, 0., k))).flatten().bincount(minlength=v)
    off = lambda p: float(((drawn - n * p) ** 2 / (n * p)).sum())
    limit = v - 1 + 4 * math.sqrt(2 * (v - 1))
    assert inside.sum() == k and off(right) < limit
    for wrong in (q, p): assert off(wrong) > limit

def test_within_top_by_hand():
    logits = torch.tensor([[3., 1., 2., 0.]] * 4)
    assert [within_top(torch.arange(4), logits, k).tolist() for k in (1, 2, 9)] == [[True, False, False, False], [True, False, True, False], [True] * 4]

# --- whole updates

RELATIVES = ("adaptive_kl", "alpha_beta", "skd", "kd_top_k", "kd_sampled", "distillm2", "dense_reward", "sampled_reward")

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("MGSR_CACHE", str(tmp_path_factory.getbasetemp()/"relatives_cache"))

@pytest.fixture(scope="module")
def pairs(tmp_path_factory): return {kind: save_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}

def made(tmp_path, pair, method, folder=None, **more):
    teacher, student = pair
    return Trainer(prepare(resolve(tiny_parameters(tmp_path, teacher, student=student, method=method, **{**dict(skd_top_k=3 if method == "skd" else 0), **more})), cpu=True), folder)

@every_kind
@pytest.mark.parametrize("method", RELATIVES)
def test_two_updates_move_all_of_the_student_and_nothing_of_the_teacher(method, kind, pairs, tmp_path):
    trainer = made(tmp_path, pairs[kind], method)
    before = {n: p.detach().clone() for n, p in trainer.distiller.named_parameters()}
    frozen = [p.clone() for p in trainer.setup.teacher.parameters()]
    rows = [trainer.step(), trainer.step()]
    assert all(math.isfinite(v) for row in rows for v in row.values()) and all(row["grad_norm"] > 0 for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.setup.teacher.parameters()))
    assert not [n for n, p in trainer.distiller.named_parameters() if torch.equal(before[n], p)]
    assert ("skd_replaced" in rows[0]) == (method == "skd")

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("method", RELATIVES)
def test_an_interrupted_run_ends_with_the_same_weights_and_log(method, pairs, tmp_path):
    def trained(folder, stop=None):
        folder.mkdir(exist_ok=True)
        trainer = made(tmp_path, pairs["gpt2"], method, folder, max_steps=4, checkpoint_every=1)
        started = trainer.checkpoints.resume()
        try: trainer.fit(interrupt_at(stop))
        except Interrupted: pass
        return started, trainer
    _, whole = trained(tmp_path/"a")
    trained(tmp_path/"b", stop=3)
    started, resumed = trained(tmp_path/"b")
    assert started == 2
    for (name, a), b in zip(whole.distiller.state_dict().items(), resumed.distiller.state_dict().values()): assert torch.equal(a, b), name
    assert plain(whole.progress.log) == plain(resumed.progress.log)

def test_the_share_that_the_teacher_replaced_is_that_of_the_text(pairs, tmp_path):
    trainer = made(tmp_path, pairs["llama"], "skd", max_new_tokens=8)
    examples, text, notes = trainer.writer.draw(0)
    setup, c = trainer.setup, trainer.config
    found = []
    again = setup.sampler(setup.student, (0., 3, found))([x for x, _ in text.pairs], [(c.seed, "sample", 0, row) for row in range(c.batch_size)], [8] * c.batch_size)
    assert again == [y for _, y in text.pairs]
    assert notes["skd_replaced"] == sum(int(r.sum()) for r in found) / sum(map(len, again)) > 0
    assert trainer.writer.draw(0)[2] == notes

# --- a teacher of whom only some classes are known

P = torch.tensor([.4, .3, .15, .1, .05, 0.], dtype=torch.float64)
FEW = {"top": top_classes, "sampled": sampled_classes}

def uniform(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def test_top_classes_are_the_largest_and_what_is_as_large_as_the_last():
    z = top_classes(P.log(), torch.zeros(2))
    assert log_probs(z).exp().tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0, 0, 0]) and z[2:].eq(-torch.inf).all()
    assert (top_classes(torch.zeros(3), torch.zeros(2)) == 0).all()
    assert torch.equal(top_classes(P.log(), torch.zeros(99)), P.log())

@pytest.mark.pitfall(3)
def test_sampled_classes_are_shares_of_draws_walked_out_by_hand():
    u = uniform(200, 7)
    for row, found in zip(u.tolist(), sampled_classes(P.log().expand(200, -1), u).exp()):
        drawn = [next(k for k in range(6) if x < math.fsum(P[:k + 1].tolist())) for x in row]
        assert found.tolist() == pytest.approx([drawn.count(k) / 7 for k in range(6)], abs=1e-12)
    ends = sampled_classes(P.log(), torch.tensor([0., 1., .3, .39])).exp()
    assert ends.tolist() == [.75, 0, 0, 0, .25, 0]      # what cannot occur is not drawn, even by a number of 1

@pytest.mark.pitfall(3)
def test_the_mean_gradient_of_the_forward_kl_is_that_of_all_classes_for_draws_and_not_for_the_top():
    q = torch.tensor([.1, .5, .1, .1, .1, .1], dtype=torch.float64).log()
    def mean(choose, n=40_000, k=3):
        z = q.expand(n, -1).clone().requires_grad_()
        forward_kl(z, choose(P.log().expand(n, -1), uniform(n, k))).sum().backward()
        return z.grad.mean(0), z.grad.std(0) / n ** .5
    right = q.exp() - P
    gradient, error = mean(sampled_classes)
    assert ((gradient - right).abs() <= 4.5 * error + 1e-12).all() and error[:5].min() > 0
    assert (mean(top_classes)[0] - right).abs().max() > .05

@pytest.mark.pitfall(10)
@pytest.mark.pitfall(14)
@pytest.mark.parametrize("choose", FEW.values())
def test_classes_that_cannot_occur_stay_out(choose):
    padded = torch.cat([P.log(), torch.full((3,), -torch.inf)])
    z = choose(log_probs(padded).expand(50, -1), uniform(50, 4))
    assert (z[:, 5:] < -9e3).all() and torch.allclose(log_probs(z).exp().sum(-1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(z[:, :6], choose(log_probs(P.log()).expand(50, -1), uniform(50, 4)))

def test_the_top_does_not_depend_on_the_order_of_the_vocabulary():
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(top_classes(P.log()[order], torch.zeros(3)), top_classes(P.log(), torch.zeros(3))[order])

def test_a_context_has_one_key_wherever_it_lies():
    texts = [([5, 6], [7, 8, 9]), ([6], [7, 8]), ([5, 6, 7], [8, 8])]
    keys = {}
    for side in ("left", "right"):
        for batch in ([0, 1, 2], [2, 1], [0]):
            b = collate([texts[i] for i in batch], PAD, side=side)
            for i, row, mask in zip(batch, context_keys(b, 0, "x"), b.attention_mask.bool()):
                for t, key in enumerate(row[mask].tolist()): keys.setdefault(tuple((texts[i][0] + texts[i][1])[:t + 1]), set()).add(key)
    assert all(len(found) == 1 for found in keys.values()) and len(set.union(*keys.values())) == len(keys) == 5 + 3 + 1
    assert not torch.equal(context_keys(b, 0, "x"), context_keys(b, 1, "x"))

class Two:
    "A text of two heads that pass the hidden states through, in float64."
    def __init__(self, n=11, v=9):
        g = torch.Generator().manual_seed(3)
        self.q, self.p = (torch.randn(n, v, generator=g, dtype=torch.float64) for _ in "qp")
        self.labels, self.keys = torch.randint(v, (n,), generator=g), torch.randint(2 ** 62, (n,), generator=g)
    def run(self, term, known, chunk=100):
        hidden = self.q.clone().requires_grad_()
        view = known and (lambda logits, part: known(logits, self.keys[part]))
        found = Objective({"kd": term}, {"kd": 1.}, chunk)(Text(hidden, self.labels, nn.Identity(), self.p, nn.Identity(), view=view), ["kd"], dict(distilled_tokens=torch.tensor(11)))
        found.loss.backward()
        return found.loss.detach(), hidden.grad, found.label_log_p

@pytest.mark.pitfall(16)
@pytest.mark.parametrize("choose", FEW.values())
def test_the_terms_see_what_is_known_in_chunks_of_any_size(choose):
    two, known = Two(), Known(choose, 3, 0)
    loss, gradient, label_log_p = two.run(Divergence("forward_kl"), known)
    few = choose(log_probs(two.p), noise(two.keys, 0, 3))
    z = two.q.clone().requires_grad_()
    (forward_kl(z, few).sum() / 11).backward()
    torch.testing.assert_close(gradient, z.grad); assert label_log_p is None
    for chunk in (1, 4, 11):
        for a, b in zip(two.run(Divergence("forward_kl"), known, chunk)[:2], (loss, gradient)): torch.testing.assert_close(a, b)
    whole = two.run(Divergence("forward_kl"), None)
    assert (whole[1] - gradient).abs().max() > 1e-3 and whole[2] is not None

@pytest.mark.parametrize("classes", FEW)
def test_a_run_knows_the_same_classes_in_any_micro_batches(classes, pairs, tmp_path):
    def row(size): return made(tmp_path, pairs["llama"], "kd", teacher_classes=classes, teacher_k=3, micro_batch_size=size).step()
    one, other = row(0), row(1)
    assert one["kd"] == pytest.approx(other["kd"], rel=1e-4) and one["kd"] != pytest.approx(made(tmp_path, pairs["llama"], "kd").step()["kd"], rel=1e-2)

def test_what_was_gained_by_scrg_is_not_claimed_without_the_teachers_probabilities(pairs, tmp_path):
    for classes in FEW:
        row = made(tmp_path, pairs["gpt2"], "mgsr", teacher_classes=classes, teacher_k=4).step()
        assert "scrg_gain" not in row and "scrg_corrected" in row and math.isfinite(row["dac"]) and math.isfinite(row["span"])

@pytest.mark.parametrize("params", [dict(method="kd", kd_loss="reverse_kl"), dict(method="adaptive_kl"), dict(method="minillm"), dict(method="alpha_beta", ab_alpha=0.), dict(method="sampled_reward"), dict(method="dense_reward"), dict(data_kd_weight=1., data_kd_loss="symmetric_kl")])
def test_losses_that_take_the_logarithm_of_unknown_classes_are_refused(params):
    for classes in FEW:
        with pytest.raises(ConfigError, match="^teacher_classes: "): resolve(params, teacher_classes=classes)
    resolve(params)

# --- a reward for each token

def logits(n=9, v=6, seed=4):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, v, generator=g, dtype=torch.float64) for _ in "qp")

@pytest.mark.pitfall(3)
def test_the_expected_value_and_gradient_of_the_sampled_reward_are_those_of_the_reverse_kl():
    "Every token that could have been written, weighed with its probability, in float64; the reference is in probability space."
    z, p = logits()
    z.requires_grad_()
    q = z.softmax(-1).detach()
    values = torch.stack([SampledReverseKL()(whole_rows(log_probs(z), log_probs(p), torch.full((9,), y)))[0] for y in range(6)], -1)
    gradient, = torch.autograd.grad((values * q).sum(), z)
    again = z.detach().clone().requires_grad_()
    naive = (again.softmax(-1) * (again.softmax(-1) / p.softmax(-1)).log()).sum(-1)
    torch.testing.assert_close((values * q).sum(-1).detach(), naive.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(naive.sum(), again)[0], rtol=1e-12, atol=1e-12)

@pytest.mark.pitfall(3)
def test_the_noted_variance_is_that_of_the_values():
    z, p = logits()
    terms = [SampledReverseKL()(whole_rows(log_probs(z), log_probs(p), torch.full((9,), y))) for y in range(6)]
    values, q = torch.stack([v for v, _ in terms], -1), z.softmax(-1)
    mean = (q * values).sum(-1)
    for notes in (n for _, n in terms):
        torch.testing.assert_close(notes["reward_reverse_kl"], mean); torch.testing.assert_close(notes["reward_variance"], (q * (values - mean[:, None]) ** 2).sum(-1))

@pytest.mark.pitfall(4)
@pytest.mark.pitfall(11)
def test_a_student_that_equals_its_teacher_gets_no_reward_and_the_teacher_never_a_gradient():
    z, p = (x.requires_grad_() for x in logits())
    same, _ = SampledReverseKL()(whole_rows(log_probs(z), log_probs(z.detach()), torch.arange(9) % 6))
    assert not same.any() and not torch.autograd.grad(same.sum(), z)[0].any()
    value, _ = SampledReverseKL()(whole_rows(log_probs(z), log_probs(p), torch.arange(9) % 6))
    value.sum().backward()
    assert p.grad is None and (z.grad.abs().sum(-1) > 1e-4).all()

@pytest.mark.pitfall(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_a_finite_reward(dtype):
    z = torch.tensor([[500., -500., 0.], [-500., 500., 0.], [-torch.inf, 2., 1.], [0., 0., 0.]]).to(dtype).requires_grad_()
    value, notes = SampledReverseKL()(whole_rows(log_probs(z), log_probs(z.detach().flip(0)), torch.tensor([0, 0, 2, 1])))
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all() and all(n.isfinite().all() for n in notes.values())

@pytest.mark.pitfall(16)
@pytest.mark.pitfall(18)
def test_the_reward_in_chunks_and_of_its_own_label_only():
    two = Two()
    loss, gradient, _ = two.run(SampledReverseKL(), None)
    costs = (log_probs(two.q) - log_probs(two.p)).gather(-1, two.labels[:, None])[:, 0]
    assert loss.item() == pytest.approx(costs.mean().item(), rel=1e-12)
    for chunk in (1, 4, 11, 12):
        for a, b in zip(two.run(SampledReverseKL(), None, chunk)[:2], (loss, gradient)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    two.q[5] += torch.arange(9.)
    assert (two.run(SampledReverseKL(), None)[1] - gradient).abs().sum(-1).nonzero().flatten().tolist() == [5]

def test_the_reward_is_a_mean_over_the_tokens_that_the_student_wrote(pairs, tmp_path):
    trainer = made(tmp_path, pairs["llama"], "sampled_reward", max_new_tokens=8)
    row = trainer.step()
    assert row["reward_reverse_kl"] > 0 and row["reward_variance"] > 0 and row["reward"] != pytest.approx(row["reward_reverse_kl"], rel=1e-3)
    exact = made(tmp_path, pairs["llama"], "dense_reward", max_new_tokens=8).step()
    assert exact["kd"] == pytest.approx(row["reward_reverse_kl"], rel=1e-5)        # the same text, over the vocabulary

@pytest.mark.parametrize("params", [dict(sampling="mixed"), dict(scrg=True), dict(skd_top_k=5), dict(teacher_mix=0.2), dict(sampling="fixed")])
def test_a_reward_on_text_of_others_is_refused(params):
    with pytest.raises(ConfigError, match="reward_weight: "): resolve(params, method="sampled_reward")

# --- one divergence on the teacher's text, another on the student's

def test_each_divergence_is_computed_on_its_own_text(pairs, tmp_path):
    "DistiLLM-2 by hand: two batches through both models, no objective, in the definition of the two skew divergences."
    trainer = made(tmp_path, pairs["llama"], "distillm2", max_new_tokens=6)
    trainer.distiller.eval()
    setup, c = trainer.setup, trainer.config
    examples, text, _ = trainer.writer.draw(0)
    def mean(pairs, loss):
        found = []
        for x, y in pairs:
            ids = torch.tensor([x + y])
            with torch.no_grad(): q, p = (m(input_ids=ids).logits[0, len(x) - 1:-1, :setup.vocab].double().softmax(-1) for m in (setup.student, setup.teacher))
            found += loss(q, p).tolist()
        return sum(found) / len(found)
    KL = lambda a, b: (a * (a / b).log()).sum(-1)
    of_teacher = mean([(e.prompt_ids, e.response_ids) for e in examples], lambda q, p: KL(p, .1 * p + .9 * q))
    of_student = mean(text.pairs, lambda q, p: KL(q, .9 * p + .1 * q))
    row = trainer.update(examples, text)
    assert row["data_kd"] == pytest.approx(of_teacher, rel=1e-4) and row["kd"] == pytest.approx(of_student, rel=1e-4)
    assert row["loss"] == pytest.approx(row["sft"] + (row["data_kd"] + row["kd"]) / 2, rel=1e-5)
    written = {tuple(y) for _, y in text.pairs}
    assert not written & {tuple(e.response_ids) for e in examples}

def test_a_divergence_on_the_data_alone_writes_no_text_and_equals_kd_on_fixed_text(pairs, tmp_path, monkeypatch):
    alone = dict(method="sft", data_kd_weight=1., data_kd_loss="forward_kl")
    assert not resolve(alone).distils and resolve(alone).reads_data
    rows = [made(tmp_path, pairs["opt"], *m).step() if isinstance(m, tuple) else made(tmp_path, pairs["opt"], **m).step() for m in (alone, ("kd",))]
    assert rows[0]["data_kd"] == pytest.approx(rows[1]["kd"], rel=1e-6) and rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)
    only = resolve(alone, sft_weight=0.)
    assert only.reads_data and not resolve(sft_weight=0.).reads_data
