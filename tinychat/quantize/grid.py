"""The grid that a quantized weight lies on, and rounding to it: what every method of this package ends with.

Groups along the input axis: w is near (q - z) * s with q and z in 0 .. 2**bits - 1. Scales are rounded to the fp16 of
the file first, and zeros and codes follow from the rounded scale, so that what a search evaluates is, bit for bit, what
is written. This file knows no model, no activations and no file layout.

asymmetric  s = (high - low) / (2**bits - 1) of the group's range, zero included, and z = -low / s
symmetric   s = max|w| / 2**(bits - 1), z = 2**(bits - 1): arXiv 2306.00978, equation 1. Codes use the whole range, so
            that one end of it is exact and the other, a step further than the largest code, is cut off
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinychat.backends import arithmetic
from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import QTensor, bfloat16

FP16_MAX = 65504.0
FP16_QUANTUM = 2.0**-24  # the distance between fp16 numbers below the smallest normal, 2**-14


@dataclass(frozen=True)
class Grid:
    """Which numbers a quantized weight can take: `bits` per code, one scale and zero for `group_size` inputs.

    `group_size` -1 is the whole row; where it does not divide the inputs, the last group of a row is shorter.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UsageError(f"{self.bits!r} bits: weights can be quantized to 2, 3, 4, 5, 6, 7 or 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size {self.group_size}: give a number of inputs, or -1 for one group per row")

    @property
    def top(self) -> float:
        """The largest code."""
        return float(2**self.bits - 1)

    def width(self, n_inputs: int) -> int:
        """The group size in a row of `n_inputs`."""
        return n_inputs if self.group_size == -1 else min(self.group_size, n_inputs)

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [N, groups, width]; a short last group is padded with what it holds: its range stays its own."""
        n, k = weight.shape
        if short := -k % self.width(k):
            weight = torch.cat([weight, weight[:, -1:].expand(n, short)], dim=1)
        return weight.reshape(n, -1, self.width(k))

    def parameters(
        self, low: torch.Tensor, high: torch.Tensor, name: str = "weight"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scales, zeros) of groups whose weights lie in low .. high: fp32 tensors, all of one shape.

        CheckpointError, with `name`, where fp16 cannot hold a scale.
        """
        # A group of one repeated value is that value: code 1 (or zero 1) times it, exactly.
        constant = (low == high) & (low.abs() <= FP16_MAX)
        if self.symmetric:
            scales = torch.maximum(low.abs(), high.abs()) / 2.0 ** (self.bits - 1)
        else:
            scales = high.clamp(min=0) - low.clamp(max=0)
            scales = scales / scales.new_full((), self.top)  # by a number a GPU does not divide, but multiplies
        scales = torch.where(constant, low.abs(), scales)
        if float(scales.max()) > FP16_MAX:
            raise CheckpointError(
                f"{name}: weights from {float(low.min()):.3g} to {float(high.max()):.3g} need a scale above "
                f"{FP16_MAX:.0f}, the largest that the checkpoint's fp16 can hold"
            )
        # Below fp16's normal numbers rounding is coarse: up, so that the ends of the range are not cut off.
        small = (scales / FP16_QUANTUM).ceil() * FP16_QUANTUM
        scales = torch.where(scales < 2.0**-14, small, scales).to(torch.float16).float()
        scales = torch.where(scales == 0, 1.0, scales)
        if self.symmetric:
            return scales, torch.full_like(scales, 2.0 ** (self.bits - 1))
        return scales, (-low.clamp(max=0) / scales).round_().clamp_(0, self.top)

    def codes(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The codes nearest to `weight`, fp32 [..., width], of groups with `scales` and `zeros` [...]."""
        return (weight / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, self.top)

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The numbers of the grid nearest to `weight`: (q - z) * s of those codes, fp32 [..., width]."""
        scales, low = scales[..., None], -zeros[..., None]
        made = (weight / scales).round_()
        torch.maximum(made, low, out=made)  # whole vectors at once, as clamp_ with tensors is not
        return torch.minimum(made, low + self.top, out=made).mul_(scales)

    def fitted(
        self, weight: torch.Tensor, name: str = "weight", limits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(grouped weight, scales, zeros) of fp32 [N, K]. `limits` [N, groups, 2] replace the groups' own (low, high).

        CheckpointError, with `name`, where a weight is not finite.
        """
        grouped = self.grouped(weight)
        low, high = grouped.amin(-1), grouped.amax(-1)
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"{name}: {bad} of {weight.numel()} weights are not finite; such a tensor cannot be quantized. "
                f"The checkpoint is damaged, or was saved from a run that diverged"
            )
        if limits is not None:
            low, high = limits.unbind(-1)
        return grouped, *self.parameters(low, high, name)

    def quantize(self, weight: torch.Tensor, name: str = "weight", limits: torch.Tensor | None = None) -> QTensor:
        """The weight, fp32 [N, K], rounded to nearest. `name` and `limits`: see `fitted`."""
        grouped, scales, zeros = self.fitted(weight, name, limits)
        return self.tensor(self.codes(grouped, scales, zeros).reshape(len(weight), -1), scales, zeros, weight.shape[1])

    def tensor(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, n_inputs: int) -> QTensor:
        """The `QTensor` of codes [N, n_inputs or more] and of scales and zeros [N, groups]."""
        return QTensor(
            codes[:, :n_inputs].to(torch.uint8).contiguous().cpu().numpy(),
            scales.to(torch.float16).cpu().numpy(),
            zeros.to(torch.uint8).cpu().numpy(),
            self.bits,
            self.width(n_inputs),
        )

    def round_trip(
        self,
        weight: torch.Tensor,
        name: str = "weight",
        limits: torch.Tensor | None = None,
        divisors: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `quantize(weight).dequantize()` returns, fp32 [N, K], without the detour.

        divisors  [K]: it is divided by them
        out       [N, K], contiguous: where it goes

        On the CPU by the engine's kernel, where it is: the same numbers.
        """
        (n, k), width = weight.shape, self.width(weight.shape[1])
        if cpu := arithmetic.clipper(weight):
            made = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
            ends, by = (None if x is None else x.contiguous() for x in (limits, divisors))
            if arithmetic.rounded(cpu, weight.contiguous(), width, self.top, self.symmetric, ends, by, made):
                return made  # else what stands in the way is an error below
        grouped = self.nearest(*self.fitted(weight, name, limits))
        made = grouped.reshape(n, -1)[:, :k]
        if divisors is not None:
            made = made / divisors
        return made if out is None else out.copy_(made)


def stacked(parts: Sequence[QTensor]) -> QTensor:
    """Rows of one linear, quantized a few at a time, as the whole."""
    codes, scales, zeros = (np.concatenate([getattr(part, f) for part in parts]) for f in ("codes", "scales", "zeros"))
    return QTensor(codes, scales, zeros, parts[0].bits, parts[0].group_size, parts[0].permutation)


def as_stored(array: np.ndarray) -> torch.Tensor:
    """An fp32, fp16 or bf16 numpy array as a tensor of that dtype (its own memory where it is writable)."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_float(array: np.ndarray) -> torch.Tensor:
    """An fp32, fp16 or bf16 numpy array as an fp32 tensor (its own memory where it is fp32 and writable)."""
    return torch.from_numpy(np.require(array.astype(np.float32, copy=False), requirements=["C", "W"]))
