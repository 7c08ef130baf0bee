"""A quantized model on its way into a checkpoint: in which groups it fits the layout, and what its tensors are called.

The choice of a layout is made here and nowhere else. Tables are converted to fp16 in parts, so that none is held.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tinychat.checkpoint import Checkpoint, CheckpointWriter, heads, layouts, vectors
from tinychat.checkpoint.inventory import Segment, misfit, segments
from tinychat.checkpoint.layouts import Layout, WritableLayout
from tinychat.checkpoint.safetensors_file import DTYPES
from tinychat.checkpoint.writer import SHARD_BYTES
from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import QTensor, canonical
from tinychat.quantize.dense import half
from tinychat.quantize.report import Report, size
from tinychat.weights import QUANTIZED, Layer, Linear, linears

LEAST_GROUP = 32  # that a group size is lowered to, where it does not divide the inputs of a linear
_PART_BYTES = 1 << 24  # of a table converted at a time


class Output:
    """The checkpoint that a quantization of `source` writes.

    bits, group_size  asked for; `group_size` then is what the files get, which may be smaller
    permuted          whether weights may have a `permutation`
    layout            how they hold it
    act_scales        whether they hold an act_scale, ones where nothing is scaled
    notes             what is otherwise than asked for, and why

    UsageError where nothing in it could be quantized.
    """

    def __init__(self, source: Checkpoint, bits: int, group_size: int, symmetric: bool = False, permuted: bool = False):
        self.source = source
        writing = partial(layouts.for_writing, bits, symmetric=symmetric, act_order=permuted)
        self.layout, self.notes = _fitting(source, group_size, writing)
        self.group_size = self.layout.group_size
        self.act_scales = bool(source.names.act_scale) and self.layout.method == "awq"
        reasons = {_misfit(source, self.layout, linear) for linear in _linears(source)}
        if None not in reasons:
            why = "; ".join(sorted(filter(None, reasons)))
            raise UsageError(f"no linear of {source.path} can be quantized: {why}. Choose another --group-size")

    def plan(self, index: int, linear: str, i: int, shape: tuple[int, int]) -> tuple[str, str | None]:
        """The name of segment `i` of a canonical linear of layer `index`, and why it stays in 16 bits, if it does."""
        segment = segments(self.source.config, self.source.names, linear, index)[i]
        return segment.module, _misfit(self.source, self.layout, segment)

    def predicted_bytes(self) -> int:
        """Of the weight files."""
        source, layout = self.source, self.layout
        saved = sum(2 * math.prod(linear.shape) - _bytes(source, layout, linear) for linear in _linears(source))
        return 2 * source.n_parameters - saved

    def require_room(self, where: Path, kept_bytes: int) -> None:
        """CheckpointError unless the disk of `where` holds the checkpoint, a shard and twice what commits keep."""
        whole = self.predicted_bytes()
        needed, free = int(1.05 * (whole + min(whole, SHARD_BYTES) + 2 * kept_bytes)), shutil.disk_usage(where).free
        if needed > free:
            raise CheckpointError(
                f"{where} has {size(free)} free; writing this checkpoint takes up to {size(needed)}: free some space, "
                f"or write to another disk"
            )

    def add_embedding(self, writer: CheckpointWriter) -> None:
        """Write what comes before the layers."""
        name = self.source.names.embed
        self._add_table(writer, f"{name}.weight", self.source.embed())

    def add_layer(self, writer: CheckpointWriter, index: int, layer: Layer) -> None:
        """Write block `index`."""
        names = self.source.names
        for tensor, values in vectors.of_layer(layer, self.source.config, names, index):
            writer.add(tensor, self._stored(tensor, values))
        act_scale = layer.act_scale
        if act_scale is None and self.act_scales:  # engines that look for one in such a family do so in every layer
            act_scale = np.ones(self.source.config.intermediate_size, np.float32)
        if act_scale is not None:
            writer.add(names.vector("act_scale", index), half(act_scale, "act_scale"))
        for name in linears(self.source.config, index):
            linear: Linear = getattr(layer, name)
            if name == "qkv" and names.heads_interleaved:
                linear = heads.together(linear, self.source.config)
            first = 0
            for part, segment in zip(segments(self.source.config, names, name, index), linear.segments, strict=True):
                module, segment = part.module, canonical(segment)
                if isinstance(segment, QTensor):
                    for ending, array in self.layout.pack(segment).items():
                        writer.add(f"{module}.{ending}", array)
                else:
                    writer.add(f"{module}.weight", segment)
                if linear.bias is not None:
                    writer.add(f"{module}.bias", half(linear.bias[first : first + segment.shape[0]], module))
                first += segment.shape[0]

    def add_end(self, writer: CheckpointWriter) -> None:
        """Write what comes after the layers."""
        source, names = self.source, self.source.names
        for tensor, values in vectors.of_ends(source, names):
            writer.add(tensor, self._stored(tensor, values))
        if head := source.head():
            self._add_table(writer, f"{names.head}.weight", plain_head(head))
            if head.bias is not None:
                writer.add(f"{names.head}.bias", half(head.bias, names.head))

    def finish(self, writer: CheckpointWriter, report: Report) -> Path:
        """Make the checkpoint visible; its directory."""
        config = {**self.source.hf_config, "torch_dtype": "float16"}
        if "dtype" in config:
            config["dtype"] = "float16"
        reasons = [(linear.module, _misfit(self.source, self.layout, linear)) for linear in _linears(self.source)]
        left = {module for module, reason in reasons if reason}
        others = dict.fromkeys(module for module, reason in reasons if not reason)
        return writer.finish(config, self.layout.excluding(report.kept, () if left & others.keys() else others))

    def _stored(self, name: str, values: np.ndarray) -> np.ndarray:
        """In fp16; but of norms counted from 1, which fp16 would round once more, in fp32."""
        return values if self.source.names.norm_offset else half(values, name)

    def _add_table(self, writer: CheckpointWriter, name: str, table: np.ndarray) -> None:
        """A large tensor in fp16, part by part; its mapped pages are given back on the way."""
        rows = max(1, _PART_BYTES // table[:1].nbytes)

        def parts() -> Iterator[np.ndarray]:
            for first in range(0, len(table), rows):
                yield half(table[first : first + rows], name)
                self.source.release()

        writer.add_parts(name, np.dtype(np.float16), table.shape, parts())


def plain_head(head: Linear) -> np.ndarray:
    """The weight of an output head. UsageError where it is quantized."""
    (segment,) = head.segments
    if not isinstance(segment, np.ndarray):
        raise UsageError("the output head is quantized already; quantize the original checkpoint instead")
    return segment


def _linears(source: Checkpoint) -> list[Segment]:
    """All linears of all layers, routers apart, by their modules within a layer."""
    config, names = source.config, source.names
    found = []
    for index in range(config.n_layers):
        at = names.layer.format(index)
        quantized = [linear for linear in linears(config, index) if linear in QUANTIZED]
        parts = [part for linear in quantized for part in segments(config, names, linear, index)]
        found += [Segment(part.module.removeprefix(at), part.shape) for part in parts]
    return found


def _misfit(source: Checkpoint, layout: Layout, linear: Segment) -> str | None:
    return misfit(source.config, source.names, layout, linear)


def _bytes(source: Checkpoint, layout: WritableLayout, linear: Segment) -> int:
    """Of a linear in the file: quantized where it fits, else in 16 bits."""
    if _misfit(source, layout, linear):
        return 2 * math.prod(linear.shape)
    parts = layout.parts(linear.shape).values()
    return sum(math.prod(part.shape) * DTYPES[part.dtypes[0]].itemsize for part in parts if not part.optional)


def _fitting(
    source: Checkpoint, group_size: int, writing: Callable[[int], WritableLayout]
) -> tuple[WritableLayout, list[str]]:
    """The group size that makes the smallest checkpoint, in its layout; what is otherwise than asked for, and why.

    A layout has one group size for all: where it does not divide the inputs of a linear, that linear stays in 16
    bits, or all get smaller groups, a power of two that does; or, where the layout has such, its last group is shorter.
    """
    found = _linears(source)
    smaller = [1 << i for i in range(30) if LEAST_GROUP <= 1 << i < group_size]
    candidates = [writing(size) for size in (group_size, *reversed(smaller))]  # the largest of equals
    totals = [sum(_bytes(source, candidate, linear) for linear in found) for candidate in candidates]
    chosen = candidates[totals.index(min(totals))]
    if chosen.group_size == group_size:
        fitting = [linear for linear in found if group_size > 0 and not _misfit(source, chosen, linear)]
        odd = {linear.module: linear.shape[1] for linear in fitting if linear.shape[1] % group_size}
        return chosen, [
            f"of {module} the last group has {inputs % group_size} inputs: {group_size} does not divide its {inputs}"
            for module, inputs in odd.items()
        ]
    module, reason = next((one.module, why) for one in found if (why := candidates[0].misfit(one.shape)))
    return chosen, [
        f"groups of {chosen.group_size}, not {group_size}: of {module}, {reason}, and in 16 bits it would outweigh "
        f"the smaller groups"
    ]
