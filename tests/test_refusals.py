"""What a user can get wrong around a run, in one list: each ends `mgsr-run` with status 2 and a
sentence that begins with the name of what to change, and no traceback; models that are unfit are
tried without the command, which says of all of them what it says of the last."""
import os, subprocess, sys
from pathlib import Path
import pytest
from mgsr_nb.config import ConfigError, resolve
from mgsr_nb.run.results import run
from tiny_runs import tiny_parameters
from unfit_models import UNFIT

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent

@pytest.fixture(scope="module")
def place(tmp_path_factory, local_models):
    return tmp_path_factory.mktemp("refusals"), local_models["gpt2"][0]

def unfit(name):
    def change(root, parameters, env):
        UNFIT[name][0](root/name)
        parameters["teacher"] = str(root/name)
    return change

def cache(root, parameters, env):
    (root/"file").write_text("", encoding="utf-8")
    env["MGSR_CACHE"] = str(root/"file")

def homeless(root, parameters, env):
    "No home folder and no MGSR_CACHE; in a container the user has no entry either."
    (root/"usercustomize").mkdir(exist_ok=True)
    (root/"usercustomize"/"sitecustomize.py").write_text("import pwd\n"
        "def none(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = none\n", encoding="utf-8")
    env["PYTHONPATH"] = os.pathsep.join([str(root/"usercustomize"), env["PYTHONPATH"]])
    for name in ("HOME", "MGSR_CACHE", "XDG_CACHE_HOME"): env.pop(name, None)

def runs(root, parameters, env):
    (root/"runs-file").write_text("", encoding="utf-8")
    parameters["runs_dir"] = str(root/"runs-file")

# what is wrong -> (how to make it so, how the sentence begins, a part of it)
*OTHERS, LAST = UNFIT
CASES = {LAST: (unfit(LAST), "teacher: ", UNFIT[LAST][1]),
    "cache": (cache, "MGSR_CACHE: ", "cannot be written"),
    "home": (homeless, "HOME: ", "no home folder"),
    "runs": (runs, "runs_dir: ", "cannot be written")}

@pytest.mark.parametrize("name", OTHERS)
def test_an_unfit_teacher_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", str(tmp_path/"cache"))
    UNFIT[name][0](tmp_path/name)
    with pytest.raises(ConfigError, match="^teacher: .*") as said:
        run(resolve(tiny_parameters(tmp_path/"runs", str(tmp_path/name))), cpu=True)
    assert UNFIT[name][1] in str(said.value)

def test_a_cache_that_nobody_can_make_is_one_sentence(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MGSR_CACHE", "/proc/no-such-place")
    with pytest.raises(ConfigError, match=r"^MGSR_CACHE: the cache /proc/no-such-place cannot be written \(\[Errno 2\] No such file or directory"):
        run(resolve(tiny_parameters(tmp_path/"runs", place[1])), cpu=True)

@pytest.mark.parametrize("name", CASES)
def test_it_ends_with_status_2_and_one_sentence(name, place):
    change, begin, words = CASES[name]
    root, teacher = place
    parameters = tiny_parameters(root/"runs", teacher, run_name=name)
    env = {**os.environ, "MGSR_CACHE": str(root/"cache"), "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(root/"ipython"), "JUPYTER_PLATFORM_DIRS": "1",
        "MPLCONFIGDIR": str(root/"mpl"), "PYTHONWARNINGS": "ignore"}
    change(root, parameters, env)
    flags = [w for n, v in parameters.items() for w in ("-p", n, str(v))]
    done = subprocess.run([str(BIN/"mgsr-run"), *flags], capture_output=True, text=True, cwd=ROOT,
        env=env, stdin=subprocess.DEVNULL, timeout=170)
    said = done.stderr.split("mgsr-run: ")[-1]
    assert done.returncode == 2, done.stderr[-2000:]
    assert said.startswith(begin) and words in said and "Traceback" not in said
