"""What loading costs: time and peak memory of a synthetic AWQ checkpoint, in a fresh process.

    python benchmarks/load.py [--model DIR] [--threads N] [--layers 12] [--hidden-size 2048] [--vocab-size 32000]

Of the checkpoint DIR; without it, of random weights, 4 bits in groups of 128, untied head, in a temporary folder. The
peak holds the packed weights, the KV cache, the interpreter, and the largest piece (a layer, the head) as it is read;
not two copies of the model. Where a virtual machine first has to fetch memory from its host, that is most of the time:
system_s tells it, and a second run at once is faster. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tinychat import checkpoint
from tinychat.checkpoint import AwqFormat, CheckpointWriter, awq
from tinychat.qtensor import QTensor

LOAD = """
import json, os, sys, time
from pathlib import Path
import tinychat
began = time.perf_counter()
threads = int(sys.argv[2]) or None
with tinychat.load(sys.argv[1], device="cpu", ctx_size=512, threads=threads) as llm:
    seconds, used = time.perf_counter() - began, os.times()
    llm.logits([1])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    runner = llm._runner
    print(json.dumps({
        "load_s": seconds,
        "first_token_s": time.perf_counter() - began,
        "user_s": used.user,
        "system_s": used.system,
        "packed_bytes": runner.weight_bytes,
        "kv_bytes": runner.cache.keys.nbytes + runner.cache.values.nbytes,
        "peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024,
    }))
"""


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
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model"
        if not args.model:
            write(path, args.layers, args.hidden_size, args.vocab_size)
        source = checkpoint.open(path)
        command = [sys.executable, "-c", LOAD, str(path), str(args.threads)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    result = {"file_bytes": source.file_bytes, **json.loads(run.stdout)}
    table = 0 if source.config.tied_head else source.embed().nbytes
    result["embedding_bytes"] = table  # read in the file, where it is not the head
    result["peak_ratio"] = result["peak_rss_bytes"] / (result["packed_bytes"] + table)
    for name, value in result.items():
        print(f"{name:<16}{value / 1e6:.0f} MB" if name.endswith("_bytes") else f"{name:<16}{value:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
