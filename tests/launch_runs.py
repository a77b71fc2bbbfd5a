"""One of two processes under tools/launch/fsdp.yaml: `accelerate launch --config_file fsdp.yaml launch_runs.py FOLDER` trains two steps by DDP, which is what accelerate makes of that file on a CPU,
then by FSDP, and leaves the losses, and what validation says, in FOLDER/RANK.json."""
import json, os, sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from mgsr_nb import run as R
import mgsr_nb.run.engine
import mgsr_nb.run.setup
import mgsr_nb.run.trainer
from mgsr_nb.config import resolve

def sharded(accelerator):
    "Make FSDP of DDP, with the options of the file, which accelerate has put into the environment."
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator

def two_steps(setup) -> dict:
    trainer = R.trainer.Trainer(replace(setup, student=deepcopy(setup.student)))
    rows = [trainer.step() for _ in range(2)]
    split = sum(isinstance(p, DTensor) for p in trainer.distiller.parameters())
    try: said = str(trainer.validate())
    except RuntimeError as e: said = str(e)
    return {"type": str(trainer.accelerator.distributed_type), "split": split, "rows": [{k: r[k] for k in ("loss", "sft", "dac", "span", "grad_norm")} for r in rows], "validation": said}

def main(folder: str):
    torch.set_num_threads(1)
    folder = Path(folder)
    del os.environ["ACCELERATE_USE_FSDP"]       # which the library refuses, for what this shows
    setup = R.setup.prepare(resolve(json.loads((folder/"parameters.json").read_text())), cpu=True)
    found, make = {"ddp": two_steps(setup)}, R.engine.make_accelerator
    R.trainer.make_accelerator = lambda *args: sharded(make(*args))
    found["fsdp"] = two_steps(setup)
    (folder/f"{os.environ['RANK']}.json").write_text(json.dumps(found))

if __name__ == "__main__":
    main(*sys.argv[1:])
    # what FSDP has made keeps gloo's group to the end, and a thread of it that lets go of a tensor while Python shuts down aborts the process
    os._exit(0)
