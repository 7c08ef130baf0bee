"""The GPTQ layout of linears of 2, 3, 4 and 8 bits, as AutoGPTQ, GPTQModel, transformers and vLLM read and write it.

For a linear of K inputs and N outputs in groups of G inputs, b bits:

    qweight  int32 [K*b/32, N]           a column holds an output's codes, input after input
    qzeros   int32 [ceil(K/G), N*b/32]   a row holds a group's zeros, output after output
    scales   fp16  [ceil(K/G), N]
    g_idx    int32 [K]                   the group of each input; without it, input k is of group k // G

    w[n, k] = (q[k, n] - z[g_idx[k], n]) * scales[g_idx[k], n]

`bitstream` draws the words. What `checkpoint_format` says decides the zeros: "gptq_v2" stores them as they are, and
"gptq", the default, one less. Act-order ("desc_act") makes groups of inputs of like magnitude, so that g_idx is not
monotone: the tensor has a permutation. It knows neither files nor models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinychat.checkpoint.bitstream import codes_per_unit, pack_bits, stream, unpack_bits
from tinychat.checkpoint.layouts import Part
from tinychat.checkpoint.quoting import quote
from tinychat.errors import ConfigError
from tinychat.qtensor import QTensor, StoredCodes

BITS = (2, 3, 4, 8)
ENDINGS = ("qweight", "qzeros", "scales", "g_idx")
V1, V2 = "gptq", "gptq_v2"


def recognises(raw: Mapping[str, Any]) -> bool:
    """See `layouts`. AutoGPTQ's old files of their own do not name the method."""
    return raw.get("quant_method", "gptq" if "desc_act" in raw and "bits" in raw else None) == "gptq"


def parse(raw: Mapping[str, Any], where: str) -> GptqFormat:
    """See `layouts`. Keys not named here record how the file was made, or tune one engine."""

    def refused(key: str, expected: str) -> ConfigError:
        return ConfigError(f"{where} says {key} {quote(raw[key])}; {expected}")

    bits, group_size = raw.get("bits", 4), raw.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise refused("bits", f"GPTQ checkpoints of {', '.join(map(str, BITS))} bits are supported")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise refused("group_size", "expected is a positive number, or -1")
    for key in ("is_marlin_format", "is_bitblas_format"):  # AutoGPTQ's, before checkpoint_format
        if raw.get(key):
            raise refused(key, "layouts for one kernel are not supported; convert the checkpoint back to GPTQ")
    for key in ("checkpoint_format", "format"):
        if raw.get(key) not in (None, V1, V2):
            raise refused(key, f"supported are {V1!r} and {V2!r}")
    if raw.get("pack_dtype") not in (None, "int32"):
        raise refused("pack_dtype", "supported is 'int32'")
    for key in ("rotation", "adapter", "activation"):  # GPTQModel's: something is computed besides the linear
        if raw.get(key):
            raise refused(key, "it is not implemented")
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(name.startswith("-:") for name in dynamic):
        raise refused("dynamic", "supported are patterns of modules that are left out ('-:...'), not other settings")
    for key in ("sym", "desc_act"):
        if not isinstance(raw.get(key, False), bool):
            raise refused(key, "expected is true or false")
    meta = raw.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    makers = [makers] if isinstance(makers, str) else makers if isinstance(makers, list) else []
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        symmetric=raw.get("sym", False),
        act_order=raw.get("desc_act", False),
        zeros_less_one=(raw.get("checkpoint_format") or raw.get("format") or V1) == V1,
        borrows=any(isinstance(maker, str) and maker.lower().startswith("gptqmodel") for maker in makers),
    )


def for_writing(bits: int, group_size: int, symmetric: bool, act_order: bool) -> GptqFormat | None:
    """See `layouts`: the widths that AWQ's layout lacks, and 4 bits where weights may have a permutation."""
    if bits not in BITS or (bits == 4 and not act_order):
        return None
    return GptqFormat(bits, group_size, symmetric, act_order)


@dataclass(frozen=True)
class GptqFormat:
    """A `Layout`: what `quantization_config` says of a GPTQ checkpoint. `group_size` -1: one group per row.

    zeros_less_one  zeros are stored less one ("gptq"), else as they are
    borrows         they were reduced by subtracting from whole words, so that a zero of 0 borrows from its neighbour
    left_out, in_layers  of a checkpoint that is written: see `WritableLayout.excluding`
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    zeros_less_one: bool = False
    borrows: bool = False
    left_out: tuple[str, ...] = ()
    in_layers: tuple[str, ...] = ()

    method = "gptq"  # this and the next two: see `Layout`
    endings = ENDINGS
    rows_together = 1  # a word is of one output

    def excludes(self, module: str) -> bool:
        """See `Layout`. Modules that are left out are patterns in the file, which no one needs: see `Inventory`."""
        return module in self.left_out

    def excluding(self, modules: Collection[str], in_layers: Collection[str] = ()) -> GptqFormat:
        """See `Layout`."""
        return replace(self, left_out=tuple(modules), in_layers=tuple(in_layers))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """See `Layout`. The last group may be shorter."""
        unit = codes_per_unit(self.bits)
        for size, what in zip(shape, ("outputs", "inputs"), strict=True):
            if size % unit:
                return f"its {size} {what} are not a multiple of {unit}, which fill whole words with {self.bits} bits"
        return None

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """See `Layout`."""
        n, k = shape
        groups = -(-k // self._width(k))
        return {
            "qweight": Part((k * self.bits // 32, n), ("I32",)),
            "qzeros": Part((groups, n * self.bits // 32), ("I32",)),
            "scales": Part((groups, n), ("F16", "BF16")),
            "g_idx": Part((k,), ("I32",), optional=True),
        }

    def read(self, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> StoredCodes:
        """See `Layout`. The words as they are mapped; of them nothing is copied."""
        k = shape[1]
        return stream(
            tensors["qweight"].T,
            k,
            np.ascontiguousarray(tensors["scales"].T),
            np.ascontiguousarray(self._zeros(tensors["qzeros"]).T),
            self.bits,
            self._width(k),
            self._permutation(tensors["g_idx"], k) if "g_idx" in tensors else None,
        )

    def pack(self, q: QTensor) -> dict[str, np.ndarray]:
        """See `Layout`; also ValueError for scales that fp16 would round, as codes are chosen for those stored."""
        k, top = q.shape[1], 1 << self.bits
        reason = self.misfit(q.shape)
        if q.bits != self.bits or q.group_size != self._width(k):
            reason = f"it has {q.bits} bits in groups of {q.group_size}, not {self.bits} in {self._width(k)}"
        elif q.permutation is not None and not self.act_order:
            reason = "its groups run along inputs in an order of their own, and act-order was not asked for"
        elif self.symmetric and (q.zeros != top // 2).any():
            reason = f"it is not symmetric: not every zero is {top // 2}"
        elif self.zeros_less_one:
            reason = f"zeros are written as they are ({V2})"
        if reason:
            raise ValueError(f"GPTQ's layout cannot hold this linear: {reason}")
        scales = q.scales.astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), q.scales.astype(np.float32)):
            raise ValueError("GPTQ stores fp16 scales and these are not: round them before choosing the codes")
        codes, group_of = q.codes, np.arange(k, dtype=np.int32) // q.group_size
        if q.permutation is not None:
            order = np.argsort(q.permutation)
            codes, group_of = codes[:, order], group_of[order]
        return {
            "qweight": np.ascontiguousarray(pack_bits(codes, self.bits).T),
            "qzeros": pack_bits(q.zeros.T, self.bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of,
        }

    def to_config(self) -> dict[str, Any]:
        """See `Layout`."""
        left: dict[str, Any] = {}
        if self.left_out:
            # GPTQModel and vLLM read the patterns, transformers the modules: to it all linears are quantized else.
            left["dynamic"] = {f"-:^{name.replace('.', '[.]')}$": {} for name in self.left_out}
            if self.in_layers:
                left["modules_in_block_to_quantize"] = [list(self.in_layers)]
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": V1 if self.zeros_less_one else V2,
            "pack_dtype": "int32",
            "lm_head": False,
            **left,
        }

    def _width(self, k: int) -> int:
        """The group size in a row of `k` inputs."""
        return k if self.group_size == -1 else min(self.group_size, k)

    def _zeros(self, words: np.ndarray) -> np.ndarray:
        """qzeros [G, N*b/32] -> zeros as they are [G, N]."""
        if not self.zeros_less_one:
            return unpack_bits(words, self.bits)
        top = (1 << self.bits) - 1
        if self.borrows and self.bits != 3:
            ones = np.uint32(sum(1 << i for i in range(0, 32, self.bits)))
            return unpack_bits((words.view(np.uint32) + ones).view(np.int32), self.bits)
        zeros = unpack_bits(words, self.bits)
        if not self.borrows and (zeros == top).any():
            raise ValueError(
                f"it has a zero stored as {top}, of which one engine makes 0 and another {top + 1}; quantize it anew "
                f"with checkpoint_format {V2!r}, which stores zeros as they are"
            )
        return (zeros + 1) & np.uint8(top)

    def _permutation(self, group_of: np.ndarray, k: int) -> np.ndarray | None:
        """The inputs group after group; None where that is their own order."""
        expected = np.arange(k) // self._width(k)
        if np.array_equal(group_of, expected):
            return None
        order = np.argsort(group_of, kind="stable").astype(np.int32)
        if not np.array_equal(group_of[order], expected):
            raise ValueError(f"its g_idx does not make groups of {self._width(k)} inputs each")
        return order
