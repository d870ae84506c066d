"""RLHF on one machine: SFT, reward models, PPO, DPO and KTO over Hugging Face models, packed, on native kernels.

Trainers: SFT, RewardTrainer, PPO, DPO, KTO; their settings: SFTConfig, RewardConfig, PPOConfig, DPOConfig, KTOConfig
(docs/python.md). Ops: functions of tensors (docs/ops.md).
"""

import fastrlhf._start  # noqa: F401  first, for a Ctrl-C while the rest is imported

# isort: split
import importlib
from typing import TYPE_CHECKING, Any

from fastrlhf.ops import *  # noqa: F403
from fastrlhf.ops import __all__ as _ops

if TYPE_CHECKING:
    from fastrlhf.data.rows import Prompt
    from fastrlhf.errors import DataError, MachineError, UserError
    from fastrlhf.generation.sampling import RolloutBackend, Sample, Sampling
    from fastrlhf.integrations import patch, unpatch
    from fastrlhf.models.policy import Policy, RewardModel, ValueModel
    from fastrlhf.settings.ppo import PPOConfig
    from fastrlhf.settings.training import DPOConfig, KTOConfig, RewardConfig, SFTConfig
    from fastrlhf.trainers.base import Trainer
    from fastrlhf.trainers.dpo import DPO
    from fastrlhf.trainers.kto import KTO
    from fastrlhf.trainers.ppo.trainer import PPO
    from fastrlhf.trainers.reward import RewardTrainer
    from fastrlhf.trainers.sft import SFT

__version__ = "0.1.0"
# imported when first asked for: the trainers bring transformers, which takes seconds that a user of the ops need not
# wait
_LATER = {
    "data.rows": "Prompt",
    "errors": "DataError MachineError UserError",
    "generation.sampling": "RolloutBackend Sample Sampling",
    "integrations": "patch unpatch",
    "models.policy": "Policy RewardModel ValueModel",
    "settings.ppo": "PPOConfig",
    "settings.training": "DPOConfig KTOConfig RewardConfig SFTConfig",
    "trainers.base": "Trainer",
    "trainers.dpo": "DPO",
    "trainers.kto": "KTO",
    "trainers.ppo.trainer": "PPO",
    "trainers.reward": "RewardTrainer",
    "trainers.sft": "SFT",
}
__all__ = [
    "DPO",
    "KTO",
    "PPO",
    "SFT",
    "DPOConfig",
    "DataError",
    "KTOConfig",
    "MachineError",
    "PPOConfig",
    "Policy",
    "Prompt",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "RolloutBackend",
    "SFTConfig",
    "Sample",
    "Sampling",
    "Trainer",
    "UserError",
    "ValueModel",
    *_ops,
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names.split():
            return getattr(importlib.import_module(f"fastrlhf.{module}"), name)
    raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
