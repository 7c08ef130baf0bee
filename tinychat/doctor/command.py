"""The command line of `tinychat doctor`, and the gathering of its facts. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinychat.arguments import add_device, add_source, source_options
from tinychat.errors import UsageError

CANNOT_RUN = 1  # a model: the one asked for, or any


def fill(parser: argparse.ArgumentParser) -> None:
    """The options of `tinychat doctor`."""
    parser.epilog = """examples:
  tinychat doctor                                   this machine: what runs, what fits, what holds it back
  tinychat doctor Qwen/Qwen2.5-7B-Instruct-AWQ      does it fit, and how fast can it be; exit code 1 where it does not
  tinychat doctor ./my-model -c 8192 --kv-type int8
  tinychat doctor --json                            for a bug report

Decoding reads every weight once a token: memory sets one limit of its speed, the kernels' arithmetic the other. Both
are measured here, for a second or two; 'tinychat bench' measures the real thing. Nothing is loaded or changed, but a
hub id that is not in the cache is downloaded first, whole, as to run it."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory, GGUF file or hub id to judge as well")
    parser.add_argument("--no-probe", action="store_true", help="measure nothing: no speeds, but at once")
    parser.add_argument("--boards", action="store_true", help="only which models fit boards of 1 to 8 GB, as Markdown")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_device(parser)
    add_source(parser)


def run(args: argparse.Namespace) -> int:
    """Gather, print."""
    if args.boards:
        from tinychat.backends import cpu
        from tinychat.doctor import models

        print(models.board_table(cpu.FOOTPRINT))
        return 0
    from tinychat.doctor.report import report

    if args.model is None and (args.ctx_size or args.head):
        raise UsageError("a context (-c) and the bits of a head (--head) are a model's; name a MODEL")
    facts = gather(
        model=args.model,
        device=args.device,
        threads=args.threads,
        ctx_size=args.ctx_size,
        kv_dtype=args.kv_type,
        activations=args.activations,
        head=args.head,
        probe=not args.no_probe,
        **source_options(args),
    )
    print(json.dumps(facts) if args.json else report(facts))
    runs = facts["kernels"]["backend"] is not None and (facts["model"] is None or facts["model"]["fits"])
    return 0 if runs else CANNOT_RUN


def gather(
    root: Path = Path("/"),
    *,
    model: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    ctx_size: int | None = None,
    kv_dtype: str = "fp16",
    activations: int = 16,
    head: int | None = None,
    probe: bool = True,
    kernels: dict[str, Any] | None = None,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
) -> dict[str, Any]:
    """All facts, under the names that `tinychat doctor --json` prints.

    root     below which the system is read
    kernels  what `kernels.here` would say of the machine below `root`; by default, what it says of this one
    probe    measure, where the cpu or the cuda backend would run; always on this machine
    Raises what opening `model` raises; nothing about the machine does.
    """
    from tinychat import __version__, checkpoint
    from tinychat.doctor import kernels as levels
    from tinychat.doctor import machine, models, speed, throttling
    from tinychat.doctor.advice import advise

    found = levels.judged(levels.here(device) if kernels is None else kernels, root)
    processor, memory = machine.processor(root), machine.memory_facts(root)
    n_threads = threads or found["threads"] or processor["threads"]
    processor["threads"] = processor["threads"] if threads is None else threads
    measured = None
    if probe and found["used"] is not None:
        measured = speed.measure(n_threads, activations)
    elif probe and found["backend"] == "cuda":
        measured = speed.measure_gpu()
    footprint = importlib.import_module(f"tinychat.backends.{found['backend'] or 'cpu'}").FOOTPRINT
    cache = processor["cache_bytes"]
    free = memory["available"] if found["device_memory"] is None else found["device_memory"]
    judged = None
    if model is not None:
        path = checkpoint.locate(model, revision=revision, offline=offline)
        source = checkpoint.open(path, ignore_config=ignore_config)
        options = ctx_size, measured, cache, kv_dtype, head
        judged = {"name": model, **models.checked(source, footprint, free, *options)}
    facts = {
        "version": __version__,
        "board": machine.board(root),
        "processor": processor,
        "gpus": machine.gpus(root),
        "kernels": found,
        "memory": memory,
        "free": free,
        "speed": measured,
        "throttling": throttling.facts(root),
        "model": judged,
        "models": models.published(footprint, free, measured, cache, kv_dtype),
    }
    return {**facts, "advice": advise(facts)}
