"""What tools/gpu_programme.py measures on a GPU in parts a to c, and what its suites share.

Every task has an estimate in seconds for a card of 2023 or later, and returns a dictionary of plain
numbers. A goal is a number with what it should be at most; whether it is met is part of the result.
"""
import time
from dataclasses import dataclass
from typing import Callable
import bench, gpu_check

@dataclass
class Task:
    name: str
    part: str
    seconds: float          # about
    run: Callable           # -> result
    spare: bool = False     # only if the suites keep enough time

@dataclass
class Size:
    "How large things are: on a GPU, and in a rehearsal."
    batch: int; prompt: int; new: int; large: int; layers: int
    rows: tuple; vocab: tuple; hidden: int; chunk: int; rounds: int
    teacher: str; dtype: str; matrix: int; megabytes: int

ON_GPU = Size(64, 256, 256, 256, 24, (4096, 8192), (49_152, 131_072), 2048, 1024, 3,
              "smollm2-135m", "bfloat16", 8192, 1024)
DRY = Size(2, 16, 4, 3, 1, (24, 32), (64, 96), 8, 16, 1, "lab-32x2", "float32", 64, 1)

def goal(measured, at_most):
    "A measured number and whether it is at most what it should be; None: it was not measured."
    return dict(measured=measured, at_most=at_most,
                met=None if measured is None else measured <= at_most)

FIRST = ("mgsr", "sft", "kd", "distillm", "minillm")      # what the first suites run

def tasks(o):
    "All tasks by name, in order of value."
    from mgsr_nb.presets import METHODS
    s = DRY if o.dry else ON_GPU
    def losses(m, spare=False):
        return Task(f"losses {m}", "a", 8, lambda: first_losses(o, m), spare)
    found = [Task("versions", "a", 10, lambda: versions(o, s)), *map(losses, FIRST)]
    found += [Task("decoding", "b", 25, lambda: decoding(o, s)),
              Task("profile", "b", 35, lambda: profile(o, s)),
              Task("steps", "b", 40, lambda: steps(o, s)),
              Task("large batch", "b", 30, lambda: large_batch(o, s))]
    found += [Task(f"objective N={n} V={v}", "c", 10 + n * v / 4e7,
                   lambda n=n, v=v: objective(o, s, n, v)) for n in s.rows for v in s.vocab]
    found += [losses(m, True) for m in METHODS if m not in FIRST]
    found += [Task("peers' steps", "c", 40, lambda: steps(o, s, PEERS), True),
              Task("pair", "d", 150, lambda: pair(o))]
    if o.dry:
        for t in found: t.seconds = 4.
    return {t.name: t for t in found}

# --- a

def versions(o, s):
    "Card, versions, and what the card can do: bytes and operations a second."
    import importlib.metadata as metadata, platform, torch
    names = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "triton")
    def version(name):
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return None
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    found |= dict(card=bench.machine(o), **peaks(o, s))
    if o.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= dict(memory_gb=card.total_memory / 1e9, cuda=torch.version.cuda)
    return found

def peaks(o, s):
    "Bytes a second of a copy, operations a second of a product in bfloat16."
    import torch
    a = torch.ones(s.megabytes * 2 ** 20 // 4, device=o.device)
    b = torch.empty_like(a)
    x = torch.ones(s.matrix, s.matrix, device=o.device, dtype=torch.bfloat16)
    copied, multiplied = timed(o, lambda: b.copy_(a)), timed(o, lambda: x @ x)
    return dict(bytes_per_second=2 * 4 * a.numel() / copied,
                operations_per_second=2 * s.matrix ** 3 / multiplied)

def timed(o, f, n=5):
    "Seconds of one call: the least of `n`, after one that warms up."
    f()
    best = float("inf")
    for _ in range(n):
        bench.synchronise(o)
        begin = time.perf_counter()
        f()
        bench.synchronise(o)
        best = min(best, time.perf_counter() - begin)
    return best

def first_losses(o, method):
    """The first losses of a method with the laboratory's small pair, here and on the CPU, and the
    tolerance in each precision."""
    small = dict(preset="lab", student_sft_steps=0, max_train_examples=64, eval_sets="lab",
                 batch_size=8, length_buckets=1, chunk_tokens=256, eval_prompts=2)
    if o.dry: small |= dict(teacher="lab-32x2", student="lab-32x1", max_new_tokens=6)
    return gpu_check.of_method(method, small, o.device) | {"tolerance": gpu_check.TOLERANCE}

# --- b

def pair_of(o, s, batch, cases="mgsr"):
    "Options and inputs of bench's part `step`."
    asked = bench.options(
        ["step", "--out", "-", "--cases", cases, "--device", o.device, "--dtype", s.dtype,
         "--rounds", str(s.rounds), "--batch", str(batch), "--new-tokens", str(s.new),
         "--prompt-tokens", str(s.prompt), "--chunk-tokens", str(s.chunk), "--teacher", s.teacher,
         "--student-layers", str(s.layers), "--threads", str(threads())])
    asked.parameters = dict(max_train_examples=max(batch, 64), eval_prompts=2)
    return asked

def threads():
    import torch
    return torch.get_num_threads()

def decoding(o, s):
    "Milliseconds a token of a batch: the usual loop, and the captured step; the same texts?"
    from mgsr_nb.captured import loop_for
    from mgsr_nb.decoding import generate
    x = bench.Pair(pair_of(o, s, s.batch), s.batch, s.new)
    prompts = [e.prompt_ids for e in x.setup.train[:s.batch]]
    keys, texts, found = [("decoding", b) for b in range(s.batch)], {}, {}
    def write(how, new):
        with x.setup.accelerator.autocast():
            return generate(x.setup.student, prompts, keys, [new] * s.batch, [-2], 0, x.setup.vocab,
                            loop=loop_for(x.setup.accelerator.device, how))
    for how in ("eager", "captured"):
        begin = time.perf_counter()
        write(how, s.new)
        found[f"{how}_first_call_seconds"] = time.perf_counter() - begin
        begin = time.perf_counter()
        texts[how] = write(how, s.new)
        whole = time.perf_counter() - begin
        begin = time.perf_counter()
        write(how, 1)       # the prompt, and the first token
        read = time.perf_counter() - begin
        found[f"{how}_ms_per_token"] = 1000 * (whole - read) / (s.new - 1)
        found[f"{how}_prompt_seconds"] = read
    same = sum(a == b for a, b in zip(*texts.values()))
    return found | dict(
        batch=s.batch, texts_equal=same / s.batch,     # in bfloat16 a rounding may move a token
        ms_per_token_at_floor=1000 * token_floor(o, s, x),
        goal_ms_per_token=goal(found["captured_ms_per_token"], 1.5))

def token_floor(o, s, x):
    "Seconds that reading weights once, and keys and values of all rows, takes at least."
    c, weights = x.setup.student.config, sum(p.numel() for p in x.setup.student.parameters())
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * size * s.batch
    read = 2 * (weights + cache * (s.prompt + s.new / 2))       # bytes, in bfloat16
    return read / peaks(o, s)["bytes_per_second"]

def profile(o, s):
    """Seconds of the parts of an on-policy step of MGSR beside what they take at least: weights,
    keys and values read once a token, products at the card's best rate."""
    x = bench.Pair(pair_of(o, s, s.batch), s.batch, s.new)
    trainer = x.trainer(method="mgsr")
    rows, parts = list(range(s.batch)), {}
    def clocked(name, f):
        bench.synchronise(o)
        begin = time.perf_counter()
        found = f()
        bench.synchronise(o)
        parts.setdefault(name, []).append(time.perf_counter() - begin)
        return found
    for n in range(s.rounds + 1):
        examples = x.setup.train[:s.batch]
        pairs, _ = clocked("writing", lambda: trainer.writer.source(n, examples, rows))
        trainer.clock.spans.clear()
        text, _ = clocked("scrg", lambda: trainer.writer.look_at(n, pairs, rows))
        parts.setdefault("scrg_rewriting", []).append(trainer.clock.read().get("generation", 0.))
        with trainer.clock.watching("objective", trainer.accelerator.unwrap_model(
                trainer.distiller).objective):
            clocked("update", lambda: trainer.update(examples, text))
        parts.setdefault("objective", []).append(trainer.clock.read()["objective"])
        trainer.progress.step += 1
    seconds = {name: min(found[1:]) for name, found in parts.items()}
    return dict(seconds=seconds, floor=floors(o, s, x), batch=s.batch, prompt=s.prompt, new=s.new)

def floors(o, s, x):
    count = lambda m: sum(p.numel() for p in m.parameters())
    student, teacher = count(x.setup.student), count(x.setup.teacher)
    tokens, rate = s.batch * (s.prompt + s.new), peaks(o, s)["operations_per_second"]
    return dict(writing=s.new * token_floor(o, s, x),
                reading=2 * (student + teacher) * tokens / rate,
                # two texts: the data's, and the student's
                update=2 * 6 * student * tokens / rate)

OURS = "kd,mgsr,mgsr_off_policy_replay,floor_student,floor_teacher,floor_decode"
PEERS = "kd,gkd_without_nll,trl_kd,trl_gkd"

def steps(o, s, cases=OURS):
    "Seconds of whole steps; an on-policy MGSR step in KD steps."
    asked = pair_of(o, s, s.batch, cases)
    asked.cases = cases.split(",")
    found = bench.measure_time(asked, (s.batch, s.new))
    seconds = {name: min(v) for name, v in found["seconds"].items()}
    result = dict(seconds=seconds, left_out=found["left_out"], batch=s.batch)
    if "mgsr" in seconds:
        result["goal_mgsr_in_kd_steps"] = goal(seconds["mgsr"] / seconds["kd"], 2.)
    return result

def large_batch(o, s):
    "Steps of MGSR at a batch that must not run out of memory, and their peak."
    x = bench.Pair(pair_of(o, s, s.large), s.large, s.new)
    trainer = x.trainer(method="mgsr", micro_batch_size=min(s.batch, s.large))
    peak = bench.Peak(o.device)
    begin = time.perf_counter()
    losses = [trainer.step()["loss"] for _ in range(2)]
    return dict(batch=s.large, losses=losses, seconds=time.perf_counter() - begin,
                peak_mb=peak.bytes() / 2 ** 20)

# --- c

LOSSES = "mgsr,dense_forward_kl,liger_jsd,trl_chunked_jsd,mgsr_nb_forward_kl,floor_matrix_products"

def objective(o, s, rows, vocab):
    "Seconds and peak memory of the three-term objective and of others on the same rows."
    asked = bench.options(
        ["loss", "--out", "-", "--cases", LOSSES, "--device", o.device, "--dtype", s.dtype,
         "--hidden", str(s.hidden), "--rounds", str(s.rounds), "--chunk-tokens", str(s.chunk),
         "--threads", str(threads())])
    found = bench.measure_time(asked, (rows, vocab))
    seconds = {name: min(v) for name, v in found["seconds"].items()}
    peak = {name: peak_of(asked, rows, vocab, name) for name in seconds}
    def ratio(of, name):
        return of["mgsr"] / of[name] if of.get("mgsr") and of.get(name) else None
    return dict(seconds=seconds, peak_mb=peak, left_out=found["left_out"],
                goal_time_of_liger=goal(ratio(seconds, "liger_jsd"), 0.85),
                goal_memory_of_dense=goal(ratio(peak, "dense_forward_kl"), 0.25))

def peak_of(asked, rows, vocab, name):
    "MiB above the inputs; None where there is no room."
    import torch
    asked.cases = [name]
    try: return bench.measure_memory(asked, (rows, vocab)) / 2 ** 20
    except torch.OutOfMemoryError: return None

# --- d

def pair(o):
    "What all cells share: the tuned teacher, the healed student, and the scores of both."
    from gpu_programme import PRESET
    from mgsr_nb.config import resolve
    from mgsr_nb.run.results import scores
    from mgsr_nb.run.setup import prepare
    setup = prepare(resolve(o.parameters, preset=PRESET), cpu=o.device == "cpu")
    models = {"teacher": setup.teacher, "student_start": setup.student}
    found = {who: scores(setup, m, setup.keys[who]) for who, m in models.items()}
    return {who: {k: round(v, 4) for k, v in s["average"].items()} for who, s in found.items()}
