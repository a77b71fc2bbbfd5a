"""tools/gpu_check.py: compares the CPU with itself here, notices a difference, and does nothing
without CUDA."""
import importlib.util, os, subprocess, sys
from pathlib import Path
import pytest, torch
from mgsr_nb.presets import METHODS
from tiny_runs import save_pair

SCRIPT = Path(__file__).resolve().parents[1]/"tools"/"gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

@pytest.fixture
def parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    return dict(teacher=save_pair(tmp_path, "gpt2")[0], student_layers=2, max_prompt_tokens=40, shorten="beginning",
                max_tokens=100, max_new_tokens=4, max_train_examples=8, chunk_tokens=50,
                sub_top_k=8, learning_rate=1e-3)

def test_every_method_is_compared_and_the_cpu_agrees_with_itself(parameters):
    lines = []
    assert gpu_check.compare(parameters, "cpu", lines.append)
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    first, second = lines[1].split()[1:3]
    assert first.rstrip(",") != second       # the second step starts from updated weights

def test_a_device_that_computes_something_else_is_noticed(parameters, monkeypatch):
    right, lines = gpu_check.losses, []
    def wrong(p, device, precision, texts=None):
        found, used = right(p, device, precision, texts)
        return [x * (1.01 if texts and p["method"] == "kd" else 1) for x in found], used
    monkeypatch.setattr(gpu_check, "losses", wrong)
    assert not gpu_check.compare(parameters, "cpu", lines.append)
    assert [line.split()[0] for line in lines if line.endswith("!")] == ["kd"]

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so_and_does_nothing():
    line = [sys.executable, str(SCRIPT), "--quickstart", "--performance"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert "no CUDA device" in done.stdout
