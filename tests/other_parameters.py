"For every parameter another allowed value than its default, what it cannot do without, and its bounds."
from mgsr_nb.config import RunConfig

FIELDS = RunConfig.model_fields
OTHER = {  # for every field another allowed value
    "method": "mgsr_off_policy", "responses": "teacher", "threshold_start": 0.5, "buffer_size": 50,
    "preset": "gpt2-dolly", "run_name": "mine", "runs_dir": "elsewhere", "overwrite": True, "seed": 1, "teacher": "gpt2", "teacher_sft_steps": 0, "student": "opt",
    "student_layers": 10, "layer_choice": "even", "lora_rank": 4, "lora_alpha": 1.0, "lora_dropout": 0.0, "precision": "float32", "data": "dolly", "data_dir": ".",
    "template": "chat", "chat_date": "2030-01-31", "shorten": "end", "max_prompt_tokens": 100, "max_tokens": 300, "max_train_examples": 5, "sft_weight": 0.0, "dac_weight": 0.5, "span_weight": 0.25, "kd_weight": 1.0,
    "kd_loss": "jsd", "skew_alpha": 0.2, "jsd_beta": 0.1, "clip": "none", "clip_upper": 0.8, "clip_lower": 0.2, "clip_reading": "mass", "clip_fraction": 0.5,
    "mask_temperature": 0.0, "target_class": "twice", "remainder": "bucket", "dac_classes": "dense", "sub_inputs": "full", "sub_top_k": 8, "sub_layers": 0, "sub_width": 8,
    "sub_learning_rate": 0.1, "spans": "whole", "span_length": 2, "span_relation": "outer", "sampling": "mixed", "mixed_fraction": 0.0, "max_new_tokens": 1, "scrg": False,
    "scrg_corrections": 3, "scrg_direction": "teacher_student", "scrg_teacher_token": "greedy", "max_steps": 1, "batch_size": 6, "micro_batch_size": 2, "chunk_tokens": 1,
    "learning_rate": 1e-5, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 5.0, "eval_sets": "tiny,dolly", "eval_prompts": 0, "eval_seeds": "10,20",
    "eval_batch_size": 1, "eval_temperature": 0.7, "eval_every": 0, "checkpoint_every": 5, "log_every": 5, "save_student": False, "save_samples": 3, "length_buckets": 2,
    "dry_run": True, "student_sft_steps": 7, "frozen_precision": "float32", "pg_weight": 0.5, "pg_clip": 0.1, "pg_single_step": False, "pg_length_norm": False, "teacher_mix": 0.2,
    "scrg_detect": "random", "scrg_threshold": 0.5, "eval_exposure": True, "select": "nll", "chunker": "spacy", "compile_student": True, "tracker": "tensorboard",
    "sft_learning_rate": 1e-3, "eval_greedy": True, "rouge_words": "unicode", "save_prompts": False, "split_seed": 1, "push_to": "me/mine", "push_public": True, "head_mass": 0.3, "ab_alpha": 0.5, "ab_beta": 0.5, "skd_top_k": 5, "teacher_classes": "top", "teacher_k": 4, "data_kd_weight": 0.5, "data_kd_loss": "jsd", "reward_weight": 0.5, "write_ahead": 2, "decoding": "captured"}
NEEDS = {"pg_weight": {"scrg": False}, "reward_weight": {"scrg": False}, "data_dir": {"data": "dolly"}}   # what a value of OTHER cannot do without

def with_needs(name): return {**NEEDS.get(name, {}), name: OTHER[name]}

def bounds_of(field):
    found = {}
    for m in field.metadata: found |= {k: getattr(m, k) for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
    return found
