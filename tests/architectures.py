"Tiny random models of architectures whose attention depends on positions or columns in different ways: learned and rotary positions, windows, chunks, ALiBi, states."
import torch
from transformers import AutoConfig, AutoModelForCausalLM

IDS = dict(vocab_size=60, bos_token_id=0, eos_token_id=1, pad_token_id=2)
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
GROUPED = dict(SIZES, num_key_value_heads=1)
HEADS = dict(GROUPED, head_dim=8)
BY_TURNS = ["sliding_attention", "full_attention"]
DROPOUT_FREE = dict(attention_dropout=0., hidden_dropout=0.)

# name: (model type, how its attention sees the text, what differs from the type's defaults)
ARCHITECTURES = {
    "gpt2": ("gpt2", "learned positions", dict(n_positions=128, n_embd=16, n_layer=2, n_head=2)),
    "opt": ("opt", "learned positions", dict(max_position_embeddings=128, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)),
    "gpt_neo": ("gpt_neo", "window 8 by turns", dict(max_position_embeddings=128, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8)),
    "gpt_bigcode": ("gpt_bigcode", "learned positions", dict(n_positions=128, n_embd=16, n_layer=2, n_head=2)),
    "gptj": ("gptj", "rotary", dict(n_positions=128, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)),
    "gpt_neox": ("gpt_neox", "rotary", SIZES),
    "llama": ("llama", "rotary", GROUPED),
    "mistral": ("mistral", "window 8", dict(GROUPED, sliding_window=8)),
    "mixtral": ("mixtral", "window 8", dict(GROUPED, sliding_window=8, num_local_experts=2)),
    "qwen2": ("qwen2", "window 8 in the second layer", dict(GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("qwen3", "rotary", HEADS),
    "gemma3": ("gemma3_text", "window 8 by turns", dict(HEADS, sliding_window=8, layer_types=BY_TURNS, query_pre_attn_scalar=8)),
    "phi3": ("phi3", "window 8", dict(GROUPED, sliding_window=8)),
    "phi": ("phi", "rotary", SIZES),
    "stablelm": ("stablelm", "rotary", GROUPED),
    "starcoder2": ("starcoder2", "window 8", dict(GROUPED, sliding_window=8)),
    "olmo2": ("olmo2", "rotary", GROUPED),
    "olmo3": ("olmo3", "window 8 by turns", dict(GROUPED, sliding_window=8, layer_types=BY_TURNS)),
    "cohere2": ("cohere2", "window 8 by turns", dict(HEADS, sliding_window=8, layer_types=BY_TURNS, logit_scale=1.)),
    "llama4": ("llama4_text", "chunks of 8 by turns", dict(HEADS, intermediate_size_mlp=32, attention_chunk_size=8, num_local_experts=2, layer_types=["chunked_attention", "full_attention"])),
    "bloom": ("bloom", "ALiBi", dict(hidden_size=16, n_layer=2, n_head=2)),
    "mpt": ("mpt", "ALiBi", dict(d_model=16, n_layers=2, n_heads=2, max_seq_len=128)),
    "falcon": ("falcon", "ALiBi", dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True, new_decoder_architecture=False)),
    "smollm3": ("smollm3", "rotary, none in the second layer", dict(GROUPED, no_rope_layers=[1, 0])),
    "granite": ("granite", "rotary", GROUPED),
    "gpt_oss": ("gpt_oss", "window 8 by turns, sinks", dict(HEADS, sliding_window=8, layer_types=BY_TURNS, num_local_experts=2, num_experts_per_tok=1)),
    "mamba": ("mamba", "a state", dict(hidden_size=16, num_hidden_layers=2, state_size=4)),
    "mamba2": ("mamba2", "a state", dict(hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1)),
    "rwkv": ("rwkv", "a state", dict(hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=128)),
    "jamba": ("jamba", "a state by turns", dict(GROUPED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2, use_mamba_kernels=False, mamba_d_state=4)),
    "lfm2": ("lfm2", "convolutions by turns", dict(GROUPED, layer_types=["conv", "full_attention"])),
    "qwen3_next": ("qwen3_next", "a state by turns", dict(HEADS, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)),
}

# a layer that keeps a state cannot take a token back
REFUSED = ("mamba", "mamba2", "rwkv", "jamba", "lfm2", "qwen3_next")
ACCEPTED = tuple(n for n in ARCHITECTURES if n not in REFUSED)

def tiny(name, seed=0, spread=0.3, **more):
    "A random model of an architecture, in evaluation mode; weights far enough apart to show a wrong position or mask."
    kind, _, own = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**IDS, **own, **more}))
        for p in model.parameters(): p.add_(torch.randn_like(p) * spread)
    return model.float().eval()
