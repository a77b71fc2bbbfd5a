"""Files: written whole or not at all."""
import json, math, os, signal, subprocess, sys
import pytest
from mgsr_nb import files
from mgsr_nb.files import write_atomic, write_csv, write_json

@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "new/metrics.json"
    write_atomic(path, "old")
    def fail(*a): raise OSError("disk full")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"): write_atomic(path, "new" * 1000)
    assert path.read_text() == "old"

def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "log.csv"
    write_atomic(path, "old")
    code = ("import os, signal, sys\nfrom mgsr_nb.files import write_atomic\nos.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_atomic(sys.argv[1], 'new' * 1000)")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomic(path, "ünïcödé\n")
    assert path.read_bytes() == "ünïcödé\n".encode()

@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1, {"b": -math.inf}]}])
def test_json_refuses_what_it_cannot_say(tmp_path, value):
    write_json(tmp_path / "m.json", {"loss": 1})
    with pytest.raises(ValueError): write_json(tmp_path / "m.json", value)
    assert json.loads((tmp_path / "m.json").read_text()) == {"loss": 1} and os.listdir(tmp_path) == ["m.json"]

def test_csv_has_the_union_of_the_columns(tmp_path):
    write_csv(tmp_path / "log.csv", [{"step": 1, "a": 0.5}, {"step": 2, "b": "x,y"}])
    assert (tmp_path / "log.csv").read_text() == 'step,a,b\n1,0.5,\n2,,"x,y"\n'

def test_a_cache_has_one_name_and_another_cache_another(tmp_path, monkeypatch):
    names = []
    for folder in ('one', 'one', 'other'):
        monkeypatch.setenv('MGSR_CACHE', str(tmp_path/folder))
        names.append(files.cache_id())
    assert names[0] == names[1] != names[2] and len(names[0]) == 32
    (tmp_path/'file').write_text('', encoding='utf-8')
    monkeypatch.setenv('MGSR_CACHE', str(tmp_path/'file'))
    assert files.cache_id() == ''
