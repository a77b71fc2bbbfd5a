"""Checkpoints: what is damaged is not used, nothing old goes before the new is safe, a full disk loses nothing; and validations that are no numbers."""
import errno, math, os, resource, signal, warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
import pytest, torch
from tiny_runs import Interrupted, interrupt_at, plain, state
from mgsr_nb import run as R
import mgsr_nb.run.checkpoints
import mgsr_nb.run.parts
from mgsr_nb.files import write_atomic
from mgsr_nb.run.folder import finished, open_run
from mgsr_nb.run.engine import TrainingError
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.checkpoints import damage
from mgsr_nb.run.trainer import Trainer
from mgsr_nb.run.results import run

KIND = "gpt2"
SHORT = dict(method="sft", max_steps=5, checkpoint_every=1, run_name="x")

@pytest.fixture
def start(config, loaded):
    "`start(**parameters)`: a trainer with a folder; data and teacher are loaded once, the student is a fresh copy."
    def make(**more):
        c = config(**{**SHORT, **more})
        if "setup" not in loaded: loaded["setup"] = prepare(c, cpu=True)
        setup = replace(loaded["setup"], config=c, student=deepcopy(loaded["setup"].student))
        return Trainer(setup, open_run(c))
    return make

def steps(t): return [int(p.name.removeprefix("step-")) for p in sorted((t.folder/"checkpoints").iterdir())]

def cut(path): path.write_bytes(path.read_bytes()[:-1])
def flip(path): path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
DAMAGE = {"cut": lambda f: cut(f/"model.safetensors"), "flipped": lambda f: flip(f/"optimizer.bin"), "lost": lambda f: (f/"custom_checkpoint_1.pkl").unlink(),
          "no digests": lambda f: (f/"digests.json").unlink(), "half of the digests": lambda f: (f/"digests.json").write_bytes((f/"digests.json").read_bytes()[:99]), "only begun": lambda f: [p.unlink() for p in f.iterdir() if p.name != "model.safetensors"]}

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("how", DAMAGE)
def test_pitfall_32_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(start, how):
    whole = start(run_name="whole")
    whole.fit()
    first = start()
    with pytest.raises(Interrupted): first.fit(interrupt_at(4))
    assert steps(first) == [2, 3] and not damage(first.folder/"checkpoints/step-000003")
    DAMAGE[how](first.folder/"checkpoints/step-000003")
    second = start()
    with pytest.warns(UserWarning, match="step-000003 is damaged .*not used"): assert second.checkpoints.resume() == 2
    second.fit()
    assert all(torch.equal(v, state(whole.distiller)[n]) for n, v in state(second.distiller).items()) and plain(second.progress.log) == plain(whole.progress.log)

def test_with_no_whole_checkpoint_it_begins_again(start):
    first = start()
    with pytest.raises(Interrupted): first.fit(interrupt_at(4))
    for step in (2, 3): flip(first.folder/f"checkpoints/step-00000{step}/model.safetensors")
    with pytest.warns(UserWarning) as said: assert start().checkpoints.resume() == 0
    assert len([w for w in said if "model.safetensors is not what was written" in str(w.message)]) == 2

def test_an_intact_checkpoint_warns_of_nothing(start):
    first = start()
    with pytest.raises(Interrupted): first.fit(interrupt_at(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start().checkpoints.resume() == 2

def test_old_checkpoints_go_only_when_the_new_one_was_read_back(start, monkeypatch):
    t = start()
    with pytest.raises(Interrupted): t.fit(interrupt_at(4))
    rename = R.checkpoints.os.replace
    def lossy(part, whole):
        rename(part, whole)
        if "step-" in str(whole): cut(whole/"optimizer.bin")
    monkeypatch.setattr(R.checkpoints.os, "replace", lossy)
    with pytest.raises(TrainingError, match="step 4: no checkpoint could be written .*optimizer.bin is not what was written.*step-000002, step-000003"): t.checkpoints.save()
    assert steps(t) == [2, 3, 4]
    with pytest.warns(UserWarning, match="step-000004 is damaged"): assert start().checkpoints.resume() == 3

@pytest.fixture
def small_disk():
    "`small_disk(n)`: from now on no file of this process can be longer than n bytes; the system refuses the rest of it, as it does on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)

@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_full_disk_ends_the_run_in_words_and_leaves_what_was_there(start, small_disk, file):
    "It is full before the end of the weights, or of the optimiser's state; safetensors writes the one, torch the other."
    t = start()
    with pytest.raises(Interrupted): t.fit(interrupt_at(4))
    size = (t.folder/"checkpoints/step-000003"/file).stat().st_size
    small_disk(size - 10)
    try:
        with pytest.raises(TrainingError, match=r"^step 4: no checkpoint could be written to .*checkpoints \(.*\). Checkpoints that are there: step-000002, step-000003. Make room"): t.checkpoints.save()
    finally: small_disk(resource.RLIM_INFINITY)
    assert steps(t) == [2, 3] and start().checkpoints.resume() == 3

@pytest.mark.parametrize("file", ["optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"])
def test_a_file_that_torch_did_not_finish_is_noticed(start, monkeypatch, file):
    "As torch 2.6 leaves it on a full disk, without an error."
    t = start()
    with pytest.raises(Interrupted): t.fit(interrupt_at(4))
    def cut(part, save=t.accelerator.save_state):
        save(part)
        os.truncate(Path(part)/file, (Path(part)/file).stat().st_size - 10)
    monkeypatch.setattr(t.accelerator, "save_state", cut)
    with pytest.raises(TrainingError, match=f"^step 4: no checkpoint could be written to .*not written to the end: {file}"): t.checkpoints.save()
    assert steps(t) == [2, 3] and start().checkpoints.resume() == 3

def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, small_disk):
    write_atomic(tmp_path/"log.csv", "old")
    small_disk(1000)
    try:
        with pytest.raises(OSError) as e: write_atomic(tmp_path/"log.csv", "new" * 1000)
    finally: small_disk(resource.RLIM_INFINITY)
    assert e.value.errno == errno.EFBIG and str(tmp_path/"log.csv") in str(e.value) and [p.name for p in tmp_path.iterdir()] == ["log.csv"] and (tmp_path/"log.csv").read_text() == "old"

def test_what_a_killed_run_left_behind_goes_at_its_end(config, tmp_path):
    c = config(**{**SHORT, "max_steps": 2})
    folder = open_run(c)
    (folder/".log.csv.123.part").write_text("half"); (folder/"student.part").mkdir()
    metrics = run(c, cpu=True)
    whole = ["config.json", "log.csv", "metrics.json", "samples.jsonl", "student"]
    assert sorted(p.name for p in folder.iterdir()) == whole
    (folder/"checkpoints/step-000001").mkdir(parents=True); (folder/"best").mkdir()       # killed between the last file and the cleaning
    assert run(c, cpu=True) == metrics and sorted(p.name for p in folder.iterdir()) == whole

def test_in_memory_no_checkpoint_is_asked_for(start):
    t = start()
    t.folder = None
    assert [r["step"] for r in t.fit()] == list(range(6))

# --- validations

@pytest.mark.parametrize("metric", ["nll", "rouge_l"])
def test_nan_is_never_the_best(start, metric):
    t = start(select=metric, eval_every=1, run_name=metric)
    t.folder = t.best.folder = None
    said = []
    for step, value in enumerate([math.nan, 3., math.nan, 2., math.nan, 4., math.nan]):
        t.progress.step = step
        t.keep_best({f"validation_{metric}": value})
        said.append(t.progress.best and t.progress.best[0])
    assert said == ([None, 1, 1, 3, 3, 3, 3] if metric == "nll" else [None, 1, 1, 1, 1, 5, 5])

@pytest.mark.parametrize("at,value", [(0, math.nan), (2, math.nan), (4, math.inf)])
def test_a_validation_that_is_no_number_ends_the_run_with_its_step_and_keeps_the_last_checkpoint(start, at, value):
    t = start(select="kl", eval_every=2)
    t.setup.validated = lambda model: {"nll": 1., "kl": value if t.progress.step == at else 1.}
    with pytest.raises(TrainingError, match=f"^step {at}: validation_kl not finite.*learning_rate"): t.fit()
    assert not finished(t.folder) and start(select="kl", eval_every=2).checkpoints.resume() == max(at - 1, 0)

def test_a_teacher_whose_fine_tuning_diverges_is_refused_with_the_step(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own"))
    forward = R.parts.NLL.forward
    calls = []
    monkeypatch.setattr(R.parts.NLL, "forward", lambda self, rows: (calls.append(1), (forward(self, rows)[0] * (math.inf if len(calls) > 1 else 1), {}))[1])
    with pytest.raises(TrainingError, match="^step [12]: the loss of teacher SFT not finite"): prepare(config(**SHORT, teacher_sft_steps=2), cpu=True)
    assert not list((tmp_path/"own").glob("teachers/*/key.json"))

def test_when_things_are_written_changes_nothing_that_is_computed(config, tmp_path):
    "Checkpoints after every step, and a log of every second one: the student and its scores to the last bit."
    usual, other = (run(config("gpt2", run_name=name, max_steps=4, eval_every=2, select="nll", **more), cpu=True) for name, more in (("usual", {}), ("other", dict(checkpoint_every=1, log_every=2))))
    weights = [(tmp_path/"runs"/name/"student"/"model.safetensors").read_bytes() for name in ("usual", "other")]
    assert weights[0] == weights[1] and usual["student"] == other["student"] and usual["digest"] == other["digest"]
