"""Checkpoint: a directory in Hugging Face's layout as a `WeightSource` of canonical weights.

What is checked when: opening reads config.json and the headers and holds them against each other (`inventory.py`);
values are checked as each tensor is read, before anyone computes with it: every float is finite. Nothing is kept: a
layer is read from the mapped files when it is asked for, and the pages of those before it are given back, so a
reader's memory holds one layer at a time.

It knows no model family (`architectures/` translates) and no device.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tinychat import tokenizer
from tinychat.architectures import translate
from tinychat.architectures.names import TensorNames
from tinychat.checkpoint import heads, layouts
from tinychat.checkpoint.finite import CHUNK, all_finite
from tinychat.checkpoint.inventory import Inventory, Segment, segments
from tinychat.checkpoint.json_file import read_object
from tinychat.checkpoint.layouts import Layout
from tinychat.checkpoint.locate import GGUF
from tinychat.checkpoint.quoting import quote
from tinychat.checkpoint.safetensors_file import DTYPES
from tinychat.checkpoint.shards import Shards
from tinychat.checkpoint.vectors import ends, vectors
from tinychat.config import Block, ModelConfig
from tinychat.errors import CheckpointError, ConfigError
from tinychat.qtensor import Weight
from tinychat.tokenizer import Tokenizer
from tinychat.weights import Ends, Layer, Linear, linears, norm_sizes

MAX_CONFIG_BYTES = 4 << 20
_OLD_QUANT_CONFIGS = ("quant_config.json", "quantize_config.json")  # engines before they wrote into config.json


class Checkpoint:
    """The weights and the configuration of one model directory; a `WeightSource`.

    path               the directory
    config             the model that config.json describes
    hf_config          config.json as it is
    names              what the files call the tensors
    generation_config  generation_config.json, or {}
    quantization       None where no linear is quantized
    n_parameters       of the model; a tied head is not counted again
    n_quantized        weights of `bits` among them
    quantized          modules that are
    shards             the tensors
    bits               of a quantized weight
    file_bytes         of the weight files, or of what they would be with tables in 16 bits
    """

    def __init__(
        self,
        path: Path,
        hf_config: dict[str, Any],
        config: ModelConfig,
        names: TensorNames,
        shards: Shards | None = None,
    ):
        """`shards` holds the tensors where they are not in the directory `path`."""
        self.path = path
        self.hf_config = hf_config
        self.config = config
        self.generation_config = _optional(path / "generation_config.json")
        self.quantization = _quantization(path, hf_config)
        self.bits = 4 if self.quantization is None else self.quantization.bits
        self.shards = Shards(path) if shards is None else shards
        self._present = self.shards.names
        self.names = names = names.as_stored(self._present)
        inventory = Inventory(config, names, self.quantization, self.shards)
        self.quantized = inventory.quantized
        self.n_parameters = inventory.n_parameters
        self.n_quantized = inventory.n_quantized
        self.file_bytes = self.shards.nbytes

    def embed(self) -> np.ndarray:
        """The embedding table [vocab_size, table_width], read-only on the mapped file."""
        table = self._read(f"{self.names.embed}.weight")
        self.shards.release()  # looked through whole; a reader may want few rows of it
        return table

    def table(self) -> Weight:
        """The embedding table as it is stored: that of `embed`, but where a file holds codes."""
        return self.embed()

    @property
    def table_bytes(self) -> int:
        """Of the table as `table` gives it; of codes, packed."""
        info = self.shards.info(f"{self.names.embed}.weight")
        return math.prod(info.shape) * DTYPES[info.dtype].itemsize

    def layer(self, index: int) -> Layer:
        """Block `index`. Weights are read-only on the mapped file, as they lie there."""
        if not 0 <= index < self.config.n_layers:
            raise IndexError(f"layer {index} of {self.config.n_layers}")
        self.shards.release()
        made: dict[str, Any] = {name: self._linear(name, index) for name in linears(self.config, index)}
        stored = vectors(self.config, self.names, index)
        for name, size in norm_sizes(self.config).items():
            made[name] = self._norm(stored[name][0]) if name in stored else np.ones(size, np.float32)
        made["act_scale"] = self._act_scale(self.names.vector("act_scale", index))
        return Layer(**made)

    def ends(self) -> Ends:
        """What there is beside embedding, final norm and head."""
        found = {name: tensor for name, (tensor, _) in ends(self.config, self.names).items()}
        made: dict[str, Any] = {}
        if "positions" in found:
            made["positions"] = self._read(found["positions"])
        made |= {name: self._norm(found[name]) for name in ("norm", "norm_bias") if name in found}
        made |= {name: Linear((self._read(found[name]),)) for name in ("project_in", "project_out") if name in found}
        return Ends(**made)

    def norm(self) -> np.ndarray | None:
        """The final norm, fp32 [hidden_size]."""
        if self.config.block is Block.POST_NORM:
            return None
        found = ends(self.config, self.names).get("final_norm")
        return self._norm(found[0]) if found else np.ones(self.config.hidden_size, np.float32)

    def norm_bias(self) -> np.ndarray | None:
        """The final norm's bias, fp32 [hidden_size]."""
        found = ends(self.config, self.names).get("final_norm_bias")
        return self._norm(found[0]) if found else None

    def head(self) -> Linear | None:
        """The output head; None where the embedding table serves, `CheckpointError` where a stored copy differs."""
        self.shards.release()
        if not self.config.tied_head:
            return self._linear("head", 0)
        copy = f"{self.names.head}.weight"
        if copy in self._present and not _equal(self._read(copy), self.embed()):
            raise CheckpointError(
                f"{self._where(copy)} differs from the embedding table, though config.json ties the two; "
                f"if the head is right, set tie_word_embeddings to false"
            )
        return None

    def release(self) -> None:
        """Give back the memory of the pages read so far; arrays stay valid and read them again."""
        self.shards.release()

    def tokenizer(self) -> Tokenizer | None:
        """That of the directory; None where it has none."""
        return tokenizer.load(self.path)

    def _linear(self, linear: str, layer: int) -> Linear:
        parts = segments(self.config, self.names, linear, layer)
        bias = None
        if linear in self.config.biases:
            bias = np.concatenate([self._vector(f"{part.module}.bias") for part in parts])
        made = Linear(tuple(self._weight(part) for part in parts), bias)
        return heads.apart(made, self.config) if linear == "qkv" and self.names.heads_interleaved else made

    def _act_scale(self, name: str) -> np.ndarray | None:
        if name not in self._present:
            return None
        scale = self._vector(name)
        if not scale.all():
            raise CheckpointError(f"{self._where(name)} has a zero, and activations are divided by it")
        return None if (scale == 1).all() else scale

    def _weight(self, segment: Segment) -> Weight:
        module, layout = segment.module, self.quantization
        if layout is None or module not in self.quantized:
            return self._read(f"{module}.weight")
        names = {ending: f"{module}.{ending}" for ending in layout.endings}
        tensors = {ending: self._read(name) for ending, name in names.items() if name in self._present}
        try:
            return layout.read(segment.shape, tensors)
        except ValueError as error:
            raise CheckpointError(f"{self._where(names[layout.endings[0]])}: {error}") from None

    def _norm(self, name: str) -> np.ndarray:
        """A norm's weight or bias, as it is applied."""
        return self._vector(name) + np.float32(self.names.norm_offset if name.endswith(".weight") else 0)

    def _vector(self, name: str) -> np.ndarray:
        return self._read(name).astype(np.float32)

    def _where(self, name: str) -> str:
        return f"{quote(str(self.path))}: {self.shards.where(name)}"

    def _read(self, name: str) -> np.ndarray:
        array = self.shards.read(name)
        if not all_finite(array):
            raise CheckpointError(
                f"{quote(str(self.path))}: {self.shards.where(name)} holds NaN or infinity; the file is damaged"
            )
        return array


def open(path: Path | str, *, ignore_config: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in directory `path`, or in a GGUF file. Keys of config.json in `ignore_config` are passed over.

    `ConfigError` where config.json is damaged or asks for what is not implemented, `CheckpointError` where the weights
    are not exactly those of the model.
    """
    path = Path(path)
    if path.suffix == GGUF and path.is_file():
        from tinychat.checkpoint import gguf

        return gguf.open(path, ignore_config)
    if not path.is_dir():
        what = f"is a file; give the directory that holds it, or a {GGUF} file" if path.exists() else "does not exist"
        raise CheckpointError(f"{quote(str(path))} {what}")
    if not (path / "config.json").exists():
        raise ConfigError(
            f"{quote(str(path / 'config.json'))} is missing; give the directory of a checkpoint in Hugging Face's "
            f"layout, which has it beside *.safetensors, or a {GGUF} file"
        )
    hf_config = read_object(path / "config.json", ConfigError, MAX_CONFIG_BYTES)
    config, names = translate(hf_config, ignore_config)
    return Checkpoint(path, hf_config, config, names)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    rows = max(1, CHUNK // a.shape[1])
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, ConfigError, MAX_CONFIG_BYTES) if path.exists() else {}


def _quantization(path: Path, hf_config: dict[str, Any]) -> Layout | None:
    raw, where = hf_config.get("quantization_config"), f"quantization_config in {quote(str(path / 'config.json'))}"
    for name in _OLD_QUANT_CONFIGS:
        if raw is None:
            raw, where = _optional(path / name) or None, quote(str(path / name))
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is not an object")
    return layouts.parse(raw, where)
