"""One of several processes: `accelerate launch process_runs.py FOLDER` runs the cases of FOLDER/cases.json and leaves there what each process saw; `process_runs.py FOLDER PORT` runs them from the notebook launcher."""
import atexit, json, os, signal, sys
from pathlib import Path
import torch

@atexit.register        # before the library registers its own: the first registered is the last called
def threads_left():
    tasks = Path("/proc/self/task")
    if "RANK" in os.environ and tasks.exists(): Path(f"{sys.argv[1]}/threads-{rank()}").write_text("\n".join((t/"comm").read_text().strip() for t in tasks.iterdir()))

from accelerate import notebook_launcher
from safetensors.torch import save_file
from mgsr_nb import run as R
import mgsr_nb.run.results
import mgsr_nb.run.setup
import mgsr_nb.run.step
import mgsr_nb.run.trainer
from mgsr_nb.config import resolve
from tiny_runs import many_stops

def rank(): return int(os.environ.get("RANK", 0))

class Watched:
    "What this process does: lengths of the texts it draws, its trained weights, and every file below `runs` that Python makes, opens for writing, or removes."
    def __init__(self, runs: Path):
        self.runs, self.lengths, self.written, self.weights = str(runs), [], [], {}
        sys.addaudithook(self.audit)

    def audit(self, event, args):
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        if str(args[0]).startswith(self.runs): self.written.append(f"{event} {Path(str(args[0])).relative_to(self.runs)}")

    def begin(self): self.lengths, self.written = [], []

    def save(self, folder, name, **more):
        save_file(self.weights, folder/f"{name}-{rank()}.safetensors")
        (folder/f"{name}-{rank()}.json").write_text(json.dumps({"lengths": self.lengths, "written": self.written, **more}))

def changed(seen: Watched, fail_at: int, killed: bool):
    "Samples stop early, and `seen` sees them; at step `fail_at` (from 1) process 1 raises, or is killed."
    prepare, draw, fit = R.setup.prepare, R.trainer.Writer.draw, R.trainer.Trainer.fit
    def stopping(*args):
        setup = prepare(*args)
        many_stops(setup)
        return setup
    def drawn(self, step):
        if rank() == 1 and step + 1 == fail_at:
            if killed: os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"process {rank()} has lost its marbles")
        examples, text, notes = draw(self, step)
        seen.lengths.append([len(y) for _, y in text.pairs] if isinstance(text, R.step.Distilled) else text)
        return examples, text, notes
    def fitted(self, *args, **more):
        log = fit(self, *args, **more)
        seen.weights = {n: p.detach().clone() for n, p in self.accelerator.unwrap_model(self.distiller).named_parameters()}
        return log
    R.results.prepare, R.trainer.Writer.draw, R.trainer.Trainer.fit = stopping, drawn, fitted

def main(folder: str, port: str = ""):
    torch.set_num_threads(1)
    folder = Path(folder)
    wanted = json.loads((folder/"cases.json").read_text())
    changed(seen := Watched(folder/"runs"), wanted["fail_at"], wanted["killed"])
    for name, parameters in wanted["cases"].items():
        config = resolve(parameters, run_name=name)
        if port: notebook_launcher(R.results.run, (config, True), num_processes=2, use_port=port)
        else:
            seen.begin()
            metrics = R.results.run(config, True)
            seen.save(folder, name, processes=metrics["machine"]["processes"])

if __name__ == "__main__": main(*sys.argv[1:])
