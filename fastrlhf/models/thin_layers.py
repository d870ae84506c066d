"""Linear layers that take our product for few rows: those of a decode step, on the CPU and without gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrlhf.ops.thin_linear import MOST_AT_ONCE, thin_linear

FEWEST = 4  # rows; torch's products of a vector are as fast
MOST_BYTES = 2**19  # of the rows, which are read once for every few outputs: they have to stay in the cache


class ThinLinear(nn.Linear):
    """nn.Linear in all but the time that it takes."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        plain = type(input) is Tensor and type(weight) is nn.Parameter and input.is_cpu and weight.is_cpu
        if not plain or torch.is_grad_enabled() or not (input.dtype is weight.dtype is torch.float32):
            return super().forward(input)
        num_rows, fits = input.numel() // self.in_features, 4 * input.numel() <= MOST_BYTES
        if not (FEWEST <= num_rows <= MOST_AT_ONCE and fits) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        out = thin_linear(input.reshape(num_rows, self.in_features), weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)


def thin_layers(model: nn.Module) -> None:
    """Makes every plain linear layer of a model a ThinLinear, in place; parameters, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ThinLinear
