"""What loading costs: time and peak memory of a synthetic AWQ checkpoint, in a fresh process.

    python benchmarks/load.py [--layers 12] [--hidden-size 2048] [--vocab-size 32000]

Random weights, 4 bits in groups of 128, untied head, written to a temporary folder first. The peak holds the packed
weights, the KV cache, the interpreter, and the largest piece (a layer, or the head) as it is read; not two copies of
the model. The last line is JSON.
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
import json, sys, time
from pathlib import Path
import tinychat
began = time.perf_counter()
with tinychat.load(sys.argv[1], device="cpu", ctx_size=1024) as llm:
    seconds = time.perf_counter() - began
    llm.logits([1])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    runner = llm._runner
    print(json.dumps({
        "load_s": seconds,
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write(path, args.layers, args.hidden_size, args.vocab_size)
        file_bytes = checkpoint.open(path).file_bytes
        run = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
    result = {"file_bytes": file_bytes, **json.loads(run.stdout)}
    for name, value in result.items():
        print(f"{name:<16}{value:.2f}" if name.endswith("_s") else f"{name:<16}{value / 1e6:.0f} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
