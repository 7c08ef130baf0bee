"""Activation-aware weight quantization: the search for per-channel scales (arXiv 2306.00978, section 3.2).

For each scaling group: s = mean|x| ** alpha, alpha = i / 20 for i = 0 .. 20, and the s is kept whose rounding disturbs
the output of the block around the group least. alpha = 0 is the identity, plain rounding to nearest, so that no group
ends up worse than that by its own measure. Statistics and losses are fp32, over the tokens of `Observed` only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer, block, mlp, self_attention
from tinychat.quantize.activations import Observed
from tinychat.quantize.dense import Dense, DenseOps, changed
from tinychat.quantize.grid import Grid
from tinychat.quantize.groups import Group, scaling_groups
from tinychat.quantize.report import BLOCK, GroupResult
from tinychat.weights import LINEARS

NEEDS_CALIBRATION = True
STEPS = 20
LARGEST = 2.0**10  # no channel is scaled by more, or by less than its inverse: fp16 must hold the folded weights

Loss = Callable[[dict[str, Dense]], float]  # of the linears in place of those of a group


@torch.inference_mode()
def transform(
    config: ModelConfig, layer: PackedLayer, index: int, observed: Observed, grid: Grid
) -> tuple[PackedLayer, list[GroupResult]]:
    """`layer` with the best scales of each group folded in: the same function, easier to round."""
    results = []
    folded = layer
    for group in scaling_groups(config):
        consumers: dict[str, Dense] = {name: getattr(layer, name) for name in group.consumers}
        if not any(linear.quantized for linear in consumers.values()):
            continue

        def rounded(columns: torch.Tensor | None = None, consumers: dict[str, Dense] = consumers) -> dict[str, Dense]:
            return {name: linear.rounded(grid, columns) for name, linear in consumers.items()}

        loss = _loss(config, layer, index, group, observed)
        magnitude = group.pooled(observed.magnitude[group.consumers[0]])  # all read the same
        identity = loss(rounded())
        best, alpha, scales = identity, 0.0, None
        for step in range(1, STEPS + 1):
            tried = group.settled(layer, candidate(magnitude, step / STEPS))
            found = loss(rounded(group.spread(tried)))
            if found < best:  # false for NaN
                best, alpha, scales = found, step / STEPS, tried
        if scales is not None:
            folded = group.fold(folded, scales)
        results.append(GroupResult(index, group.name, alpha, identity, best))
    if not results:
        return layer, []
    before, after = (_block_loss(config, layer, other, index, grid, observed) for other in (layer, folded))
    results.append(GroupResult(index, BLOCK, None, before, after))
    return folded, results


def candidate(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = magnitude ** alpha, centred so that max(s) * min(s) is 1; 1 for channels that are always zero."""
    alive = magnitude > 0
    if not alive.any():
        return torch.ones_like(magnitude)
    log = alpha * torch.where(alive, magnitude, 1.0).log()
    log = log - (log[alive].max() + log[alive].min()) / 2
    return torch.where(alive, log, 0.0).exp().clamp(1 / LARGEST, LARGEST)


def _loss(config: ModelConfig, layer: PackedLayer, index: int, group: Group, observed: Observed) -> Loss:
    """How far the output of attention, MLP or both moves when the group's consumers are replaced."""
    if group.ends_block:
        (name,) = group.consumers
        quadratic = _quadratic_loss(getattr(layer, name), observed.rows(name))
        return lambda consumers: quadratic(consumers[name])
    ops = DenseOps()

    def run(consumers: dict[str, Dense]) -> list[torch.Tensor]:
        replaced = changed(layer, **consumers)
        outputs = []
        for sample in observed.samples:
            parts = []
            if "qkv" in consumers:
                parts.append(self_attention(config, ops, replaced, index, sample.inputs["qkv"], sample.context))
            if "up" in consumers:
                parts.append(mlp(config, ops, replaced, sample.inputs["up"]))
            outputs.append(sum(parts[1:], start=parts[0]))
        return outputs

    expected = run({name: getattr(layer, name) for name in group.consumers})
    power = _power(expected)
    return lambda consumers: (
        sum(float((a - b).square().sum()) for a, b in zip(run(consumers), expected, strict=True)) / power
    )


def _quadratic_loss(consumer: Dense, x: torch.Tensor) -> Callable[[Dense], float]:
    """The same where y = x W^T: |x E^T|^2 of the weight's error E, by the Gram matrix x^T x where that is smaller."""
    power = _power([torch.nn.functional.linear(x, consumer.weight, consumer.bias)])
    if len(x) <= x.shape[1]:
        return lambda other: float(((other.weight - consumer.weight) @ x.T).square().sum()) / power
    gram = x.double().T @ x.double()

    def loss(other: Dense) -> float:
        error = (other.weight - consumer.weight).double()
        return float(((error @ gram) * error).sum()) / power

    return loss


def _power(outputs: list[torch.Tensor]) -> float:
    return max(sum(float(y.square().sum()) for y in outputs), torch.finfo(torch.float32).tiny)


@torch.inference_mode()
def _block_loss(
    config: ModelConfig, layer: PackedLayer, other: PackedLayer, index: int, grid: Grid, observed: Observed
) -> float:
    """The relative error of what block `index` adds to its input, once all linears of `other` are on the grid."""
    rounded = changed(other, **{name: getattr(other, name).rounded(grid) for name in LINEARS})
    ops = DenseOps()
    error = power = 0.0
    for sample in observed.samples:
        expected = block(config, ops, layer, index, sample.x, sample.context)
        found = block(config, ops, rounded, index, sample.x, sample.context)
        error += float((found - expected).square().sum())
        power += float((expected - sample.x).square().sum())
    return error / max(power, torch.finfo(torch.float32).tiny)
