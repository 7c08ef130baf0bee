"""The compiled module for those who want its arithmetic without a model, and y = x W^T in fp32 by its kernels.

The quantizer spends its time in products. On a CPU of AVX2 alone the kernel of unquantized weights multiplies at 0.83
of what the instructions allow, PyTorch at 0.65 to 0.75 (benchmarks/results/quality.md); of other levels PyTorch is
taken for as good. An output is the same however the rows of a weight are cut.
"""

from __future__ import annotations

import functools
import threading
from types import ModuleType

import numpy as np
import torch

from tinychat.backends.cpu_linear import aligned, extension
from tinychat.errors import BackendError

LEVELS = ("avx2", "avxvnni")  # whose kernel is the faster
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@functools.cache
def engine() -> ModuleType | None:
    """The compiled module, where it is."""
    try:
        return extension()
    except BackendError:
        return None


def multiplier(x: torch.Tensor) -> ModuleType | None:
    """It, where `Product` of x is the faster."""
    cpu = engine() if x.is_cpu else None
    return cpu if cpu and cpu.isa() in LEVELS else None


class Product:
    """Products with x, fp32 [T, K] on the CPU; each of them computed by the thread that asks for it."""

    def __init__(self, cpu: ModuleType, x: torch.Tensor):
        self._cpu, self._isa = cpu, cpu.isa()
        self._rows, self._k = x.shape
        self._x = x = x.contiguous()
        shape = cpu.LinearShape(cpu.WeightType.f32, 1, self._k)
        row_bytes = cpu.activation_bytes(self._isa, shape)
        if row_bytes != 4 * self._k:  # the kernel wants rows that begin at a cache line
            self._x = torch.from_numpy(aligned(row_bytes * self._rows))
            cpu.prepare(self._isa, shape, x.data_ptr(), self._x.data_ptr(), self._rows)

    def into(self, y: torch.Tensor, weight: torch.Tensor) -> None:
        """y = x W^T for W fp32, fp16 or bf16 [N, K]; y [T, N] may be columns of a wider one."""
        weight = weight.contiguous()
        shape = self._cpu.LinearShape(getattr(self._cpu.WeightType, TYPES[weight.dtype]), len(weight), self._k)
        tiles = -(-len(weight) // self._cpu.tile(self._isa))
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
