"""The AWQ "gemm" layout of 4-bit linears, as AutoAWQ, transformers and vLLM read and write it.

For a linear of K inputs and N outputs in groups of G inputs:

    qweight  int32 [K, N/8]     qzeros  int32 [K/G, N/8]     scales  fp16 [K/G, N]

    word c of a row holds the outputs 8c .. 8c+7, in the order that `qtensor` draws

    w[n, k] = (q[k, n] - z[k // G, n]) * scales[k // G, n], zeros being stored as they are

It knows neither files nor models. The byte order within a word is little-endian, as in the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinychat.checkpoint.layouts import Part
from tinychat.checkpoint.quoting import quote
from tinychat.errors import ConfigError
from tinychat.qtensor import AwqWords, QTensor, pack_words

BITS = 4
PER_WORD = 8
ENDINGS = ("qweight", "qzeros", "scales")  # in the order of `AwqWords`


def recognises(raw: Mapping[str, Any]) -> bool:
    """See `layouts`. AutoAWQ's old files of their own do not name the method."""
    return raw.get("quant_method", "awq" if "w_bit" in raw else None) == "awq"


def parse(raw: Mapping[str, Any], where: str) -> AwqFormat:
    """See `layouts`."""
    return AwqFormat.parse(raw, where)


def for_writing(bits: int, group_size: int, symmetric: bool, act_order: bool) -> AwqFormat | None:
    """See `layouts`: 4 bits, symmetric or not, of inputs in their own order."""
    return AwqFormat(group_size=group_size) if bits == BITS and not act_order else None


@dataclass(frozen=True)
class AwqFormat:
    """A `Layout`: what `quantization_config` says of an AWQ checkpoint. `group_size` -1: one group per row."""

    bits: int = BITS
    group_size: int = 128
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    version: str = "gemm"

    method = "awq"  # this and the next two: see `Layout`
    endings = ENDINGS
    rows_together = PER_WORD  # `AwqWords` keep the file's words

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> AwqFormat:
        """From `quantization_config` of config.json, or an old quant_config.json. `where` names it in a `ConfigError`.

        Keys not named here (`backend`, `do_fuse`, `exllama_config`, what a calibration was run with) tune one engine
        or record how the file was made. None of them can change what a number means unnoticed: names, dtypes and
        shapes of all tensors are checked against the layout.
        """
        if raw.get("backend") == "llm-awq":
            raise ConfigError(f"{where} says backend 'llm-awq', a layout of its own; supported is AWQ version 'gemm'")
        version = raw.get("version") or raw.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ConfigError(f"{where} says AWQ version {quote(version)}; supported is 'gemm'")
        bits = raw.get("bits", raw.get("w_bit", BITS))
        if type(bits) is not int or bits != BITS:
            raise ConfigError(f"{where} says {quote(bits)} bits; AWQ checkpoints of {BITS} bits are supported")
        group_size = raw.get("group_size", raw.get("q_group_size", 128))
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ConfigError(f"{where} says group_size {quote(group_size)}; expected is a positive number, or -1")
        zero_point = raw.get("zero_point", True)
        if not isinstance(zero_point, bool):
            raise ConfigError(f"{where} says zero_point {quote(zero_point)}; expected is true or false")
        exceptions = raw.get("modules_to_not_convert") or []
        if not isinstance(exceptions, list) or not all(isinstance(name, str) for name in exceptions):
            raise ConfigError(f"{where} says modules_to_not_convert {quote(exceptions)}; expected is a list of names")
        return cls(bits, group_size, zero_point, tuple(exceptions), "gemm")

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """See `Layout`."""
        return fits(shape, self.group_size)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """See `Layout`."""
        n, k = shape
        groups = 1 if self.group_size == -1 else k // self.group_size
        return {
            "qweight": Part((k, n // PER_WORD), ("I32",)),
            "qzeros": Part((groups, n // PER_WORD), ("I32",)),
            "scales": Part((groups, n), ("F16", "BF16")),
        }

    def read(self, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> AwqWords:
        """See `Layout`. The words as they are mapped; nothing is copied."""
        return AwqWords(*(tensors[ending] for ending in ENDINGS))

    def pack(self, q: QTensor) -> dict[str, np.ndarray]:
        """See `Layout`."""
        return pack(q)

    def excluding(self, modules: Collection[str], in_layers: Collection[str] = ()) -> AwqFormat:
        """See `Layout`."""
        return replace(self, modules_to_not_convert=tuple(modules))

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` to write into config.json."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    def excludes(self, module: str) -> bool:
        """Whether `modules_to_not_convert` names `module`: whole, by leading or by trailing parts of its name.

        Engines differ in how they match (substrings, regular expressions, suffixes); this is what they agree on.
        """
        return any(
            module == name or module.startswith(f"{name}.") or module.endswith(f".{name}")
            for name in self.modules_to_not_convert
        )


def fits(shape: tuple[int, int], group_size: int) -> str | None:
    """Why a linear of `shape` (N, K) cannot be expressed in groups of `group_size` (-1: whole rows); None if it can."""
    n, k = shape
    if n % PER_WORD:
        return f"its {n} outputs are not a multiple of {PER_WORD}"
    if group_size != -1 and k % group_size:
        return f"its {k} inputs are not a multiple of the group size {group_size}"
    return None


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """The three arrays of a linear, by the ending of their names: qweight, qzeros, scales.

    `ValueError` where `fits` names a reason, for other than 4 bits, and for scales that fp16 would round: codes are
    chosen for the scales that are stored, so round the scales first.
    """
    n, k = q.shape
    reason = fits((n, k), q.group_size) if q.bits == BITS else f"it has {q.bits} bits, not {BITS}"
    if q.permutation is not None:
        reason = "its groups run along inputs in an order of their own"
    if reason:
        raise ValueError(f"AWQ's layout cannot hold this linear: {reason}")
    scales = q.scales.astype(np.float16)
    if not np.array_equal(scales.astype(np.float32), q.scales.astype(np.float32)):
        raise ValueError("AWQ stores fp16 scales and these are not: round them before choosing the codes")
    return {
        "qweight": pack_words(q.codes),
        "qzeros": pack_words(q.zeros),
        "scales": np.ascontiguousarray(scales.T),  # [K/G, N]
    }
