"""Every method and every variant takes two steps and moves exactly what it should; then what single variants promise: which weights are kept, what is made once, what the log says."""
import math
from itertools import product
import pytest, torch
from hypothesis import given, settings, strategies as st
from tiny_models import KINDS
from tiny_runs import LOADED, UNEQUAL, Interrupted, interrupt_at, many_stops, moved, numbers, plain, state
from mgsr_nb import run as R, sampling as S
import mgsr_nb.run.artefacts
import mgsr_nb.run.engine
import mgsr_nb.run.results
import mgsr_nb.run.setup
import mgsr_nb.run.step
import mgsr_nb.run.trainer
from mgsr_nb.presets import METHODS
from mgsr_nb.config import resolve
from mgsr_nb.run.folder import open_run
from mgsr_nb.tokens import labels, supervised
from mgsr_nb.minillm import PolicyGradient, make_policy
from mgsr_nb.models import head, hidden_states, load_model
from mgsr_nb.objective import whole_rows
from mgsr_nb.span import pair_weights
from mgsr_nb.run.step import by_length, micro_batches
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer
from mgsr_nb.run.results import run

TERMS = ("sft", "dac", "span", "kd", "pg", "data_kd", "reward")
# --- two steps of everything

def named(**parameters): return pytest.param(parameters, id=",".join(f"{k}={v}" for k, v in parameters.items()))

def grid(**choices): return [named(**dict(zip(choices, values))) for values in product(*choices.values())]

BOTH, HARD = ("student_teacher", "teacher_student"), dict(mask_temperature=0.0)
CASES = [
    *(named(method=m, kind="opt") for m in METHODS),
    # f_sub and what clips instead of it
    *grid(sub_layers=[0, 1, 3], sub_inputs=["full", "topk"]),
    *grid(clip=["fixed_quantile", "fixed_percentile", "top_fraction", "none"], mask_temperature=[0.01]), named(clip="learned", clip_upper=0.6, clip_lower=0.2),
    *grid(clip=["learned", "fixed_quantile"], clip_reading=["value", "rank", "mass"], mask_temperature=[0.0, 0.05]),
    named(clip="top_fraction", clip_fraction=1.0), named(mask_temperature=0.0, sub_inputs="full"), named(mask_temperature=0.0, sub_layers=0), named(dac_weight=0.0), named(dac_weight=0.0, mask_temperature=0.0),
    # DAC-KL's parts
    *grid(target_class=["once", "twice", "none"], remainder=["as_printed", "renormalise", "bucket"]),
    *grid(dac_classes=["dense", "target"], remainder=["as_printed", "renormalise", "bucket"]),
    # SCRG
    *grid(scrg_detect=["max_kl"], scrg_direction=BOTH, scrg_corrections=[1, 5]), named(scrg_corrections=3), *grid(scrg_detect=["threshold"], scrg_direction=BOTH, scrg_threshold=[0.1, 1e6]),
    *grid(scrg_detect=["threshold", "random"], scrg_corrections=[1, 3, 5]), *grid(scrg_teacher_token=["sample", "greedy"], max_new_tokens=[8]), named(scrg=False),
    # spans
    *grid(spans=["phrases", "fixed", "random", "whole"]), *grid(spans=["phrases", "whole"], span_relation=["cosine", "outer"]),
    # what is trained, and in which type
    *(named(kind=k, lora_rank=2) for k in KINDS), named(lora_rank=2, lora_dropout=0.0), named(lora_rank=2, method="minillm"), named(lora_rank=2, mask_temperature=0.0),
    *grid(frozen_precision=["bfloat16"], lora_rank=[0, 2]), named(frozen_precision="bfloat16", method="minillm"), named(precision="bfloat16", frozen_precision="float32"), named(precision="bfloat16", lora_rank=2),
    named(student_sft_steps=2), named(student_sft_steps=2, lora_rank=2), named(student_sft_steps=1, method="sft"), named(student_sft_steps=1, responses="teacher"),
    # texts
    *grid(sampling=["mixed"], mixed_fraction=[0.0, 0.5, 1.0]), named(sampling="off_policy"), named(sampling="off_policy", scrg=False), named(sampling="fixed", scrg=False),
    *grid(responses=["teacher"], sampling=["on_policy", "mixed"]), named(responses="teacher", sampling="fixed", scrg=False), named(teacher_mix=0.5), named(teacher_mix=0.5, sampling="off_policy"),
    # policy gradient
    *grid(method=["minillm"], pg_single_step=[True, False], pg_length_norm=[True, False]), named(method="minillm", teacher_mix=0.0), named(method="minillm", pg_clip=1e-3),
    named(method="minillm", dac_weight=1.0, span_weight=1.0, kd_weight=0.5),
    # measurement, sizes
    named(eval_exposure=True), named(eval_temperature=0.5), named(eval_temperature=0.0, select="rouge_l", eval_every=1), named(eval_exposure=True, eval_temperature=0.5), named(select="kl", eval_every=1), named(micro_batch_size=1), named(batch_size=5, micro_batch_size=2), named(chunk_tokens=1),
]

def should_move(t) -> set[str]:
    "Names of the parameters of the trainer's distiller that a step has to change, from the configuration and the architecture alone."
    c, student = t.config, {f"student.{n}" for n, _ in t.setup.student.named_parameters()}
    chosen = {n for n in student if ".lora_" in n} if c.lora_rank else student - key_biases(t)
    learns = c.dac_weight > 0 and c.clip == "learned" and c.mask_temperature > 0 and c.dac_classes != "target"
    layers = range(0, 2 * c.sub_layers + 1, 2) if learns else ()       # linear layers, and a nonlinearity between two
    return chosen | {f"objective.terms.dac.dac_kl.clip.sub_network.mlp.{i}.{kind}" for i in layers for kind in ("weight", "bias")}

def key_biases(t) -> set[str]:
    "A bias of all keys shifts all scores of a query alike: softmax, and so the loss, does not depend on it. Rounding errors alone may move it."
    return set() if t.config.lora_rank else {n for n, _ in t.distiller.named_parameters() if n.endswith("k_proj.bias")}

def check_two_steps(t, steps=2) -> list[dict]:
    "Train, and assert that exactly what should move moves and that all that is reported is finite. Without weight decay, which moves what has no gradient. The log."
    c, before, teacher = t.config, state(t.distiller), state(t.setup.teacher)
    t.accelerator.backward, backward, grads = (lambda loss: (backward(loss), grads.append(None))), t.accelerator.backward, []
    log = t.fit()
    assert len(grads) >= c.max_steps == steps == log[-1]["step"]
    assert moved(before, t.distiller) - key_biases(t) == should_move(t) != set()
    assert state(t.setup.teacher).keys() == teacher.keys() and all(torch.equal(v, teacher[n]) and v.dtype == teacher[n].dtype for n, v in t.setup.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in t.setup.teacher.parameters()) and all(p.isfinite().all() for p in t.distiller.parameters())
    assert [r["step"] for r in log] == list(range(steps + 1)) and len(numbers(log)) > 20 and all(math.isfinite(n) for n in numbers(log))
    for row in log[1:]:
        terms = {k for k in TERMS if getattr(c, f"{k}_weight") > 0}
        assert terms == set(TERMS) & row.keys() and row["loss"] == pytest.approx(sum(getattr(c, f"{k}_weight") * row[k] for k in terms), rel=1e-5, abs=1e-6)
        assert row["grad_norm"] > 0 and row["data_tokens"] > 0 and row["distilled_tokens"] > 0 or not c.distils
        assert row["seconds"] >= max(v for k, v in row.items() if k.startswith("seconds_")) and all(v >= 0 for k, v in row.items() if k.startswith("seconds"))
        shares = [row[k] for k in ("scrg_helped", "scrg_corrected", "pg_clipped", "kept_mass", "clip_upper", "clip_lower", "by_student", "new_text") if k in row]
        assert all(-1e-6 <= x <= 1 + 1e-6 for x in shares)
    return log

def in_optimizer(t) -> set[str]:
    of = {id(p): n for n, p in t.distiller.named_parameters()}
    return {of[id(p)] for g in t.optimizer.param_groups for p in g["params"]}

@pytest.mark.pitfall(27)
@pytest.mark.parametrize("parameters", CASES)
def test_pitfall_27_two_steps_move_exactly_what_they_should_and_report_finite_numbers(trainer, parameters):
    t = trainer(**{"weight_decay": 0.0, "max_grad_norm": 100.0, **parameters})
    c, trains = t.config, in_optimizer(t)
    check_two_steps(t)
    assert trains - key_biases(t) == should_move(t) and trains == {n for n, p in t.distiller.named_parameters() if p.requires_grad}
    if c.mask_temperature == 0 and c.clip == "learned" and c.dac_weight: assert "sub_network" in str(list(state(t.distiller))) and "sub_network" not in str(trains)
    if parameters.keys() & {"method", *LOADED}:
        end = R.results.scores(t.setup, t.setup.student)
        assert len(numbers(end)) > 20 and all(math.isfinite(n) for n in numbers(end)) and ("excess_error" in end["test"]["tiny"]) is (c.eval_exposure and c.eval_temperature == 1)
    kept = {p.dtype for p in t.setup.teacher.parameters()} | {p.dtype for p in t.setup.student.parameters() if not p.requires_grad}
    frozen = c.precision if c.frozen_precision == "auto" else c.frozen_precision
    assert kept == {getattr(torch, frozen)} and {p.dtype for p in t.distiller.parameters() if p.requires_grad} == {torch.float32}

def test_fixed_limits_at_the_means_of_a_learned_run(trainer):
    "The ablation of the paper's learned limits: a second run is given what the first ended with."
    learned = trainer(clip_upper=0.5, mask_temperature=0.1, sub_learning_rate=0.1, max_steps=3, weight_decay=0.0).fit()
    limits = {name: learned[-1][name] for name in ("clip_upper", "clip_lower")}
    assert limits["clip_upper"] != pytest.approx(0.5, abs=1e-3) and learned[-1]["clip_upper_sd"] > 0
    fixed = check_two_steps(trainer(clip="fixed_quantile", weight_decay=0.0, **limits))
    for row in fixed[1:]:
        for name, value in limits.items(): assert row[name] == pytest.approx(value, abs=1e-6) and row[f"{name}_sd"] < 1e-3

# --- what a variant reports

@pytest.mark.parametrize("more,parts", [(dict(sampling="on_policy"), {"generation", "teacher", "update"}), (dict(sampling="fixed", scrg=False), {"teacher", "update"}), (dict(method="sft"), {"update"}),
                                        (dict(method="minillm"), {"generation", "teacher", "update"})])
def test_the_seconds_of_a_step_are_those_of_its_parts(trainer, monkeypatch, more, parts):
    "With a clock that counts its own readings: every part is measured, and the whole is no sum of parts that overlap."
    t = trainer(**more)
    ticks = iter(range(10**6))
    monkeypatch.setattr(t.clock, "now", lambda: float(next(ticks)))
    for _ in range(20 * ("generation" in parts)): t.writer.source(-1, t.setup.train[:1], [0])       # an example that is shown before training is in no step
    row, again = t.step(), t.step()
    found = {k.removeprefix("seconds_"): v for k, v in row.items() if k.startswith("seconds_")}
    assert found.keys() == parts and all(0 < v < row["seconds"] for v in found.values())
    assert found["update"] + found.get("generation", 0) < row["seconds"]       # these two do not overlap
    assert again["seconds"] < 2 * row["seconds"]                               # each step begins at 0
    monkeypatch.undo()
    assert not t.setup.teacher._forward_hooks and not R.step.decoder(t.setup.teacher)._forward_hooks and not R.step.decoder(t.setup.teacher)._forward_pre_hooks

def test_parts_of_a_clock_add_up_and_may_lie_in_each_other(monkeypatch):
    clock, ticks, layer = R.engine.Clock(torch.device("cpu")), iter(range(100)), torch.nn.Linear(1, 1)
    monkeypatch.setattr(clock, "now", lambda: float(next(ticks)))
    with clock.part("all"), clock.watching("layer", layer):       # all begins at 0
        with clock.part("part"): layer(torch.zeros(1))            # 1 (2 3) 4
        with clock.part("part"): pass                             # 5 6
        layer(layer(torch.zeros(1)))                              # (7 8) (9 10), and all ends at 11
    layer(torch.zeros(1))                                         # nobody looks
    assert clock.read() == {"all": 11, "part": 4, "layer": 3} and clock.read() == {}

def log_p_of(model, prompt, response):
    with torch.no_grad(): log_p = model.eval()(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]

@pytest.mark.parametrize("micro,corrections", [(0, 1), (3, 1), (1, 1), (2, 3)])
def test_the_gain_of_scrg_is_that_of_a_naive_loop(trainer, micro, corrections):
    "Mean over the responses with text behind the correction: the teacher's mean log-probability of the new rest, less that of the old one."
    t = trainer("llama", torch.float64, many_stops, micro_batch_size=micro, batch_size=8, scrg_corrections=corrections, **{**UNEQUAL, "max_new_tokens": 16})
    examples, text, _ = t.writer.draw(0)
    written, _ = t.writer.source(0, examples, range(8))
    revision, gains, mean = t.writer.revise(0, written, range(8)), [], lambda x: sum(x) / len(x)
    for (x, old), (_, new), j in zip(written, revision.pairs, revision.position):
        if j < 0 or len(old) <= j + 1 or len(new) <= j + 1: continue
        if corrections > 1 and old[:j] != new[:j]: continue
        gains.append(mean(log_p_of(t.setup.teacher, x, new)[j + 1:]) - mean(log_p_of(t.setup.teacher, x, old)[j + 1:]))
    assert len(gains) > 2 and len(gains) < 8
    row = t.step()
    assert row["scrg_gain"] == pytest.approx(mean(gains), rel=1e-5) and row["scrg_helped"] == pytest.approx(mean([g > 0 for g in gains]), abs=1e-6)

def test_where_nothing_is_corrected_nothing_is_gained(trainer):
    row = trainer(scrg_detect="threshold", scrg_threshold=1e6).step()
    assert row["scrg_corrected"] == row["scrg_gain"] == row["scrg_helped"] == 0

@pytest.mark.parametrize("more,reads", [(dict(scrg_corrections=1), 2), (dict(scrg_corrections=3), 4), (dict(method="minillm", teacher_mix=0.0), 1)])
def test_the_teacher_does_not_read_a_text_again_for_the_update(trainer, more, reads):
    "It reads what the student wrote, and each revision of it; the update gets its hidden states."
    t, calls = trainer(sft_weight=0.0, **more), []
    R.step.decoder(t.setup.teacher).register_forward_pre_hook(lambda *a: calls.append(1))
    examples, text, _ = t.writer.draw(0)
    assert len(calls) == reads
    t.update(examples, text)
    assert len(calls) == reads

# --- sorted by length, cut into micro-batches

@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=9), size=st.integers(1, 4), more=st.integers(0, 2))
def test_by_length_is_a_partition_from_long_to_short(lengths, size, more):
    pairs = [([0] * a, [0] * b) for a, b in lengths]
    number = math.ceil(len(pairs) / size) + more
    groups = by_length(pairs, size, number)
    total = [sum(lengths[i]) for g in groups for i in g]
    assert len(groups) == number and sorted(i for g in groups for i in g) == list(range(len(pairs))) and total == sorted(total, reverse=True)
    assert all(len(g) == size for g in groups[:len(pairs) // size]) and all(not g for g in groups[math.ceil(len(pairs) / size):])

ALIGNED = [dict(scrg=True), dict(scrg=True, scrg_corrections=3), dict(method="minillm", span_weight=0.5, spans="fixed"), dict(scrg=False)]

@pytest.mark.pitfall(26)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ALIGNED, ids=["scrg", "three corrections", "minillm", "plain"])
def test_pitfall_26_what_is_known_of_a_token_stays_with_it(trainer, kind, options):
    "After sorting, each micro-batch's hidden states, old probabilities and span weights are those of its own tokens, computed again from its ids."
    t = trainer(kind, torch.float64, many_stops, batch_size=7, **{**UNEQUAL, **options})
    examples, text, _ = t.writer.draw(0)
    lengths = [len(x) + len(y) for x, y in text.pairs]
    assert len(set(lengths)) > 2 and lengths != sorted(lengths, reverse=True)
    models = {"q": t.setup.student.eval(), "p": t.setup.teacher}
    for size in (1, 3, 7):
        micros, counts = micro_batches(examples, text, t.find_spans, t.setup.tokenizer.pad_token_id, size, math.ceil(7 / size), "cpu", True)
        seen, spans = [], 0
        for micro in micros:
            ids, rows = labels(micro.distilled), supervised(micro.distilled)
            with torch.no_grad():
                states = {n: hidden_states(m, micro.distilled)[rows] for n, m in models.items()}
                log = {n: head(m)(states[n])[:, :t.setup.vocab].log_softmax(-1).gather(-1, ids[:, None])[:, 0] for n, m in models.items()}
            assert list(map(len, ids.split(list(micro.lengths)))) == list(micro.lengths)
            seen += [y.tolist() for y in ids.split(list(micro.lengths))]
            if micro.teacher_hidden is not None: torch.testing.assert_close(micro.teacher_hidden, states["p"], rtol=1e-9, atol=1e-9)
            if micro.policy: torch.testing.assert_close(micro.policy.old_log_q, log["q"], rtol=1e-9, atol=1e-9)
            if micro.policy: torch.testing.assert_close(micro.policy.whole, make_policy(log["q"], log["p"], micro.lengths, 0.2).whole, rtol=1e-8, atol=1e-8)
            found = [pair_weights(t.find_spans(y.tolist()), len(y)) for y in ids.split(list(micro.lengths))]
            assert micro.pair_weight.tolist() == pytest.approx([w for ws, _ in found for w in ws]); spans += sum(n for _, n in found)
        assert sorted(seen) == sorted(y for _, y in text.pairs) and counts["distilled_tokens"] == sum(len(y) for _, y in text.pairs) and counts["distilled_spans"] == spans
        assert (micros[0].teacher_hidden is not None) == (t.writer.revise is not None or t.config.pg_weight > 0) and bool(micros[0].policy) == (t.config.pg_weight > 0)

@pytest.mark.pitfall(26)
@pytest.mark.parametrize("options", ALIGNED, ids=["scrg", "three corrections", "minillm", "plain"])
def test_pitfall_26_the_loss_of_a_text_does_not_depend_on_order_and_cut(trainer, options):
    "To 1e-10 in float64, for the text as drawn and shuffled, in one pass or several. The weights were moved after the draw, so that old and new probabilities differ."
    losses = []
    for micro, shift in ((0, 0), (1, 0), (2, 3), (3, 5), (0, 2)):
        t = trainer("opt", torch.float64, many_stops, batch_size=7, micro_batch_size=micro, **{**UNEQUAL, **options})
        examples, text, _ = t.writer.draw(0)
        order = [(i + shift) % 7 for i in range(7)]
        text, examples = text.part(order), [examples[i] for i in order]
        with torch.no_grad():
            for i, p in enumerate(t.setup.student.parameters()): p.add_(0.05 * torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i).reshape(p.shape))
        total, forward = [], t.distiller.forward
        t.distiller.forward = lambda *a: total.append((found := forward(*a))[0].item()) or found
        row = t.update(examples, text)
        assert len(total) == (math.ceil(7 / micro) if micro else 1)
        losses.append((sum(total), row["grad_norm"]))
        if options.get("method") == "minillm": assert row["pg_return_sd"] > 0
    for loss, norm in losses[1:]: assert loss == pytest.approx(losses[0][0], abs=1e-10) and norm == pytest.approx(losses[0][1], rel=1e-9)

def test_a_part_of_a_text_is_all_of_what_is_known_of_its_responses(trainer):
    t = trainer("llama", torch.float64, many_stops, batch_size=6, **UNEQUAL)
    _, text, _ = t.writer.draw(0)
    text.policy = make_policy(torch.arange(len(text.teacher_hidden), dtype=torch.float64), torch.zeros(len(text.teacher_hidden), dtype=torch.float64), [len(y) for _, y in text.pairs])
    part, starts = text.part([4, 1]), [sum(len(y) for _, y in text.pairs[:b]) for b in range(6)]
    tokens = [*range(starts[4], starts[5]), *range(starts[1], starts[2])]
    assert part.pairs == [text.pairs[4], text.pairs[1]] and part.corrected == [text.corrected[4], text.corrected[1]] and torch.equal(part.teacher_hidden, text.teacher_hidden[tokens])
    for a, b in zip(part.policy, text.policy): assert torch.equal(a, b[tokens])

@pytest.mark.pitfall(36)
@pytest.mark.parametrize("options", [dict(scrg=True), dict(method="minillm"), dict(method="gkd", mixed_fraction=1.0), dict(sampling="fixed", scrg=False), dict(method="sft")], ids=lambda o: ",".join(map(str, o.values())))
def test_pitfall_36_a_process_with_fewer_sequences_makes_as_many_passes_and_adds_nothing(trainer, options):
    "Five sequences for two processes, in micro-batches of two: the second process has two, and an empty micro-batch, in which it must not wait, fail, or count."
    def update(number):
        t = trainer("llama", torch.float64, many_stops, batch_size=2, weight_decay=0.0, **{**UNEQUAL, **options})
        examples, text, _ = t.writer.draw(0)
        micros, counts = micro_batches(examples, text, t.find_spans, t.setup.tokenizer.pad_token_id, 2, number, "cpu", t.config.sft_weight > 0)
        found = []
        for micro in micros:
            loss, sums, notes = t.distiller(micro, counts)
            loss.backward(); found.append((loss.item(), {k: float(v) for k, v in {**sums, **notes}.items()}))
        assert len(found) == number
        return found, counts, {n: p.grad.clone() for n, p in t.distiller.named_parameters() if p.grad is not None}
    (alone,), counts, gradients = update(1)
    (first, *empty), counts_too, gradients_too = update(2)
    assert first == alone and counts == counts_too and all(loss == 0 and not any(values.values()) and values.keys() == alone[1].keys() for loss, values in empty)
    assert gradients.keys() == gradients_too.keys() and all(torch.allclose(g, gradients_too[n], rtol=1e-12, atol=1e-15) for n, g in gradients.items())

# --- MiniLLM's update

def dense_rows(model, pairs, vocab):
    "Log-probabilities (N, V) of every response token, one sequence at a time, without padding."
    return torch.cat([model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:-1, :vocab].log_softmax(-1) for x, y in pairs])

@pytest.mark.parametrize("kind,options", [*((kind, {}) for kind in KINDS), *(("llama", options) for options in (
    dict(teacher_mix=0.0), dict(pg_single_step=False), dict(pg_length_norm=False, pg_clip=0.01), dict(pg_weight=0.3, sft_weight=0.0, micro_batch_size=0)))], ids=str)
def test_an_update_of_minillm_has_the_gradient_of_its_term_on_dense_logits(trainer, kind, options):
    "The student moved between writing and the update, so that the ratio is not 1. The ground truth's NLL is added, as configured."
    t = trainer(kind, torch.float64, many_stops, method="minillm", max_grad_norm=1e9, **{"micro_batch_size": 3, **{k: v for k, v in UNEQUAL.items() if k != "spans"}, **options})
    c, student, teacher, grads = t.config, t.setup.student, t.setup.teacher, {}
    examples, text, _ = t.writer.draw(0)
    responses, lengths = [y for _, y in text.pairs], [len(y) for _, y in text.pairs]
    ids = torch.tensor([i for y in responses for i in y])
    pick = lambda log: log.gather(-1, ids[:, None])[:, 0]
    with torch.no_grad():
        log_p, old = dense_rows(teacher, text.pairs, t.setup.vocab), pick(dense_rows(student, text.pairs, t.setup.vocab))
        for i, p in enumerate(student.parameters()): p.add_(0.1 * torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i).reshape(p.shape))
    policy = make_policy(old, pick(log_p), lengths, c.teacher_mix, c.pg_length_norm)
    log_q = dense_rows(student, text.pairs, t.setup.vocab)
    values, notes = PolicyGradient(c.pg_clip, c.pg_single_step)(whole_rows(log_q, log_p, ids, policy=policy))
    truth = [(e.prompt_ids, e.response_ids) for e in examples]
    nll = -dense_rows(student, truth, t.setup.vocab).gather(-1, torch.tensor([i for _, y in truth for i in y])[:, None]).mean()
    names, weights = zip(*student.named_parameters())
    loss, mean = c.pg_weight * values.mean() + c.sft_weight * nll, lambda x: float(x.detach().mean())
    expected = dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True)))
    step = t.optimizer.step
    t.optimizer.step = lambda *a: grads.update({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}) or step(*a)
    row = t.update(examples, text)
    assert row["pg"] == pytest.approx(mean(values), rel=1e-5) and row["loss"] == pytest.approx(loss.item(), rel=1e-5) and 0 < row["pg_clipped"] < 1
    assert row["pg_clipped"] == pytest.approx(mean(notes["pg_clipped"]), rel=1e-5) and row["pg_return"] == pytest.approx(mean(policy[2 if c.pg_single_step else 3]), rel=1e-5)
    assert len(grads) == len(names) and max(float(g.abs().max()) for g in grads.values()) > 1e-3
    for n, g in grads.items(): torch.testing.assert_close(g, expected[n], rtol=1e-8, atol=1e-10, msg=lambda m: f"{n}: {m}")

def test_the_teacher_helps_to_write_with_its_share_and_only_in_training(trainer, monkeypatch):
    shares, generate = [], S.generate
    monkeypatch.setattr(S, "generate", lambda *a, **k: shares.append([x[1] for x in a if isinstance(x, tuple) and len(x) > 1 and isinstance(x[1], float)]) or generate(*a, **k))
    t = trainer(method="minillm", teacher_mix=0.3)
    t.writer.draw(0)
    assert shares == [[0.3]]
    R.results.scores(t.setup, t.setup.student)
    assert shares[1:] and all(s == [0.0] for s in shares[1:])
    assert trainer(method="minillm", teacher_mix=0.9, max_new_tokens=16).writer.draw(0)[1].pairs != trainer(method="minillm", teacher_mix=0.0, max_new_tokens=16).writer.draw(0)[1].pairs

# --- which weights are the result

METRICS = ("nll", "kl", "rouge_l")
# validations by step, each metric with another best: nll at 2 (twice, the first counts), kl at 4, rouge_l at 5
SCRIPT = {"nll": [9, 5, 3, 4, 3, 4, 6], "kl": [1, 5, 4, 3, 2, 4, 6], "rouge_l": [50, 3, 10, 4, 10, 30, 6]}
BEST = {"nll": 2, "kl": 4, "rouge_l": 5}
KEEP = dict(max_steps=6, eval_every=1, learning_rate=0.01, warmup_steps=0, method="sft")

def scripted(t):
    "The trainer, with validations from the table."
    t.validate = lambda known=None: {f"validation_{name}": float(values[t.progress.step]) for name, values in SCRIPT.items()}
    return t

def trained(model): return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())

def copies_of(t):
    "Fill the returned dictionary with the student's trained weights after every step, while `fit` runs with the returned function."
    copies = {}
    return copies, lambda row: copies.update({row["step"]: trained(t.setup.student)})

@pytest.mark.parametrize("metric,where,lora", [("nll", "memory", 0), ("nll", "folder", 2), ("kl", "memory", 2), ("kl", "folder", 0), ("rouge_l", "folder", 0)])
def test_the_result_are_the_weights_of_the_best_validation(config, metric, where, lora):
    "Lower is better, for ROUGE-L higher; the first of equal ones; a start that nothing reaches is no result of training."
    c = config(select=metric, run_name="x", lora_rank=lora, **KEEP)
    t = scripted(Trainer(prepare(c, cpu=True), open_run(c) if where == "folder" else None))
    copies, on_step = copies_of(t)
    log = t.fit(on_step)
    assert t.progress.step == 6 and same(trained(t.setup.student), copies[BEST[metric]]) and not same(copies[BEST[metric]], copies[6])
    assert [r["step"] for r in log] == list(range(7)) and t.progress.best[0] == BEST[metric]

def test_the_last_weights_are_the_result_unless_others_are_asked_for(config):
    c = config(select="last", run_name="x", **KEEP)
    t = scripted(Trainer(prepare(c, cpu=True), open_run(c)))
    copies, on_step = copies_of(t)
    t.fit(on_step)
    assert same(trained(t.setup.student), copies[6]) and t.progress.best is None and not (t.folder/"best").exists()

@pytest.mark.parametrize("metric", METRICS)
def test_what_is_reported_is_measured_on_the_kept_weights(config, metric, tmp_path, monkeypatch):
    "A whole run, with real validations of which the last one is not the best."
    if metric == "rouge_l": monkeypatch.setattr(R.setup, "score_answers", lambda texts, examples, words: {"rouge_l": float(sum(map(ord, "".join(texts))) % 97)})      # random models score 0
    c = config(select=metric, run_name="x", **{**KEEP, **(dict(method="kd", sft_weight=0.0, learning_rate=0.03) if metric == "nll" else dict(learning_rate=0.1))})
    kept, keep_best = {}, Trainer.keep_best
    def copied(self, row):
        kept[row["step"]] = row[f"validation_{metric}"], trained(self.setup.student)
        keep_best(self, row)
    monkeypatch.setattr(Trainer, "keep_best", copied)
    metrics = run(c, cpu=True)
    best = (max if metric == "rouge_l" else min)(kept, key=lambda step: kept[step][0])
    assert best != 6 and set(kept) == {1, 2, 3, 4, 5, 6}
    saved = load_model(str(tmp_path/"runs/x/student"))
    assert same({n: p for n, p in trained(saved).items()}, kept[best][1]) and not (tmp_path/"runs/x/best").exists()
    if metric != "rouge_l": assert metrics["student"]["validation"][metric] == pytest.approx(kept[best][0], rel=1e-6)
    assert metrics["student"]["validation"]["nll"] == pytest.approx(R.setup.held_out(saved, None, prepare(c, cpu=True).validation, 0, 10**6)["nll"], rel=1e-5)

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("metric,stop,method", [("nll", 4, "sft"), ("nll", 5, "mgsr"), ("kl", 5, "sft"), ("rouge_l", 5, "sft")])
def test_pitfall_32_the_best_weights_survive_an_interruption(config, metric, stop, method):
    "Checkpoint at 3; killed after the best was written (or while an older best still counted) and before the next checkpoint."
    c = lambda name: config("gpt2", select=metric, run_name=name, checkpoint_every=3, **{**KEEP, "method": method})
    start = lambda name: scripted(Trainer(prepare(c(name), cpu=True), open_run(c(name))))
    whole = start("whole")
    whole.fit()
    first = start("parts")
    with pytest.raises(Interrupted): first.fit(interrupt_at(stop))
    if metric == "rouge_l": (first.folder/"best"/"step-000005.safetensors").write_bytes(b"half")       # it dies while writing, and what it left is not believed
    second = start("parts")
    assert second.checkpoints.resume() == 3 and second.progress.best[0] == (3 if metric == "kl" else 2)
    second.fit()
    assert second.progress.best == whole.progress.best and second.progress.best[0] == BEST[metric]
    assert same(trained(second.setup.student), trained(whole.setup.student)) and plain(second.progress.log) == plain(whole.progress.log)

def test_to_train_again_what_is_trained_does_nothing(config):
    "A cell run twice, also after the results were written and the files of the best are gone."
    c = config(select="nll", run_name="x", **KEEP)
    t = scripted(Trainer(prepare(c, cpu=True), open_run(c)))
    log, weights = list(t.fit()), trained(t.setup.student)
    R.results.write_results(t.setup, t.folder, *[{"answers": [], "test": {}}] * 3, log, {})
    assert t.fit() == log and same(trained(t.setup.student), weights)

def test_old_files_of_the_best_go_and_those_that_a_checkpoint_needs_stay(config):
    "With validations that get better at every step, one file a step would stay."
    c = config(select="nll", run_name="x", checkpoint_every=2, **{**KEEP, "max_steps": 9})
    t = Trainer(prepare(c, cpu=True), open_run(c))
    t.validate = lambda known=None: {"validation_nll": -float(t.progress.step), "validation_kl": 0.0}
    seen = {}
    t.fit(lambda row: seen.update({row["step"]: sorted(int(p.stem.removeprefix("step-")) for p in (t.folder/"best").iterdir())}))
    # `on_step` comes before the step's checkpoint. After the checkpoint of 8 those of 6 and 8 are there, and an interruption can go back to either
    assert seen[5] == [2, 3, 4, 5] and seen[7] == [4, 5, 6, 7] and seen[9] == [6, 7, 8, 9]
    for step in (6, 8):
        again = Trainer(prepare(c, cpu=True), t.folder)
        again.accelerator.load_state(str(t.folder/"checkpoints"/f"step-{step:06d}"))
        assert again.progress.best == (step, -step)
        again.restore_best()
    R.results.write_results(t.setup, t.folder, *[{"answers": [], "test": {}}] * 3, t.progress.log, {})
    assert not (t.folder/"best").exists() and not (t.folder/"checkpoints").exists()

def test_without_checkpoints_only_the_newest_best_stays(config):
    c = config(select="nll", run_name="x", **KEEP)
    t = Trainer(prepare(c, cpu=True), open_run(c))
    t.validate = lambda known=None: {"validation_nll": -float(t.progress.step), "validation_kl": 0.0}
    t.fit(interrupt_at(9))
    assert [p.name for p in (t.folder/"best").iterdir()] == ["step-000006.safetensors"]

def test_overwrite_takes_the_best_of_the_old_run_away(config):
    c = config(select="nll", run_name="x", **KEEP)
    with pytest.raises(Interrupted): scripted(Trainer(prepare(c, cpu=True), open_run(c))).fit(interrupt_at(3))
    folder = open_run(config(select="kl", run_name="x", overwrite=True, **KEEP))
    assert not (folder/"best").exists()

# --- what is made once

def test_a_students_start_is_tuned_once_and_is_the_start_of_all_methods(config, monkeypatch, tmp_path):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own cache"))
    tuned, fine_tune = [], R.artefacts.fine_tune
    monkeypatch.setattr(R.artefacts, "fine_tune", lambda *a, **k: tuned.append(a[2]) or fine_tune(*a, **k))
    start = lambda **more: prepare(config(**{"student_sft_steps": 3, **more}), cpu=True)
    first = start()
    assert tuned == [1, 3]                                       # the teacher, then its student
    for method in METHODS:
        other = start(method=method, seed=5, dac_weight=0.5, max_steps=4) if method == "mgsr" else start(method=method)
        assert same(state(other.student), state(first.student)) and same(state(other.teacher), state(first.teacher)) and other.keys["student_start"] == first.keys["student_start"]
    assert tuned == [1, 3]
    raw, longer, narrow = start(student_sft_steps=0), start(student_sft_steps=4), start(student_layers=1)
    assert tuned == [1, 3, 4, 3]
    assert moved(state(raw.student), first.student) == set(trained(raw.student)) and moved(state(first.student), longer.student)
    assert len({str(s.keys["student_start"]) for s in (raw, first, longer, narrow)}) == 4
    for more in (dict(learning_rate=2e-3), dict(batch_size=2), dict(max_train_examples=6), dict(lora_rank=2), dict(warmup_steps=2)):
        before = len(tuned)
        start(**more)
        assert len(tuned) == before + 2, more                    # another teacher and another start

def test_with_lora_the_start_is_tuned_by_adapters_and_has_none(config):
    raw, tuned = (prepare(config(lora_rank=2, teacher_sft_steps=0, student_sft_steps=n, learning_rate=1e-2), cpu=True) for n in (0, 2))
    base = lambda s: {n.replace("base_layer.", ""): p for n, p in state(s.student.get_base_model()).items() if ".lora_" not in n}
    a, b = base(raw), base(tuned)
    assert {n.split(".")[-2] for n in a if not torch.equal(a[n], b[n])} == {"q_proj", "v_proj"} and a.keys() == b.keys()
    assert [n for n in state(tuned.student) if ".lora_B" in n] and all(not p.any() for n, p in state(tuned.student).items() if ".lora_B" in n)

def test_a_teacher_tuned_by_adapters_depends_on_their_scale(config):
    one, two = (prepare(config(lora_rank=2, lora_alpha=alpha, teacher_sft_steps=2, learning_rate=1e-2, lora_dropout=0.0), cpu=True) for alpha in (1.0, 64.0))
    assert moved(state(one.teacher), two.teacher)

def test_scores_of_a_start_are_those_of_its_precision(config, monkeypatch, tmp_path):
    "Under LoRA the student is frozen, and rounded to bfloat16 here; without it, it is not."
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own cache"))
    for rank in (0, 2):
        s = prepare(config(lora_rank=rank, frozen_precision="bfloat16", teacher_sft_steps=0), cpu=True)
        assert R.results.scores(s, s.student, s.keys["student_start"])["validation"] == R.results.scores(s, s.student)["validation"]

def test_teacher_text_is_that_of_its_precision(config, monkeypatch, tmp_path):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own cache"))
    for made, precision in enumerate(("float32", "bfloat16"), 1):
        c = config(responses="teacher", frozen_precision=precision, teacher_sft_steps=0, max_new_tokens=16)
        s, fresh = prepare(c, cpu=True), prepare(with_truth(c), cpu=True)
        sample, i = fresh.sampler(fresh.teacher), R.setup.batch_indices(len(s.train), c.batch_size, 0, c.seed)
        assert len(list((tmp_path/"own cache/teacher_text").glob("*/responses.json"))) == made
        assert [s.train[b].response_ids for b in i] == sample([s.train[b].prompt_ids for b in i], [("teacher", b) for b in i], [c.max_new_tokens] * len(i))

def with_truth(c): return resolve({**c.model_dump(), "responses": "ground_truth"})

# --- exposure

def test_exposure_is_measured_for_the_students_and_not_for_the_teacher(config):
    metrics = run(config(eval_exposure=True, run_name="x", eval_prompts=3, learning_rate=1e-2), cpu=True)
    for who in ("student_start", "student"):
        found = metrics[who]["test"]["tiny"]
        assert math.isfinite(found["excess_error"]) and 0 < found["excess_error_length"] <= 4 and len(found["excess_error_curve"]) == found["excess_error_length"]
        assert found["excess_error_curve"][-1] == pytest.approx(found["excess_error"], abs=1e-3)
    assert metrics["student"]["test"]["tiny"]["excess_error"] != metrics["student_start"]["test"]["tiny"]["excess_error"]
    assert not {k for k in metrics["teacher"]["test"]["tiny"] if k.startswith("excess")}
    plainly = run(config(run_name="y", eval_prompts=3, learning_rate=1e-2), cpu=True)
    for who in ("student_start", "student", "teacher"):         # and nothing else is another number for it
        assert plainly[who]["test"]["tiny"] == {k: v for k, v in metrics[who]["test"]["tiny"].items() if not k.startswith("excess")} and plainly[who]["validation"] == metrics[who]["validation"]
