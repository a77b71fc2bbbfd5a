"""Configuration: what is refused, and with which words; presets; the notebook's injected cells; names and folders of runs."""
import json, math, os, signal, subprocess, sys
from pathlib import Path
from typing import Literal, get_args, get_origin
import pytest
from hypothesis import assume, given, settings, strategies as st
from mgsr_nb import config as C
from mgsr_nb.presets import METHODS, PRESETS
from mgsr_nb.config import ELSEWHERE, SOURCE_ONLY, ConfigError, RunConfig, from_notebook, parameter_table, resolve
from mgsr_nb.files import project_root, write_atomic, write_csv, write_json
from mgsr_nb.run.folder import finished, open_run, run_name

FIELDS = RunConfig.model_fields
OTHER = {  # for every field another allowed value
    "method": "mgsr_off_policy", "responses": "teacher", "threshold_start": 0.5, "buffer_size": 50,
    "preset": "gpt2-dolly", "run_name": "mine", "runs_dir": "elsewhere", "overwrite": True, "seed": 1, "teacher": "gpt2", "teacher_sft_steps": 0, "student": "opt",
    "student_layers": 10, "layer_choice": "even", "lora_rank": 4, "lora_alpha": 1.0, "lora_dropout": 0.0, "precision": "float32", "data": "dolly", "data_dir": ".",
    "template": "chat", "max_prompt_tokens": 100, "max_tokens": 300, "max_train_examples": 5, "sft_weight": 0.0, "dac_weight": 0.5, "span_weight": 0.25, "kd_weight": 1.0,
    "kd_loss": "jsd", "skew_alpha": 0.2, "jsd_beta": 0.1, "clip": "none", "clip_upper": 0.8, "clip_lower": 0.2, "clip_reading": "mass", "clip_fraction": 0.5,
    "mask_temperature": 0.0, "target_class": "twice", "remainder": "bucket", "dac_classes": "dense", "sub_inputs": "full", "sub_top_k": 8, "sub_layers": 0, "sub_width": 8,
    "sub_learning_rate": 0.1, "spans": "whole", "span_length": 2, "span_relation": "outer", "sampling": "mixed", "mixed_fraction": 0.0, "max_new_tokens": 1, "scrg": False,
    "scrg_corrections": 3, "scrg_direction": "teacher_student", "scrg_teacher_token": "greedy", "max_steps": 1, "batch_size": 6, "micro_batch_size": 2, "chunk_tokens": 1,
    "learning_rate": 1e-5, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 5.0, "eval_sets": "tiny,dolly", "eval_prompts": 0, "eval_seeds": "10,20",
    "eval_batch_size": 1, "eval_temperature": 0.7, "eval_every": 0, "checkpoint_every": 5, "log_every": 5, "save_student": False, "save_samples": 3, "length_buckets": 2,
    "dry_run": True, "student_sft_steps": 7, "frozen_precision": "float32", "pg_weight": 0.5, "pg_clip": 0.1, "pg_single_step": False, "pg_length_norm": False, "teacher_mix": 0.2,
    "scrg_detect": "random", "scrg_threshold": 0.5, "eval_exposure": True, "select": "nll", "chunker": "spacy", "compile_student": True, "tracker": "tensorboard"}
NEEDS = {"pg_weight": {"scrg": False}, "data_dir": {"data": "dolly"}}   # what a value of OTHER cannot do without

def with_needs(name): return {**NEEDS.get(name, {}), name: OTHER[name]}

def refusal(*args, **params) -> str:
    with pytest.raises(ConfigError) as e: resolve(*args, **params)
    return str(e.value)

def test_the_table_of_other_values_is_whole_and_allowed():
    assert OTHER.keys() == FIELDS.keys()
    for name, value in OTHER.items():
        assert value != FIELDS[name].default and getattr(resolve(with_needs(name)), name) == value
    for name in NEEDS: refusal({name: OTHER[name]})

# --- what is refused

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("params,words", [
    (dict(dac_wieght=0.5), ["dac_wieght: there is no such parameter", "did you mean 'dac_weight'?"]),
    (dict(xyzzy=0.5), ["xyzzy: there is no such parameter; all names: preset, method, ", "span_weight"]),
    (dict(data_dir="."), ["data_dir: nothing would be read from it", "allowed: empty, or data dolly, or other eval_sets"]),
    (dict(dac_weight="high"), ["dac_weight: got 'high' (str)", "allowed: a number >= 0"]),
    (dict(dac_weight=-1), ["dac_weight: got -1 (int)", "allowed: a number >= 0"]),
    (dict(clip_upper=0.1, clip_lower=0.9), ["clip_lower: 0.9 is not below clip_upper: 0.1", "allowed: 0 <= clip_lower < clip_upper <= 1"]),
    (dict(preset="nope"), ["preset: got 'nope'", "allowed: one of quickstart, smollm2-dolly, laptop-dolly, gpt2-dolly, opt-dolly, openllama-dolly, llama2-dolly, qwen-dolly"]),
    (dict(method="nope"), ["method: got 'nope'", "allowed: one of mgsr, mgsr_off_policy, sft, kd, seqkd, seqkd_kd, imitkd, gkd, minillm, distillm, distillm_forward"]),
    (dict(eval_temperature=1e-5), ["eval_temperature: got 1e-05", "allowed: 0 (the likeliest token), or at least 0.01"]),
    (dict(scrg="true"), ["scrg: got 'true' (str)", "allowed: True or False"]),
    (dict(clip_upper="high"), ["clip_upper: got 'high' (str)", "allowed: a number >= 0 and <= 1"]),
], ids=["typo", "nothing near", "data that nothing reads", "word", "negative", "limits", "preset", "method", "cold", "string", "optional"])
def test_pitfall_42_the_bad_inputs_of_a_command_line_are_refused_in_words(params, words):
    message = refusal(params)
    assert message.startswith(words[0])
    for part in words: assert part in message

@pytest.mark.parametrize("params,nearest", [
    (dict(preset="quickstar"), "quickstart"), (dict(clip="fixed_quantiles"), "fixed_quantile"), (dict(sampling="on-policy"), "on_policy"), (dict(kd_loss="forward-kl"), "forward_kl"),
    (dict(eval_sets="tiny,self-inst"), "self_inst"), (dict(preset="opt_dolly"), "opt-dolly"), (dict(preset="llama-dolly"), "llama2-dolly"), (dict(method="minilm"), "minillm"),
    (dict(scrg_detect="maxkl"), "max_kl"), (dict(select="rougel"), "rouge_l"), (dict(frozen_precision="bfloat"), "bfloat16"), (dict(pg_wieght=1.0), "pg_weight"),
    (dict(remainder="renormalize"), "renormalise"), (dict(learning_rates=0.1), "learning_rate")])
def test_the_nearest_name_is_offered(params, nearest):
    assert f"(did you mean {nearest!r}?)" in refusal(params)

def test_nothing_near_offers_nothing():
    assert "did you mean" not in refusal(xyzzy=1) and "did you mean" not in refusal(sampling="xyzzy")

def test_every_problem_gets_a_line():
    lines = refusal(dac_weight=-1, scrg="true", max_steps=0).splitlines()
    assert [line.split(":")[0] for line in lines] == ["dac_weight", "scrg", "max_steps"]
    assert [line.split(":")[0] for line in refusal(a=1, b=2).splitlines()] == ["a", "b"]

def test_all_choices_are_listed():
    for name, field in FIELDS.items():
        if get_origin(field.annotation) is Literal: assert refusal({name: "?"}).endswith("allowed: one of " + ", ".join(get_args(field.annotation)))

def bounds_of(field):
    found = {}
    for m in field.metadata: found |= {k: getattr(m, k) for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
    return found

def outside(field, whole):
    "Values of the right type beyond the bounds of a field, the nearest ones included."
    step, b, found = (1 if whole else 1e-9), bounds_of(field), []
    if "ge" in b: found += [b["ge"] - step, b["ge"] - 1]
    if "gt" in b: found += [b["gt"], b["gt"] - 1]
    if "le" in b: found += [b["le"] + step, b["le"] + 1]
    if "lt" in b: found += [b["lt"], b["lt"] + 1]
    return found

def bad_values(name):
    "A strategy of values that the field must refuse."
    field = FIELDS[name]
    kinds = get_args(field.annotation) or (field.annotation,)
    no_value = st.just([]) | st.just({}) | (st.nothing() if type(None) in kinds else st.none())
    if get_origin(field.annotation) is Literal: return no_value | st.integers() | st.booleans() | st.text().filter(lambda s: s not in kinds)
    if bool in kinds: return no_value | st.integers() | st.floats() | st.sampled_from(["true", "True", "False", ""])
    if int in kinds: return no_value | st.booleans() | st.floats() | st.text() | st.sampled_from([*outside(field, True), *([10**400] if "lt" in bounds_of(field) else [])])
    if float in kinds:
        return no_value | st.booleans() | st.text() | st.sampled_from([math.nan, math.inf, -math.inf, *outside(field, False)])
    special = {"preset": no_value | st.text().filter(lambda s: s not in PRESETS) | st.integers(), "method": no_value | st.text().filter(lambda s: s not in METHODS) | st.integers(),
               "run_name": no_value | st.integers() | st.sampled_from(["..", "a/../b", "/a", "a/", "a//b", "a b", "~", "a\\b", "a\n", "a\0", "..a"]),
               "data_dir": no_value | st.integers() | st.sampled_from(["no/such/folder", __file__, "\0"]),
               "eval_sets": st.floats() | st.booleans() | st.none() | st.integers() | st.sampled_from(["", "tiny,", "Tiny", "auto,tiny", "tiny;dolly", ["tiny", 3]]),
               "eval_seeds": st.floats() | st.booleans() | st.none() | st.integers(max_value=-1) | st.sampled_from(["", "10,", "ten", "1.5", "-1", "10;20", "\u00b2", "\u0661", [1.5]])}
    return special.get(name, no_value | st.integers() | st.floats())

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", FIELDS)
def test_pitfall_42_every_field_refuses_bad_values_by_its_name(name):
    @settings(max_examples=25, deadline=None)
    @given(value=bad_values(name))
    def check(value):
        message = refusal({name: value})
        assert message.startswith(f"{name}: ") and "allowed: " in message
    check()

@pytest.mark.pitfall(42)
@settings(max_examples=100, deadline=None)
@given(name=st.text().filter(lambda s: s not in FIELDS), value=st.none() | st.integers() | st.text())
def test_pitfall_42_any_unknown_name_is_refused(name, value):
    assert refusal({name: value}).startswith(f"{name}: there is no such parameter")

@pytest.mark.parametrize("params,name", [
    (dict(scrg=True, sampling="fixed"), "scrg"), (dict(sft_weight=0, dac_weight=0, span_weight=0), "sft_weight"), (dict(max_prompt_tokens=200, max_tokens=200), "max_prompt_tokens"),
    (dict(batch_size=6, micro_batch_size=7), "micro_batch_size"), (dict(target_class="none", dac_classes="target"), "target_class"), (dict(clip_upper=0.05), "clip_lower"), (dict(clip_lower=0.95), "clip_lower"), (dict(clip_upper=0.5, clip_lower=0.5), "clip_lower"),
    (dict(clip="fixed_percentile", clip_lower=0.9), "clip_lower"),
    (dict(pg_weight=1.0), "pg_weight"), (dict(pg_weight=0.1, scrg=False, sampling="fixed"), "pg_weight"), (dict(pg_weight=0.1, scrg=False, sampling="mixed"), "pg_weight"),
    (dict(pg_weight=0.1, scrg=False, sampling="off_policy"), "pg_weight"), (dict(pg_weight=0.1, scrg=True, sampling="mixed"), "pg_weight"), (dict(method="minillm", scrg=True), "pg_weight"),
    (dict(teacher_mix=0.2, scrg=False, sampling="fixed"), "teacher_mix"), (dict(method="minillm", sampling="off_policy"), "pg_weight"),
    (dict(select="nll", eval_every=0), "select"), (dict(select="kl", eval_every=0), "select"), (dict(select="rouge_l", eval_every=0), "select"),
    (dict(preset="gpt2-dolly", eval_every=0), "select"), (dict(sampling="off_policy", buffer_size=3), "buffer_size")])
def test_parameters_that_do_not_fit_together_are_refused(params, name):
    message = refusal(params)
    assert message.startswith(name) and set(params) & {w.strip(":,;") for w in message.split()}

@pytest.mark.parametrize("params", [dict(scrg=False, sampling="fixed"), dict(sft_weight=0, dac_weight=0, span_weight=0, kd_weight=0.1), dict(max_prompt_tokens=199, max_tokens=200),
                                    dict(batch_size=6, micro_batch_size=6), dict(target_class="none", dac_classes="dense"), dict(target_class="once", dac_classes="target"),
                                    dict(pg_weight=1.0, scrg=False), dict(teacher_mix=0.2, scrg=False, sampling="mixed"), dict(teacher_mix=0.2, sampling="off_policy"), dict(teacher_mix=0.2),
                                    dict(pg_weight=0.0, sampling="mixed"), dict(select="nll", eval_every=1), dict(select="last", eval_every=0), dict(teacher_mix=0.0, sampling="fixed", scrg=False),
                                    dict(clip="fixed_percentile", clip_lower=0.89), dict(clip="fixed_quantile", clip_lower=0.94), dict(clip_upper=1, clip_lower=0)])
def test_their_neighbours_are_allowed(params): resolve(params)

def test_a_refused_parameter_costs_no_torch():
    code = "import sys\nfrom mgsr_nb.config import resolve, ConfigError\ntry: resolve(dac_weight=-1)\nexcept ConfigError: sys.exit(3 + ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3

# --- values that are allowed

def test_whole_numbers_are_numbers_but_not_the_other_way():
    assert type(resolve(dac_weight=1).dac_weight) is float and resolve(dac_weight=1) == resolve(dac_weight=1.0)
    assert refusal(max_steps=3.0).startswith("max_steps: got 3.0 (float)")

def test_lists_and_numbers_mean_the_same_as_their_text():
    assert resolve(eval_seeds=10) == resolve(eval_seeds="10") == resolve(eval_seeds=[10]) == resolve()
    assert resolve(eval_seeds=[10, 20]).eval_seed_list == [10, 20] == resolve(eval_seeds="10,20").eval_seed_list
    assert resolve(eval_sets=["tiny", "vicuna"]).eval_set_list == ["tiny", "vicuna"] == resolve(eval_sets="tiny, vicuna").eval_set_list

def test_auto_evaluates_on_tiny_or_on_the_five():
    assert resolve().eval_set_list == ["tiny"] and resolve(data="dolly").eval_set_list == ["dolly", "self_inst", "vicuna", "sinst", "uinst"]

def test_limits_fill_in_the_users_two_fixed_clippings():
    assert resolve(clip="fixed_quantile").limits == (0.95, 0.05) == resolve().limits and resolve(clip="fixed_percentile").limits == (0.90, 0.10)
    assert resolve(clip="fixed_percentile", clip_upper=0.8, clip_lower=0).limits == (0.8, 0)

@pytest.mark.parametrize("weights,distils", [((1, 0, 0, 0, 0), False), ((0, 1, 0, 0, 0), True), ((0, 0, 1, 0, 0), True), ((0, 0, 0, 1, 0), True), ((0, 0, 0, 0, 1), True)])
def test_distils(weights, distils):
    assert resolve(dict(zip(("sft_weight", "dac_weight", "span_weight", "kd_weight", "pg_weight"), weights)), scrg=False).distils is distils

def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError): resolve().dac_weight = 0.5

# --- presets

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_say_only_what_differs(preset):
    c = resolve(preset=preset)
    for name, value in PRESETS[preset].items(): assert getattr(c, name) == value != FIELDS[name].default
    assert {n for n in FIELDS if getattr(c, n) != FIELDS[n].default} - {"preset"} == PRESETS[preset].keys()

def test_the_defaults_are_the_quickstart(): assert resolve() == RunConfig() == resolve(preset="quickstart")

def test_what_is_typed_wins_over_the_preset_even_when_it_is_the_general_default():
    general = FIELDS["max_steps"].default
    assert PRESETS["smollm2-dolly"]["max_steps"] == 120 != general
    assert resolve(preset="smollm2-dolly", max_steps=general).max_steps == general and resolve(preset="smollm2-dolly").max_steps == 120

def test_the_papers_preset():
    c = resolve(preset="gpt2-dolly")
    assert (c.learning_rate, c.weight_decay, c.max_grad_norm, c.max_prompt_tokens, c.max_tokens, c.eval_seed_list) == (5e-4, 0.01, 1.0, 256, 512, [10, 20, 30, 40, 50])
    assert (c.sft_weight, c.dac_weight, c.span_weight, c.lora_alpha, c.lora_dropout, c.clip, c.sub_inputs, c.scrg) == (1, 1, 1, 64, 0.1, "learned", "full", True)

@pytest.mark.parametrize("preset,teacher,student", [
    ("gpt2-dolly", "openai-community/gpt2-xl", "openai-community/gpt2"), ("opt-dolly", "facebook/opt-6.7b", "facebook/opt-1.3b"),
    ("openllama-dolly", "openlm-research/open_llama_7b_v2", "openlm-research/open_llama_3b_v2"), ("llama2-dolly", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-7b-hf")])
def test_the_papers_pairs(preset, teacher, student):
    "GPT-2 trains all weights for 20 epochs, the larger ones adapters of rank 16 for 10."
    c = resolve(preset=preset)
    assert (c.teacher, c.student, c.data, c.select, c.eval_exposure, c.eval_seed_list) == (teacher, student, "dolly", "rouge_l", True, [10, 20, 30, 40, 50])
    assert (c.lora_rank, c.max_steps) == ((0, 8400) if preset == "gpt2-dolly" else (16, 4200)) and (c.lora_alpha, c.lora_dropout, c.batch_size) == (64, 0.1, 32)
    assert c.eval_every > 0 and c.max_steps % c.eval_every == 0

# --- choices agree with the modules that implement them

def test_choices_are_those_of_the_modules():
    from mgsr_nb import dac_kl, data, divergences, scrg, span
    choices = lambda name: get_args(FIELDS[name].annotation)
    assert C.DIVERGENCE_NAMES == tuple(divergences.DIVERGENCES) == choices("kd_loss")
    assert C.EVAL_SET_NAMES == tuple(data.EVAL_SETS) and choices("data") == tuple(data.TRAIN_SETS) and choices("template") == data.TEMPLATES
    assert choices("clip_reading") == dac_kl.READINGS and choices("target_class") == dac_kl.TARGETS and choices("remainder") == dac_kl.REMAINDERS and choices("dac_classes") == dac_kl.CLASSES
    assert choices("spans") == span.SPAN_KINDS and choices("span_relation") == tuple(span.RELATIONS) and choices("scrg_direction") == tuple(scrg.DIRECTIONS)

def test_every_choice_of_f_sub_and_the_teachers_token_is_one_of_the_modules():
    from mgsr_nb.dac_kl import SubNetwork
    for inputs in get_args(FIELDS["sub_inputs"].annotation): SubNetwork(5, inputs=inputs)
    from mgsr_nb.scrg import Scorer
    greedy = {kind: Scorer(None, None, 0, 5, teacher_token=kind).greedy for kind in get_args(FIELDS["scrg_teacher_token"].annotation)}
    assert greedy == {"sample": False, "greedy": True}

def test_every_detector_is_one_of_the_modules():
    from mgsr_nb import scrg
    from mgsr_nb.run.parts import make_detector
    made = {kind: type(make_detector(resolve(scrg_detect=kind))) for kind in get_args(FIELDS["scrg_detect"].annotation)}
    assert made == {"max_kl": scrg.MaxKL, "threshold": scrg.FirstAbove, "random": scrg.AnyDifference}
    assert make_detector(resolve(scrg_detect="threshold", scrg_threshold=0.3)).threshold == 0.3

def test_the_table_has_a_row_for_each_parameter():
    rows = parameter_table().splitlines()[2:]
    assert [r.split("`")[1] for r in rows] == list(FIELDS)
    assert all(f.description for f in FIELDS.values())

# --- the notebook's cells

PARAMETERS = "\n".join(f"{n} = {f.default!r}  # {f.description}" for n, f in FIELDS.items())

def notebook(*cells, parameters=PARAMETERS):
    "What `from_notebook` sees after these cells, in IPython's numbering; it is called in the cell after them."
    cells, variables = ["", "import os, sys\nfrom mgsr_nb.config import from_notebook", parameters, *cells], {}
    for cell in cells: exec(cell, variables)
    return from_notebook([*cells, "config = from_notebook(In, globals())"], variables)

@pytest.mark.pitfall(42)
def test_pitfall_42_an_injected_cell_counts_and_nothing_else():
    assert notebook() == resolve()
    assert notebook("# Parameters\ndac_weight = 0.5\nseed = 3") == resolve(dac_weight=0.5, seed=3)

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("cell,words", [
    ("dac_wieght = 0.5", "dac_wieght: there is no such parameter (did you mean 'dac_weight'?)"), ("scrg = 'true'", "scrg: got 'true' (str)"),
    ("dac_weight = '0.5'", "dac_weight: got '0.5' (str)"), ("dac_weight = -1", "dac_weight: got -1 (int)"), ("sft_weight = True", "sft_weight: got True (bool)"),
    (f"max_steps = {FIELDS['max_steps'].default}.0", f"max_steps: got {FIELDS['max_steps'].default}.0 (float)"), ("overwrite = 0", "overwrite: got 0 (int)"), ("preset = 'nope'", "preset: got 'nope'")])
def test_pitfall_42_what_papermill_only_warns_about_is_refused(cell, words):
    "Also where the wrong type equals the default: True == 1.0, 24.0 == 24."
    with pytest.raises(ConfigError) as e: notebook(cell)
    assert words in str(e.value)

@pytest.mark.pitfall(42)
@pytest.mark.parametrize("name", [n for n in FIELDS if n != "run_name"])
def test_pitfall_42_every_parameter_can_be_injected(name):
    assert getattr(notebook("\n".join(f"{n} = {v!r}" for n, v in with_needs(name).items())), name) == OTHER[name]

def test_an_injected_default_wins_over_the_preset():
    assert notebook("preset = 'smollm2-dolly'").max_steps == 120
    general = FIELDS["max_steps"].default
    assert notebook(f"preset = 'smollm2-dolly'\nmax_steps = {general}").max_steps == general != 120

def test_an_edited_parameters_cell_counts_like_an_injected_one():
    edited = PARAMETERS.replace("preset = 'quickstart'", "preset = 'smollm2-dolly'").replace("seed = 0", "seed = 7")
    assert notebook(parameters=edited) == resolve(preset="smollm2-dolly", seed=7)
    with pytest.raises(ConfigError, match="dac_wieght"): notebook(parameters=PARAMETERS + "\ndac_wieght = 0.5")

def test_a_parameters_cell_run_again_sets_nothing_by_itself():
    "In JupyterLab the same cell is run many times; only a cell with fewer names says that its values are meant."
    edited = PARAMETERS.replace("preset = 'quickstart'", "preset = 'smollm2-dolly'")
    assert notebook(edited, edited, parameters=edited) == resolve(preset="smollm2-dolly")
    assert notebook(PARAMETERS, PARAMETERS) == resolve()
    general = FIELDS["max_steps"].default
    assert notebook(f"max_steps = {general}", edited).max_steps == general
    all_but_one = "\n".join(line for line in edited.splitlines() if not line.startswith("seed "))
    assert notebook(all_but_one, parameters=edited) == resolve({n: f.default for n, f in FIELDS.items() if n != "seed"}, preset="smollm2-dolly")

def test_the_value_is_the_last_one_assigned():
    assert notebook("seed = 1", "seed = 2").seed == 2 and notebook("seed = 1", "seed: int = 0").seed == 0

def test_papermills_own_names_and_cells_that_are_no_python_are_let_through():
    cells = ["", "%matplotlib inline", "!ls", "def f():\n    x = 1", PARAMETERS, "PAPERMILL_OUTPUT_PATH = 'runs/x.ipynb'", "broken ("]
    variables = {n: f.default for n, f in FIELDS.items()} | {"PAPERMILL_OUTPUT_PATH": "runs/x.ipynb"}
    assert from_notebook([*cells, ""], variables) == resolve()

def test_the_cell_that_asks_may_assign_any_name():
    variables = {n: f.default for n, f in FIELDS.items()}
    assert from_notebook(["", PARAMETERS, "anything = 1\nconfig = from_notebook(In, globals())"], variables) == resolve()

def test_it_reads_what_ipython_keeps():
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in ("from mgsr_nb.config import from_notebook", PARAMETERS, "dac_weight = 0.5", "config = from_notebook(In, globals())"):
        shell.run_cell(cell, store_history=True).raise_error()
    assert shell.user_ns["config"] == resolve(dac_weight=0.5)

# --- digest and name

@pytest.mark.parametrize("name", FIELDS)
def test_the_digest_changes_with_what_is_computed_and_only_with_that(name):
    source = {"sampling": SOURCE_ONLY[name]} if name in SOURCE_ONLY else {}
    base, other = RunConfig(**source, **NEEDS.get(name, {})), RunConfig(**source, **with_needs(name))
    assert (base.digest == other.digest) == (name in ELSEWHERE)
    if name not in ELSEWHERE: assert run_name(base) != run_name(other)

@pytest.mark.parametrize("name", SOURCE_ONLY)
def test_what_another_source_would_need_makes_no_other_run(name):
    for sampling in ("fixed", "on_policy", "mixed", "off_policy"):
        base, other = (resolve(sampling=sampling, scrg=False, **more) for more in ({}, {name: OTHER[name]}))
        assert (base.digest == other.digest) == (run_name(base) == run_name(other)) == (sampling != SOURCE_ONLY[name])

def test_the_digest_is_the_same_in_another_process():
    code = "from mgsr_nb.config import resolve; print(resolve(seed=5, eval_seeds=[1, 2]).digest)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == resolve(seed=5, eval_seeds=[1, 2]).digest

def allowed_values(name):
    "A strategy of allowed values of one field; names of models as they are on the hub, without characters that a folder cannot have."
    field, b = FIELDS[name], bounds_of(FIELDS[name])
    kinds = get_args(field.annotation) or (field.annotation,)
    if get_origin(field.annotation) is Literal: return st.sampled_from(kinds)
    if name in ("preset", "method"): return st.sampled_from(list(PRESETS if name == "preset" else METHODS))
    if name in ("teacher", "student"): return st.from_regex(r"[a-z0-9.-]{1,40}", fullmatch=True)
    if name == "eval_sets": return st.lists(st.sampled_from(C.EVAL_SET_NAMES), min_size=1, max_size=4)
    if name == "eval_seeds": return st.lists(st.integers(0, 99), min_size=1, max_size=5)
    if bool in kinds: return st.booleans()
    if int in kinds: return st.integers(b.get("ge", 0), b.get("le", 10**6))
    low, high = b.get("ge", b.get("gt", 0)), b.get("le", b.get("lt", 1e6))
    number = st.floats(low, high, exclude_min="gt" in b, exclude_max="lt" in b)
    return number | st.none() if type(None) in kinds else number

FREE = [n for n in FIELDS if n not in ("run_name", "runs_dir", "data_dir", "overwrite")]
some_parameters = st.lists(st.sampled_from(FREE), unique=True, max_size=8).flatmap(lambda names: st.fixed_dictionaries({n: allowed_values(n) for n in names}))

@settings(max_examples=300, deadline=None)
@given(first=some_parameters, change=some_parameters)
def test_different_configurations_never_share_a_name(first, change):
    try: a, b = resolve(first), resolve({**first, **change})
    except ConfigError: assume(False)
    if a.digest != b.digest: assert run_name(a) != run_name(b)
    elif (a.preset, a.method) == (b.preset, b.method): assert run_name(a) == run_name(b)
    for c in (a, b): assert len(run_name(c)) <= 120 and "/" not in run_name(c)

@pytest.mark.parametrize("a,b", [(dict(teacher="a/b"), dict(teacher="a_b")), (dict(teacher="x,student_layers=3"), dict(teacher="x", student_layers=3)),
                                 (dict(student="./a"), dict(student="._a")), (dict(eval_seeds="1,2"), dict(eval_seeds="1, 2"))])
def test_signs_that_a_folder_cannot_have_do_not_make_two_runs_one(a, b):
    assert run_name(resolve(a)) != run_name(resolve(b))

def test_names_can_be_read():
    assert run_name(resolve()) == "quickstart" and run_name(resolve(preset="gpt2-dolly")) == "gpt2-dolly"
    assert run_name(resolve(dac_weight=0.5, span_weight=1)) == "dac_weight=0.5" and run_name(resolve(preset="gpt2-dolly", seed=3)) == "gpt2-dolly,seed=3"
    assert run_name(resolve(run_name="mine", seed=3)) == "mine"

def test_long_names_end_with_the_digest():
    many = dict(list(OTHER.items())[20:40])
    names = [run_name(resolve({**many, "seed": s})) for s in (1, 2)]
    assert all(len(n) <= 120 for n in names) and names[0] != names[1] and names[0].endswith("+" + resolve({**many, "seed": 1}).digest[:8])

@settings(max_examples=200, deadline=None)
@given(name=st.text(alphabet="ab.=/\\~ \n\0", max_size=8) | st.text(max_size=8), teacher=st.text(max_size=8), root=st.just(Path("runs").resolve()))
def test_no_run_escapes_from_its_folder(name, teacher, root):
    try: named = resolve(run_name=name, teacher=teacher)
    except ConfigError: named = None
    if named: assert (root / run_name(named)).resolve().is_relative_to(root)
    try: unnamed = resolve(teacher=teacher)
    except ConfigError: return
    assert (root / run_name(unnamed)).resolve().parent == root

# --- the run's folder

def test_open_run_writes_the_configuration(tmp_path):
    c = resolve(runs_dir=str(tmp_path), dac_weight=0.5, data_dir=str(tmp_path), eval_sets="dolly")
    folder = open_run(c)
    record = json.loads((folder / "config.json").read_text())
    assert folder == tmp_path / "dac_weight=0.5,eval_sets=dolly" and record["dac_weight"] == 0.5 and record["digest"] == c.digest
    assert resolve({k: v for k, v in record.items() if k != "digest"}).digest == c.digest
    assert str(tmp_path) not in (folder / "config.json").read_text()

def test_open_run_finds_its_own_and_refuses_another(tmp_path):
    make = lambda **kw: resolve(runs_dir=str(tmp_path), run_name="x", **kw)
    folder = open_run(make(seed=1))
    (folder / "metrics.json").write_text("{}")
    before = (folder / "config.json").read_bytes()
    assert open_run(make(seed=1)) == folder and finished(folder)
    with pytest.raises(ConfigError) as e: open_run(make(seed=2))
    assert str(e.value).startswith("run_name: ") and str(folder) in str(e.value) and make(seed=1).digest in str(e.value) and "overwrite" in str(e.value)
    assert (folder / "config.json").read_bytes() == before and finished(folder)

def test_overwrite_takes_the_old_results_away(tmp_path):
    make = lambda **kw: resolve(runs_dir=str(tmp_path), run_name="x", **kw)
    folder = open_run(make(seed=1))
    for name in ("metrics.json", "log.csv", "samples.jsonl", "notes.txt"): (folder / name).write_text("{}")
    assert open_run(make(seed=2, overwrite=True)) == folder and not finished(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "notes.txt"] and json.loads((folder / "config.json").read_text())["seed"] == 2

def test_relative_runs_lie_at_the_projects_root(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir(); (tmp_path / "nbs/train.ipynb").touch()
    for place in (tmp_path, tmp_path / "nbs"):
        monkeypatch.chdir(place)
        assert project_root() == tmp_path and open_run(resolve(seed=1)) == tmp_path / "runs/seed=1"
    elsewhere = tmp_path.parent / (tmp_path.name + "-other"); elsewhere.mkdir()
    assert project_root(elsewhere) == elsewhere

# --- files

@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "new/metrics.json"
    write_atomic(path, "old")
    def fail(*a): raise OSError("disk full")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"): write_atomic(path, "new" * 1000)
    assert path.read_text() == "old"

def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "log.csv"
    write_atomic(path, "old")
    code = ("import os, signal, sys\nfrom mgsr_nb.files import write_atomic\nos.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_atomic(sys.argv[1], 'new' * 1000)")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomic(path, "ünïcödé\n")
    assert path.read_bytes() == "ünïcödé\n".encode()

@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1, {"b": -math.inf}]}])
def test_json_refuses_what_it_cannot_say(tmp_path, value):
    write_json(tmp_path / "m.json", {"loss": 1})
    with pytest.raises(ValueError): write_json(tmp_path / "m.json", value)
    assert json.loads((tmp_path / "m.json").read_text()) == {"loss": 1} and os.listdir(tmp_path) == ["m.json"]

def test_csv_has_the_union_of_the_columns(tmp_path):
    write_csv(tmp_path / "log.csv", [{"step": 1, "a": 0.5}, {"step": 2, "b": "x,y"}])
    assert (tmp_path / "log.csv").read_text() == 'step,a,b\n1,0.5,\n2,,"x,y"\n'
