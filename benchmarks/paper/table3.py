"""Table 3: round to nearest, 1 % of the channels in fp16, those channels times 2, and AWQ.

    python benchmarks/paper/table3.py MODEL --text FILE --calibration FILE [--bits 3] [--group-size 128]

The first three are simulated (see `channels.py`), AWQ is the product's quantizer: a searched scale for every channel,
clipped ranges. The paper: AWQ reaches what 1 % of mixed precision reaches, with none.
"""

from __future__ import annotations

import channels
import published
from experiment import Experiment, parser, show

SHARE, FACTOR = 0.01, 2.0


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parser(__doc__, bits=3, group_size=128).parse_args(argv)
    run = Experiment(args)
    quantizer = channels.Quantizer(args.bits, args.group_size, args.symmetric)
    choose = channels.by_activation(channels.magnitudes(run.source, run.sequences), SHARE)
    run.perplexity("original", run.source)
    for name, change in (
        ("rtn", channels.rounded(quantizer)),
        ("1% fp16", channels.mixed(quantizer, choose)),
        ("s=2", channels.scaled(quantizer, choose, FACTOR)),
    ):
        run.perplexity(name, channels.Changed(run.source, change))
    run.perplexity("awq", run.quantized("awq"))

    name, theirs = published.closest(published.TABLE3, args.model, "OPT-6.7B")
    run.introduce(f"Table 3: INT{args.bits}-g{args.group_size}; perplexity")
    rows = {
        f"paper, {name} (INT3-g128)": [published.ORIGINAL[name], *theirs],
        f"ours, {run.name}": list(run.found.values()),
    }
    show(["original", "RTN", "1% fp16", "s=2", "AWQ"], rows)
    run.finish()


if __name__ == "__main__":
    main()
