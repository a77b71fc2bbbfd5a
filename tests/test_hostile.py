"""Input that somebody got wrong: hundreds of bad configurations before anything is loaded, bad data files, and numbers that are none."""
import copy, json, math, subprocess, sys
import pytest, torch
from torch import nn
from tiny_runs import save_pair, tiny_parameters
from mgsr_nb import objective as O, run as R
import mgsr_nb.run.engine
import mgsr_nb.run.parts
from mgsr_nb.data import DataError, load_eval_set, read_jsonl
from mgsr_nb.tokens import encode
from mgsr_nb.config import resolve
from mgsr_nb.objective import Objective, Text
from toy_tokenizers import byte_level

# --- configurations

FUZZ = '''
import json, math, random, sys
sys.path.insert(0, {root!r})
class Blocked:      # whatever could load a model or data
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "accelerate", "safetensors"): raise SystemExit(f"imports {{name}}")
sys.meta_path.insert(0, Blocked())
sys.addaudithook(lambda event, args: sys.exit(f"opens {{args[0]}}") if event == "open" and str(args[0]).endswith((".jsonl", ".safetensors", ".gguf", "config.json")) else None)
from mgsr_nb.presets import PRESETS, METHODS
from mgsr_nb.config import ConfigError, RunConfig, resolve
from typing import Literal, get_args, get_origin

rng, fields = random.Random({seed}), RunConfig.model_fields
ANY = [None, [], {{}}, (), {{"a": 1}}, b"1", 1j, object(), math.nan, math.inf, -math.inf, 10**400, -10**400, 10**5000, [10**5000], "", " ", "\\0", "\\ud800", "true", "None", "1e5", "'", "x" * 1000, "../..", "\\u0661", [[]], range(3)]

def right(name, value):
    "Whether a value of `ANY` is one that the parameter may have."
    kinds = get_args(fields[name].annotation) or (fields[name].annotation,)
    if value is None: return type(None) in kinds
    if value == "1e5" and float in kinds: return True      # what YAML takes for text
    if name in ("data_dir", "run_name", "push_to") and value == "" or name == "data_dir" and value == "../.." or name == "run_name" and value in ("true", "None", "1e5", "\\u0661"): return True
    return name in ("teacher", "student", "runs_dir") and isinstance(value, str) and value.strip() != "" and value not in ("\\0", "\\ud800")

def bad(name):
    "A value that the parameter must not have."
    f = fields[name]
    bounds = {{k: getattr(m, k) for m in f.metadata for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}}
    kinds = get_args(f.annotation) or (f.annotation,)
    choices = [v for v in ANY if not right(name, v)]
    if bool in kinds: choices += [0, 1, "True", 1.0]
    elif int in kinds: choices += [True, 1.0, "1", -1, -2**31, *(b - 1 for k, b in bounds.items() if k == "ge"), *(b for k, b in bounds.items() if k in ("gt", "lt"))]
    elif float in kinds: choices += [True, "0.5", *(b - 1e-9 for k, b in bounds.items() if k == "ge"), *(b for k, b in bounds.items() if k in ("gt", "lt")), *(b + 1e-9 for k, b in bounds.items() if k == "le")]
    elif get_origin(f.annotation) is Literal: choices += [True, 0, rng.choice(kinds).upper() + "_", rng.choice(kinds)[:-1]]
    elif name == "run_name": choices += ["..", "a/../b", "/etc", "a//b", "a/", "a b", "~", "a" * 300, "\\u00fc" * 150, "/".join("a" * 300)]
    elif name == "data": choices += ["Tiny", "dolyl", "no/such/file.jsonl", "a/b/c", __file__]
    elif name == "push_to": choices += ["mine", "a/b/c", "a b/c"]
    elif name == "data_dir": choices += ["no/such/folder", __file__]
    elif name == "eval_sets": choices += ["Tiny", "tiny,", "tiny;dolly", ["tiny", 3]]
    elif name == "eval_seeds": choices += ["10,", "ten", "1.5", "-1", [1.5], ["a"], -3]
    return rng.choice(choices)

GOOD = dict(seed=3, dac_weight=0.5, max_steps=7, clip="none", eval_seeds="1,2", template="chat", chunk_tokens=9, select="nll", eval_every=2)
PAIRS = [  # allowed alone, not together
    (dict(scrg=True, sampling="fixed"), "scrg"), (dict(sft_weight=0, dac_weight=0, span_weight=0), "sft_weight"), (dict(max_prompt_tokens=300, max_tokens=200), "max_prompt_tokens"),
    (dict(batch_size=2, micro_batch_size=3), "micro_batch_size"), (dict(target_class="none", dac_classes="target"), "target_class"), (dict(clip_upper=0.1, clip_lower=0.2, clip="learned"), "clip_lower"),
    (dict(pg_weight=1.0), "pg_weight"), (dict(teacher_mix=0.2, scrg=False, sampling="fixed"), "teacher_mix"), (dict(select="kl", eval_every=0), "select"),
    (dict(sampling="off_policy", buffer_size=3), "buffer_size"), (dict(data_dir="."), "data_dir")]
refused, failures, named = 0, [], {{}}
def must_refuse(given, names):
    global refused
    try: resolve(given)
    except ConfigError as e:
        lines = [line.split(": ")[0].split(", ")[0] for line in str(e).splitlines()]
        if lines[0] in names and set(lines) <= set(names) and len(str(e)) < 20000: refused += 1
        else: failures.append([repr(sorted(given))[:200], str(e)[:200]])
        for n in lines: named[n] = named.get(n, 0) + 1
    except BaseException as e: failures.append([repr(sorted(given))[:200], f"{{type(e).__name__}}: {{str(e)[:200]}}"])
    else: failures.append([str({{k: str(v)[:40] if not isinstance(v, int) or v.bit_length() < 99 else "huge" for k, v in given.items()}}), "accepted"])

for name in list(fields) * 5:                                      # one bad value among good ones, or two
    names = [name] + rng.sample(sorted(fields), k=rng.choice([0, 0, 1]))
    good = {{k: GOOD[k] for k in rng.sample(sorted(GOOD), k=rng.randint(0, 2)) if k not in names}}
    must_refuse({{**good, **{{n: bad(n) for n in names}}}}, names)
for name in rng.sample(sorted(fields), k=40):                       # a name that is none
    i = rng.randrange(len(name))
    wrong = rng.choice([name[:i] + name[i + 1:], name[:i] + "x" + name[i:], name.upper(), name + "s", " " + name, name.replace("_", "-") + "-"])
    if wrong not in fields: must_refuse({{wrong: fields[name].default}}, [wrong])
for pair, name in PAIRS * 3: must_refuse({{**{{k: v for k, v in GOOD.items() if k in ("seed", "max_steps") and rng.random() < 0.5}}, **pair}}, [name, *pair])
print(json.dumps({{"refused": refused, "failures": failures, "named": len(named), "fields": len(fields)}}))
'''

@pytest.mark.pitfall(42)
def test_pitfall_42_hundreds_of_bad_configurations_are_refused_by_name_before_anything_loads(tmp_path, figure):
    "In a process where importing torch, or opening a file of data or weights, ends it."
    from pathlib import Path
    script = tmp_path/"fuzz.py"
    script.write_text(FUZZ.format(root=str(Path(__file__).resolve().parents[1]), seed=0), encoding="utf-8")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    figure("bad configurations", f"{found['refused']} of {found['refused'] + len(found['failures'])} refused by name before anything was loaded")
    assert found["failures"] == [] and found["refused"] >= 400 and found["named"] >= found["fields"]

# --- data

GOOD = {"instruction": "a", "input": "", "output": "b"}

def write(folder, *rows):
    path = folder/"sinst/valid.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return path

def test_an_id_that_comes_twice_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path, {**GOOD, "id": "x"}, b"", GOOD, {**GOOD, "id": "y"}, {**GOOD, "id": "x"})
    with pytest.raises(DataError) as e: load_eval_set("sinst", tmp_path)
    assert f"{path}, line 5, field 'id': 'x' is that of line 1 too" == str(e.value)
    write(tmp_path, {**GOOD, "id": "x"}, {**GOOD, "id": "y"}, GOOD, GOOD)
    assert [e.id for e in load_eval_set("sinst", tmp_path)] == ["x", "y", "sinst-00003", "sinst-00004"]
    write(tmp_path, GOOD, {**GOOD, "id": "sinst-00001"})     # an id that another line got for want of one
    with pytest.raises(DataError, match="line 2.*line 1"): load_eval_set("sinst", tmp_path)

@pytest.mark.parametrize("row,words", [(b'{"instruction": "' + b"x" * 3_000_000, "line 2: not JSON"), (b"\0" * 1000, "line 2: not JSON"), (b"[" * 100_000, "line 2: not JSON"),
                                       (json.dumps({**GOOD, "id": [7]}).encode(), "line 2, field 'id': expected a string, found list"), (b'{"a": 1e999}', "line 2, field 'output': missing"),
                                       (b"\xff\xfe{}", "line 2: not UTF-8"), (b"NaN", "line 2: a JSON float, expected an object"), (b'{"id": ' + b"9" * 5000 + b"}", "line 2: not JSON")],
                         ids=["long and cut off", "zeros", "deep", "id", "field", "UTF-16", "number", "digits"])
def test_a_line_that_is_no_record_is_named(tmp_path, row, words):
    path = write(tmp_path, GOOD, row)
    with pytest.raises(DataError) as e: load_eval_set("sinst", tmp_path)
    assert f"{path}, {words}" in str(e.value) and len(str(e.value)) < 1000

def test_a_huge_line_is_read_whole_and_cut_to_the_limits(tmp_path):
    "A prompt longer than the limit is shortened, a response longer than the rest has no EOS, an empty one is EOS alone, and text that spells special tokens is text."
    tokenizer, long = byte_level(bos=True), "word " * 20_000
    special = "".join(tokenizer.all_special_tokens)
    write(tmp_path, {**GOOD, "input": long}, {**GOOD, "output": long}, {**GOOD, "output": ""}, {**GOOD, "instruction": special, "input": special, "output": special})
    assert len(read_jsonl(tmp_path/"sinst/valid.jsonl")[0][1]["input"]) == len(long)
    prompts, response, empty, tokens = [encode(e, tokenizer, "alpaca", 90, 100) for e in load_eval_set("sinst", tmp_path)]
    assert 70 < len(prompts.prompt_ids) <= 90 and tokenizer.decode(prompts.prompt_ids).endswith("### Response:\n") and prompts.prompt_ids[0] == tokenizer.bos_token_id
    assert len(response.prompt_ids) + len(response.response_ids) == 100 and tokenizer.eos_token_id not in response.response_ids
    assert empty.response_ids == [tokenizer.eos_token_id]
    [whole] = [encode(e, tokenizer, "alpaca", 2000, 4000) for e in load_eval_set("sinst", tmp_path)[3:]]
    assert whole.response_ids[-1] == tokenizer.eos_token_id and not set(tokenizer.all_special_ids) & set(whole.response_ids[:-1] + whole.prompt_ids[1:])
    assert tokenizer.decode(whole.response_ids[:-1]) == special

def test_responses_of_nothing_go_through_a_step(trainer):
    "Every response empty, so that EOS is all that is supervised; and samples that end at once."
    def change(setup):
        setup.train = [copy.copy(e) for e in setup.train]
        for e in setup.train: object.__setattr__(e, "response_ids", [1])
        setup.stops = list(range(setup.vocab))      # every token ends a text
    t = trainer("llama", change=change)
    row = t.step()
    assert row["data_tokens"] == 4 == row["distilled_tokens"] and row["span"] == 0 and math.isfinite(row["loss"]) and row["sft"] > 0

# --- losses

TERMS = {"sft": {}, "dac": {}, "span": {}, "kd": dict(kd_weight=1.), "pg": dict(pg_weight=1.)}
WEIGHTS = {f"{name}_weight": 0. for name in TERMS}

def only(name, **more): return resolve(scrg=False, mask_temperature=0.1, clip_upper=0.7, sub_width=4, sub_top_k=2, **{**WEIGHTS, f"{name}_weight": 1., **more})

def losses_of(name, hidden, teacher, heads, ids, dtype, vocab):
    "Loss and gradients of one term on a text of given hidden states and heads, in `dtype`."
    from mgsr_nb.minillm import Policy
    objective = R.parts.make_objective(only(name), vocab).to(torch.float64 if dtype == torch.float64 else torch.float32)
    hidden, (student_head, teacher_head) = hidden.detach().clone().to(dtype).requires_grad_(), [copy.deepcopy(h).to(dtype) for h in heads]
    n = len(ids)
    advantage = torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype)
    policy = Policy(*[advantage if i == 0 else torch.ones(n, dtype=dtype) for i in range(len(Policy._fields))])
    text = Text(hidden, ids, student_head, teacher.to(dtype), teacher_head, torch.full((n,), 0.5), vocab, policy if name == "pg" else None)
    found = objective(text, [name], {k: torch.tensor(float(n)) for k in ("data_tokens", "distilled_tokens", "distilled_spans")})
    found.loss.backward()
    return found.loss.detach(), hidden.grad, student_head.weight.grad, [p.grad for p in objective.parameters()]

@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("vocab,n", [(2, 5), (2, 1), (9, 1), (9, 5), (9, 0)])
def test_small_texts_in_every_precision(name, vocab, n):
    "A vocabulary of two, one token, none: as in float64, finite, and, between equals, 0 for all that compares."
    make = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)
    hidden, teacher, ids, heads = random(n, 4), random(n, 4), torch.randint(vocab, (n,), generator=make), [nn.Linear(4, vocab, bias=False).double() for _ in range(2)]
    for h in heads: h.weight.data = random(vocab, 4)
    exact = losses_of(name, hidden, teacher, heads, ids, torch.float64, vocab)
    assert n == 0 or name == "span" and n == 1 or exact[0] != 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        low = losses_of(name, hidden, teacher, heads, ids, dtype, vocab)
        assert low[0].dtype == torch.float32 and all(g is None or g.isfinite().all() for g in (*low[:3], *low[3]))
        torch.testing.assert_close(low[0].double(), exact[0], rtol=tolerance, atol=tolerance)
    if name in ("dac", "span", "kd"):
        loss, gradient, *_ = losses_of(name, hidden, hidden.clone(), [heads[0], heads[0]], ids, torch.float32, vocab)
        assert abs(loss) < 1e-6 and (name == "dac" or gradient.abs().sum() < 1e-5)      # as printed, DAC-KL pulls on the kept classes even then

@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", TERMS)
def test_one_logit_that_is_no_number_ends_the_step_with_its_number_and_the_term(trainer, name, value, monkeypatch):
    "One of all rows and classes, in the second step; the step's other numbers do not hide it, and the step does not count."
    t = trainer("llama", **{**WEIGHTS, f"{name}_weight": 1., "scrg": False, "spans": "fixed", "span_length": 2, "sampling": "on_policy" if name == "pg" else "fixed"})
    t.step()
    assert name in t.step()
    inner, once = O.Student, []
    def poisoned(logits, labels, gradients):
        if not once: once.append(logits.data[0, 3].fill_(value))
        return inner(logits, labels, gradients)
    monkeypatch.setattr(O, "Student", poisoned)
    with pytest.raises(R.engine.TrainingError) as e: t.step()
    named = str(e.value).split(" not finite")[0].removeprefix("step 3: ").split(", ")
    assert once and str(e.value).startswith("step 3: ") and {"loss", name} <= set(named) and t.progress.step == 2
