"""tinychat beside other engines: the same shapes, the same machine, in turns.

    python benchmarks/peers                                    # TinyLlama-1.1B's shape, every peer, 1 and 2 threads
    python benchmarks/peers --only 'llama.cpp*' --threads 1    # tinychat and llama.cpp alone
    python benchmarks/peers --shape llama-2-7b                 # llama.cpp alone, unless --only says otherwise
    python benchmarks/peers --shape llama-2-7b --load          # from the command to the first token, and peak memory;
                                                               # free memory is fetched from a host before each start

Peers: llama.cpp (Q4_0; in its own choice of layout, with rows repacked, and as the file lies), Hugging Face
transformers (eager; in bf16, and in fp32, for which every CPU has instructions), transformers with GPTQModel on the
very AWQ checkpoint that tinychat runs, OpenVINO GenAI (int4 in groups of 128; with its default hints and with int8
activations). Weights are random: speed does not depend on them. On first use each peer gets an environment of its own
(venv, pip; llama.cpp is compiled for this machine: 5 to 15 minutes in all) and each shape its models; both are kept in
--env-dir.

Every engine is loaded in a process of its own, with a given number of threads, and answers requests; while one is
measured the others are stopped. In each round every engine decodes (a prompt of 4 tokens, 200 more, or what fits into
--seconds; median latency) between two reads of memory with as many threads, and prefills 512 tokens. Reported are
medians over the rounds with the least and the greatest, and ratios, which are taken within rounds. An engine that
cannot be made or fails is named with the reason; its rounds before that count, and the others go on. The last line is
JSON. An idle machine is worth more than many rounds.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import measure
import report

from tinychat.bench.shapes import SHAPES

LLAMAS = [name for name, shape in SHAPES.items() if shape.hf_config["model_type"] == "llama"]
FEW = {"llama-2-7b": ["llama.cpp", "llama.cpp-repack"]}  # the peers worth time and memory at a shape; elsewhere all


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [peer.name for peer in contenders.PEERS]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=LLAMAS, default="tinyllama-1.1b", help="(default: %(default)s)")
    add("--only", nargs="+", metavar="PEER", help=f"names or patterns: {', '.join(names)}")
    add("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    add("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    add("--tokens", type=int, default=200, metavar="N", help="to decode in a round (default: %(default)s)")
    add("--seconds", type=float, default=5.0, metavar="S", help="decode no longer in a round (default: %(default)s)")
    add("--activations", type=int, nargs="+", choices=(16, 8), default=[], help="tinychat's: each gets a row")
    add("--head", type=int, choices=(16, 8), help="bits of tinychat's output head (default: tinychat's own)")
    add("--unquantized", action="store_true", help="a row of tinychat on an fp16 checkpoint: what fusion alone brings")
    add("--load", action="store_true", help="measure starts instead: the last of --threads, context 512")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinychat" / "peers"
    add("--env-dir", type=Path, default=cache, metavar="DIR", help="environments and models (default: %(default)s)")
    add("--write", type=Path, metavar="FILE.md", help="write the tables there, too")
    args = parser.parse_args()
    for value, name in ((args.rounds, "--rounds"), (args.tokens, "--tokens"), (min(args.threads), "--threads")):
        if value < 1:
            parser.error(f"{name} must be at least 1")
    wanted = args.only or FEW.get(args.shape, names)
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            parser.error(f"no peer is called {pattern}; there are {', '.join(names)}")
    args.peers = [peer for peer in contenders.PEERS if any(fnmatch.fnmatch(peer.name, pattern) for pattern in wanted)]
    return args


def main() -> None:
    """Measure and report."""
    args = arguments()
    folder = args.env_dir.resolve()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    plan = measure.Plan(
        contenders=[*contenders.tinychats(args.shape, args.activations, args.head, args.unquantized), *args.peers],
        models=contenders.Models(folder, args.shape),
        threads=args.threads,
        rounds=args.rounds,
        tokens=args.tokens,
        seconds=args.seconds,
        logs=logs,
    )
    result: dict[str, Any] = report.facts(args.shape)
    found: list[Any]
    if args.load:
        found, missing = measure.starts(plan)
        table = report.starts(found)
        result["starts"] = [asdict(start) for start in found]
    else:
        found, missing = measure.speeds(plan)
        table = report.speeds(found)
        result |= {"runs": [asdict(run) for run in found], "ratios": report.ratios(found)}
    engines = report.engines(((entry.contender.name, entry.about) for entry in found), missing)
    text = f"{report.heading(args.shape)}\n{table}\n\n{engines}\n"
    print(text)
    if args.write:
        args.write.write_text(text)
    print(json.dumps(result | {"missing": missing}))


if __name__ == "__main__":
    main()
