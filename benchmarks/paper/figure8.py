"""Figure 8: how much calibration data is needed, and what it costs to calibrate on another domain than one evaluates.

    python benchmarks/paper/figure8.py MODEL --text FILE --calibration FILE [--other-text FILE --other-calibration FILE]

(a) Perplexity of AWQ and GPTQ calibrated on 16 to 192 sequences of --calibration. (b) With the two other files, both
methods calibrated on each domain and evaluated on each. The paper: 16 sequences do for AWQ where GPTQ needs 192, and
the wrong domain costs AWQ far less. --plot FILE.svg draws (a) where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import published
from experiment import Experiment, parser, show

SIZES = (16, 32, 64, 128, 192)
METHODS = ("awq", "gptq")


def sizes(run: Experiment, args: argparse.Namespace) -> dict[str, list[float]]:
    """(a): perplexities of each method, by the size of the calibration set."""
    found: dict[str, list[float]] = {}
    for method in args.methods:
        for n in args.sizes:
            sequences = run.sequences_of(args.calibration, n)
            if len(sequences) < n:
                raise SystemExit(
                    f"{args.calibration} holds {len(sequences)} sequences of {args.length} tokens, not {n}"
                )
            source = run.quantized(method, sequences=sequences)
            found.setdefault(method, []).append(run.perplexity(f"{method} {n}", source))
    return found


def domains(run: Experiment, args: argparse.Namespace) -> dict[str, list[str]]:
    """(b): rows of method and calibration, columns of texts; what the wrong domain costs in brackets."""
    rows: dict[str, list[str]] = {}
    texts = {path: run.windows_of(path) for path in (args.text, args.other_text)}
    for method in args.methods:
        found: dict[tuple[Path, Path], float] = {}
        for calibration in (args.calibration, args.other_calibration):
            source = run.quantized(method, sequences=run.sequences_of(calibration))
            for text, windows in texts.items():
                name = f"{method} on {calibration.name}, {text.name}"
                found[calibration, text] = run.perplexity(name, source, windows)
        own = {
            args.text: found[args.calibration, args.text],
            args.other_text: found[args.other_calibration, args.other_text],
        }
        for calibration in (args.calibration, args.other_calibration):
            rows[f"{method} calibrated on {calibration.name}: ours, {run.name}"] = [
                _cell(found[calibration, text], own[text]) for text in texts
            ]
    return rows


def theirs(method: str) -> dict[str, list[str]]:
    """The paper's rows of (b)."""
    figures = published.FIGURE8[method]
    names = ("PubMed", "Enron")
    return {
        f"{method} calibrated on {on}: paper, OPT-6.7B": [
            _cell(figures[on, text], figures[text, text]) for text in names
        ]
        for on in names
    }


def _cell(value: float, own: float) -> str:
    return f"{value:.2f}" if value == own else f"{value:.2f} ({value - own:+.2f})"


def plot(path: Path, found: dict[str, list[float]], counts: list[int], title: str) -> None:
    """(a) as a picture, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"{path} not drawn: matplotlib is not installed", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for method, values in found.items():
        axes.plot(counts, values, marker="o", label=method.upper())
    axes.set(xlabel="calibration sequences", ylabel="perplexity", title=title, xticks=counts)
    axes.legend()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    made = parser(__doc__, bits=3, group_size=128)
    made.add_argument("--other-text", type=Path, help="a text of another domain")
    made.add_argument("--other-calibration", type=Path, help="calibration text of that domain")
    made.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--plot", type=Path, metavar="FILE")
    args = made.parse_args(argv)
    if (args.other_text is None) != (args.other_calibration is None):
        made.error("--other-text and --other-calibration go together")
    run = Experiment(args)
    run.perplexity("original", run.source)
    by_size = sizes(run, args)
    by_domain = domains(run, args) if args.other_text else {}

    width = f"INT{args.bits}-g{args.group_size}"
    run.introduce(f"Figure 8: {width}; perplexity (original: {run.found['original']:.2f})")
    print("(a) by the number of calibration sequences (paper, a drawing: 16 do for AWQ where GPTQ needs 192)")
    rows = {f"{m}: ours, {run.name}": values for m, values in by_size.items()}
    show([str(n) for n in args.sizes], rows)
    print("(b) by domain: calibrated on one, evaluated on another")
    for method in args.methods:
        show(["on PubMed", "on Enron"], theirs(method))
    if by_domain:
        show([f"on {args.text.name}", f"on {args.other_text.name}"], by_domain)
    else:
        print("ours: with --other-text and --other-calibration\n")
    if args.plot:
        plot(args.plot, by_size, args.sizes, f"{run.name}, {width}")
    run.finish()


if __name__ == "__main__":
    main()
