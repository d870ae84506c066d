"""Settings of `fastrlhf info` and `fastrlhf check`."""

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


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Settings):
    """Every op against its float64 reference on this machine, for each backend and dtype; then its time at a training
    size, as a share of what this machine copies or multiplies. Exit status 1 if a result is wrong."""

    device: str = option("auto", "cpu, cuda or cuda:N; auto: cuda where there is a GPU")
    matrix: bool = option(False, "print only the table of op, backend and dtype")
