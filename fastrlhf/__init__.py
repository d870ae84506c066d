"""RLHF on one machine: SFT, reward models and PPO over Hugging Face models, packed, on native kernels."""

import fastrlhf._start  # noqa: F401  first, for a Ctrl-C while the rest is imported

# isort: split
import importlib
from typing import TYPE_CHECKING, Any

from fastrlhf.ops import *  # noqa: F403
from fastrlhf.ops import __all__ as _ops

if TYPE_CHECKING:
    from fastrlhf.integrations import patch, unpatch
    from fastrlhf.settings.ppo import PPOConfig
    from fastrlhf.settings.training import DPOConfig, RewardConfig, SFTConfig
    from fastrlhf.trainers.dpo import DPO
    from fastrlhf.trainers.kto import KTO
    from fastrlhf.trainers.ppo.trainer import PPO
    from fastrlhf.trainers.reward import RewardTrainer
    from fastrlhf.trainers.sft import SFT

__version__ = "0.1.0"
# imported when first asked for: the loops bring transformers, which takes seconds that a user of the ops need not wait
_LATER = {
    "DPO": "trainers.dpo",
    "DPOConfig": "settings.training",
    "KTO": "trainers.kto",
    "PPO": "trainers.ppo.trainer",
    "PPOConfig": "settings.ppo",
    "RewardConfig": "settings.training",
    "RewardTrainer": "trainers.reward",
    "SFT": "trainers.sft",
    "SFTConfig": "settings.training",
    "patch": "integrations",
    "unpatch": "integrations",
}
__all__ = [
    "DPO",
    "KTO",
    "PPO",
    "SFT",
    "DPOConfig",
    "PPOConfig",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    *_ops,
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"fastrlhf.{_LATER[name]}"), name)
    raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
