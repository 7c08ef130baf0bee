"""What loading costs: time and peak memory of a synthetic AWQ checkpoint, in a fresh process.

    python benchmarks/load.py [--model DIR] [--threads N] [--repeats 5] [--layers 12] [--hidden-size 2048]
                              [--vocab-size 32000]

Of the checkpoint DIR; without it, of random weights, 4 bits in groups of 128, untied head, in a temporary folder. The
peak holds the packed weights, the KV cache, the interpreter, and the largest piece (a layer, the head) as it is read;
not two copies of the model. Where a virtual machine first has to fetch memory from its host, that is most of the time:
system_s tells it, and a second run at once is faster.

Then another process loads it and copies its files in turns, with as many threads, to memory that is new to the process
as the packed weights' is. pack_gb_s and copy_gb_s are of bytes in the files: of a layer, the mean of all but the first,
and of everything; the fastest of the repeats, as the host's memory counts for neither. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tinychat import checkpoint
from tinychat.backends import cpu
from tinychat.checkpoint import AwqFormat, CheckpointWriter, awq
from tinychat.qtensor import QTensor

LOAD = """
import json, os, sys, time
from pathlib import Path
import tinychat
began = time.perf_counter()
with tinychat.load(sys.argv[1], device="cpu", ctx_size=512, threads=int(sys.argv[2])) as llm:
    seconds, used = time.perf_counter() - began, os.times()
    llm.logits([1])
    first = time.perf_counter() - began
    llm.logits([1] * 512)  # a cache that nobody has written to takes no memory
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    runner = llm._runner
    print(json.dumps({
        "load_s": seconds,
        "first_token_s": first,
        "user_s": used.user,
        "system_s": used.system,
        "packed_bytes": runner.weight_bytes,
        "kv_bytes": runner.cache.keys.nbytes + runner.cache.values.nbytes,
        "peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024,
    }))
"""

PACK = """
import gc, json, sys, threading, time
from pathlib import Path
import numpy as np
import tinychat
model, threads, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def copy():
    files = [np.memmap(path, np.uint8, "r") for path in sorted(Path(model).glob("*.safetensors"))]
    pieces = [file[at : at + (1 << 20)] for file in files for at in range(0, len(file), 1 << 20)]
    target = np.empty(len(pieces) << 20, np.uint8)  # in huge pages, where numpy may ask for them
    def part(thread):
        for i in range(len(pieces) * thread // threads, len(pieces) * (thread + 1) // threads):
            np.copyto(target[i << 20 : (i << 20) + len(pieces[i])], pieces[i])
    workers = [threading.Thread(target=part, args=(thread,)) for thread in range(threads)]
    began = time.perf_counter()
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    return time.perf_counter() - began

found = {"layer_s": [], "copy_s": []}
for _ in range(repeats):
    ends = []
    tinychat.load(
        model, device="cpu", ctx_size=16, threads=threads, progress=lambda *_: ends.append(time.perf_counter())
    ).close()
    found["layer_s"].append((ends[-1] - ends[0]) / (len(ends) - 1))
    gc.collect()
    found["copy_s"].append(copy())
print(json.dumps(found))
"""


def run(script: str, *arguments: object) -> dict[str, Any]:
    """What the script prints, in a fresh process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def write(folder: Path, layers: int, hidden: int, vocab: int) -> None:
    """A Llama checkpoint of random weights."""
    rng = np.random.default_rng(0)
    heads, mlp = hidden // 64, hidden * 11 // 4 // 128 * 128
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
        "intermediate_size": mlp,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    kv = heads // 4 * 64
    shapes = {
        f"self_attn.{name}_proj": (rows, hidden) for name, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
    }
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    with CheckpointWriter(folder) as writer:
        for name in ("model.embed_tokens", "lm_head"):
            writer.add(f"{name}.weight", rng.standard_normal((vocab, hidden), np.float32).astype(np.float16))
        writer.add("model.norm.weight", np.ones(hidden, np.float16))
        for index in range(layers):
            prefix = f"model.layers.{index}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}{norm}.weight", np.ones(hidden, np.float16))
            for name, (n, k) in shapes.items():
                codes, zeros = (rng.integers(0, 16, shape, np.uint8) for shape in ((n, k), (n, k // 128)))
                q = QTensor(codes, np.full((n, k // 128), 0.1 / k**0.5, np.float16), zeros, 4, 128)
                for ending, array in awq.pack(q).items():
                    writer.add(f"{prefix}{name}.{ending}", array)
        writer.finish(config, AwqFormat(modules_to_not_convert=("lm_head",)))


def main() -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--model", type=Path, help="a checkpoint's directory")
    parser.add_argument("--threads", type=int, help="one for each physical core")
    parser.add_argument("--repeats", type=int, default=5, help="of packing beside copying")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    threads = cpu.thread_count(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model"
        if not args.model:
            write(path, args.layers, args.hidden_size, args.vocab_size)
        source = checkpoint.open(path)
        if source.config.n_layers < 2:
            parser.error("a model of two layers at least: the first one is not timed")
        result = {"file_bytes": source.file_bytes, "threads": threads, **run(LOAD, path, threads)}
        turns = run(PACK, path, threads, args.repeats)
    table, head = source.embed().nbytes, source.head()
    layer_bytes = (source.file_bytes - table - (head.nbytes if head else 0)) / source.config.n_layers
    result["pack_gb_s"] = layer_bytes / min(turns["layer_s"]) / 1e9
    result["copy_gb_s"] = source.file_bytes / min(turns["copy_s"]) / 1e9
    result["embedding_bytes"] = table if head else 0  # read in the file, where it is not the head
    result["peak_ratio"] = result["peak_rss_bytes"] / (result["packed_bytes"] + result["embedding_bytes"])
    for name, value in result.items():
        print(f"{name:<16}{value / 1e6:.0f} MB" if name.endswith("_bytes") else f"{name:<16}{value:.3g}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
