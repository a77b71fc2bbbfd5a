"""SIGKILL at random moments: a run that is killed, started again, killed again, and ends, ends with every bit of the run that nothing happened to (`make test-slow`)."""
import csv, json, math, multiprocessing, random, signal
from pathlib import Path
import pytest, torch
import kill_runs
from tiny_runs import plain, save_pair, tiny_parameters

pytestmark = pytest.mark.slow
SEED, KILLS = 0, 7      # kills of each method
COMMON = dict(student_layers=2, max_steps=7, batch_size=3, max_new_tokens=6, eval_every=2, checkpoint_every=2, warmup_steps=1, spans="fixed", span_length=2, save_samples=1)
METHODS = {"sft": dict(method="sft"), "on_policy": dict(method="mgsr", select="nll", scrg_corrections=2),
           "off_policy": dict(method="mgsr_off_policy", threshold_start=0.8, buffer_size=5, select="kl")}

class Runs:
    "Starts runs in processes forked from one that has imported the library; GPT-2, since it has dropout."
    def __init__(self, folder: Path, method: str):
        self.folder, self.context = folder, multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["kill_runs"])
        self.parameters = tiny_parameters(folder/"runs", save_pair(folder/"pair", "gpt2")[0], **COMMON, **METHODS[method])

    def start(self, name: str, cache: str = "cache", target=None) -> int:
        "Exit status of the run; -9 if it was killed."
        process = self.context.Process(target=kill_runs.child, args=({**self.parameters, "run_name": name}, str(self.folder/cache), str(self.folder/f"{name}.pt"), str(self.folder/f"{name}.json"), target))
        process.start(); process.join(120)
        return process.exitcode

    def found(self, name): return json.loads((self.folder/f"{name}.json").read_text())

    def result(self, name: str) -> dict:
        "All that a run leaves, times excepted."
        run = self.folder/"runs"/name
        metrics = json.loads((run/"metrics.json").read_text())
        config = json.loads((run/"config.json").read_text())
        for record in (metrics, metrics["config"], config): record.pop("seconds", None), record.pop("run_name", None)
        with open(run/"log.csv") as f: log = plain(csv.DictReader(f))
        files = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.suffix != ".csv" and p.name not in ("metrics.json", "config.json")}
        return {"metrics": metrics, "config": config, "log": log, "files": files, "state": torch.load(self.folder/f"{name}.pt", weights_only=False)}

def differences(a, b, where="") -> list[str]:
    "Where two nested results differ, bit for bit."
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys(): return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b): return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else type(a) is type(b) and a == b
    return [] if same else [where]

def moment(rng: random.Random, place: str, whole: dict, first: bool):
    "A random moment at a place: which call of it, and how long after its beginning, up to its length. A run that was resumed gets to fewer calls."
    calls = whole["counts"][place]
    call = rng.randint(1, calls if first else max(1, calls // 3))
    return place, call, rng.choice([0., rng.random()]) * whole["seconds"][place] / calls if place not in ("anywhere", "writing") else (rng.uniform(0.2, 0.9) * whole["seconds"][place] if place == "anywhere" else 0.)

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("method", METHODS)
def test_pitfall_32_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, method, figure):
    rng, runs = random.Random(f"{SEED}/{method}"), Runs(tmp_path, method)
    assert runs.start("whole") == 0
    whole, expected = runs.found("whole"), runs.result("whole")
    places, survived, died, chain = [], 0, [], 0
    while len(died) < KILLS:
        name, cache, kills = f"chain{chain}", "cache" if chain else "another cache", 0    # the first one also has a teacher to tune
        for first in (True, False):
            if not places: places = rng.sample(sorted(p for p in kill_runs.PLACES if p in whole["counts"]), k=len(whole["counts"]))
            target = moment(rng, places.pop(), whole, first)
            status = runs.start(name, cache, target)
            assert status in (0, -signal.SIGKILL), (status, target)
            if status == 0: break
            died.append(target); kills += 1
        if status != 0: assert runs.start(name, cache) == 0, died
        different = differences(runs.result(name), expected)
        assert not different, (died[len(died) - kills:], different[:5])
        survived, chain = survived + kills, chain + 1
    moments = ", ".join(f"{place} {call} +{1000 * delay:.0f} ms" for place, call, delay in died)
    figure("killed", f"{method}: {survived} kills of {len(died)} survived bit for bit, in {chain} runs ({moments})")
    assert survived == len(died) >= KILLS and len({place for place, *_ in died}) >= 4
