"""Table 2: what multiplying the 1 % salient channels by s does to the scales of their groups, and to perplexity.

    python benchmarks/paper/table2.py MODEL --text FILE --calibration FILE [--bits 3] [--group-size 128]

Over all groups of all linears: the share whose delta changed, the mean of delta'/delta, and that divided by s, which is
the error that is left of a salient channel's (section 3.2, equation 3). Salient: the largest mean |x|; at least one
channel of each linear. The paper: s = 2 is best, beyond it the other channels' errors grow.
"""

from __future__ import annotations

import channels
import numpy as np
import published
from experiment import Experiment, parser, show

FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)
SHARE = 0.01


def statistics(
    run: Experiment, quantizer: channels.Quantizer, magnitudes: channels.Magnitudes, s: float
) -> tuple[float, float]:
    """(share of deltas that s changes, mean of delta'/delta), over all groups that hold a weight."""
    ratios = []
    choose = channels.by_activation(magnitudes, SHARE)
    for index in range(run.source.config.n_layers):
        for name, i, weight in channels.weights(run.source.layer(index)):
            factors = np.ones(weight.shape[1], np.float32)
            factors[choose(index, name, i, weight)] = s
            before, after = quantizer(weight)[1], quantizer(weight * factors)[1]
            ratios.append((after / np.where(before > 0, before, 1))[before > 0])
    every = np.concatenate(ratios).astype(np.float64)
    return float((every != 1).mean()), float(every.mean())


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parser(__doc__, bits=3, group_size=128).parse_args(argv)
    run = Experiment(args)
    quantizer = channels.Quantizer(args.bits, args.group_size, args.symmetric)
    magnitudes = channels.magnitudes(run.source, run.sequences)
    choose = channels.by_activation(magnitudes, SHARE)
    found = [statistics(run, quantizer, magnitudes, s) for s in FACTORS]
    perplexities = [
        run.perplexity(f"s={s:g}", channels.Changed(run.source, channels.scaled(quantizer, choose, s))) for s in FACTORS
    ]

    name, theirs = published.closest(published.TABLE2, args.model, "OPT-6.7B")
    run.introduce(f"Table 2: INT{args.bits}-g{args.group_size}, the 1 % salient channels times s")
    labels = ("groups whose delta changed", "mean delta'/delta", "mean delta'/delta / s", "perplexity")
    ours = (
        [share for share, _ in found],
        [ratio for _, ratio in found],
        [ratio / s for (_, ratio), s in zip(found, FACTORS, strict=True)],
        perplexities,
    )
    rows = {}
    for label, paper, mine in zip(labels, theirs, ours, strict=True):
        form = "{:.1%}" if label == labels[0] else "{:.2f}" if label == labels[3] else "{:.3f}"
        rows[f"{label}: paper, {name} (INT3-g128)"] = [form.format(x) for x in paper]
        rows[f"{label}: ours, {run.name}"] = [form.format(x) for x in mine]
    show([f"s={s:g}" for s in FACTORS], rows)
    run.finish()


if __name__ == "__main__":
    main()
