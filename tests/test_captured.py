"The captured step writes what the usual loop writes: every architecture, SCRG's two writings, adapters, autocast, weights that move; and it can be recorded."
import gc, warnings, weakref
import pytest, torch
from torch.fx.experimental.proxy_tensor import make_fx
from architectures import ACCEPTED, tiny
from mgsr_nb import captured, sampling
from mgsr_nb.captured import _able, _steps, decode_captured, loop_for, narrowest
from mgsr_nb.decoding import decode, generate
from mgsr_nb.models import add_lora
from mgsr_nb.sampling import OnPolicy, sampler
from mgsr_nb.scrg import SCRG, Scorer
from tiny_models import KINDS, tiny_model

V, PAD = 60, 2
PROMPTS = [[5, 6, 7], [8] * 9, [9, 4, 3, 11, 12], [11]]
LIMITS, STOPS = [20, 12, 20, 0], range(3, 9)
# positions are made from a mask of two dimensions
BY_THE_LOOP = {"bloom", "falcon"}

def keys(what="captured"): return [(what, b) for b in range(len(PROMPTS))]

def texts(model, loop, limits=LIMITS, **more): return generate(model, PROMPTS, keys(), limits, STOPS, PAD, V, loop=loop, **more)

def traced(step):
    "What stands in for a CUDA graph: the recorded operations of one call; Python cannot read a tensor in between."
    graph = make_fx(lambda nothing: step())(torch.zeros(()))
    return lambda: graph(torch.zeros(()))

def by_trace(*args): return decode_captured(*args, capture=traced)

@pytest.mark.parametrize("name", ACCEPTED)
def test_every_architecture_writes_the_same_texts(name):
    "By the step where it can (a window that the text does not fill, too), by the loop where it cannot."
    model = tiny(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert texts(model, decode_captured) == texts(model, decode)
    own = [w for w in said if "captured" in str(w.message)]
    by_loop = narrowest(model) < float("inf") or name in BY_THE_LOOP
    assert by_loop == (not _steps.get(model)), [str(w.message) for w in own]
    assert bool(own) == (name in BY_THE_LOOP)

def test_a_window_that_holds_the_text_is_no_window():
    model = tiny("mistral", sliding_window=64)
    assert texts(model, decode_captured) == texts(model, decode) and len(_steps[model]) == 1

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, dict(temperature=0.), dict(mixed=True)], ids=["sampled", "greedy", "mixture"])
def test_it_can_be_recorded(kind, more):
    model, more = tiny_model(kind), dict(more)
    if more.pop("mixed", False): more["mix"] = (tiny_model(kind, 3, seed=1), 0.4)
    assert texts(model, by_trace, **more) == texts(model, decode, **more)
    assert list(_able[model].values()) == [True] and len(_steps[model]) == 1

def test_a_model_that_reads_the_device_is_left_to_the_loop():
    "Something in its pass that no graph can do: noticed, said once, and the texts are the same."
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda m, args, kwargs: kwargs["input_ids"].sum().item() and None, with_kwargs=True)
    with pytest.warns(UserWarning, match="without a captured step"): found = texts(model, by_trace)
    assert found == texts(model, decode) and not _steps.get(model)

def test_weights_that_moved_are_read_anew():
    "Under autocast the step has copies of its own; without it, it reads the weights themselves."
    model = tiny_model("llama", spread=0.5)
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            before = texts(model, decode_captured)
            with torch.no_grad():
                for p in model.parameters(): p.mul_(0.9)
            after = texts(model, decode_captured)
            assert before != after
            _steps.clear()
            assert texts(model, decode_captured) == after

def test_under_autocast_it_computes_as_autocast_does():
    "Logits of the step against the model's own, to the rounding of bfloat16."
    model = tiny_model("llama", spread=0.5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert captured.agrees([model], 0., V, None)
        [copies] = [captured.Casts(model, torch.device("cpu")).copies]
    assert all(c.dtype == torch.bfloat16 for c in copies.values())
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= set(copies) and not any("norm" in n or "embed" in n for n in copies)

def test_a_wrong_step_is_noticed(monkeypatch):
    model = tiny_model("llama", spread=0.5)
    monkeypatch.setattr(captured, "one_token", None)
    right = captured.Step.logits
    monkeypatch.setattr(captured.Step, "logits", lambda self: right(self).flip(-1))
    with pytest.warns(UserWarning, match="its logits differ"): found = texts(model, decode_captured)
    assert found == texts(model, decode)

def test_adapters_write_too():
    model = add_lora(tiny_model("llama"), 2, 4., 0.1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.3)
    assert texts(model, decode_captured) == texts(model, decode) and _steps[model]

def test_both_writings_of_scrg_are_by_one_step(monkeypatch):
    student, teacher = tiny("llama", seed=1), tiny("llama", seed=2)
    def revised(loop):
        monkeypatch.setattr(sampling, "loop_for", lambda *_: loop)
        sample = sampler(student, STOPS, PAD, V)
        examples = [type("E", (), dict(prompt_ids=p)) for p in PROMPTS]
        pairs, _ = OnPolicy(sample, 0, 26)(0, examples, range(4))
        scrg = SCRG(Scorer(student, teacher, PAD, V), sample, STOPS, seed=0, max_new_tokens=26, corrections=2)
        return pairs, scrg(0, pairs, range(4)).pairs
    found = revised(by_trace)
    assert found == revised(decode) and found[0] != found[1]
    assert len(_steps[student]) == 1

def test_a_step_is_kept_for_what_fits_it_and_few_are_kept():
    model = tiny_model("llama")
    texts(model, decode_captured)
    [(_, first)] = _steps[model]
    texts(model, decode_captured, limits=[3, 0, 2, 18])
    assert [s for _, s in _steps[model]] == [first]
    assert (first.rows, first.columns) == (3, 32)
    texts(model, decode_captured, limits=[70, 1, 1, 1])         # longer than its table
    assert len(_steps[model]) == 2
    for t in (0.5, 0.6): texts(model, decode_captured, temperature=t)
    assert len(_steps[model]) == captured.KEPT and first not in [s for _, s in _steps[model]]

def test_steps_go_with_their_model():
    model = tiny_model("llama")
    texts(model, decode_captured)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None

def test_a_cpu_keeps_the_loop_unless_it_is_told():
    cpu = torch.device("cpu")
    assert loop_for(cpu) is loop_for(cpu, "eager") is decode
    assert loop_for(cpu, "captured").func is decode_captured and loop_for(torch.device("cuda"), "auto").keywords == {"capture": captured.cuda_graph}
    assert loop_for(torch.device("cuda"), "eager") is decode
