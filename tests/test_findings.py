"Sentences that people wrote, held against the runs; and the first pages that show them."
import ast, json, re, sys
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import nbformat, pytest
from IPython.display import Markdown
from mgsr_nb.study.findings import Finding, evidence, finding_line, findings_list, findings_plot, outdated, read_findings, read_pairs
from mgsr_nb.study.laboratory import comparisons, effect_number, lab_score, read_lab
from mgsr_nb.study.statistics import HOLDS, better_by, seed_test
from test_pages import FINDING, lab_runs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))

@pytest.fixture(scope='module')
def committed():
    "The findings and the runs that they stand on."
    return read_findings(ROOT/'runs'), read_pairs(ROOT/'runs')

def test_every_finding_is_what_the_runs_say(committed):
    findings, pairs = committed
    assert findings and outdated(findings, pairs) == []

def test_the_first_page_has_at_most_seven_and_each_is_one_line(committed):
    front = [f for f in committed[0] if f.front]
    assert 1 <= len(front) <= 7 and all(len(f.says.split()) <= 20 and len(f.label) <= 45 for f in committed[0])

def test_a_number_that_moved_is_named(tmp_path):
    lab_runs(tmp_path)
    pairs = {'lab': read_lab(tmp_path)}
    test, verdict = evidence(FINDING, pairs['lab'])
    assert (test.seeds, verdict) == (5, HOLDS) and outdated([FINDING], pairs) == []
    for wrong in (dict(number='+3.3 ± 0.2'), dict(verdict='negligible'), dict(updates=600)):
        (line,) = outdated([Finding(**vars(FINDING) | wrong)], pairs)
        assert line.startswith('SCRG: ') and line.endswith('say +3.2 ± 0.2, holds, 300')
    with pytest.raises(ValueError, match='SCRG: no two seeds'): evidence(Finding(**vars(FINDING) | dict(better='span')), pairs['lab'])

def test_a_line_has_one_number_its_verdict_and_a_link():
    assert findings_list([FINDING]) == '- **SCRG helps.** exact match +3.2 ± 0.2 points after 300 updates, *better*: [laboratory](report.ipynb#components).'
    assert findings_list([FINDING], page='').endswith('(#components).') and finding_line(FINDING).endswith(', *better*.')

def test_the_figure_counts_in_margins(tmp_path):
    lab_runs(tmp_path)
    figure = findings_plot([FINDING], {'lab': read_lab(tmp_path)})
    dot = next(l for l in figure.axes[0].lines if l.get_marker() == 'o')
    assert dot.get_xdata()[0] == pytest.approx(3.2) and dot.get_color() == 'C2' and len(figure.get_label().split()) > 10


# ---- what is committed

def outputs(notebook): return [o.data['text/markdown'] for c in nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', as_version=4).cells if c.cell_type == 'code' for o in c.outputs if 'text/markdown' in o.get('data', {})]

def test_the_first_pages_show_the_findings(committed):
    front = [f for f in committed[0] if f.front]
    assert findings_list(front) in outputs('index') and findings_list(front, page='') in outputs('report'), 'run `make report`'

def test_the_page_of_all_tables_is_that_of_the_runs(committed):
    from mgsr_nb.study.overview import correlations
    from mgsr_nb.study.laboratory import read_costs
    from mgsr_nb.study.pages import lab_markdown, suite_markdown
    lab, real = committed[1]['lab'], committed[1]['smollm2']
    shown = outputs('details')
    for name in real.names: assert suite_markdown(real, name) in shown, f'{name}: run `make report`'
    for name in lab.names: assert lab_markdown(lab, name, read_costs(ROOT/'runs')) in shown, f'{name}: run `make report`'
    assert correlations(real) in shown

def test_the_chapters_say_what_the_laboratory_says(capsys):
    import chapters
    assert chapters.main(['--check']) == 0, capsys.readouterr().out + 'run `make report`'
    for name in chapters.CHAPTERS:
        cell = next(c for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', as_version=4).cells if c.id == chapters.ID)
        for image in re.findall(r'\]\((images/[^)]*)\)', cell.source): assert (ROOT/'nbs'/image).is_file(), image

def test_what_is_said_in_words_is_what_the_runs_say(committed):
    "How much of the gap a run closes, and what KD costs, stand in prose on the first pages."
    from mgsr_nb.study.laboratory import read_costs
    number = ('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
    lab = committed[1]['lab']
    def closed(suite, cell):
        def of(run):
            at, start, teacher = (lab_score(run, 'exact', who) for who in ('student', 'student_start', 'teacher'))
            return 10 * (at - start) / (teacher - start)
        runs = lab.cells(suite)[cell]
        return number[round(sum(map(of, runs)) / len(runs))]
    early, late, small = closed('updates', 'mgsr,steps=300'), closed('longer', 'mgsr'), closed('small', 'mgsr')
    text = lambda name: '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', as_version=4).cells)
    assert f'With 1,200 updates they close {small} and {late} tenths of the gap to it; with 300, which most suites have, the larger one closes {early} (' in text('report')
    assert f'it has closed {small} tenths of the gap. A *larger* one of 0.14 million closes {late} tenths.' in text('index')
    seeds = {suite: {len(runs) for runs in lab.cells(suite).values()} for suite in lab.names}
    assert (seeds['small'], seeds['longer']) == ({10}, {5}) and {(f.pair, f.suite) for f in committed[0] if f.front} == {('lab', 'small'), ('lab', 'longer')}
    assert 'over ten training seeds (larger student: five)' in text('index') and 'six suites of the laboratory have ten' in (ROOT/'CHANGELOG.md').read_text('utf-8')
    assert sum(n == {10} for n in seeds.values()) == 6
    first = lab.cells('small')['sft'][0]
    assert lab_score(first, 'exact', 'student', 'lab') / lab_score(first, 'exact', 'teacher', 'lab') == pytest.approx(2 / 3, abs=.03) and 'SFT alone ends at two thirds of what its teacher gets right of the first set' in text('details')
    costs = read_costs(ROOT/'runs').set_index(['suite', 'cell']).ratio
    assert round(costs['relatives', 'mgsr']) == round(costs['small', 'mgsr']) == 4 and any('at a quarter of the cost' in f.says and f.better == 'kd' for f in committed[0])

def test_a_random_place_is_compared_with_no_correction_as_the_chapter_says(committed):
    cells = committed[1]['lab'].cells
    one, other = ({r.seed: lab_score(r, 'exact') for r in found} for found in (cells('corrections')['random'], cells('sampling')['on_policy']))
    assert one.keys() == other.keys() == set(range(10))
    test = seed_test([one[s] - other[s] for s in one], 1)
    said = f'{effect_number(test, "exact")} points of exact match against the'
    assert test.p_margin < .03 < test.p_none and said in '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/'20_scrg.ipynb', as_version=4).cells), said

def test_the_example_in_the_documentation_is_the_committed_quickstart(monkeypatch):
    monkeypatch.chdir(ROOT/'nbs')
    *before, last = ast.parse(next(c.source for c in nbformat.read('usage.ipynb', as_version=4).cells if 'runs/examples/quickstart/metrics.json' in c.source)).body
    names = dict(json=json, Path=Path, Markdown=Markdown)
    exec(compile(ast.Module(before, []), 'usage', 'exec'), names)
    assert eval(compile(ast.Expression(last.value), 'usage', 'eval'), names).data in outputs('usage'), 'run `make report`'

@pytest.mark.parametrize('notebook', ['report', 'details'])
def test_a_report_has_its_parameter(notebook):
    tagged = [c for c in nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1 and tagged[0].source.startswith('runs_dir = ')


def test_what_the_audit_says_of_one_set_is_so(committed):
    "Its share of the reference tokens, and of the larger effects: the score is the mean of five sets."
    real = committed[1]['smollm2']
    text = next(c.source for c in nbformat.read(ROOT/'nbs'/'report.ipynb', as_version=4).cells if 'What an audit' in c.source)
    share, least, low, high = re.search(r'`uinst` .* (\d+) % of the reference tokens, supplies (\d+) to (\d+) % of every effect of ([0-9.]+) nats', text).group(1, 4, 2, 3)
    sets = next(r for r in real.runs if r.suite == 'loss_weights' and r.usable).metrics['student']['test']
    assert round(100 * sets['uinst']['tokens'] / sum(s['tokens'] for s in sets.values())) == int(share)
    parts = []
    for suite in ('loss_weights', 'fixed_clipping'):
        for a, b in comparisons(real, suite):
            cells = real.cells(suite)
            if not {a, b} <= cells.keys(): continue
            whole, without = (better_by(cells[a], cells[b], 'nll', where).by_seed().mean() for where in ('test', 'without uinst'))
            if abs(whole) >= float(least): parts.append(1 - (len(sets) - 1) / len(sets) * without / whole)
    assert len(parts) > 4 and (round(100 * min(parts)), round(100 * max(parts))) == (int(low), int(high))


# ---- pages that are read in a minute

def unfolded(text): return re.sub(r'<details>.*?</details>', '', text, flags=re.S)

def test_the_readme_has_at_most_1000_words_outside_folds():
    words = [w for w in unfolded((ROOT/'README.md').read_text(encoding='utf-8')).split() if re.search(r'\w', w)]       # without the bars of tables
    assert 300 < len(words) <= 1000

@pytest.mark.parametrize('notebook', ['report', 'index'])
def test_no_paragraph_over_80_words_and_no_sentence_with_two_intervals(notebook):
    cells = nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', as_version=4).cells
    texts = [c.source for c in cells if c.cell_type == 'markdown'] + outputs(notebook)
    for paragraph in (p for t in texts for p in re.split(r'\n\s*\n|\n(?=- )', unfolded(t)) if not p.startswith(('|', '```'))):
        assert len(paragraph.split()) <= 80, paragraph
        for sentence in re.split(r'(?<=[.!?])\s', paragraph): assert sentence.count('±') <= 1, sentence

def test_tables_of_the_results_have_at_most_six_columns():
    rows = [line for t in outputs('report') for line in t.splitlines() if line.startswith('|')]
    assert rows and max(line.count('|') for line in rows) <= 7
