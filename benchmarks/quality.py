"""What quantizing costs: perplexity, likelihood and KL divergence of round-to-nearest and AWQ against the original.

    python benchmarks/quality.py MODEL --text FILE [--bits 4] [--group-size 128] [--calibration FILE] [--stories 30]

With --head 8 the output head is rounded as well: alone first, then with every linear.

Every linear is quantized, in memory. The text is scored in windows, each on its own; or, with --stories, in pieces that
begin with "Once upon a time", the beginning token first. Of JSON lines (*.jsonl of {"text"} or {"messages"}), --stories
documents are scored, spread over the file, the first --window tokens of each. The last line is JSON.

With --kv-type nothing is quantized but the KV cache: the model as it is, with such a cache against one of fp32.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tinychat import backends, checkpoint, tokenizer
from tinychat.backends import Runner
from tinychat.quantize import evaluation, from_file, quantize_in_memory, self_generated
from tinychat.quantize.calibration import start_tokens
from tinychat.quantize.pipeline import FROM_FILE, SAMPLED
from tinychat.weights import WeightSource


def windows(args: argparse.Namespace, path: Path, loaded: tokenizer.Tokenizer, limit: int) -> list[list[int]]:
    """The token windows to score."""
    if args.text.suffix == ".jsonl":
        return from_file(args.text, path, n_sequences=args.stories or 150, length=min(args.window, limit))
    text = args.text.read_text(encoding="utf-8")
    if args.stories:
        stories = re.split(r"\n\n(?=Once upon a time)", text)[: args.stories]
        return [loaded.encode(story.strip())[:limit] for story in stories]
    return evaluation.windows(loaded.encode(text[: args.characters]), min(args.window, limit))


def build(source: WeightSource, ctx_size: int, bits: int = 16, head: int = 16, kv_type: str = "fp32") -> Runner:
    """On the fastest backend that runs such weights, with a cache that rounds nothing unless told to."""
    module = backends.choose()[0] if bits <= 4 or bits == 16 else backends.backend("reference")
    return module.build(source, ctx_size=ctx_size, kv_dtype=kv_type, head=head)


def cost_of_cache(source: WeightSource, kv_type: str, token_windows: list[list[int]]) -> dict:
    """Perplexities with a cache of fp32 and of `kv_type`, and what lies between; printed too."""
    ctx_size = max(map(len, token_windows))
    exact, rounded = (build(source, ctx_size, kv_type=kind) for kind in ("fp32", kv_type))
    base, score = (evaluation.score(runner, token_windows) for runner in (exact, rounded))
    change = evaluation.compare(score, base)
    kl, top1 = evaluation.divergence(rounded, exact, token_windows)
    print(f"perplexity with a cache of fp32 {base.perplexity:.5f}, of {kv_type} {score.perplexity:.5f}")
    print(f"log-likelihood of a token {change.mean:+.6f} ({change.low:+.6f} .. {change.high:+.6f})")
    print(f"KL divergence {kl:.6f}, same likeliest token {top1:.2%}, {len(base.log_likelihoods)} tokens")
    return {
        "kv_type": kv_type,
        "tokens": len(base.log_likelihoods),
        "perplexity": {"fp32": base.perplexity, kv_type: score.perplexity},
        "log_likelihood_change": [change.mean, change.low, change.high],
        "kl_divergence": kl,
        "top1_agreement": top1,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=60_000, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--stories", type=int, default=0, help="score so many stories instead of windows")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration", help="a text file; left out: sampled from the model itself")
    parser.add_argument(
        "--head", type=int, choices=(8, 16), default=16, help="8: round the output head, and say what it costs"
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, help=f"tokens of each (default: {FROM_FILE}, or {SAMPLED} if sampled)")
    parser.add_argument("--kv-type", choices=("fp16", "int8"), help="measure a KV cache of this type instead")
    args = parser.parse_args()

    source = checkpoint.open(checkpoint.locate(args.model))
    loaded = tokenizer.load(source.path)
    if loaded is None:
        raise SystemExit(f"{args.model} has no tokenizer")
    length = min(args.length or (FROM_FILE if args.calibration else SAMPLED), source.config.max_positions)
    token_windows = windows(args, source.path, loaded, source.config.max_positions)
    if args.kv_type:
        print(json.dumps({"model": args.model, **cost_of_cache(source, args.kv_type, token_windows)}))
        return
    if args.calibration:
        sequences = from_file(args.calibration, source.path, n_sequences=args.sequences, length=length)
    else:
        starts = start_tokens(source.generation_config, source.hf_config)
        sequences = self_generated(source, starts=starts, n_sequences=args.sequences, length=length)

    ctx_size = max(map(len, token_windows))
    fp = build(source, ctx_size)
    base = evaluation.score(fp, token_windows)
    rows: list[dict] = [{"method": source.config.dtype, "perplexity": base.perplexity}]
    scores, bits = {}, 0.0

    def measure(method: str, runner: Runner) -> None:
        scores[method] = evaluation.score(runner, token_windows)
        change = evaluation.compare(scores[method], base)
        kl, top1 = evaluation.divergence(runner, fp, token_windows)
        row = {"method": method, "perplexity": scores[method].perplexity, "log_likelihood_change": change.mean}
        rows.append(row | {"interval": [change.low, change.high], "kl_divergence": kl, "top1_agreement": top1})

    if args.head == 8:  # alone, then below with every linear
        measure("head", build(source, ctx_size, head=8))
    for method in ("rtn", "awq"):
        made, report = quantize_in_memory(
            source, method=method, bits=args.bits, group_size=args.group_size, sequences=sequences
        )
        print(report, "\n")
        measure(method, build(made, ctx_size, args.bits, args.head))
        rows[-1]["seconds"] = report.seconds
        bits = report.bits_per_weight
    against = evaluation.compare(scores["awq"], scores["rtn"])

    print(f"{'':<10}{'perplexity':>11}  {'log-likelihood, 95 %':<34}{'KL':>8}{'top-1':>8}")
    for row in rows:
        line = f"{row['method']:<10}{row['perplexity']:>11.4f}"
        if "interval" in row:
            low, high = row["interval"]
            change = f"{row['log_likelihood_change']:+.5f} ({low:+.5f} .. {high:+.5f})"
            line += f"  {change:<34}{row['kl_divergence']:>8.4f}{row['top1_agreement']:>8.1%}"
        print(line)
    print(f"awq against rtn: {against.mean:+.5f} ({against.low:+.5f} .. {against.high:+.5f}) nats per token\n")
    result = {
        "model": args.model,
        "bits": args.bits,
        "group_size": args.group_size,
        "head": args.head,
        "bits_per_weight": bits,
        "tokens": len(base.log_likelihoods),
        "rows": rows,
        "awq_against_rtn": [against.mean, against.low, against.high],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
