"""What other trainers (TRL, transformers, verl) call an option, and its name here."""

from __future__ import annotations

import re
from collections.abc import Collection

from fastrlhf.settings.option import did_you_mean

# names there, and what to say: an option that is the same here, or else a sentence; of several the first whose options
# the command has
OTHERS: tuple[tuple[str, ...], ...] = (
    ("lr actor_lr", "--learning-rate"),
    ("critic_lr", "--value-learning-rate"),
    ("num_train_epochs num_epochs total_epochs", "the length of a run is --steps", "--epochs"),
    ("ppo_epochs num_ppo_epochs num_iterations", "--epochs"),
    ("num_mini_batches", "--minibatches"),
    (
        "max_steps total_steps total_training_steps",
        "--steps",
        "the length of a run is --epochs, or fewer rows: --limit",
    ),
    ("learning_rate_scheduler learning_rate_scheduler_type lr_scheduler lr_scheduler_type scheduler", "--schedule"),
    ("warmup_steps lr_warmup_steps", "--warmup-ratio is the share of the steps"),
    ("lr_warmup_steps_ratio", "--warmup-ratio"),
    (
        "per_device_train_batch_size train_batch_size gradient_accumulation_steps micro_batch_size ppo_mini_batch_size",
        "--batch-size is that of a whole step, which --max-tokens cuts into micro-batches",
    ),
    ("per_device_eval_batch_size eval_batch_size", "--max-tokens is the size of a micro-batch"),
    ("output_dir save_path default_local_dir", "--output"),
    ("model_name_or_path model_name model_path pretrained", "--model"),
    ("reward_model_path reward_model reward_funcs", "--reward"),
    ("ref_model ref_model_path", "--reference"),
    ("processing_class tokenizer_name tokenizer_name_or_path tokenizer_path", "--tokenizer"),
    ("dataset dataset_name train_dataset train_file train_files", "--data"),
    ("eval_dataset val_files validation_file", "--eval-data"),
    ("eval_strategy evaluation_strategy", "--eval-every"),
    ("missing_eos_penalty", "here it is --missing-eos subtract:1.0"),
    ("use_vllm vllm_server_host vllm_server_base_url vllm_mode", "--rollout-url is that of a running vLLM server"),
    ("total_episodes", "the number of responses is --steps times --batch-size"),
    ("sft_model_path", "--model"),
    ("max_samples max_train_samples", "--limit"),
    ("max_seq_length max_seq_len max_length", "--max-length", "lengths are --max-prompt-tokens and --max-new-tokens"),
    ("max_prompt_length", "--max-prompt-tokens", "--max-length is that of prompt and response together"),
    ("max_completion_length max_response_length response_length", "--max-new-tokens"),
    ("num_generations n_samples_per_prompt", "--samples-per-prompt"),
    ("beta init_kl_coef kl_loss_coef", "--kl-coef"),
    ("cliprange clip_ratio epsilon", "--clip-range"),
    ("clip_ratio_high epsilon_high", "--clip-range-high"),
    ("cliprange_value", "--clip-range-value"),
    ("vf_coef", "--value-coef"),
    ("adv_estimator", "--estimator"),
    ("loss_agg_mode", "--loss-mean"),
    ("loss_type", "--loss"),
    ("simpo_gamma", "--target-margin"),
    ("grad_clip max_norm", "--max-grad-norm"),
    ("save_steps save_freq", "--save-every"),
    ("save_total_limit", "--keep-checkpoints"),
    ("eval_steps test_freq", "--eval-every"),
    ("logging_steps", "every step is logged"),
    ("report_to", "--tensorboard writes its files, and metrics.jsonl is always written"),
    ("resume_from_checkpoint", "--resume"),
    ("overwrite_output_dir", "--overwrite"),
    ("use_peft lora_r", "--lora-rank above 0 trains an adapter"),
    ("lora_target_modules target_modules", "--lora-targets"),
    ("bf16 fp16 torch_dtype", "--dtype is auto, float32 or bfloat16"),
    ("optim", "--optimizer"),
    ("adam_epsilon", "--adam-eps"),
    ("packing use_remove_padding", "sequences are always packed"),
)
OPTION = re.compile(r"--([a-z-]+)")


def hint(name: str, known: Collection[str], *, dashes: bool) -> str:
    """What to say after an unknown option: its name here, or the nearest known name; nothing if there is neither.

    known: the fields of the command; dashes: options are written --as-here, not as_keys of YAML"""
    plain = name.replace("-", "_").lower()
    text = _other_name(plain, known) or _other_name(plain.rpartition(".")[2], known)  # verl's are a.b.name
    if not text:
        nearest = did_you_mean(name.replace("-", "_"), list(known))
        text = re.sub(r"mean (\w+)", lambda found: f"mean --{found[1].replace('_', '-')}", nearest).removeprefix("; ")
    if not dashes:
        text = OPTION.sub(lambda found: found[1].replace("-", "_"), text)
    return text and f"; {text}"


def _other_name(name: str, known: Collection[str]) -> str:
    for names, *texts in OTHERS:
        for text in texts if name in names.split() else ():
            if all(option.replace("-", "_") in known for option in OPTION.findall(text)):
                return f"here it is {text}" if OPTION.fullmatch(text) else text
    return ""
