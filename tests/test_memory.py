"The estimate: by hand, line by line, and against all that is alive in a real step."
from functools import lru_cache
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from mgsr_nb.config import resolve
from mgsr_nb.models import add_lora
from mgsr_nb.run.blueprints import architecture
from mgsr_nb.run.live_bytes import LiveBytes
from mgsr_nb.run.memory import cache_bytes, memory, phases, sizes, writing
from mgsr_nb.run.parts import make_objective
from mgsr_nb.run.step import Distiller, Micro, make_optimizer
from mgsr_nb.tokens import collate

GPT2 = dict(preset="gpt2-dolly", precision="bfloat16")
LLAMA2 = dict(preset="llama2-dolly", precision="bfloat16")

@lru_cache
def estimate(**parameters):
    "Sizes, GB of each line by (phase, what), GB of each phase."
    config = resolve(**parameters)
    s = sizes(config, architecture(config.teacher), architecture(config.student))
    items = memory(config, s)
    lines = {(i.phase, i.what): i.size / 1e9 for i in items}
    return s, lines, {phase: size / 1e9 for phase, size in phases(items).items()}

def gb(bytes): return pytest.approx(bytes / 1e9, rel=1e-6)

# --- by hand

def test_the_parameters_are_counted():
    s, *_ = estimate(**LLAMA2)
    assert (s.teacher_weights, s.student_weights) == (13_015_864_320, 6_738_415_616)
    assert (s.adapters, s.teacher_adapters) == (32 * 2 * 16 * 8192, 40 * 2 * 16 * 10240)
    assert s.sub == 96_001 * 256 + 514

def test_weights_gradients_and_moments_by_hand():
    s, line, total = estimate(**LLAMA2)
    assert line["always", "teacher"] == gb(2 * s.teacher_weights)
    assert line["always", "student, frozen"] == gb(2 * s.student_weights)
    assert line["always", "adapters"] == gb(4 * s.adapters)
    assert line["always", "AdamW"] == gb(8 * (s.adapters + s.sub))
    assert line["always", "casts"] == gb(2 * s.adapters)
    assert line["step", "gradients"] == gb(4 * (s.adapters + 2 * s.sub))
    assert line["teacher SFT", "teacher"] == gb(4 * s.teacher_weights)
    assert line["teacher SFT", "gradients, AdamW"] == gb(12 * s.teacher_adapters)
    for phase in ("writing", "step", "evaluation"):
        lines = [v for (p, _), v in line.items() if p in ("always", phase)]
        assert total[phase] == pytest.approx(sum(lines))
    assert total["loading"] == gb(4 * (s.teacher_weights + s.student_weights))
    assert "student SFT" not in total and "always" not in total

def test_keys_and_values_by_hand():
    _, line, _ = estimate(**LLAMA2)
    teacher, student = 2 * 40 * 5120 * 2, 2 * 32 * 4096 * 2      # bytes of a token
    assert line["evaluation", "keys and values, teacher"] == gb(48 * 512 * teacher)
    assert line["writing", "keys and values, student"] == gb(32 * 512 * student)
    # SCRG reads with the teacher
    assert line["writing", "keys and values, teacher"] == gb(32 * 512 * teacher)

def test_types_and_what_trains_change_the_weights():
    s, full, _ = estimate(preset="gpt2-dolly", precision="float32")
    assert full["always", "teacher"] == pytest.approx(1.5576 * 4, rel=1e-3)
    assert full["always", "student"] == pytest.approx(0.12444 * 4, rel=1e-3)
    assert ("always", "casts") not in full
    assert full["always", "AdamW"] == gb(8 * (s.student_weights + s.sub))
    assert full["teacher SFT", "gradients, AdamW"] == gb(12 * s.teacher_weights)
    # the head's, once for each of two texts
    early = s.sub + 2 * 50257 * 768
    assert full["step", "gradients"] == gb(4 * (s.student_weights + s.sub + early))
    _, mixed, _ = estimate(**GPT2)
    assert mixed["always", "teacher"] == pytest.approx(full["always", "teacher"] / 2)
    assert mixed["always", "student"] == full["always", "student"]
    assert mixed["always", "casts"] == pytest.approx(0.12444 * 2, rel=1e-3)
    _, frozen, _ = estimate(**GPT2, frozen_precision="float32")
    assert frozen["always", "teacher"] == full["always", "teacher"]

def test_fine_tuning_the_student_has_the_teacher_beside_it():
    s, line, total = estimate(**GPT2, student_sft_steps=10)
    assert line["student SFT", "teacher beside it"] == gb(4 * s.teacher_weights)
    assert line["student SFT", "gradients, AdamW"] == gb(12 * s.student_weights)
    assert "student SFT" in total
    assert "teacher SFT" not in estimate(preset="gpt2-dolly", teacher_sft_steps=0)[2]

def test_the_lengths_and_batches_scale_their_own_lines():
    _, one, _ = estimate(**GPT2)

    def changed(**more):
        _, found, _ = estimate(**GPT2, **more)
        return {key for key, v in found.items() if abs(v - one.get(key, 0)) > 1e-9 * v}

    keys = ("evaluation", "keys and values, teacher")
    assert changed(micro_batch_size=4) == {("step", "activations"), ("teacher SFT", "activations")}
    assert changed(chunk_tokens=511) == {("step", "chunk"), ("teacher SFT", "chunk")}
    assert changed(eval_batch_size=24) == {keys, ("evaluation", "forward")}
    _, half, _ = estimate(**GPT2, micro_batch_size=4, chunk_tokens=511, eval_batch_size=24)
    for key in (("step", "activations"), keys): assert half[key] == pytest.approx(one[key] / 2)
    assert half["step", "chunk"] == pytest.approx(one["step", "chunk"] / 1025 * 512)

def test_one_text_has_one_graph_and_nobody_writes():
    _, mgsr, with_text = estimate(**GPT2)
    _, kd, without = estimate(**GPT2, method="kd")
    assert mgsr["step", "activations"] == pytest.approx(2 * kd["step", "activations"])
    assert set(with_text) - set(without) == {"writing"}
    assert ("always", "f_sub") not in kd and kd["step", "chunk"] < mgsr["step", "chunk"]

def test_the_teacher_keeps_keys_where_it_reads_or_writes_along():
    s, *_ = estimate(**GPT2)

    def writers(**more):
        items = writing(resolve(preset="gpt2-dolly", **more), s)
        return {i.what.removeprefix("keys and values, ") for i in items} - {"forward"}

    both = {"student", "teacher"}
    assert writers() == writers(method="minillm") == both
    assert writers(method="distillm", teacher_mix=0.2) == writers(method="skd") == both
    assert writers(method="distillm") == writers(scrg=False) == {"student"}

def test_grouped_heads_keep_fewer_keys():
    qwen, gpt2 = architecture("Qwen/Qwen2.5-1.5B-Instruct"), architecture("openai-community/gpt2")
    assert cache_bytes(qwen, "bfloat16") == 2 * 28 * 2 * 128 * 2
    assert cache_bytes(gpt2, "float32") == 2 * 12 * 768 * 4

# --- a real step

V, TOKENS, PROMPT, ROWS = 3000, 64, 16, 3

def shape(kind, width):
    if kind == "gpt2": return dict(n_embd=width, n_head=8, attn_pdrop=0.)
    found = dict(hidden_size=width, num_attention_heads=8)
    if kind == "opt": return found | dict(word_embed_proj_dim=width, ffn_dim=4 * width)
    return found | dict(num_key_value_heads=8, intermediate_size=int(width * 2.75))

def config_of(kind, width, layers):
    return AutoConfig.for_model(kind, vocab_size=V, num_hidden_layers=layers, bos_token_id=None,
                                eos_token_id=0, pad_token_id=None, **shape(kind, width))

def distiller_of(c, teacher, student):
    "What trains in a run of the parameters `c`, made of configurations."
    teacher = AutoModelForCausalLM.from_config(teacher, dtype=torch.float32)
    teacher.requires_grad_(False).to(getattr(torch, c.precision))
    student = AutoModelForCausalLM.from_config(student, dtype=torch.float32)
    if c.lora_rank: student = add_lora(student.to(torch.bfloat16), c.lora_rank, 1., 0.1)
    objective = make_objective(c, V)
    objective.block_rows = c.chunk_tokens
    return Distiller(student, objective, teacher, V).train()

def texts():
    return collate([([1] * PROMPT, [i + 2] * (TOKENS - PROMPT)) for i in range(ROWS)], 0)

@pytest.mark.parametrize("kind,lora,method", [("llama", 8, "mgsr"), ("gpt2", 0, "mgsr"),
                                              ("opt", 0, "kd")])
def test_a_whole_training_step_needs_what_was_estimated(kind, lora, method):
    "All that is alive at the peak, for a pair large enough for every line to count."
    c = resolve(method=method, max_tokens=TOKENS, max_prompt_tokens=PROMPT, batch_size=ROWS,
                max_new_tokens=TOKENS - PROMPT, lora_rank=lora, chunk_tokens=60,
                precision="bfloat16" if lora else "float32")
    teacher, student = config_of(kind, 192, 2), config_of(kind, 128, 3)
    expected = phases(memory(c, sizes(c, teacher, student)))["step"]
    rows = ROWS * (TOKENS - PROMPT)
    counts = dict.fromkeys(("data_tokens", "distilled_tokens", "distilled_spans"),
                           torch.tensor(float(rows)))
    with LiveBytes() as live:
        distiller = distiller_of(c, teacher, student)
        optimizer = make_optimizer(distiller, 1e-4, 1e-4, 0.)
        data, written = texts(), texts()
        text = data if c.sampling == "fixed" else written
        micro = Micro(data, text, torch.rand(rows))
        for _ in range(2):      # AdamW's moments come with the first step
            live.most = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=c.precision == "bfloat16"):
                loss, *_ = distiller(micro, counts)
            loss.backward()
            peak = live.most
            optimizer.step()
            optimizer.zero_grad()
    assert 0.97 < expected / peak < 1.2
