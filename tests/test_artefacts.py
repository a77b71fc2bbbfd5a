"The cache of what is made once: shared with somebody else, or not usable at all."
import os, stat, subprocess, sys
from pathlib import Path
import pytest
from mgsr_nb.config import ConfigError
from mgsr_nb.files import VERIFIED, artefact, write_json
from mgsr_nb.run.artefacts import made_once

ROOT = Path(__file__).resolve().parents[1]

def make(folder): write_json(folder/"numbers.json", [1, 2])

def test_a_whole_artefact_is_read_without_the_lock(tmp_path, monkeypatch):
    "So that the cache of another user, in which no lock can be made, is of use."
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path))
    folder = artefact("a", {"x": 1}, make)
    VERIFIED.discard(folder)
    Path(f"{folder}.lock").unlink(missing_ok=True)
    Path(f"{folder}.lock").mkdir()        # what cannot be locked
    assert artefact("a", {"x": 1}, make) == folder == made_once("a", {"x": 1}, make)
    (folder/"numbers.json").write_text("[]", encoding="utf-8")
    VERIFIED.discard(folder)
    with pytest.raises(ConfigError, match="MGSR_CACHE"): artefact("a", {"x": 1}, make)

@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_cannot_be_written_names_the_variable(place, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("", encoding="utf-8")
    cache = tmp_path/"file"/("" if place == "a file" else "below")
    monkeypatch.setenv("MGSR_CACHE", str(cache))
    with pytest.raises(ConfigError, match="^MGSR_CACHE: the cache .* cannot be written"):
        artefact("a", {"x": 1}, make)

def test_an_error_of_what_makes_it_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path))
    def missing(folder): raise FileNotFoundError("weights")
    for _ in range(2):          # and the lock is free again
        with pytest.raises(FileNotFoundError, match="weights"): artefact("a", {"x": 1}, missing)
    assert artefact("a", {"x": 1}, make).is_dir()

@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_without_the_right_to_write_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    folder = artefact("a", {"x": 1}, make)
    VERIFIED.discard(folder)
    for p in (folder, folder.parent, tmp_path/"cache"): p.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert artefact("a", {"x": 1}, make) == folder
        with pytest.raises(ConfigError, match="^MGSR_CACHE"): artefact("a", {"x": 2}, make)
    finally:
        for p in (tmp_path/"cache", folder.parent, folder): p.chmod(stat.S_IRWXU)

def test_no_home_names_the_variable(tmp_path):
    script = ("import os, pwd\n"
        "def none(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = none\n"
        "from mgsr_nb.files import cache_dir\n"
        "try: print(cache_dir())\n"
        "except ValueError as e: print(e)\n")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "MGSR_CACHE", "XDG_CACHE_HOME")}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
        cwd=tmp_path, env=env)
    assert done.stdout.startswith("MGSR_CACHE: this user has no home folder"), done
    assert not list(tmp_path.iterdir())
