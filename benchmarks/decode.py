"""Speed of a whole model on the CPU: decoding, prefill, and how near both come to what the machine can read.

    python benchmarks/decode.py [MODEL | tinyllama] [--threads 1 2] [--isa avx512vnni]

The paper's protocol: a prompt of 4 tokens, 200 tokens generated, the median of their latencies; prefill of 512 tokens;
batch 1. `tinyllama` is the 1.1B shape with random 4-bit weights, for the speed of a model that outgrows the caches. The
read bandwidth is measured in the same process, between the tokens, over a buffer larger than the last-level cache, with
one thread; bytes per token are the weights that a token reads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time

import numpy as np

from tinychat import checkpoint
from tinychat.backends import cpu
from tinychat.backends.cpu_linear import aligned, extension
from tinychat.cache import Rows
from tinychat.config import ModelConfig, Rope
from tinychat.qtensor import QTensor
from tinychat.weights import Layer, Linear, MemoryWeights, WeightSource

PROMPT, GENERATED, PREFILL, CHUNK = 4, 200, 512, 128
PROBE_BYTES = 1 << 28


def tinyllama() -> MemoryWeights:
    """TinyLlama-1.1B's shape with random weights in 4 bits, groups of 128; embedding and head in fp16."""
    rng = np.random.default_rng(0)
    config = ModelConfig("llama", 32000, 2048, 22, 32, 4, 64, 5632, 2048, 1e-5, Rope(dim=64))

    def linear(*rows: int, k: int) -> Linear:
        def segment(n: int) -> QTensor:
            scales = rng.uniform(0.5, 1.5, (n, k // 128)) * 0.1 / k**0.5
            codes, zeros = (rng.integers(0, 16, shape, np.uint8) for shape in ((n, k), (n, k // 128)))
            return QTensor(codes, scales.astype(np.float16), zeros, 4, 128)

        return Linear(tuple(segment(n) for n in rows))

    def plain() -> np.ndarray:
        return rng.standard_normal((config.vocab_size, config.hidden_size), np.float32).astype(np.float16)

    h, m, ones = config.hidden_size, config.intermediate_size, np.ones(config.hidden_size, np.float32)
    layer = Layer(
        norm1=ones,
        qkv=linear(h, config.kv_size, config.kv_size, k=h),
        out=linear(h, k=h),
        norm2=ones,
        up=linear(m, m, k=h),
        down=linear(h, k=m),
    )  # every layer is packed on its own: sharing the source shares no packed byte
    return MemoryWeights(config, plain(), [layer] * config.n_layers, ones, Linear((plain(),)))


def read_gbs(buffer: np.ndarray) -> float:
    """GB/s of reading `buffer` once with one thread."""
    began = time.perf_counter()
    extension().read_probe(buffer.ctypes.data, buffer.nbytes)
    return buffer.nbytes / (time.perf_counter() - began) / 1e9


def measure(source: WeightSource, threads: int, isa: str | None, probe: np.ndarray) -> dict:
    """One row of the table."""
    began = time.perf_counter()
    runner = cpu.build(source, ctx_size=PREFILL + 1, threads=threads, isa=isa)
    load_s = time.perf_counter() - began
    config = source.config
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, PREFILL).tolist()
    table = source.embed()
    read = runner.weight_bytes - (0 if config.tied_head else table.nbytes)

    prefill = []
    for _ in range(3):
        runner.cache.truncate(0, 0)
        began = time.perf_counter()
        for start in range(0, PREFILL, CHUNK):
            runner.step(Rows.of(tokens[start : start + CHUNK], start, wanted="last"))
        prefill.append(time.perf_counter() - began)
    runner.cache.truncate(0, 0)
    logits = runner.step(Rows.of(tokens[:PROMPT], 0))
    latencies, bandwidth = [], []
    for position in range(PROMPT, PROMPT + GENERATED):
        if position % 20 == 0:
            bandwidth.append(read_gbs(probe))
        began = time.perf_counter()
        logits = runner.step(Rows.of([int(logits[0].argmax())], position))
        latencies.append(time.perf_counter() - began)
    token_s, gbs = statistics.median(latencies), statistics.median(bandwidth)
    return {
        "threads": threads,
        "isa": runner.description,
        "decode_tokens_per_s": 1 / token_s,
        "prefill_tokens_per_s": PREFILL / statistics.median(prefill),
        "bytes_per_token": read,
        "decode_gb_per_s": read / token_s / 1e9,
        "read_gb_per_s_one_thread": gbs,
        "fraction_of_one_thread_read": read / token_s / 1e9 / gbs,
        "load_s": load_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pebble")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--isa")
    args = parser.parse_args()
    source: WeightSource = tinyllama() if args.model == "tinyllama" else checkpoint.open(checkpoint.locate(args.model))
    probe = aligned(PROBE_BYTES)
    probe[:] = 1
    rows = [measure(source, threads, args.isa, probe) for threads in args.threads]
    print(f"{'':<28}{'decode':>10}{'prefill':>10}{'weights':>10}{'of one thread':>15}")
    print(f"{args.model:<28}{'tokens/s':>10}{'tokens/s':>10}{'GB/s':>10}{'reading':>15}")
    for r in rows:
        speeds = f"{r['decode_tokens_per_s']:>10.1f}{r['prefill_tokens_per_s']:>10.0f}{r['decode_gb_per_s']:>10.1f}"
        print(f"{r['isa']:<28}{speeds}{r['fraction_of_one_thread_read']:>15.2f}")
    print(json.dumps({"model": args.model, "rows": rows}))


if __name__ == "__main__":
    main()
