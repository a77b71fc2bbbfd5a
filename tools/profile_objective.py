"""Where the objective's time goes: seconds of each kind of operation in one evaluation with gradients, at the size of `tools/bench.py loss`.

    python tools/profile_objective.py --out FILE.csv

Every operation that reaches the device is timed by itself, so this is for a CPU, and the sum is somewhat above the time of an undisturbed evaluation. `make performance` runs it.
"""
import argparse, csv, time
from collections import Counter
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import bench

KINDS = {'matrix products': ('mm', 'addmm', 'addmm_', 'bmm'), 'exponentials': ('exp', 'sigmoid', 'sigmoid_', '_log_softmax', '_log_softmax_backward_data'), 'top k': ('topk',),
         'sums, maxima, norms': ('sum', 'amax', 'linalg_vector_norm'), 'copies and zeros': ('copy_', 'clone', 'zeros', 'zeros_like', 'fill_', 'slice_backward', 'gather', 'scatter_add_', 'cat')}
KIND = {name: kind for kind, names in KINDS.items() for name in names}     # all others: products, sums, masks of two tensors


class Timed(TorchDispatchMode):
    "Seconds and calls of each operation, by its name without the overload."
    def __init__(self):
        super().__init__()
        self.seconds, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = time.perf_counter()
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.split('::')[1]
        self.seconds[name] += time.perf_counter() - start
        self.calls[name] += 1
        return found


def profile(o, case):
    "Seconds and calls of each kind in one evaluation of `case`, the mean of `o.rounds` after one that warms up."
    inputs = bench.make_inputs(o, (o.rows[-1], o.vocab[-1]))
    step = bench.CASES['loss'][case](inputs)
    step()
    with Timed() as timed:
        for _ in range(o.rounds):
            inputs.clear()
            step()
    found = {}
    for name, seconds in timed.seconds.items():
        row = found.setdefault(KIND.get(name, 'element by element'), [0., 0.])
        row[0] += seconds / o.rounds
        row[1] += timed.calls[name] / o.rounds
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--cases', default='mgsr,mgsr_nb_forward_kl,dense_forward_kl')
    own, others = parser.parse_known_args(arguments)
    o = bench.options(['loss', '--out', str(own.out), *others])
    torch.set_num_threads(o.threads)
    rows = []
    for case in own.cases.split(','):
        for kind, (seconds, calls) in sorted(profile(o, case).items(), key=lambda x: -x[1][0]):
            rows.append(dict(case=case, kind=kind, seconds=f'{seconds:.5g}', calls=f'{calls:g}', N=o.rows[-1], V=o.vocab[-1], H=o.hidden, threads=o.threads, machine=bench.machine(o), torch=torch.__version__))
            print(f'{case:20} {kind:22} {seconds:8.4f} s  {calls:6g} calls')
    own.out.parent.mkdir(parents=True, exist_ok=True)
    with open(own.out, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__': main()
