"""RLHF on one machine: SFT, reward models and PPO over Hugging Face models, packed, on native kernels."""

from fastrlhf.config import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.ops import *  # noqa: F403
from fastrlhf.ops import __all__ as _ops
from fastrlhf.ppo import PPO

__version__ = "0.1.0"
__all__ = ["PPO", "PPOConfig", "RewardConfig", "SFTConfig", *_ops]
