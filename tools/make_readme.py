"""README.md from nbs/index.ipynb, by nbconvert's markdown exporter.

    python tools/make_readme.py            writes README.md and the figures nbs/images/index_*.png
    python tools/make_readme.py --check    writes nothing; status 1 if they differ from that

Links of the notebook are relative to nbs/. In the README, which lies one folder above, they get
`nbs/` in front, so that images and links work in both places.
"""
import posixpath, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NB_DIR = 'nbs'
MARK = '<!-- Made from nbs/index.ipynb by `make readme`. Edit the notebook, not this file. -->\n\n'
DIRECTIVE = re.compile(r'^#\|\s*(.*?)\s*$', re.M)
FENCE = re.compile(r'(^```.*?^```[^\n]*$|`[^`\n]+`)', re.M | re.S)
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')
STYLE = re.compile(r'<style.*?</style>\s*', re.S)
ALT = re.compile(r'^fig-alt:\s*"(.*)"$', re.M)


def from_root(target):
    "A link relative to nbs/, seen from the root; web addresses, anchors and absolute paths stay."
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.I): return target
    return posixpath.normpath(posixpath.join(NB_DIR, target))


def move_links(markdown):
    "Rewrite the links of a markdown text, code excepted."
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: m[1] + from_root(m[2]), part) for part in parts[::2]]
    return ''.join(parts)


def prepare(cell):
    "Apply nbdev's directives to one cell; None when the reader is not to see it."
    if cell.cell_type == 'raw': return None        # front matter
    if cell.cell_type == 'markdown':
        cell.source = move_links(cell.source)
        cell.pop('attachments', None)
        return cell
    directives = DIRECTIVE.findall(cell.source)
    if any(d.split(':')[0].split()[:1] == ['hide'] for d in directives): return None
    cell.source = DIRECTIVE.sub('', cell.source).strip('\n')
    said = '\n'.join(directives)
    if alt := ALT.search(said): cell.metadata['alt'] = alt[1]
    if re.search(r'^echo:\s*false', said, re.M):
        cell.metadata['transient'] = {'remove_source': True}
    for out in cell.outputs:
        data = out.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = move_links(data['text/markdown'])
        html = data.get('text/html')
        # GitHub prints the text of a <style> element
        if html: data['text/html'] = STYLE.sub('', html)
    return cell


def alternatives(nb):
    "The text alternative of each picture, in order; nbconvert names every picture by its kind."
    return [c.metadata.get('alt', 'png') for c in nb.cells for out in c.get('outputs', [])
            if 'image/png' in out.get('data', {})]


def render(notebook):
    "The README's text and the figures {path from the root: bytes}."
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}   # nbdev-clean drops it; it marks the code
    nb.cells = [c for c in map(prepare, nb.cells) if c is not None]
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    where = {'unique_key': 'index', 'output_files_dir': f'{NB_DIR}/images'}
    text, resources = exporter.from_notebook_node(nb, resources=where)
    alts = iter(alternatives(nb))
    text = re.sub(r'!\[png\]', lambda m: f'![{next(alts)}]', text)
    text = '\n'.join(line.rstrip() for line in text.splitlines())
    text = re.sub(r'\n{3,}', '\n\n', text).strip()
    return MARK + text + '\n', dict(resources.get('outputs') or {})


def differing(wanted):
    "Names of what is not as it is wanted, and figures that nothing wants."
    stale = [name for name, data in wanted.items()
             if not (ROOT/name).exists() or (ROOT/name).read_bytes() != data]
    figures = (ROOT/NB_DIR/'images').glob('index_*.png')
    return stale, [p for p in figures if p.relative_to(ROOT).as_posix() not in wanted]


def main(check):
    text, figures = render(ROOT/NB_DIR/'index.ipynb')
    wanted = {'README.md': text.encode('utf-8'), **figures}
    stale, orphans = differing(wanted)
    if check:
        for name in [*stale, *orphans]:
            print(f'{name} differs from nbs/index.ipynb; run `make readme`', file=sys.stderr)
        return 1 if stale or orphans else 0
    for path in orphans: path.unlink()
    for name in stale:
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/name).write_bytes(wanted[name])
    print('README.md: ' + (', '.join(stale) + ' written' if stale else 'up to date'))
    return 0


if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
