"""Make finished runs small enough to be committed: six digits of every score and four of the log; of one seed only: the student's texts, the data, all scores
of start and teacher, and what is logged between two validations. What config.json says too is not said twice.

    python tools/compact_runs.py runs/readings+lab                         # in place
    python tools/compact_runs.py OTHER/runs/readings+lab --to runs         # bring a suite from another checkout

Of a run go along config.json, log.csv, metrics.json and, for seed 0, samples.jsonl. Only finished runs are taken: those with metrics.json.
Data, the student's start and the teacher are the same for all seeds: seeds after 0 keep average and validation scores of the two. Their texts
stay behind.
"""
import argparse, csv, io, json
from pathlib import Path
from mgsr_nb.files import write_atomic

TEXTS, ONCE, CHECKED = 'samples.jsonl', ('student_start', 'teacher'), 'validation_nll'


def short(x, digits=6):
    "A number, or everything in it, to some digits."
    if isinstance(x, float): return float(f'{x:.{digits}g}')
    if isinstance(x, dict): return {key: short(value, digits) for key, value in x.items()}
    return [short(value, digits) for value in x] if isinstance(x, list) else x


def short_cell(text):
    "A cell of a table; what is no number stays as it is."
    try: return text if text.lstrip('-').isdigit() else repr(short(float(text), 4))
    except ValueError: return text


def short_table(text, whole=True):
    "A log; if it is not to be `whole`, its steps with a validation, and the last."
    header, *rows = csv.reader(io.StringIO(text))
    at = header.index(CHECKED) if CHECKED in header else None
    if not whole and at is not None: rows = [row for row in rows if row[at] not in ('', 'nan') or row is rows[-1]]
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([header, *([short_cell(cell) for cell in row] for row in rows)])
    return out.getvalue()


def students(text):
    "The lines of samples.jsonl that are the student's."
    return ''.join(line + '\n' for line in text.split('\n') if line and json.loads(line)['of'] == 'student')


def compact(run, target):
    "Write the small form of the run in folder `run` to `target`, which may be the same folder; each file is whole, old or new."
    target.mkdir(parents=True, exist_ok=True)
    text = lambda name: (run/name).read_text(encoding='utf-8')
    metrics = json.loads(text('metrics.json'))
    if metrics.get('config', {}).items() <= json.loads(text('config.json')).items(): metrics.pop('config', None)
    if run.name != 'seed0':
        metrics.pop('data', None)
        metrics |= {who: metrics[who] | {'test': {}} for who in ONCE if who in metrics}
    # a line for each part of the metrics, so that a difference can be read
    parts = ',\n'.join(f'{json.dumps(key)}: {json.dumps(short(value), ensure_ascii=False)}' for key, value in metrics.items())
    files = {'config.json': text('config.json'), 'log.csv': short_table(text('log.csv'), run.name == 'seed0'), 'metrics.json': '{' + parts + '}\n'}
    if run.name != 'seed0': (target/TEXTS).unlink(missing_ok=True)
    elif (run/TEXTS).exists(): files[TEXTS] = students(text(TEXTS))
    for name, content in files.items(): write_atomic(target/name, content)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('suites', nargs='+', type=Path, help='folders of suites')
    parser.add_argument('--to', type=Path, help='the runs folder to write to (default: in place)')
    o = parser.parse_args()
    for suite in o.suites:
        runs = sorted(p.parent for p in suite.glob('*/seed*/metrics.json'))
        for run in runs: compact(run, o.to/suite.name/run.parent.name/run.name if o.to else run)
        print(f'{suite.name}: {len(runs)} runs')


if __name__ == '__main__': main()
