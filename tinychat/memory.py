"""What a model needs in memory, estimated from the size of its files, and what the machine has left."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinychat.cache import kv_itemsize
from tinychat.config import ModelConfig
from tinychat.cpuinfo import control_groups, number
from tinychat.errors import BackendError
from tinychat.qtensor import HEAD_GROUP

_ROOT = Path("/")
_DIGITS = re.compile("[0-9]{1,20}")
UNCHECKED = "TINYCHAT_NO_MEMORY_CHECK"  # set to 1: load whatever the estimate says


@dataclass(frozen=True)
class Footprint:
    """What a backend takes beyond a checkpoint's weights and the KV cache; each backend states its own.

    program     bytes of interpreter, libraries and buffers
    widths      bits that codes are kept in: the least of these that holds them
    step_bytes  of a weight while a step computes with it, one part of the model at a time; 0: it is used as it is kept
    maps        codes are packed from the mapped words, and an embedding table that is not the head is read in its file,
                where it is one of floats
    """

    program: int
    widths: tuple[int, ...] = (2, 3, 4, 8)
    step_bytes: int = 0
    maps: bool = False

    def kept(self, bits: int) -> int:
        """What codes of `bits` are kept in; BackendError where no width holds them."""
        for width in self.widths:
            if width >= bits:
                return width
        raise BackendError(f"a weight of {bits} bits; at most {max(self.widths)} are supported")


def estimate(
    config: ModelConfig,
    file_bytes: int,
    n_quantized: int,
    footprint: Footprint,
    ctx_size: int,
    *,
    bits: int = 4,
    n_slots: int = 1,
    kv_itemsize: int = 2,
    head: int = 16,
    table_bytes: int | None = None,
) -> dict[str, int]:
    """Bytes that a running model occupies: 'weights', 'kv_cache', 'working', 'overhead', and their sum as 'total'.

    file_bytes   of the checkpoint's weight files
    n_quantized  weights of `bits` among them
    kv_itemsize  bytes of one number in the KV cache
    head         bits of the output head: 16 as it is stored, or 8
    table_bytes  of the embedding table as it is stored, where it is not of the config's floats

    Weights take what they take in the files, codes what the backend keeps them in; a tied head shares the embedding's.
    While one part is packed (a layer, the table, a head of its own) its source is in memory too: as it is mapped, or
    codes of a byte and the words they came from. The KV cache is touched only afterwards, so 'working' is what the
    largest part takes beyond it, or in a step, whichever is more.
    """
    c = config
    mlp = max(sum(c.mlp_sizes(layer).values()) for layer in range(c.n_layers))
    block = c.hidden_size * (2 * c.q_size + 2 * c.kv_size) + mlp
    kv_cache = n_slots * c.kv_bytes(ctx_size, kv_itemsize)
    table, itemsize = c.vocab_size * c.table_width, 4 if c.dtype == "float32" else 2
    weights = file_bytes + (footprint.kept(bits) - bits) * n_quantized // 8
    tied = table_bytes if c.tied_head and table_bytes is not None else itemsize * table
    if head == 8:
        weights += int((1 + 3 / HEAD_GROUP) * table) - tied  # code, and a group's scale and zero
    elif not footprint.maps:
        weights += itemsize * table - tied  # of codes it is widened
    if footprint.maps and not c.tied_head:
        weights -= itemsize * table
    in_words = footprint.maps and n_quantized > 0
    of_words = (bits + (0.4 if bits == 4 else 1.5)) / 8  # scales and zeros of other layouts than AWQ's are copied
    of_table = table_bytes if footprint.maps and table_bytes is not None else itemsize * table
    source = max((of_words if in_words else itemsize) * block, of_table)
    parts = {
        "weights": weights,
        "kv_cache": kv_cache,
        "working": max(int(source) - kv_cache, footprint.step_bytes * max(block, table), 0),
        "overhead": footprint.program,
    }
    return {**parts, "total": sum(parts.values())}


class SizedWeights(Protocol):
    """What `estimate` asks of weights: a checkpoint's, or random ones."""

    config: ModelConfig

    @property
    def file_bytes(self) -> int:
        """Of the weight files."""

    @property
    def n_quantized(self) -> int:
        """Weights of `bits` among them."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def table_bytes(self) -> int:
        """Of the embedding table as it is stored."""


def needed(
    source: SizedWeights, footprint: Footprint, ctx_size: int, *, head: int, kv_dtype: str = "fp16", n_slots: int = 1
) -> dict[str, int]:
    """The `estimate` for `source`."""
    return estimate(
        source.config,
        source.file_bytes,
        source.n_quantized,
        footprint,
        ctx_size,
        bits=source.bits,
        n_slots=n_slots,
        kv_itemsize=kv_itemsize(kv_dtype),
        head=head,
        table_bytes=source.table_bytes,
    )


def available(root: Path = _ROOT) -> int | None:
    """Bytes this process may still take: the least of the machine's, the control group's and the rlimit's; or None.

    root  what the system says of itself is read below it; of another machine's there is no rlimit
    """
    limits = system(root).get("MemAvailable"), group_room(root), _address_space() if root == _ROOT else None
    return min((limit for limit in limits if limit is not None), default=None)


def group_room(root: Path = _ROOT) -> int | None:
    """Bytes that the control group still grants; None where there is no limit."""
    groups = control_groups("memory", root)
    rooms = (_v1_room(group) if version == 1 else _v2_room(group) for version, group in groups)
    return min((room for room in rooms if room is not None), default=None)


def system(root: Path = _ROOT) -> dict[str, int]:
    """Bytes by their names in /proc/meminfo (MemTotal, SwapFree, ...); empty where the system does not tell."""
    return {name: kilobytes * 1024 for name, kilobytes in _fields(root / "proc/meminfo").items()}


def check(needed: dict[str, int], ctx_size: int, free: int | None, option: str = "--ctx-size") -> None:
    """BackendError where `needed` (see `estimate`) is more than the bytes `free`; None: unknown, not checked.

    `option` is what asks for a context. `TINYCHAT_NO_MEMORY_CHECK=1` skips it.
    """
    if free is None or needed["total"] <= free or os.environ.get(UNCHECKED, "0") not in ("", "0"):
        return
    probe = f", {megabytes(needed['probe'])} read probe" if "probe" in needed else ""
    raise BackendError(
        f"the model needs about {megabytes(needed['total'])} of memory ({megabytes(needed['weights'])} weights, "
        f"{megabytes(needed['kv_cache'])} KV cache at context {ctx_size}{probe}) and {megabytes(free)} are available; "
        f"choose a smaller context ({option}) or model, or set {UNCHECKED}=1 to try all the same"
    )


def peak_rss() -> int | None:
    """Bytes of this process that were resident at the most; None where the system does not tell."""
    # Not getrusage where it can be helped: on Linux its figure begins with that of the program which started this one.
    kilobytes = _fields(Path("/proc/self/status")).get("VmHWM")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Give the system what was freed and the C library keeps for later (glibc does): it counts as memory in use."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not on Windows, not of another C library
        return None


def megabytes(n: int) -> str:
    """`n` bytes in words, to the nearest MB; of a few MB or GB, to a tenth."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 9.95e6 else f"{n / 1e6:.1f} MB"


def _fields(path: Path) -> dict[str, int]:
    """The 'name number' lines of a file of /proc or of a control group; empty where it cannot be read."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text(errors="replace").splitlines()]
    except (OSError, ValueError):
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) >= 2 and _DIGITS.fullmatch(line[1])}


def _room(limit: int | None, usage: int | None, reclaimable: int) -> int | None:
    """What a control group leaves; the page cache in its usage is given back when needed."""
    if limit is None or usage is None or limit >= 1 << 60:  # v1 writes "no limit" as a huge number
        return None
    return max(0, limit - usage + reclaimable)


def _v2_room(group: Path) -> int | None:
    stat = _fields(group / "memory.stat")
    cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return _room(number(group / "memory.max"), number(group / "memory.current"), cached)


def _v1_room(group: Path) -> int | None:
    stat = _fields(group / "memory.stat")
    cached = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return _room(number(group / "memory.limit_in_bytes"), number(group / "memory.usage_in_bytes"), cached)


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _fields(Path("/proc/self/status")).get("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used * 1024)
