"""A quarter of an hour on a GPU, in order of value, until the time is up: one line a result.

    python tools/gpu_programme.py --minutes 12 [--parts abcd] [--jobs 4] [--pack FILE.tar.gz]

a  versions and card; the first losses of every method against the CPU's (of those that no suite
   runs first: after part c, if the suites keep enough time)
b  decoding; a profile of an on-policy step beside its floor; a batch of 256
c  the objective and whole steps against peers
d  suites of the real pair: preset smollm2-gpu, seed after seed

Every task has an estimate. One that does not fit into what is left is skipped, and that is said.
The same command goes on where it was stopped, however it was. Results lie in runs/gpu/results.jsonl
and, of the suites, below runs/; --pack collects them (metrics, logs, samples; never weights).
--dry rehearses all of it on a CPU with tiny models. On a node without a network:
`bash build/bundle/run.sh python tools/gpu_programme.py --minutes 12`.
"""
import argparse, json, os, signal, subprocess, sys, tarfile, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRESET = "smollm2-gpu"
# (suite, cells; none: all of it); two cells that are one run are computed once
SUITES = (("fixed_clipping", ("no_clip", "learned", "learned_mass", "fixed_quantile_mass")),
          ("baselines", ("sft", "kd", "distillm", "minillm", "mgsr")),
          ("components", ()), ("loss_weights", ()))
SEEDS = (0, 1, 2)
CELL = 150.             # seconds of a cell, before one is finished
RESERVED = 300          # seconds that the suites keep: what they share, and a round of cells
ATTEMPTS = 2            # a task that failed so often is left alone
KEPT = (".json", ".jsonl", ".csv", ".txt")

# --- results: lines of JSON, written as they come

class Results:
    "The lines of results.jsonl, those of earlier calls too; each is written at once."
    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def lines(self):
        if not self.path.is_file(): return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try: found.append(json.loads(line))
            except ValueError: pass         # the machine stopped in the middle of it
        return found

    def add(self, **line):
        # a line that was cut off must not take the next one with it
        cut = self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(("\n" if cut else "") + json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def done(self): return {x["task"] for x in self.lines if "result" in x}

    def given_up(self):
        failed = [x["task"] for x in self.lines if "error" in x]
        return {t for t in failed if failed.count(t) >= ATTEMPTS}

    def seconds_of_cells(self, jobs):
        "Seconds of the finished cells that so many at a time took."
        return [x["seconds"] for x in self.lines
                if x.get("part") == "d" and x.get("jobs") == jobs and "result" in x]

class Deadline:
    def __init__(self, minutes): self.end = time.time() + 60 * minutes
    def left(self): return self.end - time.time()

def shown(line):
    "A line of the results for people."
    what = next(k for k in ("result", "error", "skipped") if k in line)
    text = line[what] if isinstance(line[what], str) else json.dumps(line[what])
    return f"{line['part']} {line['task']}: {'' if what == 'result' else what + ': '}{text[:300]}"

# --- parts a to c, and what the suites share: one process, and another one if it dies

def work(o, names, deadline):
    "What a worker does: the tasks in their order, each one's line as soon as it is there."
    from gpu_tasks import tasks
    from transformers.utils import logging
    logging.disable_progress_bar()
    results, known = Results(o.out/"results.jsonl"), tasks(o)
    for name in names:
        task, left = known[name], deadline.left()
        line = dict(task=name, part=task.part, estimate=task.seconds)
        kept = RESERVED if task.spare and "d" in o.parts and not o.dry else 0
        if task.seconds + kept > left:
            line["skipped"] = (f"takes about {task.seconds:.0f} s, and {max(left, 0):.0f} s are "
                               f"left, {kept} of them for the suites")
        else:
            (o.out/"running.txt").write_text(name, encoding="utf-8")
            begin = time.time()
            try: line["result"] = task.run()
            except Exception as e: line["error"] = f"{type(e).__name__}: {str(e)[:2000]}"
            line["seconds"] = round(time.time() - begin, 1)
        results.add(**line)
        print(shown(line), flush=True)
        if "error" in line: check_device(o)
        (o.out/"running.txt").unlink(missing_ok=True)
        tidy(o)

def check_device(o):
    "End this process if nothing more can be computed in it, as after an illegal access."
    import torch
    try: torch.ones(1, device=o.device).sum().item()
    except Exception: os._exit(9)

def tidy(o):
    "Give back what the last task held on the card."
    import gc, torch
    gc.collect()
    if o.device == "cuda": torch.cuda.empty_cache()

def follow():
    "End this process when the one that started it is gone: its end of standard input closes."
    def wait():
        sys.stdin.read()
        os._exit(143)
    threading.Thread(target=wait, daemon=True).start()

def workers(o, names, deadline):
    """Workers until all tasks have a line or the time is up; the task in which one died or did not
    come back gets a line that says so."""
    results, names = Results(o.out/"results.jsonl"), list(names)
    while names and deadline.left() > 0:
        seen = len(results.lines)
        task = dict(options=vars(o) | {"out": str(o.out)}, names=names, end=deadline.end)
        child = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE,
                                 text=True, cwd=ROOT)
        child.stdin.write(json.dumps(task) + "\n")
        child.stdin.flush()     # and stays open: see `follow`
        try: status = child.wait(timeout=max(deadline.left(), 0) + 5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return
        heard = {x["task"] for x in results.lines[seen:]}
        if status:
            running = o.out/"running.txt"
            died = running.read_text(encoding="utf-8") if running.is_file() else names[0]
            if died not in heard:
                results.add(task=died, part="?", error=f"its process ended with status {status}")
                heard.add(died)
        names = [n for n in names if n not in heard]
        if not status: return

# --- part d: cells, several at a time

def jobs(o):
    "The cells of all suites, a whole round with one seed before the next."
    from mgsr_nb.study.jobs import jobs_of
    chosen = o.suites or SUITES
    return [j for seed in o.seeds for suite, cells in chosen
            for j in jobs_of(suite, (seed,), PRESET, cells, o.parameters)]

def make_sweep(o, results, deadline):
    from mgsr_nb.study.engines import Processes
    from mgsr_nb.study.runner import Sweep, slots_of, threads_of
    slots, devices = slots_of(o.jobs)

    def cell_seconds():
        known = results.seconds_of_cells(o.jobs)
        return sorted(known)[len(known) // 2] if known else o.cell_seconds

    def report(job, state, seconds):
        line = dict(task=job.name, part="d", seconds=round(seconds, 1), jobs=o.jobs)
        if state == "finished": line["result"] = end_of(job.folder)
        elif state == "begun": line["skipped"] = "stopped when the time was up; it goes on"
        else: line["error"] = error_of(job.folder)
        results.add(**line)
        pack(o)
        print(shown(line), flush=True)

    class Timed(Sweep):
        "Starts no cell that would not end in time."
        def ready(self, todo):
            found, needed, left = super().ready(todo), cell_seconds(), deadline.left()
            if needed <= left: return found
            for job in todo:
                line = dict(task=job.name, part="d", estimate=round(needed), jobs=o.jobs,
                            skipped=f"takes about {needed:.0f} s, and {max(left, 0):.0f} s are "
                                    "left")
                results.add(**line)
            print(f"d {len(todo)} cells skipped: one takes about {needed:.0f} s, and "
                  f"{max(left, 0):.0f} s are left", flush=True)
            todo.clear()
            return []

    engine = Processes(devices, threads_of(slots))
    return Timed(jobs(o), engine, slots, report, pause=1., retry=True), engine

def end_of(folder):
    "The student's scores in a finished run, with the start's and the teacher's."
    metrics = json.loads((folder/"metrics.json").read_text(encoding="utf-8"))
    return {who: {k: round(v, 4) for k, v in metrics[who]["average"].items()}
            for who in ("student_start", "student", "teacher")}

def error_of(folder):
    record = folder/"error.json"
    if not record.is_file(): return "?"
    return json.loads(record.read_text(encoding="utf-8"))["error"][:2000]

def suites(o, deadline):
    results = Results(o.out/"results.jsonl")
    sweep, engine = make_sweep(o, results, deadline)
    timer = threading.Timer(max(deadline.left(), 0), engine.stop)
    timer.daemon = True
    timer.start()
    try: sweep.run()
    finally: timer.cancel()

# --- bringing home

def pack(o):
    "Metrics, logs and samples in one file; nothing else, so never weights."
    if not o.pack: return
    target = Path(o.pack)
    part = target.with_name(target.name + ".part")
    with tarfile.open(part, "w:gz") as archive:
        suites = sorted(runs_of(o).glob(f"*+{PRESET}"))
        for folder in (o.out, *(f for f in suites if o.out not in f.parents)):
            for path in sorted(p for p in folder.rglob("*") if p.suffix in KEPT):
                if not {"checkpoints", "best", "student"} & set(path.relative_to(folder).parts):
                    archive.add(path, path.relative_to(folder.parent).as_posix())
    os.replace(part, target)

def runs_of(o):
    from mgsr_nb.run.folder import runs_root
    return runs_root(o.parameters.get("runs_dir", "runs"))

# --- the whole

def plan(o, names, deadline):
    "The table of estimates, one line a task, and which part of it fits."
    from gpu_tasks import tasks
    known, results = tasks(o), Results(o.out/"results.jsonl")
    total, lines = 0., []
    for name in names:
        total += known[name].seconds
        fits = "" if total <= deadline.left() else "  perhaps not"
        task = known[name]
        lines.append(f"{task.part} {task.seconds:6.0f} s {total:7.0f} s  {name}{fits}")
    if "d" in o.parts:
        one = results.seconds_of_cells(o.jobs) or [o.cell_seconds]
        first = sum(known[name].seconds for name in names if not known[name].spare)
        rounds = max(int((deadline.left() - first) / max(one)), 0)
        todo = jobs(o)
        lines.append(f"d {max(one):6.0f} s a cell, {o.jobs} at a time on one device: about "
                     f"{min(rounds * o.jobs, len(todo))} of {len(todo)} cells fit")
    return lines

def run(o):
    from gpu_tasks import tasks
    deadline, results = Deadline(o.minutes), Results(o.out/"results.jsonl")
    skip = results.done() | results.given_up()
    names = [t.name for t in tasks(o).values() if t.part in o.parts and t.name not in skip]
    print("\n".join(plan(o, names, deadline)), flush=True)
    if o.plan: return 0
    (o.out/"running.txt").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        workers(o, names, deadline)
        pack(o)
        if "d" in o.parts and deadline.left() > 0: suites(o, deadline)
    finally: pack(o)
    new = results.lines
    print(f"{len(results.done())} results in {results.path}; "
          f"{sum('skipped' in x for x in new)} skipped, {sum('error' in x for x in new)} errors")
    return 0

def options(words=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=12)
    p.add_argument("--parts", default="abcd", help="some of a, b, c, d")
    p.add_argument("--jobs", type=int, default=4, help="cells at a time (part d)")
    p.add_argument("--out", type=Path, default=ROOT/"runs"/"gpu")
    p.add_argument("--pack", default="", help="also collect all results in this .tar.gz")
    p.add_argument("--data-dir", default=os.environ.get("MGSR_DATA", ""), help="folder of Dolly")
    p.add_argument("--plan", action="store_true", help="show the estimates, run nothing")
    p.add_argument("--dry", action="store_true", help="rehearse with tiny models on a CPU")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args(words)
    o.out, o.suites, o.seeds = o.out.resolve(), (), SEEDS
    o.device, o.cell_seconds = "cuda", CELL
    o.parameters = {"data_dir": o.data_dir} if o.data_dir else {}
    if o.dry: make_dry(o)
    return o

def make_dry(o):
    "Everything tiny, two cells, all below `out`."
    o.device, o.cell_seconds, o.seeds, o.jobs = "cpu", 30., (0,), min(o.jobs, 2)
    o.suites = (("fixed_clipping", ("no_clip", "learned")),)
    o.parameters = dict(
        runs_dir=str(o.out/"runs"), data="lab", template="plain", teacher="lab-32x2",
        teacher_sft_steps=2, student_layers=1, student_sft_steps=1, precision="float32",
        max_prompt_tokens=48, max_tokens=64, max_new_tokens=4, batch_size=4, length_buckets=1,
        chunk_tokens=64, max_steps=2, warmup_steps=0, max_train_examples=32, eval_sets="lab",
        eval_prompts=4, eval_batch_size=4, eval_every=0, checkpoint_every=0)

def main():
    o = options()
    if o.worker:
        task = json.loads(sys.stdin.readline())
        follow()
        o = argparse.Namespace(**task["options"])
        o.out, deadline = Path(o.out), Deadline(0)
        deadline.end = task["end"]
        work(o, task["names"], deadline)
        return 0
    if not (o.dry or o.plan):
        import torch
        if not torch.cuda.is_available():
            print("gpu-programme: there is no CUDA device here; --dry rehearses on a CPU")
            return 2
    return run(o)


if __name__ == "__main__": sys.exit(main())
