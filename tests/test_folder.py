"""Names and folders of runs: two different runs never meet in one, and the same run finds its own."""
import json
from pathlib import Path
from typing import Literal, get_args, get_origin
import pytest
from hypothesis import assume, given, settings, strategies as st
from other_parameters import FIELDS, NEEDS, OTHER, bounds_of, with_needs
from mgsr_nb.parameters import DATA_NAMES, EVAL_SET_NAMES
from mgsr_nb.presets import METHODS, PRESETS
from mgsr_nb.config import BEFORE, ELSEWHERE, ONLY_WITH, ConfigError, RunConfig, resolve
from mgsr_nb.files import project_root
from mgsr_nb.run.folder import NO_PARAMETERS, finished, no_false_start, open_run, recorded_config, recorded_digests, run_folder, run_name

# --- its name

@pytest.mark.parametrize("name", FIELDS)
def test_the_digest_changes_with_what_is_computed_and_only_with_that(name):
    source = dict([ONLY_WITH[name]]) if name in ONLY_WITH else {}
    base, other = RunConfig(**source, **NEEDS.get(name, {})), RunConfig(**source, **with_needs(name))
    assert (base.digest == other.digest) == (name in ELSEWHERE)
    if name not in ELSEWHERE: assert run_name(base) != run_name(other)

@pytest.mark.parametrize("name", ONLY_WITH)
def test_what_only_another_run_would_need_makes_no_other_run(name):
    other, value = ONLY_WITH[name]
    for kind in get_args(FIELDS[other].annotation):
        base, changed = (resolve({other: kind}, scrg=False, **more) for more in ({}, {name: OTHER[name]}))
        assert (base.digest == changed.digest) == (run_name(base) == run_name(changed)) == (kind != value)

def allowed_values(name):
    "A strategy of allowed values of one field; names of models as they are on the hub, without characters that a folder cannot have."
    field, b = FIELDS[name], bounds_of(FIELDS[name])
    kinds = get_args(field.annotation) or (field.annotation,)
    if get_origin(field.annotation) is Literal: return st.sampled_from(kinds)
    if name in ("preset", "method"): return st.sampled_from(list(PRESETS if name == "preset" else METHODS))
    if name in ("teacher", "student"): return st.from_regex(r"[a-z0-9.-]{1,40}", fullmatch=True)
    if name == "data": return st.sampled_from([*DATA_NAMES, "a/b", "a/b:c"])
    if name == "eval_sets": return st.lists(st.sampled_from(EVAL_SET_NAMES), min_size=1, max_size=4)
    if name == "eval_seeds": return st.lists(st.integers(0, 99), min_size=1, max_size=5)
    if bool in kinds: return st.booleans()
    if int in kinds: return st.integers(b.get("ge", 0), b.get("le", 10**6))
    low, high = b.get("ge", b.get("gt", 0)), b.get("le", b.get("lt", 1e6))
    number = st.floats(low, high, exclude_min="gt" in b, exclude_max="lt" in b)
    return number | st.none() if type(None) in kinds else number

FREE = [n for n in FIELDS if n not in ("run_name", "runs_dir", "data_dir", "overwrite")]
some_parameters = st.lists(st.sampled_from(FREE), unique=True, max_size=8).flatmap(lambda names: st.fixed_dictionaries({n: allowed_values(n) for n in names}))

@settings(max_examples=300, deadline=None)
@given(first=some_parameters, change=some_parameters)
def test_different_configurations_never_share_a_name(first, change):
    try: a, b = resolve(first), resolve({**first, **change})
    except ConfigError: assume(False)
    if a.digest != b.digest: assert run_name(a) != run_name(b)
    elif (a.preset, a.method) == (b.preset, b.method): assert run_name(a) == run_name(b)
    for c in (a, b): assert len(run_name(c)) <= 120 and "/" not in run_name(c)

@pytest.mark.parametrize("a,b", [(dict(teacher="a/b"), dict(teacher="a_b")), (dict(teacher="x,student_layers=3"), dict(teacher="x", student_layers=3)),
                                 (dict(student="./a"), dict(student="._a")), (dict(eval_seeds="1,2"), dict(eval_seeds="1, 2"))])
def test_signs_that_a_folder_cannot_have_do_not_make_two_runs_one(a, b):
    assert run_name(resolve(a)) != run_name(resolve(b))

def test_names_can_be_read():
    assert run_name(resolve()) == "quickstart" and run_name(resolve(preset="gpt2-dolly")) == "gpt2-dolly"
    assert run_name(resolve(dac_weight=0.5, span_weight=1)) == "dac_weight=0.5" and run_name(resolve(preset="gpt2-dolly", seed=3)) == "gpt2-dolly,seed=3"
    assert run_name(resolve(run_name="mine", seed=3)) == "mine"

def test_long_names_end_with_the_digest():
    many = dict(list(OTHER.items())[20:40])
    names = [run_name(resolve({**many, "seed": s})) for s in (1, 2)]
    assert all(len(n) <= 120 for n in names) and names[0] != names[1] and names[0].endswith("+" + resolve({**many, "seed": 1}).digest[:8])

@settings(max_examples=200, deadline=None)
@given(name=st.text(alphabet="ab.=/\\~ \n\0", max_size=8) | st.text(max_size=8), teacher=st.text(max_size=8), root=st.just(Path("runs").resolve()))
def test_no_run_escapes_from_its_folder(name, teacher, root):
    try: named = resolve(run_name=name, teacher=teacher)
    except ConfigError: named = None
    if named: assert (root / run_name(named)).resolve().is_relative_to(root)
    try: unnamed = resolve(teacher=teacher)
    except ConfigError: return
    assert (root / run_name(unnamed)).resolve().parent == root

# --- the folder

def test_open_run_writes_the_configuration(tmp_path):
    c = resolve(runs_dir=str(tmp_path), dac_weight=0.5, data_dir=str(tmp_path), eval_sets="dolly")
    folder = open_run(c)
    record = json.loads((folder / "config.json").read_text())
    assert folder == tmp_path / "dac_weight=0.5,eval_sets=dolly" and record["dac_weight"] == 0.5 and record["digest"] == c.digest
    assert resolve({k: v for k, v in record.items() if k not in NO_PARAMETERS}).digest == c.digest
    assert str(tmp_path) not in (folder / "config.json").read_text()

def test_open_run_finds_its_own_and_refuses_another(tmp_path):
    make = lambda **kw: resolve(runs_dir=str(tmp_path), run_name="x", **kw)
    folder = open_run(make(seed=1))
    (folder / "metrics.json").write_text("{}")
    before = (folder / "config.json").read_bytes()
    assert open_run(make(seed=1)) == folder and finished(folder)
    with pytest.raises(ConfigError) as e: open_run(make(seed=2))
    assert str(e.value).startswith("run_name: ") and str(folder) in str(e.value) and make(seed=1).digest in str(e.value) and "overwrite" in str(e.value)
    assert (folder / "config.json").read_bytes() == before and finished(folder)

def test_a_run_from_before_prompts_were_shortened_does_not_pass_for_one_of_today(tmp_path):
    "It keeps its digest, is named by what it did, and can be gone on with by that name."
    make = lambda **kw: resolve(runs_dir=str(tmp_path), run_name="x", **kw)
    folder = open_run(make(shorten="beginning"))
    record = json.loads((folder/"config.json").read_text(encoding="utf-8"))
    assert record.pop("shorten") == BEFORE["shorten"] and record.pop("chat_date") == BEFORE["chat_date"]
    (folder/"config.json").write_text(json.dumps(record), encoding="utf-8")
    assert recorded_digests(folder) == [make(shorten="beginning").digest] != [make().digest]
    assert open_run(make(shorten="beginning")) == folder
    with pytest.raises(ConfigError, match="shorten 'beginning' there, 'middle' here"): open_run(make())

COMMITTED = Path(__file__).resolve().parents[1]/"runs"/"components"/"span"/"seed0"

@pytest.mark.skipif(not COMMITTED.is_dir(), reason="a clone without its runs")
def test_a_committed_run_keeps_its_digest():
    assert recorded_digests(COMMITTED) == ["364d519345a9d7b1", "6f00c20f371bef84"]
    assert recorded_config(COMMITTED).shorten == "beginning"

WRITTEN = dict(checkpoint_every=40, log_every=10, tracker="tensorboard")      # what of a run is written when

def test_when_something_is_written_makes_no_other_run(tmp_path):
    make = lambda **kw: resolve(runs_dir=str(tmp_path), seed=1, **kw)
    assert run_name(make(**WRITTEN)) == "seed=1" and open_run(make(**WRITTEN)) == open_run(make()) and make().digest == make(**WRITTEN).digest

def test_a_run_from_when_that_still_counted_is_recognised(tmp_path):
    "Its record says a digest that has it; the folder, and the digests that it is known by, are those of today."
    folder = open_run(resolve(runs_dir=str(tmp_path), run_name="x", **WRITTEN))
    record = json.loads((folder/"config.json").read_text(encoding="utf-8")) | {"digest": "0" * 16}
    (folder/"config.json").write_text(json.dumps(record), encoding="utf-8")
    today = resolve(runs_dir=str(tmp_path), run_name="x")
    assert recorded_digests(folder) == [today.digest] and open_run(today) == folder

# --- a file of data

def test_a_run_on_a_file_is_the_run_on_what_it_holds(tmp_path):
    files = [tmp_path/"a.jsonl", tmp_path/"b.jsonl"]
    for f in files: f.write_text("same", encoding="utf-8")
    make = lambda f, **kw: resolve(runs_dir=str(tmp_path/"runs"), data=str(f), **kw)
    first, copy = map(make, files)
    name = run_name(first)
    assert first.digest == copy.digest and name == f"data=a.jsonl+{first.digest[:8]}"
    folder = open_run(make(files[0], run_name="x"))
    assert open_run(make(files[1], run_name="x")) == folder and recorded_digests(folder) == [copy.digest]
    files[0].write_text("other", encoding="utf-8")
    assert run_name(make(files[0])) != name and recorded_digests(folder) == [copy.digest]
    with pytest.raises(ConfigError, match="a.jsonl held something else"): open_run(make(files[0], run_name="x"))
    files[0].unlink()       # the record can still be read
    assert recorded_digests(folder) == [copy.digest] and recorded_config(folder).data == str(files[0])
    with pytest.raises(ConfigError, match="a.jsonl': there is no such file"): make(files[0])

# --- a start that fails

@pytest.mark.parametrize("begun", [(), ("log.csv",)])
def test_a_failed_start_leaves_no_folder_and_a_begun_one_stays(tmp_path, begun):
    c = resolve(runs_dir=str(tmp_path/"runs"), run_name="suite/cell/seed0")
    (tmp_path/"runs"/"suite"/"other").mkdir(parents=True)
    open_run(c)
    for name in begun: (run_folder(c)/name).touch()
    with pytest.raises(MemoryError), no_false_start(c): raise MemoryError
    left = {p.relative_to(tmp_path/"runs"/"suite").as_posix() for p in (tmp_path/"runs"/"suite").rglob("*")}
    assert left == ({"other", "cell", "cell/seed0", "cell/seed0/config.json", "cell/seed0/log.csv"} if begun else {"other"})

def test_overwrite_takes_the_old_results_away(tmp_path):
    make = lambda **kw: resolve(runs_dir=str(tmp_path), run_name="x", **kw)
    folder = open_run(make(seed=1))
    for name in ("metrics.json", "log.csv", "samples.jsonl", "notes.txt"): (folder / name).write_text("{}")
    assert open_run(make(seed=2, overwrite=True)) == folder and not finished(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "notes.txt"] and json.loads((folder / "config.json").read_text())["seed"] == 2

def test_relative_runs_lie_at_the_projects_root(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir(); (tmp_path / "nbs/train.ipynb").touch()
    for place in (tmp_path, tmp_path / "nbs"):
        monkeypatch.chdir(place)
        assert project_root() == tmp_path and open_run(resolve(seed=1)) == tmp_path / "runs/seed=1"
    elsewhere = tmp_path.parent / (tmp_path.name + "-other"); elsewhere.mkdir()
    assert project_root(elsewhere) == elsewhere
