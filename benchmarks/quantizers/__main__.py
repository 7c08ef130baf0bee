"""tinychat's quantizer beside others: the same model, the same calibration text, one evaluation.

    python benchmarks/quantizers MODEL --calibration FILE --text FILE [--methods rtn awq] [--write FILE.md]

MODEL is a 16-bit Llama in one file. Measured at --bits and --group-size: tinychat's methods; GPTQModel's own AWQ and
GPTQ with its default settings, on the very token sequences that tinychat calibrates on; llama.cpp's Q4_0, which needs
none. A checkpoint that tinychat reads is run by tinychat, GPTQModel's included; the Q4_0 file is run by llama.cpp,
whose logits are measured as ours are. At last the checkpoint of the last of --methods is run by transformers with
GPTQModel's kernels and compared with our logits.

Perplexity and KL divergence from the unquantized model (run by tinychat) are taken on the first --characters of the
text, in windows of --window tokens. Bits per weight are of the linears as they lie in the file, scales and zeros
included; megabytes are all tensors, the embedding (tinychat and GPTQModel leave it in 16 bits, llama.cpp makes it 8)
too. Seconds, by the clock and of CPU time, are from opening the model to files written, imports apart; all quantizers
but llama.cpp's use --threads.

The peers' environments are made by pip when first needed, and are those of benchmarks/peers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "peers"))

import environments  # noqa: E402  benchmarks/peers
from process import WITHOUT_AMX  # noqa: E402
from recorded import Recorded  # noqa: E402
from report import machine  # noqa: E402

from tinychat import backends, checkpoint, engine, tokenizer  # noqa: E402
from tinychat.evaluation import likelihood  # noqa: E402
from tinychat.quantize import from_file, quantize  # noqa: E402

TIMES = ("seconds", "cpu_seconds")
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass
class Row:
    """One quantization of the model: sizes, time, and what the evaluation found."""

    name: str
    runs_on: str
    linear_bits: float
    bytes: int
    times: dict[str, float]
    perplexity: float
    change: likelihood.Estimate | None = None
    kl: likelihood.Estimate | None = None
    top1: likelihood.Estimate | None = None

    def cells(self) -> str:
        """A line of the table."""
        rest = ["", "", ""]
        if self.change and self.kl and self.top1:
            change = f"{self.change.mean:+.4f} ({self.change.low:+.4f} .. {self.change.high:+.4f})"
            rest = [change, f"{self.kl.mean:.4f}", f"{self.top1.mean:.1%}"]
        times = [f"{self.times[key]:.1f}" if self.times else "" for key in TIMES]
        size = f"{self.bytes / 1e6:.2f}"
        cells = [self.name, self.runs_on, f"{self.linear_bits:.3f}", size, *times, f"{self.perplexity:.3f}", *rest]
        return f"| {' | '.join(cells)} |"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"change": self.change, "kl": self.kl, "top1": self.top1}
        given = {key: [value.mean, value.low, value.high] for key, value in figures.items() if value}
        return {key: value for key, value in vars(self).items() if key not in figures} | given


class Comparison:
    """The model, its texts as tokens, and the folder in which everything is made."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.path = checkpoint.locate(args.model)
        self.source = checkpoint.open(self.path)
        words = tokenizer.load(self.path)
        if words is None or self.source.quantization is not None:
            raise SystemExit(f"{args.model} must be an unquantized checkpoint with a tokenizer")
        limit = engine.max_context_size(self.source.config)
        ids = words.encode(args.text.read_text(encoding="utf-8")[: args.characters])
        self.windows = likelihood.windows(ids, min(args.window, limit))
        self.length = min(args.length, limit)
        self.calibration = folder / "calibration.json"
        sequences = from_file(args.calibration, self.path, n_sequences=args.sequences, length=self.length)
        self.calibration.write_text(json.dumps(sequences))
        self.calibrated = (
            f"{len(sequences)} sequences of at most {self.length} tokens, {sum(map(len, sequences)):,} in all"
        )
        self.asked = folder / "asked.json"
        self.asked.write_text(json.dumps([window[:-1] for window in self.windows]))
        self.versions: set[str] = set()

    def runner(self, path: Path) -> backends.Runner:
        """tinychat's, rounding nothing but the weights as they are stored."""
        size = max(map(len, self.windows))
        return backends.choose()[0].build(
            checkpoint.open(path), ctx_size=size, kv_dtype="fp32", head=16, threads=self.args.threads
        )

    def recorded(self, path: Path) -> Recorded:
        """A peer's logits, in the place of a runner."""
        return Recorded(path, [window[:-1] for window in self.windows])

    def original(self) -> Row:
        """The model as it is."""
        score = likelihood.score(self.runner(self.path), self.windows)
        return Row("unquantized", "tinychat", 16, self.source.file_bytes, {}, score.perplexity)

    def measured(self, name: str, runs_on: str, model: Any, bits: float, size: int, times: dict[str, float]) -> Row:
        """A quantization against the original."""
        found = likelihood.compare_runs(model, self.runner(self.path), self.windows)
        times = {key: times[key] for key in TIMES}
        row = Row(name, runs_on, bits, size, times, found.score.perplexity, found.change, found.kl, found.top1)
        print(row.cells(), file=sys.stderr, flush=True)
        return row

    def of_checkpoint(self, name: str, path: Path, times: dict[str, float]) -> Row:
        """A quantized checkpoint in Hugging Face's layout."""
        bits, size = stored(path)
        per_weight = bits / checkpoint.open(path).n_quantized
        return self.measured(name, "tinychat", self.runner(path), per_weight, size, times)

    def ours(self, method: str) -> Row:
        """tinychat's quantizer."""
        path, args = self.folder / f"tinychat-{method}", self.args
        began = time.process_time()
        report = quantize(
            self.path,
            path,
            method=method,
            bits=args.bits,
            group_size=args.group_size,
            calibration=args.calibration,
            n_sequences=args.sequences,
            length=self.length,
            progress=False,
        )
        return self.of_checkpoint(
            f"tinychat {method}", path, {"seconds": report.seconds, "cpu_seconds": time.process_time() - began}
        )

    def gptqmodel(self, method: str) -> Row:
        """GPTQModel's quantizers."""
        path = self.folder / f"gptqmodel-{method}"
        options = ["--method", method, "--bits", str(self.args.bits), "--group-size", str(self.args.group_size)]
        task = ["quantize", str(self.path), str(path), "--sequences", str(self.calibration), *options]
        facts = self.ask("gptqmodel", "gptqmodel_worker.py", task)
        return self.of_checkpoint(f"GPTQModel {method}", path, facts)

    def q4_0(self) -> Row:
        """llama.cpp's Q4_0."""
        path, logits = self.folder / "q4_0.gguf", self.folder / "q4_0.npy"
        made = self.ask("llama.cpp", "gguf_worker.py", ["quantize", str(self.path), str(path)])
        self.ask("llama.cpp", "gguf_worker.py", ["logits", str(path), str(logits), "--sequences", str(self.asked)])
        bits = made["linear_bits"] / made["weights"]
        return self.measured("llama.cpp Q4_0", "llama.cpp", self.recorded(logits), bits, made["bytes"], made)

    def elsewhere(self, method: str) -> dict[str, Any]:
        """Our checkpoint under transformers with GPTQModel's kernels, against our own logits of it."""
        path, logits = self.folder / f"tinychat-{method}", self.folder / "elsewhere.npy"
        task = ["logits", str(path), str(logits), "--sequences", str(self.asked)]
        facts = self.ask("gptqmodel", "gptqmodel_worker.py", task)
        runner, at, largest, size = self.runner(path), 0, 0.0, 0.0
        table = np.load(logits, mmap_mode="r")
        for window in self.windows:
            for piece in likelihood.logits(runner, window[:-1]):
                largest = max(largest, float(np.abs(piece - table[at : at + len(piece)]).max()))
                size = max(size, float(np.abs(piece).max()))
                at += len(piece)
        found = likelihood.compare_runs(self.recorded(logits), runner, self.windows)
        return {
            "checkpoint": method,
            "kernels": facts["kernels"],
            "largest_difference": largest,
            "largest_logit": size,
            "kl": found.kl.mean,
            "top1": found.top1.mean,
        }

    def ask(self, environment: str, script: str, task: list[str]) -> dict[str, Any]:
        """The JSON that a peer's worker prints last; SystemExit, with its log's place, where it fails."""
        command = [str(environments.python(environment, self.args.env_dir.resolve())), str(HERE / script), *task]
        threads = str(self.args.threads)
        # GPTQModel's pool of one thread, its choice on two cores, is less than it then asks of it.
        variables = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": "2"}
        log = self.args.env_dir.resolve() / "logs" / f"{environment}-{task[0]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        for more in ({}, WITHOUT_AMX):
            with log.open("wb") as out:
                done = subprocess.run(command, env=variables | more, stdout=subprocess.PIPE, stderr=out, text=True)
            if done.returncode != -signal.SIGILL:
                break
        if done.returncode:
            raise SystemExit(f"{script} failed: see {log}")
        facts = json.loads(done.stdout.splitlines()[-1])
        self.versions.add(facts["version"])
        return facts


def stored(path: Path) -> tuple[int, int]:
    """(bits of the quantized linears, bytes of all tensors) in the safetensors files of a checkpoint."""
    bits = size = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                size += end - begin
                bits += 8 * (end - begin) if name.endswith(PARTS) else 0
    return bits, size


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quantizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="an unquantized checkpoint: a directory or a hub id")
    add("--calibration", type=Path, required=True, metavar="FILE", help="text, or JSON lines")
    add("--text", type=Path, required=True, metavar="FILE", help="what is predicted")
    add("--characters", type=int, default=200_000, metavar="N", help="of the text (default: %(default)s)")
    add("--window", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    add("--methods", nargs="+", default=["rtn", "awq"], metavar="METHOD", help="tinychat's (default: rtn awq)")
    add("--bits", type=int, default=4)
    add("--group-size", type=int, default=128)
    add("--sequences", type=int, default=128, metavar="N", help="for calibration (default: %(default)s)")
    add("--length", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    add("--threads", type=int, default=2, metavar="N")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinychat" / "peers"
    add("--env-dir", type=Path, default=cache, metavar="DIR", help="the peers' environments (default: %(default)s)")
    add("--write", type=Path, metavar="FILE.md", help="write the table there, too")
    return parser.parse_args()


def main() -> None:
    """Quantize, measure and report."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="quantizers-") as folder:
        made = Comparison(args, Path(folder))
        rows = [made.original(), *map(made.ours, args.methods), *map(made.gptqmodel, ("awq", "gptq"))]
        if args.bits == 4:
            rows.append(made.q4_0())
        there = made.elsewhere(args.methods[-1])
    command = shlex.join(["python", "benchmarks/quantizers", *sys.argv[1:]])
    tokens = sum(len(window) - 1 for window in made.windows)
    text = "\n".join(
        (
            f"# Quantizers: {Path(args.model).name}, {args.bits} bits in groups of {args.group_size}",
            "",
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine()}; {', '.join(sorted(made.versions))}.",
            "",
            f"    {command}",
            "",
            f"{tokens:,} tokens predicted; calibrated on {made.calibrated}.",
            "Log-likelihood of a token in nats against the unquantized model, with its paired 95 % interval.",
            "",
            "| quantizer | run by | bits of a weight | MB in all | s | CPU s | perplexity | log-likelihood | KL "
            "| top-1 |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(row.cells() for row in rows),
            "",
            f"tinychat's {there['checkpoint']} checkpoint under transformers and GPTQModel ({there['kernels']}):",
            f"largest difference from tinychat's logits {there['largest_difference']:.4f}, where the largest logit is "
            f"{there['largest_logit']:.1f};",
            f"KL {there['kl']:.2e}, same likeliest token {there['top1']:.2%}.",
            "",
        )
    )
    print(text)
    if args.write:
        args.write.write_text(text)
    origin = {"benchmark": "quantizers", "machine": machine(), "command": command, "versions": sorted(made.versions)}
    print(json.dumps(origin | {"tokens": tokens, "rows": [row.facts() for row in rows], "elsewhere": there}))


if __name__ == "__main__":
    main()
