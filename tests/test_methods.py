"The methods by name: compositions of the same parts, which differ only in what defines them; the off-policy schedule; teacher-written data."
import pandas as pd
import pytest
import torch
from mgsr_nb.presets import METHODS, PRESETS
from mgsr_nb.config import resolve
from mgsr_nb.run.folder import run_name
from mgsr_nb.sampling import OffPolicy, OnPolicy
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer
from tiny_runs import save_pair, tiny_parameters

OFF_POLICY = [name for name, p in METHODS.items() if p.get("sampling") == "off_policy"]
DEFINING = {"dac_weight", "span_weight", "kd_weight", "kd_loss", "jsd_beta", "pg_weight", "teacher_mix", "skd_top_k", "teacher_classes", "reward_weight", "data_kd_weight", "data_kd_loss", "scrg", "sampling", "responses"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory): return save_pair(tmp_path_factory.mktemp("pair"), "gpt2")[0]

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("MGSR_CACHE", str(tmp_path_factory.getbasetemp()/"method_cache"))

def tiny(tmp_path, teacher, method, **more):
    start = dict(threshold_start=0.9, buffer_size=4) if method in OFF_POLICY else {}
    return resolve(tiny_parameters(tmp_path, teacher, method=method, **{**start, **more}))


@pytest.mark.pitfall(35)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_methods_differ_from_ours_only_in_the_parameters_that_define_them(preset, method):
    ours, theirs = resolve(preset=preset).model_dump(), resolve(preset=preset, method=method).model_dump()
    differs = {k for k in ours if ours[k] != theirs[k]} - {"method"}
    assert differs <= DEFINING
    assert theirs["sft_weight"] == 1.0

@pytest.mark.pitfall(34)
def test_seqkd_is_nll_on_teacher_text_and_nothing_else():
    config = resolve(method="seqkd")
    assert not config.distils and config.responses == "teacher" and config.sampling == "fixed"
    assert resolve(method="seqkd_kd").kd_weight == 1.0

def test_names_and_digests_keep_methods_apart_and_an_explicit_value_wins():
    configs = [resolve(method=m) for m in METHODS]
    assert len({c.digest for c in configs}) == len({run_name(c) for c in configs}) == len(METHODS)
    assert run_name(resolve(method="gkd", seed=3)) == "gkd,seed=3"
    assert resolve(method="gkd", jsd_beta=0.1).jsd_beta == 0.1
    assert resolve(method="mgsr").digest == resolve().digest

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_two_finite_steps_and_moves_only_the_student(method, tmp_path, teacher):
    config = tiny(tmp_path, teacher, method)
    setup = prepare(config, cpu=True)
    trainer = Trainer(setup)
    before = {n: p.detach().clone() for n, p in trainer.distiller.named_parameters()}
    frozen = [p.clone() for p in setup.teacher.parameters()]
    log = pd.DataFrame(trainer.fit())
    assert all(torch.equal(a, b) for a, b in zip(frozen, setup.teacher.parameters()))
    still = [n for n, p in trainer.distiller.named_parameters() if torch.equal(before[n], p)]
    assert not still
    assert log.loss[1:].notna().all() and set(trainer.distiller.objective.terms) == {t for t in ("sft", "dac", "span", "kd", "pg", "reward", "data_kd") if getattr(config, f"{t}_weight") > 0}

def test_only_methods_that_sample_pay_for_sampling(tmp_path, teacher, monkeypatch):
    from mgsr_nb import run as R
    import mgsr_nb.run.parts
    import mgsr_nb.run.setup
    def forbidden(*args, **kwargs): raise AssertionError("sampled")
    config = tiny(tmp_path, teacher, "kd")
    setup = prepare(config, cpu=True)
    monkeypatch.setattr(R.parts.OnPolicy, "__call__", forbidden)
    Trainer(setup).fit()
    with pytest.raises(AssertionError, match="sampled"): Trainer(prepare(tiny(tmp_path, teacher, "gkd", mixed_fraction=1.0), cpu=True)).fit()

def test_teacher_text_replaces_the_responses_that_are_visited_and_is_made_once(tmp_path, teacher, monkeypatch):
    from mgsr_nb import run as R
    truth = prepare(tiny(tmp_path, teacher, "sft", max_steps=1), cpu=True)
    setup = prepare(tiny(tmp_path, teacher, "seqkd", max_steps=1), cpu=True)
    changed = [i for i, (a, b) in enumerate(zip(truth.train, setup.train)) if a.response_ids != b.response_ids]
    assert 1 <= len(changed) <= setup.config.batch_size < len(setup.train)
    assert all(a.prompt_ids == b.prompt_ids for a, b in zip(truth.train, setup.train))
    assert all(len(setup.train[i].response_ids) <= setup.config.max_new_tokens for i in changed)
    monkeypatch.setattr(R.setup.Setup, "sampler", lambda *args: pytest.fail("written again"))
    again = prepare(tiny(tmp_path, teacher, "seqkd", max_steps=1), cpu=True)
    assert [e.response_ids for e in again.train] == [e.response_ids for e in setup.train]


def schedule(threshold, steps, batch_size=2, capacity=6, max_steps=100):
    "What an off-policy source chooses in each step when each writing step adds `batch_size` texts."
    off, story = OffPolicy(lambda step, examples, rows: ([], "student"), 0, max_steps, batch_size, capacity, threshold), []
    for step in range(steps):
        story.append(off.choice(step))
        if story[-1] == "student": off.remember([([1], [step])] * batch_size)
    return off, story

@pytest.mark.pitfall(30)
@pytest.mark.pitfall(31)
def test_the_replay_buffer_is_bounded_on_the_cpu_and_never_sampled_below_the_batch_size():
    for threshold in (0.1, 0.5, 1.0):
        off, story = schedule(threshold, 100)
        assert len(off.buffer) <= 6 and all(isinstance(i, int) for pair in off.buffer for ids in pair for i in ids)
        assert story.index("replay") > story.index("student") if "replay" in story else True
        assert story == schedule(threshold, 100)[1]           # a function of (seed, step)
    off = OffPolicy(None, 0, 100, batch_size=4, capacity=8, threshold=1.0)
    off.remember([([1], [2])] * 3)
    assert "replay" not in {off.choice(step) for step in range(100)}
    with pytest.raises(ValueError, match="buffer_size"): OffPolicy(None, 0, 100, batch_size=4, capacity=3)

def test_without_a_threshold_nothing_is_ever_sampled_and_late_steps_write_less():
    assert set(schedule(0.0, 100)[1]) == {"data"}
    story = schedule(1.0, 100)[1]
    assert story[3:50].count("student") > story[50:].count("student") > 0 and "data" not in story

def test_the_threshold_rises_only_with_a_loss_well_above_the_reference():
    off = OffPolicy(None, 0, 10, 1)
    seen = []
    for loss in (3.0, 3.09, 2.0, 3.11, 3.2, 3.22): off.validated(loss); seen.append((round(off.threshold.phi, 1), off.threshold.reference))
    assert seen == [(0.0, 3.0), (0.0, 3.0), (0.0, 3.0), (0.1, 3.11), (0.1, 3.11), (0.2, 3.22)]
    for loss in range(10, 40): off.validated(float(loss))
    assert off.threshold.phi == 1.0

def test_replayed_rows_are_split_over_processes_like_one_process():
    off, _ = schedule(1.0, 30)
    step = next(s for s in range(30, 100) if off.choice(s) == "replay")
    whole, origin = off(step, [None, None], [0, 1])
    assert origin == "replay" and [off(step, [None], [row])[0][0] for row in (0, 1)] == whole

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("method", ["mgsr_off_policy", "distillm"])
def test_an_interrupted_off_policy_run_ends_with_the_same_weights_and_buffer(method, tmp_path, teacher):
    def trained(folder, stop=None):
        trainer = Trainer(prepare(tiny(tmp_path, teacher, method, max_steps=6, checkpoint_every=2), cpu=True), folder)
        started = trainer.checkpoints.resume()
        class Killed(Exception): pass
        def on_step(row):
            if row["step"] == stop: raise Killed
        try: trainer.fit(on_step)
        except Killed: pass
        return started, trainer
    (tmp_path/"a").mkdir(); (tmp_path/"b").mkdir()
    _, whole = trained(tmp_path/"a")
    trained(tmp_path/"b", stop=5)
    started, resumed = trained(tmp_path/"b")
    assert started == 4
    for (name, a), b in zip(whole.distiller.state_dict().items(), resumed.distiller.state_dict().values()): assert torch.equal(a, b), name
    assert whole.writer.source.state_dict() == resumed.writer.source.state_dict() and len(whole.writer.source.buffer) > 0
    drop = lambda log: [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in log]
    assert drop(whole.progress.log) == drop(resumed.progress.log)
