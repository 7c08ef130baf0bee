"""Two short measurements: how fast memory is read, and how fast the kernels multiply weights that are in a cache.
On a GPU one: how fast it copies its memory.

Decoding reads every weight once a token, so memory is one limit of its speed; the kernels' arithmetic is the other, the
lower one of cores without wide vectors.
"""

from __future__ import annotations

import importlib
import statistics
import time
from typing import Any

import numpy as np

from tinychat import cpuinfo
from tinychat.backends import cpu_linear
from tinychat.bench.probe import Probe, judge
from tinychat.qtensor import QTensor

SIDE = 1024  # of the matrix: half a megabyte of codes, within the second-level cache of every board
GROUP = 128
TURN_S, TURNS = 0.02, 5


def measure_gpu() -> dict[str, Any]:
    """As `measure`, of the GPU that torch uses; its arithmetic is not measured. Imports torch."""
    probe = importlib.import_module("tinychat.bench.copy_probe").CopyProbe()
    probe.complete()
    verdict = judge(probe.samples, probe.bytes_read, None)
    found = {"threads": None, "gb_s": verdict.gb_s, "bytes_read": verdict.bytes_read, "doubts": verdict.reasons}
    return {**found, "weights_per_s": None}


def measure(threads: int, activations: int = 16) -> dict[str, Any]:
    """About a second.

    gb_s           memory read by `threads` threads at once; 'doubts' says why it may not be the machine's speed
    weights_per_s  of 4 bits that one thread multiplies with activations of so many bits, times `threads`
    """
    probe = Probe(threads)
    probe.complete()
    verdict = judge(
        probe.samples,
        probe.bytes_read,
        None,
        core_share=probe.core_share,
        buffer_bytes=probe.buffer_bytes,
        cache_bytes=cpuinfo.last_level_cache(),
    )
    return {
        "threads": threads,
        "gb_s": verdict.gb_s,
        "bytes_read": verdict.bytes_read,
        "doubts": verdict.reasons,
        "weights_per_s": threads * weights_per_second(activations),
    }


def weights_per_second(activations: int = 16) -> float:
    """Of one thread: the median of a few turns of one linear, one row in, its weights in the cache."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (SIDE, SIDE), np.uint8)
    scales = np.full((SIDE, SIDE // GROUP), 0.01, np.float16)
    zeros = rng.integers(0, 16, scales.shape, np.uint8)
    linear = cpu_linear.PackedLinear.pack(QTensor(codes, scales, zeros, 4, GROUP), activation_bits=activations)
    x = rng.standard_normal((1, SIDE), np.float32)
    segment, cpu = linear.segments[0], cpu_linear.extension()
    activations_at = cpu_linear.aligned(cpu.activation_bytes(linear.isa, segment.shape))
    y = np.empty(SIDE, np.float32)
    cpu.prepare(linear.isa, segment.shape, x.ctypes.data, activations_at.ctypes.data, 1, 0, -1)
    addresses = segment.data.ctypes.data, activations_at.ctypes.data
    tiles = -(-SIDE // cpu.tile(linear.isa))

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):  # the call itself costs a microsecond: less than one part in ten of the fastest kernel's
            cpu.linear(linear.isa, segment.shape, *addresses, 1, 0, tiles, y.ctypes.data, SIDE)
        return time.perf_counter() - began

    times = 1
    while seconds(times) < TURN_S:
        times *= 2
    return times * SIDE * SIDE / statistics.median(seconds(times) for _ in range(TURNS))
