"""What the laboratory says of each part of the method, written into the part's chapter from the runs: text, table, and curves.

    python tools/chapters.py            writes a cell of the chapters in nbs/ and the figures nbs/images/lab_*.png
    python tools/chapters.py --check    writes nothing; status 1 if a text differs from that
"""
import sys
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NB_DIR = ROOT/'nbs'
ID = 'in-the-laboratory'
TITLE = '## In the laboratory\n\n<!-- made from the runs by `make report` -->'
CHAPTERS = {'13_divergences': ('divergences', 'alpha_beta'), '14_dac_kl': ('fixed_clipping', 'readings', 'dac_parts', 'f_sub'), '15_span': ('spans',),
            '16_objective': ('longer', 'small', 'loss_weights', 'components'), '19_sampling': ('sampling',), '20_scrg': ('corrections',), '21_minillm': ('baselines', 'relatives')}
NOTHING = 'Too few runs yet: {}. What the real pair says after its first steps is on [the page of all tables](details.ipynb).'


def image_of(suite): return f'images/lab_{suite}.png'


def text_of(suites, lab, findings):
    "The cell of a chapter."
    from mgsr_nb.study.pages import chapter_markdown
    found = {suite: chapter_markdown(lab, findings, suite, image_of(suite)) for suite in suites}
    missing = [f'`{suite}`' for suite, text in found.items() if not text]
    return '\n\n'.join([TITLE, *filter(None, found.values()), *([NOTHING.format(', '.join(missing))] if missing else [])])


def place(nb):
    "The cell, made where it is missing: before the exercises, or at the end."
    cells = nb.cells
    for cell in cells:
        if cell.id == ID: return cell
    before = [i for i, c in enumerate(cells) if c.source.startswith('## Exercises')] or [len(cells) - 1]
    cells.insert(before[0], nbformat.v4.new_markdown_cell(id=ID))
    return cells[before[0]]


def main(args):
    from mgsr_nb.study.findings import read_findings
    from mgsr_nb.study.laboratory import read_lab
    from mgsr_nb.study.pages import chapter_figure
    from mgsr_nb.study.figures import small_png
    lab, findings, stale, shown = read_lab(ROOT/'runs'), read_findings(ROOT/'runs'), [], []
    for name, suites in CHAPTERS.items():
        path = NB_DIR/f'{name}.ipynb'
        nb = nbformat.read(path, as_version=4)
        cell, text = place(nb), text_of(suites, lab, findings)
        shown += [suite for suite in suites if image_of(suite) in text]
        if cell.source == text: continue
        stale.append(path.name)
        cell.source = text
        if '--check' not in args: nbformat.write(nb, path)
    if '--check' in args: return print('made from other runs:', *stale) or 1 if stale else 0
    for image in NB_DIR.glob(image_of('*')): image.unlink()
    for suite in shown: (NB_DIR/image_of(suite)).write_bytes(small_png(chapter_figure(lab, suite)))
    print('chapters:', *(stale or ['up to date']))


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
