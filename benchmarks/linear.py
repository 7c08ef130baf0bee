"""Speed of one linear on one thread, level by level, beside the speed at which the same thread reads memory.

    python benchmarks/linear.py [--k 4096] [--n 11008] [--group-size 128] [--rows 1 4 32 512] [--isa avx2 ...]
                                [--bits 2 3 4 8] [--activations 16 8] [--fetch far near none two] [--megabytes 1]
    python benchmarks/linear.py --turns 4:128 3:128 2:64 [--isa avx512vnni ...]

The matrix lies in memory many times over and the copies are used in turn, so that no cache holds it (with --megabytes 1
and a small --n, one copy that the cache holds). Reading and multiplying alternate in slices of the same buffer, and the
ratio is the median over slices: the bandwidth of a shared machine changes from minute to minute. GB/s counts packed
bytes once per pass, whatever the number of rows; GMAC/s counts multiplications of one code and one activation. "of
peak" is the share of what its vector instructions can multiply in bytes and add (16-bit activations: two products);
"limit" the time over the larger of one row's time and that of the products at 0.75 of the peak; all in turns. --turns
multiplies one row with weights of several widths, bits:group, in turns, and sets the speed of each against the first's.
Times are the thread's, not the clock's: what other programs take of the core does not count. The last line is one JSON
object.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time

import numpy as np

from tinychat.backends.cpu_linear import PackedLinear, aligned, extension, supported_isas
from tinychat.qtensor import QTensor

FEW_ROWS = 8  # with more, speed hardly depends on how weights are asked for ahead


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(run, *arguments) -> float:
    """The time of this thread that run(*arguments) takes."""
    begin = time.thread_time()
    run(*arguments)
    return time.thread_time() - begin


def dot_peak(cpu) -> float:
    """Products of bytes per second in this thread, over about a millisecond; 0 where there is no such probe."""
    return cpu.dot_peak(200_000) / seconds(cpu.dot_peak, 200_000)


def measure(cpu, isa: str, shape, buffer: np.ndarray, size: int, rows: int, budget: float) -> dict[str, float]:
    """Figures for `rows` activations and a buffer of copies of one packed weight, `size` bytes each."""
    x = np.random.default_rng(2).standard_normal((rows, shape.k)).astype(np.float32)
    y = np.empty((rows, shape.n), np.float32)
    prepared = aligned(cpu.activation_bytes(isa, shape) * rows)
    prepare = seconds(cpu.prepare, isa, shape, x.ctypes.data, prepared.ctypes.data, rows)
    prepare = min(prepare, seconds(cpu.prepare, isa, shape, x.ctypes.data, prepared.ctypes.data, rows))
    copies, tiles = len(buffer) // size, -(-shape.n // cpu.tile(isa))

    def multiply(copy: int, rows: int, end: int) -> None:
        address = buffer.ctypes.data + copy % copies * size
        cpu.linear(isa, shape, address, prepared.ctypes.data, rows, 0, end, y.ctypes.data, shape.n)

    one_tile = min(seconds(multiply, 0, rows, 1) for _ in range(2))
    part = max(1, min(tiles, int(budget / 8 / one_tile)))  # of the tiles, for slow levels or many rows
    multiplied = part / tiles * size
    products = rows * part * cpu.tile(isa) * shape.k * shape.activation_bits // 8
    times, ratios, shares, limits = [], [], [], []
    copy, begin = 0, time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 4 * copies):
        # other copies for reading than for multiplying, and none twice before all the others
        before = seconds(cpu.read_probe, buffer.ctypes.data + copy % copies * size, size)
        peak = dot_peak(cpu)
        spent = seconds(multiply, copy + 1, rows, part)
        one_row = seconds(multiply, copy + 2, 1, part)
        after = seconds(cpu.read_probe, buffer.ctypes.data + (copy + 3) % copies * size, size)
        copy += 4
        times.append(spent)
        ratios.append(multiplied / spent / (2 * size / (before + after)))
        if peak:
            shares.append(products / spent / peak)
            limits.append(spent / max(one_row, products / peak / 0.75))
    spent = statistics.median(times)
    return {
        "of_peak": round(statistics.median(shares), 3) if shares else None,
        "limit": round(statistics.median(limits), 3) if limits else None,
        "gb_per_s": round(multiplied / spent / 1e9, 2),
        "ratio_to_read": round(statistics.median(ratios), 3),
        "gmac_per_s": round(rows * part * cpu.tile(isa) * shape.k / spent / 1e9, 1),
        "prepare_us_per_row": round(prepare / rows * 1e6, 1),
        "samples": len(times),
    }


def ask(cpu, shape, fetch: str) -> None:
    """Read weights as `fetch` says: "two" asks for nothing ahead and takes two tiles at once."""
    shape.two_tiles = fetch == "two"
    shape.fetch = getattr(cpu.Fetch, "none" if shape.two_tiles else fetch)


def random_weight(n: int, k: int, group_size: int, bits: int) -> QTensor:
    """Codes, scales and zeros that a seed decides."""
    rng = np.random.default_rng(1)
    groups = (n, -(-k // group_size))
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, groups).astype(np.float16)
    return QTensor(codes, scales, rng.integers(0, 2**bits, groups, dtype=np.uint8), bits, group_size)


class Turn:
    """Copies of a weight of `bits` in groups of `group_size`, one row to multiply them with, and what that took."""

    def __init__(self, cpu, isa: str, n: int, k: int, bits: int, group_size: int, megabytes: int):
        self.cpu, self.isa, self.name = cpu, isa, f"{bits}:{group_size}"
        (segment,) = PackedLinear.pack(random_weight(n, k, group_size, bits), isa).segments
        self.shape, self.size = segment.shape, len(segment.data)
        self.copies = max(4, (megabytes << 20) // self.size)
        self.buffer = aligned(self.copies * self.size)
        self.buffer.reshape(self.copies, -1)[:] = segment.data
        x, self.y = np.random.default_rng(2).standard_normal(k, np.float32), np.empty(n, np.float32)
        self.prepared = aligned(cpu.activation_bytes(isa, self.shape))
        cpu.prepare(isa, self.shape, x.ctypes.data, self.prepared.ctypes.data, 1)
        self.times: list[float] = []
        self.reads: list[float] = []

    def multiply(self, copy: int) -> None:
        """All tiles of one copy."""
        at, tiles = (
            self.buffer.ctypes.data + copy % self.copies * self.size,
            -(-self.shape.n // self.cpu.tile(self.isa)),
        )
        address = self.y.ctypes.data
        self.cpu.linear(self.isa, self.shape, at, self.prepared.ctypes.data, 1, 0, tiles, address, self.shape.n)

    def take(self, index: int) -> None:
        """Two multiplications and a reading, each of another copy."""
        self.times += [seconds(self.multiply, 3 * index + i) for i in range(2)]
        address = self.buffer.ctypes.data + (3 * index + 2) % self.copies * self.size
        self.reads.append(seconds(self.cpu.read_probe, address, self.size))


def in_turns(cpu, isa: str, fetch: str, args: argparse.Namespace) -> list[dict]:
    """What `--turns` asks for, of one level."""
    formats = [map(int, text.split(":")) for text in args.turns]
    turns = [Turn(cpu, isa, args.n, args.k, bits, group, args.megabytes // 2) for bits, group in formats]
    for turn in turns:
        ask(cpu, turn.shape, fetch)
    begin, index = time.perf_counter(), 0
    while index < 5 or time.perf_counter() - begin < args.seconds * len(turns):
        for turn in turns:
            turn.take(index)
        index += 1
    first, found = statistics.median(turns[0].times), []
    for turn in turns:
        spent = statistics.median(turn.times)
        figures = {
            "bits_per_weight": round(turn.size * 8 / (args.n * args.k), 4),
            "gb_per_s": round(turn.size / spent / 1e9, 2),
            "ratio_to_read": round(statistics.median(turn.reads) / spent, 3),
            "speed": round(first / spent, 3),
        }
        found.append({"isa": isa, "fetch": fetch, "weight": turn.name, **figures, "samples": len(turn.times)})
        print(
            f"{isa:>11} {fetch:>4} {turn.name:>6}: {figures['bits_per_weight']:.4f} bits a weight, "
            f"{figures['gb_per_s']:6.2f} GB/s, {figures['ratio_to_read']:.3f} of reading, "
            f"{figures['speed']:.3f} of the first's speed",
            flush=True,
        )
    return found


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 512])
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[4])
    parser.add_argument(
        "--turns", nargs="+", metavar="BITS:GROUP", help="widths to compare, one row, 16-bit activations"
    )
    parser.add_argument("--activations", type=int, nargs="+", choices=(16, 8), default=[16])
    parser.add_argument("--isa", nargs="+", default=supported_isas())
    parser.add_argument(
        "--fetch",
        nargs="+",
        choices=("far", "near", "none", "two"),
        default=["far", "near", "none", "two"],
        help="how weights are asked for ahead, of which a model takes the fastest (csrc/decoder_reading.cpp)",
    )
    parser.add_argument("--megabytes", type=int, default=768, help="all copies of the matrix together")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    args = parser.parse_args()

    cpu, results = extension(), []
    for isa, fetch in itertools.product(args.isa, args.fetch) if args.turns else ():
        results += in_turns(cpu, isa, fetch, args)
    for bits in () if args.turns else args.bits:
        weight = random_weight(args.n, args.k, args.group_size, bits)
        for isa, activation_bits in itertools.product(args.isa, args.activations):
            begin = time.perf_counter()
            (segment,) = PackedLinear.pack(weight, isa, activation_bits).segments
            pack = len(segment.data) / (time.perf_counter() - begin) / 1e9
            copies = max(1 if args.megabytes < 16 else 4, (args.megabytes << 20) // len(segment.data))
            buffer = aligned(copies * len(segment.data))
            buffer.reshape(copies, -1)[:] = segment.data
            cpu.read_probe(buffer.ctypes.data, len(buffer))  # of much data it finds out how it reads fastest
            for rows, fetch in itertools.product(args.rows, args.fetch):
                if fetch != args.fetch[0] and not (cpu.asks(isa) and rows <= FEW_ROWS):
                    continue  # nothing would depend on it
                ask(cpu, segment.shape, fetch)
                figures = measure(cpu, isa, segment.shape, buffer, len(segment.data), rows, args.seconds)
                kind = {"isa": isa, "bits": bits, "activations": activation_bits, "rows": rows, "fetch": fetch}
                results.append({**kind, "bytes": len(segment.data), **figures})
                print(
                    f"{isa:>11} {bits}x{activation_bits:<2} {fetch:>4} {rows:4} rows: {figures['gb_per_s']:6.2f} GB/s, "
                    f"{figures['ratio_to_read']:.3f} of reading, {figures['gmac_per_s']:6.1f} GMAC/s, "
                    f"{figures['of_peak']} of peak, {figures['limit']} limit, "
                    f"{figures['prepare_us_per_row']:.1f} us to prepare a row",
                    flush=True,
                )
            print(f"{isa:>11} {bits}x{activation_bits:<2} packing: {pack:.2f} GB/s")
    report = {
        "benchmark": "linear",
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "n": args.n,
        "k": args.k,
        "group_size": args.group_size,
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
