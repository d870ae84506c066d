"""Settings of `fastrlhf info`."""

from __future__ import annotations

from dataclasses import dataclass

from fastrlhf.settings.training import JobConfig, option
from fastrlhf.settings.values import convert_all


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Versions, devices, and what serves each op; of a model, which of its layers take our fast paths."""

    model: str | None = option(None, "folder or hub id of a model: its fast paths, in place of the rest")
    device: str = option("auto", "where the model is tried: auto, cpu or cuda")
    dtype: str = option("auto", "of its forward: auto (bfloat16 on cuda), float32 or bfloat16")

    def __post_init__(self) -> None:
        convert_all(self)
        self.job()

    def job(self) -> JobConfig:
        """What a command with this device and dtype has; raises ValueError for those that none has."""
        return JobConfig(device=self.device, dtype=self.dtype)
