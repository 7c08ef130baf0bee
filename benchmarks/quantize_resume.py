"""A quantization killed in the middle and run again, against one that was left alone, byte for byte; time and memory.

    python benchmarks/quantize_resume.py --shape tinyllama-1.1b --directory build/quantize-resume [--layers 4]

Random weights in the shape of a published model, all its layers unless fewer are asked for; twice the time of one
quantization. The kill, which no process can answer, comes in the middle of a layer. The checkpoints are removed at the
end. The last line is JSON; the exit status is 1 where a file differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import quantize_memory

from tinychat.bench import shapes


def main() -> int:
    """Run three processes, compare, print; 1 where the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="of the model, at least 2; all unless given")
    parser.add_argument("--directory", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--method", default="awq")
    parser.add_argument("--n-sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    n_layers = args.layers or shapes.find(args.shape).hf_config["num_hidden_layers"]
    options = {"method": args.method, "n_sequences": args.n_sequences, "length": args.length}
    args.directory.mkdir(parents=True)
    try:
        source = quantize_memory.random_weights(args.shape, n_layers, args.directory / "source")
        whole, resumed = args.directory / "whole", args.directory / "resumed"
        alone = run(source, whole, options)
        print(f"uninterrupted: {alone['seconds']:.0f} s, peak {beyond(alone):.2f} GB beyond the program's", flush=True)
        killed = run(source, resumed, options, n_layers // 2)
        print(f"killed {killed['into']:.0f} s after layer {killed['layers']} of {n_layers} was finished", flush=True)
        again = run(source, resumed, options)
        print(f"resumed: {again['seconds']:.0f} s of work in all, peak {beyond(again):.2f} GB beyond the program's")
        files = sorted({file.name for side in (whole, resumed) for file in side.iterdir()})
        differing = [name for name in files if content(whole / name) != content(resumed / name)]
    finally:
        shutil.rmtree(args.directory)
    print(
        f"{len(files)} files, " + (f"not the same: {', '.join(differing)}" if differing else "the same byte for byte")
    )
    result = {"shape": args.shape, "layers": n_layers, **options, "uninterrupted": alone, "killed": killed}
    print(json.dumps({**result, "resumed": again, "files": len(files), "differing": differing}))
    return int(bool(differing))


def run(source: Path, output: Path, options: dict[str, Any], kill_after: int | None = None) -> dict[str, Any]:
    """What the program says at its end; with `kill_after` so many layers, it is killed half a layer later."""
    job = json.dumps([str(source), str(output), options])
    command = [sys.executable, "-c", quantize_memory.PROGRAM, job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = found = None
        for line in process.stdout:
            found = json.loads(line)
            if kill_after is None or "layers" not in found:
                continue
            if not found["layers"]:
                began = time.monotonic()
            elif began is not None and found["layers"] == kill_after:
                into = (time.monotonic() - began) / kill_after / 2
                time.sleep(into)
                process.kill()
                return {"layers": kill_after, "into": into}
    if process.returncode or found is None or kill_after is not None:
        raise SystemExit(f"the quantizer ended with {process.returncode}")
    return found


def beyond(found: dict[str, Any]) -> float:
    """Gigabytes that quantizing took beyond what the program takes alone."""
    return (found["peak"] - found["before"]) / 1e9


def content(file: Path) -> bytes | None:
    """None where there is no such file."""
    return file.read_bytes() if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
