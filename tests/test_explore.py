"""The explorers: a slider calls the library's loss with its value, redraws, and says what is impossible instead of failing."""
import itertools, json, math, re, sys
from pathlib import Path
import nbformat, pytest, torch
from tiny_models import tiny_model
from mgsr_nb import explore
from mgsr_nb.dac_kl import DACKL, READINGS, REMAINDERS, TARGETS, FixedClip
from mgsr_nb.divergences import DIVERGENCES, forward_kl
from mgsr_nb.explore import GRID, TEACHER, TERMS, bell, dac_kl_figure, dac_kl_numbers, divergence_figure, divergence_numbers, explore_dac_kl, explore_divergences, explore_weights, png, positions, terms_of_run, weighted_figure, weighted_numbers
from mgsr_nb.run.one_step import gradient_norms, heat_strip, shapes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import explorer_data

STORED = {p['name']: p for p in json.loads((ROOT/'nbs'/'explorer'/'data.json').read_text(encoding='utf-8'))['positions']}
EXPLORERS = {'dac_kl': explore_dac_kl, 'divergences': explore_divergences, 'weights': explore_weights}

@pytest.fixture(params=EXPLORERS)
def any_explorer(request): return EXPLORERS[request.param]()

def direct(position, u, l, temperature, reading, target, remainder):
    "DAC-KL of a stored prediction without mgsr_nb.explore."
    p, q = explorer_data.expanded(STORED[position])
    loss, found = DACKL(FixedClip(u, l, reading, temperature), target, remainder)(q.log()[None], p.log()[None])
    return loss.item(), found['kept_mass'].item(), found['kept_classes'].item()


# ---- DAC-KL

def test_the_stored_predictions_are_whole_distributions():
    assert list(positions()) == list(STORED)
    for name, found in positions().items():
        p, q = explorer_data.expanded(STORED[name])
        torch.testing.assert_close(found['log_p'][0].exp(), p, rtol=1e-9, atol=0)
        torch.testing.assert_close(found['log_q'][0].exp(), q, rtol=1e-9, atol=0)
        assert found['log_p'].shape == found['log_q'].shape == (1, 49152) and found['n'].sum() == 49152

@pytest.mark.parametrize('reading', READINGS)
def test_dac_kl_numbers_are_those_of_the_library(reading):
    name = 'a teacher with many choices'
    for target, remainder, temperature in itertools.product(TARGETS, REMAINDERS, (0., .02)):
        state = dict(position=name, u=.9, l=.1, temperature=temperature, reading=reading, target=target, remainder=remainder)
        found = dac_kl_numbers(**state)
        assert [found[k] for k in ('loss', 'kept_mass', 'kept_classes')] == pytest.approx(direct(**state), rel=1e-9, abs=1e-12)
        p, q = explorer_data.expanded(STORED[name])
        assert found['forward_kl'] == pytest.approx(forward_kl(q.log(), p.log()).item(), rel=1e-9)
        assert found['student_mass'] == pytest.approx((found['weight'].clamp(max=1) * q).sum().item(), rel=1e-9)

MOVES = {'position': 'a certain teacher', 'u': .2, 'l': .3, 'temperature': .05, 'reading': 'mass', 'target': 'none', 'remainder': 'bucket'}

@pytest.mark.parametrize('name', MOVES)
def test_each_control_of_dac_kl_reaches_the_exported_loss(name, monkeypatch):
    explorer, calls = explore_dac_kl(), []
    class Spy(DACKL):
        def forward(self, log_q, log_p):
            calls.append({'u': self.clip.upper, 'l': self.clip.lower, 'temperature': self.clip.temperature, 'reading': self.clip.reading, 'target': self.target, 'remainder': self.remainder})
            return super().forward(log_q, log_p)
    monkeypatch.setattr(explore, 'DACKL', Spy)
    before = explorer.numbers['loss'], explorer.line.value, explorer.picture.value
    explorer.controls[name].value = MOVES[name]
    assert explorer.values()[name] == MOVES[name]
    assert calls == [{k: v for k, v in explorer.values().items() if k != 'position'}]
    assert explorer.numbers['loss'] == pytest.approx(direct(**explorer.values())[0], rel=1e-9)
    assert f"{explorer.numbers['loss']:.4f} nats" in explorer.line.value
    assert explorer.numbers['loss'] != before[0] and explorer.line.value != before[1]
    assert (explorer.picture.value != before[2]) == (name != 'remainder')      # what is kept does not depend on it

def test_limits_that_cross_are_a_message_and_no_exception():
    explorer = explore_dac_kl()
    picture = explorer.picture.value
    explorer.controls['u'].value = .02
    assert explorer.numbers is None and 'Not possible' in explorer.line.value and 'lower=0.05, upper=0.02' in explorer.line.value
    assert explorer.picture.value == picture
    explorer.controls['l'].value = .01
    assert explorer.numbers['loss'] == pytest.approx(direct(**explorer.values())[0]) and 'Not possible' not in explorer.line.value

def test_the_picture_says_below_zero_where_it_is():
    explorer = explore_dac_kl()
    assert 'Below 0' not in explorer.line.value
    explorer.controls['reading'].value = 'rank'
    explorer.controls['target'].value = 'none'
    assert explorer.numbers['loss'] < 0 and 'Below 0' in explorer.line.value


# ---- divergences

@pytest.mark.parametrize('loss', DIVERGENCES)
def test_value_and_gradient_are_those_of_the_library(loss):
    options = {'jsd': {'beta': .3}, 'skew_forward_kl': {'alpha': .2}, 'skew_reverse_kl': {'alpha': .2}, 'alpha_beta': {'alpha': .2, 'beta': .3}}.get(loss, {})
    value = lambda c: DIVERGENCES[loss](bell(torch.tensor(c, dtype=torch.float64), 1.2), TEACHER, **options).item()
    found = divergence_numbers(loss, centre=1.3, width=1.2, alpha=.2, beta=.3)
    assert found['options'] == options
    assert found['value'] == pytest.approx(value(1.3), rel=1e-12)
    if loss != 'adaptive_kl':       # whose weights have no gradient, though they move
        assert found['gradient'] == pytest.approx((value(1.3 + 1e-5) - value(1.3 - 1e-5)) / 2e-5, rel=1e-5)
    assert value(found['best']) == pytest.approx(found['curve'].min().item()) and found['best'] == pytest.approx(explore.CENTRES[found['curve'].argmin()].item())

def test_forward_kl_wants_the_mean_and_reverse_kl_a_mode():
    mean = (TEACHER.softmax(-1) * GRID).sum().item()
    assert divergence_numbers('forward_kl')['best'] == pytest.approx(mean, abs=.06)
    assert divergence_numbers('reverse_kl')['best'] == pytest.approx(-2.5, abs=.1)

@pytest.mark.parametrize('name, value, loss', [('loss', 'jsd', 'forward_kl'), ('centre', 1.5, 'forward_kl'), ('width', 2., 'forward_kl'), ('alpha', .4, 'skew_forward_kl'), ('beta', .2, 'jsd')])
def test_each_control_of_the_divergences_changes_the_loss(name, value, loss):
    explorer = explore_divergences()
    explorer.controls['loss'].value = loss
    before = explorer.numbers['value'], explorer.picture.value
    explorer.controls[name].value = value
    state = explorer.values()
    options = {k: state[k] for k in explorer.numbers['options']}
    exact = DIVERGENCES[state['loss']](bell(torch.tensor(state['centre'], dtype=torch.float64), state['width']), TEACHER, **options).item()
    assert explorer.numbers['value'] == pytest.approx(exact, rel=1e-12) and explorer.numbers['value'] != before[0]
    assert f"{exact:.4f}" in explorer.line.value and explorer.picture.value != before[1]

def test_a_slider_that_the_loss_does_not_take_changes_nothing():
    explorer = explore_divergences()
    before = explorer.numbers['value']
    explorer.controls['alpha'].value = .5
    assert explorer.numbers['value'] == before and 'takes neither' in explorer.line.value


# ---- weights

def test_with_the_weights_of_the_run_the_parts_are_its_loss():
    parts = weighted_numbers()['parts']
    assert len(parts) == 20 and list(parts) == list(TERMS)
    torch.testing.assert_close(torch.tensor(parts.sum(axis=1).values), torch.tensor(terms_of_run().loss.values), rtol=1e-5, atol=0)

@pytest.mark.parametrize('term', TERMS)
def test_each_weight_scales_its_term_alone(term):
    explorer = explore_weights()
    before, picture = explorer.numbers['parts'], explorer.picture.value
    explorer.controls[term].value = 2.
    after = explorer.numbers['parts']
    for name in TERMS: assert (after[name] / before[name]).tolist() == pytest.approx([2. if name == term else 1.] * 20)
    assert explorer.numbers['loss'] == pytest.approx(after.sum(axis=1).mean()) and sum(explorer.numbers['share'].values()) == pytest.approx(1)
    assert explorer.picture.value != picture

def test_all_weights_zero_is_a_message():
    explorer = explore_weights()
    for name in TERMS: explorer.controls[name].value = 0.
    assert explorer.numbers is None and 'all weights are 0' in explorer.line.value
    explorer.controls['dac'].value = 1.
    assert explorer.numbers['share'] == {'sft': 0, 'dac': 1, 'span': 0}


# ---- all of them

def test_the_ends_of_every_slider_are_drawn(any_explorer):
    "No position of a single slider raises anything, and what is drawn is a picture."
    for control in any_explorer.controls.values():
        first = control.value
        for value in control.options if hasattr(control, 'options') else (control.min, control.max):
            control.value = value
            assert any_explorer.numbers is not None or 'Not possible' in any_explorer.line.value
            assert bytes(any_explorer.picture.value).startswith(b'\x89PNG')
        control.value = first
        assert any_explorer.numbers is not None

def test_figures_are_small_files():
    for figure in (dac_kl_figure(dac_kl_numbers()), divergence_figure(divergence_numbers()), weighted_figure(weighted_numbers())): assert len(png(figure)) < 60_000

def test_without_a_kernel_the_chapter_has_pictures_and_says_what_to_do():
    cells = [c for c in nbformat.read(ROOT/'nbs'/'24_explore.ipynb', as_version=4).cells if c.cell_type == 'code']
    for name in EXPLORERS:
        at = next(i for i, c in enumerate(cells) if c.source == f'explore_{name}()')
        assert 'JupyterLab' in cells[at].outputs[0].data['text/plain']
        assert any('image/png' in o.get('data', {}) for c in cells[at - 2:at] for o in c.outputs), name


# ---- the helpers of the step that is taken apart

def test_shapes_are_one_line():
    assert shapes(ids=torch.zeros(2, 5, dtype=torch.long), h=torch.zeros(3)) == 'ids (2, 5) int64   h (3,) float32'

def test_heat_strip_colours_by_value_and_shows_every_character():
    strip = heat_strip(['<a>', ' b\n', 'c'], [0., 2., 4.], 'x & y: ', [False, True, False])
    assert [float(x) for x in re.findall(r'13,([\d.]+)\)', strip)] == [0, .3, .6]
    assert '&lt;a&gt;' in strip and 'b↵' in strip and 'x &amp; y: ' in strip and 'title="2.000"' in strip
    assert [m for m in re.findall(r'underline;">([^<]*)<', strip)] == [' b↵']
    assert 'nan' not in heat_strip(['a'], [0.]) and heat_strip([], []) == '<p style="white-space:pre-wrap"></p>'

@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'opt'])
def test_gradient_norms_hold_every_gradient_once(kind):
    model = tiny_model(kind)
    assert gradient_norms(model).eq(0).all()
    model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits.square().mean().backward()
    norms = gradient_norms(model)
    layers = model.config.num_hidden_layers
    assert sorted(norms.index) == sorted([*(f'layer {i}' for i in range(layers)), 'rest']) and norms.gt(0).all()
    whole = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert math.sqrt(norms.pow(2).sum()) == pytest.approx(whole, rel=1e-5)
