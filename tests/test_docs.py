"""The documentation site: it builds offline, its links lead somewhere, and a browser shows it as it should."""
import html, html.parser, importlib, json, os, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag
import nbformat, pytest, torch
import browser
from mgsr_nb.dac_kl import DACKL, READINGS, REMAINDERS, TARGETS, FixedClip

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT/'tools'))
import docs, explorer_data

WIDTHS = 390, 1280
SOURCES = 'nbs', 'tools', 'mgsr_nb', 'runs/examples'


# ---- the table of equations, and the data of the explorer

EQUATIONS = json.loads((NBS/'equations.json').read_text(encoding='utf-8'))

def test_the_table_has_every_equation_of_the_paper_once():
    assert [n for row in EQUATIONS for n in row['numbers']] == list(range(1, 12))

@pytest.mark.parametrize('row', EQUATIONS, ids=lambda r: str(r['numbers'][0]))
def test_equation_leads_to_functions_and_a_section_that_exist(row):
    notebook = nbformat.read(NBS/row['notebook'], as_version=4)
    exported = re.search(r'default_exp (\w+)', '\n'.join(c.source for c in notebook.cells))[1]
    for symbol in row['symbols']:
        module, name = symbol.rsplit('.', 1)
        assert callable(getattr(importlib.import_module(module), name)), symbol
        assert module == f'mgsr_nb.{exported}', f"{symbol} is not in {row['notebook']}"
    headings = [m[1] for c in notebook.cells if c.cell_type == 'markdown' for m in re.finditer(r'(?m)^#+ (.+)$', c.source)]
    assert any(h.split(':')[0] == row['section'] for h in headings), headings

def test_equations_notebook_shows_the_table_of_today():
    notebook = nbformat.read(NBS/'equations.ipynb', as_version=4)
    shown = ''.join(o.data.get('text/markdown', '') for c in notebook.cells if c.cell_type == 'code' for o in c.outputs if 'data' in o)
    for row in EQUATIONS:
        assert f"${row['formula']}$" in shown and row['what'] in shown
        assert all(f"[{s.split('.')[-1]}]" in shown for s in row['symbols'])

FIGURES = {'explorer': ('dac_kl', 'data'), 'explorer_divergences': ('divergences', 'data'), 'explorer_scrg': ('scrg', 'scrg'), 'explorer_step': ('step', 'step')}   # page: figure, data

@pytest.mark.parametrize('stem', FIGURES)
def test_explorer_notebook_carries_the_figure_of_today(stem):
    figure, data = FIGURES[stem]
    page, script, style, data = ((NBS/'explorer'/name).read_text(encoding='utf-8') for name in (f'{figure}.html', f'{figure}.js', 'explorer.css', f'{data}.json'))
    assert len(data) < 150_000
    notebook = nbformat.read(NBS/f'{stem}.ipynb', as_version=4)
    shown = ''.join(o.data.get('text/html', '') for c in notebook.cells if c.cell_type == 'code' for o in c.outputs if 'data' in o)
    assert script in shown and data.replace('</', '<\\/') in shown and page.replace('STYLE', style).split('SCRIPT')[0].split('DATA')[0] in shown

def test_explorer_data_hold_the_whole_vocabulary():
    for position in json.loads((NBS/'explorer'/'data.json').read_text(encoding='utf-8'))['positions']:
        assert sum(position['n']) == 49152 and len(position['n']) == len(position['p']) == len(position['q'])
        assert position['p'] == sorted(position['p'], reverse=True) and min(position['p'] + position['q']) > 0

def test_grouping_keeps_mass_ranks_and_the_likeliest_classes():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2000, generator=generator).mul(2).softmax(0) for _ in range(2))
    order, n, ps, qs = explorer_data.grouped(p, q)
    a, b = explorer_data.expanded({'n': n, 'p': ps, 'q': qs})
    assert len(a) == 2000 and torch.equal(order, p.argsort(descending=True, stable=True))
    torch.testing.assert_close(a[:60].float(), p[order][:60], rtol=2e-3, atol=0)
    torch.testing.assert_close(a.cumsum(0).float(), p[order].cumsum(0), rtol=2e-3, atol=0)
    torch.testing.assert_close(b[:60].float(), q[order][:60], rtol=2e-3, atol=0)
    exact, coarse = (p[order] * (p / q).log()[order]).sum(), (a * (a / b).log()).sum()
    assert 0 <= exact - coarse < 0.2 * exact


# ---- the site

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy by the command that `make docs` runs."
    pytest.importorskip('smalldocs', reason="the documentation is built with smalldocs: pip install -e '.[docs]'")
    copy = tmp_path_factory.mktemp('project')
    for name in SOURCES: shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/name, copy)
    blocked = {'HF_HUB_OFFLINE': '1', **{f'{kind}_proxy': 'http://127.0.0.1:9' for kind in ('http', 'https', 'all')}}   # no way out
    done = subprocess.run([sys.executable, 'tools/docs.py', '--out', '_docs'], cwd=copy, env={**os.environ, **blocked}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'warning' not in done.stdout, done.stdout
    return copy/'_docs'

class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        if tag == 'img': self.pictures.append(attrs.get('alt') or '')

@pytest.fixture(scope='module')
def pages(site): return {p.name: Page(p) for p in sorted(site.glob('*.html'))}

def test_every_notebook_has_a_page(site, pages):
    assert {'index.html', 'equations.html', 'explorer.html', 'troubleshooting.html', 'train.html', 'api.html'} <= pages.keys()
    assert len(pages) == len(list((site.parent/'nbs').glob('*.ipynb'))) + 1

def test_every_internal_link_leads_to_a_file_and_a_place_in_it(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if re.match(r'(https?|mailto|data|javascript):', link): continue
            target, place = urldefrag(link)
            path = site/unquote(target) if target else site/name
            if not path.exists(): broken.append(f'{name}: {link}')
            elif place and path.suffix == '.html' and unquote(place) not in pages[path.name].ids: broken.append(f'{name}: {link} (no such place)')
    assert not broken

def test_equations_and_functions_link_to_each_other(site, pages):
    for row in EQUATIONS:
        for symbol in row['symbols']:
            module, name = symbol.split('.')[-2:]
            assert f'{module}.html#{name.lower()}' in pages['equations.html'].links, symbol
            for n in row['numbers']: assert f'equations.html#eq-{n}' in pages[f'{module}.html'].links, (symbol, n)

def test_every_picture_says_in_words_what_it_shows(pages):
    shown = {name: page.pictures for name, page in pages.items() if page.pictures}
    assert len(shown['report.html']) >= 5 and len(shown['details.html']) >= 9 and len(shown['dac_kl.html']) >= 5
    assert not [(name, alt) for name, pictures in shown.items() for alt in pictures if len(alt.split()) < 8]

def test_sidebar_is_in_reading_order(site):
    sidebar = re.search(r'<nav id="quarto-sidebar".*?</nav>', (site/'index.html').read_text(encoding='utf-8'), re.S)[0]
    shown = re.findall(r'href="(?:\./)?([\w-]+)\.html"', sidebar)
    wanted = ['index', 'config', 'data', 'models', 'divergences', 'dac_kl', 'span', 'objective', 'sampling', 'scrg', 'minillm', 'evaluation', 'folder', 'parts', 'step', 'trainer', 'results', 'suites', 'statistics', 'findings', 'train', 'equations']
    assert [s for s in dict.fromkeys(shown) if s in wanted] == wanted

def test_exported_source_is_there_and_folded(site):
    text = (site/'dac_kl.html').read_text(encoding='utf-8')
    assert '<details open class="code-fold">' in text or '<details open="" class="code-fold">' in text       # what teaches is open
    assert '<summary>Source</summary>' in (site/'config.html').read_text(encoding='utf-8')                     # plumbing is closed

def test_no_page_or_style_names_another_host_to_load_from(site):
    loads = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)|<link[^>]*\shref="(https?:[^"]*)|@import[^;]*(https?:[^;]*)|url\(["\']?(https?:[^)]*)')
    found = [(p.name, m[0][:80]) for p in site.rglob('*') if p.suffix in {'.html', '.css'} for m in loads.finditer(p.read_text(encoding='utf-8'))]
    assert not found


def test_formulas_are_rendered_before_a_reader_comes(site):
    if not shutil.which('node'): pytest.skip('no Node here: the formulas are rendered in the browser, where they keep their place')
    texts = {p.name: p.read_text(encoding='utf-8') for p in site.glob('*.html')}
    assert not [name for name, text in texts.items() if docs.FORMULA.search(text) or 'katex.min.js' in text]
    assert texts['divergences.html'].count('class="katex"') > 20 and 'katex-error' not in texts['divergences.html']

def test_without_node_formulas_are_left_to_the_browser(monkeypatch):
    monkeypatch.setattr(docs.shutil, 'which', lambda name: None)
    pages = {'a': r'<span class="math inline">\(x &lt; 1\)</span>'}
    assert docs.rendered(pages) == pages and docs.FORMULA.search(pages['a'])[3] == 'x &lt; 1'

def test_signatures_are_folded_with_the_source(site):
    text = (site/'performance.html').read_text(encoding='utf-8')
    for part in re.split(r'<h3', text)[1:]: assert 'def ' not in part.split('<summary>')[0]
    assert 'def measured(' in html.unescape(re.sub(r'<[^>]*>', '', text))


# ---- in a browser

@pytest.fixture(scope='module')
def chromium():
    path = browser.executable()
    if not path: pytest.skip('no Chromium here (Debian: apt-get install chromium); the pages are not looked at')
    with browser.Browser(path) as b: yield b

def formulas(stem):
    "How many formulas the prose of a notebook's page should show, at least."
    path = next((p for p in NBS.glob('*.ipynb') if re.sub(r'^\d\d[a-z]?_', '', p.stem) == stem), None)
    if path is None: return 0
    prose = [re.sub(r'`[^`]*`|```.*?```', '', c.source, flags=re.S) for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown']
    return sum(len(re.findall(r'\$\$', p)) // 2 for p in prose) + sum('$' in p and '$$' not in p for p in prose)

LOOK = '''({width: document.documentElement.scrollWidth - document.documentElement.clientWidth, katex: document.querySelectorAll('.katex').length,
    wrong: [...document.querySelectorAll('.katex-error')].map(e => e.title || e.textContent),
    raw: [...document.querySelectorAll('main p, main li, main td')].filter(e => !e.closest('pre, code, .cell-output') && /\\$\\$|\\\\\\(|\\\\\\[/.test([...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join(''))).map(e => e.textContent.slice(0, 60)),
    dark: document.documentElement.classList.contains('quarto-dark'), ground: getComputedStyle(document.body).backgroundColor,
    stuck: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 60))})'''

@pytest.fixture(scope='module')
def looked(site, pages, chromium):
    """What is seen of each page, opened once in each way: {(width, dark): {page: what}}. `pale`, what stands out too little, and `wide`,
    lines of code that do not fit, with everything unfolded, are looked for at the full width."""
    found = {}
    for way in (1280, False), (1280, True), (390, False):
        for name in pages:
            chromium.open((site/name).as_uri(), width=way[0], dark=way[1])
            seen = chromium.js(LOOK) | dict(errors=chromium.errors(), requests=chromium.requests())
            if way[0] == 1280: seen |= dict(pale=chromium.js(PALE))
            if way == (1280, False): seen |= chromium.js(SIDEWAYS)
            found.setdefault(way, {})[name] = seen
    return found

@pytest.mark.parametrize('width', WIDTHS)
def test_pages_render_without_errors_requests_or_overflow(looked, width):
    problems = []
    for name, seen in looked[width, False].items():
        wrong = [('error', e) for e in seen['errors']] + [('formula', f) for f in seen['wrong']] + [('raw formula', r) for r in seen['raw']] + [('no image', i) for i in seen['stuck']]
        wrong += [('request', r) for r in seen['requests'] if not r.startswith(('file:', 'data:', 'blob:'))]
        if seen['width'] > 0: wrong.append(('wider than the window by', seen['width']))
        if seen['katex'] < (least := formulas(name[:-5])): wrong.append((f"{seen['katex']} formulas, expected", least))
        problems += [(name, *w) for w in wrong]
    assert not problems

SIDEWAYS = '''(() => {
    document.querySelectorAll('details').forEach(d => d.open = true);
    const blocks = [...document.querySelectorAll('main pre.sourceCode')].filter(e => e.checkVisibility());
    const longest = e => e.textContent.split('\\n').reduce((a, b) => a.length > b.length ? a : b);
    return {blocks: blocks.length, wide: blocks.filter(e => e.scrollWidth > e.clientWidth).map(e => longest(e).slice(0, 80))} })()'''

def test_code_of_the_chapters_fits_the_page(looked):
    "At 1280 pixels no block of code scrolls sideways, what is folded included: 100 columns fit."
    chapters = sorted(p.stem for p in NBS.glob('[0-9][0-9]_*.ipynb'))
    wide, blocks = [], 0
    for stem in chapters:
        seen = looked[1280, False][f'{stem[3:]}.html']
        blocks += seen['blocks']
        wide += [(stem, line) for line in seen['wide']]
    assert not wide
    assert blocks > 10 * len(chapters)

def test_dark_mode_is_followed(looked):
    light, dark = (looked[1280, mode]['index.html'] for mode in (False, True))
    bright = [sum(map(int, re.findall(r'\d+', s['ground'])[:3])) for s in (light, dark)]
    assert not light['dark'] and dark['dark'] and bright[0] > 600 > 250 > bright[1]

PALE = '''(() => {
    const parts = c => c.match(/[\\d.]+/g).map(Number), linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const luminance = c => parts(c).slice(0, 3).map((v, i) => linear(v / 255) * [.2126, .7152, .0722][i]).reduce((a, b) => a + b);
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parts(c); if (p.length < 4 || p[3] > .99) return c } return 'rgb(255, 255, 255)' };
    const found = {};
    for (const e of document.querySelectorAll('body *')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest('.katex, script, style, svg') || !e.checkVisibility()) continue;
        const [dim, bright] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((a, b) => a - b), ratio = (bright + .05) / (dim + .05);
        if (ratio < 4.5) found[`${e.tagName}.${e.className} ${getComputedStyle(e).color} on ${ground(e)}`] = ratio.toFixed(2) }
    return found })()'''

@pytest.mark.parametrize('dark', (False, True))
def test_text_stands_out_from_its_ground(looked, dark):
    "Contrast of at least 4.5 to 1, as WCAG 2 asks for text of ordinary size (1.4.3)."
    assert not {f'{name}: {what}': ratio for name, seen in looked[1280, dark].items() for what, ratio in seen['pale'].items()}

def test_search_finds_a_function_without_a_server(site, chromium):
    chromium.open((site/'index.html').as_uri())
    chromium.js('''(() => { const box = [...document.querySelectorAll('.smalldocs-search input')].at(0); box.value = 'quantile_interval'; box.dispatchEvent(new Event('input', {bubbles: true})); })()''')
    found = chromium.js('''new Promise(done => { const look = n => { const hits = [...document.querySelectorAll('.search-result')].map(a => a.getAttribute('href')); hits.length || !n ? done(hits) : setTimeout(look, 50, n - 1); }; look(100); })''')
    assert any('dac_kl.html' in h for h in found) and not chromium.errors()

def settle(chromium, **settings):
    "Set the explorer's controls as a hand does, and read its exact values."
    chromium.js(f'''Object.entries({json.dumps(settings)}).forEach(([name, value]) => {{
        const control = document.querySelector(`#dac-explorer [name=${{name}}]`); control.value = value; control.dispatchEvent(new Event('input', {{bubbles: true}})); }})''')
    return chromium.js('Object.fromEntries([...document.querySelectorAll("#dac-explorer [data-value]")].map(e => [e.dataset.value, Number(e.dataset.exact)]))')

def test_explorer_agrees_with_the_library(site, chromium):
    "Its JavaScript against `mgsr_nb.dac_kl` on the same distributions: every reading, target and remainder, hard and soft."
    chromium.open((site/'explorer.html').as_uri())
    positions = json.loads((NBS/'explorer'/'data.json').read_text(encoding='utf-8'))['positions']
    limits = {'value': (.3, .01), 'rank': (.985, .42), 'mass': (.81, .135)}
    kept = set()
    for index, position in enumerate(positions):
        p, q = (x.log()[None] for x in explorer_data.expanded(position))
        for reading in READINGS:
            u, l = limits[reading]
            settle(chromium, position=index, reading=reading, u=1, l=0)      # first apart, so that neither pushes the other
            settle(chromium, u=u, l=l)
            for temperature in (0., .013):
                for target in TARGETS:
                    for remainder in REMAINDERS:
                        seen = settle(chromium, temperature=temperature, target=target, remainder=remainder)
                        loss, notes = DACKL(FixedClip(u, l, reading, temperature), target, remainder)(q, p)
                        where = (index, reading, temperature, target, remainder)
                        assert seen['loss'] == pytest.approx(loss.item(), abs=1e-4), where
                        assert seen['kept_classes'] == pytest.approx(notes['kept_classes'].item(), rel=1e-4, abs=1e-4), where
                        assert seen['kept_mass'] == pytest.approx(notes['kept_mass'].item(), abs=1e-4), where
                        assert seen['full'] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4), where
                        kept.add(round(seen['kept_classes'], 3))
    assert len(kept) > 12        # the settings are really different

def test_explorer_sliders_change_what_is_drawn(site, chromium):
    chromium.open((site/'explorer.html').as_uri())
    drawn = 'document.querySelector("#dac-explorer svg").outerHTML'
    shown = 'document.querySelector("#dac-explorer [data-value=loss]").textContent'
    settle(chromium, position=2, reading='mass', u=.95, l=.05, temperature=0)
    for change in (dict(l=.3), dict(u=.6), dict(temperature=.05), dict(reading='rank'), dict(remainder='bucket'), dict(position=1)):
        before = chromium.js(drawn), chromium.js(shown)
        settle(chromium, **change)
        after = chromium.js(drawn), chromium.js(shown)
        assert before[1] != after[1], change
        assert before[0] != after[0] or 'remainder' in change, change
    settle(chromium, l=.9)
    assert chromium.js('document.querySelector("#dac-explorer [name=u]").value') == '0.9'       # l pushes u
