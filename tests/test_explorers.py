"""The explorers of the documentation in a browser: what a hand changes becomes what the library computes. And the files that they read."""
import json, sys
from pathlib import Path
import nbformat, pytest, torch
import browser
from tiny_models import tiny_model
from mgsr_nb.divergences import DIVERGENCES, log_probs
from mgsr_nb.sampling import sampler
from mgsr_nb.scrg import DIRECTIONS, FirstAbove, MaxKL, Scorer, error_position

ROOT = Path(__file__).resolve().parents[1]
NBS, DATA = ROOT/'nbs', ROOT/'nbs'/'explorer'
sys.path.insert(0, str(ROOT/'tools'))
import explorer_scrg, explorer_step

PAGES = 'explorer', 'explorer_divergences', 'explorer_scrg', 'explorer_step'

def stored(name): return json.loads((DATA/f'{name}.json').read_text(encoding='utf-8'))


# ---- in a browser: each figure as its notebook stores it, on a page of its own

@pytest.fixture(scope='module')
def chromium():
    path = browser.executable()
    if not path: pytest.skip('no Chromium here (Debian: apt-get install chromium); the explorers are not tried')
    with browser.Browser(path) as b: yield b

@pytest.fixture(scope='module')
def figures(tmp_path_factory):
    "{notebook: address of a page with nothing but its figure}."
    folder, found = tmp_path_factory.mktemp('figures'), {}
    for stem in PAGES:
        shown = [o.data['text/html'] for c in nbformat.read(NBS/f'{stem}.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs]
        assert len(shown) == 1, stem
        (folder/f'{stem}.html').write_text(f'<!doctype html><meta charset="utf-8"><body style="margin: 12px">{shown[0]}', encoding='utf-8')
        found[stem] = (folder/f'{stem}.html').as_uri()
    return found

def enter(chromium, root, **settings):
    "Set controls by name, as a hand does."
    chromium.js(f'''Object.entries({json.dumps(settings)}).forEach(([name, value]) => {{
        const control = document.querySelector(`{root} [name=${{name}}]`); control.value = value; control.dispatchEvent(new Event('input', {{bubbles: true}})); }})''')

def exact(chromium, root):
    return chromium.js(f'Object.fromEntries([...document.querySelectorAll("{root} [data-value]")].map(e => [e.dataset.value, Number(e.dataset.exact)]))')

def click(chromium, selector): chromium.js(f'document.querySelector({json.dumps(selector)}).click()')

UNNAMED = '''[...document.querySelectorAll("input, select, button, svg, [tabindex]")].filter(e => !(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-roledescription") || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))'''

@pytest.mark.parametrize('width', (390, 1280))
@pytest.mark.parametrize('stem', PAGES)
def test_it_works_from_a_file_on_a_phone_and_everything_has_a_name(stem, width, figures, chromium):
    chromium.open(figures[stem], width=width)
    assert chromium.errors() == [] and chromium.requests() == [figures[stem]]
    assert chromium.js('document.documentElement.scrollWidth - document.documentElement.clientWidth') == 0
    assert chromium.js(UNNAMED) == []


# ---- DAC-KL (its numbers: tests/test_docs.py)

def test_the_picture_is_told_in_words_too(figures, chromium):
    chromium.open(figures['explorer'])
    said = lambda: chromium.js('document.querySelector("#dac-explorer svg").getAttribute("aria-label")')
    before = said()
    assert chromium.js('document.querySelector("#dac-explorer [data-value=kept_mass]").textContent') in before and '49,152 classes' in before
    enter(chromium, '#dac-explorer', l=.3)
    assert said() != before and chromium.js('document.querySelector("#dac-explorer [data-value=kept_classes]").textContent') in said()


# ---- divergences

DIV = '#divergence-explorer'
LOSSES = 'forward_kl', 'reverse_kl', 'symmetric_kl', 'jsd', 'tvd', 'skew_forward_kl', 'skew_reverse_kl', 'adaptive_kl', 'alpha_beta'      # those of the paper, its baselines and its relatives
STARTS = 'own', 'uniform', 'wrong', 'lost', 'equal'

def state(chromium):
    return chromium.js('''({p: [...document.querySelectorAll("#divergence-explorer .class .number")].map(e => e.textContent), z: [...document.querySelectorAll("#divergence-explorer [data-logit]")].map(e => Number(e.value)),
        gradients: Object.fromEntries([...document.querySelectorAll("#divergence-explorer [data-loss]")].map(e => [e.dataset.loss, JSON.parse(e.dataset.gradient)]))})''')

def teacher_and_student():
    "The eight classes of the page: seven words and all others, of both models."
    position = stored('data')['positions'][1]
    n = torch.tensor(position['n'], dtype=torch.float64)
    mass = [n * torch.tensor(position[k], dtype=torch.float64) for k in 'pq']
    return [torch.cat([m[:7], m[7:].sum()[None]]).div(m.sum()) for m in mass]

def by_the_library(z, p, alpha, beta, head=.5, power_p=.2, power_q=.7):
    found = {}
    for name in LOSSES:
        f = DIVERGENCES[name]
        options = {'jsd': {'beta': beta}, 'skew_forward_kl': {'alpha': alpha}, 'skew_reverse_kl': {'alpha': alpha},
                   'adaptive_kl': {'head_mass': head}, 'alpha_beta': {'alpha': power_p, 'beta': power_q}}.get(name, {})
        logits = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        value = f(logits, p.log(), **options)
        found[name] = value.item(), torch.autograd.grad(value, logits)[0].tolist()
    return found

@pytest.mark.parametrize('alpha, beta, head, power_p, power_q', [(.1, .5, .5, .2, .7), (.45, .2, .05, 0, .4), (.9, .97, .9, .6, 0), (.3, .3, .3, 1, 1)])
def test_divergences_and_gradients_are_those_of_the_library(alpha, beta, head, power_p, power_q, figures, chromium):
    chromium.open(figures['explorer_divergences'])
    p, _ = teacher_and_student()
    z = [1.2, -3., .4, 2.5, -7.1, 0., 5.9, -1.]
    options = dict(alpha=alpha, beta=beta, head=head, power_p=power_p, power_q=power_q)
    enter(chromium, DIV, **options)
    for k, x in enumerate(z):
        chromium.js(f'''(() => {{ const s = document.querySelector('[data-logit="{k}"]'); s.value = {x}; s.dispatchEvent(new Event('input', {{bubbles: true}})) }})()''')
    seen, values = state(chromium), exact(chromium, DIV)
    assert seen['z'] == pytest.approx(z) and set(values) == set(LOSSES)
    for name, (value, gradient) in by_the_library(z, p, **options).items():
        assert values[name] == pytest.approx(value, abs=1e-6), name
        assert seen['gradients'][name] == pytest.approx(gradient, abs=1e-6), name

def test_the_starts_are_what_they_are_called(figures, chromium):
    chromium.open(figures['explorer_divergences'])
    p, q = teacher_and_student()
    z = {'own': q.log(), 'uniform': torch.zeros(8), 'equal': p.log(), 'lost': torch.cat([torch.tensor([-12.]), q.log()[1:]]), 'wrong': torch.tensor([0, 0, 0, 0, 0, 4., 0, 0])}
    for name in STARTS:
        click(chromium, f'{DIV} [data-set={name}]')
        wanted = by_the_library(z[name].tolist(), p, .1, .5)
        assert exact(chromium, DIV) == pytest.approx({k: v for k, (v, _) in wanted.items()}, abs=1e-6), name

def test_a_lost_word_comes_back_with_forward_kl_and_not_with_reverse_kl(figures, chromium):
    "What the page says, and that its steps are steps of gradient descent of rate 2."
    chromium.open(figures['explorer_divergences'])
    p, q = teacher_and_student()
    after = {}
    for name in LOSSES:
        click(chromium, f'{DIV} [data-set=lost]')
        click(chromium, f'{DIV} [value={name}]')
        click(chromium, f'{DIV} [data-steps="1"]')
        z = torch.cat([torch.tensor([-12.], dtype=torch.float64), q.log()[1:]]).tolist()
        stepped = [max(-12, min(6, x - 2 * g)) for x, g in zip(z, by_the_library(z, p, .1, .5)[name][1])]
        assert exact(chromium, DIV)[name] == pytest.approx(by_the_library(stepped, p, .1, .5)[name][0], abs=1e-6)
        click(chromium, f'{DIV} [data-steps="20"]')
        after[name] = exact(chromium, DIV)['forward_kl']
    assert after['forward_kl'] < .05 and min(after[n] for n in ('reverse_kl', 'jsd', 'tvd', 'skew_forward_kl', 'skew_reverse_kl')) > 1
    click(chromium, f'{DIV} [data-set=wrong]')
    sizes = {name: torch.tensor(g).norm().item() for name, g in state(chromium)['gradients'].items()}
    assert sorted(sizes, key=sizes.get)[:2] == ['tvd', 'jsd']
    for name in LOSSES:
        click(chromium, f'{DIV} [data-set=wrong]')
        click(chromium, f'{DIV} [value={name}]')
        for _ in range(5): click(chromium, f'{DIV} [data-steps="20"]')
        assert (exact(chromium, DIV)[name] < .01) == (name != 'tvd'), name


# ---- SCRG

SCRG = '#scrg-explorer'

def test_the_error_position_is_that_of_the_library(figures, chromium):
    chromium.open(figures['explorer_scrg'])
    found = set()
    for number, text in enumerate(stored('scrg')['texts']):
        ids, drawn = torch.tensor(text['ids']), torch.tensor(text['drawn'])
        for direction in DIRECTIONS:
            kl = torch.tensor(text['kl'][direction])
            for name, detect in [('max', MaxKL()), *((t, FirstAbove(t)) for t in (.05, .3, .5, 1.5, 2.))]:
                enter(chromium, SCRG, text=number)
                enter(chromium, SCRG, direction=direction, detector='max' if name == 'max' else 'first', threshold=.3 if name == 'max' else name)
                wanted = error_position(detect(kl, torch.zeros(len(kl))), ids, drawn).item()
                seen = exact(chromium, SCRG)
                assert seen['error'] == wanted, (number, direction, name)
                assert seen['place'] == max(wanted, 0) and seen['kl'] == pytest.approx(kl[max(wanted, 0)].item(), abs=1e-3)
                found.add((number, wanted))
    assert len(found) > 6 and any(j == -1 for _, j in found)       # the settings are really different

def test_each_token_shows_what_both_models_said_there(figures, chromium):
    chromium.open(figures['explorer_scrg'])
    for number, text in enumerate(stored('scrg')['texts']):
        for direction in DIRECTIONS:
            enter(chromium, SCRG, text=number, direction=direction)
            for i, place in enumerate(text['places']):
                click(chromium, f'{SCRG} [data-token="{i}"]')
                p, q = (torch.tensor(place[k], dtype=torch.float64) for k in 'pq')
                part = q * (q / p).log() if direction == 'student_teacher' else p * (p / q).log()
                assert exact(chromium, SCRG)['kl'] == pytest.approx(text['kl'][direction][i], abs=1e-3)
                parts = chromium.js(f'[...document.querySelectorAll("{SCRG} [data-part]")].map(e => Number(e.dataset.part))')
                assert parts == pytest.approx(part.tolist(), abs=1e-6)
                shown = chromium.js(f'document.querySelector("{SCRG} .correction").textContent')
                assert shown.count('nats a token') + shown.count('nothing follows') >= len(place['rewrites'])
                for rest, _ in place['rewrites']: assert rest.replace('\n', '↵') in shown

def test_the_arrow_keys_walk_through_the_text(figures, chromium):
    chromium.open(figures['explorer_scrg'])
    click(chromium, f'{SCRG} [data-token="3"]')
    def press(key): chromium.js(f'document.querySelector("{SCRG} [aria-pressed=true]").dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}", bubbles: true}}))')
    for key, wanted in (('ArrowRight', 4), ('ArrowLeft', 3), ('Home', 0), ('ArrowLeft', 0), ('End', len(stored('scrg')['texts'][0]['ids']) - 1)):
        press(key)
        assert exact(chromium, SCRG)['place'] == wanted
        assert chromium.js(f'document.activeElement.dataset.token') == str(wanted)

@pytest.fixture(scope='module')
def tiny_text():
    "`explained` of a text of two tiny models, and the models."
    student, teacher = (tiny_model('llama', seed=seed) for seed in (1, 2))
    vocab = student.config.vocab_size
    prompt, response = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14]
    decode = lambda ids: ''.join(f' {i}' for i in ids)
    made = explorer_scrg.explained(Scorer(student, teacher, 0, vocab), sampler(student, [2], 0, vocab), [2], decode, prompt, response, 'x')
    return student, teacher, prompt, response, made

@torch.no_grad()
def plain(model, ids): return log_probs(model(input_ids=torch.tensor([ids])).logits[0])

def test_the_file_says_what_the_models_say(tiny_text):
    student, teacher, prompt, response, made = tiny_text
    log_q, log_p = (plain(m, prompt + response)[len(prompt) - 1:-1] for m in (student, teacher))
    for direction, a, b in (('student_teacher', log_q, log_p), ('teacher_student', log_p, log_q)):
        assert made['kl'][direction] == pytest.approx((a.exp() * (a - b)).sum(-1).tolist(), rel=2e-3, abs=1e-6)
    assert made['ids'] == response and len(made['places']) == len(response) and set(made['drawn']) != set(response)
    for i, place in enumerate(made['places']):
        classes = [int(w) for w in place['words']]
        assert place['p'] == pytest.approx(log_p[i].exp()[classes].tolist(), rel=2e-3) and place['p'] == sorted(place['p'], reverse=True)
        assert place['q'] == pytest.approx(log_q[i].exp()[classes].tolist(), rel=2e-3)
        assert classes[place['student']] == response[i] and classes[place['teacher']] == made['drawn'][i]
        own = log_p.gather(-1, torch.tensor(response)[:, None])[i + 1:]
        assert place['rest'] == (pytest.approx(own.mean().item(), abs=1e-4) if len(own) else None)

def test_re_generations_follow_the_teachers_token_and_are_read_by_the_teacher(tiny_text):
    _, teacher, prompt, response, made = tiny_text
    differ = [i for i, (a, b) in enumerate(zip(response, made['drawn'])) if a != b]
    assert [i for i, place in enumerate(made['places']) if place['rewrites']] == differ and differ
    for i in differ:
        rewrites = made['places'][i]['rewrites']
        assert len(rewrites) == explorer_scrg.REWRITES and len({text for text, _ in rewrites}) > 1
        for text, mean in rewrites:
            rest, start = [int(w) for w in text.split()], prompt + response[:i] + [made['drawn'][i]]
            assert i + 1 + len(rest) <= explorer_scrg.TOKENS
            log_p = plain(teacher, start + rest)[len(start) - 1:-1]
            assert mean == (pytest.approx(log_p.gather(-1, torch.tensor(rest)[:, None]).mean().item(), abs=1e-4) if rest else None)


# ---- one step

STEP = '#step-slides'

def test_back_next_keys_and_menu_turn_the_slides(figures, chromium):
    chromium.open(figures['explorer_step'])
    slides = stored('step')
    at = lambda: (int(chromium.js(f'document.querySelector("{STEP} .stage").dataset.slide')), chromium.js(f'document.querySelector("{STEP} h3").textContent'))
    for n, slide in enumerate(slides):
        assert at() == (n, slide['title'])
        text = chromium.js(f'document.querySelector("{STEP} .stage").textContent')
        for t in slide['tensors']: assert f"{t['name']} ({', '.join(map(str, t['shape']))}) {t['type']}" in text
        assert all(line in text for line in slide['code']) and slide['seen'] in text
        assert chromium.js(f'document.querySelector("{STEP} .picture").children.length') > 0
        click(chromium, f'{STEP} [data-go="1"]')
    assert at()[0] == len(slides) - 1
    for key, wanted in (('ArrowLeft', len(slides) - 2), ('Home', 0), ('ArrowLeft', 0), ('ArrowRight', 1), ('End', len(slides) - 1)):
        chromium.js(f'document.querySelector("{STEP} .stage").dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}", bubbles: true}}))')
        assert at()[0] == wanted
    chromium.js(f'(() => {{ const s = document.querySelector("{STEP} select"); s.value = 4; s.dispatchEvent(new Event("input", {{bubbles: true}})) }})()')
    assert at() == (4, slides[4]['title']) and chromium.errors() == []

def test_the_weights_make_the_loss(figures, chromium):
    chromium.open(figures['explorer_step'])
    number, slide = next((n, s) for n, s in enumerate(stored('step')) if s['picture']['kind'] == 'weights')
    chromium.js(f'(() => {{ const s = document.querySelector("{STEP} select"); s.value = {number}; s.dispatchEvent(new Event("input", {{bubbles: true}})) }})()')
    terms = slide['picture']['terms']
    assert exact(chromium, STEP)['loss'] == pytest.approx(slide['picture']['loss'], abs=1e-3)       # of the chapter, where all weights are 1
    for weights in ({'sft': .5, 'dac': 2., 'span': 0.}, {'sft': 0., 'dac': .3, 'span': 1.7}):
        enter(chromium, STEP, **weights)
        assert exact(chromium, STEP)['loss'] == pytest.approx(sum(weights[k] * terms[k] for k in terms), abs=1e-6)

def test_slides_show_lines_of_the_chapter_and_its_numbers():
    cells = [c for c in nbformat.read(explorer_step.CHAPTER, 4).cells if c.cell_type == 'code']
    source = '\n'.join(c.source for c in cells)
    slides = stored('step')
    assert [s['title'] for s in slides] == [s[0] for s in explorer_step.SLIDES]
    for slide, (_, after, code, *_) in zip(slides, explorer_step.SLIDES):
        assert slide['code'] == code and all(line in source for line in code), slide['title']
        assert sum(after in c.source for c in cells) == 1, slide['title']
    printed = ''.join(o.get('text', '') for c in cells for o in c.outputs)
    terms = next(s for s in slides if s['picture']['kind'] == 'weights')['picture']
    for x in (*terms['terms'].values(), terms['loss']): assert f'{x:.4f}' in printed
    assert [t['name'] for s in slides for t in s['tensors'] if f"{tuple(t['shape'])} {t['type']}" not in printed] == ['j', 'loss', 'norm']      # those it shows otherwise

def test_slides_hold_together():
    "Per-token values are as many as their tokens; the kept classes are kept; the trainer's column equals the one by hand."
    slides = {s['title']: s for s in stored('step')}
    for slide in slides.values():
        for strip in slide['picture'].get('strips', []): assert len(strip['tokens']) == len(strip['values']), slide['title']
    weight = slides['The clip']['picture']['series']['weight']
    assert weight == sorted(weight, reverse=True) and weight[0] > .99 and weight[-1] < .1
    for _, hand, trainer in slides["The trainer's step"]['picture']['rows']: assert float(hand) == pytest.approx(float(trainer), rel=1e-3, abs=1e-4)
