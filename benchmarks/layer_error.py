"""The error of one decoder layer on the CPU backend against float64, at a real shape with random weights.

    python benchmarks/layer_error.py [--shape llama-2-7b] [--rows 16]

The layer stands between an embedding and a head of 1024 tokens, which both sides hold in 16 bits, and is run by the
reference backend in float64 and by the cpu backend with activations of 16 and of 8 bits, on an fp32 cache. Printed is
the normalized mean squared error of all logits, level by level; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np

from tinychat.backends import cpu, reference
from tinychat.backends.cpu_linear import supported_isas
from tinychat.bench import shapes
from tinychat.bench.random_weights import RandomWeights
from tinychat.cache import Rows
from tinychat.weights import MemoryWeights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="llama-2-7b")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()

    shape = shapes.find(args.shape)
    config, names = shape.translate()
    config = dataclasses.replace(config, n_layers=1, vocab_size=1024)
    made = RandomWeights(config, names, shape.group_size)  # other numbers at each call: kept, both sides see the same
    source = MemoryWeights(config, made.embed(), [made.layer(0)], made.norm(), made.head(), made.norm_bias())
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, args.rows).tolist()
    rows = Rows.of(tokens, 0, wanted="all")
    options = {"ctx_size": args.rows, "kv_dtype": "fp32"}
    exact = reference.build(source, dtype="fp64", **options).step(rows).astype(np.float64)
    results = []
    for isa in supported_isas():
        for activations in (16, 8):
            found = cpu.build(source, isa=isa, activations=activations, **options).step(rows)
            nmse = float(((found - exact) ** 2).sum() / (exact**2).sum())
            results.append({"isa": isa, "activations": activations, "nmse": nmse})
            print(f"{isa:>11}, {activations:2}-bit activations: NMSE {nmse:.2e}", flush=True)
    print(json.dumps({"shape": args.shape, "rows": args.rows, "results": results}))


if __name__ == "__main__":
    main()
