"What is measured on a small scale, against models that are large enough for the scale to matter."
import pytest, torch
from transformers import AutoConfig
from mgsr_nb.config import resolve
from mgsr_nb.run.live_bytes import LiveBytes, activation_bytes, chunk_copies, graph_bytes

NO_BOS = dict(vocab_size=64, bos_token_id=None, eos_token_id=0, pad_token_id=None)

def test_live_bytes_count_what_is_alive_once():
    old = torch.zeros(1000)
    with LiveBytes() as live:
        view, new = old[:9], old + 1
        assert live.now == 4000
        del view, new, old
        live.most = live.now
        a = torch.zeros(100)
        b = a.view(10, 10).T
        assert live.now == 400
        c = a + 1
        d = c * 2
        assert (live.now, live.most) == (1200, 1200)
        del c
        assert live.now == 800
        e = torch.zeros(50)
        assert (live.now, live.most) == (1000, 1200)
        del a
        assert live.now == 1000      # its view is alive
        del b
        assert live.now == 600
    assert d.sum() == 200 and e.sum() == 0

WIDE = {"llama, few keys": dict(num_key_value_heads=2, intermediate_size=704),
        "llama": dict(num_key_value_heads=8, intermediate_size=704),
        "opt": dict(ffn_dim=1024, word_embed_proj_dim=256)}

@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("kind", WIDE)
def test_activations_of_a_wider_and_deeper_model_are_predicted(kind, lora):
    config = AutoConfig.for_model(kind.split(",")[0], hidden_size=256, num_hidden_layers=6,
                                  num_attention_heads=8, **WIDE[kind], **NO_BOS)
    five, three = (graph_bytes(config, rows, 24, "bfloat16", lora) for rows in (5, 3))
    truth = (five - three) / (2 * 24)
    assert activation_bytes(config, "bfloat16", lora) == pytest.approx(truth, rel=0.06)

@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_autocast_keeps_copies_of_float32_weights_only_also_of_frozen_ones(frozen):
    "What does not grow with the batch is the copies: two bytes for each weight of the matrices."
    config = AutoConfig.for_model("llama", hidden_size=128, intermediate_size=352,
                                  num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=4, **NO_BOS)
    two, four = (graph_bytes(config, rows, 16, "bfloat16", 1, frozen) for rows in (2, 4))
    # without the first layer's query, key and value: nothing below them trains
    matrices = 2 * (4 * 128 * 128 + 3 * 128 * 352) - 3 * 128 * 128
    copies = 2 * matrices if frozen == "float32" else 0
    assert 2 * two - four == pytest.approx(copies, abs=0.05 * matrices)

METHODS = [dict(method="sft"), dict(method="kd"), dict(), dict(sub_inputs="full")]

@pytest.mark.parametrize("parameters", METHODS, ids=str)
def test_the_copies_of_a_chunk_are_a_property_of_the_objective(parameters):
    config = resolve(**parameters)
    wider = chunk_copies(config, rows=16, vocab=6000)
    assert chunk_copies(config) == pytest.approx(wider, rel=0.06)

def test_the_copies_of_a_chunk_are_in_the_order_of_the_work():
    sft, kd, ours = (chunk_copies(resolve(method=m)) for m in ("sft", "kd", "mgsr"))
    assert 4 < sft < kd < ours < 30
