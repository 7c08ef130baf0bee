"""Speed of the CUDA linears beside the rate at which the same GPU copies memory, and beside torch's fp16 product.

    python benchmarks/gpu_linear.py [--shapes 11008x4096 ...] [--bits 4 8] [--group-size 128] [--rows 1 64 2048]
                                    [--dtype fp16] [--sweep] [--no-overlap] [--host]

Every figure is of CUDA graphs, so that no launch from Python is in it: a graph multiplies each of as many copies of the
matrix as fill 1 GiB once, so that no cache holds them, and is replayed; the time is the median of replays, by the GPU's
events, over the copies. "of copy" is the packed bytes per second over the bytes per second that a copy of 1 GiB reads
and writes, measured between the figures. For each number of rows: gemv (to 16 rows), gemm, dequantizing once and
torch.matmul, and torch.matmul of fp16 weights, which rotate likewise; "best" is what `CudaLinear` would call, over
torch's. On sm_90 a kernel begins while the one before it ends, as in a model, but for --no-overlap. --sweep times gemv
by warps of a block and gemm by parts of K as well. Results are checked against float64 first.
--host runs the same script on the CPU's build of the kernels: its logic, not its figures. The last line is one JSON
object.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import numpy as np
import torch

from tinychat.backends import cuda_linear
from tinychat.backends.cuda_linear import CudaLinear, Quantized, extension, stream
from tinychat.qtensor import QTensor

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "22016x4096", "28672x8192", "12288x4096", "4096x14336", "1024x3072")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Clock:
    """Times of work on a device."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def __call__(self, work, count: int) -> float:
        """Seconds of work(i) for one i, when it is done for i = 0 .. count - 1 in turn."""
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for i in range(count):
                work(i)
            return (time.perf_counter() - begin) / count
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # first calls load kernels and allocate
            work(0)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                work(i)
        graph.replay()
        torch.cuda.synchronize()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begin < self.seconds and len(times) < 200):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return statistics.median(times) / count


def random_weight(n: int, k: int, group_size: int, bits: int) -> QTensor:
    """Codes, scales and zeros that a seed decides."""
    rng = np.random.default_rng(1)
    groups = (n, -(-k // group_size))
    scales = rng.uniform(0.001, 0.02, groups).astype(np.float16)
    zeros = rng.integers(0, 2**bits, groups, dtype=np.uint8)
    return QTensor(rng.integers(0, 2**bits, (n, k), dtype=np.uint8), scales, zeros, bits, group_size)


class Subject:
    """One matrix in as many copies as fill `total` bytes, packed and as torch multiplies it."""

    def __init__(self, n: int, k: int, bits: int, group: int, dtype: torch.dtype, device: torch.device, total: int):
        self.n, self.k, self.dtype, self.device = n, k, dtype, device
        self.wrong: dict[str, float] = {}  # NMSE of ways that do not compute what they should
        self.cuda = extension(device)
        self.kind = self.cuda.Dtype.f16 if dtype == torch.float16 else self.cuda.Dtype.bf16
        begin = time.perf_counter()
        self.linear = CudaLinear.pack(random_weight(n, k, group, bits), device, dtype)
        (self.first,) = self.linear.parts
        self.pack_seconds = time.perf_counter() - begin
        self.bytes = self.first.packed.nbytes
        self.parts = [self.first] + [self._copy(self.first) for _ in range(max(1, -(-total // self.bytes)) - 1)]
        self.plain = self.linear.dequantized(self.first).clone()
        self.plains = [self.plain] + [self.plain.clone() for _ in range(max(1, -(-total // self.plain.nbytes)) - 1)]

    def _copy(self, part: Quantized) -> Quantized:
        packed = part.packed
        return Quantized.of(
            dataclasses.replace(
                packed, codes=packed.codes.clone(), scales=packed.scales.clone(), zeros=packed.zeros.clone()
            )
        )

    def ways(self, rows: int, sweep: bool) -> dict:
        """Name of each way to multiply `rows` rows -> (work(i), how many copies it takes in turn, what it computes)."""
        x = torch.randn(rows, self.k, dtype=torch.float32).to(self.device, self.dtype)
        y = torch.empty(rows, self.n, dtype=self.dtype, device=self.device)
        sums = self.linear.workspace.sums

        def call(kernel, part, **options):
            kernel(
                part.weight,
                x.data_ptr(),
                0,
                y.data_ptr(),
                rows,
                self.k,
                self.n,
                self.kind,
                False,
                stream(self.device),
                **options,
            )

        def gemv(warps):
            return lambda i: call(self.cuda.gemv, self.parts[i], warps=warps)

        def gemm(parts):
            space = {"workspace": sums.data_ptr(), "workspace_bytes": sums.nbytes}
            return lambda i: call(self.cuda.gemm, self.parts[i], parts=parts, **space)

        def by_torch(i):
            torch.mm(x, self.plains[i].T, out=y)

        def dequantized(i):
            with cuda_linear.whole_sums():
                torch.mm(x, self.linear.dequantized(self.parts[i]).T, out=y)

        count = len(self.parts)
        found = {"torch": (by_torch, len(self.plains)), "dequantize": (dequantized, count), "gemm": (gemm(0), count)}
        if rows <= self.cuda.GEMV_ROWS:
            found["gemv"] = (gemv(0), count)
        if sweep and rows <= self.cuda.GEMV_ROWS:
            found |= {f"gemv, {warps} warps": (gemv(warps), count) for warps in (4, 8, 16)}
        if sweep:
            fit = [parts for parts in (1, 2, 3, 4, 6, 8, 12) if 4 * parts * rows * self.n <= sums.nbytes]
            found |= {f"gemm, {parts} parts": (gemm(parts), count) for parts in fit if 64 * 2 * parts <= self.k}
        wanted = x.double() @ self.plain.double().T
        for name, (work, _) in found.items():
            y.fill_(float("nan"))
            work(0)
            error = float((y.double() - wanted).square().sum() / wanted.square().sum())
            if not error < 2e-5:
                self.wrong[f"{name}, {rows} rows"] = error
        return found


def copy_rate(clock: Clock, total: int) -> float:
    """Bytes read and written per second by a copy of `total` bytes."""
    source = torch.randint(0, 256, (total,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * total / clock(lambda i: target.copy_(source), 2)


def measure(subject: Subject, rows: int, clock: Clock, total: int, sweep: bool) -> dict:
    """The times of every way, and what they mean."""
    before = copy_rate(clock, total)
    ways = subject.ways(rows, sweep)
    seconds = {name: clock(work, count) for name, (work, count) in ways.items()}
    copy = (before + copy_rate(clock, total)) / 2
    if rows <= subject.cuda.GEMV_ROWS:
        chosen = "gemv"
    else:
        chosen = "gemm" if rows < cuda_linear.DEQUANTIZE_ROWS else "dequantize"
    return {
        "n": subject.n,
        "k": subject.k,
        "bits": subject.first.packed.kept,
        "rows": rows,
        "bytes": subject.bytes,
        "copies": len(subject.parts),
        "copy_gb_per_s": round(copy / 1e9, 1),
        "microseconds": {name: round(value * 1e6, 2) for name, value in seconds.items()},
        "of_copy": round(subject.bytes / seconds[chosen] / copy, 3),
        "over_torch": round(seconds["torch"] / seconds[chosen], 3),
        "tflops": round(2 * rows * subject.n * subject.k / seconds[chosen] / 1e12, 2),
        "chosen": chosen,
    }


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", default=None)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each figure")
    parser.add_argument("--sweep", action="store_true", help="gemv by warps and gemm by parts of K as well")
    parser.add_argument("--no-overlap", action="store_true", help="kernels begin when the one before them has ended")
    parser.add_argument("--host", action="store_true", help="try the script on the CPU, at toy size")
    args = parser.parse_args()
    device = torch.device("cpu") if args.host else torch.device("cuda", torch.cuda.current_device())
    total = 1 << 16 if args.host else 1 << 30
    shapes = args.shapes or (("40x256", "128x512") if args.host else SHAPES)
    rows_asked = args.rows or ((1, 17) if args.host else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048))
    clock, results, wrong = Clock(device, args.seconds), [], []
    extension(device).overlap(not args.no_overlap)
    for bits in args.bits:
        for shape in shapes:
            n, k = map(int, shape.split("x"))
            subject = Subject(n, k, bits, args.group_size, DTYPES[args.dtype], device, total)
            packing = f"packed in {subject.pack_seconds:.2f} s"
            print(f"{n} x {k}, {bits} bits: {subject.bytes / 1e6:.1f} MB x {len(subject.parts)}, {packing}", flush=True)
            for rows in rows_asked:
                found = measure(subject, rows, clock, total, args.sweep)
                results.append(found)
                times = "  ".join(f"{name} {value:.1f}" for name, value in found["microseconds"].items())
                print(
                    f"{rows:5} rows: {found['of_copy']:.3f} of copy ({found['copy_gb_per_s']:.0f} GB/s), "
                    f"{found['over_torch']:.2f} x torch, {found['tflops']:.1f} TFLOP/s ({found['chosen']}); "
                    f"us: {times}",
                    flush=True,
                )
            for way, error in subject.wrong.items():
                wrong.append(f"{way} of {n} x {k}, {bits} bits: NMSE {error}")
                print(f"WRONG: {wrong[-1]}", flush=True)
            del subject
    report = {
        "benchmark": "gpu_linear",
        "device": "host" if args.host else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "group_size": args.group_size,
        "dtype": args.dtype,
        "overlap": not args.no_overlap,
        "wrong": wrong,
        "results": results,
    }
    print(json.dumps(report))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
