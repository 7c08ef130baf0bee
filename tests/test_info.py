"""`tinychat info` against numbers worked out by hand for a model with zeros for weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinychat import backends, cli, info, memory
from tinychat.errors import UsageError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS = 64, 4, 2, 16, 96, 40, 3
GROUP = 32
LINEARS = {  # N, K
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


@pytest.fixture
def model(tmp_path):
    """A directory: AWQ but for the down projections and the embedding, which is the head too."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["down_proj"],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    half = lambda *shape: np.zeros(shape, np.float16)  # noqa: E731
    tensors = {"model.embed_tokens.weight": half(VOCAB, HIDDEN), "model.norm.weight": half(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors[f"{at}input_layernorm.weight"] = half(HIDDEN)
        tensors[f"{at}post_attention_layernorm.weight"] = half(HIDDEN)
        for name, (n, k) in LINEARS.items():
            if name == "mlp.down_proj":
                tensors[f"{at}{name}.weight"] = half(n, k)
                continue
            tensors[f"{at}{name}.qweight"] = np.zeros((k, n // 8), np.int32)
            tensors[f"{at}{name}.qzeros"] = np.zeros((k // GROUP, n // 8), np.int32)
            tensors[f"{at}{name}.scales"] = half(k // GROUP, n)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """A backend that is always there."""
    made = SimpleNamespace(
        __name__="tinychat.backends.paper",
        describe=lambda threads: "paper: by hand",
        FOOTPRINT=memory.Footprint(program=1000),
    )
    monkeypatch.setattr(backends, "choose", lambda device: (made, f"{device} was asked for"))


def test_facts(model):
    facts = info.gather(str(model))
    down = LAYERS * HIDDEN * MLP
    others = LAYERS * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 2)
    norms = HIDDEN * (2 * LAYERS + 1)
    assert facts["architecture"] == "llama"
    assert facts["n_parameters"] == down + others + VOCAB * HIDDEN + norms
    assert facts["weights"] == {
        "plain": {"float16": down + VOCAB * HIDDEN},
        "quantized": others,
        "method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "linears": 6 * LAYERS,
        "left_plain": [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)],
    }
    assert (facts["file_bytes"], facts["n_files"]) == ((model / "model.safetensors").stat().st_size, 1)
    assert (facts["tokenizer"], facts["chat_template"]) == (False, False)
    assert (facts["backend"], facts["backend_reason"]) == ("paper", "auto was asked for")


def test_memory_follows_the_context(model):
    per_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2  # keys and values, two bytes each
    facts = info.gather(str(model))
    assert facts["ctx_size"] == 4096 and facts["max_positions"] == 8192
    assert facts["memory"]["kv_cache"] == 4096 * per_token
    more = info.gather(str(model), ctx_size=8192, kv_dtype="fp32")
    assert more["memory"]["kv_cache"] == 8192 * per_token * 2
    small = info.gather(str(model), kv_dtype="int8")["memory"]["kv_cache"]
    assert small == 4096 * 2 * LAYERS * KV_HEADS * (HEAD_DIM + 4)  # codes, and a scale for each entry
    assert 0 < more["memory"]["weights"] == facts["memory"]["weights"] <= facts["file_bytes"]  # its table stays a file
    assert more["memory"]["total"] - facts["memory"]["total"] == 8192 * per_token * 2 - 4096 * per_token
    whole, rounded = (info.gather(str(model), head=bits)["memory"]["weights"] for bits in (16, 8))
    assert rounded == facts["memory"]["weights"] < whole
    with pytest.raises(UsageError, match="8192"):
        info.gather(str(model), ctx_size=8193)


def test_the_command_prints_a_table_or_json(model, capsys):
    assert cli.main(["info", str(model), "-c", "1000"]) == 0
    text = capsys.readouterr().out
    for fact in (
        "llama: 3 layers of width 64",
        "4 heads of 16, 2 for keys and values; MLP 96",
        "73.7 k in 4 bits, in 18 linears (awq, groups of 32: 4.62 bits each, scales included)",
        "21.0 k in float16: the embedding, model.layers.0.mlp.down_proj, ",
        "1000 of at most 8192 tokens",
        "fp16, 0.375 KiB a token",
        "none: takes token ids only",
        "not read without a tokenizer: neither 'tinychat generate' nor 'tinychat chat' works",
        "paper: by hand (auto was asked for)",
    ):
        assert fact in text, fact
    assert cli.main(["info", "-m", str(model), "--json"]) == 0
    printed, facts = json.loads(capsys.readouterr().out), info.gather(str(model))
    for each in (printed, facts):
        assert each["memory"].pop("available") > 0  # the machine's, which changes
    assert printed == facts


def test_a_tokenizer_that_cannot_be_read_does_not_hide_the_rest(model, capsys):
    (model / "tokenizer.json").write_text("{")
    facts = info.gather(str(model))
    assert facts["tokenizer"] is False and "tokenizer.json" in facts["tokenizer_error"]
    assert facts["tokenizer_error"] in info.table(facts)


def test_errors(tmp_path, capsys):
    assert cli.main(["info", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("tinychat: error: there is no directory")
