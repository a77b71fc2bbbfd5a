"The chapters can be read: short paragraphs, short cells, and a picture of the idea before its first formula."
import re, statistics
from pathlib import Path
import nbformat, pytest

NBS = Path(__file__).resolve().parents[1]/'nbs'
WORDS, LINES, USUAL = 90, 25, 6
RESULTS = 'statistics', 'tables', 'figures', 'laboratory', 'findings', 'pages', 'overview'      # what the study found: pages with bounds of their own
def topic(path): return path.stem.split('_', 1)[1]
CHAPTERS = [p for p in sorted(NBS.glob('[0-9][0-9]*_*.ipynb')) if topic(p) not in RESULTS]
METHOD = [p for p in CHAPTERS if topic(p) in ('divergences', 'dac_kl', 'span', 'objective', 'sampling', 'scrg')]
SHORT = METHOD + [p for p in CHAPTERS if topic(p) == 'minillm']

def cells(path): return nbformat.read(path, 4).cells

def paragraphs(text):
    "Of Markdown: what a blank line or a bullet separates, without code and tables."
    for block in re.split(r'\n\s*\n', re.sub(r'(?s)```.*?```', '', text)):
        if not block.lstrip().startswith('|'): yield from re.split(r'\n(?=\s*(?:[-*]|\d+\.) )', block)

def words(paragraph):
    "How many; a formula is one."
    return len(re.sub(r'(?s)\$\$.*?\$\$|\$[^$]*\$', 'x', paragraph).split())

def lines(cell): return [line for line in cell.source.split('\n') if line.strip() and not line.startswith('#|')]

def shown(cell): return cell.cell_type == 'code' and not re.match(r'#\|\s*(hide|echo: false|export|default_exp)\b', cell.source)

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_no_paragraph_is_long(path):
    assert [p[:60] for c in cells(path) if c.cell_type == 'markdown' for p in paragraphs(c.source) if words(p) > WORDS] == []

@pytest.mark.parametrize('path', SHORT, ids=lambda p: p.stem)
def test_no_cell_is_long_and_the_usual_one_is_short(path):
    assert [c.source[:60] for c in cells(path) if c.cell_type == 'code' and len(c.source.split('\n')) > LINES] == []
    assert statistics.median(len(lines(c)) for c in cells(path) if shown(c)) <= USUAL

@pytest.mark.parametrize('path', METHOD, ids=lambda p: p.stem)
def test_a_picture_of_a_real_example_comes_before_the_first_formula(path):
    found = cells(path)
    picture = next(i for i, c in enumerate(found) if c.cell_type == 'code' and any({'image/png', 'text/html'} & set(o.get('data', {})) for o in c.outputs))
    formula = next((i for i, c in enumerate(found) if c.cell_type == 'markdown' and '$$' in c.source), len(found))
    assert picture < formula
    assert re.search(r'Path\("(explorer|\.\./runs/examples)/', found[picture].source), 'stored predictions or a committed run'
    assert found[picture].source.startswith('#| echo: false')      # the picture, not its code
    assert found[picture + 1].cell_type == 'markdown'              # what is seen

def test_the_bounds_can_be_missed():
    assert len(METHOD) == 6
    cell = nbformat.v4.new_code_cell
    long = '\n'.join(f'x{i} = {i}' for i in range(LINES + 1))
    assert words('one $a + b$ two\n$$ c + d $$') == 4 and list(paragraphs('a b\n- c\n- d\n\n| t |\n\n```\ncode\n```'))[:3] == ['a b', '- c', '- d']
    assert len(lines(cell(f'#| fig-alt: "x"\n{long}'))) == LINES + 1 and shown(cell(long)) and not shown(cell(f'#| hide\n{long}'))
