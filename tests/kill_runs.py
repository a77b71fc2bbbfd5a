"A run that kills its own process on purpose, at a moment that is given by a place in the program, how often it was reached, and a delay."
import json, os, signal, time
from pathlib import Path
import torch
from mgsr_nb import decoding as S, run as R
import mgsr_nb.run.checkpoints
import mgsr_nb.run.results
import mgsr_nb.run.setup
import mgsr_nb.run.trainer
from mgsr_nb.config import resolve
from tiny_runs import plain

# `writing` is every file that is renamed into place: the log, results, checkpoints, artefacts
PLACES = {"anywhere": (R.results, "run"), "sampling": (S, "draw_tokens"), "update": (R.trainer.Trainer, "update"), "checkpoint": (R.checkpoints.Checkpoints, "save"), "pruning": (R.checkpoints.shutil, "rmtree"),
          "log": (R.trainer, "write_csv"), "metrics": (R.results, "write_results"), "writing": (os, "replace")}

def kill_soon(delay: float):
    "SIGKILL for this process after `delay` seconds, by another one: nothing here can prepare for it, be it in the middle of a file."
    victim = os.getpid()
    if delay == 0: os.kill(victim, signal.SIGKILL)
    if os.fork() == 0:
        time.sleep(delay)
        try: os.kill(victim, signal.SIGKILL)
        finally: os._exit(0)

def watch(counts: dict, seconds: dict, target=None):
    "Count and time the calls at all places; `target` (place, call, delay) is where to die."
    def wrapped(place, inner):
        def outer(*args, **kwargs):
            counts[place] = counts.get(place, 0) + 1
            if target and target[:2] == (place, counts[place]): kill_soon(target[2])
            begin = time.perf_counter()
            try: return inner(*args, **kwargs)
            finally: seconds[place] = seconds.get(place, 0.) + time.perf_counter() - begin
        return outer
    for place, (owner, name) in PLACES.items(): setattr(owner, name, wrapped(place, getattr(owner, name)))

def remember_state(path: Path):
    "Save all that training ends with to `path`: weights, optimiser, schedule, source, log, random numbers."
    fit = R.trainer.Trainer.fit
    def fitted(self, *args, **more):
        log = fit(self, *args, **more)
        torch.save({"weights": self.distiller.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "source": self.writer.source.state_dict(),
                    "log": plain(log), "best": self.progress.best, "torch": torch.get_rng_state()}, path)
        return log
    R.trainer.Trainer.fit = fitted

def child(parameters: dict, cache: str, state: str, found: str, target=None):
    "A whole run, in a process of its own; what was counted and timed goes to the file `found`."
    os.environ["MGSR_CACHE"] = cache
    torch.set_num_threads(1)
    remember_state(Path(state))
    counts, seconds = {}, {}
    watch(counts, seconds, target)
    R.results.run(resolve(parameters), cpu=True)
    Path(found).write_text(json.dumps({"counts": counts, "seconds": seconds}))
