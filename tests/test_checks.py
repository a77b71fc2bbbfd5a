"What a run needs is checked before it costs: no refusal below comes after a step of tuning."
from copy import deepcopy
import pytest
from unfit_models import UNFIT
from mgsr_nb.config import ConfigError
from mgsr_nb.run import artefacts
from mgsr_nb.run.checks import check_model, check_tokenizer
from mgsr_nb.run.setup import prepare
from tiny_models import tiny_model
from toy_tokenizers import byte_level

@pytest.fixture
def untuned(monkeypatch):
    "Tuning, which must not begin."
    def begun(*args, **kw): raise AssertionError("something was tuned before the refusal")
    monkeypatch.setattr(artefacts, "fine_tune", begun)

@pytest.mark.parametrize("name", UNFIT)
def test_a_teacher_that_cannot_work_is_refused_before_it_is_tuned(name, config, untuned, tmp_path,
        monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    save, words = UNFIT[name]
    save(tmp_path/name)
    c = config("gpt2").model_copy(update={"teacher": str(tmp_path/name)})
    with pytest.raises(ConfigError, match=rf"^teacher: .*{words}"): prepare(c, cpu=True)

@pytest.mark.parametrize("name,kind", [("capped", "llama"), ("numbers", "gpt2")])
def test_a_student_that_cannot_work_is_refused_before_the_teacher_is_tuned(name, kind, config,
        untuned, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    save, words = UNFIT[name]
    save(tmp_path/name)
    c = config(kind, student=str(tmp_path/name))
    with pytest.raises(ConfigError, match=rf"^student: .*{words}"): prepare(c, cpu=True)

def test_a_chat_template_that_is_not_there_or_refuses_is_one_sentence(config, untuned, tmp_path,
        monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    c = config("gpt2", template="chat")
    with pytest.raises(ConfigError, match="^template: chat, but .* has no chat template"):
        prepare(c, cpu=True)
    tokenizer = deepcopy(byte_level())
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    with pytest.raises(ConfigError, match="^template: .*a system message first"):
        check_tokenizer(c, tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    check_tokenizer(c, tokenizer)

@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_models_that_work_pass(kind):
    tokenizer = byte_level(pad_is_eos=False)
    check_model(tiny_model(kind, vocab=len(tokenizer)), tokenizer, kind, "teacher")
    narrow = tiny_model(kind, vocab=len(tokenizer) - 1)
    with pytest.raises(ConfigError, match=f"^student: {kind} has an embedding of"):
        check_model(narrow, tokenizer, kind, "student")
