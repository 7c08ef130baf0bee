"""Methods of quantization against round to nearest, over widths and groups: what each adds to the perplexity.

    python benchmarks/methods.py MODEL --text FILE --calibration FILE [--grid 4:128 3:128 2:64] [--methods awq gptq ...]

MODEL is an unquantized checkpoint; it is quantized in memory, so that a group need not fit a file format (a group that
does not divide a row: see `tinychat.quantize.grid`). "increase" is (perplexity - the original's) over RTN's: 0
is lossless, 1 is no better than rounding. Log-likelihoods are in nats a token against RTN, with the paired 95 %
interval; KL divergence and top-1 agreement are against the original. `--calibration self` takes text that the model
itself writes. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "paper"))

from experiment import Experiment, parser, show

from tinychat.evaluation import likelihood
from tinychat.quantize import calibration

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
COLUMNS = ["perplexity", "increase", "against RTN, nats a token (95 %)", "KL", "top-1", "s"]


class Against(Experiment):
    """An experiment whose calibration text may be the model's own."""

    def sequences_of(self, text: Path, n_sequences: int | None = None) -> list[list[int]]:
        """See `Experiment`."""
        if str(text) != "self":
            return super().sequences_of(text, n_sequences)
        length = min(self.args.length, self.context)
        options: dict[str, Any] = {"length": length, "seed": self.args.seed, "threads": self.args.threads}
        return calibration.load(None, self.source, n_sequences=self.args.sequences, **options)[0]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    made = parser(__doc__, bits=None, group_size=128)
    made.add_argument("--grid", nargs="+", metavar="BITS:GROUP", default=["4:128", "3:128", "2:64"])
    made.add_argument("--methods", nargs="+", choices=METHODS[1:], default=list(METHODS[1:]))
    args = made.parse_args(argv)
    run = Against(args)
    original = run.runner(run.source, max(map(len, run.windows)))
    run.introduce("Against round to nearest")
    base = likelihood.score(original, run.windows).perplexity
    print(f"original: perplexity {base:.4f}\n")
    for bits, group_size in (map(int, each.split(":")) for each in args.grid):
        rows: dict[str, list[Any]] = {}
        facts: dict[str, Any] = {}
        rounded = None
        for method in ("rtn", *args.methods):
            began = time.monotonic()
            source = run.quantized(method, bits=bits, group_size=group_size)
            seconds = time.monotonic() - began
            runner = run.runner(source, max(map(len, run.windows)))
            found = likelihood.compare_runs(runner, original, run.windows)
            figures = {"perplexity": found.score.perplexity, "kl": found.kl.mean, "top1": found.top1.mean}
            against = ""
            if rounded is None:
                rounded, worst = runner, found.score.perplexity - base
            else:
                change = likelihood.compare_runs(runner, rounded, run.windows).change
                against = f"{change.mean:+.4f} ({change.low:+.4f} .. {change.high:+.4f})"
                figures["against_rtn"] = [change.mean, change.low, change.high]
            figures["increase"] = (found.score.perplexity - base) / worst
            rows[method] = [f"{figures['perplexity']:.4f}", f"{figures['increase']:.3f}", against]
            rows[method] += [f"{figures['kl']:.5f}", f"{figures['top1']:.2%}", f"{seconds:.0f}"]
            facts[method] = figures
        print(f"{bits} bits in groups of {group_size}")
        show(COLUMNS, rows)
        sys.stdout.flush()
        run.found[f"{bits}:{group_size}"] = facts
    print(json.dumps({"model": run.name, "original": base, "found": run.found}))


if __name__ == "__main__":
    main()
