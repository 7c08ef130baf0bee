"""Whether all floats of an array are finite, at the speed of integers."""

from __future__ import annotations

import numpy as np

# An IEEE float is NaN or infinite where its exponent is all ones, so that its bits are at least these: of positive ones
# as an integer with sign, of negative ones, beside which all others are small, as one without.
_NOT_FINITE: dict[str, tuple[np.dtype, int]] = {
    "float16": (np.dtype("<u2"), 0x7C00),
    "bfloat16": (np.dtype("<u2"), 0x7F80),
    "float32": (np.dtype("<u4"), 0x7F80_0000),
}
CHUNK = 1 << 18  # elements looked at a time: what stays in cache


def all_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity in a contiguous array; True of numbers other than fp16, bf16 and fp32."""
    if array.dtype.name not in _NOT_FINITE:
        return True
    unsigned, exponent = _NOT_FINITE[array.dtype.name]
    bits = array.reshape(-1).view(unsigned)
    signed, sign = bits.view(unsigned.str.replace("u", "i")), 1 << 8 * unsigned.itemsize - 1
    chunks = [slice(start, start + CHUNK) for start in range(0, len(bits), CHUNK)]
    return all(signed[c].max() < exponent and bits[c].max() < sign | exponent for c in chunks)
