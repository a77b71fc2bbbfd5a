"""tools/gpu_programme.py, rehearsed on a CPU: killed and resumed, tasks that fail, kill their process or do not fit, and what it brings home."""
import json, os, signal, subprocess, sys, tarfile, time
from pathlib import Path
import pytest, torch

TOOLS = Path(__file__).resolve().parents[1]/"tools"
sys.path.insert(0, str(TOOLS))
import gpu_programme, gpu_tasks
from gpu_programme import Deadline, Results
from mgsr_nb.presets import METHODS

def lines(out): return Results(out/"results.jsonl").lines

def of(out, key): return [x["task"] for x in lines(out) if key in x]

def options(out, *words): return gpu_programme.options(["--dry", "--out", str(out), *words])

def start(out, cache, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MGSR_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, str(TOOLS/"gpu_programme.py"), "--dry", "--out", str(out), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def wait_for(condition, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(.05)

def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False

def children(pid): return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t/"children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_killed_and_resumed(tmp_path, shared_cache):
    "What was there stays, what was under way is done again, nothing twice, and no process is left over; then the cells of a suite; what comes home holds no weights."
    out, pack = tmp_path/"gpu", tmp_path/"home.tar.gz"
    words = ("--parts", "bd", "--pack", str(pack))
    first = start(out, shared_cache, *words)
    wait_for(lambda: len(of(out, "result")) >= 2)
    workers = children(first.pid)
    first.kill()
    first.wait()
    before = lines(out)
    assert workers and "d" not in {x["part"] for x in before}
    wait_for(lambda: not any(map(alive, workers)), 20)
    second = start(out, shared_cache, *words)
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said
    found = lines(out)
    assert found[:len(before)] == before and not of(out, "error"), said
    cells = [f"fixed_clipping/{c}/seed0" for c in ("no_clip", "learned")]
    assert sorted(of(out, "result")) == sorted(["decoding", "profile", "steps", "large batch", "pair", *cells])
    assert all(x["seconds"] >= 0 and (x["part"] == "d" or x["estimate"] > 0) for x in found)
    [decoding] = [x["result"] for x in found if x["task"] == "decoding"]
    assert decoding["texts_equal"] == 1 and decoding["goal_ms_per_token"]["at_most"] == 1.5
    cell = next(x["result"] for x in found if x["task"] == cells[0])
    assert cell.keys() == {"student_start", "student", "teacher"} and cell["student"] != cell["student_start"]
    with tarfile.open(pack) as archive: names = archive.getnames()
    assert "gpu/results.jsonl" in names and {n.split("/")[-1] for n in names} >= {"metrics.json", "log.csv", "samples.jsonl"}
    assert not [n for n in names if "safetensors" in n or n.endswith((".bin", ".pt", ".pkl"))]
    third = start(out, shared_cache, *words)
    third.communicate(timeout=200)
    assert lines(out) == found


@pytest.fixture
def tasks(monkeypatch):
    "Three tasks of the test's own, in the worker's process too: a file that it imports."
    def use(**functions):
        made = {n: gpu_tasks.Task(n, "a", s, f) for n, (s, f) in functions.items()}
        monkeypatch.setattr(gpu_tasks, "tasks", lambda o: made)
        return list(made)
    return use

def test_a_task_that_fails_does_not_stop_the_others(tmp_path, tasks):
    def broken(): raise ValueError("no such card")
    names = tasks(good=(1, lambda: {"x": 1}), bad=(1, broken), last=(1, lambda: {"x": 2}))
    o = options(tmp_path)
    for turn in range(2): gpu_programme.work(o, names[turn:2] if turn else names, Deadline(1))
    assert of(tmp_path, "result") == ["good", "last"] and of(tmp_path, "error") == ["bad", "bad"]
    assert "no such card" in lines(tmp_path)[1]["error"]
    assert Results(tmp_path/"results.jsonl").given_up() == {"bad"}

def test_what_does_not_fit_is_skipped_and_said(tmp_path, tasks, capsys):
    names = tasks(long=(1000, lambda: {}), short=(1, lambda: {"x": 1}))
    gpu_programme.work(options(tmp_path), names, Deadline(1))
    assert of(tmp_path, "skipped") == ["long"] and of(tmp_path, "result") == ["short"]
    assert "skipped: takes about 1000 s, and" in capsys.readouterr().out
    assert Results(tmp_path/"results.jsonl").done() == {"short"}       # the long one is tried again next time

def test_a_worker_that_dies_takes_one_task_with_it(tmp_path, monkeypatch):
    "The others are done by the next one."
    code = ("import json, sys; sys.path.insert(0, %r); import gpu_tasks, gpu_programme, os\n"
            "made = {n: gpu_tasks.Task(n, 'a', 1, (lambda: os._exit(11)) if n == 'fatal' else (lambda: {'x': 1})) for n in ('one', 'fatal', 'two')}\n"
            "gpu_tasks.tasks = lambda o: made\n"
            "sys.modules['gpu_programme'] = gpu_programme\n"
            "sys.exit(gpu_programme.main())") % str(TOOLS)
    right = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: right([sys.executable, "-c", code, "--worker"], **kw))
    o = options(tmp_path)
    o.out.mkdir(exist_ok=True)
    gpu_programme.workers(o, ["one", "fatal", "two"], Deadline(2))
    assert of(tmp_path, "result") == ["one", "two"] and of(tmp_path, "error") == ["fatal"]
    assert "status 11" in next(x["error"] for x in lines(tmp_path) if "error" in x)

def test_a_line_that_was_cut_off_costs_only_itself(tmp_path):
    results = Results(tmp_path/"results.jsonl")
    results.add(task="a", part="a", result={})
    with open(results.path, "a") as f: f.write('{"task": "b", "resu')
    results.add(task="c", part="a", result={})
    assert [x["task"] for x in results.lines] == ["a", "c"]

def test_cells_start_only_if_they_end_in_time(tmp_path, monkeypatch, capsys):
    "All that are left get a line; seconds of finished cells count, of as many at a time."
    o = options(tmp_path, "--minutes", "1")
    results = Results(o.out/"results.jsonl")
    for jobs, seconds in ((2, 500.), (4, 1.)): results.add(task=f"x{jobs}", part="d", seconds=seconds, jobs=jobs, result={})
    sweep, engine = gpu_programme.make_sweep(o, results, Deadline(1))
    sweep.run()
    assert of(tmp_path, "skipped") == ["fixed_clipping/no_clip/seed0", "fixed_clipping/learned/seed0"]
    assert "takes about 500 s" in capsys.readouterr().out

def test_the_order_of_the_cells(monkeypatch):
    "All suites with one seed before the next seed; the readings of the clip first, then the baselines."
    o = gpu_programme.options([])
    names = [j.name for j in gpu_programme.jobs(o)]
    third = len(names) // 3
    assert [n.rsplit("/", 1)[1] for n in names] == ["seed0"] * third + ["seed1"] * third + ["seed2"] * third
    assert names[:9] == [f"fixed_clipping/{c}/seed0" for c in ("no_clip", "learned", "learned_mass", "fixed_quantile_mass")] + [f"baselines/{c}/seed0" for c in ("sft", "kd", "distillm", "minillm", "mgsr")]
    assert names[9].startswith("components/") and names[third - 1].startswith("loss_weights/")
    assert all(j.params["preset"] == "smollm2-gpu" and not j.params["save_student"] for j in gpu_programme.jobs(o))

def test_the_plan_says_what_fits(tmp_path):
    o = gpu_programme.options(["--out", str(tmp_path), "--minutes", "5", "--data-dir", ""])
    names = list(gpu_tasks.tasks(o))
    rows = gpu_programme.plan(o, names, Deadline(5))
    assert len(rows) == len(names) + 1 and "perhaps not" in rows[-2] and "perhaps not" not in rows[0]
    assert "a cell, 4 at a time on one device" in rows[-1]
    known = gpu_tasks.tasks(o)
    needed = [known[n].part for n in names if not known[n].spare]
    assert needed == sorted(needed) and names[-1] == "pair"
    assert {n.removeprefix("losses ") for n in names if n.startswith("losses ")} == set(METHODS)

def test_spare_tasks_leave_the_suites_their_time(tmp_path, tasks):
    "They run only if what is left is enough for the suites too; without suites, always."
    names = tasks(one=(1, lambda: {}), two=(1, lambda: {}))
    gpu_tasks.tasks(None)["two"].spare = True
    o = options(tmp_path)
    o.dry = False
    gpu_programme.work(o, names, Deadline(2))
    o.parts = "ab"
    gpu_programme.work(o, names[1:], Deadline(2))
    assert [(x["task"], "result" in x) for x in lines(tmp_path)] == [("one", True), ("two", False), ("two", True)]
    assert "300 of them for the suites" in lines(tmp_path)[1]["skipped"]

def test_goals_are_met_or_not(): assert [gpu_tasks.goal(x, 2.)["met"] for x in (1., 2., 3., None)] == [True, True, False, None]

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, str(TOOLS/"gpu_programme.py"), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry" in done.stdout and not list(tmp_path.iterdir())
