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

from tinychat.architectures.names import TensorNames
from tinychat.checkpoint import Checkpoint, CheckpointWriter, heads, layouts, vectors
from tinychat.checkpoint.inventory import segments
from tinychat.checkpoint.layouts import WritableLayout
from tinychat.checkpoint.safetensors_file import DTYPES
from tinychat.checkpoint.writer import SHARD_BYTES
from tinychat.config import ModelConfig
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
    act_scales        whether they hold an act_scale where AWQ wants one
    notes             what is otherwise than asked for, and why

    UsageError where nothing in it could be quantized.
    """

    def __init__(self, source: Checkpoint, bits: int, group_size: int, symmetric: bool = False, permuted: bool = False):
        self.source = source
        writing = partial(layouts.for_writing, bits, symmetric=symmetric, act_order=permuted)
        modules = _linears(source.config, source.names)
        self.layout, self.notes = _fitting(modules, group_size, writing)
        self.group_size = self.layout.group_size
        self.act_scales = bool(source.names.act_scale) and self.layout.method == "awq"
        reasons = {self.layout.misfit(shape) for _, shape in modules}
        if None not in reasons:
            why = "; ".join(sorted(filter(None, reasons)))
            raise UsageError(f"no linear of {source.path} can be quantized: {why}. Choose another --group-size")

    def plan(self, index: int, linear: str, i: int, shape: tuple[int, int]) -> tuple[str, str | None]:
        """The name of segment `i` of a canonical linear of layer `index`, and why it stays in 16 bits, if it does."""
        return segments(self.source.config, self.source.names, linear, index)[i].module, self.layout.misfit(shape)

    def predicted_bytes(self) -> int:
        """Of the weight files."""
        linears = _linears(self.source.config, self.source.names)
        saved = sum(2 * n * k - _bytes(self.layout, (n, k)) for _, (n, k) in linears)
        return 2 * self.source.n_parameters - saved

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
        if layer.act_scale is not None:
            writer.add(names.vector("act_scale", index), half(layer.act_scale, "act_scale"))
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
        return writer.finish(config, self.layout.excluding(report.kept))

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


def _linears(config: ModelConfig, names: TensorNames) -> list[tuple[str, tuple[int, int]]]:
    """(module within its layer, (N, K)) of all linears of all layers, routers apart."""
    found = []
    for index in range(config.n_layers):
        at = names.layer.format(index)
        quantized = [linear for linear in linears(config, index) if linear in QUANTIZED]
        parts = [part for linear in quantized for part in segments(config, names, linear, index)]
        found += [(part.module.removeprefix(at), part.shape) for part in parts]
    return found


def _bytes(layout: WritableLayout, shape: tuple[int, int]) -> int:
    """Of a linear in the file: quantized where it fits, else in 16 bits."""
    if layout.misfit(shape):
        return 2 * math.prod(shape)
    parts = layout.parts(shape).values()
    return sum(math.prod(part.shape) * DTYPES[part.dtypes[0]].itemsize for part in parts if not part.optional)


def _fitting(
    linears: list[tuple[str, tuple[int, int]]], group_size: int, writing: Callable[[int], WritableLayout]
) -> tuple[WritableLayout, list[str]]:
    """The group size that makes the smallest checkpoint, in its layout; what is otherwise than asked for, and why.

    A layout has one group size for all: where it does not divide the inputs of a linear, that linear stays in 16
    bits, or all get smaller groups, a power of two that does; or, where the layout has such, its last group is shorter.
    """
    smaller = [1 << i for i in range(30) if LEAST_GROUP <= 1 << i < group_size]
    candidates = [writing(size) for size in (group_size, *reversed(smaller))]  # the largest of equals
    totals = [sum(_bytes(candidate, shape) for _, shape in linears) for candidate in candidates]
    chosen = candidates[totals.index(min(totals))]
    if chosen.group_size == group_size:
        odd = {m: k for m, (n, k) in linears if group_size > 0 and not chosen.misfit((n, k)) and k % group_size}
        return chosen, [
            f"of {module} the last group has {inputs % group_size} inputs: {group_size} does not divide its {inputs}"
            for module, inputs in odd.items()
        ]
    module, reason = next((m, why) for m, shape in linears if (why := candidates[0].misfit(shape)))
    return chosen, [
        f"groups of {chosen.group_size}, not {group_size}: of {module}, {reason}, and in 16 bits it would outweigh "
        f"the smaller groups"
    ]
