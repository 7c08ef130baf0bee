"""Traffic: the bytes that decoding one token has to read, counted from the weights' sizes: no padding, no estimate.

Codes, scales and zeros as a file holds them, the head at the precision it runs in, one row of the embedding table,
norms and biases, and the keys and values of the positions that the token sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinychat import checkpoint
from tinychat.bench.random_weights import RandomWeights
from tinychat.cache import kv_itemsize
from tinychat.checkpoint.inventory import segments
from tinychat.config import ModelConfig
from tinychat.qtensor import HEAD_GROUP


@dataclass(frozen=True)
class Traffic:
    """Bytes by what they are for.

    body       everything but the tables: codes, scales, zeros, plain linears, norms, biases
    quantized  of it, codes with their scales and zeros
    head       the output head, a tied table included
    row        one token's embedding
    table      the embedding table where it is not the head: resident, not read
    idle       of the body, experts that a token does not use: resident, not read
    """

    config: ModelConfig
    body: float
    quantized: float
    head: float
    row: float
    table: float
    kv_itemsize: int
    idle: float = 0

    @property
    def weights(self) -> float:
        """What every token reads."""
        return self.body - self.idle + self.head + self.row

    def kv(self, context: float) -> float:
        """Keys and values that a token sees which is the `context`-th of its text (itself included)."""
        c = self.config
        seen = sum(min(context, c.window(layer) or context) for layer in range(c.n_layers))
        return seen * c.kv_bytes(1, self.kv_itemsize) / c.n_layers

    def token(self, context: float) -> float:
        """All that this token reads."""
        return self.weights + self.kv(context)


def of(source: RandomWeights | checkpoint.Checkpoint, *, head_bits: int = 16, kv_dtype: str = "fp16") -> Traffic:
    """The traffic of `source`. `head_bits` 8: a head that is not quantized is rounded to 8 bits at load."""
    c = source.config
    found = _of_random(source, head_bits) if isinstance(source, RandomWeights) else _of_files(source, head_bits)
    body, quantized, head, table, experts = found
    idle = experts * (1 - c.experts.n_used / c.experts.n_experts) if c.experts else 0
    table_row, apart = table / c.vocab_size, 0 if c.tied_head else table
    return Traffic(c, body, quantized, head, table_row, apart, kv_itemsize(kv_dtype), idle)


def _of_random(source: RandomWeights, head_bits: int) -> tuple[float, float, float, float, float]:
    """See `_of_files`."""
    c = source.config
    table = source.table_bytes
    body = source.file_bytes - table * (1 if c.tied_head else 2)
    return body, source.quantized_bytes, _plain_head(c, head_bits, table), table, source.expert_bytes


def _of_files(source: checkpoint.Checkpoint, head_bits: int) -> tuple[float, float, float, float, float]:
    """Bytes of the body, of what is quantized in it, of the head, of the embedding table and of the experts."""
    shards, names = source.shards, source.names
    infos = {name: shards.info(name) for name in shards.names}
    sizes = {name: info.end - info.begin for name, info in infos.items()}
    sizes.pop(f"{names.embed}.weight")
    table = source.table_bytes
    sizes.pop(f"{names.positions}.weight", None)  # one row is read
    head_bias = sizes.pop(f"{names.head}.bias", 0)
    stored = sum(sizes.pop(name) for name in list(sizes) if name.startswith(f"{names.head}."))
    head: float = table if source.config.tied_head else stored
    if names.head not in source.quantized:
        head = _plain_head(source.config, head_bits, head)
    body = {name: size for name, size in sizes.items() if not name.endswith((*names.ignored, ".g_idx"))}
    parts = (name for name in body if not name.endswith(".bias"))
    quantized = sum(body[name] for name in parts if name.rpartition(".")[0] in source.quantized)
    sparse = source.config.experts.layers if source.config.experts else ()
    places = [(linear, layer) for layer in sparse for linear in ("up", "down")]
    modules = {part.module for place in places for part in segments(source.config, names, *place)}
    experts = sum(size for name, size in body.items() if name.rpartition(".")[0] in modules)
    return sum(body.values()), quantized, head + head_bias, table, experts


def _plain_head(config: ModelConfig, bits: int, stored: float) -> float:
    """Bytes of a head's weights that take `stored` of them where they are not rounded to 8 bits at load."""
    return config.vocab_size * config.table_width * (1 + 2 / HEAD_GROUP) if bits == 8 else stored
