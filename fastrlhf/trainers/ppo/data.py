"""The files that PPO reads beside its prompts: held-out prompts, and the demonstrations of PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrlhf.data import Demonstration, Prompt, load_demonstrations, load_prompts
from fastrlhf.models.policy import PackedModel
from fastrlhf.runtime import distributed
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.loading import check_fits


def load_eval_prompts(config: PPOConfig, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the held-out prompts, none without eval_data; says how many of them are among the prompts, too."""
    if config.eval_data is None:
        return []
    loaded = load_prompts(config.eval_data, tokenizer, limit=config.eval_limit, **config.prompt_options())
    distributed.print_once(loaded.report)
    seen = {tuple(prompt.tokens) for prompt in prompts}
    if shared := sum(tuple(prompt.tokens) in seen for prompt in loaded.rows):
        text = f"{shared} of the {len(loaded.rows)} prompts of {config.eval_data} are trained on too"
        distributed.print_once(f"warning: {text}")
    return loaded.rows


def load_ptx(config: PPOConfig, tokenizer: Any) -> list[Demonstration]:
    """Returns the demonstrations of PPO-ptx, none without ptx_data."""
    if config.ptx_data is None:
        return []
    options = config.prompt_options()
    max_tokens = options.pop("max_prompt_tokens") + config.max_new_tokens
    loaded = load_demonstrations(config.ptx_data, tokenizer, max_tokens=max_tokens, **options)
    distributed.print_once(loaded.report)
    return loaded.rows


def check_lengths(
    config: PPOConfig,
    tokenizer: Any,
    models: Sequence[PackedModel],
    prompts: Sequence[Prompt],
    ptx: Sequence[Demonstration],
) -> None:
    """Raises UserError unless the context of each model holds the longest prompt with its response, and that of the
    first one, the policy, the longest demonstration."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    for model in models:
        check_fits(model.model, tokenizer, longest_prompt=longest, max_new_tokens=config.max_new_tokens)
    if ptx:
        check_fits(models[0].model, tokenizer, longest_demonstration=max(len(row.tokens) for row in ptx))
