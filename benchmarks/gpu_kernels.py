"""Kernels of the CUDA backend alone: microseconds of one launch inside a graph, and what of the copy rate it is.

Matrices rotate: as many as fill 1 GiB are read in turn, or it would be the L2 cache that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch

from tinychat.backends.cuda_cache import DeviceCache, DeviceContext
from tinychat.backends.cuda_linear import CudaLinear
from tinychat.backends.cuda_ops import CudaOps
from tinychat.bench import shapes
from tinychat.bench.copy_probe import CopyProbe
from tinychat.config import Activation
from tinychat.qtensor import AwqWords

ROTATING = 1 << 30  # bytes
MATRICES = ((4096, 4096), (12288, 4096), (4096, 11008), (22016, 4096), (28672, 4096), (28672, 8192))  # (N, K)
ROWS = (16, 64, 512, 2048)

Found = dict[str, Any]


def copy_rate() -> float:
    """GB/s, read and written."""
    probe = CopyProbe()
    samples = [probe.read() for _ in range(8)]
    return float(np.median(samples[2:]))


def measurements(copy_gb_s: float) -> dict[str, Callable[[], Iterator[Found]]]:
    """By name; each yields its findings one by one. Kernels overlap, whatever was measured before."""
    import_module("tinychat._cuda").overlap(True)
    return {
        "GEMV, 4 bits": lambda: gemv(copy_gb_s),
        "GEMM, 4 bits": gemm,
        "other kernels": lambda: others(copy_gb_s),
    }


def safely(measure: Callable[[], Iterator[Found]]) -> Iterator[Found]:
    """What it finds, and why it ended where it failed."""
    try:
        yield from measure()
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    torch.cuda.empty_cache()


@torch.inference_mode()
def seconds(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Of one of the calls, all of them captured one after the other."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return float(np.median(times[1:])) / len(calls)


def rotated(n: int, k: int, group: int = 128) -> list[CudaLinear]:
    """Random 4-bit linears, as many as fill `ROTATING`, at least 2; each has a place of its own."""
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (k, n // 8), np.int32)
    zeros = rng.integers(-(2**31), 2**31, (k // group, n // 8), np.int32)
    weight = AwqWords(words, zeros, np.full((k // group, n), 0.1 / math.sqrt(k), np.float16))
    found = [CudaLinear.pack(weight, "cuda", torch.float16)]
    while len(found) < 2 or len(found) * found[0].nbytes < ROTATING:
        found.append(CudaLinear.pack(weight, "cuda", torch.float16))
    return found


def gemv(copy_gb_s: float) -> Iterator[Found]:
    """One row and eight."""
    for n, k in MATRICES:
        linears = rotated(n, k)
        for rows in (1, 8):
            x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
            each = seconds([lambda linear=linear, x=x: linear(x) for linear in linears])
            gb_s = linears[0].nbytes / each / 1e9
            yield {
                "n": n,
                "k": k,
                "rows": rows,
                "mb": linears[0].nbytes / 1e6,
                "us": each * 1e6,
                "gb_s": gb_s,
                "of_copy_rate": gb_s / copy_gb_s,
            }


def gemm() -> Iterator[Found]:
    """Many rows, against cuBLAS in fp16."""
    for n, k in ((4096, 4096), (22016, 4096), (4096, 11008)):
        linears = rotated(n, k)[:16]
        plain = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(4)]
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
            ours = seconds([lambda linear=linear, x=x: linear(x) for linear in linears])
            cublas = seconds([lambda weight=weight, x=x: torch.mm(x, weight.T) for weight in plain])
            yield {"n": n, "k": k, "rows": rows, "us": ours * 1e6, "cublas_us": cublas * 1e6, "speed": cublas / ours}


def others(copy_gb_s: float) -> Iterator[Found]:
    """Norm, activation and attention of one row of Llama-3-8B, layer after layer: what stands between the linears."""
    config, _ = shapes.find("llama-3-8b").translate()
    device = torch.device("cuda", torch.cuda.current_device())
    for kv_dtype in ("fp16", "int8"):
        capacity = 32768 + 64
        cache = DeviceCache(config, 1, capacity, kv_dtype, device)
        ops = CudaOps(import_module("tinychat._cuda"), config, cache, torch.float16)
        weight = torch.ones(config.hidden_size, device=device)
        x = torch.randn(1, config.hidden_size, device=device, dtype=torch.float16)
        up = torch.randn(1, config.up_size, device=device, dtype=torch.float16)
        if kv_dtype == "fp16":
            calls = {
                "norm": lambda: ops.norm(x, weight, 1e-5),  # noqa: B023
                "norm of a sum": lambda: ops.add_norm(x, (x,), 1.0, weight, 1e-5),  # noqa: B023
                "activation": lambda: ops.activation(up, Activation.SILU),  # noqa: B023
            }
            for name, call in calls.items():
                yield {"kernel": name, "us": seconds([call] * 64) * 1e6}
        heads = [torch.randn(1, n, config.head_dim, device=device, dtype=torch.float16) for n in (32, 8, 8)]
        for position in (0, 200, 1000, 4096, 32768):
            told = torch.tensor([[position], [0]], device=device)
            context = DeviceContext(told[0], told[1], ops.angles.alone(told[0]), cache, None)
            each = seconds(
                [
                    lambda context=context, layer=layer: ops.attention(*heads, config, layer, context)  # noqa: B023
                    for layer in range(config.n_layers)
                ]
            )
            gb_s = config.kv_bytes(position + 1, 1 if kv_dtype == "int8" else 2) / config.n_layers / each / 1e9
            found = {"kernel": f"attention, {kv_dtype}", "position": position, "us": each * 1e6, "gb_s": gb_s}
            yield {**found, "of_copy_rate": gb_s / copy_gb_s}
