"""Does the library do on a GPU what it does on a CPU? One table.

    python tools/gpu_check.py [--device cuda] [-p NAME VALUE] [--quickstart] [--performance]

1. Every method, three optimiser steps on the same text: losses in float32 and in bfloat16
   autocast against those of the CPU.
2. The quickstart, as a person would run it (with --quickstart), and the performance script at
   sizes for a GPU (with --performance).

The two devices have different random streams, so their samples differ; the text is therefore
sampled once, on the CPU, and given to both. Without CUDA it says so and does nothing.
`--device cpu` compares the CPU with itself: a test of this script.
"""
import argparse, json, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# relative difference of a loss that passes. float32: other summation orders in 30 layers; bfloat16
# has 8 bits of mantissa
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


def trainer_of(parameters: dict, device: str, precision: str):
    "A trainer without dropout, of which the devices would drop different units."
    import torch
    from mgsr_nb.config import resolve
    from mgsr_nb.run.setup import prepare
    from mgsr_nb.run.trainer import Trainer
    torch.backends.cuda.matmul.allow_tf32 = False
    config = resolve({**parameters, "precision": precision, "lora_dropout": 0.0})
    trainer = Trainer(prepare(config, cpu=device == "cpu"))
    for m in trainer.setup.student.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
    return trainer

def losses(parameters: dict, device: str, precision: str, texts=None):
    """Losses of the first steps, and the text that each was distilled on: what was sampled here, or
    what `texts` prescribes."""
    from mgsr_nb.run.step import Distilled
    trainer = trainer_of(parameters, device, precision)
    config, found, used = trainer.setup.config, [], []
    for step in range(STEPS):
        if texts is None: examples, text, _ = trainer.writer.draw(step)
        else:
            examples, text, _ = texts[step]
            # only the words: hidden states and constants of the policy are this device's own
            if isinstance(text, Distilled) and config.pg_weight:
                text = trainer.writer.look_at(step, text.pairs, range(config.batch_size))[0]
            elif isinstance(text, Distilled): text = Distilled(text.pairs)
        used.append((examples, text, None))
        found.append(trainer.update(examples, text)["loss"])
        trainer.progress.step += 1
    return found, used

STEPS = 3
SHORT = dict(teacher_sft_steps=0, max_steps=STEPS, warmup_steps=0, eval_every=0, eval_prompts=2)

def precisions_on(device: str) -> list[str]:
    # a processor without bfloat16 instructions takes hours for it
    return [p for p in TOLERANCE if device != "cpu" or p == "float32"]

def of_method(method: str, parameters: dict, device: str) -> dict:
    """The first losses of a method: `cpu`, and for each precision on the device `losses`, the worst
    `relative` difference, and whether that is `within` the tolerance."""
    from mgsr_nb.presets import METHODS
    chosen = {**parameters, "method": method, **SHORT}
    # so that student text is compared
    if METHODS[method].get("sampling") in ("mixed", "off_policy"): chosen["sampling"] = "on_policy"
    reference, texts = losses(chosen, "cpu", "float32")
    rows = {"cpu": reference}
    for precision in precisions_on(device):
        found, _ = losses(chosen, device, precision, texts)
        worst = max(abs(a - b) / abs(a) for a, b in zip(reference, found))
        rows[precision] = dict(losses=found, relative=worst, within=worst <= TOLERANCE[precision])
    return rows

def compare(parameters: dict, device: str, report) -> bool:
    "One row a method; whether all are within the tolerance."
    from mgsr_nb.presets import METHODS
    good, precisions = True, precisions_on(device)
    heads = [f"{device + ' ' + p:>31} {'relative':>9}" for p in precisions]
    report(f"{'method':18} {'CPU float32':>31} " + " ".join(heads))
    for method in METHODS:
        rows = of_method(method, parameters, device)
        cells = [f"{method:18} {show(rows['cpu']):>31}"]
        for p in precisions:
            row = rows[p]
            good &= row["within"]
            mark = " " if row["within"] else "!"
            cells.append(f"{show(row['losses']):>31} {row['relative']:8.1e}{mark}")
        report(" ".join(cells))
    return good

def show(values) -> str: return ", ".join(f"{v:.5f}" for v in values)


def performance_commands() -> list[list[str]]:
    "tools/bench.py at sizes for a GPU."
    loss = ["--dtype", "float32", "--rows", "1024,4096", "--vocab", "49152,131072",
            "--hidden", "2048"]
    parts = {"loss": loss, "scrg": ["--dtype", "bfloat16"], "step": ["--dtype", "bfloat16"]}
    return [[sys.executable, str(ROOT/"tools"/"bench.py"), part, "--device", "cuda", *more,
             "--out", str(ROOT/"runs"/"performance"/f"{part}-cuda.csv")]
            for part, more in parts.items()]

def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a parameter of the runs, the value as JSON")
    parser.add_argument("--quickstart", action="store_true", help="the quickstart, by papermill")
    parser.add_argument("--performance", action="store_true", help="tools/bench.py for a GPU")
    return parser.parse_args()

def main() -> int:
    chosen = options()
    import torch
    on_gpu = chosen.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here (or torch is a CPU build); nothing was "
              "checked")
        return 0
    where = torch.cuda.get_device_name() if on_gpu else "the CPU, against itself"
    print(f"gpu-check on {where}, torch {torch.__version__}")
    parameters = {name: json.loads(value) for name, value in chosen.p}
    good = compare(parameters, chosen.device, lambda line: print(line, flush=True))
    commands = []
    if chosen.quickstart:
        commands.append(["mgsr-run", "-p", "precision", "bfloat16", "-p", "run_name", "gpu-check"])
    if chosen.performance: commands += performance_commands()
    for command in commands: good &= subprocess.run(command).returncode == 0
    print("gpu-check: " + ("all within the tolerance" if good else
                           "NOT all within the tolerance (marked !), or a command failed"))
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
