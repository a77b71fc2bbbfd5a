"""Without a GPU: all tensors on the `meta` device, which computes shapes, refuses a tensor of another device, and has no numbers that Python could read. What passes makes its tensors where they belong, and does not wait."""
import contextlib
import pytest, torch
from mgsr_nb import captured
from mgsr_nb.captured import Step
from mgsr_nb.config import resolve
from mgsr_nb.decoding import NextToken, Reading
from mgsr_nb.presets import METHODS
from mgsr_nb.run.parts import make_objective
from mgsr_nb.run.step import Distilled, Distiller, make_optimizer, micro_batches
from mgsr_nb.scrg import SCRG, MaxKL, Scorer, error_position
from mgsr_nb.decoding import noise, starts_of
from mgsr_nb.minillm import make_policy
from mgsr_nb.tokens import Encoded, collate, labels
from tiny_models import KINDS, tiny_model

META, V, PAD = torch.device("meta"), 60, 2
PAIRS = [([5, 6, 7], [8, 9, 10, 11]), ([12, 13], [14, 15]), ([16] * 6, [17] * 9)]
EXAMPLES = [Encoded(x, y, None, False) for x, y in PAIRS]

@pytest.fixture(autouse=True)
def without_the_librarys_look(monkeypatch):
    "transformers looks once in a pass whether anything is masked; that it does not have to is not ours to change."
    monkeypatch.setattr(captured, "autocast_type", lambda device: None)      # the stand-in has no autocast, not even to be switched off
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)

def on_meta(kind, layers, seed): return tiny_model(kind, layers, seed=seed).to(META)

def is_meta(*tensors): return all(t.device == META for t in tensors)

def test_the_stand_in_notices():
    "A tensor made on the CPU, and a number that is read."
    x = torch.zeros(3, device=META)
    with pytest.raises(RuntimeError, match="device"): x + torch.zeros(3)
    with pytest.raises((RuntimeError, NotImplementedError)): (x > 0).nonzero().tolist()
    with pytest.raises(RuntimeError): x.sum().item()

@pytest.mark.parametrize("method,kind", [*((m, "llama") for m in METHODS), ("mgsr", "gpt2"), ("mgsr", "opt")])
def test_an_update(method, kind):
    "From texts to the optimiser's step, for each method's terms: on text of the data, and on text of the student that a teacher has read."
    config = resolve(method=method, chunk_tokens=4, sub_top_k=8)
    student, teacher = on_meta(kind, 2, 1), on_meta(kind, 3, 2)
    distiller = Distiller(student, make_objective(config, V).to(META), teacher, V).train()
    optimizer = make_optimizer(distiller, 1e-3, 1e-3, 0.01)
    for g in optimizer.param_groups: g["fused"], g["foreach"] = False, True     # there is no fused kernel for the stand-in
    tokens = sum(len(y) for _, y in PAIRS)
    policy = make_policy(torch.zeros(tokens, device=META), torch.zeros(tokens, device=META), [len(y) for _, y in PAIRS], 0.2, True) if config.pg_weight else None
    text = Distilled(PAIRS, torch.zeros(tokens, 16, device=META), policy, [(1, -2.), None, (3, -1.)] if config.scrg else None)
    for distilled in ([None, "data"] if not config.distils else [text] if policy else ["data", text]):
        micros, counts = micro_batches(EXAMPLES, distilled, lambda ids: [(0, 2)], PAD, 2, 2, META, config.sft_weight > 0)
        counts = {k: torch.tensor(float(n), device=META) for k, n in counts.items()}
        for micro in micros:
            loss, sums, notes = distiller(micro, counts)
            loss.backward()
            assert is_meta(loss, *sums.values(), *notes.values())
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()

def test_what_an_update_adds_up_does_not_wait():
    batch = collate(PAIRS, PAD).to(META)
    assert is_meta(batch.trained, labels(batch)) and len(labels(batch)) == 15

@pytest.mark.parametrize("kind", KINDS)
def test_scoring(kind):
    "Both readings, SCRG's scores and its choice; a text whose end is replaced is read without waiting."
    scorer = Scorer(on_meta(kind, 2, 1), on_meta(kind, 3, 2), PAD, V, chunk_tokens=4)
    keys = [("k", b) for b in range(3)]
    readings = scorer.read(PAIRS)
    scores = scorer(PAIRS, keys, readings)
    padded = [scores.padded(n) for n in ("kl", "student_ids", "teacher_ids", "log_p")]
    j = error_position(MaxKL()(padded[0], noise(starts_of(keys, META), 0, 9)), *padded[1:3])
    assert is_meta(scores.kl, scores.log_q, *padded, j)
    for reading in readings:
        assert reading.columns.device.type == "cpu" and is_meta(reading.hidden)
        reading.cut([4, 3, 7])
        reading.replace([4, 3, 7], [[1, 2], [3], []])
        assert is_meta(reading.predicting([3, 2, 6], [3, 2, 1]), *(x for layer in reading.cache.layers for x in (layer.keys, layer.values)))
        reading.keep(torch.tensor([0, 2]), [[5, 6, 7, 8], [16] * 6])

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0., 0.3])
def test_writing_a_token(kind, share):
    "A captured step, alone and with a teacher's share: nothing of it is anywhere else, or made anew."
    models = [on_meta(kind, 2, 1), on_meta(kind, 3, 2)]
    usual = NextToken(models[0], V, (models[1], share))
    batch = collate([(x, []) for x, _ in PAIRS], PAD, side="left").to(META)
    start = batch.attention_mask, batch.position_ids
    with torch.no_grad():
        logits = usual(batch.input_ids, *start)
        step = Step(usual, 8, 64, 5, [1], 1.)
        starts = starts_of([("k", b) for b in range(3)], META)
        step.begin(usual.caches, *start, logits, starts, torch.full((3,), 5, device=META))
        tensors = {n: t for n, t in vars(step).items() if isinstance(t, torch.Tensor)}
        for _ in range(3): step.advance()
    assert is_meta(*tensors.values()) and all(getattr(step, n) is t for n, t in tensors.items()) and len(tensors) >= 10

def test_random_numbers_of_an_update_are_made_on_the_cpu_only_to_seed():
    "Noise is a function of keys, on the device."
    assert is_meta(noise(starts_of([("k", 0)], META), 3, 7), noise(starts_of([("k", 0)], META), torch.zeros(1, dtype=torch.long, device=META), 7))
