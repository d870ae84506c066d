"""Settings of `fastrlhf info`."""

from __future__ import annotations

from dataclasses import dataclass

from fastrlhf.settings.base import Settings
from fastrlhf.settings.option import option, reads
from fastrlhf.settings.training import DTYPES, JobConfig


@dataclass(frozen=True, kw_only=True)
class InfoConfig(Settings):
    """Versions, devices, and what serves each op; of a model, which of its layers take our fast paths."""

    model: str | None = reads(None, "folder or hub id of a model: its fast paths, in place of the rest")
    device: str = option("auto", "where the model is tried: {}", choices="auto cpu cuda")
    dtype: str = option("auto", "of its forward: auto (bfloat16 on cuda), float32 or bfloat16", choices=DTYPES)

    def job(self) -> JobConfig:
        """What a command with this device and dtype has."""
        return JobConfig(device=self.device, dtype=self.dtype)
