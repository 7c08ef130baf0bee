"""The compiled module's arithmetic without a model, for the quantizer: products, rounding, and the search of limits.

PyTorch has the same and computes it where the kernels are missing. Of products they are the faster on a CPU of AVX2
alone, where the kernel of unquantized weights multiplies at 0.83 of what the instructions allow and PyTorch at 0.65 to
0.75 (benchmarks/results/quantize_memory.md); of other levels PyTorch is taken for as good.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from tinychat.backends import cpu
from tinychat.backends.cpu_linear import aligned

LEVELS = ("avx2", "avxvnni")  # whose products are the faster
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
WIDEST = 512  # numbers of a group whose limits are searched here: half of its Gram matrix stays in the second cache

Tensor = torch.Tensor


def engine() -> ModuleType | None:
    """The compiled module, where it is; BackendError where TINYCHAT_ISA names a level that does not run here."""
    return None if cpu.available() else importlib.import_module("tinychat._cpu")


def multiplier(x: Tensor) -> ModuleType | None:
    """The compiled module, where `Product` of x is the faster."""
    found = engine() if x.is_cpu else None
    return found if found and found.isa() in LEVELS else None


def clipper(weight: Tensor, width: int = 0) -> ModuleType | None:
    """The compiled module, where it has `rounded` of a weight, or `clipped` of groups of `width`."""
    found = engine() if weight.is_cpu and width <= WIDEST else None
    return found if found and found.clips() else None


class Product:
    """Products with x, fp32 [T, K] on the CPU; each of them computed by the thread that asks for it.

    An output is the same however the rows of a weight are cut.
    """

    def __init__(self, cpu: ModuleType, x: Tensor):
        self._cpu, self._isa = cpu, cpu.isa()
        self._rows, self._k = x.shape
        self._x = x = x.contiguous()
        shape = cpu.LinearShape(cpu.WeightType.f32, 1, self._k)
        row_bytes = cpu.activation_bytes(self._isa, shape)
        if row_bytes != 4 * self._k:  # the kernel wants rows so far apart
            self._x = torch.from_numpy(aligned(row_bytes * self._rows))
            cpu.prepare(self._isa, shape, x.data_ptr(), self._x.data_ptr(), self._rows)

    def into(self, y: Tensor, weight: Tensor) -> None:
        """y = x W^T for W fp32, fp16 or bf16 [N, K]; y [T, N] may be columns of a wider one."""
        weight, n = weight.contiguous(), len(weight)
        if weight.shape != (n, self._k) or y.shape != (self._rows, n) or y.dtype != torch.float32 or y.stride(1) != 1:
            raise ValueError(f"{list(y.shape)} = [{self._rows}, {self._k}] times {list(weight.shape)} transposed")
        shape = self._cpu.LinearShape(getattr(self._cpu.WeightType, TYPES[weight.dtype]), n, self._k)
        tiles = -(-n // self._cpu.tile(self._isa))
        packed = _buffer(self._cpu.packed_bytes(self._isa, shape))
        self._cpu.pack(self._isa, shape, weight.data_ptr(), 0, 0, packed, 0, tiles)
        self._cpu.linear(self._isa, shape, packed, self._x.data_ptr(), self._rows, 0, tiles, y.data_ptr(), y.stride(0))


_kept = threading.local()


def _buffer(nbytes: int) -> int:
    """Where this thread may write so many bytes until it asks again: new pages each time would take longer to come."""
    buffer: np.ndarray | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.nbytes < nbytes:
        _kept.buffer = buffer = aligned(nbytes)
    address: int = buffer.ctypes.data
    return address


def rounded(
    cpu: ModuleType,
    weight: Tensor,
    width: int,
    top: float,
    symmetric: bool,
    limits: Tensor | None,
    divisors: Tensor | None,
    out: Tensor,
) -> bool:
    """`out` [N, K] = fp32 weight [N, K] rounded in groups of `width`, over divisors [K]: see `Rounding` in kernels.h.

    limits [N, groups, 2], or the range of each group. False where a weight is not finite or a scale beyond fp16; `out`
    then is anything.
    """
    n, k = weight.shape
    _check("out", out, (n, k))
    limits_at = 0 if limits is None else _check("limits", limits, (n, -(-k // width), 2)).data_ptr()
    divisors_at = 0 if divisors is None else _check("divisors", divisors, (k,)).data_ptr()
    weight_at = _check("weight", weight, (n, k)).data_ptr()
    made: bool = cpu.round(n, k, width, weight_at, limits_at, top, symmetric, divisors_at, out.data_ptr())
    return made


def clipped(
    cpu: ModuleType,
    weight: Tensor,
    gram: Tensor,
    pull: Tensor,
    made: Tensor,
    own: Tensor,
    limits: Tensor,
    top: float,
    symmetric: bool,
    shrinks: Sequence[float],
    moves: Sequence[int],
) -> Tensor | None:
    """Moves the limits of one group of all rows: see `Clipping` in kernels.h, where `made` is called rounded.

    weight, pull, made fp32 [N, width]; gram [width, width]; own, limits [N, 2], rows as far apart as they like. How
    what is made changes, [N, width]; None where it does not.
    """
    n, width = weight.shape
    change = torch.empty_like(weight)
    inputs = {"weight": weight, "pull": pull, "made": made}
    at = {name: _check(name, x, (n, width)).data_ptr() for name, x in inputs.items()}
    gram_at, stride = _check("gram", gram, (width, width)).data_ptr(), limits.stride(0)
    for x in (own, limits):
        if x.shape != (n, 2) or x.stride() != (stride, 1) or x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(f"limits are fp32 [{n}, 2], {stride} apart; found {x.dtype} {list(x.shape)} {x.stride()}")
    ends = own.data_ptr(), limits.data_ptr(), stride
    how = top, symmetric, list(shrinks), list(moves), change.data_ptr()
    return change if cpu.clip(n, width, at["weight"], gram_at, at["pull"], at["made"], *ends, *how) else None


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"{name} is fp32 {list(shape)} in one piece on the CPU; found {x.dtype} {list(x.shape)}")
    return x
