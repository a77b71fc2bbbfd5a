"Whole runs that cost a second: saved models of each architecture, and the parameters of a tiny run."
from pathlib import Path
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
    "Parameters of a run of two steps on eight examples of the shipped data; `more` wins."
    return dict(runs_dir=str(runs_dir), teacher=str(teacher), teacher_sft_steps=1, student_layers=2, precision="float32", max_prompt_tokens=40, max_tokens=100, max_train_examples=8,
                max_new_tokens=4, max_steps=2, batch_size=4, warmup_steps=1, learning_rate=1e-3, chunk_tokens=50, sub_width=8, sub_top_k=8, eval_prompts=2, eval_every=0, eval_batch_size=2) | more
