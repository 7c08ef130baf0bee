"""The grid that a quantized weight lies on, and rounding to it: what every method of this package ends with.

Groups along the input axis, asymmetric: w is near (q - z) * s with q and z in 0..2**bits - 1. Scales are rounded to
the fp16 of the file first, and zeros and codes follow from the rounded scale, so that what a search evaluates is, bit
for bit, what is written. This file knows no model, no activations and no file layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import QTensor

FP16_MAX = 65504.0
FP16_QUANTUM = 2.0**-24  # the distance between fp16 numbers below the smallest normal, 2**-14


@dataclass(frozen=True)
class Grid:
    """Which numbers a quantized weight can take: `bits` per code, one scale and zero for `group_size` inputs.

    `group_size` -1 is the whole row; where it does not divide the inputs, the last group of a row is shorter.
    """

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.bits} bits: weights can be quantized to 2, 3, 4, 5, 6, 7 or 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size {self.group_size}: give a number of inputs, or -1 for one group per row")

    def width(self, n_inputs: int) -> int:
        """The group size in a row of `n_inputs`."""
        return n_inputs if self.group_size == -1 else min(self.group_size, n_inputs)

    def quantize(self, weight: torch.Tensor, name: str = "weight") -> QTensor:
        """The weight, fp32 [N, K], rounded to nearest. `name` is for the messages of CheckpointError."""
        codes, scales, zeros = self._round(weight, name)
        n, k = weight.shape
        return QTensor(
            codes.reshape(n, -1)[:, :k].to(torch.uint8).contiguous().numpy(),
            scales.to(torch.float16).numpy(),
            zeros.to(torch.uint8).numpy(),
            self.bits,
            self.width(k),
        )

    def round_trip(self, weight: torch.Tensor, name: str = "weight") -> torch.Tensor:
        """What `quantize(weight).dequantize()` returns, fp32 [N, K], without the detour."""
        codes, scales, zeros = self._round(weight, name)
        n, k = weight.shape
        return codes.sub_(zeros[..., None]).mul_(scales[..., None]).reshape(n, -1)[:, :k]

    def _round(self, weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes [N, groups, width], scales [N, groups], zeros [N, groups]), all fp32; a short last group is padded."""
        n, k = weight.shape
        width = self.width(k)
        if short := -k % width:  # padded with what is there already, so that the last group's range stays its own
            weight = torch.cat([weight, weight[:, -1:].expand(n, short)], dim=1)
        grouped = weight.reshape(n, -1, width)
        top = float(2**self.bits - 1)
        low, high = grouped.aminmax(dim=-1)
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"{name}: {bad} of {weight.numel()} weights are not finite; such a tensor cannot be quantized. "
                f"The checkpoint is damaged, or was saved from a run that diverged"
            )
        # A group of one repeated value is that value: code 1 (or zero 1) times it, exactly.
        constant = (low == high) & (low.abs() <= FP16_MAX)
        scales = torch.where(constant, low.abs(), (high.clamp(min=0) - low.clamp(max=0)) / top)
        if float(scales.max()) > FP16_MAX:
            raise CheckpointError(
                f"{name}: weights from {float(low.min()):.3g} to {float(high.max()):.3g} need a scale above "
                f"{FP16_MAX:.0f}, the largest that the checkpoint's fp16 can hold"
            )
        # Below fp16's normal numbers rounding is coarse: up, so that the ends of the range are not cut off.
        small = (scales / FP16_QUANTUM).ceil() * FP16_QUANTUM
        scales = torch.where(scales < 2.0**-14, small, scales).to(torch.float16).float()
        scales = torch.where(scales == 0, 1.0, scales)
        zeros = (-low.clamp(max=0) / scales).round().clamp_(0, top)
        codes = (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, top)
        return codes, scales, zeros


def as_float(array: np.ndarray) -> torch.Tensor:
    """An fp32, fp16 or bf16 numpy array as an fp32 tensor (its own memory where it is fp32 and writable)."""
    return torch.from_numpy(np.require(array.astype(np.float32, copy=False), requirements=["C", "W"]))
