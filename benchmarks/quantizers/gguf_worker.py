"""llama.cpp, in its own environment: a Llama of Hugging Face's layout as a Q4_0 file, and the logits that come of it.

    python gguf_worker.py quantize MODEL OUTPUT.gguf
    python gguf_worker.py logits MODEL.gguf OUTPUT.npy --sequences IDS.json

The file is written in fp16 without a vocabulary (texts are token ids) and quantized by llama.cpp's own quantizer.
Logits are float32 [tokens, vocabulary], window after window. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def read(folder: Path) -> dict[str, np.ndarray]:
    """The fp16 tensors of model.safetensors."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if entry["dtype"] != "F16":
                raise SystemExit(f"{name} is {entry['dtype']}; this worker reads F16")
            tensors[name] = np.frombuffer(data[start + begin : start + end], np.float16).reshape(entry["shape"])
    return tensors


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp rotates them: neighbours are a pair, where Hugging Face pairs halves of a head."""
    rows, k = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, k).swapaxes(1, 2).reshape(rows, k)


def write(folder: Path, path: Path) -> None:
    """The model in fp16."""
    config, tensors = json.loads((folder / "config.json").read_text()), read(folder)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"].astype(np.float32))
    if not config.get("tie_word_embeddings"):
        writer.add_tensor("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, name in LINEARS.items():
            weight = tensors[f"model.layers.{layer}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = interleaved(weight, heads if name == "attn_q" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight))
        for theirs, name in NORMS.items():
            norm = tensors[f"model.layers.{layer}.{theirs}.weight"].astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Q4_0, and what each kind of tensor became."""
    began, busy = time.monotonic(), time.process_time()
    exact = args.output.with_suffix(".f16.gguf")
    write(args.model, exact)
    params = api.llama_model_quantize_default_params()
    params.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_0
    params.nthread = 1
    if api.llama_model_quantize(str(exact).encode(), str(args.output).encode(), params):
        raise SystemExit("llama.cpp's quantizer failed")
    times = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - busy}
    found = gguf.GGUFReader(args.output).tensors
    linears = [tensor for tensor in found if tensor.name.split(".")[-2] in LINEARS.values()]
    rest = {
        tensor.name: tensor.tensor_type.name for tensor in found if tensor.name.startswith(("token_embd", "output."))
    }
    return {
        **times,
        "version": f"llama-cpp-python {version('llama-cpp-python')}",
        "linear_bits": 8 * sum(int(tensor.n_bytes) for tensor in linears),
        "weights": sum(int(tensor.n_elements) for tensor in linears),
        "bytes": sum(int(tensor.n_bytes) for tensor in found),
        "kinds": {**{tensor.tensor_type.name: "linears" for tensor in linears}, **rest},
    }


def logits(args: argparse.Namespace) -> dict[str, Any]:
    """Every window by itself."""
    sequences = json.loads(args.sequences.read_text())
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(args.model).encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(map(len, sequences))
    options.n_threads = options.n_threads_batch = args.threads
    options.type_k = options.type_v = 0  # fp32: the cache rounds nothing
    options.flash_attn_type = 0
    context = api.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    found = np.lib.format.open_memmap(args.output, "w+", np.float32, (sum(map(len, sequences)), size))
    start = 0
    for ids in sequences:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        if api.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        found[start : start + len(ids)] = np.ctypeslib.as_array(api.llama_get_logits(context), (len(ids), size))
        api.llama_batch_free(batch)
        start += len(ids)
    found.flush()
    return {"version": f"llama-cpp-python {version('llama-cpp-python')}"}


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("quantize", "logits"))
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sequences", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps((quantize if args.task == "quantize" else logits)(args)))


if __name__ == "__main__":
    main()
