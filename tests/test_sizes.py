"The bounds that keep the code readable on the documentation page: tools/sizes.py, and ruff's few rules."
import json, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import sizes

@pytest.mark.parametrize('path', sizes.modules(), ids=lambda p: p.relative_to(ROOT/'mgsr_nb').as_posix())
def test_modules_classes_and_functions_are_within_their_bounds(path): assert sizes.too_long(path) == []

@pytest.mark.parametrize('path', sizes.notebooks(), ids=lambda p: p.stem)
def test_lines_that_are_exported_or_shown_fit_the_page(path): assert sizes.wide_lines(path) == []

def test_no_unused_names_and_no_joined_statements(): assert sizes.lint() == []

def test_the_check_finds_what_is_over_a_bound(tmp_path):
    body = '\n'.join(['    x = 1'] * 40)
    (tmp_path/'m.py').write_text(f'@decorated\ndef f():\n{body}\n\nclass C:\n' + '\n'.join(['    y = 1'] * 149) + '\n')
    assert [row[:2] for row in sizes.too_long(tmp_path/'m.py')] == [('m.py:f', 42)]
    (tmp_path/'m.py').write_text('x = 1\n' * 301)
    assert sizes.too_long(tmp_path/'m.py') == [('m.py', 301, 300)]
    shown, hidden = 'y = ' + '1' * 97, '#| hide\nz = ' + '1' * 97
    cells = [{'cell_type': 'code', 'id': i, 'source': [s]} for i, s in (('a', shown), ('b', hidden), ('c', 'x = ' + '1' * 96))]
    (tmp_path/'n.ipynb').write_text(json.dumps({'cells': cells}))
    assert sizes.wide_lines(tmp_path/'n.ipynb') == [('n.ipynb a', shown)]
