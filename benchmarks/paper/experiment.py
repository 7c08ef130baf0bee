"""What the paper's experiments share: their command line, a model and its texts, perplexities, how they are shown."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinychat import backends, checkpoint, engine, tokenizer
from tinychat.evaluation import likelihood
from tinychat.evaluation.evaluate import WINDOW
from tinychat.quantize import from_file, quantize_in_memory
from tinychat.weights import WeightSource

ASYMMETRIC = "asymmetric (scale and zero of each group), as in the paper's code; --symmetric for its equation 1"
SYMMETRIC = "symmetric, the paper's equation 1; without --symmetric: asymmetric, as in its code"


def parser(doc: str, *, bits: int | None, group_size: int, text: bool = True) -> argparse.ArgumentParser:
    """The options that all experiments take; `bits` None: the experiment has several widths."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="an unquantized checkpoint: a directory or a hub id")
    made.add_argument("--text", type=Path, required=text, help="what perplexity is measured on, such as WikiText-2")
    made.add_argument("--calibration", type=Path, required=True, help="text, or JSON lines of {text} or {messages}")
    made.add_argument("--bits", type=int, default=bits)
    made.add_argument("--group-size", type=int, default=group_size)
    made.add_argument("--symmetric", action="store_true", help="the quantizer of the paper's equation 1")
    made.add_argument("--sequences", type=int, default=128, help="of the calibration set")
    made.add_argument("--length", type=int, default=512, help="tokens of each")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--window", type=int, default=WINDOW, help="tokens; the context where that is shorter")
    made.add_argument("--max-tokens", type=int, help="of the text, from its beginning (default: all)")
    made.add_argument("--threads", type=int)
    return made


class Experiment:
    """One model with its calibration sequences and text windows; perplexities are kept by name in `found`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        path = checkpoint.locate(args.model)
        self.source: Any = checkpoint.open(path)
        if self.source.quantization is not None:
            raise SystemExit(f"{args.model} is quantized already; give the original")
        self.words = tokenizer.load(path)
        if self.words is None:
            raise SystemExit(f"{args.model} has no tokenizer")
        self.name = path.resolve().name if Path(args.model).is_dir() else str(args.model)
        self.context = engine.max_context_size(self.source.config)
        self.windows = self.windows_of(args.text) if args.text else []
        self.sequences = self.sequences_of(args.calibration)
        self.found: dict[str, Any] = {}

    def windows_of(self, text: Path) -> list[list[int]]:
        """The text as the paper evaluates it."""
        assert self.words is not None
        ids = self.words.encode(text.read_bytes().decode("utf-8"))[: self.args.max_tokens]
        made = likelihood.windows(ids, min(self.args.window, self.context))
        if not made:
            raise SystemExit(f"{text} holds too little text to predict")
        return made

    def sequences_of(self, calibration: Path, n_sequences: int | None = None) -> list[list[int]]:
        """Calibration sequences, spread over the file."""
        length = min(self.args.length, self.context)
        return from_file(
            calibration,
            self.source.path,
            n_sequences=n_sequences or self.args.sequences,
            length=length,
            seed=self.args.seed,
        )

    def quantized(self, method: str, *, sequences: list[list[int]] | None = None, **options: Any) -> WeightSource:
        """The model through the product's quantizer, in memory."""
        settings = {"bits": self.args.bits, "group_size": self.args.group_size, **options}
        for name in ("symmetric", "seed"):
            if value := getattr(self.args, name):
                settings[name] = value
        return quantize_in_memory(self.source, method=method, sequences=sequences or self.sequences, **settings)[0]

    def runner(self, source: WeightSource, ctx_size: int) -> Any:
        """The head as it is stored, a cache that rounds nothing."""
        build = backends.choose()[0].build
        return build(source, ctx_size=ctx_size, kv_dtype="fp32", head=16, threads=self.args.threads)

    def perplexity(self, name: str, source: WeightSource, windows: list[list[int]] | None = None) -> float:
        """Of the text, or of other windows; kept under `name` and told on stderr."""
        began = time.monotonic()
        windows = windows or self.windows
        score = likelihood.score(self.runner(source, max(map(len, windows))), windows)
        self.found[name] = score.perplexity
        print(f"{name}: {score.perplexity:.4f} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        return score.perplexity

    def introduce(self, title: str, quantizer: str | None = None) -> None:
        """The lines above a table: what was measured on what."""
        a = self.args
        print(title)
        tokens = sum(map(len, self.sequences))
        print(f"  model        {self.name} ({self.source.config.dtype})")
        if self.windows:
            n, size = len(self.windows), len(self.windows[0])
            print(f"  text         {a.text.name}: {n} windows of {size} tokens, {n * (size - 1):,} predicted")
        print(f"  calibration  {a.calibration.name}: {len(self.sequences)} sequences, {tokens:,} tokens")
        print(f"  quantizer    {quantizer or (SYMMETRIC if a.symmetric else ASYMMETRIC)}")
        print("  run          output head as stored, 16-bit activations, fp32 KV cache\n")

    def finish(self) -> None:
        """The last line: JSON of method -> perplexity."""
        print(json.dumps({name: finite(value) for name, value in self.found.items()}))


def show(columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """A table: names of columns, and a row of figures or texts for each label; None is blank."""
    cells = [["", *columns], *([label, *map(_cell, values)] for label, values in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.2e}"


def finite(value: Any) -> Any:
    """For JSON, which has no infinity."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
