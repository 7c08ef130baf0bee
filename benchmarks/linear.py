"""Speed of one linear on one thread, level by level, beside the speed at which the same thread reads memory.

    python benchmarks/linear.py [--k 4096] [--n 11008] [--group-size 128] [--rows 1 4 32 512] [--isa avx2 ...]

The matrix lies in memory many times over and the copies are used in turn, so that no cache holds it. Reading and
multiplying alternate in slices of the same buffer, and the ratio is the median over slices: the bandwidth of a shared
machine changes from minute to minute. GB/s counts packed bytes once per pass, whatever the number of rows; GMAC/s
counts multiplications of one code and one activation. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import numpy as np

from tinychat.backends.cpu_linear import PackedLinear, aligned, extension, supported_isas
from tinychat.qtensor import QTensor


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(run, *arguments) -> float:
    """Wall time of run(*arguments)."""
    begin = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begin


def measure(cpu, isa: str, shape, buffer: np.ndarray, size: int, rows: int, budget: float) -> dict[str, float]:
    """Figures for `rows` activations and a buffer of copies of one packed weight, `size` bytes each."""
    x = np.random.default_rng(2).standard_normal((rows, shape.k)).astype(np.float32)
    y = np.empty((rows, shape.n), np.float32)
    prepared = aligned(cpu.activation_bytes(isa, shape) * rows)
    prepare = seconds(cpu.prepare, isa, shape, x.ctypes.data, prepared.ctypes.data, rows)
    prepare = min(prepare, seconds(cpu.prepare, isa, shape, x.ctypes.data, prepared.ctypes.data, rows))
    copies, tiles = len(buffer) // size, -(-shape.n // cpu.tile(isa))

    def multiply(copy: int, end: int) -> None:
        address = buffer.ctypes.data + copy % copies * size
        cpu.linear(isa, shape, address, prepared.ctypes.data, rows, 0, end, y.ctypes.data, shape.n)

    one = seconds(multiply, 0, 1)
    part = max(1, min(tiles, int(budget / 8 / one)))  # of the tiles: all of them but for slow levels or many rows
    multiplied = part / tiles * size
    times, ratios, copy, begin = [], [], 0, time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 4 * copies):
        # other copies for reading than for multiplying, and none twice before all the others
        before = seconds(cpu.read_probe, buffer.ctypes.data + copy % copies * size, size)
        spent = seconds(multiply, copy + 1, part)
        after = seconds(cpu.read_probe, buffer.ctypes.data + (copy + 2) % copies * size, size)
        copy += 3
        times.append(spent)
        ratios.append(multiplied / spent / (2 * size / (before + after)))
    spent = statistics.median(times)
    return {
        "gb_per_s": round(multiplied / spent / 1e9, 2),
        "ratio_to_read": round(statistics.median(ratios), 3),
        "gmac_per_s": round(rows * part * cpu.tile(isa) * shape.k / spent / 1e9, 1),
        "prepare_us_per_row": round(prepare / rows * 1e6, 1),
        "samples": len(times),
    }


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32, 512])
    parser.add_argument("--isa", nargs="+", default=supported_isas())
    parser.add_argument("--megabytes", type=int, default=768, help="all copies of the matrix together")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    args = parser.parse_args()

    cpu, rng = extension(), np.random.default_rng(1)
    groups = (args.n, -(-args.k // args.group_size))
    weight = QTensor(
        rng.integers(0, 16, (args.n, args.k), dtype=np.uint8),
        rng.uniform(0.001, 0.02, groups).astype(np.float16),
        rng.integers(0, 16, groups, dtype=np.uint8),
        4,
        args.group_size,
    )
    results = []
    for isa in args.isa:
        begin = time.perf_counter()
        (segment,) = PackedLinear.pack(weight, isa).segments
        pack = len(segment.data) / (time.perf_counter() - begin) / 1e9
        copies = max(4, (args.megabytes << 20) // len(segment.data))
        buffer = aligned(copies * len(segment.data))
        buffer.reshape(copies, -1)[:] = segment.data
        for rows in args.rows:
            figures = measure(cpu, isa, segment.shape, buffer, len(segment.data), rows, args.seconds)
            results.append({"isa": isa, "rows": rows, **figures})
            print(
                f"{isa:>11} {rows:4} rows: {figures['gb_per_s']:7.2f} GB/s, {figures['ratio_to_read']:.3f} of reading, "
                f"{figures['gmac_per_s']:7.1f} GMAC/s, {figures['prepare_us_per_row']:.1f} us to prepare a row",
                flush=True,
            )
        print(f"{isa:>11} packing: {pack:.2f} GB/s")
    report = {
        "benchmark": "linear",
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "n": args.n,
        "k": args.k,
        "group_size": args.group_size,
        "bits_per_weight": round(len(segment.data) * 8 / args.n / args.k, 4),
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
