"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for each one's error.

The loss of a linear is |E X^T|^2 = tr(E H E^T), of its weights' error E and H = X^T X over all calibration tokens. With
H^-1 = U^T U, U upper triangular, rounding column j of W to q costs ((w_j - q) / U_jj)^2 in each row, once the columns
after it are moved by -(w_j - q) / U_jj * U_j: the paper's equations 2 and 3, by its Cholesky reformulation.

A group's scale is found when its first column is reached, from weights that have moved already, unless clipping has
set its limits. Act-order takes the columns by falling H_jj. "static" leaves the groups those of the file, with the
scales of the weights as they were, so that nothing but the order of updates changes and every layout can hold the
result. "free" makes groups of columns that follow each other in that order, so that inputs of like activity share a
scale: what is written then has a `permutation`, and limits, which are of other groups, have no say.

Each row keeps what rounding to nearest, in the groups that are written, makes of it where that has the lower loss. A
linear whose free groups lose more than rounding to nearest in the file's own gets those: it is done as "static".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.errors import CheckpointError
from tinychat.qtensor import QTensor
from tinychat.quantize.activations import Observed
from tinychat.quantize.dense import Dense, quantized_layer
from tinychat.quantize.factor import Factor
from tinychat.quantize.grid import Grid, stacked
from tinychat.quantize.report import GroupResult
from tinychat.weights import Layer

NEEDS_CALIBRATION = True
NEEDS_GRAMS = True
BLOCK = 128  # columns whose updates of the columns after them are done together
NUMBERS = 2**23  # of a weight, in whole rows, that are solved for at once: bounds what is in memory
GPU_NUMBERS = 2**26  # the same of a GPU, which would spend its time in starting on so little


@torch.inference_mode()
def round_layer(
    config: ModelConfig, layer: PackedLayer, index: int, observed: Observed, grid: Grid, act_order: str | None = None
) -> tuple[Layer, list[GroupResult]]:
    """`layer` as it is written, and what that costs each linear."""
    losses: dict[str, list[float]] = {}  # of each linear: rounded to nearest, by this method, and nothing at all
    solvers: dict[str, Solver] = {}

    def quantize(part: Dense) -> QTensor:
        linear = part.name.partition(".")[0]  # of all experts
        if part.name not in solvers:
            solvers.clear()  # of the linear before
            if part.name not in observed.grams:  # an expert that no token went to
                return part.quantize(grid)
            seen = observed.grams.pop(part.name)
            gram = seen.taken()  # the largest need not stand beside others
            if part.columns is not None:
                gram.div_(part.columns).div_(part.columns[:, None])
            solvers[part.name] = Solver(gram, seen.n_tokens, act_order, part.modules[0])
        made, found = solvers[part.name].quantize(part, grid)
        losses[linear] = [a + b for a, b in zip(losses.get(linear, [0.0] * 3), found, strict=True)]
        return made

    made = quantized_layer(layer, quantize)
    results = []
    for name, (nearest, found, power) in losses.items():
        power = max(power, torch.finfo(torch.float32).tiny)
        results.append(GroupResult(index, f"{name}, rounding", None, nearest / power, found / power))
    return made, results


class Solver:
    """GPTQ for all rows that read the same inputs."""

    def __init__(self, gram: torch.Tensor, n_tokens: int, act_order: str | None = None, name: str = "weight"):
        """`gram` fp32 [K, K] is H, of so many tokens. CheckpointError, with `name`, where it is not finite."""
        self.gram = gram
        free = act_order == "free"
        diagonal = gram.diagonal()
        if not torch.isfinite(torch.stack(gram.aminmax())).all():
            raise CheckpointError(f"{name}: its inputs, multiplied with each other, go beyond fp32's range")
        self.order = diagonal.argsort(descending=True, stable=True) if act_order else None
        self.back = self.order.argsort() if self.order is not None and free else None  # of free groups
        self.factor = Factor(gram, n_tokens, self.order, name)

    def quantize(self, part: Dense, grid: Grid) -> tuple[QTensor, tuple[float, float, float]]:
        """(a linear of one segment on the grid; the loss rounded to nearest, the loss of this, the loss of zeros)."""
        made, losses = self._in_pieces(part, grid, self.back)
        if self.back is not None and losses[1] > losses[0]:
            made, losses = self._in_pieces(part, grid, None)
        return made, losses

    def _in_pieces(
        self, part: Dense, grid: Grid, back: torch.Tensor | None
    ) -> tuple[QTensor, tuple[float, float, float]]:
        """The same; `back` is the file's order of columns by that of free groups, None where groups are the file's."""
        made, losses = [], []
        for _, piece in part.slices(NUMBERS if part.stored.is_cpu else GPU_NUMBERS):
            found, loss = self._quantize(piece, grid, back)
            made.append(found)
            losses.append(loss)
        nearest, after, power = (float(x.sum()) for x in torch.cat(losses, dim=1))
        return stacked(made), (nearest, after, power)

    def _quantize(self, part: Dense, grid: Grid, back: torch.Tensor | None) -> tuple[QTensor, torch.Tensor]:
        """The same of a few rows; their losses, fp64 [3, N]."""
        weight, name = part.weight, part.modules[0]
        power = _quadratic(weight, self.gram)
        grouped, scales, zeros = grid.fitted(weight, name, part.limits if back is None else None)
        n, k = weight.shape
        nearest = grid.codes(grouped, scales, zeros).reshape(n, -1)[:, :k]
        before = plain = self._loss(weight, nearest, scales, zeros, grid, None)
        permutation = None
        if back is not None and self.order is not None:  # what is written has other groups than plain rounding
            permutation = self.order.to(torch.int32).cpu().numpy()
            weight = weight[:, self.order]
            grouped, scales, zeros = grid.fitted(weight, name)
            nearest = grid.codes(grouped, scales, zeros).reshape(n, -1)[:, :k]
            before = self._loss(weight, nearest, scales, zeros, grid, back)
        codes, new_scales, new_zeros = self._solve(part, grid, scales, zeros, free=back is not None)
        after = self._loss(weight, codes, new_scales, new_zeros, grid, back)
        better = after < before  # false for NaN
        losses = torch.stack((plain, torch.where(better, after, before), power))
        codes = torch.where(better[:, None], codes, nearest)
        scales, zeros = (torch.where(better[:, None], *of) for of in ((new_scales, scales), (new_zeros, zeros)))
        return replace(grid.tensor(codes, scales, zeros, k), permutation=permutation), losses.double()

    def _loss(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        grid: Grid,
        back: torch.Tensor | None,
    ) -> torch.Tensor:
        """tr(E H E^T), row by row: [N]. Columns in the order in which they are written; `back` as above."""
        groups = torch.arange(weight.shape[1]) // grid.width(weight.shape[1])
        error = (codes - zeros[:, groups]).mul_(scales[:, groups]).sub_(weight)
        return _quadratic(error if back is None else error[:, back], self.gram)

    def _solve(
        self, part: Dense, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor, *, free: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes [N, K], scales, zeros), in the columns' own order, or in the free one."""
        n, k = part.shape
        width = grid.width(k)
        static = not free and (self.order is not None or part.limits is not None)
        order = torch.arange(k) if self.order is None else self.order
        weight = part.weight.T[order]  # [K, N], a copy: a column's numbers lie together
        codes = torch.empty_like(weight)
        scales, zeros = (x.T.clone(memory_format=torch.contiguous_format) for x in (scales, zeros))  # [groups, N]
        group_of = ((torch.arange(k) if free else order) // width).tolist()
        for first, last in _blocks(k, BLOCK if static else width):
            errors = torch.empty(last - first, n)
            factor = self.factor.rows(first, last)
            for j in range(first, last):
                group = group_of[j]
                if not static and j % width == 0:
                    low, high = weight[j : j + width].aminmax(dim=0)
                    scales[group], zeros[group] = grid.parameters(low, high, part.modules[0])
                scale, zero = scales[group], zeros[group]
                codes[j] = (weight[j] / scale).round_().add_(zero).clamp_(0, grid.top)
                i = j - first
                error = (weight[j] - (codes[j] - zero) * scale) / factor[i, i]
                weight[j + 1 : last].addr_(factor[i, i + 1 : last - first], error, alpha=-1)
                errors[i] = error
            weight[last:].addmm_(factor[:, last - first :].T, errors, alpha=-1)
        if not free:
            codes[order] = codes.clone()
        return codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous()


def _blocks(n_columns: int, width: int) -> Iterator[tuple[int, int]]:
    """First and last column of blocks of at most BLOCK, or of one group; a group that fits in none begins one."""
    first = 0
    while first < n_columns:
        whole = BLOCK // width * width  # groups
        last = min(first + whole if whole else min(first + BLOCK, (first // width + 1) * width), n_columns)
        yield first, last
        first = last


def _quadratic(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """e H e^T of each row: [N]."""
    return (error @ gram).mul_(error).sum(1)
