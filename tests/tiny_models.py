"Tiny random language models, one of each architecture that the library promises, and the tokenizer that fits them. No download, milliseconds."
import hashlib
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from toy_tokenizers import byte_level

KINDS = ("gpt2", "opt", "llama")
BOS, EOS, PAD = 0, 1, 2     # the ids of `byte_level`

def tiny_config(kind, layers=2, vocab=60, width=16, positions=128):
    "GPT-2 and OPT have learned absolute positions and dropout, LLaMA has rotary ones, grouped heads and an untied head."
    ids = dict(vocab_size=vocab, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    if kind == "gpt2": return GPT2Config(n_positions=positions, n_embd=width, n_layer=layers, n_head=2, **ids)
    if kind == "opt":
        return OPTConfig(max_position_embeddings=positions, hidden_size=width, word_embed_proj_dim=width, ffn_dim=2 * width, num_hidden_layers=layers,
                         num_attention_heads=2, **ids)
    assert kind == "llama", kind
    return LlamaConfig(max_position_embeddings=positions, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
                       num_key_value_heads=1, tie_word_embeddings=False, **ids)

def tiny_model(kind, layers=2, vocab=60, width=16, dtype=torch.float32, seed=0, positions=128, spread=0.3):
    "A random model in evaluation mode, a function of its arguments; torch's global generator is left alone."
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, layers, vocab, width, positions))
        for p in model.parameters(): p.add_(torch.randn_like(p) * spread)  # the usual initialisation is too small to show a wrong position or mask
    return model.to(dtype).eval()

def tiny_pair(kind, dtype=torch.float32):
    "(student, teacher, tokenizer): two layers and three, the vocabulary of the tokenizer."
    tokenizer = byte_level(pad_is_eos=False)
    return tiny_model(kind, 2, len(tokenizer), dtype=dtype, seed=1), tiny_model(kind, 3, len(tokenizer), dtype=dtype, seed=2), tokenizer

def splitmix64(state, outputs):
    "The first outputs of SplitMix64 (Steele et al., 2014) after a state, in plain integers."
    found = []
    for _ in range(outputs):
        state = (state + 0x9E3779B97F4A7C15) % 2 ** 64
        z = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)): z = (z ^ z >> shift) * factor % 2 ** 64
        found.append(z ^ z >> 31)
    return found

def naive_noise(key, place, n):
    "The n uniform numbers of a key's draw at a place, from the definition, in float64."
    start = int.from_bytes(hashlib.sha256(repr(tuple(key)).encode()).digest()[:8], "big") - 2 ** 63
    state, = splitmix64(start + (place - 1) * 0x9E3779B97F4A7C15, 1)
    return torch.tensor([z % 2 ** 63 / 2 ** 63 for z in splitmix64(state - 0x9E3779B97F4A7C15, n)], dtype=torch.float64)

def arrival_times(vocab, key, place):
    "When each class would arrive if its rate were 1: the race that a text is drawn by, written from its definition."
    return -torch.log1p(-naive_noise(key, place, vocab).clamp(torch.finfo(torch.float32).tiny, 1))
