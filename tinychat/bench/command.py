"""The command line of `tinychat bench`: its options, and what each combination of them asks for.

Imports nothing heavy until it runs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from tinychat.arguments import add_device, add_model, add_source, device_options, one_model, source_options, whole
from tinychat.errors import BackendError, UsageError
from tinychat.progress import Loading, Status

if TYPE_CHECKING:
    from tinychat.bench.subject import Options

WRITING = ("model", "model_flag", "shape", "write", "float", "json", "bits", "group_size")  # have words of their own


def fill(parser: argparse.ArgumentParser) -> None:
    """The options of `tinychat bench`."""
    parser.usage = "%(prog)s [MODEL | --shape NAME] [options]"
    parser.epilog = """examples:
  tinychat bench                                    pebble, with a thread for each core
  tinychat bench --shape llama-2-7b --threads 1 2   random weights at a real model's size, 1 thread and 2
  tinychat bench ./my-model --json | tail -n 1      the last line is one JSON object
  tinychat bench --shape llama-3-8b --repeats 1 --contexts 0 8192
  tinychat bench --shape tinyllama-1.1b --bits 2 --group-size 64
  tinychat bench --shape tinyllama-1.1b --write ./tinyllama-random

Decoding reads every weight once a token, so it can be no faster than memory. Between the tokens a probe reads memory as
fast as this machine can, with as many threads; what the tokens needed to read, over their time, is given as a fraction
of that. pp512, pp64 (a prompt of so many tokens) and tg128 (so many generated) are what llama-bench measures under
these names. 'its KV alone' is the same fraction for the keys and values that a longer context adds.
Sizes count what has to be read: codes, scales, zeros, head, keys and values, no padding. TINYCHAT_ISA forces an
instruction set. Other programs at work on the machine spoil every figure; the fractions least."""
    add_model(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--shape",
        metavar="NAME",
        help="random weights at this shape in place of MODEL: llama-2-7b, tinyllama-1.1b, llama-3-8b, "
        "llama-3.2-3b, smollm2-360m, qwen3-0.6b, qwen3-4b, mixtral-8x7b, qwen1.5-moe-a2.7b, qwen3-30b-a3b, mpt-7b "
        "or falcon-7b",
    )
    what.add_argument("--bits", type=int, choices=(2, 3, 4, 8), help="of the shape's weights (default: 4)")
    what.add_argument(
        "--group-size", type=whole, metavar="N", help="of the shape's weights (default: that of its 4-bit version)"
    )
    what.add_argument(
        "--tokens", type=whole, metavar="N", help="tokens to generate after a prompt of 4 (default: 200, as it fits)"
    )
    what.add_argument("--repeats", type=whole, default=3, metavar="N", help="of each measurement (default: 3)")
    what.add_argument(
        "--contexts",
        type=_length,
        nargs="*",
        metavar="N",
        help="decode at these context lengths, on random keys and values; no N: at none "
        "(default: 0, 2048, 8192 and 32768, as model and memory allow; the last under grouped queries only)",
    )
    what.add_argument(
        "--min-probe",
        type=float,
        metavar="GB/S",
        help="the least that the probe has to read to be valid (default: it must only be steady)",
    )
    what.add_argument("--json", action="store_true", help="one JSON object more, on the last line")
    out = parser.add_argument_group("instead of measuring")
    out.add_argument("--write", metavar="DIR", help="write a checkpoint of the shape and its random weights (AWQ)")
    out.add_argument("--float", action="store_true", help="with --write: fp16, nothing quantized")
    add_device(parser, context="what is measured needs, 513", several_threads=True)
    add_source(parser)


def run(args: argparse.Namespace) -> int:
    """Write or measure."""
    if args.shape is not None and (args.model or args.model_flag):
        raise UsageError(f"a model, {args.model or args.model_flag!r}, and --shape {args.shape!r}; give one")
    if args.shape is None and (args.bits or args.group_size):
        raise UsageError("--bits and --group-size say how a --shape is quantized; a model has its own")
    if args.write is not None and (args.bits or args.group_size):
        raise UsageError("--write writes 4 bits in the groups of the shape's 4-bit version, or --float")
    if args.float and args.write is None:
        raise UsageError("--float says what --write writes; give --write DIR, or leave --float out")
    if args.write is not None:
        return _write(args)
    from tinychat.bench.report import report

    options = _options(args)
    counts = args.threads or [None]
    results: list[dict[str, Any]] = []
    for count in counts:
        result = _measured(options, count, several=len(counts) > 1)
        print(("\n" if results else "") + report(result), flush=True)  # at once: the next run may fail
        results.append(result)
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {**results[-1], "runs": results}))
    return 0


def _options(args: argparse.Namespace) -> Options:
    from tinychat.bench.subject import Options

    return Options(
        model=None if args.shape else one_model(args),
        shape=args.shape,
        bits=args.bits or 4,
        group_size=args.group_size,
        **device_options(args),
        repeats=args.repeats,
        tokens=args.tokens,
        contexts=None if args.contexts is None else tuple(args.contexts),
        min_probe=args.min_probe,
        **source_options(args),
    )


def _measured(options: Options, threads: int | None, several: bool) -> dict[str, Any]:
    """One run. Of several each has a process of its own: a peak of memory is never that of another run's probe."""
    if not several:
        return _measure(options, threads)
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # Not a fork: the kernels' threads do not survive one. Ctrl-C ends both, the child without a word.
    fresh = ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL))
    with fresh as process:
        try:
            return process.submit(_measure, options, threads).result()
        except BrokenProcessPool:
            raise BackendError(
                f"the run with {threads} threads was ended from outside; on Linux that is how memory runs out"
            ) from None


def _measure(options: Options, threads: int | None) -> dict[str, Any]:
    from tinychat.bench.measure import measure
    from tinychat.bench.subject import Subject

    with Status() as status:
        return measure(Subject(options), threads, status)


def _write(args: argparse.Namespace) -> int:
    if args.shape is None:
        raise UsageError("--write needs --shape NAME: it writes a shape with random weights, not a model there is")
    for action in args.parser._actions:
        if action.dest not in WRITING and getattr(args, action.dest, action.default) != action.default:
            option = next(name for name in action.option_strings if name.startswith("--"))
            raise UsageError(f"{option} is for measuring, and --write measures nothing; leave {option} out")
    from tinychat.bench import shapes
    from tinychat.bench.write import write

    shape = shapes.find(args.shape)
    began = time.monotonic()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinding removes what is half written
    try:
        with Loading(args.write, "writing") as progress:
            path = write(shape, args.write, plain=args.float, progress=progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    weights = f"random {'fp16' if args.float else '4-bit'} weights"
    print(f"{path}: {args.shape}, {weights}, {size / 1e9:.2f} GB")
    if args.json:
        facts = {"path": str(path), "shape": args.shape, "weights": weights, "bytes": size, "seconds": seconds}
        print(json.dumps(facts))
    return 0


def _length(text: str) -> int:
    """A whole number, 0 or more, for argparse."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more; found {text!r}")
    return int(text)
