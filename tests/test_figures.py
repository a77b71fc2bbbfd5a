"The pictures show the numbers."
import io
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from matplotlib.colors import to_rgb
from mgsr_nb.study.figures import costs, learning_curves, limits_plot, metrics_plot, small_png, weight_grid
from mgsr_nb.study.laboratory import REAL, comparisons, effect_plot, effects_of
from mgsr_nb.study.overview import each_run
from mgsr_nb.study.pages import suite_figures
from mgsr_nb.study.records import read_results
from mgsr_nb.study.tables import suite_logs
from toy_suites import LOG, SUITES, add, clipping, results, runs_that_rise, weights

def test_the_plot_has_a_dot_a_run_in_its_group(tmp_path):
    runs_that_rise(tmp_path)
    left, right = metrics_plot(each_run(read_results(tmp_path, SUITES))).axes
    for ax in (left, right): assert [len(line.get_xdata()) for line in ax.lines] == [5, 6]
    assert list(right.lines[0].get_ydata()) == pytest.approx([22.5 + k for k in range(5)])

def drawn(results, suite): return effect_plot(effects_of(results, suite, comparisons(results, suite), REAL), REAL)

def test_figures_show_the_numbers(tmp_path):
    weights(tmp_path)
    for r in read_results(tmp_path, SUITES).runs: pd.DataFrame(LOG).to_csv(r.folder/'log.csv', index=False)
    found = read_results(tmp_path, SUITES)
    effects, grid, heat, curves, cost = drawn(found, 'loss_weights'), weight_grid(found), *suite_figures(found, 'loss_weights')[1:]
    marks = [l.get_xdata()[0] for l in effects.axes[0].lines if l.get_marker() == '|']
    assert marks == pytest.approx([0.3, -0.2]) and [t.get_text() for t in effects.axes[0].get_yticklabels()] == ['one > no_span', 'one > half'] and len(effects.axes) == 3
    assert grid.set_index(['dac', 'span']).nll.to_dict() == pytest.approx({(1, 0): 2.9, (1, .5): 2.4, (1, 1): 2.6})
    assert {t.get_text() for t in heat.axes[0].texts} == {'2.900', '2.400', '2.600'}
    assert list(curves.axes[0].lines[0].get_ydata()) == [3, 2] and len(cost.axes) == 2
    assert len(suite_figures(found, 'loss_weights')) == 4 and len(suite_figures(found, 'spans')) == 0

def test_limits_are_drawn_for_learned_cells_only(tmp_path):
    clipping(tmp_path, dict(learned=0., quantile=0.), seeds=2)
    for r in read_results(tmp_path, SUITES).runs: pd.DataFrame(LOG).to_csv(r.folder/'log.csv', index=False)
    found = read_results(tmp_path, SUITES)
    figure = limits_plot(suite_logs(found, 'fixed_clipping'))
    assert [a.get_title() for a in figure.axes] == ['learned'] and list(figure.axes[0].lines[0].get_ydata()) == [.9, .8]
    assert len(suite_figures(found, 'fixed_clipping')) == 4

def test_small_png_is_a_png_with_few_colours(results):
    from PIL import Image
    data = small_png(drawn(results, 'loss_weights'))
    assert Image.open(io.BytesIO(data)).mode == 'P' and len(data) < 20_000

def test_small_png_keeps_the_colour_of_every_line():
    from PIL import Image
    figure, ax = plt.subplots(figsize=(9, 3), dpi=80)
    for k in range(8):                   # bands over each other: more shades than the picture may have colours
        ax.fill_between([0, 1, 2], [3, 2 - k / 20, 1 - k / 30], [3, 2.3 - k / 20, 1.5 - k / 40], color=f'C{k}', alpha=.15, lw=0)
        ax.plot([0, 1, 2], [3, 2.15 - k / 20, 1.2 - k / 30], 'o-', ms=3, color=f'C{k}')
    plt.close(figure)
    shown = np.asarray(Image.open(io.BytesIO(small_png(figure))).convert('RGB')).reshape(-1, 3).astype(int)
    far = {line.get_color(): np.abs(shown - 255 * np.array(to_rgb(line.get_color()))).max(1).min() for line in ax.lines}
    assert max(far.values()) <= 12, far       # of 255; 26 if the 64 most frequent shades are kept

def test_learning_curves_show_the_paired_difference():
    log = pd.DataFrame([dict(step=t, cell=c, seed=seed, validation_nll=4 + seed - d * t, validation_kl=2 - d * t) for c, d in (('a', 0), ('b', .1)) for seed in (0, 1) for t in (0, 5)])
    nll, kl, better_nll, better_kl = learning_curves(log, 'a').axes
    assert [list(line.get_ydata()) for line in nll.lines] == [[4.5, 4.5], [4.5, 4.]]
    for ax in (better_nll, better_kl): np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[0, 0], [0, .5]])
    np.testing.assert_allclose(better_nll.collections[1].get_paths()[0].vertices[:, 1].max(), .5)      # the seeds differ by 1, their differences do not

def test_learning_curves_without_runs_of_the_reference():
    log = pd.DataFrame([dict(step=t, cell='b', seed=0, validation_nll=4 - t, validation_kl=2) for t in (0, 1)])
    figure = learning_curves(log, 'a')
    assert list(figure.axes[0].lines[0].get_ydata()) == [4, 3] and len(figure.axes[2].lines[0].get_ydata()) == 0

def test_a_suspended_step_is_not_counted_as_work(tmp_path):
    add(tmp_path, 'spans', 'none', 0, log=dict(step=[0, 1, 2, 3, 4, 5], seconds=[None, 2., 3., 2., 1000., 2.]))
    assert costs(read_results(tmp_path, SUITES), 'spans').seconds.tolist() == [10.]

def test_costs_have_a_row_for_every_run(results): assert list(costs(results, 'loss_weights').groupby('cell').size()) == [3, 3, 3] and costs(results, 'loss_weights').seconds.unique() == [60]
