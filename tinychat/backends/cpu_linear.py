"""One linear on the CPU kernels: packing a canonical weight, and y = x W^T, with the checks that C++ leaves to Python.

It serves tests, benchmarks and whoever wants one operation; a whole model goes through the lowered decoder, which uses
the same packed weights. It knows no threads and no models.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tinychat.backends import backend
from tinychat.backends.cpu import FOOTPRINT
from tinychat.errors import BackendError
from tinychat.qtensor import QTensor, Weight, bfloat16, canonical
from tinychat.weights import Linear

_ALIGNMENT = 64  # bytes: a cache line, and the widest register


def extension() -> ModuleType:
    """The compiled module; BackendError where it is missing or TINYCHAT_ISA names a level that does not run here."""
    backend("cpu")
    return importlib.import_module("tinychat._cpu")


def supported_isas() -> list[str]:
    """Instruction-set levels that run here, best first; "scalar" is always the last."""
    return extension().supported_isas().split()


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialized bytes, uint8 [nbytes], that begin at a cache line."""
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + nbytes]


@dataclass(frozen=True, eq=False)
class Segment:
    """One weight in the kernels' layout: `shape` is a `_cpu.LinearShape`, `data` 64-byte aligned bytes."""

    shape: Any
    data: np.ndarray
    dtype: np.dtype  # of the scales, or of the values where the weight is not quantized
    bits: int  # of the codes; 0 where the weight is not quantized
    permutation: np.ndarray | None = None  # see `QTensor`


def pack_weight(weight: Weight, isa: str, activation_bits: int = 16) -> Segment:
    """A QTensor or an fp32, fp16 or bf16 array [N, K] in the layout of level `isa`.

    Codes of 2, 3, 4 and 8 bits are kept in as many, others in the next of these. Activations meet them as integers of
    `activation_bits`, 16 or 8; other weights take them as they are.
    """
    cpu = extension()
    n, k = weight.shape
    if n < 1 or k < 1:
        raise ValueError(f"a weight of shape [{n}, {k}] has nothing to multiply")
    weight, permutation = canonical(weight), None
    if isinstance(weight, QTensor):
        kept = FOOTPRINT.kept(weight.bits)
        if max(weight.codes.max(), weight.zeros.max()) >= 2**kept:
            found = f"codes up to {weight.codes.max()}, zeros up to {weight.zeros.max()}"
            raise ValueError(f"{found}; {kept} bits hold {2**kept - 1}")
        wide = weight.scales.dtype != np.float16
        shape = cpu.LinearShape(cpu.WeightType.quantized, n, k, weight.group_size, wide, kept, activation_bits)
        values = np.ascontiguousarray(weight.codes)
        scales = np.ascontiguousarray(weight.scales, np.float32 if wide else np.float16)
        zeros = np.ascontiguousarray(weight.zeros)
        addresses = values.ctypes.data, scales.ctypes.data, zeros.ctypes.data
        dtype, bits, permutation = weight.scales.dtype, weight.bits, weight.permutation
    else:
        types = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", bfloat16: "bf16"}
        if weight.dtype not in types:
            raise TypeError(f"a weight is fp32, fp16, bf16 or a QTensor; found {weight.dtype}")
        shape = cpu.LinearShape(getattr(cpu.WeightType, types[weight.dtype]), n, k, k, False)
        values = np.ascontiguousarray(weight)
        addresses = values.ctypes.data, 0, 0
        dtype, bits = weight.dtype, 0
    data = aligned(cpu.packed_bytes(isa, shape))
    cpu.pack(isa, shape, *addresses, data.ctypes.data, 0, -(-n // cpu.tile(isa)))
    return Segment(shape, data, dtype, bits, permutation)


def unpack_weight(segment: Segment, isa: str) -> Weight:
    """The weight that `pack_weight` was given, bit by bit."""
    cpu = extension()
    shape, data = segment.shape, segment.data.ctypes.data
    if not segment.bits:
        values = np.empty((shape.n, shape.k), segment.dtype)
        cpu.unpack(isa, shape, data, values.ctypes.data, 0, 0)
        return values
    groups = (shape.n, -(-shape.k // shape.group))
    codes, zeros = np.empty((shape.n, shape.k), np.uint8), np.empty(groups, np.uint8)
    scales = np.empty(groups, np.float32 if shape.wide_scales else np.float16)
    cpu.unpack(isa, shape, data, codes.ctypes.data, scales.ctypes.data, zeros.ctypes.data)
    return QTensor(codes, scales.astype(segment.dtype), zeros, segment.bits, shape.group, segment.permutation)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A linear in the layout of one level; `shape` is (N, K) of all segments together."""

    isa: str
    segments: tuple[Segment, ...]
    bias: np.ndarray | None

    @classmethod
    def pack(cls, weight: Weight | Linear, isa: str | None = None, activation_bits: int = 16) -> PackedLinear:
        """Packs for level `isa`, or for the best that runs here (or the one that TINYCHAT_ISA names)."""
        if activation_bits not in (8, 16):
            raise ValueError(f"activations are integers of 8 or 16 bits, not {activation_bits}")
        isa = isa or extension().isa()
        if isa not in supported_isas():
            raise BackendError(f"instruction set {isa!r} does not run here; supported: {' '.join(supported_isas())}")
        linear = weight if isinstance(weight, Linear) else Linear((weight,))
        if len({segment.shape[1] for segment in linear.segments}) != 1:
            raise ValueError(f"segments of one linear share K; found {[segment.shape for segment in linear.segments]}")
        if linear.bias is not None and linear.bias.shape != linear.shape[:1]:
            raise ValueError(f"a bias for {linear.shape[0]} outputs is [{linear.shape[0]}]; found {linear.bias.shape}")
        bias = None if linear.bias is None else np.ascontiguousarray(linear.bias, np.float32)
        return cls(isa, tuple(pack_weight(segment, isa, activation_bits) for segment in linear.segments), bias)

    def unpack(self) -> Linear:
        """What was packed, exactly."""
        return Linear(tuple(unpack_weight(segment, self.isa) for segment in self.segments), self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the whole."""
        return sum(segment.shape.n for segment in self.segments), self.segments[0].shape.k

    @property
    def nbytes(self) -> int:
        """Resident bytes of the packed weights."""
        return sum(segment.data.nbytes for segment in self.segments)


def linear(packed: PackedLinear, x: np.ndarray) -> np.ndarray:
    """y = x W^T + b in one thread: x fp32 [T, K] -> fp32 [T, N]. ValueError for another shape or dtype."""
    cpu, isa = extension(), packed.isa
    n, k = packed.shape
    if x.ndim != 2 or x.shape[1] != k or x.dtype != np.float32:
        raise ValueError(f"activations are fp32 [T, {k}]; found {x.dtype} {list(x.shape)}")
    x = np.ascontiguousarray(x)
    y = np.empty((len(x), n), np.float32)
    begin = 0
    for segment in packed.segments:
        shape = segment.shape
        activations = aligned(cpu.activation_bytes(isa, shape) * len(x))
        inputs = x if segment.permutation is None else np.take(x, segment.permutation, axis=1)
        cpu.prepare(isa, shape, inputs.ctypes.data, activations.ctypes.data, len(x))
        tiles = -(-shape.n // cpu.tile(isa))
        target = y.ctypes.data + begin * y.itemsize
        cpu.linear(isa, shape, segment.data.ctypes.data, activations.ctypes.data, len(x), 0, tiles, target, n)
        begin += shape.n
    return y if packed.bias is None else y + packed.bias
