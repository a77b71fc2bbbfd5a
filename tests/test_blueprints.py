"Facts, counts, conventions and tiny models: no hub, no weights."
import re, urllib.error, urllib.request
import pytest
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from mgsr_nb import models
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.presets import PRESETS
from mgsr_nb.lab import lab_sizes
from mgsr_nb.run import blueprints
from mgsr_nb.run.blueprints import (
    ARCHITECTURES, Conventions, architecture, blueprint, conventions, count, tiny, tiny_tokenizer)
from mgsr_nb.tokens import bos_ids, collate

KNOWN = {"openai-community/gpt2": 124.4, "openai-community/gpt2-xl": 1557.6,
         "facebook/opt-1.3b": 1315.8, "facebook/opt-6.7b": 6658.5,
         "openlm-research/open_llama_3b_v2": 3426.5, "openlm-research/open_llama_7b_v2": 6738.4,
         "meta-llama/Llama-2-7b-hf": 6738.4, "meta-llama/Llama-2-13b-hf": 13015.9,
         "Qwen/Qwen2.5-0.5B-Instruct": 494.0, "Qwen/Qwen2.5-1.5B-Instruct": 1543.7}   # millions
IDS = dict(bos_token_id=None, eos_token_id=0, pad_token_id=None)

# --- where the facts come from

def test_every_model_of_the_presets_is_in_the_table():
    named = {p[who] for p in PRESETS.values() for who in ("teacher", "student") if who in p}
    named |= {resolve().teacher}
    assert {n for n in named if not lab_sizes(n)} - {"truncate"} <= set(ARCHITECTURES) == set(KNOWN) | {models.BUILTIN}
    assert all(conventions(name, "teacher") for name in ARCHITECTURES)

@pytest.fixture
def hub(monkeypatch):
    "`hub(answer)`: `answer` is what the hub does when it is asked; all that was looked for."
    wanted = []
    def load(name, **kw):
        wanted.append(kw)
        if kw.get("local_files_only"): raise OSError("not in the cache")
        return "the configuration"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(blueprints.AutoConfig, "from_pretrained", load)
    def answers(answer):
        monkeypatch.setattr(urllib.request, "urlopen", answer)
        return wanted
    return answers

def test_a_hub_that_does_not_answer_is_asked_once(hub, tmp_path):
    asked = []
    def silent(request, timeout):
        asked.append(timeout)
        raise OSError
    wanted = hub(silent)
    with pytest.raises(ConfigError, match="^student: cannot load 'some/model'"):
        architecture("some/model", "student", tmp_path)
    assert asked == [5] and wanted == [dict(local_files_only=True)]

def refuses(request, timeout): raise urllib.error.HTTPError("", 403, "", {}, None)

@pytest.mark.parametrize("answer", [refuses, lambda request, timeout: None])
def test_a_hub_that_answers_is_asked_for_the_configuration_only(hub, tmp_path, answer):
    wanted = hub(answer)
    assert architecture("some/model", "student", tmp_path) == "the configuration"
    assert wanted == [dict(local_files_only=True), dict(cache_dir=tmp_path)]

@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_the_conventions_of_a_local_model_are_those_of_its_tokenizer(local_models, kind):
    teacher, _ = local_models[kind]
    c, tokenizer = conventions(teacher, "teacher"), AutoTokenizer.from_pretrained(teacher)
    assert (c.begins == "<s>") == (kind != "gpt2") and not c.chat
    assert c.pads == (tokenizer.pad_token is not None and kind != "gpt2")

# --- the real sizes and the tiny models

@pytest.mark.parametrize("name", KNOWN)
def test_the_parameters_are_those_that_the_authors_count(name):
    whole = blueprint(architecture(name))
    assert count(whole) / 1e6 == pytest.approx(KNOWN[name], abs=0.05)
    assert all(p.is_meta for p in whole.parameters())

def layer_names(model): return {re.sub(r"\.\d+\.", ".N.", n) for n, _ in model.named_parameters()}

def tied(model): return model.get_output_embeddings().weight is model.get_input_embeddings().weight

def sharing(c):
    "Query heads on one key."
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return c.num_attention_heads // kv_heads

@pytest.mark.parametrize("name", KNOWN)
def test_a_tiny_model_has_the_architecture_of_the_real_one(name):
    big = architecture(name)
    small = tiny(big, 8, 2, 258, **IDS)
    model, whole = AutoModelForCausalLM.from_config(small), blueprint(big)
    assert type(model) is type(whole) and layer_names(model) == layer_names(whole)
    assert tied(model) == tied(whole) == (not name.startswith(("meta", "openlm")))
    assert small.max_position_embeddings == big.max_position_embeddings
    shared = {"Qwen/Qwen2.5-0.5B-Instruct": 7, "Qwen/Qwen2.5-1.5B-Instruct": 6}.get(name, 1)
    assert sharing(small) == sharing(big) == shared
    weights = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(w for n, w in weights.items() if not re.search("wpe|positions", n)) < 150_000
    batch = collate([([1, 2, 3], [4])], 0)
    assert model(input_ids=batch.input_ids).logits.shape == (1, 4, 258)

def test_a_projected_embedding_stays_one():
    "OPT-350m has embeddings of half the width; the facts are its own."
    big = AutoConfig.for_model(
        "opt", hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=50272, max_position_embeddings=2048,
        do_layer_norm_before=False)
    small = tiny(big, 8, 2, 258, **IDS)
    assert (small.hidden_size, small.word_embed_proj_dim) == (32, 16)
    assert not small.do_layer_norm_before

KINDS = [Conventions("a"), Conventions("b", "<s>"), Conventions("c", "</s>", pads=True),
         Conventions("d", pads=True, chat=True)]

@pytest.mark.parametrize("c", KINDS, ids=lambda c: c.name)
def test_the_tokenizer_of_bytes_follows_the_conventions(c, tmp_path):
    tiny_tokenizer(c).save_pretrained(tmp_path)
    t, text = AutoTokenizer.from_pretrained(tmp_path), "Zwölf ½ 日本 🙂\n### Response:"
    ids = t(text).input_ids
    assert t.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(text.encode()) + bool(c.begins)
    assert bos_ids(t) == ([t.convert_tokens_to_ids(c.begins)] if c.begins else [])
    assert bool(t.chat_template) == c.chat and (t.pad_token_id is not None) == c.pads
    assert t.eos_token_id is not None and t.pad_token_id != t.eos_token_id
