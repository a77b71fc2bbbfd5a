"""Time and peak memory of the method's parts, in one run and as ratios to plain or public implementations of the same work.

    python tools/bench.py loss --out FILE.csv    the objective and other divergences, from hidden states to gradients
    python tools/bench.py scrg --out FILE.csv    sampling with SCRG against sampling
    python tools/bench.py step --out FILE.csv    whole optimiser steps of the methods, and of TRL's GKD trainer

Time: all cases in one process, in rounds that each begin with another case. Memory: each case in a process of its own.
A comma-separated list of sizes (--rows, --vocab, --batch, --new-tokens) also measures, one list at a time, how cost grows;
the last size of each list is the main one. TRL and Liger are optional: a case whose library is missing is left out, and that is said.
"""
import argparse, copy, importlib.metadata, itertools, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path
# torch is imported by the processes that measure, not by the one that starts them

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ['part', 'case', 'relative_to', 'N', 'V', 'H', 'batch', 'prompt_tokens', 'new_tokens', 'dtype', 'device', 'threads', 'rounds', 'seconds_median', 'seconds_min', 'ratio',
           'peak_mb', 'peak_ratio', 'value', 'machine', 'torch', 'transformers', 'trl', 'liger']
CASES = {'loss': {}, 'scrg': {}, 'step': {}}        # part -> {case: function of the inputs that returns `step`, a function that does the work once}
RELATIVE = {'loss': {}, 'scrg': {}, 'step': {}}     # part -> {case: the cases whose times are added up, and what its ratio is to}


def case(part, name, relative_to, /, **options):
    "Register the function below as a case; it is called with the inputs and `options`."
    def register(make):     # of several decorators the lowest comes first
        CASES[part][name], RELATIVE[part][name] = (lambda inputs: make(inputs, **options)), relative_to.split(' + ')
        return make
    return register


# ---- part `loss`: N rows of hidden states of both models, both heads

class Rows:
    "Random hidden states (N, H) and heads (V, H) whose logits have a spread of 3, a teacher that is near the student, labels (N,), and spans of four tokens."
    def __init__(self, o, rows, vocab, hidden):
        import torch
        from torch import nn
        self.o, self.rows, self.vocab, device = o, rows, vocab, torch.device(o.device)
        draw = torch.Generator(device).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=draw, device=device, dtype=getattr(torch, o.dtype))
        def head(weight, trained):
            linear = nn.Linear(hidden, vocab, bias=False, device='meta')
            linear.weight = nn.Parameter(weight, trained)
            return linear
        weight, self.hidden = normal(vocab, hidden).mul_(3 / hidden ** .5), normal(rows, hidden)
        self.teacher_head = head(normal(vocab, hidden).mul_(1 / hidden ** .5).add_(weight), False)
        self.teacher_hidden, self.head = normal(rows, hidden).mul_(.3).add_(self.hidden), head(weight, True)
        self.hidden.requires_grad_()
        self.labels = torch.randint(vocab, (rows,), generator=draw, device=device)
        self.pair_weight = torch.tensor([.25, .25, .25, 0.], device=device).repeat(-(-rows // 4))[:rows]
        self.counts = dict(data_tokens=rows, distilled_tokens=rows, distilled_spans=-(-rows // 4))

    def clear(self): self.hidden.grad = self.head.weight.grad = None

    def backward(self, loss):
        "Gradients of hidden states and head; the loss."
        loss.backward()
        return loss.detach()

    def check(self, name):
        "Whether the work was done."
        for x in (self.hidden, self.head.weight):
            if x.grad is None or not x.grad.isfinite().all(): raise RuntimeError(f'{name}: a gradient is missing or not finite')

    def teacher_logits(self):
        import torch
        with torch.no_grad(): return self.teacher_head(self.teacher_hidden)


@case('loss', 'floor_matrix_products', 'dense_forward_kl')
def floor(x):
    "What no implementation can do without: logits of both models, and the products that bring a gradient to hidden states and head. In chunks, in place, no loss."
    import torch
    @torch.no_grad()
    def step():
        h, w = x.hidden.detach(), x.head.weight.detach()
        to_h, to_w = torch.empty_like(h), torch.zeros_like(w)
        for a in range(0, len(h), x.o.chunk_tokens):
            here = slice(a, a + x.o.chunk_tokens)
            slope = h[here] @ w.T
            x.teacher_head(x.teacher_hidden[here])
            to_h[here] = slope @ w
            to_w.addmm_(slope.T, h[here])
        x.hidden.grad, x.head.weight.grad = to_h, to_w
        return 0.
    return step

@case('loss', 'dense_forward_kl', 'dense_forward_kl')
def dense_forward_kl(x):
    "Forward KL in plain torch on the logits of all rows."
    import torch.nn.functional as F
    def step():
        log_p = x.teacher_logits().float().log_softmax(-1)
        log_q = x.head(x.hidden).float().log_softmax(-1)
        return x.backward(F.kl_div(log_q, log_p, reduction='batchmean', log_target=True))
    return step

@case('loss', 'mgsr_block_64', 'dense_forward_kl', block_rows=64)
@case('loss', 'mgsr_block_4', 'dense_forward_kl', block_rows=4)
@case('loss', 'mgsr_fixed_clip', 'dense_forward_kl', clip='fixed_quantile', mask_temperature=0.)
@case('loss', 'mgsr_without_span', 'dense_forward_kl', span_weight=0.)
@case('loss', 'mgsr', 'dense_forward_kl')
def mgsr(x, block_rows=0, **parameters):
    "The whole objective with its default parameters: NLL, DAC-KL with a learned clip, and the span loss. The other cases change one thing each."
    from mgsr_nb.config import resolve
    from mgsr_nb.run.parts import make_objective
    objective = make_objective(resolve(chunk_tokens=x.o.chunk_tokens, **parameters), x.vocab)
    objective.block_rows = block_rows
    return ours(x, objective)

@case('loss', 'mgsr_nb_jsd', 'dense_forward_kl', divergence='jsd')
@case('loss', 'mgsr_nb_forward_kl', 'dense_forward_kl', divergence='forward_kl')
def plain_divergence(x, divergence):
    "The same engine with one plain divergence (the JSD's beta is 1/2)."
    from mgsr_nb.objective import Divergence, Objective
    return ours(x, Objective({'kd': Divergence(divergence)}, {'kd': 1.}, x.o.chunk_tokens))

def ours(x, objective):
    from mgsr_nb.objective import Text
    objective = objective.to(x.hidden.device)
    def step():
        for p in objective.parameters(): p.grad = None
        text = Text(x.hidden, x.labels, x.head, x.teacher_hidden, x.teacher_head, x.pair_weight)
        return x.backward(objective(text, objective.on('data', 'distilled'), x.counts).loss)
    return step

@case('loss', 'trl_dense_jsd', 'dense_forward_kl', beta=.5)
@case('loss', 'trl_dense_forward_kl', 'dense_forward_kl', beta=0.)
def trl_dense(x, beta):
    "TRL's GKD loss on the logits of all rows."
    from trl.experimental.gkd import GKDTrainer
    def step():
        return x.backward(GKDTrainer.generalized_jsd_loss(x.head(x.hidden)[None], x.teacher_logits()[None], labels=x.labels[None], beta=beta))
    return step

@case('loss', 'trl_chunked_jsd', 'dense_forward_kl', beta=.5)
@case('loss', 'trl_chunked_forward_kl', 'dense_forward_kl', beta=0.)
def trl_chunked(x, beta):
    "The loss of TRL's DistillationTrainer, tiles of 4096 rows and 32768 classes."
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    def step():
        found = ChunkedDivergenceFunction.apply(x.hidden, x.head.weight, None, x.teacher_hidden, x.teacher_head.weight, None, beta)
        return x.backward(found[0].mean())
    return step

@case('loss', 'liger_jsd_same_chunk', 'dense_forward_kl', beta=.5, same_chunk=True)
@case('loss', 'liger_jsd', 'dense_forward_kl', beta=.5)
@case('loss', 'liger_forward_kl', 'dense_forward_kl', beta=0.)
def liger(x, beta, same_chunk=False):
    "Liger's chunked JSD without its NLL, not compiled; chunks of its default of 1024 rows, or of as many as ours."
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    options = dict(chunk_size=x.o.chunk_tokens) if same_chunk else {}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0., weight_soft_loss=1., beta=beta, compiled=False, **options)
    def step(): return x.backward(loss(x.hidden, x.head.weight, x.teacher_hidden, x.teacher_head.weight, x.labels))
    return step


# ---- parts `scrg` and `step`: a pair of models, texts of fixed lengths that no stop id ends

class Pair:
    "Teacher, student and trainers. Learning rates are so small that all rounds see the same models."
    def __init__(self, o, batch, new_tokens):
        import dataclasses
        from mgsr_nb.config import resolve
        from mgsr_nb.run.setup import prepare
        self.o, self.batch, self.new_tokens = o, batch, new_tokens
        self.fixed = dict(teacher=o.teacher, student=o.student, student_layers=o.student_layers, layer_choice='even', teacher_sft_steps=0, precision=o.dtype, eval_sets='tiny', shorten='beginning',
                          max_prompt_tokens=o.prompt_tokens, max_tokens=o.prompt_tokens + new_tokens, max_new_tokens=new_tokens, batch_size=batch, max_steps=10 ** 6,
                          warmup_steps=0, learning_rate=1e-9, sub_learning_rate=1e-9, chunk_tokens=o.chunk_tokens, **getattr(o, 'parameters', {}))
        self.setup = prepare(resolve(self.fixed), cpu=o.device == 'cpu')
        self.replace = dataclasses.replace
        self.setup.train, self.setup.stops = self.examples(), []

    def clear(self): self.setup.student.zero_grad()
    def check(self, name): pass

    def examples(self):
        "The training examples with prompts and responses cut or repeated to the fixed lengths."
        fit = lambda ids, n: (list(ids) * -(-n // len(ids)))[:n]
        stops = set(self.setup.stops)
        text = [(e, [i for i in e.response_ids if i not in stops] or e.prompt_ids) for e in self.setup.train]
        return [self.replace(e, prompt_ids=fit(e.prompt_ids, self.o.prompt_tokens), response_ids=fit(ids, self.new_tokens)) for e, ids in text]

    def trainer(self, **parameters):
        from mgsr_nb.config import resolve
        from mgsr_nb.run.trainer import Trainer
        return Trainer(self.replace(self.setup, config=resolve({**self.fixed, **parameters})))

    def tokens(self):
        "(B, prompt + response) ids of the first batch."
        import torch
        return torch.tensor([e.prompt_ids + e.response_ids for e in self.setup.train[:self.batch]], device=self.setup.accelerator.device)


@case('scrg', 'generate_and_scrg', 'generate', revised=True)
@case('scrg', 'generate', 'generate', revised=False)
def sampling(x, revised):
    "The student's samples for a batch of prompts, and their revision; the value is the number of tokens written for each response."
    trainer, steps, rows = x.trainer(method='mgsr'), itertools.count(), list(range(x.batch))
    def step():
        n = next(steps)
        pairs, _ = trainer.writer.source(n, x.setup.train[:x.batch], rows)
        written = [len(y) for _, y in pairs]
        if revised:
            with trainer.accelerator.autocast(): revision = trainer.writer.revise(n, pairs, rows)
            written += [len(y) - j for (_, y), j in zip(revision.pairs, revision.position) if j >= 0]
        return sum(written) / x.batch
    return step

@case('scrg', 'score', 'generate')
def score(x):
    "What both models' reading and comparing of such texts takes by itself; what is left of `generate_and_scrg` is the student's writing."
    trainer, rows = x.trainer(method='mgsr'), list(range(x.batch))
    pairs, _ = trainer.writer.source(0, x.setup.train[:x.batch], rows)
    def step():
        with trainer.accelerator.autocast(): return trainer.writer.revise.scorer(pairs, [(0, 'teacher', 0, row, 0) for row in rows]).kl.mean()
    return step

def forward(x, model, ids):
    "Logits of the response tokens' positions, (B, new_tokens, V)."
    with x.setup.accelerator.autocast(): return model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=x.new_tokens).logits

@case('step', 'floor_student_compiled', 'floor_student', compiled=True)
@case('step', 'floor_student', 'floor_student')
def floor_student(x, compiled=False):
    "Forward and backward of the student with a plain cross-entropy on the response tokens; also as torch.compile makes it."
    import shutil, torch
    import torch.nn.functional as F
    if compiled and x.o.device == 'cpu' and not shutil.which('g++'): raise ModuleNotFoundError(name='a C++ compiler')
    ids, student = x.tokens(), x.setup.student
    model = torch.compile(student) if compiled else student
    def step():
        student.train()
        loss = F.cross_entropy(forward(x, model, ids).float().flatten(0, 1), ids[:, -x.new_tokens:].flatten())
        loss.backward()
        return loss.detach()
    return step

@case('step', 'floor_teacher', 'floor_student')
def floor_teacher(x):
    "Forward of the teacher, logits of the response tokens."
    import torch
    ids = x.tokens()
    def step():
        with torch.no_grad(): forward(x, x.setup.teacher, ids)
        return 0.
    return step

@case('step', 'floor_decode', 'floor_student')
def floor_decode(x):
    "The student writes the response tokens, the likeliest one each time, with a cache, its products in the faster of the ways that we know."
    import torch
    from mgsr_nb.decoding import few_rows
    prompts, student = x.tokens()[:, :x.o.prompt_tokens], x.setup.student
    def step():
        student.eval()
        ids, cache = prompts, None
        with torch.no_grad(), few_rows(student), x.setup.accelerator.autocast():
            for _ in range(x.new_tokens):
                found = student(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
        return 0.
    return step

DATA, KD = 'floor_student', 'floor_student + floor_teacher'     # one text: a pass of the student gives both the NLL and the divergence
REPLAY, WRITTEN = 'floor_student + ' + KD, 'floor_student + ' + KD + ' + floor_decode'      # a text of the data for the NLL, and one of the student
@case('step', 'mgsr_off_policy_replay', REPLAY, method='mgsr_off_policy', choice='replay')
@case('step', 'mgsr_off_policy', WRITTEN, method='mgsr_off_policy', choice='student')
@case('step', 'mgsr', WRITTEN, method='mgsr')
@case('step', 'distillm_replay', REPLAY, method='distillm', choice='replay')
@case('step', 'distillm', WRITTEN, method='distillm', choice='student')
@case('step', 'gkd_without_nll', KD + ' + floor_decode', method='gkd', mixed_fraction=1., sft_weight=0.)
@case('step', 'gkd', WRITTEN, method='gkd', mixed_fraction=1.)
@case('step', 'kd', KD, method='kd')
@case('step', 'sft', DATA, method='sft')
def whole_step(x, choice=None, **parameters):
    "An optimiser step of a method. Those that draw between sources always draw the same one here: `choice`, or the student's own text."
    trainer = x.trainer(**parameters)
    if choice:
        trainer.writer.source.remember([(e.prompt_ids, e.response_ids) for e in x.setup.train])
        trainer.writer.source.choice = lambda step: choice
    def step():
        x.setup.student.train()
        return trainer.step()['loss']
    return step

@case('step', 'trl_gkd', KD + ' + floor_decode', lmbda=1., beta=.5)
@case('step', 'trl_kd', KD, lmbda=0., beta=0.)
def trl_step(x, lmbda, beta):
    "A step of TRL's GKD trainer on the data or on the student's own text, JSD alone, without gradient checkpointing (as ours)."
    import torch
    trainer, ids = trl_trainer(x, lmbda, beta), x.tokens()
    labels, prompts = ids.clone(), ids[:, :x.o.prompt_tokens]
    labels[:, :x.o.prompt_tokens] = -100
    optimizer, student = trainer.create_optimizer(), trainer.accelerator.prepare_model(trainer.model)
    def step():
        student.train()
        loss = trainer.training_step(student, dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, prompts=prompts, prompt_attention_mask=torch.ones_like(prompts)))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad()
        return loss
    return step

def trl_trainer(x, lmbda, beta):
    "With models of its own, since it wraps their forward pass."
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    folder = tempfile.TemporaryDirectory()
    args = GKDConfig(output_dir=folder.name, per_device_train_batch_size=x.batch, max_length=x.o.prompt_tokens + x.new_tokens, max_new_tokens=x.new_tokens,
                     temperature=1., lmbda=lmbda, beta=beta, learning_rate=1e-9, bf16=x.o.dtype == 'bfloat16', use_cpu=x.o.device == 'cpu', gradient_checkpointing=False, report_to='none')
    nothing = Dataset.from_list([dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')])])
    student, teacher = copy.deepcopy(x.setup.student), copy.deepcopy(x.setup.teacher)
    student.generation_config.eos_token_id = None     # as everywhere here, nothing ends a text
    trainer = GKDTrainer(model=student, teacher_model=teacher, args=args, train_dataset=nothing, processing_class=x.setup.tokenizer)
    trainer.current_gradient_accumulation_steps = 1     # its training loop, which is not used here, would say so
    trainer.folder = folder                             # goes when the trainer goes
    return trainer


# ---- measuring

def make_inputs(o, size): return Rows(o, *size, o.hidden) if o.part == 'loss' else Pair(o, *size)

def make_cases(o, inputs):
    "{case: step} of those that can run here, and {case: why not}."
    steps, left_out = {}, {}
    for name in o.cases:
        try: steps[name] = CASES[o.part][name](inputs)
        except ModuleNotFoundError as e: left_out[name] = f'{e.name} is not installed'
    return steps, left_out

def synchronise(o):
    import torch
    if o.device != 'cpu': torch.cuda.synchronize()

def rotated(names, n): return names[n % len(names):] + names[:n % len(names)]

def warm_up(inputs, steps, left_out):
    "Every case once. One that a GPU has no room for goes from `steps` to `left_out`."
    import torch
    for name in list(steps):
        inputs.clear()
        try: steps[name]()
        except torch.OutOfMemoryError: left_out[name] = 'out of memory'; del steps[name]
        else: inputs.check(name)

def measure_time(o, size):
    "Seconds of each round of each case, in this process, after a round that warms up; and the mean of what the rounds returned."
    inputs = make_inputs(o, size)
    steps, left_out = make_cases(o, inputs)
    warm_up(inputs, steps, left_out)
    values, seconds = {name: [] for name in steps}, {name: [] for name in steps}
    for n in range(o.rounds):
        for name in rotated(list(steps), n):
            inputs.clear(); synchronise(o)
            start = time.perf_counter()
            value = steps[name](); synchronise(o)
            seconds[name].append(time.perf_counter() - start)
            values[name].append(float(value))
    return dict(seconds=seconds, values={name: statistics.mean(v) for name, v in values.items()}, left_out=left_out, machine=machine(o), versions=versions())

def measure_memory(o, size):
    "Peak bytes above what the inputs hold, of the one case in `o.cases`: gradients and an optimiser's state count, the inputs do not."
    step_of = lambda size: make_cases(o, make_inputs(o, size))[0][o.cases[0]]
    if o.part == 'loss': step_of((8, 64))()       # loads what the code itself needs
    step = step_of(size)
    peak = Peak(o.device)
    for _ in range(1 if o.part == 'loss' else 2): step(); synchronise(o)      # an optimiser's state is there from the second step on
    return peak.bytes()

class Peak:
    "Highest memory since it was made, above what was held then. On a GPU torch counts; on Linux the kernel does, for this process alone."
    def __init__(self, device):
        self.cuda, self.linux = device != 'cpu', Path('/proc/self/clear_refs').exists()
        if self.cuda: import torch; torch.cuda.reset_peak_memory_stats()
        elif self.linux: Path('/proc/self/clear_refs').write_text('5')       # the high-water mark falls to what is held now
        self.start = self.now(high=False)

    def bytes(self): return max(self.now(high=True) - self.start, 0)

    def now(self, high):
        if self.cuda:
            import torch
            return torch.cuda.max_memory_allocated() if high else torch.cuda.memory_allocated()
        if self.linux:      # not getrusage: its maximum begins with what the parent process held
            status = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
            return 1024 * int(status['VmHWM' if high else 'VmRSS'].split()[0])
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

def machine(o):
    "The GPU's name, or the CPU's and how many cores it shows."
    if o.device != 'cpu':
        import torch
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return f'{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores'

def versions():
    "Versions of what is compared; empty where it is not installed."
    def version(package):
        try: return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError: return ''
    return dict(torch=version('torch'), transformers=version('transformers'), trl=version('trl'), liger=version('liger-kernel'))


# ---- processes and rows

def worker(o):
    "What a measuring process does: read the task from standard input, write the result to the file that it names."
    task = json.load(sys.stdin)
    o = argparse.Namespace(**task['options'])
    import torch
    torch.set_num_threads(o.threads)
    if o.device != 'cpu': torch.cuda.init()
    found = measure_time(o, task['size']) if task['what'] == 'time' else measure_memory(o, task['size'])
    Path(task['result']).write_text(json.dumps(found))

def in_process(o, what, size, cases):
    "The result of `measure_time` or `measure_memory` in a fresh process."
    env = {**os.environ, 'OMP_NUM_THREADS': str(o.threads), 'TRL_EXPERIMENTAL_SILENCE': '1', 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    # every large block is given back to the system when it is freed, so that what is held is what is used
    if what == 'memory': env |= {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder)/'result.json'
        task = dict(what=what, size=size, result=str(result), options={**vars(o), 'cases': cases})
        done = subprocess.run([sys.executable, __file__, 'worker'], input=json.dumps(task), env=env, text=True, capture_output=True)
        if done.returncode: raise RuntimeError(f'{what} of {", ".join(cases)} at {size} failed:\n{done.stderr[-4000:]}')
        return json.loads(result.read_text())

def sizes(*lists):
    "All with the last of each list; and each other value of one list with the last of the others. The main size comes first."
    main = tuple(values[-1] for values in lists)
    return [main] + [main[:i] + (value,) + main[i + 1:] for i, values in enumerate(lists) for value in values[:-1]]

def measure(o, size):
    "The rows of one size."
    wanted = list(dict.fromkeys([base for name in o.cases for base in RELATIVE[o.part][name]] + o.cases))
    timed = in_process(o, 'time', size, wanted)
    for name, why in timed['left_out'].items(): print(f'{name}: left out, {why}', file=sys.stderr)
    peaks = {name: in_process(o, 'memory', size, [name]) for name in timed['seconds']} if o.memory else {}
    where = dict(zip(('N', 'V', 'H'), (*size, o.hidden))) if o.part == 'loss' else dict(zip(('batch', 'new_tokens', 'prompt_tokens'), (*size, o.prompt_tokens)))
    return [dict(part=o.part, case=name, relative_to=' + '.join(RELATIVE[o.part][name]), **where, dtype=o.dtype, device=o.device, threads=o.threads, rounds=o.rounds,
                 **ratios(name, RELATIVE[o.part][name], timed['seconds'], peaks), value=f'{timed["values"][name]:.6g}', machine=timed['machine'], **timed['versions'])
            for name in timed['seconds']]

def ratios(name, bases, seconds, peaks):
    "Median and minimum of a case, and its ratio to its bases: the sum of their medians, the largest of their peaks. No ratio to a base that was left out."
    median = {n: statistics.median(s) for n, s in seconds.items()}
    whole = all(b in seconds for b in bases)
    found = dict(seconds_median=f'{median[name]:.6g}', seconds_min=f'{min(seconds[name]):.6g}', ratio=f'{median[name] / sum(median[b] for b in bases):.4g}' if whole else '')
    if peaks:
        base = max(peaks[b] for b in bases) if whole else 0
        found |= dict(peak_mb=f'{peaks[name] / 2 ** 20:.1f}', peak_ratio=f'{peaks[name] / base:.4g}' if base else '')
    return found

def write(path, rows):
    import csv
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        out.writeheader(); out.writerows(rows)

def show(rows):
    for r in rows:
        size = ' '.join(f'{k}={r[k]}' for k in ('N', 'V', 'H', 'batch', 'prompt_tokens', 'new_tokens') if k in r)
        print(f'{r["case"]:26} {size:42} {float(r["seconds_median"]):9.4f} s  x{r["ratio"]:7} {r.get("peak_mb", ""):>9} MB  x{r.get("peak_ratio", ""):7} value {r["value"]}', flush=True)

def options(args):
    many = lambda text: [int(x) for x in text.split(',')]
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('part', choices=sorted(CASES))
    p.add_argument('--out', type=Path, required=True, help='the CSV file; one that exists is replaced')
    p.add_argument('--cases', default='', help='comma-separated; empty: all of the part')
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    p.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32', help='of hidden states and heads (loss), of autocast (scrg, step)')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--no-memory', dest='memory', action='store_false', help='time only')
    p.add_argument('--chunk-tokens', type=int, default=128, help='rows that our objective projects at once')
    p.add_argument('--rows', type=many, default=[1024], help='loss: N')
    p.add_argument('--vocab', type=many, default=[49152], help='loss: V')
    p.add_argument('--hidden', type=int, default=576, help='loss: H')
    p.add_argument('--batch', type=many, default=[4], help='scrg, step: sequences')
    p.add_argument('--prompt-tokens', type=int, default=64, help='scrg, step: length of the prompts')
    p.add_argument('--new-tokens', type=many, default=[48], help='scrg, step: length of the responses')
    p.add_argument('--teacher', default='smollm2-135m')
    p.add_argument('--student', default='truncate')
    p.add_argument('--student-layers', type=int, default=24)
    o = p.parse_args(args)
    o.cases = o.cases.split(',') if o.cases else list(CASES[o.part])
    unknown = set(o.cases) - set(CASES[o.part])
    if unknown: p.error(f'--cases: {", ".join(sorted(unknown))} unknown; {o.part} has {", ".join(CASES[o.part])}')
    return o

def main(args):
    if args == ['worker']: return worker(args)
    o, rows = options(args), []
    out, o.out = o.out, str(o.out)
    for size in sizes(o.rows, o.vocab) if o.part == 'loss' else sizes(o.batch, o.new_tokens):
        found = measure(o, size)
        rows += found
        show(found); write(out, rows)       # what was measured stays if a later size does not fit

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
