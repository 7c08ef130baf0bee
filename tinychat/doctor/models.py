"""Which models fit into a machine's memory, at which context, and how fast they can be at most.

Published shapes at 4 bits with an 8-bit head, or one checkpoint as it is. Sizes are `memory.estimate`'s, bytes a token
`bench.traffic`'s; nothing is loaded.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from tinychat import checkpoint, engine, memory
from tinychat.bench import shapes, traffic
from tinychat.bench.random_weights import RandomWeights
from tinychat.errors import ConfigError

WORTHWHILE = 512  # tokens of context: a model that does not fit with these does not fit
SPEED_CONTEXT = 256  # at which a token's traffic is taken
STEP = 64  # contexts below a model's own limit are rounded down to a multiple
BOARDS = (1, 2, 4, 8)  # GiB
# What a system without a desktop leaves of so many bytes: firmware, kernel and page tables take a share, services the
# rest. An assumption; `tinychat doctor` on the board itself counts what is there.
SHARE_LEFT, TAKEN = 0.95, 350e6


class Sized:
    """A model of which only sizes are wanted."""

    def __init__(
        self,
        source: RandomWeights | checkpoint.Checkpoint,
        footprint: memory.Footprint,
        kv_dtype: str = "fp16",
        head: int | None = None,
    ):
        self.source, self.footprint = source, footprint
        self.kv_dtype, self.head = kv_dtype, engine.head_bits(head, source.n_quantized)
        self.limit = engine.max_context_size(source.config)
        self.traffic = traffic.of(source, head_bits=self.head, kv_dtype=kv_dtype)

    def needs(self, context: int) -> dict[str, int]:
        """See `memory.estimate`."""
        return memory.needed(self.source, self.footprint, context, head=self.head, kv_dtype=self.kv_dtype)

    def longest(self, free: int | None) -> int | None:
        """The longest context that `free` bytes hold; None where it would be less than is worthwhile, the model's own
        limit where nobody knows how much is free."""
        if free is None or self.needs(self.limit)["total"] <= free:
            return self.limit
        found = bisect_right(range(self.limit + 1), free, key=lambda context: self.needs(context)["total"]) - 1
        found -= found % STEP
        return found if found >= min(WORTHWHILE, self.limit) else None

    def speed(self, measured: dict[str, Any] | None, cache_bytes: int | None) -> dict[str, Any] | None:
        """Tokens a second that 'memory' and 'arithmetic' allow (None where they set no limit that is known), the least
        of them as 'at_most', and which it is as 'limit'. None without a measurement."""
        if measured is None:
            return None
        need, source = self.traffic, self.source
        cached = cache_bytes is not None and need.weights <= cache_bytes
        limits: dict[str, float | None] = {
            "memory": None if cached else measured["gb_s"] * 1e9 / need.token(SPEED_CONTEXT),
            "arithmetic": None,
        }
        if source.n_quantized and measured["weights_per_s"] is not None:
            used = source.n_quantized * (1 - need.idle / need.quantized)
            head = source.config.vocab_size * source.config.table_width
            limits["arithmetic"] = measured["weights_per_s"] / (used + head)
        known = {name: value for name, value in limits.items() if value is not None}
        least = min(known, key=lambda name: known[name], default=None)
        return {**limits, "at_most": None if least is None else known[least], "limit": least}


def published(
    footprint: memory.Footprint,
    free: int | None,
    measured: dict[str, Any] | None = None,
    cache_bytes: int | None = None,
    kv_dtype: str = "fp16",
) -> list[dict[str, Any]]:
    """Every published shape, smallest first: its parameters, what it needs at a worthwhile context, the longest context
    in `free` bytes (None: it does not fit), its speed."""
    rows = []
    for name, sized in _shapes(footprint, kv_dtype):
        context = sized.longest(free)
        rows.append(
            {
                "name": name,
                "n_parameters": sized.source.n_parameters,
                "needs": sized.needs(min(WORTHWHILE, sized.limit))["total"],
                "longest_context": context,
                "limit": sized.limit,
                "bytes_per_token": round(sized.traffic.token(SPEED_CONTEXT)),
                "tokens_per_s": sized.speed(measured, cache_bytes),
            }
        )
    return sorted(rows, key=lambda row: row["needs"])


def board_table(footprint: memory.Footprint) -> str:
    """Markdown: the longest context of each published shape on boards of 1 to 8 GB, with a KV cache of 16 bits and,
    where that allows more, of 8; shapes that fit nowhere are left out."""
    both = zip(_shapes(footprint, "fp16"), _shapes(footprint, "int8"), strict=True)
    rows = []
    for (name, wide), (_, narrow) in sorted(both, key=lambda pair: pair[0][1].needs(0)["total"]):
        cells = [_cell(wide, narrow, int(SHARE_LEFT * size * 2**30 - TAKEN)) for size in BOARDS]
        if any(cell != "no" for cell in cells):
            needs = wide.needs(WORTHWHILE)["total"]
            rows.append(f"| {name} | {memory.megabytes(needs)} | {' | '.join(cells)} |")
    sizes = " | ".join(f"{size} GB" for size in BOARDS)
    head = [f"| 4 bits | needs at context {WORTHWHILE} | {sizes} |", "|---" * (2 + len(BOARDS)) + "|"]
    return "\n".join([*head, *rows])


def checked(
    source: checkpoint.Checkpoint,
    footprint: memory.Footprint,
    free: int | None,
    asked: int | None,
    measured: dict[str, Any] | None,
    cache_bytes: int | None,
    kv_dtype: str = "fp16",
    head: int | None = None,
) -> dict[str, Any]:
    """Whether one checkpoint fits at the context asked for (by default `engine.context_size`'s), and its speed."""
    sized = Sized(source, footprint, kv_dtype, head)
    context = engine.context_size(source.config, asked)
    needs = sized.needs(context)
    return {
        "n_parameters": source.n_parameters,
        "weights": engine.precision(source),
        "context": context,
        "needs": needs,
        "fits": free is None or needs["total"] <= free,
        "longest_context": sized.longest(free),
        "longest_context_int8": Sized(source, footprint, "int8", head).longest(free),
        "limit": sized.limit,
        "bytes_per_token": round(sized.traffic.token(SPEED_CONTEXT)),
        "tokens_per_s": sized.speed(measured, cache_bytes),
    }


def _shapes(footprint: memory.Footprint, kv_dtype: str) -> list[tuple[str, Sized]]:
    found = []
    for name, shape in shapes.SHAPES.items():
        try:
            source = RandomWeights(*shape.translate(), shape.group_size)
        except ConfigError:  # a family that is not implemented
            continue
        found.append((name, Sized(source, footprint, kv_dtype)))
    return found


def _cell(wide: Sized, narrow: Sized, free: int) -> str:
    """The longest contexts with a cache of 16 and of 8 bits."""
    contexts = wide.longest(free), narrow.longest(free)
    words = ["no" if c is None else f"all {c}" if c == wide.limit else str(c) for c in contexts]
    return words[0] if words[0] == words[1] else f"{words[0]}, int8 {words[1]}"
