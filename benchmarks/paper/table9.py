"""Table 9: 2 bits: round to nearest, GPTQ, and GPTQ after AWQ's scaling (AWQ alone, which the paper leaves out, too).

    python benchmarks/paper/table9.py MODEL --text FILE --calibration FILE [--bits 2] [--group-size 64]

Every method is the product's. The paper: AWQ and GPTQ are orthogonal, together better than GPTQ alone.
"""

from __future__ import annotations

import published
from experiment import Experiment, parser, show

METHODS = ("rtn", "awq", "gptq", "awq+gptq")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    made = parser(__doc__, bits=2, group_size=64)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = made.parse_args(argv)
    run = Experiment(args)
    run.perplexity("original", run.source)
    for method in args.methods:
        run.perplexity(method, run.quantized(method))

    name, (rtn, gptq, both) = published.closest(published.TABLE9, args.model, "OPT-6.7B")
    theirs = {"rtn": rtn, "gptq": gptq, "awq+gptq": both}
    run.introduce(f"Table 9: INT{args.bits}-g{args.group_size}; perplexity")
    rows = {
        f"paper, {name} (INT2-g64)": [published.ORIGINAL[name], *(theirs.get(method) for method in args.methods)],
        f"ours, {run.name}": list(run.found.values()),
    }
    show(["original", *(method.upper() for method in args.methods)], rows)
    run.finish()


if __name__ == "__main__":
    main()
