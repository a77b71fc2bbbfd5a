"""tools/launch: accelerate reads the files, every value is one it knows, and, without a GPU, as much of a start as a CPU allows."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch, yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend, FullyShardedDataParallelPlugin, PrecisionType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from mgsr_nb import run as R
import mgsr_nb.run.engine
import mgsr_nb.run.setup
from mgsr_nb.config import ConfigError, RunConfig, resolve
from tiny_runs import save_pair, tiny_parameters

TESTS = Path(__file__).resolve().parent
ROOT, FOLDER = TESTS.parent, TESTS.parent/"tools/launch"
FILES = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}

def as_launched(name, monkeypatch):
    "What `accelerate launch --config_file` makes of a file: its arguments, the file's defaults, and whether the file says a precision."
    monkeypatch.chdir(ROOT)
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(FOLDER/f"{name}.yaml"), "script.py"]))

def test_every_file_is_tested(): assert {p.stem for p in FOLDER.glob("*.yaml")} == FILES.keys()

@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name, monkeypatch):
    "Its loader refuses unknown names at the top; of the options below it copies any, so they are compared with the launcher's own arguments."
    found = load_config_from_file(str(FOLDER/f"{name}.yaml"))
    assert found.distributed_type == FILES[name] and (found.mixed_precision or 'no') in PrecisionType.list() and found.num_machines == 1
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for part in (found.fsdp_config, found.deepspeed_config): assert set(part) <= known.keys()
    args, *_ = as_launched(name, monkeypatch)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(kind == FILES[name] for kind in FILES.values()) and args.num_processes == 2
    for key, value in {**found.fsdp_config, **found.deepspeed_config}.items(): assert getattr(args, key) == value

def test_an_unknown_name_would_be_noticed(tmp_path):
    for name, wrong in (("fsdp.yaml", "num_procesess: 2\n"), ("ddp.yaml", "fsdp: 1\n")):
        (tmp_path/name).write_text((FOLDER/name).read_text() + wrong)
        with pytest.raises(ValueError, match="unknown keys"): load_config_from_file(str(tmp_path/name))

def with_environment(env, monkeypatch):
    for key, value in env.items():
        if key not in os.environ or os.environ[key] != value: monkeypatch.setenv(key, value)

def test_fsdp_takes_every_value(monkeypatch):
    args, *_ = as_launched("fsdp", monkeypatch)
    with_environment(prepare_multi_gpu_env(args), monkeypatch)
    plugin = FullyShardedDataParallelPlugin()       # raises for a value that it does not know
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.transformer_cls_names_to_wrap, plugin.cpu_ram_efficient_loading) == (2, True, ["LlamaDecoderLayer"], False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "HALF_STATE_DICT")
    with pytest.raises(Exception): FullyShardedDataParallelPlugin()

def test_deepspeed_takes_every_value(monkeypatch):
    "Also that nothing of the file is refused beside a file of DeepSpeed's own, as a `mixed_precision` is."
    args, defaults, own_precision = as_launched("deepspeed", monkeypatch)
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, *["mixed_precision"] * own_precision])
    env = prepare_deepspeed_cmd_env(args)[1]
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", env["ACCELERATE_CONFIG_DS_FIELDS"])
    plugin = DeepSpeedPlugin(hf_ds_config=(file := env["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.offload_param_device) == (2, 1, "none")     # whole weights, one pass a step
    options = json.loads((ROOT/file).read_text())
    assert options["gradient_clipping"] == RunConfig.model_fields["max_grad_norm"].default
    # without a loader accelerate takes a number here and no "auto"
    assert isinstance(options["train_micro_batch_size_per_gpu"], int) and options["zero_optimization"]["stage"] == 2

def launch(name, *more):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1", "MGSR_CACHE": str(Path(more[-1])/"cache")}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"): env.pop(key, None)
    return subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER/f"{name}.yaml"), *map(str, more)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)

def test_ddp_starts_two_processes(tmp_path):
    script = tmp_path/"script.py"
    script.write_text("from accelerate import Accelerator\na = Accelerator(cpu=True)\nopen(f'{__file__}.{a.process_index}', 'w').write(f'{a.num_processes} {a.distributed_type}')")
    done = launch("ddp", script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [Path(f"{script}.{i}").read_text() for i in (0, 1)] == ["2 DistributedType.MULTI_CPU"] * 2

@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_launcher_says_so(tmp_path):
    done = launch("deepspeed", tmp_path/"script.py", tmp_path)
    assert done.returncode != 0 and "DeepSpeed is not installed" in done.stderr

@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_2_trains_as_ddp_does_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    "On two CPU processes: off-policy, with samples, SCRG, validations, the best weights, and checkpoints."
    teacher = save_pair(tmp_path/"pair", "gpt2")[0]
    common = dict(student_layers=2, method="mgsr_off_policy", threshold_start=0.8, buffer_size=5, max_steps=6, checkpoint_every=2, eval_every=2, select="nll", spans="fixed", span_length=2)
    parameters = tiny_parameters(tmp_path/"runs", teacher, **common)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, cases in (("deepspeed", [("zero", parameters, 0), ("again", parameters, 5), ("again", parameters, 0)]), ("ddp", [("ddp", parameters, 0)])):
        (tmp_path/"cases.json").write_text(json.dumps(cases))
        done = launch(name, TESTS/"deepspeed_runs.py", tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path/"kind-1").read_text() == {"deepspeed": "DistributedType.DEEPSPEED", "ddp": "DistributedType.MULTI_CPU"}[name]
    logs = {name: pd.read_csv(tmp_path/"runs"/name/"log.csv").filter(regex="^(?!seconds)") for name in ("ddp", "zero", "again")}
    weights = {name: load_file(tmp_path/"runs"/name/"student"/"model.safetensors") for name in logs}
    pd.testing.assert_frame_equal(logs["zero"], logs["again"], check_exact=True)
    pd.testing.assert_frame_equal(logs["ddp"], logs["zero"], rtol=1e-4, atol=1e-5)
    for name, w in weights["ddp"].items():
        assert torch.equal(weights["zero"][name], weights["again"][name])
        torch.testing.assert_close(w, weights["zero"][name], rtol=0, atol=1e-5)

@pytest.mark.parametrize("method", ["sft", "mgsr"])
def test_an_update_by_fsdp_is_that_of_ddp_and_what_is_outside_of_it_cannot_be_done(tmp_path, method):
    "What fsdp.yaml says of itself, on two CPU processes: on text of the data, since samples are drawn outside of the pass. If validation works one day, the file's words have to change."
    more = dict(sampling="fixed", scrg=False, spans="fixed", span_length=2, mask_temperature=0.1) if method == "mgsr" else dict(span_weight=1., dac_weight=0.5)
    (tmp_path/"parameters.json").write_text(json.dumps(tiny_parameters(tmp_path/"runs", save_pair(tmp_path/"pair", "llama")[0], method=method, **more)))
    done = launch("fsdp", TESTS/"launch_runs.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path/f"{rank}.json").read_text())
        ddp, fsdp = found["ddp"], found["fsdp"]
        assert (ddp["type"], fsdp["type"], ddp["split"]) == ("DistributedType.MULTI_CPU", "DistributedType.FSDP", 0) and fsdp["split"] > 20
        for a, b in zip(ddp["rows"], fsdp["rows"], strict=True): assert a == pytest.approx(b, rel=1e-5)
        assert "validation_nll" in ddp["validation"] and "mixed torch.Tensor and DTensor" in fsdp["validation"]

@pytest.mark.parametrize("env,more,said", [
    (dict(ACCELERATE_USE_FSDP="true"), {}, "^accelerate: FSDP .* allowed: "), (dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3"), {}, "^accelerate: ZeRO 3 .* allowed: "),
    (dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(FOLDER/"zero2.json")), dict(micro_batch_size=2), "^micro_batch_size: "),
], ids=["fsdp", "zero3", "micro"])
def test_a_launcher_that_splits_the_student_is_refused_before_anything_loads(env, more, said, monkeypatch):
    for key, value in env.items(): monkeypatch.setenv(key, value)
    monkeypatch.setattr(R.engine, "model_path", lambda name: pytest.fail("looked for a model"))
    with pytest.raises(ConfigError, match=said): R.setup.prepare(resolve(**more), cpu=True)

def test_zero_2_and_ddp_are_not_refused(monkeypatch):
    R.engine.check_launcher(resolve(micro_batch_size=2))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true"); monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(FOLDER/"zero2.json"))
    R.engine.check_launcher(resolve())
