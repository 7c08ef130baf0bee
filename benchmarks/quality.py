"""What the engine's own roundings cost a model: the KV cache in 16 and 8 bits, an 8-bit head, 8-bit activations.

    python benchmarks/quality.py MODEL --text FILE [--max-tokens 50000] [--window 2048]

Each against the same model with 16-bit activations, the head as it is stored and a cache of fp32. What quantizing the
weights costs is `tinychat eval --against`, and `benchmarks/paper`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tinychat
from tinychat import checkpoint, engine
from tinychat.evaluation.evaluate import WINDOW, Evaluation

EXACT = {"kv_dtype": "fp32", "head": 16, "activations": 16}
CHANGES = {
    "KV cache fp16": {"kv_dtype": "fp16"},
    "KV cache int8": {"kv_dtype": "int8"},
    "8-bit head": {"head": 8},
    "8-bit activations": {"activations": 8},  # matter where weights are quantized
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=50_000, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens, or the context where it is shorter")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    limit = engine.max_context_size(checkpoint.open(checkpoint.locate(args.model)).config)
    options = {"ctx_size": min(args.window, limit), "threads": args.threads}
    print(f"{'':<20}{'perplexity':>11}  {'log-likelihood of a token, 95 %':<40}{'KL':>10}{'top-1':>9}")
    rows: dict[str, dict] = {}
    with engine.load(args.model, **options, **EXACT) as exact:
        for name, change in CHANGES.items():
            with engine.load(args.model, **options, **(EXACT | change)) as llm:
                found = tinychat.evaluate(llm, args.text, against=exact, max_tokens=args.max_tokens, progress=True)
            rows[name] = found.to_dict()
            if len(rows) == 1:
                print(f"{'nothing rounded':<20}{rows[name]['against_perplexity']:>11.5f}")
            print(_row(name, found))
    print(json.dumps({"model": args.model, "rows": rows}))


def _row(name: str, found: Evaluation) -> str:
    change, kl, top1 = found.change, found.kl_divergence, found.top1_agreement
    assert change is not None
    interval = f"{change.mean:+.6f} ({change.low:+.6f} .. {change.high:+.6f})"
    return f"{name:<20}{found.perplexity:>11.5f}  {interval:<40}{kl:>10.6f}{top1:>9.2%}"


if __name__ == "__main__":
    main()
