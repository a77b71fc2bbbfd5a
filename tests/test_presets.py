"""Presets and methods: valid, and no more than what differs; what is typed wins."""
import pytest
from mgsr_nb.presets import PRESETS
from mgsr_nb.config import RunConfig, resolve

FIELDS = RunConfig.model_fields

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_say_only_what_differs(preset):
    c = resolve(preset=preset)
    for name, value in PRESETS[preset].items(): assert getattr(c, name) == value != FIELDS[name].default
    assert {n for n in FIELDS if getattr(c, n) != FIELDS[n].default} - {"preset"} == PRESETS[preset].keys()

def test_the_defaults_are_the_quickstart(): assert resolve() == RunConfig() == resolve(preset="quickstart")

def test_what_is_typed_wins_over_the_preset_even_when_it_is_the_general_default():
    general = FIELDS["max_steps"].default
    assert PRESETS["smollm2-dolly"]["max_steps"] == 120 != general
    assert resolve(preset="smollm2-dolly", max_steps=general).max_steps == general and resolve(preset="smollm2-dolly").max_steps == 120

def test_the_papers_preset():
    c = resolve(preset="gpt2-dolly")
    assert (c.learning_rate, c.weight_decay, c.max_grad_norm, c.max_prompt_tokens, c.max_tokens, c.eval_seed_list) == (5e-4, 0.01, 1.0, 256, 512, [10, 20, 30, 40, 50])
    assert (c.sft_weight, c.dac_weight, c.span_weight, c.lora_alpha, c.lora_dropout, c.clip, c.sub_inputs, c.scrg) == (1, 1, 1, 64, 0.1, "learned", "full", True)

@pytest.mark.parametrize("preset,teacher,student", [
    ("gpt2-dolly", "openai-community/gpt2-xl", "openai-community/gpt2"), ("opt-dolly", "facebook/opt-6.7b", "facebook/opt-1.3b"),
    ("openllama-dolly", "openlm-research/open_llama_7b_v2", "openlm-research/open_llama_3b_v2"), ("llama2-dolly", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-7b-hf")])
def test_the_papers_pairs(preset, teacher, student):
    "GPT-2 trains all weights for 20 epochs, the larger ones adapters of rank 16 for 10."
    c = resolve(preset=preset)
    assert (c.teacher, c.student, c.data, c.select, c.eval_exposure, c.eval_seed_list) == (teacher, student, "dolly", "rouge_l", True, [10, 20, 30, 40, 50])
    assert (c.lora_rank, c.max_steps) == ((0, 8400) if preset == "gpt2-dolly" else (16, 4200)) and (c.lora_alpha, c.lora_dropout, c.batch_size) == (64, 0.1, 32)
    assert c.eval_every > 0 and c.max_steps % c.eval_every == 0
