"""Build the documentation site from the notebooks and their stored outputs: offline, for file:// and any static host.

nbdev processes the notebooks and asks the library for signatures and docstrings; no cell is executed. smalldocs lays out the pages, KaTeX (in
tools/katex, as its authors publish it) renders the formulas: now, if there is a Node to run it, else in the reader's browser.
Run it with `make docs`, or `python tools/docs.py --out FOLDER`.
"""
import argparse, ast, html, importlib, json, os, re, shutil, subprocess, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KATEX = ROOT/'tools'/'katex'
GROUPS = {'Start here': ['index', 'report', 'explorer', 'explorer_divergences', 'explorer_scrg', 'explorer_step'],
          'The method': [], 'A run': [], 'A study': [],           # the numbered notebooks, see `part`
          'Run it': ['usage', 'train', 'troubleshooting'],
          'Look it up': ['details', 'equations', 'api']}
NUMBERED = re.compile(r'(\d\d[a-z]?)_')
# options of _quarto.yml and of nbdev that smalldocs leaves alone; output-file is read by us
QUARTO_ONLY = re.compile(r'key format-links|format commonmark|keep-md|output-file')
OWN_LINK = re.compile(r'\[`([^`]+)`\]\((/\w+\.html)#([\w.]+)\)')
# without a server a page may not read search.json: the same index comes as a script
# and once formulas have their height, the place that was asked for lies elsewhere
HEADER = '''<script>
addEventListener("load", () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView({behavior: "instant"}));
if (location.protocol === "file:") {
  const fetched = window.fetch;
  window.fetch = url => !String(url).endsWith("search.json") ? fetched(url) : new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = String(url).replace(/search\\.json$/, "search.js");
    script.onload = () => resolve(new Response(window.searchIndex)); script.onerror = reject;
    document.head.append(script);
  });
}
</script>'''


# ---- what nbdev does with a notebook

def equations(nbs):
    "{qualified name of a function or class: numbers of the equations that it is}, from the one table in nbs/equations.json."
    found = {}
    for row in json.loads((Path(nbs)/'equations.json').read_text(encoding='utf-8')):
        for symbol in row['symbols']: found.setdefault(symbol, []).extend(row['numbers'])
    return found

def taught(notebook):
    "Names that the `#| exports` cells of a notebook define: their source is shown."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return {name for s in sources if s.startswith('#| exports') for name in re.findall(r'(?m)^(?:def|class) (\w+)', s)}

def processors(nbs):
    "nbdev's processors, with changes: no cell is executed, plumbing (`#| export`) is folded and not removed, equations are linked."
    from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs, mv_exports, rm_export
    from nbdev.process import Processor
    numbers = equations(nbs)

    class show_library(exec_show_docs):
        "`show_doc` of the names in the exported module, instead of executing the cells that define them."
        def begin(self):
            super().begin()
            self.nb.module_ = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in (c.get('directives_') or {})), None)
            if self.nb.module_: self.k.user_ns.update(vars(importlib.import_module(f'mgsr_nb.{self.nb.module_}')))
        def __call__(self, cell):
            if re.match(r'(#\|.*\n)*show_doc\(', cell.source or ''): super().__call__(cell)

    class in_order(Processor):
        "Documentation of a cell's functions in the order of the cell, which nbdev reverses. What `#| exports` teaches stands behind its names."
        def begin(self):
            cells, start = self.nb.cells, 0
            while start < len(cells):
                stop = start
                while stop < len(cells) and getattr(cells[stop], 'has_sd', False): stop += 1
                cells[start:stop] = reversed(cells[start:stop])
                if stop > start and 'exports' in cells[start - 1].directives_: cells.insert(stop - 1, cells.pop(start - 1))
                start = stop + 1

    def fold_export(cell):
        if cell.cell_type != 'code' or 'export' not in cell.directives_ or 'hide' in cell.directives_: return rm_export(cell)
        defines = any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in cell.parsed_() or [])
        if not defines: return rm_export(cell)
        cell.source = f'#| code-fold: true\n#| code-summary: "Source"\n{cell.source}'

    def documented(link):
        "nbdev links every name in backticks: one of a method leads to its class, and a private name, which has no documentation, nowhere."
        name, page, place = link.groups()
        return f'`{name}`' if place.startswith('_') else f"[`{name}`]({page}#{place.split('.')[0]})"

    class tidy_docs(Processor):
        """Under the heading of a function that is an equation: a link to the table. No link to a source on a host that is not known.
        The signature is folded under the source, which begins with it; where the source stands open, so is the docstring."""
        def begin(self): self.taught = taught(Path(nbs)/Path(self.nb.path_).name)
        def cell(self, cell):
            if cell.cell_type == 'markdown': cell.source = OWN_LINK.sub(documented, cell.source)
            name = re.search(r'^show_doc\((\w+)\)', cell.source or '', re.M)
            eqs = numbers.get(f'mgsr_nb.{self.nb.module_}.{name[1]}', []) if name else []
            links = ', '.join(f'[Eq. {n}](equations.ipynb#eq-{n})' for n in eqs)
            for data in (out.get('data', {}) for out in cell.get('outputs', []) if name):
                text = re.sub(r'(?m)^\[source\]\(/.*\n+', '', ''.join(data.get('text/markdown', '')))
                if name[1] in self.taught and (heading := re.search(r'(?m)^#+ .*$', text)): text = heading[0] + '\n'
                text = re.sub(r'(?s)\n```python.*?```\n', '', text)
                text = re.sub(r'(?m)^\*(.+)\*$', r'\1', text, count=1)       # of a paragraph, nbdev slants the first line only
                if eqs: text = re.sub(r'(?m)^(#+ .*)$', rf'\1\n\nPaper: {links}', text, count=1)
                if text: data['text/markdown'] = OWN_LINK.sub(documented, text)

    def still(cell):
        "A widget without its kernel is nothing to look at: its picture and its line of text stay. Progress bars go."
        if cell.cell_type == 'code':
            outputs = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr']
            for o in outputs: o.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
            cell.outputs = [o for o in outputs if o.get('data', True)]

    def in_words(cell):
        "A picture that was displayed with its text alternative keeps it; one that a cell draws takes the cell's `fig-alt`."
        for o in cell.get('outputs', []):
            alt = o.get('metadata', {}).get('image/png', {}).get('alt')
            if alt: o['data'] = {'text/html': f'<img src="data:image/png;base64,{"".join(o["data"]["image/png"]).strip()}" class="img-fluid" alt="{html.escape(alt)}">'}

    class Chapters(FilterDefaults):
        def base_procs(self):
            ours = {add_show_docs: [add_show_docs, in_order], mv_exports: [], rm_export: [fold_export], exec_show_docs: [show_library]}
            return [q for p in super().base_procs() for q in ours.get(p, [p])] + [tidy_docs, still, in_words]
    return Chapters

def processed(nbs, workers=0):
    "Folder of the processed notebooks."
    import nbdev.serve
    nbdev.serve.FilterDefaults = processors(nbs)
    os.environ['MPLBACKEND'] = 'agg'
    return nbdev.serve.proc_nbs(n_workers=workers, force=True)


# ---- pages that no notebook holds

def title_of(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return next((m[1] for c in cells if c['cell_type'] == 'markdown' for m in [re.search(r'^# (.+)$', ''.join(c['source']), re.M)] if m), notebook.stem)

def part(notebook):
    "The part of the book that a numbered notebook belongs to, by the module that it makes."
    module = re.search(r'default_exp (\w+)(\.?)', notebook.read_text(encoding='utf-8'))
    return {'run.': 'A run', 'study.': 'A study'}.get(module and module[1] + module[2], 'The method')

def sidebar(nbs):
    "The notebooks in reading order, as `website.sidebar.contents`."
    names = sorted(p.stem for p in nbs.glob('*.ipynb'))
    groups = {title: list(stems) for title, stems in GROUPS.items()}
    for name in filter(NUMBERED.match, names): groups[part(nbs/f'{name}.ipynb')].append(name)
    listed = {n for stems in groups.values() for n in stems}
    groups['Look it up'] += [n for n in names if n not in listed]
    def entry(stem):
        if stem == 'api': return {'href': 'api.md', 'text': 'API reference'}
        number = NUMBERED.match(stem)
        title = 'Overview' if stem == 'index' else title_of(nbs/f'{stem}.ipynb').split(':')[0]
        return {'href': f'{stem}.ipynb', 'text': f'{number[1]} {title}' if number else title}
    return [{'section': title, 'contents': [entry(s) for s in stems if s == 'api' or s in names]} for title, stems in groups.items()]

def first_line(node): return (ast.get_docstring(node) or '').split('\n')[0]

def in_table(text):
    "Plain text as Markdown in a table: only `code` stays what it is."
    parts = [part if i % 2 else re.sub(r'([*_<\[$])', r'\\\1', part) for i, part in enumerate(text.split('`'))]
    return '`'.join(parts).replace('|', '\\|')

def api(nbs, lib):
    "Markdown of the index of everything exported, with the first line of each docstring."
    lines = ['---', 'title: API reference', 'description: Everything that the notebooks export, with the first line of its docstring. Each name leads to its signature, shapes and source.', '---', '']
    for notebook in sorted(p for p in nbs.glob('*.ipynb') if NUMBERED.match(p.stem)):
        module = re.search(r'#\|\s*default_exp ([\w.]+)', notebook.read_text(encoding='utf-8'))
        if not module: continue
        tree = ast.parse((lib/f"{module[1].replace('.', '/')}.py").read_text(encoding='utf-8'))
        nodes = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
        lines += [f'## {module[1]}', '', f'[{title_of(notebook)}]({notebook.name})', '', '| name | |', '|---|---|']
        lines += [f'| [`{n.name}`]({notebook.name}#{n.name.lower()}) | {in_table(first_line(n))} |' for n in nodes] + ['']
    return '\n'.join(lines)


# ---- the site

def site(source, out):
    "smalldocs' site of the processed notebooks: local KaTeX, nbdev's page names, the search index for file://."
    from smalldocs import layout
    from smalldocs.config import load
    from smalldocs.site import Site
    layout.KATEX = 'site_libs/katex'      # all pages lie in one folder

    class Pages(Site):
        def read(self, src):
            page = super().read(src)
            if name := page.front.get('output-file'): page.out = page.out.with_name(name)
            return page
        def find_page(self, target):
            return super().find_page(target) or next((p for p in self.pages.values() if p.out == target), None)

    project = load(source)
    website = project.config['website']
    website.pop('site-url', None)         # no sitemap for a host that is not known
    website.update({'page-navigation': True, 'back-to-top-navigation': True})
    website['sidebar'] = {**website.get('sidebar', {}), 'contents': sidebar(ROOT/'nbs')}
    project.config['format']['html']['include-in-header'] = [{'text': HEADER}]
    built = Pages(project, quiet=True)
    built.out = out
    built.build()
    owners = {}
    for page in built.pages.values():
        if (other := owners.setdefault(page.out, page.src)) != page.src: raise SystemExit(f'{other} and {page.src} both become {page.out}: rename one, nbdev leaves the number of a notebook out')
    return built

FORMULA = re.compile(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]](</span>)', re.S)
KATEX_SCRIPT = re.compile(r'<script src="site_libs/katex/[^"]*" defer(?:="")?></script>')
NODE = '''const katex = require(process.argv[1]);
const asked = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(asked.map(([tex, displayMode]) => katex.renderToString(tex, {displayMode, throwOnError: false}))));'''

def rendered(pages, node=None):
    "{page: its text with the formulas rendered}, so that a reader does not see them grow; the texts as they are if there is no Node."
    node = node or shutil.which('node')
    if not node: return pages
    asked = sorted({(html.unescape(m[3]), m[2] == 'display') for text in pages.values() for m in FORMULA.finditer(text)})
    done = subprocess.run([node, '-e', NODE, str(KATEX/'katex.min.js')], input=json.dumps(asked), capture_output=True, text=True, check=True)
    made = dict(zip(asked, json.loads(done.stdout)))
    def one(m): return m[1] + made[html.unescape(m[3]), m[2] == 'display'] + m[4]
    return {page: KATEX_SCRIPT.sub('', FORMULA.sub(one, text)) for page, text in pages.items()}

def finish(out):
    "What smalldocs leaves to a network: KaTeX beside the pages, the search index as a script, no fonts from another host."
    shutil.copytree(KATEX, out/'site_libs'/'katex', dirs_exist_ok=True)
    index = (out/'search.json').read_text(encoding='utf-8')
    (out/'search.js').write_text(f'window.searchIndex = {json.dumps(index)};', encoding='utf-8')
    (out/'.nojekyll').touch()
    pages = {page: page.read_text(encoding='utf-8') for page in out.glob('*.html')}
    # no line begins with the full stop behind a formula
    pages = {page: re.sub(r'(<span class="math inline">[^<]*</span>[.,;:)]+)', r'<span class="nobr">\1</span>', text) for page, text in pages.items()}
    for page, text in rendered(pages).items(): page.write_text(text, encoding='utf-8')
    for css in (out/'site_libs').rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        local = re.sub(r'@import\s*(url\(\s*["\']?https?:[^)]*\)|(["\'])https?:.*?\2)[^;]*;', '', text)
        if local != text: css.write_text(local, encoding='utf-8')

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'_docs')
    out = parser.parse_args(argv).out.resolve()
    os.chdir(ROOT)
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    start = time.time()
    source = processed(ROOT/'nbs')
    (source/'api.md').write_text(api(ROOT/'nbs', ROOT/'mgsr_nb'), encoding='utf-8')
    built = site(source, out)
    finish(out)
    for warning in built.warnings:
        if not QUARTO_ONLY.search(warning): print('warning:', warning)
    print(f'{len(built.pages)} pages in {os.path.relpath(out)}, {time.time() - start:.0f} s')
    return 1 if built.broken else 0

if __name__ == '__main__': raise SystemExit(main())
