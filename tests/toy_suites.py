"""Runs of toy suites whose numbers can be counted by hand, for the tests of what reads them."""
import json
from dataclasses import dataclass
import pandas as pd, pytest
from mgsr_nb.files import write_json
from mgsr_nb.study.records import read_results, write_toy_run

@dataclass(frozen=True)
class Claim:
    text: str
    better: str
    worse: str
    source: str = 'Table 9'

@dataclass(frozen=True)
class Suite:
    cells: dict
    reference: str
    question: str = 'Does it matter?'
    claims: tuple = ()
    against_reference: bool = True

def cells(*names): return dict.fromkeys(names, {})

SUITES = {'loss_weights': Suite(cells('no_span', 'half', 'one'), 'one', claims=(Claim('all weights 1', 'one', 'no_span'), Claim('all rather than half', 'one', 'half'))),
          'fixed_clipping': Suite(cells('learned', 'quantile', 'quantile_mass', 'learned_mass', 'all'), 'learned', claims=(Claim('learned', 'learned', 'quantile'),)),
          'spans': Suite(cells('phrases', 'none'), 'phrases', claims=(Claim('phrases', 'phrases', 'none'),))}

WEIGHTS = {'one': (1., 1.), 'half': (1., .5), 'no_span': (1., 0.)}

CLIPS = {'learned': ('learned', 'value'), 'learned_mass': ('learned', 'mass'), 'quantile': ('fixed_quantile', 'value'), 'quantile_mass': ('fixed_quantile', 'mass'), 'all': ('none', 'value')}

def two_sets(shift=0., seed=0, kl=0., rouge=0.):
    """Scores of a run on two sets, `shift` nats worse than the plain ones. Plain NLL: set a (1*3 + 5*1)/4 = 2, set b (2 + 4)/2 = 3, mean 2.5; each seed is 0.1 higher.

    KL 0.5 everywhere, ROUGE-L 10 and 20 in set a, 30 in set b: mean (15 + 30)/2 = 22.5."""
    up = shift + 0.1 * seed
    return {'a': dict(nll=[1 + up, 5 + up], kl=[0.5 + kl] * 2, rouge_l=[10. + rouge, 20. + rouge], tokens=[3, 1]), 'b': dict(nll=[2 + up, 4 + up], kl=[0.5 + kl] * 2, rouge_l=[30. + rouge] * 2, tokens=[5, 5])}

def add(runs, suite, cell, seed, shift=0., log=None, rouge=0., **more):
    config = dict(preset='laptop-dolly', teacher='t', max_steps=24)
    if cell in WEIGHTS: config |= dict(zip(('dac_weight', 'span_weight'), WEIGHTS[cell]))
    if cell in CLIPS: config |= dict(zip(('clip', 'clip_reading'), CLIPS[cell]))
    folder = write_toy_run(runs, suite, cell, seed, two_sets(shift, seed, rouge=rouge), config=config, machine=dict(precision='bfloat16', torch='2.9', device_type='cpu', threads=2),
                           data=dict(notes=['uinst: NOT its set']), **more)
    if log is not None: pd.DataFrame(log).to_csv(folder/'log.csv', index=False)
    return folder

def weights(runs, seeds=3, half=-0.2, no_span=0.3):
    for k in range(seeds):
        for cell, shift in (('one', 0.), ('half', half), ('no_span', no_span)): add(runs, 'loss_weights', cell, k, shift)

def clipping(runs, shifts, seeds=3):
    for k in range(seeds):
        for cell, shift in shifts.items(): add(runs, 'fixed_clipping', cell, k, shift)

@pytest.fixture
def results(tmp_path):
    weights(tmp_path)
    return read_results(tmp_path, SUITES)

def failing(runs):
    add(runs, 'spans', 'phrases', 0)
    write_json(runs/'spans'/'none'/'seed0'/'error.json', {'error': 'RuntimeError: out of | memory\nmore', 'traceback': '...', 'config': {}})
    (runs/'spans'/'none'/'seed1').mkdir()
    (runs/'spans'/'none'/'seed2').mkdir()
    (runs/'spans'/'none'/'seed2'/'metrics.json').write_text('{"half": ')
    old = add(runs, 'spans', 'phrases', 1)
    metrics = json.loads((old/'metrics.json').read_text())
    del metrics['student']['test']['b']['nll_per_prompt']
    write_json(old/'metrics.json', metrics)
    return read_results(runs, SUITES)

def uneven(runs, seeds=3, jump=.4):
    "Cell `none` is 0.1 nats better than `phrases`; on set b, of 2 tokens, seeds are 1 nat apart, and the difference `jump` more with each."
    for cell, better, more in (('phrases', 0., 0.), ('none', .1, jump)):
        for k in range(seeds):
            sets = dict(a=dict(nll=[2 - better, 5 - better], tokens=[30, 10]), b=dict(nll=[4 + k - better + more * (k - 1)], tokens=[2]))
            write_toy_run(runs, 'spans', cell, k, {name: dict(x, kl=[.5] * len(x['nll']), rouge_l=[10.] * len(x['nll'])) for name, x in sets.items()})
    return read_results(runs, SUITES)

LOG = dict(step=[0, 1, 2], validation_nll=[3., None, 2.], validation_kl=[1., None, .5], clip_upper=[None, .9, .8], clip_upper_sd=[None, .01, .01], clip_lower=[None, .1, .3],
           clip_lower_sd=[None, .02, .02], kept_mass=[None, .5, .25])


def with_distinct(folder, value):
    metrics = json.loads((folder/'metrics.json').read_text())
    for scores in metrics['student']['test'].values(): scores['distinct_2'] = value
    write_json(folder/'metrics.json', metrics)

def runs_that_rise(tmp_path, sign=1):
    "Eleven runs whose NLL and, by `sign`, ROUGE-L rise while distinct-2 falls; five of them are of `half`, which trains DAC-KL."
    for k in range(11): with_distinct(add(tmp_path, 'loss_weights', 'half' if k < 5 else f'other{k}', k if k < 5 else 0, shift=k, rouge=sign * k), 0.9 - k / 100)
