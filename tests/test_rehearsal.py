"The rehearsal: what it makes small, and what it leaves as it was."
import os, sys, warnings
from pathlib import Path
import pytest
from transformers.utils import logging as hf_logging
from mgsr_nb.config import ConfigError, RunConfig, resolve
from mgsr_nb.run import rehearsal as rehearsal_of
from mgsr_nb.run.blueprints import FAMILIES, architecture
from mgsr_nb.run.rehearsal import LIMITS, named, quietly, rehearsal, rehearse

def changed(config, small):
    return {n for n in RunConfig.model_fields if getattr(small, n) != getattr(config, n)}

def test_the_rehearsal_changes_what_makes_it_small_and_nothing_else():
    config = resolve(preset="llama2-dolly", method="mgsr_off_policy", scrg_corrections=3,
                     clip_reading="mass", micro_batch_size=16)
    small = rehearsal(config, "t", "s", Path("folder"))
    unbounded = {"run_name", "runs_dir", "teacher", "student", "data", "max_train_examples",
                 "threshold_start", "mixed_fraction", "buffer_size", "batch_size", "eval_sets",
                 "eval_prompts", "eval_seeds", "log_every", "shorten"}
    # the preset's own are not larger
    assert changed(config, small) == unbounded | set(LIMITS) - {"student_sft_steps", "warmup_steps"}
    assert (small.batch_size, small.micro_batch_size) == (4, 2)    # 32 in two parts of 16, small

def test_a_data_folder_is_kept(tmp_path):
    config = resolve(preset="gpt2-dolly", data_dir=str(tmp_path))
    small = rehearsal(config, "t", "s", tmp_path)
    assert (small.data, small.data_dir, small.eval_sets) == ("dolly", str(tmp_path), "auto")

def test_a_file_of_ones_own_is_read_and_nothing_is_uploaded(tmp_path):
    (tmp_path/"mine.jsonl").touch()
    data = str(tmp_path/"mine.jsonl")
    small = rehearsal(resolve(data=data, eval_sets="own,dolly", push_to="me/mine"), "t", "s", tmp_path)
    assert (small.data, small.eval_sets, small.push_to) == (data, "own", "")
    small = rehearsal(resolve(data="some/questions"), "t", "s", tmp_path)
    assert (small.data, small.eval_sets) == ("tiny", "tiny")

def test_what_was_there_before_is_there_after(monkeypatch, tmp_path):
    "The cache's variable and the progress bars, if the run fails; and the error names the model."
    seen = {}
    def run(config, cpu):
        seen.update(cache=os.environ["MGSR_CACHE"], bars=hf_logging.is_progress_bar_enabled())
        print("noise", file=sys.stderr)
        warnings.warn("noise")
        raise ConfigError(f"teacher: {config.teacher} has no head")
    monkeypatch.setattr(rehearsal_of, "run", run)
    monkeypatch.setenv("MGSR_CACHE", "mine")
    hf_logging.enable_progress_bar()
    config = resolve(preset="gpt2-dolly")
    with pytest.raises(ConfigError, match="^teacher: openai-community/gpt2-xl has no head$"):
        rehearse(config, architecture(config.teacher), None, FAMILIES["openai-community/gpt2"],
                 tmp_path)
    assert os.environ["MGSR_CACHE"] == "mine" and hf_logging.is_progress_bar_enabled()
    assert seen == dict(cache=str(tmp_path/"cache"), bars=False)

def test_quiet_is_quiet(capsys):
    with quietly(): print("noise", file=sys.stderr)
    print("a word", file=sys.stderr)
    assert capsys.readouterr().err == "a word\n"

def test_other_errors_pass_as_they_are():
    with pytest.raises(ValueError, match="^/tiny$"):
        with named({"/tiny": "real"}): raise ValueError("/tiny")
