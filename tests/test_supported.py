"""The table of families: what `tinychat info --supported` prints is in README, with what each is tested as."""

import json
from pathlib import Path

import pytest
import test_architectures

from tinychat import architectures, cli
from tinychat.errors import ConfigError

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
ROWS = architectures.described()


def table() -> str:
    """README's. "tested as" names the models of which logits are compared with transformers'."""
    lines = ["| `model_type` | checkpoints | what is special | tested as |", "|---|---|---|---|"]
    for row in ROWS:
        name = ", ".join(f"`{name}`" for name in (row.model_type, *row.also))
        models = test_architectures.VARIANTS[row.model_type]
        lines.append(f"| {name} | {row.checkpoints} | {row.special} | {'; '.join(models)} |")
    return "\n".join(lines)


def test_readme_has_the_table():
    assert table() in README, f"README's table of families should be:\n{table()}"


def test_what_is_printed(capsys):
    assert [row.model_type for row in ROWS] == architectures.supported()
    assert all(row.checkpoints and row.special for row in ROWS), "<checkpoints>: <what is special>."
    assert cli.main(["info", "--supported"]) == 0
    text = capsys.readouterr().out
    assert all(f"{row.checkpoints}\n    {row.special}\n" in text for row in ROWS)
    assert "falcon or RefinedWeb or RefinedWebModel: Falcon" in text and "1e-4" in text
    assert "Of GGUF files: llama, qwen2, qwen3." in text
    assert cli.main(["info", "--supported", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in printed] == architectures.supported()
    assert cli.main(["info", "pebble", "--supported"]) == 2
    assert "takes no MODEL" in capsys.readouterr().err


def test_other_model_types_are_other_names_of_a_family():
    names = [name for row in ROWS for name in (row.model_type, *row.also)]
    assert len(names) == len(set(names))
    for row in ROWS:
        assert all(architectures.find(name) is architectures.find(row.model_type) for name in row.also)


BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
SOME_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_key_value_heads": 4}
MORE = {"mixtral": {"num_key_value_heads": 4}, "qwen2_moe": SOME_EXPERTS, "qwen3_moe": SOME_EXPERTS}
ABSENT = {"bloom": ("intermediate_size", "max_position_embeddings"), "mpt": ("intermediate_size",)}
# model_type, a key that changes what such a model computes and is not implemented, the value that asks for it
UNIMPLEMENTED = [
    ("bloom", "apply_residual_connection_post_layernorm", True),
    ("cohere", "use_qk_norm", True),
    ("cohere2", "use_parallel_block", False),
    ("cohere2", "position_embedding_type", "absolute"),
    ("falcon", "apply_residual_connection_post_layernorm", True),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gpt_neox", "activation_function", "gelu"),
    ("gpt_bigcode", "scale_attn_by_inverse_layer_idx", True),
    ("llama", "num_local_experts", 8),
    ("mixtral", "shared_expert_intermediate_size", 64),
    ("mpt", "no_bias", False),
    ("olmo", "rope_scaling", {"type": "su2"}),
    ("opt", "_remove_final_layer_norm", True),
    ("opt", "layer_norm_elementwise_affine", False),
    ("phi", "qk_layernorm", True),
    ("phi3", "attention_bias", True),
    ("qwen2_moe", "use_mrope", True),
    ("qwen3_moe", "shared_expert_intermediate_size", 64),
    ("smollm3", "no_rope_layers", [1, 1, 1]),
    ("stablelm", "qk_layernorm", True),
    ("starcoder2", "norm_type", "rms_norm"),
]


@pytest.mark.parametrize(("model_type", "key", "value"), UNIMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_name(model_type, key, value):
    absent = ABSENT.get(model_type, ())
    config = {name: number for name, number in BASE.items() if name not in absent}
    config |= MORE.get(model_type, {}) | {"model_type": model_type}
    architectures.translate(config)
    with pytest.raises(ConfigError, match=f"^config.json.*{key}"):
        architectures.translate({**config, key: value})


def test_an_unknown_family_is_told_those_there_are():
    with pytest.raises(ConfigError, match=r"model_type 'mamba' is not supported; supported are bloom, .*starcoder2"):
        architectures.translate({**BASE, "model_type": "mamba"})
