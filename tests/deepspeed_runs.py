"""One of two processes: `accelerate launch deepspeed_runs.py FOLDER` runs the cases of FOLDER/cases.json, (name, parameters, step to fail at) each, with DeepSpeed where the launcher asks for it.

On a CPU accelerate makes a DeepSpeed engine, but takes every process for the only one: it is told how many there are."""
import json, os, sys
from pathlib import Path
import torch
from accelerate.state import PartialState
from mgsr_nb import run as R
import mgsr_nb.run.engine
import mgsr_nb.run.results
import mgsr_nb.run.trainer
from mgsr_nb.config import resolve

def counted(make):
    def made(precision, cpu):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true": return make(precision, cpu)
        PartialState()
        PartialState._shared_state.update(num_processes=int(os.environ["WORLD_SIZE"]), process_index=int(os.environ["RANK"]), local_process_index=int(os.environ["LOCAL_RANK"]))
        return make(precision, False)
    return made

def failing(step: int):
    draw = R.trainer.Writer.draw
    def drawn(self, at):
        if at + 1 == step: raise ValueError("the run is cut off")
        return draw(self, at)
    R.trainer.Writer.draw = drawn
    return draw

def main(folder: str):
    torch.set_num_threads(1)
    R.trainer.make_accelerator = R.engine.make_accelerator = counted(R.engine.make_accelerator)
    for name, parameters, fail_at in json.loads((Path(folder)/"cases.json").read_text()):
        draw = failing(fail_at)
        try: R.results.run(resolve(parameters, run_name=name), cpu=True)
        except ValueError as e:
            if str(e) != "the run is cut off": raise
        finally: R.trainer.Writer.draw = draw
        (Path(folder)/f"kind-{os.environ['RANK']}").write_text(str(PartialState().distributed_type))

if __name__ == "__main__": main(*sys.argv[1:])
