"""The tensors that a model is made of, held against those that its files have.

Only names, shapes and dtypes are looked at (and the values of biases that should not be there); nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tinychat.architectures.names import TensorNames
from tinychat.checkpoint.layouts import Layout, first_endings
from tinychat.checkpoint.quoting import listing, quote
from tinychat.checkpoint.shards import Shards
from tinychat.checkpoint.vectors import ends, vectors
from tinychat.config import ModelConfig
from tinychat.errors import CheckpointError
from tinychat.weights import linears

MAX_FAULTS = 12  # reported at once: where config.json is wrong, every tensor is
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Segment:
    """One linear as a file names it, `module`: N rows of a canonical linear, K inputs."""

    module: str
    shape: tuple[int, int]


def segments(config: ModelConfig, names: TensorNames, linear: str, layer: int) -> list[Segment]:
    """The row segments of a canonical linear: of `weights.linears` of `layer`, or the head (`layer` is ignored)."""
    c = config
    if linear == "head":
        return [Segment(names.head, (c.vocab_size, c.table_width))]
    modules: tuple[str, ...] = getattr(names, linear)
    copies, inner, experts = 1, c.intermediate_size, c.experts_of(layer)
    if experts is not None and linear in ("up", "down"):
        modules, copies, inner = getattr(names, f"expert_{linear}"), experts.n_experts, experts.intermediate_size
    elif experts is not None and linear == "router":
        logits = (experts.n_experts, *((1,) if experts.shared_size else ()))
        return _placed(names, layer, modules[: len(logits)], logits, c.hidden_size)
    elif experts is not None and linear in ("shared_up", "shared_down"):
        linear, inner = linear.removeprefix("shared_"), experts.shared_size
    rows, k = {
        "qkv": ((c.q_size, c.kv_size, c.kv_size), c.hidden_size),
        "out": ((c.hidden_size,), c.q_size),
        "up": ((inner,) * (2 if c.gated else 1), c.hidden_size),
        "down": ((c.hidden_size,), inner),
    }[linear]
    if len(modules) == 1:  # stored fused
        rows = (sum(rows),)
    of_all = tuple(module.format(copy) for copy in range(copies) for module in modules)
    return _placed(names, layer, of_all, rows * copies, k)


def misfit(config: ModelConfig, names: TensorNames, layout: Layout, segment: Segment) -> str | None:
    """Why `layout` cannot hold a linear of such a model; None if it can."""
    together, head_dim = layout.rows_together, config.head_dim
    if segment.module.endswith(names.qkv) and names.heads_interleaved and head_dim % together:
        return f"heads of {head_dim} rows do not end at whole words of {together}"
    return layout.misfit(segment.shape)


def _placed(names: TensorNames, layer: int, modules: tuple[str, ...], rows: tuple[int, ...], k: int) -> list[Segment]:
    prefix = names.layer.format(layer)
    return [Segment(prefix + module, (n, k)) for module, n in zip(modules, rows, strict=True)]


class Inventory:
    """What `open` learns from the headers. `CheckpointError` lists what is missing, misshapen, mistyped or left over.

    quantized     modules stored in the parts of a `Layout`. Which tensors exist decides that: a plain linear that the
                  configuration does not except is read as what it is, but a quantized one that it excepts is an
                  error, as other engines would read the checkpoint differently
    n_parameters  of the model: weights, biases, norms; a tied head is not counted again
    n_quantized   weights among them that are quantized
    """

    def __init__(self, config: ModelConfig, names: TensorNames, quantization: Layout | None, shards: Shards):
        self.quantized: set[str] = set()
        self.n_parameters = 0
        self.n_quantized = 0
        self._config = config
        self._names = names
        self._quantization = quantization
        self._shards = shards
        self._unseen = set(shards.names)
        self._marks = {quantization.endings[0]} if quantization else first_endings()
        faults: list[str] = []
        for fault in self._faults():
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                faults.append("... and perhaps more")
                break
        if faults:
            raise CheckpointError(
                f"the weights in {quote(str(shards.directory))} do not match its config.json "
                f"(model_type {quote(config.model_type)}):\n  " + "\n  ".join(faults)
            )

    def _faults(self) -> Iterator[str]:
        c, names = self._config, self._names
        yield from self._tensor(f"{names.embed}.weight", (c.vocab_size, c.table_width))
        for name, shape in ends(c, names).values():
            yield from self._tensor(name, shape)
        for layer in range(c.n_layers):
            for name, size in vectors(c, names, layer).values():
                yield from self._tensor(name, (size,))
            if (scale := names.vector("act_scale", layer)) in self._unseen:
                yield from self._tensor(scale, (c.intermediate_size,), n_parameters=0)
            for linear in linears(c, layer):
                yield from self._linear(linear, layer)
        if not c.tied_head:
            yield from self._linear("head", 0)
        elif f"{names.head}.weight" in self._unseen:  # a copy of the embedding table, which some publishers keep
            yield from self._tensor(f"{names.head}.weight", (c.vocab_size, c.table_width))
            self.n_parameters -= c.vocab_size * c.table_width
        left = sorted(name for name in self._unseen if not name.endswith(names.ignored))
        if left:
            yield f"tensors that this model does not have: {listing(left)}"
        if self._quantization and not self.quantized:
            method, first = self._quantization.method.upper(), self._quantization.endings[0]
            yield f"the configuration says {method}, but no linear has a {first}"

    def _linear(self, linear: str, layer: int) -> Iterator[str]:
        for segment in segments(self._config, self._names, linear, layer):
            module, (n, k) = segment.module, segment.shape
            if linear in self._config.biases:
                yield from self._tensor(f"{module}.bias", (n,))
            elif f"{module}.bias" in self._unseen:
                yield from self._absent_bias(f"{module}.bias")
            if any(f"{module}.{ending}" in self._unseen for ending in self._marks):
                yield from self._quantized(segment)
            elif linear == "head" and f"{module}.weight" not in self._unseen:
                yield f"{module}.weight is missing; if the embedding table serves, set tie_word_embeddings to true"
            else:
                yield from self._tensor(f"{module}.weight", (n, k))

    def _quantized(self, segment: Segment) -> Iterator[str]:
        module, (n, k), layout = segment.module, segment.shape, self._quantization
        if layout is None:
            self._drop(module)
            yield f"{quote(module)} is quantized, but there is no quantization_config that says how"
            return
        if reason := misfit(self._config, self._names, layout, segment):
            self._drop(module)
            yield f"{quote(module)} cannot be quantized as config.json says: {reason}"
            return
        if layout.excludes(module):
            yield f"{quote(module)} is quantized, though the configuration lists it among those that are not"
        self.quantized.add(module)
        self.n_quantized += n * k
        self.n_parameters += n * k
        for ending, part in layout.parts((n, k)).items():
            if not part.optional or f"{module}.{ending}" in self._unseen:
                yield from self._tensor(f"{module}.{ending}", part.shape, part.dtypes, 0)

    def _drop(self, module: str) -> None:
        """Say no more of a module's tensors."""
        self._unseen = {name for name in self._unseen if name.rpartition(".")[0] != module}

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = _FLOATS, n_parameters: int | None = None
    ) -> Iterator[str]:
        self.n_parameters += math.prod(shape) if n_parameters is None else n_parameters
        if name not in self._unseen:
            yield f"{quote(name)} is missing"
            return
        self._unseen.discard(name)
        info = self._shards.info(name)
        if info.dtype not in dtypes:
            yield f"{self._shards.where(name)} is {info.dtype}; expected is {' or '.join(dtypes)}"
        if info.shape != shape:
            yield f"{self._shards.where(name)} has shape {list(info.shape)}; expected is {list(shape)}"

    def _absent_bias(self, name: str) -> Iterator[str]:
        """A bias that the model does not add. Some exporters give every linear one, of zeros, which changes nothing."""
        self._unseen.discard(name)
        if self._shards.info(name).dtype not in _FLOATS or self._shards.read(name).any():
            yield f"{self._shards.where(name)} is a bias that this model does not have, and is not all zero"
