"""Tiny checkpoint directories, made with the safetensors library and loops after the format's description."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LINEARS = {  # module: (N, K)
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def plain(dtype=np.float16, seed=0) -> dict[str, np.ndarray]:
    """The tensors of an unquantized model of CONFIG."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (40, 64), "model.norm": (64,), "lm_head": (40, 64)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm": (64,), f"{at}post_attention_layernorm": (64,)}
        shapes |= {at + name: shape for name, shape in LINEARS.items()}
    return {f"{name}.weight": rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def pack_words(values: np.ndarray) -> np.ndarray:
    """[rows, N] of 0..15 -> int32 [rows, N/8], nibble by nibble."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for row in range(out.shape[0]):
        for word in range(out.shape[1]):
            for i in range(8):
                out[row, word] |= np.uint32(int(values[row, 8 * word + order[i]]) << 4 * i)
    return out.view(np.int32)


def quantized(group_size=32, skip=("lm_head",), seed=0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tensors of an AWQ checkpoint, the weights [N, K] in fp64 that they stand for)."""
    rng = np.random.default_rng(seed)
    tensors, meant = plain(seed=seed), {}
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]:
        if any(part in name for part in skip):
            continue
        n, k = tensors.pop(f"{name}.weight").shape
        group = k if group_size == -1 else group_size
        q, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
        s = (rng.random((k // group, n)) + 0.01).astype(np.float16)
        tensors |= {f"{name}.qweight": pack_words(q), f"{name}.qzeros": pack_words(z), f"{name}.scales": s}
        meant[name] = ((q - z.repeat(group, 0)) * s.astype(np.float64).repeat(group, 0)).T
    return tensors, meant


def write(directory: Path, tensors: dict[str, np.ndarray], config: dict | None = None, **changes) -> Path:
    """A checkpoint directory of one file; `changes` are keys of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**(config or CONFIG), **changes}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_sharded(directory: Path, tensors: dict[str, np.ndarray], n: int = 2, **changes) -> Path:
    """The same in `n` shards with an index."""
    write(directory, {}, **changes)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        shard = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = dict(list(tensors.items())[i::n])
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: dict) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(header: str | bytes | dict, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with this header, right or wrong."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data
