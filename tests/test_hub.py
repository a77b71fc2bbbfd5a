"""What leaves a run: the model card, in the hub's format; the upload, to a stand-in for the hub; student and teacher, asked
side by side."""
import json, os
import huggingface_hub, pytest
from huggingface_hub import EvalResult, ModelCard, constants
import hub_stand_in
from commands import command as call, flags
from user_files import lines, rows
from mgsr_nb.config import ConfigError, RunConfig, resolve
from mgsr_nb.run import chat
from mgsr_nb.run.card import command_of, interval, licence_of
from mgsr_nb.run.command import typed_parameters
from mgsr_nb.run.hub import check_push
from mgsr_nb.run.results import run

@pytest.fixture
def hub(monkeypatch):
    "The stand-in, as the hub of this process; the token is in the environment."
    server = hub_stand_in.start()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items(): monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    yield server
    server.stop()

# --- the card

@pytest.fixture
def carded(config, tmp_path):
    "A finished run on a file, with a seed: its configuration, its metrics, and its card as the hub's own loader reads it."
    (tmp_path/"mine.jsonl").write_bytes(lines(rows()))
    c = config(data=str(tmp_path/"mine.jsonl"), run_name="carded", seed=3, student="local", span_weight=0.0)
    metrics = run(c, cpu=True)
    return c, metrics, ModelCard.load(tmp_path/"runs"/"carded"/"student"/"README.md")

def test_the_card_is_one_that_the_hub_reads(carded, tmp_path):
    c, metrics, card = carded
    data, text = card.data, card.text
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "carded") and "mgsr" in data.tags
    [result] = data.eval_results
    assert isinstance(result, EvalResult) and (result.dataset_name, result.metric_name) == ("own", "ROUGE-L") and result.metric_value == round(metrics["student"]["test"]["own"]["rouge_l"], 2)
    # folders of this machine have no id on the hub
    assert data.base_model is None and data.datasets is None and str(tmp_path) not in str(card)
    assert "| NLL of the response | 1 |\n| DAC-KL | 1 |\n" in text and "span loss" not in text and "mine.jsonl, 16 training examples" in text
    assert all(f"| own | {who} |" in text for who in ("student", "student before", "teacher")) and " to " in text

def test_the_card_names_the_command_that_made_the_run(carded, tmp_path, monkeypatch):
    c, _, card = carded
    line = next(line for line in card.text.splitlines() if line.startswith("mgsr-run"))
    assert line == command_of(c) and "-p seed 3" in line and "-p data mine.jsonl" in line and "runs_dir" not in line
    monkeypatch.chdir(tmp_path)         # where the file is; the models are elsewhere
    import shlex
    again = resolve(typed_parameters(shlex.split(line)[1:]) | {"teacher": c.teacher, "student": c.student})
    assert again.digest == c.digest

def test_the_licence_is_that_of_the_base_and_left_out_if_nobody_names_one(tmp_path):
    assert licence_of("smollm2-135m") == "apache-2.0" and licence_of(str(tmp_path)) == "" == licence_of("lab-64x2")
    (tmp_path/"README.md").write_text("no YAML", encoding="utf-8")
    assert licence_of(str(tmp_path)) == "" and licence_of("no-such-owner/no-such-model") == ""

def test_intervals_hold_what_they_promise():
    "About 95 of 100 intervals of 60 draws hold the mean that they were drawn around; weights count."
    import numpy as np
    draws = np.random.default_rng(1)
    held = sum(low < 5 < high for low, high in (interval(draws.normal(5, 2, 60), np.ones(60)) for _ in range(100)))
    assert 88 <= held <= 99
    assert interval([0., 1.] * 9, [1., 0.] * 9) == (0., 0.) and interval([1.], [1.]) is None

# --- the upload

def test_a_run_uploads_its_student_to_a_private_repository(hub, config, tmp_path):
    c = config(run_name="up", push_to="me/mine", student="local")
    run(c, cpu=True)
    repo, student = hub.repos["me/mine"], tmp_path/"runs"/"up"/"student"
    assert repo["private"] is True and repo["files"] == {p.name: p.read_bytes() for p in student.iterdir()} and {"README.md", "model.safetensors", "config.json"} <= repo["files"].keys()
    assert resolve(**c.model_dump() | {"push_to": ""}).digest == c.digest
    before = len(hub.asked)
    run(c, cpu=True)                    # a finished run is uploaded again, not computed
    assert any(path.endswith("/commit/main") for _, path in hub.asked[before:])
    run(config(run_name="up", push_to="me/open", push_public=True, student="local"), cpu=True)
    assert hub.repos["me/open"]["private"] is False

def test_an_upload_that_fails_loses_nothing(hub, config, tmp_path):
    c = config(run_name="up", push_to="other/mine", student="local")
    with pytest.raises(ConfigError) as e: run(c, cpu=True)
    said = str(e.value)
    assert said.startswith("push_to: the upload to other/mine failed") and "rights" in said and "the run is finished" in said and hub_stand_in.TOKEN not in said
    assert {"metrics.json", "student"} <= {p.name for p in (tmp_path/"runs"/"up").iterdir()}

@pytest.mark.parametrize("token,offline,words", [
    ("", False, "there is no token in the environment variable HF_TOKEN"), ("hf_wrong", False, "does not know the token in HF_TOKEN"),
    (hub_stand_in.TOKEN, True, "switched off by HF_HUB_OFFLINE")])
def test_what_cannot_be_uploaded_is_refused_before_anything_is_made(hub, config, tmp_path, monkeypatch, token, offline, words):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ConfigError) as e: run(config(push_to="me/mine"), cpu=True)
    assert str(e.value).startswith("push_to: ") and words in str(e.value) and "hf_wrong" not in str(e.value)
    assert not hub.repos and not (tmp_path/"runs").exists() or not list((tmp_path/"runs").iterdir())

def test_a_hub_that_does_not_answer_is_a_sentence(hub, monkeypatch):
    hub.stop()
    with pytest.raises(ConfigError, match="^push_to: http://127.0.0.1:[0-9]+ does not know the token in HF_TOKEN, or cannot be reached"): check_push(resolve(push_to="me/mine"))

@pytest.mark.parametrize("name", ["mine", "me/my student", "a/b/c", "me/", "/mine", "me/mine.git", "https://huggingface.co/me/mine"])
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(ConfigError, match="^push_to: got "): resolve(push_to=name)

def test_the_token_is_written_nowhere(project):
    "Whole runs by `mgsr-run`: the notebook that it leaves, and everything beside it."
    server = hub_stand_in.start()
    env = project.env | {"HF_TOKEN": hub_stand_in.TOKEN, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = call(project, "mgsr-run", *flags(project.parameters), "-p", "run_name", "up", "-p", "push_to", "me/mine", env=env)
    server.stop()
    folder = project.root/"runs"/"up"
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"uploaded: {server.url}/me/mine/commit/" in (folder/"train.ipynb").read_text(encoding="utf-8") and server.repos["me/mine"]["private"]
    files = [p for p in project.root.rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if hub_stand_in.TOKEN.encode() in p.read_bytes()] and hub_stand_in.TOKEN not in done.stdout + done.stderr

# --- both asked

def test_student_and_teacher_answer_side_by_side(config, tmp_path, capsys):
    run(config(run_name="talk", student_layers=2), cpu=True)
    place = str(tmp_path/"runs"/"talk")
    folder, c = chat.chat_config(place)
    tokenizer, models = chat.load_both(folder, c)
    layers = {who: m.config.num_hidden_layers for who, m in models.items()}
    assert layers == {"student": 2, "teacher": 3}
    answers = chat.answers_of(models, tokenizer, c, "Say yes.", 5)
    assert answers == chat.answers_of(models, tokenizer, c, "Say yes.", 5) and answers.keys() == models.keys()
    drawn = {chat.answers_of(models, tokenizer, c, "Say yes.", 5, 1.0, seed)["student"] for seed in range(4)}
    assert len(drawn) > 1
    models["student"].generation_config.update(repetition_penalty=50., bad_words_ids=[[i] for i in range(5, 30)])
    assert chat.answers_of(models, tokenizer, c, "Say yes.", 5) == answers
    capsys.readouterr()
    chat.main([place, "Say yes.", "--tokens", "5"], load=lambda folder, config: (tokenizer, models))
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["student", "|", "teacher"] and chat.side_by_side(answers).splitlines() == said

def test_the_teacher_of_the_chat_is_the_tuned_one(config, tmp_path):
    "It is read from the cache where the run left it."
    import torch
    from mgsr_nb.models import load_model
    c = config(run_name="talk", teacher_sft_steps=1)
    run(c, cpu=True)
    _, models = chat.load_both(tmp_path/"runs"/"talk", c)
    raw = load_model(c.teacher).state_dict()
    assert any(not torch.equal(v, raw[k]) for k, v in models["teacher"].state_dict().items())

@pytest.mark.parametrize("made,words", [(lambda f: None, "there is no run"), (lambda f: (f/"student").mkdir(), "holds no student"), (lambda f: (f/"metrics.json").write_text("{}", encoding="utf-8"), "holds no student")])
def test_a_run_that_cannot_be_asked_is_a_sentence(tmp_path, capsys, made, words):
    from mgsr_nb.run.folder import open_run
    place = tmp_path/"x"
    if "no run" not in words: made(open_run(resolve(runs_dir=str(tmp_path), run_name="x")))
    with pytest.raises(SystemExit) as e: chat.main([str(place), "Hi"])
    assert e.value.code == 2 and words in capsys.readouterr().err
