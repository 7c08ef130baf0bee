"""One linear on the CUDA kernels: packing a canonical weight, y = x W^T + b, and which kernel for how many rows.

It runs with `tinychat._cuda` on tensors of a GPU, and with `tinychat._cuda_host`, the same kernels on the CPU, on the
CPU's tensors: the device of the tensors decides. What is not quantized, and groups that no kernel has, are multiplied
by torch in 16 bits. Nothing synchronizes, so that a graph may capture it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tinychat.backends.cuda_packing import Packed, array, device_group, pack, same_kind, tensor, unpack
from tinychat.errors import BackendError
from tinychat.qtensor import AwqWords, QTensor, StoredCodes, Weight, canonical
from tinychat.weights import Linear

# Rows from which a weight is dequantized once and multiplied by cuBLAS.
DEQUANTIZE_ROWS = 512


def extension(device: torch.device) -> ModuleType:
    """The compiled kernels for tensors of `device`; BackendError where they are not built."""
    name = "_cuda" if device.type == "cuda" else "_cuda_host"
    try:
        return importlib.import_module(f"tinychat.{name}")
    except ImportError as error:
        raise BackendError(f"tinychat.{name} is not built ({error}); install tinychat where nvcc is") from None


def stream(device: torch.device) -> int:
    """Of torch, on `device`, as kernels take it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@dataclass(eq=False)
class Workspace:
    """What linears of one device and dtype share; no two may run at a time, as on one stream they do not.

    `dequantized` grows to the largest weight that met DEQUANTIZE_ROWS rows. A graph of so many rows would hold its
    address, which stays as long as no larger model comes to the device.
    """

    sums: torch.Tensor  # fp32: parts of K that meet
    values: torch.Tensor | None = None

    def dequantized(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialized [n, k]."""
        if self.values is None or self.values.dtype != dtype or self.values.numel() < n * k:
            self.values = None  # free it first
            self.values = torch.empty(n * k, dtype=dtype, device=device)
        return self.values[: n * k].view(n, k)

    @staticmethod
    def of(device: torch.device) -> Workspace:
        """That of `device`."""
        if device not in _workspaces:
            _workspaces[device] = Workspace(torch.empty(_SUMS, device=device))
        return _workspaces[device]


_SUMS = 4 << 20  # 16 MiB: four parts of 64 rows of 16384 outputs
_workspaces: dict[torch.device, Workspace] = {}


@dataclass(frozen=True, eq=False)
class Quantized:
    """A packed weight and its addresses for the kernels."""

    packed: Packed
    weight: Any  # `PackedWeight` of the extension

    @classmethod
    def of(cls, packed: Packed) -> Quantized:
        """`packed`, which is kept, for the kernels of its device."""
        found = device_group(packed.group_size, packed.k)
        assert found is not None  # or pack had refused it
        weight = extension(packed.codes.device).PackedWeight(
            codes=packed.codes.data_ptr(),
            scales=packed.scales.data_ptr(),
            zeros=packed.zeros.data_ptr(),
            n=packed.n,
            k=packed.k,
            chunks=-(-packed.k // 64),
            groups=packed.scales.shape[1],
            group_shift=found[1],
            bits=packed.kept,
            wide=packed.scales.dtype == torch.float32,
        )
        return cls(packed, weight)


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight that torch multiplies."""

    values: torch.Tensor  # [N, K] in the dtype of the activations
    source: Weight  # as it was given


@dataclass(frozen=True, eq=False)
class CudaLinear:
    """A linear on a device; (n, k) is the shape of all its segments together."""

    n: int
    k: int
    parts: tuple[Quantized | Dense, ...]
    bias: torch.Tensor | None  # fp32 [n]
    dtype: torch.dtype  # of activations
    device: torch.device
    workspace: Workspace = field(repr=False)

    @classmethod
    def pack(
        cls, linear: Linear | Weight, device: str | torch.device = "cuda", dtype: torch.dtype = torch.float16
    ) -> CudaLinear:
        """Packs for activations of `dtype`, fp16 or bf16. Neighbouring segments of one kind become one weight."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"activations are fp16 or bf16, not {dtype}")
        if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise BackendError(f"{torch.cuda.get_device_name(device)} cannot multiply bf16: take fp16 activations")
        if not isinstance(linear, Linear):
            linear = Linear((linear,))
        n, k = linear.shape
        if any(s.shape[1] != k for s in linear.segments) or not n or not k:
            raise ValueError(f"segments of one linear share K; found {[s.shape for s in linear.segments]}")
        segments = tuple(s.tensor() if isinstance(s, StoredCodes) else s for s in linear.segments)
        parts: list[Quantized | Dense] = []
        alike: list[QTensor | AwqWords] = []
        for segment in segments:
            plain = isinstance(segment, np.ndarray) or not _has_kernel(segment)
            if alike and (plain or not same_kind(alike[-1], segment)):  # type: ignore[arg-type]
                parts.append(Quantized.of(pack(alike, device)))
                alike = []
            if plain:
                parts.append(Dense(_dense(segment, dtype, device), segment))
            else:
                alike.append(segment)  # type: ignore[arg-type]
        if alike:
            parts.append(Quantized.of(pack(alike, device)))
        bias = None if linear.bias is None else tensor(np.asarray(linear.bias, np.float32), device)
        if device.type == "cuda":  # kernels read weights before the one ahead of them has ended (csrc/cuda/launch.h)
            torch.cuda.current_stream(device).synchronize()
        return cls(n, k, tuple(parts), bias, dtype, device, Workspace.of(device))

    def unpack(self) -> Linear:
        """What was packed, exactly; segments as files have them in the canonical form."""
        segments: list[Weight] = []
        for part in self.parts:
            segments += unpack(part.packed) if isinstance(part, Quantized) else [part.source]
        return Linear(tuple(segments), None if self.bias is None else array(self.bias))

    @property
    def nbytes(self) -> int:
        """Bytes resident on the device."""
        sizes = (p.packed.nbytes if isinstance(p, Quantized) else p.values.nbytes for p in self.parts)
        return sum(sizes) + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """y = x W^T + b: x [T, k] of `dtype` -> [T, n] of `dtype`, or of fp32 where `wide`."""
        if x.ndim != 2 or x.shape[1] != self.k or x.dtype != self.dtype or x.device != self.device:
            expected = f"{self.dtype} [T, {self.k}] on {self.device}"
            raise ValueError(f"activations are {expected}; found {x.dtype} {list(x.shape)} on {x.device}")
        y = torch.empty(len(x), self.n, dtype=torch.float32 if wide else self.dtype, device=self.device)
        if not len(x):
            return y
        begin = 0
        for part in self.parts:
            if isinstance(part, Quantized):
                end = begin + part.packed.n
                self._quantized(part, x, y, begin)
            else:
                end = begin + len(part.values)
                self._dense(part.values, x, y, begin)
            begin = end
        return y

    def _quantized(self, part: Quantized, x: torch.Tensor, y: torch.Tensor, begin: int) -> None:
        if part.packed.permutation is not None:
            x = x.index_select(1, part.packed.permutation)
        if len(x) >= DEQUANTIZE_ROWS:
            self._dense(self.dequantized(part), x, y, begin)
            return
        cuda = extension(self.device)
        if self.k % 8:  # rows begin at multiples of 16 bytes; torch's pad copies even where it adds nothing
            x = torch.nn.functional.pad(x, (0, -self.k % 8))
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        bias = 0 if self.bias is None else self.bias.data_ptr() + 4 * begin
        call = (part.weight, x.data_ptr(), bias, y.data_ptr() + begin * y.itemsize, len(x), x.shape[1], self.n)
        kind = (_dtype(cuda, self.dtype), y.dtype == torch.float32, stream(self.device))
        if len(x) <= cuda.GEMV_ROWS:
            cuda.gemv(*call, *kind)
        else:
            sums = self.workspace.sums
            cuda.gemm(*call, *kind, sums.data_ptr(), sums.nbytes)

    def dequantized(self, part: Quantized) -> torch.Tensor:
        """[n, k] of a part in `dtype`, in the order of its codes, valid until the next call of any linear."""
        cuda = extension(self.device)
        values = self.workspace.dequantized(part.packed.n, self.k, self.dtype, self.device)
        cuda.dequantize(part.weight, _dtype(cuda, self.dtype), values.data_ptr(), stream(self.device))
        return values

    def _dense(self, values: torch.Tensor, x: torch.Tensor, y: torch.Tensor, begin: int) -> None:
        out = y[:, begin : begin + len(values)]
        bias = None if self.bias is None else self.bias[begin : begin + len(values)]
        with whole_sums():
            if out.dtype == x.dtype and len(values) == self.n:  # else strided, which a product would not be written to
                if bias is None:
                    torch.mm(x, values.T, out=out)
                else:
                    torch.addmm(bias.to(x.dtype), x, values.T, out=out)  # the sum is rounded once
                return
            out.copy_(x @ values.T)
        if bias is not None:
            out += bias


@contextmanager
def whole_sums() -> Iterator[None]:
    """torch's products add in fp32: parts of a sum that is cut may otherwise be rounded to 16 bits, or overflow."""
    products = torch.backends.cuda.matmul
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(products, name) for name in names]
    try:
        for name in names:
            setattr(products, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(products, name, value)


def _dtype(cuda: ModuleType, dtype: torch.dtype) -> Any:
    return cuda.Dtype.f16 if dtype == torch.float16 else cuda.Dtype.bf16


def _has_kernel(segment: QTensor | AwqWords | np.ndarray) -> bool:
    """Whether the kernels read such a weight packed."""
    assert not isinstance(segment, np.ndarray)
    return segment.bits <= 8 and device_group(segment.group_size, segment.shape[1]) is not None


def _dense(segment: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A weight in `dtype`, its inputs in their own order."""
    plain = canonical(segment)
    return tensor(plain.dequantize() if isinstance(plain, QTensor) else plain, device).to(dtype)
