"""What draws the responses of a PPO run: an engine on the policy's own module, or vLLM servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrlhf.data.template import eos_token_ids
from fastrlhf.generation.engine import Engine
from fastrlhf.generation.rollout_server import ServerBackend
from fastrlhf.generation.sampling import RolloutBackend
from fastrlhf.models.policy import Policy
from fastrlhf.runs import ranks
from fastrlhf.scoring.sources import load_function
from fastrlhf.settings.ppo import STALE, PPOConfig


def make_engine(config: PPOConfig, policy: Policy, tokenizer: Any) -> Engine:
    """The engine that runs the policy's own module."""
    return Engine(
        policy.model,
        adapter=policy.adapter,
        eos_token_ids=eos_token_ids(tokenizer, policy.model),
        max_slots=min(config.max_slots, config.batch_size),
        kv_budget=None if config.kv_budget is None else int(config.kv_budget * 2**30),
        tokenizer=tokenizer,
        cuda_graphs=config.cuda_graphs,
    )


def make_backend(config: PPOConfig, policy: Policy, tokenizer: Any) -> RolloutBackend:
    """What the settings ask for. Raises: ValueError or TypeError for a weight_sync that is no function."""
    if config.rollout_url is None:
        return make_engine(config, policy, tokenizer)
    return ServerBackend(
        config.rollout_urls,
        config.rollout_model,
        eos_token_ids=eos_token_ids(tokenizer, policy.model),
        update_weights=weight_hook(config, policy),
        logprobs_mode=config.rollout_logprobs,  # type: ignore[arg-type]
        max_requests=config.max_slots,
    )


def weight_hook(config: PPOConfig, policy: Policy) -> Callable[[], None] | None:
    """What brings the policy's weights to the servers: the first process does, the others wait for it."""
    given = config.weight_sync
    if given == STALE:
        return None
    function: Callable[..., Any] = given if callable(given) else load_function(str(given), "weight_sync")

    def bring() -> None:
        if ranks.is_first():
            function(policy, config.rollout_urls)
        ranks.gather(None)

    return bring
