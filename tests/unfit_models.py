"Saved models that a run has to refuse, by what is wrong with them."
import json
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from mgsr_nb.models import save_model
from tiny_runs import save_tiny, tokenizer_of

def save_capped(folder):
    "Gemma 2: its logits are soft-capped behind the head."
    tokenizer = tokenizer_of("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=len(tokenizer), hidden_size=16,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5))
    save_model(model, tokenizer, folder)

def save_without_row(folder):
    "The tokenizer got a token that the embedding did not."
    save_tiny(folder, "gpt2", 3, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)

def save_without_end(folder):
    save_tiny(folder, "gpt2", 3, seed=2)
    path = Path(folder)/"tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("eos_token", "pad_token"): settings.pop(name, None)
    path.write_text(json.dumps(settings), encoding="utf-8")
    (Path(folder)/"special_tokens_map.json").unlink(missing_ok=True)

def save_without_numbers(folder):
    save_tiny(folder, "gpt2", 3, seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(): model.transformer.ln_f.weight[0] = float("nan")
    save_model(model, AutoTokenizer.from_pretrained(folder), folder)

# what is wrong -> how to make it, and how its refusal goes on behind the parameter
UNFIT = {"capped": (save_capped, "changes its logits after the head"),
    "row": (save_without_row, "has an embedding of"), "end": (save_without_end, "has no end token"),
    "numbers": (save_without_numbers, "are not finite")}
