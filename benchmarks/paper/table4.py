"""Table 4: round to nearest, GPTQ, GPTQ with reordering, AWQ, at 3 and 4 bits. Table 5 is the same on other models.

    python benchmarks/paper/table4.py MODEL --text FILE --calibration FILE [--bits 3] [--group-size 128]

Every method is the product's. GPTQ-R ("reordering") takes the columns in the order of their activations. The paper's
Table 5 has Mistral-7B and Mixtral-8x7B: give those models.
"""

from __future__ import annotations

import published
from experiment import Experiment, parser, show

METHODS = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq-r": ("gptq", {"act_order": "static"}),
    "awq": ("awq", {}),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    made = parser(__doc__, bits=None, group_size=128)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = made.parse_args(argv)
    run = Experiment(args)
    widths = (args.bits,) if args.bits else (3, 4)
    run.perplexity("original", run.source)
    for bits in widths:
        for name in args.methods:
            method, options = METHODS[name]
            run.perplexity(f"int{bits}-g{args.group_size} {name}", run.quantized(method, bits=bits, **options))

    rows = {}
    for bits in widths:
        width = f"INT{bits}-g{args.group_size}"
        if bits in published.TABLE4:
            name, theirs = published.closest(published.TABLE4[bits], args.model, "Llama-2-7B")
            shown = [x for key, x in zip(METHODS, theirs, strict=True) if key in args.methods]
            rows[f"INT{bits}-g128: {published.whose(name)}, {name}"] = [published.ORIGINAL[name], *shown]
        else:
            rows[f"INT{bits}: none in the paper"] = [None] * (1 + len(args.methods))
        ours = [run.found[f"int{bits}-g{args.group_size} {name}"] for name in args.methods]
        rows[f"{width}: ours, {run.name}"] = [run.found["original"], *ours]
    run.introduce("Table 4 (and 5): perplexity")
    show(["original", *(name.upper() for name in args.methods)], rows)
    run.finish()


if __name__ == "__main__":
    main()
