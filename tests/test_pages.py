"What is said of a suite: on the page of all tables, and on one screen."
import json, re, shutil
import pandas as pd
import pytest
from IPython.display import Image, Markdown
from mgsr_nb.files import write_json
from mgsr_nb.study import pages
from mgsr_nb.study.findings import Finding
from mgsr_nb.study.laboratory import SCORES, read_costs, read_lab
from mgsr_nb.study.pages import gaps, lab_markdown, setting, show_page, suite_figures, suite_markdown
from mgsr_nb.study.records import read_results, write_toy_run
from mgsr_nb.study.suites import SUITES as KNOWN
from toy_suites import SUITES, add, results, two_sets, uneven

def test_an_unknown_suite_is_shown_against_its_first_cell(tmp_path):
    for cell in 'ba': add(tmp_path, 'zoo', cell, 0)
    found = read_results(tmp_path, SUITES)
    assert found.described('zoo').reference == 'a' and '`b`' in suite_markdown(found, 'zoo') and len(suite_figures(found, 'zoo')) == 1

def test_missing_cells_are_named(tmp_path):
    add(tmp_path, 'loss_weights', 'one', 0)
    assert 'Not run: `no_span`, `half`' in gaps(read_results(tmp_path, SUITES), 'loss_weights').replace(' and ', ', ')

def test_setting_names_every_value_that_runs_recorded(tmp_path):
    add(tmp_path, 'spans', 'none', 0)
    write_toy_run(tmp_path, 'spans', 'none', 1, two_sets(), config=dict(max_steps=12), machine=dict(torch='2.10'))
    assert '12 and 24 steps' in setting(read_results(tmp_path, SUITES), 'spans') and 'torch 2.10 and 2.9' in setting(read_results(tmp_path, SUITES), 'spans')

def test_notes_of_the_data_are_printed_once(results): assert suite_markdown(results, 'loss_weights').count('uinst: NOT its set') == 1

def test_suite_without_runs_says_so(results):
    assert '**Not run yet:** `mgsr-ablate spans`' in suite_markdown(results, 'spans')
    assert results.not_run == ['fixed_clipping', 'spans']

def test_every_figure_of_a_suite_says_what_it_shows(results):
    assert all(len(f.get_label().split()) > 10 for f in suite_figures(results, 'loss_weights'))

def test_the_page_of_all_tables_has_every_part(tmp_path):
    text = suite_markdown(uneven(tmp_path), 'spans')
    for said in ('2 of 2 cells, 3 training seeds, 3 prompts of 2 sets', 'for no verdict:* the same by NLL without', '| without `b` |', '| `phrases` than `none` (Table 9) | **not resolved (3 seeds)**: at most 0.597 nats |'): assert said in text, said
    assert all(len(p.split()) <= 80 for p in text.split('\n\n') if not p.startswith('|'))

def shown(monkeypatch, *args):
    found = []
    monkeypatch.setattr('IPython.display.display', lambda *parts: found.extend(parts))
    show_page(*args)
    return found

def lab_runs(root, gain=3., seeds=5):
    for cell in ('none', 'scrg'):
        for k in range(seeds):
            scores = {s: m.better * (10. + k + (cell == 'scrg') * (gain + .1 * k)) for s, m in SCORES.items()}
            tests = {'lab': scores | dict(prompts=400)}
            write_json(root/f'components+lab/{cell}/seed{k}/metrics.json', {'config': dict(save_prompts=False, max_steps=300), **{who: dict(average=scores, test=tests) for who in ('student', 'student_start')}, 'teacher': dict(average={s: m.better * 10. for s, m in SCORES.items()}, test=tests)})

FINDING = Finding('SCRG helps.', 'SCRG', 'lab', 'components', 'scrg', 'none', 'exact', 300, '+3.2 ± 0.2', 'holds')

def test_a_suite_on_one_screen_is_that_of_the_laboratory_where_it_ran(tmp_path, monkeypatch):
    for cell in ('none', 'scrg'):
        for k in range(3): add(tmp_path, 'components', cell, k)
    real = read_results(tmp_path)
    only_real = shown(monkeypatch, {'lab': read_lab(tmp_path), 'smollm2': real}, [FINDING], 'components')
    assert [type(p) for p in only_real] == [Markdown, Image, Markdown] and '| NLL |' in only_real[2].data and 'not resolved (3 seeds)' in only_real[2].data
    assert only_real[0].data.startswith('*What does each component add') and '- **SCRG helps.**' in only_real[0].data
    lab_runs(tmp_path)
    both = shown(monkeypatch, {'lab': read_lab(tmp_path), 'smollm2': real}, [], 'components')
    assert [type(p) for p in both] == [Markdown, Image, Markdown] and '| exact match |' in both[2].data and '**better**' in both[2].data and '| NLL |' not in both[2].data
    header = both[2].data.split('\n\n')[1].splitlines()[0]
    assert header.count('|') == 7                                    # six columns
    assert 'SCRG helps' not in both[0].data

def test_a_suite_without_runs_or_with_one_seed_says_so(tmp_path, monkeypatch):
    nothing = shown(monkeypatch, {'lab': read_lab(tmp_path), 'smollm2': read_results(tmp_path)}, [], 'spans')
    assert nothing[-1].data == 'Not run yet: `mgsr-ablate spans`.'
    for cell in ('phrases', 'none'): add(tmp_path, 'spans', cell, 0)
    single = shown(monkeypatch, {'lab': read_lab(tmp_path), 'smollm2': read_results(tmp_path)}, [], 'spans')
    assert 'A single seed tests nothing' in single[-1].data

def test_all_scores_of_the_laboratory_are_on_the_page_of_all_tables(tmp_path):
    lab_runs(tmp_path)
    text = lab_markdown(read_lab(tmp_path), 'components', read_costs(tmp_path))
    assert all(m.label in text for m in SCORES.values()) and '*Expected before the runs:*' in text and '400 prompts of 1 set; exact match of draws.' in text

def test_a_chapter_says_what_the_laboratory_says_once_there_are_seeds(tmp_path):
    lab_runs(tmp_path, seeds=1)
    assert pages.chapter_markdown(read_lab(tmp_path), [FINDING], 'components', 'x.png') == ''
    lab_runs(tmp_path)
    assert pages.chapter_markdown(read_lab(tmp_path), [FINDING], 'components', 'x.png') == ''      # one of three comparisons
    shutil.copytree(tmp_path/'components+lab'/'scrg', tmp_path/'components+lab'/'dac')
    for k in range(5): pd.DataFrame(dict(step=[0, 300], validation_nll=[1., .5], validation_kl=[1., .5])).to_csv(tmp_path/f'components+lab/none/seed{k}/log.csv', index=False)
    text = pages.chapter_markdown(read_lab(tmp_path), [FINDING], 'components', 'x.png')
    assert '*What does each component add' in text and '- **SCRG helps.** exact match +3.2 ± 0.2 points after 300 updates, *better*.' in text and '](x.png)' in text and '| `scrg` than `none` | **better** |' in text
    assert [len(a.lines) > 0 for a in pages.chapter_figure(read_lab(tmp_path), 'components').axes][:2] == [True, True]

def test_a_suite_that_varies_two_things_has_a_figure_of_its_own(tmp_path, monkeypatch):
    lab_runs(tmp_path)
    moved = {'none': [f'kd,steps={n}' for n in (300, 600)], 'scrg': [f'mgsr,steps={n}' for n in (300, 600)]}
    for cell, names in moved.items():
        for name in names: shutil.copytree(tmp_path/'components+lab'/cell, tmp_path/'updates+lab'/name)
    lab = read_lab(tmp_path)
    left, right = pages.lab_lines(lab, 'updates').axes
    line = lambda ax, k: [list(map(float, ax.containers[k].lines[0].get_ydata())), [p[1, 1] - p[0, 1] for p in ax.containers[k].lines[2][0].get_segments()]]
    assert line(left, 0)[0] == pytest.approx([12, 12]) or line(left, 1)[0] == pytest.approx([12, 12])       # 10 + 0..4
    # 3, 3.1 ... 3.4: mean 3.2, and 2.776 standard errors of 0.0707 on either side
    assert len(right.containers) == 1 and line(right, 0)[0] == pytest.approx([3.2, 3.2]) and line(right, 0)[1] == pytest.approx([2 * 2.776 * .0707] * 2, abs=1e-3)
    assert [t.get_text() for t in right.get_xticklabels()] == ['300', '600'] and right.get_xlabel() == 'steps'
    said = shown(monkeypatch, {'lab': lab, 'smollm2': read_results(tmp_path)}, [], 'updates')
    assert [type(p) for p in said] == [Markdown, Image, Markdown] and pages.chapter_figure(lab, 'updates').get_label() in pages.chapter_markdown(lab, [], 'updates', 'x.png')

def test_texts_stand_beside_each_other_set_by_set(tmp_path):
    row = lambda of, name, k, text, seed=10, **more: dict(of=of, set=name, seed=seed, id=f'{name}-{k}', instruction='Add.', prediction=text, **more)
    rows = [row(of, name, k, f'{of} {name} {k}', **(dict(input='2 | 3') if name == 'lab' else {})) for of in ('student_start', 'student', 'teacher') for name in ('lab', 'lab_open', 'other') for k in range(3)]
    rows += [row('student', 'lab', 0, 'of another seed', seed=20), row('student', 'lab', 9, '')]
    (tmp_path/'samples.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    header, _, *lines = pages.texts_table(tmp_path, {'lab_open': 1, 'lab': 2}).splitlines()
    assert header == '| asked | student before | student after | teacher |'
    assert lines == ['| Add. | student_start lab_open 0 | student lab_open 0 | teacher lab_open 0 |', *(f'| Add. 2 \\| 3 | student_start lab {k} | student lab {k} | teacher lab {k} |' for k in range(2))]

def test_the_reports_have_a_section_for_every_suite():
    import nbformat
    from pathlib import Path
    for name in ('report', 'details'):
        source = '\n'.join(c.source for c in nbformat.read(Path(__file__).resolve().parents[1]/'nbs'/f'{name}.ipynb', as_version=4).cells)
        assert sorted(re.findall(r'^show\("(\w+)"\)$', source, re.M)) == sorted(KNOWN), name
