"""Probe: how fast this machine reads memory, measured in slices between the tokens of a run.

The bandwidth of two threads may jump between two modes within seconds, as a hypervisor moves its cores, and another
guest may take a share at any moment. So a slice is read right before and right after each stretch of decoding, in the
same process and with as many threads, and speeds are compared pair by pair: what changes for a while changes both sides
of the pairs in it, and the few pairs that straddle a change are outvoted by the median.

A slice takes milliseconds: long beside starting its threads, short beside the stretches of tokens. Slices walk through
a buffer of 1 GiB, so that no cache serves them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

from tinychat import memory
from tinychat.backends.cpu_linear import aligned, extension

BUFFER_BYTES = 1 << 30
SLICE_BYTES = 128 << 20  # of each thread
READ_BYTES = 1 << 30  # at least, in all
UNSTEADY = 0.25  # neighbouring slices differ by more than this: the machine is too busy to compare anything
CROWDED = 0.9  # of the time that its threads had a core: with less, other programs or too many threads slow it down
TOO_SLOW = 1.1  # of the probe's speed: a model that reads memory faster shows that the probe is not the limit


class Probe:
    """Reads memory with `threads` threads at once, one linear stream each."""

    def __init__(self, threads: int):
        self.threads = threads
        size = BUFFER_BYTES
        if (free := memory.available()) is not None:
            size = max(min(size, free // 4), threads << 20)
        part = min(SLICE_BYTES, size // threads)
        self._slice = threads * part
        self._buffer = aligned(size // self._slice * self._slice)
        self._buffer.fill(1)  # or the system would serve all of it from one page of zeros
        self._read = extension().read_probe
        self._place = 0
        self.samples: list[float] = []  # GB/s
        self._shares: list[float] = []

    def read(self) -> float:
        """GB/s of the next slice."""
        address = self._buffer.ctypes.data + self._place
        self._place = (self._place + self._slice) % len(self._buffer)
        began = time.process_time()
        seconds = self._read(address, self._slice, self.threads)
        self._shares.append((time.process_time() - began) / (self.threads * seconds))
        self.samples.append(self._slice / seconds / 1e9)
        return self.samples[-1]

    @property
    def core_share(self) -> float:
        """Of the time of a slice, how much its threads ran: 1 where nothing else wants their cores; median."""
        return min(1.0, statistics.median(self._shares))

    @property
    def buffer_bytes(self) -> int:
        """What it walks through."""
        return len(self._buffer)

    @property
    def bytes_read(self) -> int:
        """So far."""
        return len(self.samples) * self._slice

    def complete(self) -> None:
        """Read on until 1 GiB has been read."""
        while self.bytes_read < READ_BYTES:
            self.read()


@dataclass(frozen=True)
class Verdict:
    """What a probe found, and why it may not serve as the limit that a run is held against."""

    gb_s: float  # median
    quartiles: tuple[float, float]
    unsteadiness: float  # relative difference of a slice and the next, median
    bytes_read: int
    reasons: list[str] = field(default_factory=list)  # none: it is valid

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


def judge(
    samples: list[float],
    bytes_read: int,
    fraction: float | None,
    min_gb_s: float | None = None,
    core_share: float = 1.0,
    buffer_bytes: int = BUFFER_BYTES,
    cache_bytes: int | None = None,
) -> Verdict:
    """The verdict on a probe's samples (GB/s, in order).

    fraction  of the probe's speed at which the model's weights were read; None where caches may have served them
    min_gb_s  below it the probe is invalid
    core_share  see `Probe.core_share`
    buffer_bytes, cache_bytes  of the probe, and of the last cache, where it is known
    """
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    # not the overall spread: two steady modes are wide apart, and yet every pair is sound
    steps = [abs(a - b) / ((a + b) / 2) for a, b in pairwise(samples)]
    unsteadiness = statistics.median(steps) if steps else 0.0
    reasons = []
    if min_gb_s is not None and median < min_gb_s:
        reasons.append(f"it reads {median:.1f} GB/s, less than the {min_gb_s:g} that were asked for")
    if fraction is not None and fraction > TOO_SLOW:
        reasons.append(f"the weights were read {fraction:.2f} times as fast: the probe is not the machine's limit")
    if unsteadiness > UNSTEADY:
        reasons.append(f"a slice and the next differ by {unsteadiness:.0%}: something else uses the memory")
    if cache_bytes is not None and buffer_bytes < 2 * cache_bytes:
        reasons.append(
            f"it walks through {buffer_bytes >> 20} MiB, much of which a cache of {cache_bytes >> 20} MiB may hold"
        )
    if core_share < CROWDED:
        reasons.append(f"its threads had a core {core_share:.0%} of the time: others use it, or they are too many")
    return Verdict(median, (low, high), unsteadiness, bytes_read, reasons)


def between(before: float, after: float) -> float:
    """GB/s over two slices of one size, read at these speeds."""
    return 2 / (1 / before + 1 / after)
