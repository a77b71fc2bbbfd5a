"""Training: the whole pipeline on tiny models of three architectures, and what a training loop gets wrong without anybody noticing."""
import contextlib, csv, json, math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args
import pytest, torch
from tiny_models import KINDS, tiny_model
from tiny_runs import UNEQUAL, Interrupted, interrupt_at, many_stops, moved, numbers, plain, state, tiny_parameters, tokenizer_of
from mgsr_nb import run as R, sampling as S
import mgsr_nb.run.artefacts
import mgsr_nb.run.engine
import mgsr_nb.run.results
import mgsr_nb.run.setup
import mgsr_nb.run.step
import mgsr_nb.run.trainer
from mgsr_nb.config import ConfigError, RunConfig, resolve
from mgsr_nb.run.folder import finished, open_run
from mgsr_nb.tokens import batch_indices
from mgsr_nb.models import base_model, load_model, load_tokenizer, save_model
from mgsr_nb.objective import NLL
from mgsr_nb.run.step import schedule_factor
from mgsr_nb.run.engine import TrainingError
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer
from mgsr_nb.run.results import metrics_table, run

TERMS = ("sft", "dac", "span", "kd", "pg")
KIND = "gpt2"       # of `config`, where none is given
every_kind = pytest.mark.parametrize("kind", KINDS)

def log_of(folder):
    with open(folder/"log.csv") as f: return plain(csv.DictReader(f))

# --- the whole pipeline

@every_kind
@pytest.mark.parametrize("student", ["truncate", "local"])
def test_the_pipeline_from_saved_models_to_a_saved_student(config, kind, student, tmp_path):
    c = config(kind, student=student, run_name=f"{kind}/{student}")
    metrics = run(c, cpu=True)
    folder = tmp_path/"runs"/kind/student
    assert json.loads((folder/"metrics.json").read_text()) == metrics and finished(folder)
    assert len(numbers(metrics)) > 50 and all(math.isfinite(n) for n in numbers(metrics))
    assert metrics["config"]["dac_weight"] == 1.0 and metrics["digest"] == c.digest == json.loads((folder/"config.json").read_text())["digest"]
    for who in ("student_start", "student", "teacher"):
        assert set(metrics[who]) == {"validation", "test", "average"} and metrics[who]["test"]["tiny"]["prompts"] == 2
    assert metrics["teacher"]["validation"]["kl"] == 0 < metrics["student"]["validation"]["kl"]
    assert metrics["student"]["validation"]["nll"] != metrics["student_start"]["validation"]["nll"]
    rows = log_of(folder)
    assert [r["step"] for r in rows] == ["0", "1", "2"] and rows[0]["validation_nll"] and rows[2]["validation_nll"] and not rows[1]["validation_nll"]
    for name in ("loss", "sft", "dac", "span", "clip_upper", "clip_lower", "kept_mass", "scrg_corrected", "grad_norm", "learning_rate"):
        assert all(math.isfinite(float(r[name])) for r in rows[1:]), name
    lines = [json.loads(line) for line in (folder/"samples.jsonl").read_text().splitlines()]
    assert [(r["of"], r["set"], r["seed"]) for r in lines] == [(of, "tiny", 10) for of in ("student_start", "student", "teacher") for _ in range(2)]
    again = load_model(str(folder/"student"))
    assert again.config.num_hidden_layers == 2 and load_tokenizer(str(folder/"student")).get_vocab() == load_tokenizer(c.teacher).get_vocab()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "log.csv", "metrics.json", "samples.jsonl", "student"]
    assert [r["model"] for r in metrics_table(metrics)] == ["student before", "student after", "teacher"]

@pytest.mark.pitfall(13)
@every_kind
def test_pitfall_13_a_models_own_temperature_touches_neither_the_text_nor_the_loss(config, kind):
    "In training there is one temperature, 1, for both models and for the student's writing; what a checkpoint's generation settings say is for chatting."
    assert [name for name in RunConfig.model_fields if "temperature" in name] == ["mask_temperature", "eval_temperature"]
    rows = []
    for temperature in (1., .3):
        setup = prepare(config(kind), cpu=True)
        for model in (setup.student, setup.teacher): model.generation_config.temperature, model.generation_config.top_k = temperature, 2 if temperature != 1 else 50
        rows.append({k: v for k, v in Trainer(setup).step().items() if not k.startswith("seconds")})
    assert rows[0] == rows[1] and rows[0]["dac"] != 0

@pytest.mark.pitfall(13)
def test_pitfall_13_the_temperature_of_the_evaluation_changes_answers_and_nothing_else(config, tmp_path):
    plain_run, sharp = (run(config("llama", run_name=f"t{t:g}", eval_temperature=t), cpu=True) for t in (1., 0.))
    assert log_of(tmp_path/"runs/t1") == log_of(tmp_path/"runs/t0")
    texts = [[json.loads(line) for line in (tmp_path/"runs"/name/"samples.jsonl").read_text().splitlines()] for name in ("t1", "t0")]
    for who in ("student_start", "student", "teacher"):      # the first and the last are cached scores: another temperature is another entry
        assert sharp[who]["validation"] == plain_run[who]["validation"] and sharp[who]["test"]["tiny"]["nll_per_prompt"] == plain_run[who]["test"]["tiny"]["nll_per_prompt"]
        one, zero = ([r["prediction"] for r in rows if r["of"] == who] for rows in texts)
        assert len(one) == len(zero) == 2 and one != zero

def test_the_saved_student_is_the_one_that_was_evaluated(config, tmp_path):
    c = config("llama", run_name="x")
    nll = run(c, cpu=True)["student"]["validation"]["nll"]
    setup = prepare(c, cpu=True)
    setup.student = load_model(str(tmp_path/"runs/x/student"))
    assert R.results.scores(setup, setup.student)["validation"]["nll"] == pytest.approx(nll, abs=1e-6)

def test_the_student_is_not_written_when_it_is_not_asked_for(config, tmp_path):
    run(config("llama", run_name="x", save_student=False), cpu=True)
    assert finished(tmp_path/"runs/x") and not (tmp_path/"runs/x/student").exists()

# --- what may be repeated, and what not

def test_a_finished_run_is_not_repeated(config, monkeypatch):
    c = config("llama", run_name="x")
    metrics = run(c, cpu=True)
    monkeypatch.setattr(R.results, "prepare", lambda *a, **k: pytest.fail("loaded models again"))
    assert run(c, cpu=True) == metrics

def test_other_parameters_do_not_take_its_folder(config, monkeypatch, tmp_path):
    run(config("llama", run_name="x"), cpu=True)
    before = (tmp_path/"runs/x/metrics.json").read_bytes()
    monkeypatch.setattr(R.results, "prepare", lambda *a, **k: pytest.fail("loaded models"))
    with pytest.raises(ConfigError, match="^run_name: .*other parameters"): run(config("llama", run_name="x", dac_weight=0.5), cpu=True)
    assert (tmp_path/"runs/x/metrics.json").read_bytes() == before

def test_overwrite_replaces_it(config):
    first = run(config("llama", run_name="x"), cpu=True)
    second = run(config("llama", run_name="x", dac_weight=0.5, overwrite=True), cpu=True)
    assert second["config"]["dac_weight"] == 0.5 and second["student"]["validation"] != first["student"]["validation"]
    assert run(config("llama", run_name="x", dac_weight=0.5), cpu=True) == second

def test_the_tuned_teacher_and_the_scores_of_what_does_not_train_are_made_once(config, monkeypatch, tmp_path):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own cache"))
    tuned, evaluated, measured = [], [], []
    fine_tune, evaluate, block_influence = R.artefacts.fine_tune, R.results.evaluate, R.artefacts.block_influence
    monkeypatch.setattr(R.artefacts, "block_influence", lambda *a: measured.append(1) or block_influence(*a))
    monkeypatch.setattr(R.artefacts, "fine_tune", lambda *a, **k: tuned.append(1) or fine_tune(*a, **k))
    monkeypatch.setattr(R.results, "evaluate", lambda *a, **k: evaluated.append(1) or evaluate(*a, **k))
    first = run(config("llama"), cpu=True)
    assert (len(tuned), len(evaluated)) == (1, 3)                    # start, teacher, end
    second = run(config("llama", seed=1), cpu=True)
    assert (len(tuned), len(evaluated)) == (1, 4)                    # the end of another training seed only
    assert all(first[who] == second[who] for who in ("student_start", "teacher")) and first["student"] != second["student"]
    run(config("llama", student_layers=1), cpu=True)
    assert (len(tuned), len(evaluated)) == (1, 6)                    # another start
    assert len(measured) == 1                                        # which layers a student keeps, however many
    run(config("llama", teacher_sft_steps=2), cpu=True)
    assert (len(tuned), len(evaluated), len(measured)) == (2, 9, 2)  # another teacher
    run(config("llama", teacher_sft_steps=2, eval_seeds="20"), cpu=True)
    assert (len(tuned), len(evaluated)) == (2, 12)                   # other draws

def test_the_teacher_is_fine_tuned_and_its_student_is_cut_from_it(config):
    tuned, raw = (prepare(config("llama", teacher_sft_steps=n), cpu=True) for n in (2, 0))
    assert moved(state(raw.teacher), tuned.teacher) and moved(state(raw.student), tuned.student)
    for setup in (tuned, raw): assert torch.equal(setup.teacher.get_input_embeddings().weight, setup.student.get_input_embeddings().weight)

@pytest.mark.pitfall(36)
def test_pitfall_36_a_batch_that_some_process_gets_nothing_of_is_refused(config, monkeypatch):
    monkeypatch.setattr(R.setup, "load_tokenizer", lambda *a: pytest.fail("went on"))
    monkeypatch.setattr(R.engine, "Accelerator", lambda **k: SimpleNamespace(num_processes=5))
    with pytest.raises(ConfigError, match="^batch_size: 4 sequences cannot be shared by 5 processes; allowed: "): prepare(config(), cpu=True)

def test_a_student_with_another_tokenizer_is_refused(config, local_models):
    with pytest.raises(ConfigError, match="^student: its tokenizer differs"): prepare(config("gpt2", student=local_models["llama"][1]), cpu=True)

# --- gradient accumulation

@pytest.mark.pitfall(26)
@every_kind
@pytest.mark.parametrize("options", [{}, dict(remainder="bucket", scrg=False, kd_weight=1.0), dict(sampling="fixed", scrg=False)], ids=["on-policy", "bucket", "fixed"])
def test_pitfall_26_micro_batches_change_nothing(trainer, kind, options):
    "1 x 4, 2 x 2, 3 + 1 and 4 x 1 sequences, unequal responses, whole steps with AdamW, in float64."
    found = {}
    for micro in (0, 1, 2, 3):
        t = trainer(kind, torch.float64, many_stops, micro_batch_size=micro, **UNEQUAL, **options)
        examples, text, _ = t.writer.draw(0)
        assert len({len(e.response_ids) for e in examples}) > 1 and (text == "data" or len({len(y) for _, y in text.pairs}) > 1)
        rows = [t.step(), t.step()]
        found[micro] = rows, state(t.distiller)
    rows, weights = found[0]
    for micro in (1, 2, 3):
        for name, value in weights.items(): torch.testing.assert_close(found[micro][1][name], value, rtol=1e-9, atol=1e-9)
        for a, b in zip(plain(found[micro][0]), plain(rows)): assert a == pytest.approx(b, rel=1e-5, abs=1e-6)

@pytest.mark.pitfall(26)
def test_pitfall_26_the_denominators_are_counted_after_generation(trainer):
    t = trainer("llama", change=many_stops, micro_batch_size=1, **UNEQUAL)
    examples, text, _ = t.writer.draw(0)
    row = t.step()
    assert row["data_tokens"] == sum(len(e.response_ids) for e in examples) and row["distilled_tokens"] == sum(len(y) for _, y in text.pairs) < 4 * 8
    assert row["distilled_spans"] == sum(len(t.find_spans(y)) for _, y in text.pairs)

@pytest.mark.pitfall(26)
def test_pitfall_26_each_term_is_the_mean_over_the_whole_step(trainer):
    "Against the sequences one by one, added up by hand."
    t = trainer("llama", torch.float64, many_stops, micro_batch_size=3, sampling="fixed", scrg=False, **UNEQUAL)
    examples, _, _ = t.writer.draw(0)
    total, tokens = 0., 0
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        with torch.no_grad(): log_q = t.setup.student(input_ids=ids).logits[0].log_softmax(-1)
        for i, token in enumerate(e.response_ids): total -= float(log_q[len(e.prompt_ids) - 1 + i, token]); tokens += 1
    row = t.step()
    assert row["sft"] == pytest.approx(total / tokens, rel=1e-6) and row["loss"] == pytest.approx(row["sft"] + row["dac"] + row["span"], rel=1e-6)

@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_the_gradient_is_clipped_and_the_log_has_its_norm_before(trainer, limit):
    t, found = trainer("llama", max_grad_norm=limit, micro_batch_size=2), []
    step, backward = t.optimizer.step, t.accelerator.backward
    def norm(): found.append(float(sum(p.grad.double().square().sum() for p in t.distiller.parameters() if p.grad is not None).sqrt()))
    t.accelerator.backward = lambda *a: backward(*a) or norm()
    t.optimizer.step = lambda *a: norm() or step(*a)
    row = t.step()
    _, whole, clipped = found      # after the first micro-batch, after the second, and what AdamW sees
    assert whole == pytest.approx(row["grad_norm"], rel=1e-5) and clipped == pytest.approx(min(limit, whole), rel=1e-3) and whole > 1e-2
    assert all(p.grad is None or not p.grad.any() for p in t.distiller.parameters())      # nothing left for the next step

# --- who moves

@pytest.mark.pitfall(27)
@every_kind
def test_pitfall_27_everything_that_trains_moves_and_the_teacher_does_not(trainer, kind):
    "Without weight decay, which moves things too. Three steps: the last layer of f_sub starts at zero weights, so the layers below wait for it."
    t = trainer(kind, weight_decay=0.0, max_steps=4, sub_learning_rate=1e-2, **{**UNEQUAL, "warmup_steps": 1})
    student, teacher, sub = state(t.setup.student), state(t.setup.teacher), state(t.distiller.objective)
    for _ in range(3): t.step()
    # a bias of all keys shifts all scores of a query alike: softmax, and so the loss, does not depend on it
    expected = {n for n, _ in t.setup.student.named_parameters() if not n.endswith("k_proj.bias")}
    assert expected <= moved(student, t.setup.student)
    assert moved(sub, t.distiller.objective) == sub.keys() and len(sub) == 4
    assert not moved(teacher, t.setup.teacher) and not t.setup.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in t.setup.teacher.parameters())
    trained = {id(p) for g in t.optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for m in (t.setup.student, t.distiller.objective) for p in m.parameters()}

@pytest.mark.pitfall(27)
def test_pitfall_27_f_sub_has_its_own_learning_rate_and_vectors_do_not_decay(trainer):
    t = trainer("gpt2", learning_rate=1e-3, sub_learning_rate=1e-2, weight_decay=0.3)
    of = {id(p): (g["initial_lr"], g["weight_decay"]) for g in t.optimizer.param_groups for p in g["params"]}
    for module, lr in ((t.setup.student, 1e-3), (t.distiller.objective, 1e-2)):
        assert {(p.ndim < 2, *of[id(p)]) for p in module.parameters()} == {(True, lr, 0.), (False, lr, 0.3)}

@every_kind
def test_lora_moves_adapters_only_and_is_saved_merged(config, kind, tmp_path):
    c = config(kind, lora_rank=2, lora_dropout=0.0, run_name="lora", learning_rate=1e-2, max_steps=3)
    setup = prepare(c, cpu=True)
    t = Trainer(setup, open_run(c))
    before = state(setup.student)
    start, teacher = R.results.scores(setup, setup.student), R.results.scores(setup, setup.teacher)
    assert start["validation"] == R.results.scores(replace(setup, student=base_model(setup.student)), setup.student)["validation"]
    setup.student.train()
    log = t.fit()
    assert moved(before, setup.student) == {n for n, _ in setup.student.named_parameters() if ".lora_" in n} != set()
    end = R.results.scores(setup, setup.student)
    R.results.write_results(setup, t.folder, start, teacher, end, log, {})
    merged = load_model(str(t.folder/"student"))
    assert not any("lora" in n for n in merged.state_dict()) and type(merged) is type(base_model(setup.student))
    again = R.results.scores(replace(setup, student=merged), merged)
    assert again["validation"]["nll"] == pytest.approx(end["validation"]["nll"], abs=1e-5) and end["validation"]["nll"] != start["validation"]["nll"]

# --- which text goes where

@pytest.mark.pitfall(28)
@pytest.mark.parametrize("sampling", ["on_policy", "fixed", "mixed"])
def test_pitfall_28_the_nll_sees_ground_truth_only(trainer, monkeypatch, sampling):
    seen, forward = [], NLL.forward
    monkeypatch.setattr(NLL, "forward", lambda self, rows: seen.append(rows.labels) or forward(self, rows))
    t = trainer("llama", sampling=sampling, scrg=sampling != "fixed", chunk_tokens=10_000, micro_batch_size=2, max_steps=4)
    for step in range(4):
        seen.clear(); t.step()
        examples = [t.setup.train[i] for i in batch_indices(len(t.setup.train), 4, step, 0)]
        examples.sort(key=lambda e: -len(e.prompt_ids + e.response_ids))       # the longest first: micro-batches are of similar lengths
        assert torch.cat(seen).tolist() == [i for e in examples for i in e.response_ids]

@pytest.mark.pitfall(28)
def test_pitfall_28_other_samples_change_the_distillation_terms_and_not_the_nll(trainer):
    def row(junk):
        t = trainer("llama", scrg=False, span_weight=0.0)
        if junk: t.writer.source = lambda step, examples, rows: ([(e.prompt_ids, [7, 8, 9, 7]) for e in examples], "student")
        return t.step()
    a, b = row(False), row(True)
    assert a["sft"] == b["sft"] and a["dac"] != b["dac"]

@every_kind
def test_what_is_distilled_on_is_the_revision_of_the_students_text(trainer, monkeypatch, kind):
    t, seen, micro_batches = trainer(kind, max_new_tokens=8), [], R.step.micro_batches
    examples, text, notes = t.writer.draw(0)
    written, origin = t.writer.source(0, examples, range(4))
    revision = t.writer.revise(0, written, range(4))
    assert origin == "student" and text.pairs == revision.pairs != written and notes["scrg_corrected"] > 0 and revision.summary().items() <= notes.items()
    assert trainer(kind, scrg=False, max_new_tokens=8).writer.draw(0)[1].pairs == written
    monkeypatch.setattr(R.trainer, "micro_batches", lambda examples, distilled, *a: seen.append(distilled) or micro_batches(examples, distilled, *a))
    t.step()
    assert [found.pairs for found in seen] == [text.pairs] and torch.equal(seen[0].teacher_hidden, text.teacher_hidden)

@pytest.mark.pitfall(29)
@every_kind
def test_pitfall_29_without_dropout_while_writing_with_it_while_training(trainer, kind):
    t, seen, phase = trainer(kind), [], ["draw"]
    base = base_model(t.setup.student)
    getattr(base, base.base_model_prefix).register_forward_pre_hook(lambda m, *a: seen.append((phase[0], m.training, torch.is_grad_enabled())))
    update = t.update
    def marked(*a):
        phase[0] = "update"; found = update(*a); phase[0] = "after"
        return found
    t.update = marked
    t.step(); t.validate()
    assert set(seen) == {("draw", False, False), ("update", True, True), ("after", False, False)}
    assert all(m.training for m in t.setup.student.modules()) and t.distiller.training and not t.setup.teacher.training

@pytest.mark.pitfall(29)
def test_pitfall_29_dropout_is_on_in_training(trainer):
    "GPT-2's dropout must show in the loss of a step, and is a function of seed and step, whatever was drawn before."
    losses = []
    for noise, training in ((1, True), (2, True), (1, False)):
        t = trainer("gpt2", sampling="fixed", scrg=False)
        t.distiller.train(training); torch.manual_seed(noise)
        losses.append(t.step()["sft"])
    assert losses[0] == losses[1] != losses[2]

@pytest.mark.pitfall(30)
def test_pitfall_30_every_process_and_every_start_draws_the_same_source(trainer):
    mixed = dict(sampling="mixed", max_steps=12, scrg=False, batch_size=4)
    whole = trainer("llama", **mixed)
    drawn = [whole.writer.draw(step) for step in range(8)]
    by_student = [bool(notes["by_student"]) for _, _, notes in drawn]
    assert len(set(by_student)) == 2 and by_student != [bool(trainer("llama", seed=1, **mixed).writer.draw(step)[2]["by_student"]) for step in range(8)]
    for process in (0, 1):
        part = trainer("llama", **mixed)
        part.writer.accelerator = SimpleNamespace(process_index=process, num_processes=2, autocast=contextlib.nullcontext)
        part.writer.rows = part.writer.rows[process::2]
        for step in reversed(range(8)):        # in any order: nothing is remembered from step to step
            examples, text, notes = part.writer.draw(step)
            assert [e.example.id for e in examples] == [e.example.id for e in drawn[step][0][process::2]] and notes["by_student"] == by_student[step]
            if by_student[step]: assert text.pairs == drawn[step][1].pairs[process::2]
            else: assert text == drawn[step][1] == "data"

# --- interruption

LONG = dict(max_steps=5, checkpoint_every=2, eval_every=2, sampling="mixed", warmup_steps=1, micro_batch_size=3, span_length=2, spans="fixed")

@pytest.mark.pitfall(32)
@pytest.mark.parametrize("kind,stop", [("gpt2", 3), ("gpt2", 5), ("opt", 3), ("llama", 3)])
def test_pitfall_32_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, kind, stop):
    "GPT-2 and OPT have dropout, so the global random numbers must come back as well."
    def start(name):
        c = config(kind, run_name=name, **LONG)
        t = Trainer(prepare(c, cpu=True), open_run(c))
        return t
    whole = start("whole")
    whole.fit()
    first = start("parts")
    with pytest.raises(Interrupted): first.fit(interrupt_at(stop))
    second = start("parts")
    torch.manual_seed(12345)
    assert second.checkpoints.resume() == {3: 2, 5: 4}[stop]
    second.fit()
    for a, b in ((whole.distiller, second.distiller), (whole.setup.student, second.setup.student)):
        assert state(a).keys() == state(b).keys() and all(torch.equal(v, state(b)[n]) for n, v in state(a).items())
    assert len([n for n in state(whole.distiller) if "sub_network" in n]) == 4
    ours, theirs = whole.optimizer.state_dict(), second.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs["state"][i][k])) for i, s in ours["state"].items() for k, v in s.items())
    assert whole.schedule.state_dict() == second.schedule.state_dict()
    assert plain(whole.progress.log) == plain(second.progress.log) and log_of(whole.folder) == log_of(second.folder)
    assert [r["step"] for r in second.progress.log] == [0, 1, 2, 3, 4, 5] and len({r["by_student"] for r in second.progress.log[1:]}) == 2

@pytest.mark.pitfall(32)
def test_pitfall_32_a_run_that_was_cut_off_goes_on_where_it_was(config, monkeypatch, tmp_path):
    whole = run(config("llama", run_name="whole", **LONG), cpu=True)
    steps, step = [], Trainer.step
    def counted(self):
        if steps == [1, 2, 3]: raise Interrupted
        row = step(self); steps.append(row["step"])
        return row
    monkeypatch.setattr(Trainer, "step", counted)
    c = config("llama", run_name="parts", **LONG)
    with pytest.raises(Interrupted): run(c, cpu=True)
    folder = tmp_path/"runs/parts"
    assert not finished(folder) and (folder/"checkpoints").is_dir() and [r["step"] for r in log_of(folder)] == ["0", "1", "2", "3"]
    steps.append("again")
    parts = run(c, cpu=True)
    assert steps == [1, 2, 3, "again", 3, 4, 5] and log_of(folder) == log_of(tmp_path/"runs/whole")
    assert all(parts[k] == whole[k] for k in ("student_start", "student", "teacher", "digest"))
    assert not (folder/"checkpoints").exists()

@pytest.mark.pitfall(32)
def test_pitfall_32_a_checkpoint_is_whole_or_not_there(config, monkeypatch):
    c = config("llama", run_name="x", **{**LONG, "checkpoint_every": 1, "max_steps": 9})
    t = Trainer(prepare(c, cpu=True), open_run(c))
    with pytest.raises(Interrupted): t.fit(interrupt_at(5))
    assert sorted(p.name for p in (t.folder/"checkpoints").iterdir()) == ["step-000003", "step-000004"]
    def half(folder, *a, **k):
        from pathlib import Path
        Path(folder).mkdir(parents=True); (Path(folder)/"model.safetensors").write_bytes(b"half")
        raise Interrupted
    monkeypatch.setattr(t.accelerator, "save_state", half)
    with pytest.raises(Interrupted): t.checkpoints.save()
    again = Trainer(prepare(c, cpu=True), t.folder)
    assert again.checkpoints.resume() == 4

def test_without_a_checkpoint_there_is_nothing_to_resume(config):
    c = config("llama", run_name="x")
    assert Trainer(prepare(c, cpu=True), open_run(c)).checkpoints.resume() == 0

# --- the schedule

@pytest.mark.pitfall(33)
def test_pitfall_33_the_schedule_counts_updates_not_micro_batches(trainer):
    t = trainer("llama", max_steps=6, warmup_steps=2, micro_batch_size=1, learning_rate=1e-3, sub_learning_rate=1e-2, sampling="fixed", scrg=False)
    log = t.fit()
    factors = [1/3, 2/3, 1., *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3))]
    assert [r["learning_rate"] for r in log[1:]] == pytest.approx([1e-3 * f for f in factors])
    assert [g["lr"] for g in t.optimizer.param_groups] == pytest.approx([0.] * len(t.optimizer.param_groups), abs=1e-12)

@pytest.mark.pitfall(33)
def test_pitfall_33_the_schedule_by_hand():
    assert [schedule_factor(s, 4, 0) for s in range(5)] == pytest.approx([1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0])
    assert [schedule_factor(s, 5, 3) for s in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0])
    assert schedule_factor(0, 1, 0) == 1 and [schedule_factor(s, 2, 5) for s in (0, 1)] == pytest.approx([1/6, 2/6])

@pytest.mark.pitfall(33)
def test_pitfall_33_the_rate_of_the_log_is_the_rate_of_the_update(trainer):
    "AdamW's first step moves a weight by the learning rate, whatever its gradient."
    t = trainer("llama", max_steps=4, warmup_steps=3, learning_rate=1e-3, weight_decay=0.0, sampling="fixed", scrg=False)
    before = state(t.setup.student)
    row = t.step()
    largest = max((p.detach() - before[n]).abs().max() for n, p in t.setup.student.named_parameters())
    assert row["learning_rate"] == 1e-3 / 4 and float(largest) == pytest.approx(1e-3 / 4, rel=1e-2)

# --- a weight of zero costs nothing

def never(what): return lambda *a, **k: pytest.fail(f"{what} was called")

@every_kind
def test_without_distillation_neither_the_teacher_nor_a_sample_is_computed(trainer, monkeypatch, kind):
    t = trainer(kind, dac_weight=0.0, span_weight=0.0, micro_batch_size=2)
    monkeypatch.setattr(S, "generate", never("sampling"))
    for m in t.setup.teacher.modules(): m.register_forward_pre_hook(never("the teacher"))
    t.writer.source = t.writer.revise = never("text for distillation")
    row = t.step()
    assert list(t.distiller.objective.terms) == ["sft"] and not list(t.distiller.objective.parameters())
    assert row["loss"] == pytest.approx(row["sft"], rel=1e-6) and row["distilled_tokens"] == 0 and not {"dac", "span", "kd", "pg"} & row.keys()

@pytest.mark.parametrize("weights,passes", [(dict(sft_weight=0.0), 1), ({}, 2), (dict(sft_weight=0.0, dac_weight=0.0, kd_weight=1.0, span_weight=0.0), 1),
                                            (dict(method="minillm"), 2), (dict(method="minillm", sft_weight=0.0), 1)])
def test_only_texts_that_a_term_reads_go_through_the_student(trainer, weights, passes):
    t, calls = trainer("llama", **weights), []
    examples, text, _ = t.writer.draw(0)
    base_model(t.setup.student).model.register_forward_pre_hook(lambda *a: calls.append(1))
    t.update(examples, text)
    assert len(calls) == passes and set(t.distiller.objective.terms) == {k for k in TERMS if getattr(t.config, f"{k}_weight") > 0}

def test_the_ground_truth_that_is_also_distilled_goes_through_the_student_once(trainer):
    t, calls = trainer("llama", sampling="fixed", scrg=False), []
    base_model(t.setup.student).model.register_forward_pre_hook(lambda *a: calls.append(1))
    t.step()
    assert len(calls) == 1

def test_without_a_span_weight_no_phrase_is_looked_for(trainer, monkeypatch):
    monkeypatch.setattr(R.trainer, "SpanFinder", never("the parser"))
    assert "span" not in trainer("llama", span_weight=0.0).step()

def test_without_scrg_the_teacher_does_not_read_the_samples_before_the_update(trainer):
    t = trainer("llama", scrg=False)
    base_model(t.setup.teacher).model.register_forward_pre_hook(never("the teacher"))
    t.writer.draw(0)

# --- every choice

def choices(*names): return [{name: value} for name in names for value in get_args(RunConfig.model_fields[name].annotation)]

@pytest.mark.parametrize("choice", [
    *choices("clip", "remainder", "sampling", "spans", "span_relation", "scrg_direction", "scrg_teacher_token", "clip_reading", "target_class", "dac_classes", "sub_inputs"),
    *({**c, "kd_weight": 1.0} for c in choices("kd_loss")), dict(scrg_corrections=3), dict(mask_temperature=0.0), dict(sub_layers=0), dict(sub_layers=2), dict(sft_weight=0.0),
    dict(dac_weight=0.0), dict(span_weight=0.0), dict(clip="fixed_percentile", remainder="bucket", target_class="twice"), dict(chunk_tokens=1), dict(chunk_tokens=10_000), dict(batch_size=1),
    dict(batch_size=9)], ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items() if k != "kd_weight"))
def test_every_choice_trains(trainer, choice):
    fixed = dict(scrg=False) if choice.get("sampling") == "fixed" else {}
    t = trainer("llama", **fixed, **choice)
    before = state(t.setup.student)
    rows = [t.step(), t.step()]
    assert all(math.isfinite(n) for n in numbers(rows)) and all(r["loss"] != 0 for r in rows)
    assert moved(before, t.setup.student) and all(p.isfinite().all() for p in t.distiller.parameters())
    terms = {k for k in TERMS if getattr(t.config, f"{k}_weight") > 0}
    assert terms == set(TERMS) & rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(sum(getattr(t.config, f"{k}_weight") * rows[0][k] for k in terms), rel=1e-5, abs=1e-6)

@pytest.mark.parametrize("layers", get_args(RunConfig.model_fields["layer_choice"].annotation))
def test_every_choice_of_layers_starts(config, layers):
    assert prepare(config("llama", layer_choice=layers), cpu=True).student.config.num_hidden_layers == 2

# --- what cannot go on

@pytest.mark.parametrize("poisoned,named,silent", [("teacher", "dac", "sft"), ("student", "sft", None)])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(trainer, poisoned, named, silent):
    t = trainer("llama", scrg=False, sampling="fixed")
    t.step()
    with torch.no_grad(): getattr(t.setup, poisoned).get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(TrainingError) as e: t.step()
    bad = str(e.value).split(" not finite")[0]
    assert bad.startswith("step 2: ") and {"loss", named} <= set(bad.removeprefix("step 2: ").split(", ")) and silent not in bad.split(", ") and "learning_rate" in str(e.value)
    assert t.progress.step == 1

def test_a_run_that_ends_so_is_not_finished(config, monkeypatch, tmp_path):
    monkeypatch.setattr(NLL, "forward", lambda self, rows: (-rows.log_q.gather(-1, rows.labels[:, None]).squeeze(-1) * torch.nan, {}))
    with pytest.raises(TrainingError, match="^step 1: .*sft"): run(config("llama", run_name="x", teacher_sft_steps=0, sampling="fixed", scrg=False), cpu=True)
    assert not finished(tmp_path/"runs/x")

# --- found by using it: cells run twice, settings changed between runs, caches read by another run

def test_overwrite_does_not_resume_what_it_should_replace(config):
    old = config("llama", run_name="x", **LONG)
    t = Trainer(prepare(old, cpu=True), open_run(old))
    with pytest.raises(Interrupted): t.fit(interrupt_at(3))
    new = config("llama", run_name="x", overwrite=True, **{**LONG, "dac_weight": 0.5})
    assert Trainer(prepare(new, cpu=True), open_run(new)).checkpoints.resume() == 0

def test_overwrite_takes_the_old_student_away(config, tmp_path):
    run(config("llama", run_name="x"), cpu=True)
    run(config("llama", run_name="x", save_student=False, overwrite=True), cpu=True)
    assert not (tmp_path/"runs/x/student").exists()

def test_lora_starts_from_the_seed(config):
    def adapters(seed, noise):
        torch.manual_seed(noise)
        return {n: p for n, p in state(prepare(config("llama", lora_rank=2, seed=seed), cpu=True).student).items() if ".lora_A" in n}
    a, b = adapters(0, 1), adapters(0, 2)
    assert all(torch.equal(a[n], b[n]) for n in a)

def test_the_tuned_teacher_is_a_function_of_its_key(config, tmp_path, monkeypatch):
    def teacher(noise):
        monkeypatch.setenv("MGSR_CACHE", str(tmp_path/str(noise)))
        torch.manual_seed(noise)
        return state(prepare(config("gpt2"), cpu=True).teacher)
    a, b = teacher(1), teacher(2)
    assert all(torch.equal(a[n], b[n]) for n in a)

@pytest.mark.parametrize("wrong", ["layers", "tokenizer"])
def test_what_can_be_refused_is_refused_before_the_teacher_is_tuned(config, tmp_path, monkeypatch, local_models, wrong):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"empty"))
    monkeypatch.setattr(R.artefacts, "fine_tune", lambda *a, **k: pytest.fail("fine-tuned the teacher first"))
    more = dict(student_layers=99) if wrong == "layers" else dict(student=local_models["llama"][1])
    with pytest.raises(ConfigError): prepare(config("gpt2", **more), cpu=True)

def test_scores_from_the_cache_are_those_of_these_references(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own"))
    c = config("llama")
    first = R.results.scores(s := prepare(c, cpu=True), s.student, s.keys["student_start"])
    load = R.setup.load_eval_set
    answer = {r["id"]: r["prediction"] for r in first["answers"]}
    monkeypatch.setattr(R.setup, "load_eval_set", lambda *a: [replace(e, references=(e.references[0], answer.get(e.id) or "x")) for e in load(*a)])
    s = prepare(c, cpu=True)
    assert R.results.scores(s, s.student, s.keys["student_start"])["average"]["rouge_l"] == R.results.scores(s, s.student)["average"]["rouge_l"]

def test_the_teachers_cached_scores_are_those_over_the_shared_classes(config, tmp_path, monkeypatch, local_models):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"own"))
    tokenizer = tokenizer_of("llama")
    save_model(tiny_model("llama", 3, vocab=len(tokenizer) + 4, seed=2), tokenizer, tmp_path/"wide")
    for student in ("truncate", local_models["llama"][1]):
        s = prepare(resolve(tiny_parameters(tmp_path/"runs", tmp_path/"wide", student=student, teacher_sft_steps=0)), cpu=True)
        cached, fresh = R.results.scores(s, s.teacher, s.keys["teacher"]), R.results.scores(s, s.teacher)
        assert cached["validation"]["nll"] == pytest.approx(fresh["validation"]["nll"], rel=1e-6), s.vocab

def test_a_padded_teacher_goes_through_the_pipeline(config, tmp_path, monkeypatch):
    tokenizer = tokenizer_of("llama")
    save_model(tiny_model("llama", 3, vocab=len(tokenizer) + 300, seed=2), tokenizer, tmp_path/"wide")
    run(resolve(tiny_parameters(tmp_path/"runs", tmp_path/"wide", run_name="x")), cpu=True)

def test_the_trainer_cell_may_be_run_twice(config):
    c = config("llama", run_name="x", **LONG)
    setup = prepare(c, cpu=True)
    Trainer(setup, open_run(c))
    t = Trainer(setup, open_run(c))
    with pytest.raises(Interrupted): t.fit(interrupt_at(3))
    again = Trainer(prepare(c, cpu=True), t.folder)
    assert again.checkpoints.resume() == 2 and not [n for n, v in state(again.distiller.objective).items() if not torch.isfinite(v).all()]

def test_texts_longer_than_the_models_positions_are_refused_in_words(config):
    with pytest.raises(ConfigError, match="max_tokens|max_new_tokens"): run(config("gpt2", max_prompt_tokens=150, max_tokens=300, run_name="x"), cpu=True)

def test_another_precision_in_the_same_session(config):
    prepare(config("llama", precision="float32"), cpu=True)
    try: prepare(config("llama", precision="bfloat16"), cpu=True)
    finally:
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(True)

# --- what is known, watched, compiled

def test_a_known_start_is_not_validated_again(config, tmp_path, monkeypatch):
    setup = prepare(config(max_steps=2), cpu=True)
    monkeypatch.setattr(setup, "validated", lambda model: calls.append(model) or {"nll": 5., "kl": 6.})
    calls = []
    rows = Trainer(setup).fit(start={"nll": 3., "kl": 4., "tokens": 7})
    assert (rows[0]["validation_nll"], rows[0]["validation_kl"]) == (3., 4.) and len(calls) == 1 and rows[-1]["validation_nll"] == 5.
    calls.clear()
    assert Trainer(setup).fit()[0]["validation_nll"] == 5. and len(calls) == 2

@pytest.mark.parametrize("select", ["last", "nll"])
def test_the_last_validation_is_the_result_unless_other_weights_are(config, select):
    t = Trainer(prepare(config(max_steps=2, select=select, eval_every=1), cpu=True))
    with pytest.raises(Interrupted): t.fit(interrupt_at(1))
    t.step()
    assert t.checked is None         # training went on since
    t = Trainer(prepare(config(max_steps=2, select=select, eval_every=1), cpu=True))
    t.fit()
    assert (t.checked is None) == (select == "nll")
    known = R.results.scores(t.setup, t.setup.student, validation=t.checked)["validation"]
    assert known == R.results.scores(t.setup, t.setup.student)["validation"]

@pytest.mark.parametrize("ends", [True, False], ids=["whole", "interrupted"])
def test_a_tracker_hears_every_row_of_the_log(config, monkeypatch, ends):
    heard = []
    class Tracker:
        requires_logging_directory = True
        def __init__(self, name, folder): heard.append((name, folder))
        def start(self): heard.append("start")
        def store_init_configuration(self, values): heard.append(values)
        def log(self, values, step): heard.append((step, values))
        def finish(self): heard.append("finish")
    monkeypatch.setitem(R.engine.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(R.checks.accelerate.utils, "is_tensorboard_available", lambda: True)
    c = config(tracker="tensorboard", max_steps=3)
    t = Trainer(prepare(c, cpu=True), open_run(c))
    with contextlib.nullcontext() if ends else pytest.raises(Interrupted): t.fit(*[] if ends else [interrupt_at(2)])
    (name, folder), start, values, *rows, finish = heard
    assert (name, folder, start, finish) == ("tensorboard", t.folder, "start", "finish")
    assert values["dac_weight"] == 1.0 and "data_dir" not in values and None not in values.values()
    assert rows == [(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in t.progress.log] and [s for s, _ in rows] == ([0, 1, 2, 3] if ends else [0, 1, 2])

@pytest.mark.parametrize("missing", [dict(tracker="wandb"), dict(compile_student=True)], ids=lambda m: next(iter(m)))
def test_a_missing_tool_is_said_before_a_model_loads(config, monkeypatch, missing):
    monkeypatch.setattr(R.checks.accelerate.utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(R.checks.shutil, "which", lambda name: None)
    monkeypatch.setattr(R.artefacts, "load_model", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match=f"^{next(iter(missing))}: .*allowed: "): prepare(config(**missing), cpu=True)

def test_a_tracker_changes_neither_the_run_nor_its_name():
    assert resolve(tracker="wandb").digest == resolve().digest and resolve(compile_student=True).digest != resolve().digest

@pytest.mark.slow
def test_a_compiled_student_makes_the_same_numbers(config):
    "A minute for the compiler."
    rows = [Trainer(prepare(config("llama", compile_student=compiled, max_steps=3), cpu=True)).fit() for compiled in (False, True)]
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "sft", "dac", "span", "grad_norm", "validation_nll"):
            assert (name in a) == (name in b) and (name not in a or a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)), name
