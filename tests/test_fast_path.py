"A short run is the same with and without what makes it fast: one walk in chunks and blocks, readings that go on, teacher states that are reused, rows sorted by length."
import pytest, torch
import mgsr_nb.scrg as scrg
from mgsr_nb import run as R
import mgsr_nb.run.step
from mgsr_nb.config import resolve
from mgsr_nb.divergences import log_probs
from mgsr_nb.objective import Evaluated, Objective, whole_rows
from mgsr_nb.run.step import Distilled
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer, Writer
from tiny_runs import save_pair, tiny_parameters, without_dropout


def dense(self, text, names, counts):
    "The objective as a textbook writes it: all logits, all terms, and autograd for the rest."
    log_q = log_probs(text.student_head(text.student_hidden)[..., :text.vocab])
    with torch.no_grad(): log_p = log_probs(text.teacher_head(text.teacher_hidden)[..., :text.vocab]) if text.teacher_head is not None else None
    rows = whole_rows(log_q, log_p, text.labels, text.pair_weight, text.policy)
    loss, sums, notes = 0., {}, {}
    for name in names:
        values, diagnostics = self.terms[name](rows)
        sums[name] = values.sum()
        loss = loss + self.weights[name] * sums[name] / self.denominator(name, counts)
        for key, value in diagnostics.items(): notes[key], notes[f"{key}_squared"] = value.sum(), value.square().sum()
    at_labels = None if log_p is None else log_p.gather(-1, text.labels[:, None]).squeeze(-1)
    return Evaluated(loss, {k: s.detach() for k, s in sums.items()}, {k: v.detach() for k, v in notes.items()}, at_labels)

def slow(monkeypatch):
    "Take every shortcut away."
    monkeypatch.setattr(Objective, "forward", dense)
    look_at = Writer.look_at
    def forget(self, *args):
        text, notes = look_at(self, *args)
        return Distilled(text.pairs, None, text.policy, text.corrected), notes      # the teacher reads the revised text again
    monkeypatch.setattr(Writer, "look_at", forget)
    once = scrg.Round.__call__
    def from_the_start(self, *args):
        sample = self.sample
        self.sample = lambda prompts, keys, limits, past: sample(prompts, keys, limits)      # the student reads the kept text again
        try: return once(self, *args)
        finally: self.sample = sample
    monkeypatch.setattr(scrg.Round, "__call__", from_the_start)
    monkeypatch.setattr(R.step, "by_length", lambda pairs, size, number: [list(range(len(pairs)))[a:a + size] for a in range(0, number * size, size)])

@pytest.fixture(scope="module")
def pair(tmp_path_factory): return {kind: save_pair(tmp_path_factory.mktemp(kind), kind)[0] for kind in ("gpt2", "llama")}

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method,more", [("mgsr", {}), ("mgsr", dict(scrg_corrections=3, clip_reading="mass", sub_inputs="full")), ("mgsr_off_policy", dict(threshold_start=0.9, buffer_size=4)),
                                         ("minillm", {}), ("gkd", dict(mixed_fraction=1.0))], ids=["mgsr", "mgsr-3-corrections", "off-policy", "minillm", "gkd"])
def test_the_training_curve_is_unchanged_by_the_fast_path(kind, method, more, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    config = resolve(tiny_parameters(tmp_path, pair[kind], method=method, max_steps=6, max_new_tokens=10, micro_batch_size=2, chunk_tokens=7, learning_rate=3e-3, sub_learning_rate=1e-2, **more))
    def curve():
        setup = prepare(config, cpu=True)
        without_dropout(setup.student)      # its draws depend on the order of the rows
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in Trainer(setup).fit()]
    fast = curve()
    with monkeypatch.context() as m:
        slow(m)
        reference = curve()
    assert len(fast) == len(reference) == 7 and fast[-1]["loss"] != fast[1]["loss"]
    for a, b in zip(fast, reference):
        assert a.keys() == b.keys()
        for name in a:
            x, y = (v[name] ** 2 if name.endswith("_sd") else v[name] for v in (a, b))      # an sd is the root of a difference of sums: its square is what rounding leaves alone
            tolerance = 1e-3 if name.startswith(("kept", "clip")) else 1e-4       # how many classes lie inside of a limit is a count: a rounding moves a class
            assert abs(x - y) <= tolerance * max(1, abs(y)), (a["step"], name, x, y)
