"""Whatever the attention counts - places, columns, distances, windows, chunks - a text with a new ending reads and goes on like the same text read at once.

    PYTHONPATH=.:tests python tests/test_architectures.py        prints the table
"""
import pytest, torch
from architectures import ACCEPTED, ARCHITECTURES, REFUSED, tiny
from mgsr_nb.config import ConfigError
from mgsr_nb.decoding import Reading, generate
from mgsr_nb.run.checks import check_reading
from mgsr_nb.models import add_lora, hidden_states
from mgsr_nb.run.checks import check_model
from mgsr_nb.sampling import sampler
from mgsr_nb.scrg import SCRG, Scorer
from mgsr_nb.tokens import collate
from toy_tokenizers import byte_level

V, PAD, CLOSE = 60, 2, 1e-5
# two texts of unlike lengths, both several windows long, and their new endings
TEXTS = [list(range(5, 35)), list(range(20, 40))]
AT, ENDINGS = [20, 9], [[40, 41, 42], [50, 51, 52, 53, 54, 55]]
CHANGED = [x[:a] + e for x, a, e in zip(TEXTS, AT, ENDINGS)]
PROMPTS = [list(range(5, 27)), list(range(30, 43)), [7, 8, 9]]

def plain(model, ids):
    "Hidden states (T, H) of one text, read at once and alone."
    with torch.no_grad(): return hidden_states(model, collate([(ids, [])], PAD))[0]

def off_by(states, texts, model): return max((s[:len(t)] - plain(model, t)).abs().max().item() for s, t in zip(states, texts))

def read(model):
    "The largest difference of states after reading, after new endings, and after other new endings behind those."
    reading = Reading(model, TEXTS, PAD)
    found = [off_by(reading.hidden, TEXTS, model)]
    reading.replace(AT, ENDINGS)
    found.append(off_by(reading.hidden, CHANGED, model))
    again = [x[:a] + e for x, a, e in zip(CHANGED, [22, 3], [[43], [44] * 20])]
    reading.replace([22, 3], [[43], [44] * 20])
    return max(*found, off_by(reading.hidden, again, model))

def greedy(model, prompts, past=None, new=14): return generate(model, prompts, [()] * len(prompts), [new] * len(prompts), [], PAD, V, past=past, temperature=0.)

def by_transformers(model, prompt, new=14):
    "The model's own greedy answer; every token is content here."
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=PAD)
    return out[0, len(prompt):].tolist()

def read_on(model):
    "Greedy continuations of texts that were read, cut and read again."
    reading = Reading(model, TEXTS, PAD)
    reading.replace(AT, ENDINGS)
    return greedy(model, [x + [46] for x in CHANGED], past=reading)

def revised(name):
    "The largest difference between the teacher's states after SCRG, of two corrections, and a plain pass over the new texts."
    student, teacher = tiny(name, seed=1), tiny(name, seed=2)
    pairs = [(list(range(5, 15)), list(range(20, 38))), (list(range(30, 34)), list(range(40, 55))), ([9], list(range(5, 30)))]
    scrg = SCRG(Scorer(student, teacher, PAD, V), sampler(student, [], PAD, V), [], seed=0, max_new_tokens=26, corrections=2)
    new = scrg(0, pairs, range(3))
    assert max(new.position) > 0
    want = [plain(teacher, x + y)[len(x) - 1:len(x + y) - 1] for x, y in new.pairs]
    return (new.teacher_hidden - torch.cat(want)).abs().max().item()

@pytest.mark.parametrize("name", ACCEPTED)
def test_a_new_ending_reads_like_the_text_read_at_once(name): assert read(tiny(name)) < CLOSE

@pytest.mark.parametrize("name", ACCEPTED)
def test_greedy_answers_are_the_models_own(name):
    model = tiny(name)
    assert greedy(model, PROMPTS) == [by_transformers(model, p) for p in PROMPTS]
    assert read_on(model) == [by_transformers(model, x + [46]) for x in CHANGED]

@pytest.mark.parametrize("name", ACCEPTED)
def test_the_teachers_states_after_scrg_are_those_of_a_plain_pass(name): assert revised(name) < CLOSE

@pytest.mark.parametrize("name", ["mistral", "gpt_neo", "gemma3", "llama4", "mpt"])
def test_the_columns_matter_here(name):
    "Without closing up, the states of models that count columns would be wrong: the texts above are long enough to tell."
    class Open(Reading):
        def close_up(self): pass
    model = tiny(name)
    reading = Open(model, TEXTS, PAD)
    reading.replace(AT, ENDINGS)
    assert off_by(reading.hidden, CHANGED, model) > 0.01

@pytest.mark.parametrize("name", ACCEPTED)
def test_check_model_accepts(name): check_model(tiny(name, vocab_size=len(byte_level())), byte_level(), name, "teacher")

@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("parameter", ["teacher", "student"])
def test_a_model_that_keeps_a_state_is_refused_by_name(name, parameter):
    with pytest.raises(ConfigError, match=f"^{parameter}: {name} cannot take tokens back.*; allowed: "): check_model(tiny(name, vocab_size=len(byte_level())), byte_level(), name, parameter)

def test_a_wrong_reading_is_refused_too(monkeypatch):
    "Not only what raises: states that differ."
    monkeypatch.setattr(Reading, "cut", lambda self, starts, rows=slice(None): None)
    with pytest.raises(ConfigError, match="cannot take tokens back"): check_reading(tiny("llama"), "llama", "student")

LORA = {n: ("c_attn",) for n in ("gpt2", "gpt_bigcode")} | {n: ("query_key_value",) for n in ("gpt_neox", "bloom", "falcon")} | {"phi3": ("qkv_proj",), "mpt": ("Wqkv",)}

@pytest.mark.parametrize("name", ACCEPTED)
def test_adapters_train_on_query_and_value_fused_or_not(name):
    adapted = add_lora(tiny(name), rank=2, alpha=4., dropout=0.)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trained} == set(LORA.get(name, ("q_proj", "v_proj")))
    hidden_states(adapted, collate([(PROMPTS[0], [])], PAD)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)

def test_adapters_for_a_model_without_such_layers_are_refused_with_the_names_it_has():
    with pytest.raises(ConfigError, match="^lora_rank: .*MambaForCausalLM has layers dt_proj, in_proj, out_proj, x_proj; allowed: 0, or a model with q_proj/v_proj, "): add_lora(tiny("mamba"), 2, 4., 0.)

def table():
    lines = ["| model | sees the text by | states off by | after SCRG | greedy answers equal |", "|---|---|---|---|---|"]
    for name in ACCEPTED:
        model = tiny(name)
        ours = greedy(model, PROMPTS) + read_on(model)
        theirs = [by_transformers(model, p) for p in PROMPTS + [x + [46] for x in CHANGED]]
        lines.append(f"| {name} | {ARCHITECTURES[name][1]} | {read(model):.0e} | {revised(name):.0e} | {sum(map(list.__eq__, ours, theirs))} of {len(ours)} |")
    return "\n".join(lines)

if __name__ == "__main__": print(table())
