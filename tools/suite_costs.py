"""What an update of each cell of a suite costs, and how much of it the teacher reads, all in one run and as ratios to one cell.

    python tools/suite_costs.py relatives --out runs/performance/costs.csv

All cells train in one process, by turns, in rounds that each begin with another cell, from the start that the suite's runs have. Rows of other suites in the file stay.
"""
import argparse, statistics, time
from pathlib import Path
import pandas as pd
import torch
import bench


class Reading:
    "How often a model is called and how many tokens, padding included, it is given."
    def __init__(self, model):
        self.calls = self.tokens = 0
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        given = [x for x in (*args, kwargs.get('input_ids'), kwargs.get('inputs_embeds')) if x is not None]
        self.calls += 1
        self.tokens += given[0].shape[0] * given[0].shape[1]


class Cell:
    "A trainer of one cell, and what its updates took."
    def __init__(self, params):
        from mgsr_nb.config import resolve
        from mgsr_nb.models import decoder
        from mgsr_nb.run.setup import prepare
        from mgsr_nb.run.trainer import Trainer
        setup = prepare(resolve(params), cpu=True)
        self.trainer, self.teacher, self.seconds = Trainer(setup), Reading(decoder(setup.teacher)), []

    def step(self):
        start = time.perf_counter()
        self.trainer.step()
        self.seconds.append(time.perf_counter() - start)


def measure(o):
    from mgsr_nb.study.suites import SUITES, After
    spec = {name: p for name, p in SUITES[o.suite].cells.items() if not isinstance(p, After)}
    if o.base not in spec: raise SystemExit(f'--base: {o.suite} has no cell {o.base!r}; it has {", ".join(spec)}')
    cells = {name: Cell({'preset': o.preset, **p}) for name, p in spec.items()}
    for name, cell in cells.items():
        cell.step()
        cell.seconds.clear()
        cell.teacher.calls = cell.teacher.tokens = 0
    for n in range(o.rounds):
        for name in bench.rotated(list(cells), n):
            for _ in range(o.updates): cells[name].step()
    usual, done = cells[o.base], o.rounds * o.updates
    return pd.DataFrame([dict(suite=o.suite, cell=name, base=o.base, updates=done, seconds_median=statistics.median(c.seconds), ratio=statistics.median(c.seconds) / statistics.median(usual.seconds),
        teacher_calls=c.teacher.calls / done, teacher_tokens=c.teacher.tokens / done, teacher_ratio=c.teacher.tokens / usual.teacher.tokens,
        machine=bench.machine(o), threads=o.threads, torch=torch.__version__) for name, c in cells.items()])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('suite')
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--preset', default='lab')
    p.add_argument('--base', default='kd', help='the cell that the ratios are to')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--updates', type=int, default=4, help='of each cell in a round')
    p.add_argument('--threads', type=int, default=1)
    o = p.parse_args()
    o.device = 'cpu'
    torch.set_num_threads(o.threads)
    found = measure(o)
    if o.out.is_file():
        before = pd.read_csv(o.out)
        found = pd.concat([before[before.suite != o.suite], found])
    o.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(o.out, index=False, float_format='%.5g')
    print(found.drop(columns=['suite', 'base', 'machine']).to_string(index=False))


if __name__ == '__main__': main()
