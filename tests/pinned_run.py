"""Whole tiny runs whose numbers are pinned in pinned_run.json. `python tests/pinned_run.py --write` writes them again, after a change that is meant to change numbers; without the flag it
prints how far the numbers of this machine are from them."""
import csv, json, os, sys, tempfile
from pathlib import Path
import torch
from mgsr_nb import run as R
import mgsr_nb.run.results
from mgsr_nb.config import resolve
from mgsr_nb.models import save_model
from mgsr_nb.decoding import generator_for
from tiny_models import tiny_model
from tiny_runs import numbers, plain, tiny_parameters, tokenizer_of

PINNED = Path(__file__).with_suffix(".json")
METHODS = {"sft": dict(method="sft"), "on_policy": dict(method="mgsr", scrg_corrections=2, save_samples=0), "off_policy": dict(method="mgsr_off_policy", threshold_start=0.8, buffer_size=5)}
SHAPE = dict(seed=5, learning_rate=3e-3, max_steps=6, batch_size=5, max_new_tokens=8, eval_every=3, warmup_steps=1, spans="fixed", span_length=2, mask_temperature=0.1)
COLUMNS = ("step", "loss", "sft", "dac", "span", "clip_upper", "clip_lower", "kept_mass", "grad_norm", "data_tokens", "distilled_tokens", "distilled_spans", "scrg_corrected", "scrg_position",
           "by_student", "new_text", "learning_rate", "validation_nll", "validation_kl")

def save_teacher(folder: Path) -> str:
    """A LLaMA of three layers, since it has no dropout, with weights that depend on their names alone: not on the order in which a version of transformers draws them.
    Uniform numbers come from torch's Mersenne Twister here and from integers where the library draws texts: both are the same on every CPU; normal numbers and dropout masks are not."""
    tokenizer = tokenizer_of("llama")
    model = tiny_model("llama", 3, vocab=len(tokenizer))
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(float(p.ndim == 1) + 2 * torch.rand(p.shape, generator=generator_for("pinned", n)) - 1)
    for config in (model.config, model.generation_config): config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    save_model(model, tokenizer, folder)
    return str(folder)

def one(folder: Path, method: str, **more) -> dict:
    "A run in `folder`, artefacts of its own included: its log, and its metrics as {name: number}."
    os.environ["MGSR_CACHE"] = str(folder/"cache")
    teacher = save_teacher(folder/"teacher")
    parameters = {**SHAPE, **METHODS[method], **more}
    metrics = R.results.run(resolve(tiny_parameters(folder/"runs", teacher, **parameters, run_name="x")), cpu=True)
    with open(folder/"runs/x/log.csv") as f: log = [{k: float(v) for k, v in row.items() if v and k in COLUMNS} for row in plain(csv.DictReader(f))]
    return {"log": log, "metrics": {f"{who}/{where}": numbers(found) for who in ("student_start", "student", "teacher") for where, found in metrics[who].items()}}

def all_of_them(**more) -> dict:
    cache, found = os.environ.get("MGSR_CACHE"), {}
    try:
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder: found[method] = one(Path(folder), method, **more)
    finally: os.environ.pop("MGSR_CACHE") if cache is None else os.environ.update(MGSR_CACHE=cache)
    return found

def distances(found, pinned, where="") -> dict[str, float]:
    "Path -> |found - pinned| / max(0.01, |pinned|), over two nests of the same form; a different form is an infinite distance."
    if isinstance(pinned, (int, float)): return {where: abs(found - pinned) / max(0.01, abs(pinned))}
    a, b = (dict(enumerate(x)) if isinstance(x, list) else x for x in (found, pinned))
    if a.keys() != b.keys(): return {where: float("inf")}
    return {k: d for key in b for k, d in distances(a[key], b[key], f"{where}/{key}").items()}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    found = all_of_them()
    if "--write" in sys.argv: PINNED.write_text(json.dumps(found, indent=0).replace("\n", "").replace('}, {"step"', '},\n{"step"').replace('"metrics"', '\n"metrics"') + "\n")
    apart = distances(found, json.loads(PINNED.read_text()))
    print(f"{len(apart)} numbers; the largest distances:", *(f"{d:.1e} {name}" for name, d in sorted(apart.items(), key=lambda x: -x[1])[:5]), sep="\n")
