"""The layout "pack-quantized" of compressed-tensors, as llm-compressor writes it and vLLM reads it: 2, 3, 4 and 8 bits.

For a linear of K inputs and N outputs in groups of G inputs, b bits:

    weight_packed      int32 [N, ceil(K*b/32)]    a row holds an output's codes, input after input
    weight_scale       fp16, bf16 or fp32 [N, K/G]
    weight_zero_point  int32 [ceil(N*b/32), K/G]  a column holds a group's zeros; of asymmetric ones
    weight_shape       int64 [2]                  N, K

    w[n, k] = (q[n, k] - z[n, k // G]) * weight_scale[n, k // G]

Its integers have a sign; stored is what lies 2**(b - 1) above, codes and zeros alike, and that is what a `QTensor` has.
The zero of symmetric ones is 2**(b - 1). `bitstream` draws the words; the last of a row may be filled up. It
knows neither files nor models, and is read, not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.checkpoint.bitstream import stream, unpack_bits
from tinychat.checkpoint.layouts import Part
from tinychat.checkpoint.quoting import quote
from tinychat.errors import ConfigError
from tinychat.qtensor import StoredCodes

BITS = (2, 3, 4, 8)
ENDINGS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def recognises(raw: Mapping[str, Any]) -> bool:
    """See `layouts`."""
    return raw.get("quant_method") == "compressed-tensors"


def parse(raw: Mapping[str, Any], where: str) -> PackQuantized:
    """See `layouts`. One kind of weight for all linears, activations as they are: anything else is refused."""

    def require(right: bool, what: str, found: object, expected: str) -> None:
        if not right:
            raise ConfigError(f"{where} says {what} {quote(found)}; {expected}")

    def check_format(found: object, what: str) -> None:
        require(found == "pack-quantized", what, found, "of compressed-tensors 'pack-quantized' is supported")

    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError(f"{where} has no config_groups that say how weights are quantized")
    for name, group in groups.items():
        check_format(group.get("format") or raw.get("format"), f"format of {name}")
        for key in ("input_activations", "output_activations"):
            require(not group.get(key), f"{key} of {name}", group.get(key), "quantized activations are not implemented")
    for key in ("kv_cache_scheme", "transform_config"):
        require(not raw.get(key), key, raw.get(key), "it is not implemented")
    sparsity = raw.get("sparsity_config") or {}
    dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    require(dense, "sparsity_config", sparsity, "sparse weights are not implemented")
    first, *others = (group.get("weights") for group in groups.values())
    require(isinstance(first, dict), "weights", first, "expected is how they are quantized")
    require(all(other == first for other in others), "config_groups", groups, "one kind of weights is supported")

    bits, group_size, symmetric = first.get("num_bits"), first.get("group_size"), first.get("symmetric", True)
    require(first.get("type", "int") == "int", "type", first.get("type"), "supported is 'int'")
    supported = f"supported are {', '.join(map(str, BITS))}"
    require(type(bits) is int and bits in BITS, "num_bits", bits, supported)
    require(isinstance(symmetric, bool), "symmetric", symmetric, "expected is true or false")
    require(not first.get("dynamic"), "dynamic", first.get("dynamic"), "expected is false")
    require(
        first.get("actorder") in (None, False, "weight", "static"), "actorder", first.get("actorder"), "it moves inputs"
    )
    strategy = first.get("strategy") or ("group" if group_size else "channel")
    require(strategy in ("group", "channel"), "strategy", strategy, "supported are 'group' and 'channel'")
    if strategy == "channel":
        group_size = -1
    right = type(group_size) is int and (group_size > 0 or group_size == -1)
    require(right, "group_size", group_size, "expected is a positive number")
    ignored = raw.get("ignore") or []
    right = isinstance(ignored, list) and all(isinstance(name, str) for name in ignored)
    require(right, "ignore", ignored, "expected is a list of names")
    return PackQuantized(bits, group_size, symmetric, tuple(ignored))


def for_writing(bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    """See `layouts`: it is not written."""


@dataclass(frozen=True)
class PackQuantized:
    """A `Layout`: what `quantization_config` says of such a checkpoint. `group_size` -1: one group per row."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    ignored: tuple[str, ...] = ()

    method = "compressed-tensors"  # this and the next two: see `Layout`
    endings = ENDINGS
    rows_together = 1  # a word is of one output

    def excludes(self, module: str) -> bool:
        """See `Layout`. Names that are whole; patterns ("re:...") are another engine's matter: see `Inventory`."""
        return module in self.ignored

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """See `Layout`."""
        if self.group_size != -1 and shape[1] % self.group_size:
            return f"its {shape[1]} inputs are not a multiple of the group size {self.group_size}"
        return None

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """See `Layout`."""
        n, k = shape
        groups = 1 if self.group_size == -1 else k // self.group_size
        parts = {
            "weight_packed": Part((n, self._words(k)), ("I32",)),
            "weight_scale": Part((n, groups), ("F16", "BF16", "F32")),
            "weight_shape": Part((2,), ("I64", "I32"), optional=True),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((self._words(n), groups), ("I32",))
        return parts

    def read(self, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> StoredCodes:
        """See `Layout`. The words as they are mapped; of them nothing is copied."""
        n, k = shape
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [n, k]:
            raise ValueError(f"its weight_shape says {tensors['weight_shape'].tolist()}; expected is {[n, k]}")
        scales = np.ascontiguousarray(tensors["weight_scale"])
        if self.symmetric:
            zeros = np.full(scales.shape, 1 << self.bits - 1, np.uint8)
        else:
            zeros = np.ascontiguousarray(unpack_bits(tensors["weight_zero_point"].T, self.bits, n).T)
        group_size = k if self.group_size == -1 else self.group_size
        return stream(tensors["weight_packed"], k, scales, zeros, self.bits, group_size)

    def _words(self, n_codes: int) -> int:
        return -(-n_codes * self.bits // 32)
