"Whole runs that cost a second: saved models of each architecture, the parameters of a tiny run, and how to look at it."
from pathlib import Path
import torch
from torch import nn
from mgsr_nb.models import save_model
from tiny_models import tiny_model
from toy_tokenizers import byte_level, sentence_piece

def tokenizer_of(kind):
    "The convention of each family: GPT-2 has one token for EOS and padding and no BOS, OPT and LLaMA begin a text with BOS, LLaMA has no padding token."
    return {"gpt2": lambda: byte_level(), "opt": lambda: byte_level(bos=True, pad_is_eos=False), "llama": sentence_piece}[kind]()

def save_tiny(folder, kind, layers, seed):
    "A random model and its tokenizer as a Hugging Face checkpoint in `folder`."
    tokenizer = tokenizer_of(kind)
    model = tiny_model(kind, layers, vocab=len(tokenizer), seed=seed)
    for config in (model.config, model.generation_config): config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    save_model(model, tokenizer, folder)
    return str(folder)

def save_pair(folder, kind):
    "(teacher, student): folders with three layers and with two."
    return save_tiny(Path(folder)/"teacher", kind, 3, seed=2), save_tiny(Path(folder)/"student", kind, 2, seed=1)

def tiny_parameters(runs_dir, teacher, **more):
    "Parameters of a run of two steps on eight examples of the shipped data, whose ends fill a prompt of 40 tokens; `more` wins."
    return dict(runs_dir=str(runs_dir), teacher=str(teacher), teacher_sft_steps=1, student_layers=2, precision="float32", max_prompt_tokens=40, max_tokens=100, shorten="beginning", max_train_examples=8,
                max_new_tokens=4, max_steps=2, batch_size=4, warmup_steps=1, learning_rate=1e-3, chunk_tokens=50, sub_width=8, sub_top_k=8, eval_prompts=2, eval_every=0, eval_batch_size=2) | more

# what of the parameters a `Setup` depends on, as far as tests change it
LOADED = ("teacher", "student", "teacher_sft_steps", "student_sft_steps", "lora_rank", "lora_alpha", "responses", "precision", "frozen_precision", "eval_exposure", "eval_temperature", "max_tokens")

# responses of different lengths, and limits that every class feels
UNEQUAL = dict(max_tokens=100, max_new_tokens=8, spans="fixed", span_length=2, clip_upper=0.5, mask_temperature=0.1, warmup_steps=0)

def without_dropout(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(m, name, None), float): setattr(m, name, 0.)

def many_stops(setup):
    "Samples of different lengths: every fourth id ends a text."
    without_dropout(setup.student)
    setup.stops += range(5, setup.vocab, 4)

def numbers(value):
    "All numbers in nested lists and dictionaries."
    if isinstance(value, bool) or value is None or isinstance(value, str): return []
    if isinstance(value, (int, float)): return [value]
    return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)]

def state(module): return {n: p.detach().clone() for n, p in module.state_dict().items()}

def moved(before, module): return {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}

def plain(rows): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in rows]

class Interrupted(Exception): pass

def interrupt_at(step):
    def on_step(row):
        if row["step"] == step: raise Interrupted
    return on_step

