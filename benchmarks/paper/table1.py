"""Table 1: round to nearest, with 0.1, 1 and 3 % of the channels kept in fp16, chosen in three ways.

    python benchmarks/paper/table1.py MODEL --text FILE --calibration FILE [--bits 3] [--group-size 128]

Channels are input channels (columns) of every linear of the decoder, at least one of each; groups keep the range that
they have with those channels. Chosen by the mean magnitude of their activations, by the norm of their weights, and at
random (--seed). The paper: keeping 1 % by activation nearly closes the gap, the other two do little.
"""

from __future__ import annotations

import channels
import published
from experiment import Experiment, parser, show

SHARES = (0.001, 0.01, 0.03)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parser(__doc__, bits=3, group_size=128).parse_args(argv)
    run = Experiment(args)
    quantizer = channels.Quantizer(args.bits, args.group_size, args.symmetric)
    magnitudes = channels.magnitudes(run.source, run.sequences)
    ours: list[list[float]] = []
    run.perplexity("original", run.source)
    run.perplexity("rtn", channels.Changed(run.source, channels.rounded(quantizer)))
    for way in ("activation", "weight", "random"):
        ours.append([])
        for share in SHARES:
            choose = {
                "activation": channels.by_activation(magnitudes, share),
                "weight": channels.by_weight(share),
                "random": channels.at_random(share, args.seed),
            }[way]
            source = channels.Changed(run.source, channels.mixed(quantizer, choose))
            ours[-1].append(run.perplexity(f"{way} {share:.1%}", source))

    name, (rtn, *theirs) = published.closest(published.TABLE1, args.model, "OPT-6.7B")
    run.introduce(f"Table 1: INT{args.bits}-g{args.group_size}, some channels in fp16; perplexity")
    columns = ["original", "RTN", *(f"{way} {s:.1%}" for way in ("act.", "weight", "random") for s in SHARES)]
    rows = {
        f"paper, {name} (INT3-g128)": [published.ORIGINAL[name], rtn, *(x for part in theirs for x in part)],
        f"ours, {run.name}": [run.found["original"], run.found["rtn"], *(x for part in ours for x in part)],
    }
    show(columns, rows)
    hidden = run.source.config.hidden_size
    kept = ", ".join(f"{max(1, round(s * hidden))} ({max(1, round(s * hidden)) / hidden:.1%})" for s in SHARES)
    print(f"channels kept of {hidden}: {kept}\n")
    run.finish()


if __name__ == "__main__":
    main()
