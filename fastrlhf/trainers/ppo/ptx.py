"""The files that PPO reads."""

from __future__ import annotations

from typing import Any

from fastrlhf.data import Demonstration, load_demonstrations
from fastrlhf.runtime import distributed
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.setup import check_fits


def load_ptx(config: PPOConfig, tokenizer: Any, model: Any) -> list[Demonstration]:
    """The demonstrations of PPO-ptx, if there are any; raises ValueError where the model's context is too short."""
    if config.ptx_data is None:
        return []
    loaded = load_demonstrations(
        config.ptx_data,
        tokenizer,
        max_tokens=config.max_prompt_tokens + config.max_new_tokens,
        template=config.template,
        template_kwargs=config.template_kwargs,
        max_rejected=config.max_rejected,
    )
    distributed.print_once(loaded.report)
    check_fits(model, tokenizer, longest_demonstration=max(len(row.tokens) for row in loaded.rows))
    return loaded.rows
