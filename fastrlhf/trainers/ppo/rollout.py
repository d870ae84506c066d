"""What draws the responses of a PPO run: an engine on the policy's own module, or vLLM servers."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from fastrlhf.data import Prompt
from fastrlhf.data.template import eos_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Engine
from fastrlhf.generation.rollout_server import ServerBackend
from fastrlhf.generation.sampling import RolloutBackend, Sample, Sampling
from fastrlhf.generation.weight_sync import check_adapter, lora
from fastrlhf.models.policy import Policy, autocasting
from fastrlhf.rewards.named_functions import load_function
from fastrlhf.runtime import distributed
from fastrlhf.runtime.fsdp import unsharded, unsharded_replica
from fastrlhf.runtime.http import ServerError, read_key, reason_in, shown, without_key
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import ROLLOUT_WEIGHTS
from fastrlhf.settings.ppo import STALE, PPOConfig
from fastrlhf.trainers.ppo.models import PPOModels


class Rollout:
    """Draws the responses of a run.

    sampling: how; engine: of the policy; final_engine: of the policy that the run leaves, for held-out prompts
    gives_logprobs: whether log-probabilities of the engine are those of a trainer's forward pass, to 1e-5; not so in
    half precision, where the two round differently, and where something else than the engine samples"""

    def __init__(
        self,
        config: PPOConfig,
        models: PPOModels,
        tokenizer: Any,
        *,
        backend: Callable[[Policy], RolloutBackend] | None = None,
    ) -> None:
        self.config, self.models = config, models
        self.sampling = Sampling(**{f.name: getattr(config, f.name) for f in fields(Sampling) if f.name != "greedy"})
        make = backend or partial(make_backend, config, tokenizer=tokenizer)
        self.engine = self.final_engine = make(unsharded_replica(models.policy))
        if models.average is not None:
            self.final_engine = make_engine(config, unsharded_replica(models.average), tokenizer)
        in_process = backend is None and config.rollout_url is None
        self.gives_logprobs = in_process and models.policy.autocast is None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError or ServerError where servers cannot do what a run is going to ask of them."""
        if isinstance(self.engine, ServerBackend):
            self.engine.check([prompt.tokens for prompt in prompts], self.sampling)

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, greedy: bool = False, final: bool = False
    ) -> list[Sample]:
        """Returns a response to each prompt, whose draws follow from its seed. Each process draws a share of them.

        greedy: takes the likeliest tokens instead; final: of the policy that the run leaves"""
        policy, engine = (self.models.final, self.final_engine) if final else (self.models.policy, self.engine)
        progress = MetricsLog.progress("generate", len(prompts) * self.sampling.max_new_tokens)
        device = self.models.policy.model.device
        with unsharded(policy), progress as done, autocasting(device, self.models.policy.autocast):
            own = engine.generate(
                [prompt.tokens for prompt in distributed.local_shard(prompts)],
                replace(self.sampling, greedy=True) if greedy else self.sampling,
                seeds=distributed.local_shard(seeds),
                progress=done,
            )
        if len(own) != (asked := len(distributed.local_shard(prompts))):
            raise UserError(f"backend: must return a sample for each of {asked} prompts, in order, got {len(own)}")
        return [sample for samples in distributed.all_gather(own) for sample in samples]


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
    """Returns the engine, or the client of servers, as the settings say. Raises: ValueError or TypeError for a
    weight_sync that is no function, and for a key file without a key."""
    if config.rollout_url is None:
        return make_engine(config, policy, tokenizer)
    key = read_key(config.rollout_key_file, "rollout_key_file") if config.rollout_key_file else None
    return ServerBackend(
        config.rollout_urls,
        config.rollout_model,
        eos_token_ids=eos_token_ids(tokenizer, policy.model),
        update_weights=weight_hook(config, policy, key),
        logprobs_mode=config.rollout_logprobs,  # type: ignore[arg-type]
        max_requests=config.max_slots,
        timeout=config.rollout_timeout,
        api_key=key,
        vocab_size=policy.model.config.get_text_config().vocab_size,
    )


def weight_hook(config: PPOConfig, policy: Policy, key: str | None = None) -> Callable[[], None] | None:
    """Returns the function that brings the policy's weights to the servers. The first process calls weight_sync, the
    others wait. It gets the policy, the URLs, and those of the keywords folder, model and api_key that it names.

    Raises: ValueError for `lora` and a policy without an adapter."""
    given = config.weight_sync
    if given == STALE:
        return None
    function: Callable[..., Any] = given if callable(given) else load_function(str(given), "weight_sync")
    name = getattr(function, "__qualname__", type(function).__qualname__) if callable(given) else str(given)
    if function is lora:
        check_adapter(policy)
    folder = Path(config.output) / ROLLOUT_WEIGHTS
    options = _wanted(function, {"folder": folder, "model": config.rollout_model, "api_key": key})

    def bring() -> None:
        if distributed.is_main_process():
            try:
                function(policy, config.rollout_urls, **options)
            except Exception as error:
                text = f"weight_sync={name} failed for {', '.join(config.rollout_urls)}: {_why(error)}"
                raise ServerError(without_key(text, key)) from error
        distributed.all_gather(None)

    return bring


def _wanted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a function takes besides its first two arguments, the policy and the URLs, whatever it calls
    those."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    free = {name: value for name, value in offered.items() if name not in positional[:2]}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return free
    return {name: value for name, value in free.items() if name in {each.name for each in parameters}}


def _why(error: Exception) -> str:
    """Returns why the user's function failed: the server's address and reason, or else the error and its line."""
    if isinstance(error, HTTPError):
        return f"{shown(error.url or '')} answered {error.code}: {reason_in(error.read(4000))}"
    if isinstance(error, ServerError):
        return str(error)
    if isinstance(error, OSError):
        return shown(str(error))
    response = getattr(error, "response", None)  # of requests and httpx, whose errors name the address alone
    if isinstance(said := getattr(response, "text", None), str):
        return f"{shown(str(error))}: {reason_in(said.encode())}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {shown(str(error))} ({last.filename}, line {last.lineno})"
