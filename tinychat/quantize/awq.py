"""Activation-aware weight quantization: per-channel scales, and clipping (arXiv 2306.00978, sections 3.2 and 5.1).

For each scaling group: s = s_x ** alpha (equation 5) with s_x = mean|x|, alpha among i / 20 for i = 0 .. 20: the s is
kept whose rounding, Q(W diag(s)) diag(s)^-1, disturbs the output of the block around the group least (equation 4).
Every fourth alpha is tried, 0 and 1 among them, and then the neighbours of the best: the loss falls and rises once, or
nearly so (where all 21 were tried, this was within 2 % of the least, and mostly the least). alpha = 0 is the identity,
plain rounding to nearest. Then the scaled weights are clipped: see `clip`.

Scales and limits are found on `Observed.samples` and kept only where they disturb the output of the block around the
group less on `Observed.held_out` too, so that no group ends up worse than rounding to nearest by either measure. (One
sequence, or an expert that no held-out token went to, leaves the first alone.) A group that plain rounding to 8 bits
disturbs by less than `NEGLIGIBLE` is left at that, and what its scales would be folded into is as it came. (With fewer
bits a mean so small can hide that all tokens but a few of massive outputs lose much.)
Statistics are of all tokens; an expert's are of the tokens that went to it, and one that few sampled tokens went to
keeps plain rounding. Everything is fp32.

Where the sampled tokens are followed through the quantized model (`Sample.drifted`), a group reads what everything
before it, rounded, makes of them, and what it adds to the stream is held against the unquantized model's: its loss
counts what was lost before, and the search makes up for a part of that. (Not of what experts read: other tokens may go
to them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from tinychat import memory
from tinychat.config import Block, ModelConfig
from tinychat.decoder import Context, PackedLayer, block, mlp, self_attention
from tinychat.errors import CheckpointError
from tinychat.quantize import clip, threads
from tinychat.quantize.activations import Observed, Sample, starved
from tinychat.quantize.dense import SLICE, Dense, DenseOps, changed, part
from tinychat.quantize.grid import Grid
from tinychat.quantize.groups import Group, scaling_groups
from tinychat.quantize.report import BLOCK, GroupResult
from tinychat.weights import LINEARS

NEEDS_CALIBRATION = True
STEPS = 20
MANY = 2**20  # numbers in the samples of which half choose alpha; all of them choose limits, and what is kept
TOKENS, BETWEEN = 512, 2**25  # that a trial's MLP takes at once: multiples, of so many numbers between up and down
NEGLIGIBLE = 3e-4  # what rounding to 8 bits may add to a loss and is left at that: less than 8-bit activations do
LARGEST = 2.0**10  # no channel is scaled by more, or by less than its inverse: fp16 must hold the folded weights

Consumers = dict[str, Dense]  # of a group, by canonical name
Inputs = tuple[torch.Tensor, torch.Tensor | None]  # of one of them, as `clip` wants them: X and apart
Loss = Callable[[Consumers], float]  # of the linears in place of those of a group


@dataclass(frozen=True, eq=False)
class Reading:
    """What a group's consumers read in a sample.

    exact  by canonical name, fp32 [T, K]: in the unquantized model
    given  likewise, where all before them is quantized; `exact` itself where that is not followed
    added  [T, hidden_size]: what the linears' part of the block adds to the stream in the unquantized model; None where
           that cannot be told from the stream
    off    likewise: how far the stream that it is added to then is from what it was; None: 0
    """

    context: Context
    exact: dict[str, torch.Tensor]
    given: dict[str, torch.Tensor]
    added: torch.Tensor | None = None
    off: torch.Tensor | None = None


class _Reached(Exception):
    """Ends a forward pass at what a linear reads."""


@torch.inference_mode()
def transform(
    config: ModelConfig,
    layer: PackedLayer,
    index: int,
    observed: Observed,
    grid: Grid,
    act_scales: bool = True,
    clips: bool = True,
) -> tuple[PackedLayer, list[GroupResult]]:
    """`layer` with the best scales of each group folded in, and limits: the same function, easier to round.

    act_scales: see `scaling_groups`; clips: whether limits are searched. The inputs in `observed` are gone when their
    group is done.
    """
    results = []
    folded = layer
    for group in scaling_groups(config, config.experts_of(index), act_scales):
        memory.give_back()
        seen, others = (
            [
                _reading(config, folded, index, group, sample, grid)
                for sample in some
                if group.consumers[0] in sample.inputs
            ]
            for some in (observed.samples, observed.held_out)
        )
        for sample in (*observed.samples, *observed.held_out):
            for name in group.consumers:  # of this group alone
                sample.inputs.pop(name, None)
        wanted = (group.producer or clips) and any(part(layer, name).quantized for name in group.consumers)
        if wanted and not starved(group.consumers[0], [one.exact for one in seen]):
            folded, result = _search(config, layer, folded, index, group, observed, grid, seen, others, clips)
            results.append(result)

    def through(layer: PackedLayer, sample: Sample) -> torch.Tensor:
        return block(config, DenseOps(grid=grid), layer, index, sample.drifted, sample.context)

    # One sample tells how much of a block's error is left, without running all of them through what they came as.
    judged = (observed.held_out or observed.samples)[0] if results else None
    before = _error_added(judged, through(layer, judged)) if judged else 0.0
    for sample in (*observed.samples, *observed.held_out):
        followed = sample.drifted is not sample.x
        if followed or sample is judged:
            found = through(folded, sample)
            if sample is judged:
                results.append(GroupResult(index, BLOCK, None, before, _error_added(sample, found)))
            if followed:
                sample.drifted.copy_(found)
    return folded, results


def _error_added(sample: Sample, found: torch.Tensor) -> float:
    """The relative error of what a block adds to its input, where its output was `found`."""
    power = float((sample.y - sample.x).square().sum())
    return float((found - sample.y).square().sum()) / max(power, torch.finfo(torch.float32).tiny)


def _reading(config: ModelConfig, folded: PackedLayer, index: int, group: Group, sample: Sample, grid: Grid) -> Reading:
    """Of a group in one sample, by what was found for the groups before it."""
    exact = {name: sample.inputs[name] for name in group.consumers if name in sample.inputs}
    added = None
    if config.block is Block.SEQUENTIAL:
        of_attention, of_mlp = exact.keys() <= {"qkv", "out"}, exact.keys() & {"up", "router", "down"}
        if of_attention or of_mlp:  # not of one expert
            after, before = (sample.middle[0], sample.x) if of_attention else (sample.y, sample.middle[0])
            added = (after - before) / config.residual_scale
    if sample.drifted is sample.x or not exact.keys() <= set(LINEARS):
        return Reading(sample.context, exact, exact, added)

    def watch(linear: Dense, x: torch.Tensor) -> None:
        if linear.name in exact:
            raise _Reached(x)

    ops = DenseOps(watch, grid)
    try:
        block(config, ops, folded, index, sample.drifted, sample.context)
    except _Reached as reached:
        given = dict.fromkeys(exact, reached.args[0])  # all read the same
    off = None
    if config.block is Block.SEQUENTIAL:  # else more is added, or not as it is
        before = sample.x if exact.keys() <= {"qkv", "out"} else sample.middle[0]
        off = (ops.stream - before) / config.residual_scale
    return Reading(sample.context, exact, given, added, off)


def _search(
    config: ModelConfig,
    layer: PackedLayer,
    folded: PackedLayer,
    index: int,
    group: Group,
    observed: Observed,
    grid: Grid,
    seen: list[Reading],
    others: list[Reading],
    clips: bool,
) -> tuple[PackedLayer, GroupResult]:
    """`folded` with what is best for one group of `layer`, by what its consumers read: `seen` and `others`, emptied."""
    consumers: Consumers = {name: part(layer, name) for name in group.consumers}
    many = len(seen) > 1 and config.hidden_size * sum(len(one.context.positions) for one in seen) > MANY
    loss = _loss(config, layer, index, group, seen)
    coarse = _loss(config, layer, index, group, seen[::2]) if many else loss
    judged = _loss(config, layer, index, group, others) if others else loss
    rtn, allowed = _each(_rounded(grid, consumers), loss, judged, math.inf)
    unscaled = 0.0 if group.producer else None  # alpha
    if grid.bits >= 8:
        before = _each(consumers, loss, judged, math.inf)
        if rtn - before[0] < NEGLIGIBLE and allowed - before[1] < NEGLIGIBLE:
            return folded, GroupResult(index, group.name, unscaled, rtn, rtn)

    magnitude = group.pooled(observed.magnitude[group.consumers[0]])  # all read the same
    some: dict[str, Inputs] = {}
    inputs: dict[str, Inputs] = {}
    for name in consumers:
        if clips and not starved(name, [one.exact for one in seen]):
            some[name], inputs[name] = (_few(consumers[name], seen, n) for n in (clip.GLANCED, clip.SEARCHED))
    seen.clear()  # what is wanted of them is in the losses
    others.clear()

    def scaled(step: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scales of a step, of the producer's channels and of the consumers'."""
        if not step:
            return None, None
        scales = group.settled(layer, candidate(magnitude, step / STEPS))
        return scales, group.spread(scales)

    def at(step: int) -> float:
        memory.give_back()
        columns = scaled(step)[1]
        try:
            return coarse(_rounded(grid, consumers, columns, _limits(clip.glance, grid, consumers, columns, some)))
        except CheckpointError:  # fp16 does not hold the scales of scaled weights: those of plain rounding it did
            return math.inf

    best, alpha, scales, limits = rtn, unscaled, None, None
    first = _least(at) if group.producer else 0
    for step in dict.fromkeys((first, 0)):  # clipping alone where scales do not hold what they promised
        tried, columns = scaled(step)
        with suppress(CheckpointError):  # likewise
            limited = [_limits(clip.search, grid, consumers, columns, inputs)] if clips else []
            for limits_tried in (*limited, None):
                found, there = _each(_rounded(grid, consumers, columns, limits_tried), loss, judged, best)
                if found < best and there < allowed:  # false for NaN
                    best, allowed, scales, limits = found, there, tried, limits_tried
                    alpha = step / STEPS if step else unscaled
                    break
        if best < rtn:
            break
    if scales is not None:
        folded = group.fold(folded, scales)
    if limits is not None:
        folded = changed(folded, **{name: replace(part(folded, name), limits=limits[name]) for name in limits})
    return folded, GroupResult(index, group.name, alpha, rtn, best, limits is not None)


def _least(loss: Callable[[int], float]) -> int:
    """The step of least loss: among every fourth of them, then beside the best at a half and a quarter of that."""
    found: dict[int, float] = {}
    steps: Iterable[int] = range(0, STEPS + 1, 4)
    for nearer in (2, 1, 0):
        found.update({step: loss(step) for step in steps if 0 <= step <= STEPS})
        best = min(found, key=lambda step: found[step] if math.isfinite(found[step]) else math.inf)
        steps = (best - nearer, best + nearer)
    return best


def candidate(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = magnitude ** alpha, centred so that max(s) * min(s) is 1; 1 for channels that are always zero."""
    alive = magnitude > 0
    if not alive.any():
        return torch.ones_like(magnitude)
    log = alpha * torch.where(alive, magnitude, 1.0).log()
    log = log - (log[alive].max() + log[alive].min()) / 2
    return torch.where(alive, log, 0.0).exp().clamp(1 / LARGEST, LARGEST)


def _scaled(linear: Dense, columns: torch.Tensor | None) -> Dense:
    return linear if columns is None else linear.scaled(columns)


def _each(consumers: Consumers, loss: Loss, judged: Loss, best: float) -> tuple[float, float]:
    """What both say of `consumers`, which the caller need not keep; the second only of what is better than `best`."""
    found = loss(consumers)
    return found, judged(consumers) if found < best else math.inf


def _rounded(
    grid: Grid,
    consumers: Consumers,
    columns: torch.Tensor | None = None,
    limits: dict[str, torch.Tensor] | None = None,
) -> Consumers:
    """What reads the inputs as they are: round(W * columns) / columns of each, within limits."""
    made = {}
    for name, linear in consumers.items():
        scaled = _scaled(linear, columns)
        made[name] = replace(scaled, limits=limits.get(name) if limits else None).rounded(grid, columns)
    return made


def _limits(
    search: Callable[..., torch.Tensor],
    grid: Grid,
    consumers: Consumers,
    columns: torch.Tensor | None,
    inputs: dict[str, Inputs],
) -> dict[str, torch.Tensor]:
    """Of the scaled consumers, by one of the searches of `clip`; not of routers, nor of starved experts."""
    found = {}
    for name, (x, apart) in inputs.items():
        if consumers[name].quantized:
            scaled = _scaled(consumers[name], columns)
            given = clip.split(grid, x if columns is None else x / columns)
            piece = clip.PIECE if scaled.stored.is_cpu else clip.GPU_PIECE
            n = max(1, piece // scaled.shape[1])
            pieces = [slice(first, first + n) for first in range(0, len(scaled.stored), n)]
            found[name] = torch.cat(threads.each(partial(_limits_of, search, grid, scaled, given, apart), pieces))
    return found


def _limits_of(
    search: Callable[..., torch.Tensor],
    grid: Grid,
    linear: Dense,
    given: clip.Split,
    apart: torch.Tensor | None,
    rows: slice,
) -> torch.Tensor:
    return search(grid, linear.of_rows(rows), given, None if apart is None else apart[:, rows], linear.modules[0])


def _few(linear: Dense, readings: list[Reading], numbers: int) -> Inputs:
    """Of what a linear reads in all of them as many rows as have so many numbers, for `clip`."""
    some = [one for one in readings if linear.name in one.exact]
    rows = slice(None, None, max(1, sum(one.exact[linear.name].numel() for one in some) // numbers))
    x, apart = [], []
    for one in some:
        exact, given = one.exact[linear.name][rows], one.given[linear.name][rows]
        x.append(given)
        if one.given is not one.exact:
            apart.append(DenseOps().linear(given - exact, replace(linear, bias=None)))
        if one.off is not None and linear.name in ("out", "down"):
            apart[-1] += one.off[rows]
    return clip.condensed(torch.cat(x), torch.cat(apart) if apart else None)


def _loss(config: ModelConfig, layer: PackedLayer, index: int, group: Group, readings: list[Reading]) -> Loss:
    """How far what attention, MLP or both add to the stream is off when the group's consumers are replaced."""
    if group.ends_block:
        (name,) = group.consumers
        quadratic = _quadratic_loss(part(layer, name), readings)
        return lambda consumers: quadratic(consumers[name])
    ops = DenseOps()
    n_tokens = TOKENS * max(1, BETWEEN // (TOKENS * config.up_size))

    contexts, given = [one.context for one in readings], [one.given for one in readings]

    def run(consumers: Consumers, read: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        replaced = changed(layer, **consumers)
        outputs = []
        for inputs, context in zip(read, contexts, strict=True):
            parts = []
            if "qkv" in consumers:
                parts.append(self_attention(config, ops, replaced, index, inputs["qkv"], context))
            for name in {"up", "router"} & consumers.keys():  # one of them
                x = inputs[name]
                few = x.split(n_tokens) if layer.router is None else [x]  # experts share the tokens out among them
                parts.append(torch.cat([mlp(config, ops, replaced, x) for x in few]))
            outputs.append(sum(parts[1:], start=parts[0]))
        return outputs

    expected = [one.added for one in readings if one.added is not None]
    if not expected:
        expected = run({name: part(layer, name) for name in group.consumers}, [one.exact for one in readings])
    power = _power(expected)
    expected = [y if one.off is None else y - one.off for y, one in zip(expected, readings, strict=True)]
    return lambda consumers: _squares(run(consumers, given), expected) / power


def _quadratic_loss(consumer: Dense, readings: list[Reading]) -> Callable[[Dense], float]:
    """The same where it is y = x W^T: |x E^T + apart|^2 of the weight's error E and of how far y is off without it.

    By the Gram matrix x^T x where that is smaller.
    """
    ops = DenseOps()
    given = [one.given[consumer.name] for one in readings]
    expected = [ops.linear(one.exact[consumer.name], consumer) if one.added is None else one.added for one in readings]
    power = _power(expected)
    expected = [y if one.off is None else y - one.off for y, one in zip(expected, readings, strict=True)]

    def direct(other: Dense) -> float:
        return _squares(expected, [ops.linear(x, other) for x in given]) / power

    if sum(map(len, given)) <= consumer.shape[1]:
        return direct
    gram = torch.zeros(consumer.shape[1], consumer.shape[1], dtype=torch.float64)
    pull = torch.zeros(consumer.shape, dtype=torch.float64)
    rest = 0.0
    for x, y in zip(given, expected, strict=True):
        apart = (ops.linear(x, consumer) - y).double()
        gram.addmm_(x.double().T, x.double())
        pull.addmm_(apart.T, x.double())
        rest += float(apart.square().sum())

    def loss(other: Dense) -> float:
        error = _error(other, consumer).double()
        return (float((error @ gram).add_(pull, alpha=2).mul_(error).sum()) + rest) / power

    return loss


def _error(made: Dense, exact: Dense) -> torch.Tensor:
    """The difference of two weights, fp32 [N, K], of which neither need be in fp32 at once."""
    error = torch.empty(exact.shape)
    for (rows, one), (_, other) in zip(made.slices(SLICE), exact.slices(SLICE), strict=True):
        torch.sub(one.weight, other.weight, out=error[rows])
    return error


def _squares(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True))


def _power(outputs: list[torch.Tensor]) -> float:
    return max(sum(float(y.square().sum()) for y in outputs), torch.finfo(torch.float32).tiny)
