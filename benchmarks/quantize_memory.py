"""What the quantizer keeps in memory, against its bound, on random weights in the shape of a published model.

    python benchmarks/quantize_memory.py --shape llama-2-7b --layers 3 --directory build/quantize-memory [--method awq]
    [--device cuda]

The bound is two decoder layers in fp32, the calibration activations and the embedding in fp16, beyond what Python and
PyTorch take alone. Layers come and go one at a time, so that a few of them tell of all: the peak does not grow with
their number (try --layers 2 and 4). The quantizer runs in a process of its own; its peak is what the system says,
mapped pages of the source included. The checkpoints are removed at the end. The last line is JSON. On a GPU the time
is what matters; that of starting it is in the first layer's, and the peak of its own memory is told too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tinychat import checkpoint
from tinychat.bench import shapes, write
from tinychat.checkpoint.inventory import segments
from tinychat.weights import LINEARS

PROGRAM = """
import json, resource, sys
import torch
from tinychat.quantize import calibration, pipeline, quantize
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, (source, output, options) = peak(), json.loads(sys.argv[1])
sequences = [[(7 * i + j) % 1000 for j in range(options["length"])] for i in range(options["n_sequences"])]
calibration.load = lambda *given, **more: (sequences, "tokens of this benchmark")  # sampling is not what is measured
def commit(state, layers, *given, commit=pipeline._State.commit):
    commit(state, layers, *given)
    print(json.dumps({"layers": layers}), flush=True)
pipeline._State.commit = commit
report = quantize(source, output, **options)
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
print(json.dumps({"before": before, "peak": peak(), "gpu": gpu, "seconds": report.seconds, "notes": report.notes}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--method", default="awq")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--n-sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    args.directory.mkdir(parents=True)
    try:
        source = random_weights(args.shape, args.layers, args.directory / "source")
        opened = checkpoint.open(source)
        options = {"method": args.method, "n_sequences": args.n_sequences, "length": args.length}
        options["device"] = args.device
        job = json.dumps([str(source), str(args.directory / "out"), options])
        run = subprocess.run([sys.executable, "-c", PROGRAM, job], stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(args.directory)
    config = opened.config
    parts = [part.shape for name in LINEARS for part in segments(config, opened.names, name, 0)]
    layer = 4 * sum(n * k for n, k in parts)
    activations = 4 * args.n_sequences * args.length * config.hidden_size
    embedding = 2 * config.vocab_size * config.hidden_size
    found = json.loads(run.stdout.splitlines()[-1])
    bound, taken = 2 * layer + activations + embedding, found["peak"] - found["before"]
    print(f"a layer in fp32 {layer / 1e9:.2f} GB, activations {activations / 1e9:.2f}, embedding {embedding / 1e9:.2f}")
    print(f"peak {taken / 1e9:.2f} GB beyond the program's {found['before'] / 1e9:.2f}; bound {bound / 1e9:.2f}")
    if found["gpu"]:
        print(f"peak on the GPU {found['gpu'] / 1e9:.2f} GB; {'; '.join(found['notes'])}")
    print(f"{found['seconds'] / args.layers:.0f} s a layer")
    result = {"shape": args.shape, "layers": args.layers, **options, "layer_bytes": layer, "bound_bytes": bound}
    result |= {"peak_bytes": taken, "program_bytes": found["before"], "gpu_bytes": found["gpu"]}
    print(json.dumps({**result, "seconds": found["seconds"]}))


def random_weights(name: str, n_layers: int, directory: Path) -> Path:
    """A float checkpoint of so many layers in the shape called `name`, written to `directory`."""
    shape = shapes.find(name)
    return write.write(
        replace(shape, hf_config={**shape.hf_config, "num_hidden_layers": n_layers}), directory, plain=True
    )


if __name__ == "__main__":
    main()
