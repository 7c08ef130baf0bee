"""Scaling groups: where AWQ's per-channel scales go in, and where their inverse is folded so that nothing changes.

A group has a producer, whose outputs are divided by s, and consumers, whose inputs are multiplied by it; in exact
arithmetic the block computes what it did before. Linears that nothing can be folded for are groups without a producer.
Groups follow from `ModelConfig`, so that every architecture has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinychat.config import Activation, Block, Experts, ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.quantize.dense import Dense, changed, part


@dataclass(frozen=True)
class Group:
    """One scale per channel between a producer and its consumer.

    producer   a norm (its weight and bias are divided), a linear: its last rows, and their bias (v; up), or
               "act_scale": a vector that what `down` reads is divided by, where nothing before it can be; "" where
               there is nothing at all, and consumers are clipped alone
    consumers  the linears whose columns are multiplied: two where attention and MLP read one norm; of experts the
               router and all of them, as they read one norm, which is how the router takes the inverse
    repeat     consumer channels that read one producer channel: query heads per key-value head
    head_dim   channels that are repeated as a whole; 0 where repeat is 1
    """

    producer: str
    consumers: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 0

    @property
    def name(self) -> str:
        """For reports."""
        producer, *consumers = (name.partition(".")[0] for name in (self.producer, *self.consumers))  # of all experts
        reading = ", ".join(dict.fromkeys(consumers))
        return f"{ {'qkv': 'v'}.get(producer, producer) } -> {reading}" if producer else reading

    @property
    def ends_block(self) -> bool:
        """Whether the block's output is the consumer's: the loss then is quadratic in the weight's error."""
        return self.consumers[0].partition(".")[0] in ("out", "down", "shared_down")

    def pooled(self, statistic: torch.Tensor) -> torch.Tensor:
        """A statistic of the consumer's channels [K], averaged over those that share a producer channel: [C]."""
        if self.repeat == 1:
            return statistic
        return statistic.view(-1, self.repeat, self.head_dim).mean(1).flatten()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """The producer's scales [C] for each channel of the consumer: [K]."""
        if self.repeat == 1:
            return scales
        return scales.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).flatten()

    def settled(self, layer: PackedLayer, scales: torch.Tensor) -> torch.Tensor:
        """The scales nearest to `scales` [C] whose folding loses nothing in the fp16 of the file.

        A norm's weight g becomes fp16(g / s), so s is g / fp16(g / s); likewise an act_scale; rows of a linear are
        rounded with their own scales, which follow. 1 where a channel is always zero.
        """
        if self.producer == "act_scale":
            before = 1.0 if layer.act_scale is None else layer.act_scale
            return (before * scales).to(torch.float16).float() / before
        norm = part(layer, self.producer)
        if isinstance(norm, Dense):
            return scales
        folded = (norm / scales).to(torch.float16).float()
        usable = (folded.abs() >= 2.0**-14) & torch.isfinite(folded)
        return torch.where(usable, norm / torch.where(usable, folded, 1.0), 1.0)

    def fold(self, layer: PackedLayer, scales: torch.Tensor) -> PackedLayer:
        """`layer` with the producer divided by `scales` [C] and the consumer multiplied."""
        producer = part(layer, self.producer)
        made: torch.Tensor | Dense
        if self.producer == "act_scale":
            made = scales if producer is None else producer * scales
        elif isinstance(producer, Dense):
            made = producer.divided(scales)
        else:
            made = producer / scales
            bias = getattr(layer, f"{self.producer}_bias")
            if bias is not None:
                layer = changed(layer, **{f"{self.producer}_bias": bias / scales})
        layer = changed(layer, **{self.producer: made})
        columns = self.spread(scales)
        return changed(layer, **{name: part(layer, name).scaled(columns) for name in self.consumers})


def scaling_groups(config: ModelConfig, experts: Experts | None = None, act_scales: bool = True) -> tuple[Group, ...]:
    """The groups of one block, in the order of the forward pass; of one with experts, these are `experts`.

    act_scales: what is written can hold an act_scale.
    """
    repeat = config.n_heads // config.n_kv_heads
    # What else reads a norm must be scaled with it: the residual stream of the other blocks, or nothing at all.
    folds = config.norm_weight and config.block not in (Block.NORM_AFTER, Block.POST_NORM)
    each = range(experts.n_experts) if experts else ()
    shared = bool(experts and experts.shared_size)
    reading = ("router", *(["shared_up"] if shared else []), *(f"up.{i}" for i in each)) if experts else ("up",)
    norm1, norm2 = ("norm1", "norm2") if folds else ("", "")
    # down(act(gate) * up) is linear in up, and relu(x / s) is relu(x) / s; what passes through another non-linearity
    # could not be scaled exactly.
    linear = not passes_activation(config)

    groups = [Group(norm1, ("qkv", *reading) if config.block is Block.PARALLEL_ONE_NORM else ("qkv",))]
    # Clipping the values knows no scales.
    groups += [Group("qkv", ("out",), repeat, config.head_dim) if config.clip_qkv is None else Group("", ("out",))]
    if config.block is not Block.PARALLEL_ONE_NORM:
        groups.append(Group(norm2, reading))
    if experts is None:
        groups.append(Group("up" if linear else "act_scale" if act_scales else "", ("down",)))
    else:
        groups += [Group("shared_up" if linear else "", ("shared_down",))] if shared else []
        groups += [Group(f"up.{i}" if linear else "", (f"down.{i}",)) for i in each]
    return tuple(groups)


def passes_activation(config: ModelConfig) -> bool:
    """Whether what an MLP's `down` reads has passed a non-linearity that knows no scales: the group act_scale."""
    return not config.gated and config.activation is not Activation.RELU
