"""Configuration: what is refused, and with which words; what is allowed; which choices there are."""
import math, os, subprocess, sys
from typing import Literal, get_args, get_origin
import pytest
from hypothesis import given, settings, strategies as st
from other_parameters import FIELDS, NEEDS, OTHER, bounds_of, with_needs
from mgsr_nb.parameters import DATA_NAMES, DIVERGENCE_NAMES, EVAL_SET_NAMES, parameter_table
from mgsr_nb.presets import METHODS, PRESETS
from mgsr_nb.config import ConfigError, resolve

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
    (dict(preset="nope"), ["preset: got 'nope'", "allowed: one of quickstart, smollm2-dolly, laptop-dolly, lab, smollm2-gpu, gpt2-dolly, opt-dolly, openllama-dolly, llama2-dolly, qwen-dolly"]),
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
        return no_value | st.booleans() | st.text().filter(lambda s: "e" not in s.lower()) | st.sampled_from([math.nan, math.inf, -math.inf, *outside(field, False)])
    special = {"preset": no_value | st.text().filter(lambda s: s not in PRESETS) | st.integers(), "method": no_value | st.text().filter(lambda s: s not in METHODS) | st.integers(),
               "run_name": no_value | st.integers() | st.sampled_from(["..", "a/../b", "/a", "a/", "a//b", "a b", "~", "a\\b", "a\n", "a\0", "..a", "nul", "a/COM1.x", "a."]),
               "data": no_value | st.integers() | st.sampled_from(["", " ", "dolyl", "mine.xlsx", "missing.jsonl", "nbs", "a/b/c", "owner/name.json", "\0.json", "/", "Tiny"]),
               "push_to": no_value | st.integers() | st.sampled_from(["mine", "a/b/c", "a b/c", "me/"]),
               "data_dir": no_value | st.integers() | st.sampled_from(["no/such/folder", __file__, "\0", "x" * 1000]),
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
    (dict(ab_alpha=0.0, ab_beta=0.0), "ab_alpha"), (dict(ab_beta=0.005), "ab_alpha"), (dict(pg_weight=1.0), "pg_weight"), (dict(pg_weight=0.1, scrg=False, sampling="fixed"), "pg_weight"), (dict(pg_weight=0.1, scrg=False, sampling="mixed"), "pg_weight"),
    (dict(pg_weight=0.1, scrg=False, sampling="off_policy"), "pg_weight"), (dict(pg_weight=0.1, scrg=True, sampling="mixed"), "pg_weight"), (dict(method="minillm", scrg=True), "pg_weight"),
    (dict(teacher_mix=0.2, scrg=False, sampling="fixed"), "teacher_mix"), (dict(method="minillm", sampling="off_policy"), "pg_weight"),
    (dict(skd_top_k=5, scrg=False, sampling="fixed"), "skd_top_k"), (dict(method="minillm", skd_top_k=5), "pg_weight"),
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

@pytest.mark.parametrize("written,value", [("1e-3", 1e-3), ("1E3", 1e3), ("1.5e3", 1500.), ("5.e-1", .5), (".5e0", .5), ("+2e+0", 2.)])
def test_numbers_as_people_write_them(written, value):
    "YAML 1.1 takes all of these for text; a number without an exponent it does not, and in quotes it is text that was meant."
    assert resolve(learning_rate=written) == resolve(learning_rate=value)

@pytest.mark.parametrize("params", [dict(learning_rate="0.001"), dict(learning_rate="1e-3 "), dict(learning_rate="e5"), dict(max_steps="1e3"), dict(learning_rate="-1e-3"), dict(learning_rate="1e999"),
                                    dict(clip_upper="1e1"), dict(learning_rate="1_0e3")])
def test_what_is_no_such_number_is_refused(params): assert refusal(params).startswith(f"{next(iter(params))}: got ")

def test_lists_and_numbers_mean_the_same_as_their_text():
    assert resolve(eval_seeds=10) == resolve(eval_seeds="10") == resolve(eval_seeds=[10]) == resolve()
    assert resolve(eval_seeds=[10, 20]).eval_seed_list == [10, 20] == resolve(eval_seeds="10,20").eval_seed_list
    assert resolve(eval_sets=["tiny", "vicuna"]).eval_set_list == ["tiny", "vicuna"] == resolve(eval_sets="tiny, vicuna").eval_set_list

def test_auto_evaluates_on_tiny_on_the_five_or_on_ones_own():
    assert resolve().eval_set_list == ["tiny"] and resolve(data="someone/questions").eval_set_list == ["own"] and resolve(data="dolly").eval_set_list == ["dolly", "self_inst", "vicuna", "sinst", "uinst"]

def test_limits_fill_in_the_users_two_fixed_clippings():
    assert resolve(clip="fixed_quantile").limits == (0.95, 0.05) == resolve().limits and resolve(clip="fixed_percentile").limits == (0.90, 0.10)
    assert resolve(clip="fixed_percentile", clip_upper=0.8, clip_lower=0).limits == (0.8, 0)

@pytest.mark.parametrize("weights,distils", [((1, 0, 0, 0, 0), False), ((0, 1, 0, 0, 0), True), ((0, 0, 1, 0, 0), True), ((0, 0, 0, 1, 0), True), ((0, 0, 0, 0, 1), True)])
def test_distils(weights, distils):
    assert resolve(dict(zip(("sft_weight", "dac_weight", "span_weight", "kd_weight", "pg_weight"), weights)), scrg=False).distils is distils

def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError): resolve().dac_weight = 0.5

# --- choices agree with the modules that implement them

def test_choices_are_those_of_the_modules():
    from mgsr_nb import captured, dac_kl, data, divergences, scrg, span, tokens
    choices = lambda name: get_args(FIELDS[name].annotation)
    assert DIVERGENCE_NAMES == tuple(divergences.DIVERGENCES) == choices("kd_loss")
    assert EVAL_SET_NAMES == tuple(data.EVAL_SETS) and DATA_NAMES == tuple(data.TRAIN_SETS) and choices("shorten") == tokens.SHORTEN and FIELDS["chat_date"].default == tokens.CHAT_DATE and choices("template") == tokens.TEMPLATES
    assert choices("clip_reading") == dac_kl.READINGS and choices("target_class") == dac_kl.TARGETS and choices("remainder") == dac_kl.REMAINDERS and choices("dac_classes") == dac_kl.CLASSES
    assert choices("decoding") == captured.DECODING and choices("spans") == span.SPAN_KINDS and choices("span_relation") == tuple(span.RELATIONS) and choices("scrg_direction") == tuple(scrg.DIRECTIONS)

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

# --- digest

def test_the_digest_is_the_same_in_another_process():
    code = "from mgsr_nb.config import resolve; print(resolve(seed=5, eval_seeds=[1, 2]).digest)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == resolve(seed=5, eval_seeds=[1, 2]).digest
