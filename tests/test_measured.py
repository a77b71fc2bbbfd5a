"""The summary at the end of a test run: what tests measured, also of tests that failed or ran in another process, and what this run did not measure."""
import os, subprocess, sys
from pathlib import Path
import pytest

TESTS = Path(__file__).resolve().parent
MEASURING = '''
def test_measures(figure):
    figure("killed", "7 kills of 7")
def test_fails(figure):
    figure("two processes", "1e-3")
    assert False
'''

def pytest_run(folder, text, *more):
    (folder/"test_x.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *more, "test_x.py"], cwd=folder, env=env, capture_output=True, text=True).stdout

@pytest.mark.parametrize("more", [[], ["-n", "2"]], ids=["one process", "two"])
def test_figures_are_printed_in_their_order_with_what_is_missing(tmp_path, more):
    shown = pytest_run(tmp_path, MEASURING, *more)
    lines = [line for line in shown.splitlines() if line.split(":")[0] in ("killed", "two processes", "bad configurations", "pinned run")]
    assert lines == ["killed: 7 kills of 7", "two processes: 1e-3", "bad configurations: not measured in this run (tests/test_hostile.py)", "pinned run: not measured in this run (tests/test_pinned.py)"], shown

def test_without_figures_nothing_is_printed(tmp_path):
    assert "figures" not in pytest_run(tmp_path, "def test_nothing(): pass") and "1 passed" in pytest_run(tmp_path, "def test_nothing(): pass")
