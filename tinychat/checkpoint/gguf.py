"""A GGUF file as a checkpoint: configuration, weights, tokenizer and chat template of a model of Llama's kind.

Tensor names and metadata become those of Hugging Face, so that `architectures` and `Checkpoint` check them as they do
there. In files of Llama the rows of q and k have llama.cpp's order, a rotated pair are neighbours; ours are the halves
of a head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat import rope
from tinychat.architectures import translate
from tinychat.checkpoint.gguf_file import GgufFile, Plain, Quantized
from tinychat.checkpoint.inventory import Segment
from tinychat.checkpoint.quoting import listing, quote
from tinychat.checkpoint.reader import Checkpoint
from tinychat.checkpoint.safetensors_file import TensorInfo
from tinychat.config import Rope, RopeScaling
from tinychat.errors import ConfigError, TokenizerError
from tinychat.qtensor import StoredCodes, Weight
from tinychat.tokenizer import Tokenizer
from tinychat.tokenizer.gguf_vocabulary import Vocabulary

FAMILIES = ("llama", "qwen2", "qwen3")  # so called by general.architecture and by config.json
_MODULES = {  # of a block
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = {"token_embd.weight": _EMBED, "output_norm.weight": "model.norm.weight", "output.weight": _HEAD}
_KEYS = {  # after the family's name, and in config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_HARMLESS = ("vocab_size", "rope.scaling.finetuned")
_FACTORS = "rope_freqs.weight"  # fp32 [head_dim / 2]: frequencies are divided by it
_LLAMA3 = 1.0, 4.0, 8192  # low_freq_factor, high_freq_factor, original_max_position_embeddings of all there are


@dataclass(frozen=True)
class Quantization:
    """Of most of the quantized weights, for reports."""

    bits: int
    group_size: int
    method: str = "gguf"


class GgufTensors:
    """The tensors of a file under Hugging Face's names, with the methods of `Shards`."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.directory, self.files, self.nbytes = file.path, [file], file.nbytes
        self._stored = {_renamed(name): name for name in file.tensors if name != _FACTORS}
        self.turned: dict[str, int] = {}  # module: its heads, where rows have llama.cpp's order

    @property
    def names(self) -> set[str]:
        """See `Shards`."""
        return set(self._stored)

    def info(self, name: str) -> TensorInfo:
        """See `Shards`; a quantized one counts as F16, which `read` makes of it."""
        tensor = self.file.tensors[self._stored[name]]
        dtype = tensor.kind.name if isinstance(tensor.kind, Plain) else "F16"
        return TensorInfo(dtype, tensor.shape, tensor.begin, tensor.begin + tensor.nbytes)

    def where(self, name: str) -> str:
        """See `Shards`."""
        return quote(self._stored[name])

    def kind(self, name: str) -> Quantized | None:
        """How tensor `name` is quantized; None where it is not."""
        kind = self.file.tensors[self._stored[name]].kind
        return kind if isinstance(kind, Quantized) else None

    def read(self, name: str) -> np.ndarray:
        """See `Shards`."""
        table = self.file.table(self._stored[name])
        heads = self._turned(name)
        return table if heads is None else table[_halves(len(table), heads)]

    def quantized(self, name: str) -> StoredCodes:
        """Tensor `name`, which is."""
        weight = self.file.quantized(self._stored[name])
        heads = self._turned(name)
        return weight if heads is None else weight.rows(_halves(weight.shape[0], heads))

    def _turned(self, name: str) -> int | None:
        return self.turned.get(name.rpartition(".")[0])

    def release(self) -> None:
        """See `Shards`."""
        self.file.release()


class GgufCheckpoint(Checkpoint):
    """A `Checkpoint` of one file; `path` is the file's."""

    def __init__(self, tensors: GgufTensors, hf_config: dict[str, Any], ignore_config: Collection[str] = ()):
        path, (config, names) = tensors.file.path, translate(hf_config, ignore_config)
        super().__init__(path, hf_config, config, names, tensors)  # type: ignore[arg-type]  # in place of Shards
        self._tensors = tensors
        if config.model_type == "llama":
            for layer in range(config.n_layers):
                for module, heads in zip(names.qkv, (config.n_heads, config.n_kv_heads), strict=False):
                    tensors.turned[names.layer.format(layer) + module] = heads
        kinds = {name: kind for name in tensors.names if (kind := tensors.kind(name))}
        table = 2 * config.vocab_size * config.hidden_size
        # As memory.estimate knows tables: in 16 bits, a tied one as `table_bytes` has it.
        for name in {_EMBED, _HEAD} & kinds.keys():
            info, tied = tensors.info(name), name == _EMBED and config.tied_head
            self.file_bytes += (self.table_bytes if tied else table) - (info.end - info.begin)
        if kinds.pop(_EMBED, None) and not config.tied_head:
            self.file_bytes += self.table_bytes  # it is not mapped
        self.quantized = {name.rpartition(".")[0] for name in kinds}
        self.n_quantized = sum(math.prod(tensors.info(name).shape) for name in kinds)
        if kinds:
            most = Counter(kinds.values()).most_common(1)[0][0]
            self.bits = most.bits
            self.quantization = Quantization(most.bits, most.group_size)  # type: ignore[assignment]  # not a Layout

    def tokenizer(self) -> Tokenizer | None:
        """See `Checkpoint`."""
        return _tokenizer(self._tensors.file)

    def table(self) -> Weight:
        """See `Checkpoint`; codes where they are stored."""
        return self._tensors.quantized(_EMBED) if self._tensors.kind(_EMBED) else self.embed()

    @property
    def table_bytes(self) -> int:
        """See `Checkpoint`."""
        kind = self._tensors.kind(_EMBED)
        if kind is None:
            return super().table_bytes
        bits = {4: 4, 6: 8, 8: 8}[kind.bits] + (40 if kind.name == "Q6_K" else 24) / kind.group_size  # scale and zero
        return int(math.prod(self._tensors.info(_EMBED).shape) * bits / 8)

    def _weight(self, segment: Segment) -> Weight:
        name = f"{segment.module}.weight"
        return self._tensors.quantized(name) if segment.module in self.quantized else self._read(name)


def open(path: Path, ignore_config: Collection[str] = ()) -> GgufCheckpoint:
    """See `checkpoint.open`."""
    tensors = GgufTensors(GgufFile(path))
    try:
        return GgufCheckpoint(tensors, _config(tensors), ignore_config)
    except ConfigError as error:
        raise ConfigError(f"{quote(str(path))}, its metadata read as a config.json: {error}") from None


def _renamed(name: str) -> str:
    """Hugging Face's name for a tensor; its own where there is none, which is then refused as left over."""
    block, _, rest = name.removeprefix("blk.").partition(".")
    module, _, ending = rest.rpartition(".")
    if name.startswith("blk.") and module in _MODULES:
        return f"model.layers.{block}.{_MODULES[module]}.{ending}"
    return _ENDS.get(name, name)


def _halves(n: int, heads: int) -> np.ndarray:
    """Where the rows of heads are whose rotated pairs are neighbours, for them to be halves: int [n]."""
    return np.arange(n).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _config(tensors: GgufTensors) -> dict[str, Any]:
    """The metadata as a config.json."""
    metadata = tensors.file.metadata
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ConfigError(
            f"general.architecture {quote(family)} is not read from GGUF, only {', '.join(FAMILIES)} are; take the "
            f"model's original checkpoint"
        )
    keys = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    values = {name: _exact(keys.pop(key)) for key, name in _KEYS.items() if key in keys}
    for key in _HARMLESS:
        keys.pop(key, None)
    if _EMBED not in tensors.names or len(tensors.info(_EMBED).shape) != 2:
        raise ConfigError("there is no token_embd.weight, a table; a file of a vocabulary alone is no model")
    table = tensors.info(_EMBED)
    n_heads, hidden_size = values.get("num_attention_heads"), values.get("hidden_size")
    if type(n_heads) is not int or type(hidden_size) is not int or n_heads < 1:
        raise ConfigError(f"{family}.attention.head_count and .embedding_length must be one number for all layers")
    head_dim = values.setdefault("head_dim", hidden_size // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.pop(key, head_dim) != head_dim:
            raise ConfigError(f"{family}.{key} differs from the length of a key, {head_dim}, which is not implemented")
    scaling = _scaling(tensors.file, keys, Rope(values.get("rope_theta", 10000.0), head_dim))
    if keys:
        raise ConfigError(f"not implemented: {listing([f'{family}.{key} = {value}' for key, value in keys.items()])}")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    biased = {} if family == "qwen2" else {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors.names}
    return {
        "model_type": family,
        **values,
        **biased,
        **({"rope_scaling": scaling} if scaling else {}),
        "vocab_size": table.shape[0],
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[table.dtype],
        "tie_word_embeddings": _HEAD not in tensors.names,
        "eos_token_id": [end for end in ends if end is not None],
    }


def _exact(value: Any) -> Any:
    """Of an fp32 the shortest number that it is: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(file: GgufFile, keys: dict[str, Any], plain: Rope) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, from keys that it takes out, or from the factors that Llama 3's comes to."""
    kind, factor = keys.pop("rope.scaling.type", "none"), keys.pop("rope.scaling.factor", None)
    original = keys.pop("rope.scaling.original_context_length", None)
    if _FACTORS in file.tensors:
        factors = file.table(_FACTORS).astype(np.float32)
        (low, high, original), factor = _LLAMA3, max(1.0, float(factors.max(initial=1)))
        stretched = Rope(plain.theta, plain.dim, RopeScaling.LLAMA3, factor, original, low, high)
        wanted = rope.inv_freq(plain, 1)[0] / rope.inv_freq(stretched, 1)[0]
        if kind != "none" or factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-4):
            raise ConfigError(f"{_FACTORS} are not what Llama 3 divides frequencies by; no others are known")
        found = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
        found |= {"low_freq_factor": low, "high_freq_factor": high}
        return found
    if kind == "none":
        return None
    values = {"factor": _exact(factor), "original_max_position_embeddings": original if kind == "yarn" else None}
    return {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}


def _tokenizer(file: GgufFile) -> Tokenizer | None:
    """From the metadata; None where there is no vocabulary."""
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    if found.get("model", "no_vocab") == "no_vocab" and "tokens" not in found:
        return None
    try:
        return Vocabulary(found).tokenizer(file.metadata.get("tokenizer.chat_template"))
    except TokenizerError as error:
        raise TokenizerError(f"{quote(str(file.path))}: {error}") from None
