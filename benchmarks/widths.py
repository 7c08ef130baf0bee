"""Decoding with weights of several widths, whole models in one process, token by token in turns.

    python benchmarks/widths.py [--shape llama-2-7b] [--widths 4:128 3:128 2:64] [--threads 1] [--rounds 12]

A width is bits:group. All models are held at once, with random weights and an 8-bit head, so that a change of the host
meets them alike: the speed of each is set against the first's round by round, and the median over rounds counts. "of
the bytes" is what that would be if each model waited for the bytes that it reads, and for nothing else. Short texts,
so that the KV cache is next to nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

from tinychat.backends import cpu
from tinychat.bench import shapes, traffic
from tinychat.bench.random_weights import RandomWeights
from tinychat.cache import Rows

TOKENS = 3  # of a model in a round
ROUNDS = 12


def decoder(shape: shapes.Shape, width: str, threads: int, rounds: int) -> tuple[Callable[[], float], float]:
    """(a function that decodes `TOKENS` tokens and returns seconds, bytes that a token reads)."""
    bits, group = map(int, width.split(":"))
    source = RandomWeights(*shape.translate(), group, bits)
    runner = cpu.build(source, ctx_size=TOKENS * (rounds + 1), threads=threads, head=8)

    def decode() -> float:
        first = int(runner.cache.lengths[0])
        began = time.perf_counter()
        for position in range(first, first + TOKENS):
            runner.step(Rows.of([position + 1], position))
        return time.perf_counter() - began

    return decode, traffic.of(source, head_bits=8).token(TOKENS)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="llama-2-7b")
    parser.add_argument("--widths", nargs="+", default=["4:128", "3:128", "2:64"], metavar="BITS:GROUP")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)

    models = {width: decoder(shapes.find(args.shape), width, args.threads, args.rounds) for width in args.widths}
    for decode, _ in models.values():
        decode()  # warm
    rounds = [{width: decode() for width, (decode, _) in models.items()} for _ in range(args.rounds)]
    first = args.widths[0]
    results = []
    for width, (_, read) in models.items():
        ratios = [seconds[first] / seconds[width] for seconds in rounds]
        results.append(
            {
                "width": width,
                "tokens_per_second": TOKENS / statistics.median(seconds[width] for seconds in rounds),
                "bytes_per_token": round(read),
                "speed": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "of_the_bytes": models[first][1] / read,
            }
        )
        found = results[-1]
        print(
            f"{width:>6}: {found['tokens_per_second']:6.2f} tokens/s, {found['speed']:.2f} times the first "
            f"({min(ratios):.2f} .. {max(ratios):.2f}); of the bytes {found['of_the_bytes']:.2f}",
            flush=True,
        )
    print(json.dumps({"shape": args.shape, "threads": args.threads, "command": sys.argv, "results": results}))


if __name__ == "__main__":
    main()
