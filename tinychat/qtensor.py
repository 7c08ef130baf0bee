"""QTensor: the canonical group-quantized tensor, w = (q - z) * s, in device-neutral numpy arrays.

It is what the quantizer makes and what the loader reads. It knows no file layout (`checkpoint/`) and no device
layout (`csrc/`): those are permutations of the same numbers, and `unpack(pack(q)) == q` for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

bfloat16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), bfloat16)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A linear's weight of N outputs and K inputs, quantized in groups of `group_size` along K.

    codes   uint8 [N, K], each below 2**bits
    scales  fp16, bf16 or fp32 [N, ceil(K / group_size)]
    zeros   uint8 [N, ceil(K / group_size)], each below 2**bits

    The last group is shorter where group_size does not divide K; group_size == K is one group per row.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = (n, -(-k // self.group_size))
        if self.codes.dtype != np.uint8 or self.zeros.dtype != np.uint8 or self.scales.dtype not in FLOAT_DTYPES:
            raise TypeError(f"QTensor of {self.codes.dtype}, {self.scales.dtype}, {self.zeros.dtype}")
        if self.scales.shape != groups or self.zeros.shape != groups:
            raise ValueError(
                f"codes {self.codes.shape} in groups of {self.group_size} need scales and zeros {groups}; "
                f"found {self.scales.shape} and {self.zeros.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the float weight's."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero, in bits, for one weight."""
        k = self.shape[1]
        return self.bits + self.scales.shape[1] * (self.scales.dtype.itemsize * 8 + self.bits) / k

    def dequantize(self, dtype: type | np.dtype = np.float32) -> np.ndarray:
        """The weight [N, K]: w = (q - z) * s, computed in fp32 (fp64 where `dtype` is)."""
        work = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        k = self.shape[1]
        each = np.minimum(self.group_size, k - np.arange(self.scales.shape[1]) * self.group_size)
        zeros = np.repeat(self.zeros.astype(work), each, axis=1)
        scales = np.repeat(self.scales.astype(work), each, axis=1)
        return ((self.codes.astype(work) - zeros) * scales).astype(dtype)


Weight = QTensor | np.ndarray  # [N, K]; an array is fp32, fp16 or bf16
