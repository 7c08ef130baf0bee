"""The CPU backend: the decoder lowered to C++ (`csrc/decoder.cpp`), its weights packed for this CPU's instructions.

Every shape and dtype is checked here; C++ gets addresses. It imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinychat import rope
from tinychat.cache import KV_DTYPES, KVCache, Rows, kv_itemsize
from tinychat.config import Block, ModelConfig, QKNorm
from tinychat.cpuinfo import physical_cores, quota
from tinychat.errors import BackendError, UsageError
from tinychat.memory import Footprint
from tinychat.qtensor import HEAD_GROUP, AwqWords, QTensor, StoredCodes, Weight, bfloat16
from tinychat.sampling import FP32_MAX, SamplingParams
from tinychat.weights import NORMS, ROW_NORMS, Ends, Layer, Linear, WeightSource, norm_sizes

_cpu: Any = None
try:
    _cpu = importlib.import_module("tinychat._cpu")
except ImportError as error:
    _source_tree = Path(__file__).resolve().parents[2]
    _missing = f"its compiled kernels are missing ({error}); to have them, " + (
        f"run 'pip install .' in {_source_tree}: this is the source tree, in which nothing has been built"
        if (_source_tree / "CMakeLists.txt").exists()
        else "install tinychat anew where a C++ compiler is at hand (Debian: apt install g++ python3-dev)"
    )

FOOTPRINT = Footprint(program=64 << 20, maps=True)
MAX_THREADS = 1024
MOST_DRAWN = 1024  # top_k up to which C++ sorts what may be drawn
ROTATED_AHEAD = 256  # positions whose angles are looked up at a time
DRAWN_AHEAD = 64  # random numbers, likewise
PIECE_ROWS = 4096  # of a table of codes that are floats at a time
PIECE_WEIGHTS = 1 << 17  # of these that are made floats at a time: what stays in a cache


def available() -> str | None:
    """None, or why this backend cannot be used. BackendError where TINYCHAT_ISA asks for a level that is not there."""
    if _cpu is None:
        return _missing
    try:
        _cpu.isa()
    except RuntimeError as error:
        raise BackendError(str(error)) from None
    return None


def describe(threads: int | None = None) -> str:
    """One line: the instruction set and threads, as 'cpu (avx512vnni, 2 threads)'."""
    n = thread_count(threads)
    return f"cpu ({_cpu.isa()}, {n} thread{'s' if n > 1 else ''})"


def thread_count(threads: int | None) -> int:
    """`threads`, or TINYCHAT_THREADS, or one for each physical core. UsageError where it is not a sensible number."""
    if threads is None:
        name, given = "TINYCHAT_THREADS", os.environ.get("TINYCHAT_THREADS", "")
    else:
        name, given = "threads", str(threads)
    if not given:
        return min(physical_cores(), MAX_THREADS)
    if not given.isascii() or not given.isdigit() or len(given) > 9 or not 1 <= int(given) <= MAX_THREADS:
        raise UsageError(f"{name} is {given!r}; expected a number from 1 to {MAX_THREADS}")
    return int(given)


def _wanted_reading() -> Any:
    """How TINYCHAT_FETCH wants weights to be read (csrc/decoder.h: Reading); None: as it is fastest here."""
    name = os.environ.get("TINYCHAT_FETCH", "")
    ways = _cpu.Reading.__members__
    if name and name not in ways:
        raise UsageError(f"TINYCHAT_FETCH is {name!r}; expected one of {', '.join(ways)}")
    return ways.get(name)


def build(
    source: WeightSource,
    *,
    ctx_size: int,
    n_slots: int = 1,
    threads: int | None = None,
    kv_dtype: str = "fp16",
    activations: int = 16,
    head: int = 16,
    isa: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CpuRunner:
    """A runner of `source` with `n_slots` caches of `ctx_size` positions each.

    threads: see `thread_count`; kv_dtype fp16, fp32 or int8; activations: bits that they keep where they meet quantized
    weights, 16 or 8; head: 16 for the output head as it is stored, 8 to round it; isa: one of the levels that run
    here, by default the best or what TINYCHAT_ISA names; progress(done, total): called after each layer. Peak memory
    is the packed model and the source of one layer or the head. Raises UsageError for a wrong option,
    BackendError where this machine cannot hold or run the model.
    """
    for name, value in (("activations", activations), ("head", head)):
        if value not in (8, 16):
            raise UsageError(f"{name} {value!r}; it must be 8 or 16")
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype {kv_dtype!r}; the cpu backend has {', '.join(KV_DTYPES)}")
    if reason := available():
        raise BackendError(f"backend 'cpu' cannot be used here: {reason}")
    isa = isa or _cpu.isa()
    if isa not in _cpu.supported_isas().split():
        raise BackendError(f"instruction set {isa!r} does not run here; supported: {_cpu.supported_isas()}")
    config = source.config
    try:
        cache = KVCache(config.n_layers, n_slots, config.n_kv_heads, ctx_size, config.head_dim, kv_dtype)
        return CpuRunner(source, cache, isa, thread_count(threads), activations, head, progress)
    except MemoryError:
        need = n_slots * config.kv_bytes(ctx_size, kv_itemsize(kv_dtype))
        raise BackendError(
            f"not enough memory for the model and a KV cache of {need / 1e9:.2f} GB "
            f"({n_slots} x {ctx_size} positions); load with a smaller context (--ctx-size)"
        ) from None
    except RuntimeError as error:
        if "threads cannot be started" not in str(error):
            raise
        raise BackendError(f"{error}; ask for fewer (--threads or TINYCHAT_THREADS)") from None


@dataclass(frozen=True)
class Profile:
    """Where the time of steps went: `busy_s` is what all threads together spent inside the work of their phases."""

    steps: int
    step_s: float  # inside C++
    busy_s: float
    threads: int

    @property
    def kernel_s(self) -> float:
        """Seconds that a step takes if its threads do nothing but work: what is beyond is waiting and handing over."""
        return self.busy_s / self.threads / max(self.steps, 1)


class CpuRunner:
    """A `Runner` (see `backends`): weights in C++, the cache in numpy, one call per step. One step at a time."""

    draws_ahead = False

    def __init__(
        self,
        source: WeightSource,
        cache: KVCache,
        isa: str,
        n_threads: int,
        activations: int = 16,
        head: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.config = config = source.config
        self.cache = cache
        self._activations = activations
        self._reading = _wanted_reading()
        config.check_capacity(cache.capacity)
        granted = max(1, min(int(quota() or MAX_THREADS), MAX_THREADS))
        self._decoder = _cpu.Decoder(isa=isa, n_threads=n_threads, granted=granted, shape=_shape(config))
        self._rotary = rope.Tables(config.ropes, cache.capacity)
        for index in range(config.n_layers):
            self._add_layer(index, source.layer(index))
            if progress:
                progress(index + 1, config.n_layers)
        self.weight_bytes: int = self._add_ends(source, head)
        source.release()
        self.fetch: dict[str, str] | None = None  # of each linear, where there are several ways
        if _cpu.asks(isa):
            self.fetch = {linear: way.name for linear, way in self._decoder.readings.items()}

    def _add_ends(self, source: WeightSource, bits: int) -> int:
        """The final norm, the head in `bits`, and the embedding: rows of a tied head, or the table, read in place, or
        packed where it is one of codes. Returns the bytes of all weights but the table.
        """
        keep: list[np.ndarray] = []
        config = self.config
        vocab, hidden, width = config.vocab_size, config.hidden_size, config.table_width
        self._add_embedding_ends(source.ends(), keep)
        head = source.head()  # None where it is tied, once a stored copy is found equal
        table: Weight = getattr(source, "table", source.embed)()  # codes where a file holds these (`Checkpoint.table`)
        if table.shape != (vocab, width):
            raise ValueError(f"the embedding table is {table.shape}, expected {(vocab, width)}")
        tied = head is None
        head = Linear((table,)) if head is None else head
        norm, norm_bias = source.norm(), source.norm_bias()
        if (scale := config.logit_scale) != 1:  # of what the head reads, and of its bias: of logits
            if norm is None:
                raise ValueError("logits are scaled in the final norm, and there is none")
            norm, norm_bias = norm * scale, None if norm_bias is None else norm_bias * scale
            head = Linear(head.segments, None if head.bias is None else head.bias * scale)
        ready: Callable[[int], None] | None = None
        if tied and bits == 8 and isinstance(table, StoredCodes):
            segments, ready = _in_pieces(table, self._activations, keep)
            packed: tuple[list[tuple], int] = segments, 0
        else:
            packed = self._linear(head, vocab, width, "head", keep, bits)
        vectors = _vector(norm, hidden, "norm", keep), _vector(norm_bias, hidden, "norm's bias", keep)
        self._decoder.finish(vectors, packed, self._reading, ready)
        weight_bytes: int = self._decoder.weight_bytes
        if not tied and isinstance(table, np.ndarray):
            self._table = _lasting(table)
            self._decoder.set_embed(_float_type(self._table), self._table.ctypes.data)
        elif not tied:
            self._decoder.set_embed(self._linear(Linear((table,)), vocab, width, "embedding", keep))
        return weight_bytes

    def _add_embedding_ends(self, ends: Ends, keep: list[np.ndarray]) -> None:
        config = self.config
        hidden, width = config.hidden_size, config.table_width
        found = ends.positions is not None, ends.norm is not None, ends.project_in is not None
        expected = config.position_offset is not None, config.embed_norm, width != hidden
        if found != expected:
            raise ValueError(f"positions, norm, projections of the embedding: {found}, and the config says {expected}")
        type_, address, n_positions = _cpu.WeightType.f32, 0, 0
        if ends.positions is not None and config.position_offset is not None:
            self._positions = _lasting(ends.positions[config.position_offset :])
            type_, address = _float_type(self._positions), self._positions.ctypes.data
            n_positions = len(self._positions)
            if self._positions.shape != (config.max_positions, hidden):
                raise ValueError(f"learned positions are {self._positions.shape}")
        none: tuple[list[tuple], int] = ([], 0)
        into, back = ends.project_in, ends.project_out
        self._decoder.set_ends(
            positions_type=type_,
            positions=address,
            n_positions=n_positions,
            norm=(_vector(ends.norm, hidden, "norm", keep), _vector(ends.norm_bias, hidden, "norm's bias", keep)),
            project_in=none if into is None else self._linear(into, hidden, width, "project_in", keep),
            project_out=none if back is None else self._linear(back, width, hidden, "project_out", keep),
        )

    def _add_layer(self, index: int, layer: Layer) -> None:
        config = self.config
        keep: list[np.ndarray] = []
        sizes = norm_sizes(config)
        found = {name: getattr(layer, name) for name in NORMS}
        given = {name for name, values in found.items() if values is not None}
        if given != set(sizes):
            raise ValueError(f"a layer has the norms {sorted(given)}, and the config has {sorted(sizes)}")
        norms = {name: _vector(values, sizes.get(name, 0), name, keep) for name, values in found.items()}
        hidden, q_size = config.hidden_size, config.q_size
        self._decoder.add_layer(
            **{name: (norms[name], norms[f"{name}_bias"]) for name in ROW_NORMS},
            q_norm=norms["q_norm"],
            k_norm=norms["k_norm"],
            qkv=self._linear(layer.qkv, q_size + 2 * config.kv_size, hidden, "qkv", keep),
            out=self._linear(layer.out, hidden, q_size, "out", keep),
            **self._mlp(index, layer, keep),
        )

    def _mlp(self, index: int, layer: Layer, keep: list[np.ndarray]) -> dict[str, Any]:
        """What `_cpu.Decoder` takes for the MLP of a layer, or for its experts."""
        hidden, experts, factor = self.config.hidden_size, self.config.experts_of(index), 2 if self.config.gated else 1
        if experts is None:
            return {
                "up": self._linear(layer.up, self.config.up_size, hidden, "up", keep),
                "down": self._linear(layer.down, hidden, self.config.intermediate_size, "down", keep),
                "act_scale": _vector(layer.act_scale, self.config.intermediate_size, "act_scale", keep),
            }
        found = [linear for linear in (layer.router, layer.shared_up, layer.up) if linear]
        if any(linear.bias is not None for linear in found):
            raise BackendError("experts with biases; the cpu backend has none")
        stacked = (segment for linear in (*found, layer.down) for segment in linear.segments)
        if any(getattr(segment, "permutation", None) is not None for segment in stacked):
            raise BackendError("experts whose inputs are permuted (GPTQ's act-order); the cpu backend has none")
        rows = experts.router_size + factor * (experts.shared_size + experts.n_experts * experts.intermediate_size)
        together = Linear(tuple(segment for linear in found for segment in linear.segments))  # all read the same rows
        made: dict[str, Any] = {
            "experts": True,
            "up": self._linear(together, rows, hidden, "router, shared_up, up", keep),
            "down": self._linear(layer.down, experts.n_experts * hidden, experts.intermediate_size, "down", keep),
        }
        if layer.shared_down is not None:
            made["shared_down"] = self._linear(layer.shared_down, hidden, experts.shared_size, "shared_down", keep)
        return made

    def _linear(
        self, linear: Linear, n: int, k: int, name: str, keep: list[np.ndarray], bits: int = 16
    ) -> tuple[list[tuple], int]:
        """What `_cpu.Decoder` takes for a linear [n, k]: (segments, bias). `bits` 8: plain segments are rounded."""
        if linear.shape != (n, k) or any(segment.shape[1] != k for segment in linear.segments):
            raise ValueError(f"{name} is {[segment.shape for segment in linear.segments]}, expected {(n, k)} in all")
        bias = _vector(linear.bias, n, f"bias of {name}", keep)
        return [_segment(segment, self._activations, keep, bits) for segment in linear.segments], bias

    def step(self, rows: Rows) -> np.ndarray:
        """Run `rows`, extend the cache, return fp32 logits [len(rows.wanted), vocab_size].

        Raises ValueError where the rows do not continue their slots, or a token is not in the vocabulary.
        """
        cache = self.cache
        lengths = cache.check(rows)
        logits = np.empty((len(rows.wanted), self.config.vocab_size), np.float32)
        cos, sin = self._rotary.rows(rows.positions, lengths[rows.slots])
        self._decoder.step(
            rows.tokens,
            rows.embeddings,
            rows.positions,
            rows.slots,
            rows.wanted,
            cos,
            sin,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            logits,
        )
        cache.lengths[:] = lengths
        return logits

    def drawing(self, slot: int, params: SamplingParams, rng: np.random.Generator) -> Callable[[int], int] | None:
        """A function that runs a token at the end of `slot` and draws the next one, in C++: see `backends`.

        A small model's step takes less than a millisecond: Python does as little as it can for each token. The
        function raises ValueError where the cache is full.
        """
        vocab_size = self.config.vocab_size
        top_k = 0 if params.greedy else params.top_k
        drawn = params.greedy or 0 < top_k < min(vocab_size, MOST_DRAWN)
        if not drawn or params.needs_logits:
            return None
        cache = self.cache

        def turn(position: int) -> tuple[np.ndarray, ...]:  # keeps the runner, whose tables C++ reads
            ahead = np.arange(position, min(position + ROTATED_AHEAD, cache.capacity), dtype=np.int32)
            return tuple(np.ascontiguousarray(angles.swapaxes(0, 1)) for angles in self._rotary.rows(ahead, ahead + 1))

        follow: Callable[[int], int] = _cpu.follower(
            decoder=self._decoder,
            slot=slot,
            lengths=cache.lengths,
            keys=cache.keys,
            values=cache.values,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            top_k=top_k,
            temperature=min(params.temperature, FP32_MAX),
            top_p=params.top_p,
            min_p=params.min_p,
            turn=turn,
            random=None if params.greedy else partial(rng.random, DRAWN_AHEAD),
        )
        return follow

    def profile(self, on: bool) -> None:
        """Begin to measure steps anew, or stop: a few microseconds for each. See `profiled`."""
        self._decoder.profile(on)

    def profiled(self) -> Profile:
        """What was measured since `profile(True)`."""
        steps, step_ns, busy_ns, threads = self._decoder.profiled()
        return Profile(steps, step_ns / 1e9, busy_ns / 1e9, threads)


def _shape(config: ModelConfig) -> Any:
    """The numbers of `config`, as C++ has them."""
    c, shape = config, _cpu.DecoderShape()
    same = (
        "vocab_size hidden_size n_heads n_kv_heads head_dim intermediate_size norm_eps gated residual_scale embed_scale"
    )
    for name in [*same.split(), "slopes"]:
        setattr(shape, name, getattr(c, name))
    for name in ("clip_qkv", "attention_cap", "logit_cap"):
        setattr(shape, name, getattr(c, name) or 0.0)
    kinds = {(table.dim, table.interleaved) for table in c.ropes} or {(0, False)}
    if len(kinds) > 1:
        raise BackendError(f"layers rotate {sorted(kinds)} dimensions; the cpu backend has one way for all")
    shape.rope_dim, shape.rope_interleaved = kinds.pop()
    shape.norm_type = getattr(_cpu.NormType, c.norm.value)
    shape.activation = getattr(_cpu.Activation, c.activation.value)
    blocks = _cpu.BlockType
    other = blocks.post_norm if c.block is Block.POST_NORM else blocks.sequential
    shape.block = blocks.parallel if c.block.parallel else other
    shape.whole_qk_norm = c.qk_norm is QKNorm.WHOLE
    shape.attention_scale = c.score_scale
    shape.embed_size = c.table_width
    shape.windows = [c.window(layer) for layer in range(c.n_layers)]
    shape.ropes = [c.rope_index(layer) for layer in range(c.n_layers)]
    if (e := c.experts) is not None:
        shape.experts = _cpu.ExpertsShape(e.n_experts, e.n_used, e.intermediate_size, e.shared_size, e.normalized)
    return shape


def _lasting(table: np.ndarray) -> np.ndarray:
    """`table`, or a copy of one that can be written to and so is the caller's own; of a mapped file the pages serve."""
    shared = table.flags.c_contiguous and not table.flags.writeable
    return table if shared else np.array(table, order="C")


def _kept(array: np.ndarray, keep: list[np.ndarray]) -> int:
    """The array's address, contiguous; `keep` holds it alive until the call that reads it is over."""
    keep.append(np.ascontiguousarray(array))
    return keep[-1].ctypes.data


def _vector(values: np.ndarray | None, n: int, name: str, keep: list[np.ndarray]) -> int:
    if values is None:
        return 0
    if values.shape != (n,):
        raise ValueError(f"{name} is {values.shape}, expected ({n},)")
    return _kept(values.astype(np.float32, copy=False), keep)


def _segment(weight: Weight, activations: int, keep: list[np.ndarray], bits: int) -> tuple:
    """SegmentArgs of csrc/bind_decoder.cpp; a plain weight is rounded where `bits` is 8."""
    (n, k), source, types = weight.shape, _cpu.Source.codes, _cpu.WeightType
    if isinstance(weight, np.ndarray):
        kind, address = _float_type(weight), _kept(weight, keep)
        if bits == 16:
            return _cpu.LinearShape(kind, n, k, k, False), source, address, 0, 0, 0, 0, 0
        shape = _cpu.LinearShape(types.quantized, n, k, min(HEAD_GROUP, k), False, bits, activations)
        return shape, getattr(_cpu.Source, kind.name), address, 0, 0, 0, 0, 0
    wide = weight.scales.dtype != np.float16
    scales = weight.scales.astype(np.float32, copy=False) if wide else weight.scales
    kept, group = FOOTPRINT.kept(weight.bits), min(weight.group_size, k)
    shape = _cpu.LinearShape(types.quantized, n, k, group, wide, kept, activations)
    if isinstance(weight, AwqWords):
        grids = _kept(scales, keep), _kept(weight.qzeros, keep)
        return shape, _cpu.Source.awq, _kept(weight.qweight, keep), *grids, 0, 0, 0
    grids = _kept(scales, keep), _kept(weight.zeros, keep)
    order = 0 if weight.permutation is None else _kept(weight.permutation, keep)
    if isinstance(weight, QTensor):
        return shape, source, _kept(weight.codes, keep), *grids, order, 0, 0
    stored, source = weight.stored, getattr(_cpu.Source, weight.source)
    needed = _cpu.stored_bytes(source, k, kept)
    if (kept != weight.bits and source == _cpu.Source.stream) or stored.shape[1] * stored.itemsize < needed:
        raise ValueError(f"{weight.bits} bits of {k} inputs in {stored.dtype} {stored.shape}, as {weight.source!r}")
    if source != _cpu.Source.stream or any(stride % stored.itemsize for stride in stored.strides):
        stored = np.ascontiguousarray(stored)
    keep.append(stored)
    row, word = (stride // stored.itemsize for stride in stored.strides)
    return shape, source, stored.ctypes.data, *grids, order, row, word


def _in_pieces(
    table: StoredCodes, activations: int, keep: list[np.ndarray]
) -> tuple[list[tuple], Callable[[int], None]]:
    """A table of codes that is a head in 8 bits: segments of it, and what is called before each is read.

    They share one array of floats: the table is never widened as a whole.
    """
    n, k = table.shape
    floats = np.empty((min(n, PIECE_ROWS), k), np.float16)
    together = max(1, PIECE_WEIGHTS // k)

    def ready(index: int) -> None:
        end = min((index + 1) * PIECE_ROWS, n)
        for first in range(index * PIECE_ROWS, end, together):
            rows = table.rows(slice(first, min(first + together, end))).tensor()
            floats[first - index * PIECE_ROWS :][: len(rows.codes)] = rows.dequantize(np.float16)

    pieces = (floats[: n - first] for first in range(0, n, PIECE_ROWS))
    return [_segment(piece, activations, keep, 8) for piece in pieces], ready


def _float_type(values: np.ndarray) -> Any:
    types = _cpu.WeightType
    kinds = {np.dtype(np.float32): types.f32, np.dtype(np.float16): types.f16, bfloat16: types.bf16}
    if values.dtype not in kinds:
        raise ValueError(f"a weight of {values.dtype}; expected float32, float16 or bfloat16")
    return kinds[values.dtype]
