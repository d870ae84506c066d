"""What a run will hold in memory, told before its models are loaded, and compared at its end with what it took.

Weights, gradients and moments are counted from the configurations of the models; what a layer keeps for a backward
pass is measured, on one and two layers of the model's sizes with a tiny vocabulary. Both ends are estimates: fragments,
buffers of libraries and copies while loading are not in them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastrlhf.data.pretrained import read_pretrained
from fastrlhf.models.attention import ATTENTION
from fastrlhf.models.fused_layers import fuse_layers
from fastrlhf.models.heads import KEPT_ROWS, autocasting
from fastrlhf.models.lora import WEIGHTS as WEIGHTS_FILE
from fastrlhf.models.lora import linears_of
from fastrlhf.models.policy import ADAPTER
from fastrlhf.packing import pack
from fastrlhf.rewards.sources import reward_folders
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import peak_memory_gib, reset_peak_memory
from fastrlhf.settings.objects import ModelSource
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.training import TrainerConfig

FROZEN = (4,)  # bytes a parameter: float32 weights; TRAINED: with gradients and the optimizer's moments
TRAINED = {"adamw": (4, 4, 8), "adamw8bit": (4, 4, 2)}
ACTIVATIONS, NAME = "activations of", 40  # of a training pass; characters of a name


@dataclass
class Plan:
    """Bytes by what they are for: models as (weights, gradients, moments), and the rest.

    first: weights that are there before the first step alone, when there are no gradients and moments yet
    idle: models that rest in the CPU's memory, where moments then do too, and act one after the other
    before: GiB of the process when the plan was made"""

    models: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    idle: list[str] | None = None
    available: float = 0.0
    before: float = field(default_factory=reset_peak_memory)

    @property
    def num_bytes(self) -> float:
        whole = sum(map(sum, self.models.values())) + sum(self.rest.values()) + sum(self.first.values())
        return whole - self.offloaded - self.not_simultaneous

    @property
    def offloaded(self) -> float:
        """What never is on the device together with the rest."""
        if self.idle is None:
            return 0.0
        moments = sum(parts[2] for parts in self.models.values() if len(parts) > 2)
        away = [moments, *(self.models[name][0] for name in self.idle)]
        return sum(away) - max(away)

    @property
    def not_simultaneous(self) -> float:
        """What is gone before the rest comes, or comes after it: the less of `first` and of what training adds."""
        added = sum(sum(parts[1:]) for parts in self.models.values())
        added += sum(part for name, part in self.rest.items() if name.startswith(ACTIVATIONS))
        return min(sum(self.first.values()), added)

    def __str__(self) -> str:
        def line(name: str, *parts: float) -> str:
            return f"  {name:<{NAME}}" + "".join(f"{part / 2**30:>10.3f}" for part in parts)

        lines = [f"{'memory plan, GiB':<{NAME + 2}}{'weights':>10}{'gradients':>10}{'moments':>10}"]
        lines += [line(name, *parts) for name, parts in self.models.items()]
        lines += [line(name, part) for name, part in self.rest.items()]
        for name, part in self.first.items():
            lines.append(line(f"{name}, before the first step", part))
        if self.first:
            lines.append(line("less what is not there together", self.not_simultaneous))
        if self.idle is not None:
            lines.append(line("less what rests in CPU memory", self.offloaded))
        lines.append(f"{line('in all', self.num_bytes)} of {self.available / 2**30:.1f} available")
        if self.num_bytes > self.available:
            advice = "lora_rank, gradient_checkpointing, a smaller max_tokens; for PPO offload, max_slots or kv_budget"
            lines.append(f"warning: the plan is more than there is; try {advice}")
        return "\n".join(lines)

    def shard_over(self, num_processes: int) -> None:
        """Makes it the plan of a process that holds shards (parallel=fsdp)."""
        self.rest["a model while it is whole"] = max(weights for weights, *_ in self.models.values())
        for name, parts in self.models.items():
            self.models[name] = tuple(part / num_processes for part in parts)

    def outcome(self) -> str:
        """A line on what the run took, beside the plan."""
        took = peak_memory_gib() - (0 if torch.cuda.is_available() else self.before)
        return f"memory: {self.num_bytes / 2**30:.3f} GiB planned, {took:.3f} GiB taken at the peak"


def plan_training(
    config: TrainerConfig,
    placement: dict[str, Any],
    *,
    num_tokens: int,
    num_heads: int = 0,
    reference: ModelSource | None = None,
) -> Plan:
    """The plan of a loop on a file of rows.

    num_tokens: of the longest step; num_heads: of scores, of a reward model; reference: what is loaded besides, and
    gone before the first step"""
    half = placement["autocast"]
    model, plan = _Model(config.model, config, half), Plan(available=available_bytes(placement["device"]))
    number = model.num_scalar(num_heads) if num_heads else model.num_parameters
    if config.lora_rank:
        plan.models["model, frozen"] = (number * model.size,)
        plan.models["adapter"] = _times(model.num_adapter(config.lora_rank), TRAINED[config.optimizer])
    else:
        plan.models["model"] = _times(number, TRAINED[config.optimizer])
    if reference is not None:
        plan.first["reference"] = 4 * _Model(reference, config, half).num_parameters
    _add_passes(plan, config, model, num_tokens, has_logits=not num_heads)
    return plan


def plan_ppo(config: PPOConfig, placement: dict[str, Any], *, longest_prompt: int) -> Plan:
    """The plan of PPO, whose roles share a frozen body where they are adapters."""
    half = placement["autocast"]
    policy, plan = _Model(config.model, config, half), Plan(available=available_bytes(placement["device"]))
    if config.has_adapters():
        plan.models["base, frozen"] = (policy.frozen if config.lora_rank else 4 * policy.num_parameters,)
    idle: list[str] = []
    own = policy.num_adapter(config.lora_rank) if config.lora_rank else policy.num_parameters
    plan.models["policy"] = _times(own, TRAINED[config.optimizer])
    if not (config.has_adapters() and config.reference in (None, config.model)):
        plan.models["reference"] = _times(_Model(config.reference or config.model, config, half).num_parameters, FROZEN)
        idle.append("reference")
    elif config.reference_every and config.lora_rank:
        plan.models["reference"] = _times(own, FROZEN)
    rewards = reward_folders(config.reward)
    for n, (source, heads) in enumerate(rewards.items(), 1):
        adapter = Path(source) / ADAPTER / WEIGHTS_FILE
        on_base = config.has_adapters() and heads == [None] and adapter.is_file()
        name = named(f"reward {n}", source)
        plan.models[name] = (adapter.stat().st_size if on_base else _Model(source, config, half).scoring(heads),)
        idle += [] if on_base else [name]
    for n, (source, heads) in enumerate(reward_folders(config.eval_reward).items(), 1):
        name = named(f"judge {n}", source)
        plan.models[name] = (_Model(source, config, half).scoring(heads),)
        idle.append(name)
    plan.idle = idle if config.offload == "idle" else None
    if config.estimator == "gae":
        alike = len(rewards) == 1 and len(next(iter(rewards.values()))) == 1
        start = _Model(next(iter(rewards)), config, half) if alike else policy
        rank = config.value_rank()
        plan.models["value model"] = _times(
            policy.num_adapter(rank) if rank else start.num_scalar(1), TRAINED[config.optimizer]
        )
    if config.ema_decay is not None:
        plan.models["average"] = _times(own, FROZEN)
    length = longest_prompt + config.max_new_tokens
    _add_passes(plan, config, policy, config.batch_size * length // config.minibatches)
    if config.rollout_url is None:
        slots = min(config.max_slots, config.batch_size)
        cache = slots * length * policy.cache_per_token
        limit = cache if config.kv_budget is None else config.kv_budget * 2**30
        plan.rest[f"KV cache, {slots} x {length:,} tokens"] = min(cache, limit)
    return plan


def print_memory_plan(make: Callable[..., Plan], config: Any, placement: dict[str, Any], **lengths: int) -> Plan | None:
    """Prints a plan and returns it; None where the configurations cannot be read, which loading will then explain."""
    try:
        with torch.random.fork_rng(devices=[]):  # models without memory draw their weights too
            plan = make(config, placement, **lengths)
        if config.parallel == "fsdp":
            plan.shard_over(distributed.world_size())
    except Exception as error:  # each architecture has its own
        distributed.print_once(f"no memory plan: {str(error).strip().partition(chr(10))[0]}")
        return None
    distributed.print_once(plan)
    return plan


def named(role: str, source: str) -> str:
    """A role with the end of its source: as many of its last folders as there is room for, and at least a part of
    the last."""
    parts, room = source.rstrip("/").split("/"), NAME - len(role) - 1
    shown = parts.pop()
    while parts and len(f".../{parts[-1]}/{shown}") <= room:
        shown = f"{parts.pop()}/{shown}"
    shown = f".../{shown}" if parts else shown
    return f"{role} {shown if len(shown) <= room else '...' + shown[3 - room :]}"


def available_bytes(device: torch.device) -> float:
    """Free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return float("inf")


class _Model:
    """Sizes of a model, from its configuration."""

    def __init__(self, path: ModelSource, config: TrainerConfig, half: torch.dtype | None) -> None:
        self.config, self.half = read_pretrained(AutoConfig, path), half
        self.targets, text = config.lora_targets, self.config.get_text_config()
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.size = 4 if self.half is None else 2  # of a number that is not trained
        self.frozen = self.num_parameters * self.size
        self.body = sum(parameter.numel() for parameter in self.model.base_model.parameters())
        self.num_layers, self.width, self.vocab = text.num_hidden_layers, text.hidden_size, text.vocab_size
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache_per_token = 2 * self.num_layers * heads * head_width * self.size

    def num_scalar(self, num_heads: int) -> int:
        """Parameters with heads of scores in place of one of words."""
        return self.body + num_heads * self.width

    def scoring(self, heads: list[str | None]) -> int:
        """Bytes of a reward model of which these heads are read: it is loaded with the one, or with all that it has."""
        return self.num_scalar(1 if len(heads) == 1 else self.config.num_labels) * self.size

    def num_adapter(self, rank: int) -> int:
        layers = linears_of(self.model, self.targets).values()
        return sum(rank * (layer.in_features + layer.out_features) for layer in layers)

    def activation_bytes_per_token(self, recompute: bool) -> float:
        """Bytes that a training pass keeps for a token; recompute: of all but one layer only the input is kept."""
        one, two = (self._kept(num_layers, 48) - self._kept(num_layers, 16) for num_layers in (1, 2))
        layer = (two - one) / 32
        rest = one / 32 - layer
        inputs = 4 * self.width
        return rest + layer + self.num_layers * inputs if recompute else rest + self.num_layers * layer

    def _kept(self, num_layers: int, num_tokens: int) -> int:
        small = copy.deepcopy(self.config)
        text = small.get_text_config()
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = num_layers, 16, None
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        model = model.to_empty(device="cpu").eval()  # no dropout; what its weights are does not matter
        model.set_attn_implementation(ATTENTION)
        fuse_layers(model)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor.detach()  # the tensor itself would keep the graph that keeps it

        batch = pack([[1] * num_tokens])
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, autocasting(batch.tokens.device, self.half):
            model.base_model(**batch.model_inputs())
        return sum(storage.nbytes() for storage in kept.values())


def _add_passes(plan: Plan, config: TrainerConfig, model: _Model, num_tokens: int, *, has_logits: bool = True) -> None:
    tokens = min(config.max_tokens, num_tokens)
    kept = model.activation_bytes_per_token(config.gradient_checkpointing)
    plan.rest[f"{ACTIVATIONS} {tokens:,} tokens"] = tokens * kept
    if has_logits:
        # those kept, and of a chunk logits and their gradient
        plan.rest["logits of the head"] = 3 * 4 * min(KEPT_ROWS, tokens) * model.vocab
    if model.half is not None and not config.lora_rank:
        plan.rest[f"{model.half} copies".removeprefix("torch.")] = 2 * model.num_parameters


def _times(number: int, sizes: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(number * size for size in sizes)
