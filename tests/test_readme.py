"""tests/README.md says which test pins which pitfall: from the markers, and up to date."""
import re
import pitfall_table as P

def test_the_table_is_current():
    text = (P.TESTS/"README.md").read_text(encoding="utf-8")
    assert P.with_table(text) == text, "run `python tests/pitfall_table.py`"

def test_every_pitfall_has_a_test():
    assert list(P.PITFALLS) == list(range(1, 47)) == sorted(P.tests_of())

def test_names_and_markers_agree():
    "A test that is named after a pitfall carries its number."
    for path in sorted(P.TESTS.glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        numbers = dict(P.marked(source))
        for name, n in re.findall(r"^def (test_pitfall_(\d+)_\w+)", source, re.M):
            assert int(n) in numbers.get(name, []), f"{path.name}: {name}"

def test_markers_are_found():
    source = "import pytest\n@pytest.mark.pitfall(3, 16)\n@pytest.mark.parametrize('a', [1])\ndef test_x(a): pass\n@pytest.mark.pitfall(2)\nclass T: pass\ndef test_y(): pass"
    assert P.marked(source) == [("test_x", [3, 16]), ("T", [2])]
