"""A llama model of random weights as llama.cpp's `Q4_0` files hold it; runs where the `gguf` package is.

    python gguf_model.py CONFIG.json OUT.gguf

As llama.cpp's own quantizer does for Q4_0, the linears and the embedding become Q4_0 (blocks of 32: an fp16 scale and
32 codes, 4.5 bits per weight) and the output head Q6_K (6.5625 bits), or Q8_0 (8.5 bits, blocks of 32) where Q6_K's
blocks of 256 do not divide its inputs. No vocabulary: prompts are token ids.
The last line is JSON: the bytes read for one token, which are all but the embedding's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


def random_blocks(rng: np.random.Generator, quantization: Kind, rows: int, k: int) -> np.ndarray:
    """Bytes [rows, bytes of a row] of random codes, scaled for outputs about as large as the inputs."""
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    blocks = rng.integers(0, 256, (rows * k // block, size), np.uint8)
    if quantization == Kind.Q4_0:  # w = (code - 8) * d
        blocks[:, :2] = np.float16(1 / (4.6 * k**0.5)).reshape(1).view(np.uint8)
    elif quantization == Kind.Q8_0:  # w = code * d
        blocks[:, :2] = np.float16(1 / (73.9 * k**0.5)).reshape(1).view(np.uint8)
    else:  # Q6_K: 128 + 64 bytes of codes, 16 signed scales, d; w = (code - 32) * scale * d
        blocks[:, 192:208] = 64
        blocks[:, 208:] = np.float16(1 / (18.5 * 64 * k**0.5)).reshape(1).view(np.uint8)
    return blocks.reshape(rows, k // block * size)


def write(config: dict, path: Path) -> int:
    """The file at `path`; bytes read for one token."""
    rng = np.random.default_rng(0)
    hidden, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    read = 0

    def add(name: str, rows: int, k: int, quantization: Kind = Kind.Q4_0) -> None:
        nonlocal read
        blocks = random_blocks(rng, quantization, rows, k)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=quantization)
        read += 0 if name == "token_embd" else blocks.nbytes

    add("token_embd", config["vocab_size"], hidden)
    for i in range(layers):
        for name, rows, k in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{i}.{name}", rows, k)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    add("output", config["vocab_size"], hidden, Kind.Q8_0 if hidden % gguf.QK_K else Kind.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


if __name__ == "__main__":
    print(json.dumps({"bytes_per_token": write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))}))
