"Texts of several updates written at once: the same texts from a student that does not move, its lag once it moves, and a run that resumes."
import pytest, torch
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.setup import prepare
from mgsr_nb.run.trainer import Trainer
from tiny_runs import Interrupted, interrupt_at, many_stops, plain, save_pair, tiny_parameters

@pytest.fixture(scope="module")
def teacher(tmp_path_factory): return save_pair(tmp_path_factory.mktemp("llama"), "llama")[0]

@pytest.fixture
def make(teacher, tmp_path, monkeypatch):
    "make(folder, ...): a trainer with these parameters."
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    def make(folder=None, **more):
        config = resolve(tiny_parameters(tmp_path, teacher, max_steps=5, max_new_tokens=8, learning_rate=3e-3, **more))
        setup = prepare(config, cpu=True)
        many_stops(setup)
        return Trainer(setup, folder)
    return make

@pytest.mark.parametrize("method", ["mgsr", "minillm", "gkd"])
def test_a_student_that_stays_writes_the_same_texts(make, method):
    "Of steps 0 and 1, of 2 and 3, and of 4, which is alone; what is known of the texts too."
    more = dict(method=method, sampling="on_policy")
    usual, ahead = make(**more), make(**more, write_ahead=2)
    for step in range(5):
        (a, text, notes), (b, other, noted) = usual.writer.draw(step), ahead.writer.draw(step)
        assert a == b and text.pairs == other.pairs and text.corrected is other.corrected is None or [c and c[0] for c in text.corrected] == [c and c[0] for c in other.corrected]
        assert notes.keys() == noted.keys()
        if text.teacher_hidden is not None: torch.testing.assert_close(text.teacher_hidden, other.teacher_hidden, rtol=1e-4, atol=1e-4)
        if text.policy is not None:
            for x, y in zip(text.policy, other.policy): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        assert list(ahead.writer.ahead) == ([step + 1] if step in (0, 2) else [])

def test_one_writing_serves_several_updates(make, monkeypatch):
    t, calls = make(write_ahead=2, scrg=False), []
    inner = t.writer.source.sample
    t.writer.source.sample = lambda prompts, *rest: calls.append(len(prompts)) or inner(prompts, *rest)
    t.fit()
    assert calls == [8, 8, 4] and t.progress.step == 5

def test_the_second_update_learns_from_an_older_student(make):
    "The first step of each batch of texts is as on-policy as any; the second one is what the student before the first would have written."
    usual, ahead, still = make(), make(write_ahead=2), make()
    first = usual.step(), ahead.step()
    assert plain([first[0]])[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    texts = [t.writer.draw(1)[1].pairs for t in (usual, ahead, still)]
    assert texts[1] == texts[2] != texts[0]

def test_a_resumed_run_goes_on_as_if_nothing_had_happened(make, tmp_path):
    more = dict(write_ahead=2, checkpoint_every=2)
    whole = make(tmp_path/"whole", **more)
    whole.fit()
    first = make(tmp_path/"first", **more)
    with pytest.raises(Interrupted): first.fit(interrupt_at(4))
    second = make(tmp_path/"first", **more)
    assert second.checkpoints.resume() == 2
    second.fit()
    assert plain(second.progress.log) == plain(whole.progress.log)

@pytest.mark.parametrize("more", [dict(sampling="mixed"), dict(sampling="off_policy"), dict(sampling="fixed", scrg=False), dict(checkpoint_every=3)], ids=str)
def test_what_cannot_be_written_ahead_is_refused(more):
    with pytest.raises(ConfigError, match="write_ahead: 2 with"): resolve(write_ahead=2, **more)

def test_runs_from_before_keep_their_digest(): assert resolve().digest == resolve(write_ahead=1).digest != resolve(write_ahead=2).digest
