"""Checkpoints in: every published spelling is read to the same numbers, everything else is refused by name."""

import json
import pickle
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import AWQ, Q_PROJ
from tiny_models import memory_weights
from tiny_models import tiny as tiny_model

from tinychat import backends, checkpoint
from tinychat.errors import CheckpointError, ConfigError, TinychatError
from tinychat.qtensor import AwqWords, QTensor, bfloat16, canonical


def dense(weight):
    weight = canonical(weight)
    return weight.dequantize(np.float64) if isinstance(weight, QTensor) else weight.astype(np.float64)


def assert_holds(source, meant):
    """`source` (our names) stands for the weights `meant` (the file's names -> [N, K])."""
    for i in range(source.config.n_layers):
        layer, at = source.layer(i), f"model.layers.{i}."
        found = {
            "self_attn.q_proj": layer.qkv.segments[0],
            "self_attn.k_proj": layer.qkv.segments[1],
            "self_attn.v_proj": layer.qkv.segments[2],
            "self_attn.o_proj": layer.out.segments[0],
            "mlp.gate_proj": layer.up.segments[0],
            "mlp.up_proj": layer.up.segments[1],
            "mlp.down_proj": layer.down.segments[0],
        }
        for name, weight in found.items():
            np.testing.assert_array_equal(dense(weight), meant[at + name], err_msg=at + name)


def meant_by(tensors, quantized):
    plain = {n.removesuffix(".weight"): t.astype(np.float64) for n, t in tensors.items() if n.endswith(".weight")}
    return plain | quantized


def test_pebble_and_stories(data_dir):
    for name, n_parameters, dtype in (("pebble-11m", 11_015_040, np.float16), ("stories260K", 260_032, np.float32)):
        found = checkpoint.open(data_dir / name)
        assert found.n_parameters == n_parameters and found.quantization is None
        assert found.file_bytes == (data_dir / name / "model.safetensors").stat().st_size
        c = found.config
        assert found.embed().shape == (c.vocab_size, c.hidden_size) and found.embed().dtype == dtype
        for i in range(c.n_layers):
            layer = found.layer(i)
            assert layer.qkv.shape == (c.q_size + 2 * c.kv_size, c.hidden_size) and layer.qkv.bias is None
            assert layer.norm1.dtype == np.float32 and layer.q_norm is None
            assert layer.up.segments[0].dtype == dtype and not layer.up.segments[0].flags.owndata
        assert found.head() is None and found.norm().shape == (c.hidden_size,)
    assert checkpoint.open(data_dir / "pebble-11m").generation_config["top_p"] == 0.95


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("write", [tiny.write, tiny.write_sharded])
def test_plain(tmp_path, dtype, write):
    tensors = tiny.plain(dtype)
    found = checkpoint.open(write(tmp_path, tensors))
    assert_holds(found, meant_by(tensors, {}))
    assert found.embed().dtype == found.head().segments[0].dtype == dtype
    assert np.array_equal(found.head().segments[0], tensors["lm_head.weight"])
    assert np.array_equal(found.norm(), tensors["model.norm.weight"].astype(np.float32))
    assert found.n_parameters == sum(t.size for t in tensors.values())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves(tmp_path, model_type):
    biased = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    model, hf_config = tiny_model(model_type, tie_word_embeddings=model_type == "qwen3", **biased)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found, expected = checkpoint.open(tmp_path), memory_weights(model, hf_config)
    assert found.config == expected.config
    for i in range(2):
        ours, theirs = found.layer(i), expected.layer(i)
        for name in ("norm1", "norm2", "q_norm", "k_norm"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("qkv", "out", "up", "down"):
            for a, b in zip(getattr(ours, name).segments, getattr(theirs, name).segments, strict=True):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(getattr(ours, name).bias, getattr(theirs, name).bias)
    assert (found.head() is None) == (model_type == "qwen3")


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("write", [tiny.write, tiny.write_sharded])
def test_awq(tmp_path, group_size, write):
    tensors, meant = tiny.quantized(group_size)
    found = checkpoint.open(write(tmp_path, tensors, quantization_config={**AWQ, "group_size": group_size}))
    assert_holds(found, meant_by(tensors, meant))
    assert not found.layer(0).down.segments[0].qweight.flags.owndata  # on the mapped file
    assert found.quantization.group_size == group_size
    assert found.layer(0).down.segments[0].group_size == (96 if group_size == -1 else group_size)
    assert found.n_parameters == sum(t.size for t in tiny.plain().values())


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_older_spelling_in_a_file_of_its_own(tmp_path, name):
    tensors, meant = tiny.quantized()
    tiny.write(tmp_path, tensors)
    (tmp_path / name).write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}')
    found = checkpoint.open(tmp_path)
    assert_holds(found, meant_by(tensors, meant))
    assert found.quantization == checkpoint.AwqFormat(group_size=32)


def test_modules_left_plain_listed_or_not(tmp_path):
    tensors, meant = tiny.quantized(skip=("down_proj", "layers.1.self_attn.v_proj"))
    for i, exceptions in enumerate((None, ["down_proj", "model.layers.1.self_attn.v_proj"])):
        quantization = {**AWQ, "modules_to_not_convert": exceptions}
        found = checkpoint.open(tiny.write(tmp_path / str(i), tensors, quantization_config=quantization))
        assert_holds(found, meant_by(tensors, meant))
        kinds = [isinstance(s, AwqWords) for s in found.layer(1).qkv.segments]
        assert kinds == [True, True, False]


def test_bfloat16_scales(tmp_path):
    tensors, _ = tiny.quantized()
    tensors = {n: t.astype(bfloat16) if n.endswith("scales") else t for n, t in tensors.items()}
    found = checkpoint.open(tiny.write(tmp_path, tensors, quantization_config=AWQ))
    assert found.layer(0).out.segments[0].scales.dtype == bfloat16


def devices() -> list[str]:
    """The backends that run here."""
    return [name for name in backends.PREFERENCE if not import_module(f"tinychat.backends.{name}").available()]


def test_tied_head_absent_or_a_copy(tmp_path):
    tensors = tiny.plain()
    del tensors["lm_head.weight"]
    found = checkpoint.open(tiny.write(tmp_path / "absent", tensors, tie_word_embeddings=True))
    assert found.head() is None
    n = found.n_parameters
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    found = checkpoint.open(tiny.write(tmp_path / "copy", tensors, tie_word_embeddings=True))
    assert found.head() is None and found.n_parameters == n
    tensors["lm_head.weight"][3, 5] += 1
    found = checkpoint.open(tiny.write(tmp_path / "other", tensors, tie_word_embeddings=True))
    for read in (found.head, *(lambda device=d: backends.backend(device).build(found, ctx_size=8) for d in devices())):
        with pytest.raises(CheckpointError, match=r"lm_head.weight.*differs from the embedding table"):
            read()


def test_harmless_extras(tmp_path):
    tensors = tiny.plain()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(64, np.float16)
    found = checkpoint.open(tiny.write(tmp_path, tensors))
    assert found.layer(0).out.bias is None


def test_layers_are_read_anew_and_stay_valid(tmp_path):
    found = checkpoint.open(tiny.write(tmp_path, tiny.plain()))
    first = found.layer(0)
    copy = first.up.segments[0].copy()
    found.layer(1)
    assert np.array_equal(first.up.segments[0], copy)
    with pytest.raises(IndexError):
        found.layer(2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_holds_one_layer_at_a_time(tmp_path):
    def mapped():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 128}
    tensors = {
        "model.embed_tokens.weight": np.ones((40, 512), np.float32),
        "model.norm.weight": np.ones(512, np.float32),
    }
    linears = {"gate_proj": (1024, 512), "up_proj": (1024, 512), "down_proj": (512, 1024)}
    for i in range(12):
        at = f"model.layers.{i}."
        tensors |= {f"{at}{norm}_layernorm.weight": np.ones(512, np.float32) for norm in ("input", "post_attention")}
        tensors |= {f"{at}mlp.{name}.weight": np.ones(shape, np.float32) for name, shape in linears.items()}
        for name, n in (("q", 512), ("k", 256), ("v", 256), ("o", 512)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = np.ones((n, 512), np.float32)
    found = checkpoint.open(tiny.write(tmp_path, tensors, **sizes, tie_word_embeddings=True))
    layer_bytes = found.file_bytes / 12
    before, most = mapped(), 0
    for i in range(12):
        found.layer(i)
        most = max(most, mapped() - before)
    assert layer_bytes / 2 < most < 2 * layer_bytes
    assert found.head() is None
    assert mapped() - before < layer_bytes / 2  # nor does a layer stay beside the head


# ---- refused at open, before any value is read


def change(tensors, name, value):
    tensors = dict(tensors)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return tensors


STRUCTURE = {
    "missing weight": (f"{Q_PROJ}.qweight", None, [f"{Q_PROJ}.weight is missing", "does not have"]),
    "missing scales": (f"{Q_PROJ}.scales", None, [f"{Q_PROJ}.scales is missing"]),
    "missing qzeros": (f"{Q_PROJ}.qzeros", None, [f"{Q_PROJ}.qzeros is missing"]),
    "missing norm": ("model.norm.weight", None, ["model.norm.weight is missing"]),
    "missing embedding": ("model.embed_tokens.weight", None, ["model.embed_tokens.weight is missing"]),
    "missing head": ("lm_head.weight", None, ["lm_head.weight is missing", "tie_word_embeddings"]),
    "extra tensor": ("model.layers.2.mlp.up_proj.weight", np.ones((96, 64), np.float16), ["does not have", "layers.2"]),
    "extra g_idx": (f"{Q_PROJ}.g_idx", np.zeros(64, np.int32), ["does not have", "g_idx"]),
    "both plain and quantized": (f"{Q_PROJ}.weight", np.ones((64, 64), np.float16), ["does not have", "q_proj.weight"]),
    "bias": (f"{Q_PROJ}.bias", np.ones(64, np.float16), [f"{Q_PROJ}.bias", "not all zero"]),
    "bias of text": (f"{Q_PROJ}.bias", np.zeros(64, np.uint8), [f"{Q_PROJ}.bias"]),
    "qweight columns": (f"{Q_PROJ}.qweight", np.ones((64, 4), np.int32), ["shape [64, 4]", "[64, 8]"]),
    "qweight rows": (f"{Q_PROJ}.qweight", np.ones((32, 8), np.int32), ["shape [32, 8]", "[64, 8]"]),
    "qweight of int8": (f"{Q_PROJ}.qweight", np.ones((64, 8), np.int8), ["is I8", "expected is I32"]),
    "qweight of float": (f"{Q_PROJ}.qweight", np.ones((64, 8), np.float32), ["is F32", "expected is I32"]),
    "qzeros groups": (f"{Q_PROJ}.qzeros", np.ones((4, 8), np.int32), ["qzeros", "shape [4, 8]", "[2, 8]"]),
    "scales groups": (f"{Q_PROJ}.scales", np.ones((1, 64), np.float16), ["scales", "shape [1, 64]", "[2, 64]"]),
    "scales transposed": (f"{Q_PROJ}.scales", np.ones((64, 2), np.float16), ["scales", "shape [64, 2]"]),
    "scales of fp32": (f"{Q_PROJ}.scales", np.ones((2, 64), np.float32), ["is F32", "F16 or BF16"]),
    "norm of int": ("model.norm.weight", np.ones(64, np.int32), ["model.norm.weight", "is I32"]),
    "norm shape": ("model.norm.weight", np.ones((64, 1), np.float16), ["shape [64, 1]", "expected is [64]"]),
    "embedding rows": ("model.embed_tokens.weight", np.ones((39, 64), np.float16), ["shape [39, 64]", "[40, 64]"]),
    "terminal escape": ("\x1b[2Jx", np.ones(1, np.float16), ["\\x1b[2Jx"]),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_is_refused_at_open(tmp_path, name):
    tensor, value, messages = STRUCTURE[name]
    tensors = change(tiny.quantized()[0], tensor, value)
    with pytest.raises(CheckpointError) as fault:
        checkpoint.open(tiny.write(tmp_path, tensors, quantization_config=AWQ))
    assert all(message in str(fault.value) for message in messages), str(fault.value)
    assert "\x1b" not in str(fault.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, r"tensors that this model does not have: model.layers.1"),
        ({"num_hidden_layers": 1000}, "and perhaps more"),
        ({"hidden_size": 128}, r"expected is \[40, 128\]"),
        ({"tie_word_embeddings": True, "vocab_size": 41}, r"expected is \[41, 64\]"),
        ({"attention_bias": True}, r"q_proj.bias is missing"),
        ({"quantization_config": {**AWQ, "group_size": 48}}, "64 inputs are not a multiple of the group size 48"),
        ({"quantization_config": {**AWQ, "group_size": 64}}, r"shape \[2, 8\]; expected is \[1, 8\]"),
        ({"quantization_config": {**AWQ, "group_size": 16}}, r"shape \[2, 8\]; expected is \[4, 8\]"),
        ({"quantization_config": {**AWQ, "modules_to_not_convert": ["q_proj"]}}, "the configuration lists it"),
        ({"quantization_config": None}, "no quantization_config that says how"),
    ],
)
def test_config_that_contradicts_the_weights(tmp_path, changes, message):
    tensors = tiny.quantized()[0]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tiny.write(tmp_path, tensors, **{"quantization_config": AWQ, **changes}))


def test_awq_config_with_plain_weights(tmp_path):
    with pytest.raises(CheckpointError, match="says AWQ, but no linear has a qweight"):
        checkpoint.open(tiny.write(tmp_path, tiny.plain(), quantization_config=AWQ))


def test_gptq_beside_the_weights_is_refused(tmp_path):
    tiny.write(tmp_path, tiny.plain())
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128, "desc_act": true}')
    with pytest.raises(CheckpointError, match="says GPTQ, but no linear has a qweight"):
        checkpoint.open(tmp_path)


# ---- refused when the value is read


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name, read",
    [
        (f"{Q_PROJ}.scales", lambda c: c.layer(0)),
        ("model.layers.1.input_layernorm.weight", lambda c: c.layer(1)),
        ("model.layers.0.mlp.down_proj.weight", lambda c: c.layer(0)),
        ("model.norm.weight", lambda c: c.norm()),
        ("model.embed_tokens.weight", lambda c: c.embed()),
        ("lm_head.weight", lambda c: c.head()),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_values_that_are_not_finite(tmp_path, name, read, value, dtype):
    tensors = tiny.quantized(skip=("down_proj",))[0]
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].flat[-1] = value
    found = checkpoint.open(tiny.write(tmp_path, tensors, quantization_config=AWQ))
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity") as fault:
        read(found)
    assert name in str(fault.value) and "model.safetensors" in str(fault.value)


def test_the_largest_finite_values_are_fine(tmp_path):
    tensors = tiny.plain(np.float32)
    tensors["model.norm.weight"][:2] = np.finfo(np.float32).max, np.finfo(np.float32).min
    assert checkpoint.open(tiny.write(tmp_path, tensors)).norm()[0] == np.finfo(np.float32).max


# ---- the index and the directory


@pytest.mark.parametrize(
    "shard",
    [
        *("../model.safetensors", "/etc/passwd", "a/model.safetensors", "..\\m.safetensors", "model.bin", "", 5, None),
        *("https://example.org/x.safetensors", "m\0.safetensors", "x" * 1_000_000, ".safetensors"),
        "\x1b[2J.safetensors",
    ],
)
def test_index_that_leaves_the_directory(tmp_path, shard):
    tiny.write_sharded(tmp_path / "model", tiny.plain())
    tiny.write(tmp_path, tiny.plain())
    tiny.write_index(tmp_path / "model", {"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match="without a folder") as fault:
        checkpoint.open(tmp_path / "model")
    assert len(str(fault.value)) < 1000 and "\x1b" not in str(fault.value)


def test_shards_and_index_must_agree(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    good = tiny.write_sharded(tmp_path, tiny.plain())
    index = good / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    tiny.write_index(good, {**weight_map, "model.layers.9.weight": second})
    with pytest.raises(CheckpointError, match=r"the index lists but the file lacks: model.layers.9.weight"):
        checkpoint.open(good)
    short = dict(weight_map)
    name, shard = short.popitem()
    tiny.write_index(good, short)
    with pytest.raises(CheckpointError, match=f"the file holds but the index does not list there: {name}"):
        checkpoint.open(good)
    tiny.write_index(good, {**weight_map, "a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"2 of 4 files that are not there: a.safetensors, b.safetensors"):
        checkpoint.open(good)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="no weight_map"):
            checkpoint.open(good)
    index.write_text('{"weight_map": ' * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        checkpoint.open(good)
    tiny.write_index(good, {f"t{i}": f"{i}.safetensors" for i in range(2000)})
    with pytest.raises(CheckpointError, match="lists 2,000 files"):
        checkpoint.open(good)

    both = load_file(good / first) | load_file(good / second)
    for shard in (first, second):  # one tensor in both
        save_file({**load_file(good / shard), "model.norm.weight": both["model.norm.weight"]}, good / shard)
    tiny.write_index(good, weight_map)
    with pytest.raises(CheckpointError, match=r"the file holds but the index does not list there: model.norm.weight"):
        checkpoint.open(good)


def test_a_single_file_goes_before_an_index(tmp_path):
    tensors = tiny.plain()
    tiny.write_sharded(tmp_path, tiny.plain(seed=1))
    found = checkpoint.open(tiny.write(tmp_path, tensors))
    assert np.array_equal(found.embed(), tensors["model.embed_tokens.weight"])


class Canary:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_never_opened(tmp_path, name):
    tiny.write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=r"pickle.*can run code"):
        checkpoint.open(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_directories_without_weights(tmp_path):
    tiny.write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: expected is model.safetensors"):
        checkpoint.open(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="shards need their index"):
        checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open(tmp_path / "no")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        checkpoint.open(tmp_path / "config.json")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json is missing"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "list where an object"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"rope_theta": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (5 << 20), "at most 4,194,304 are read"),
        (json.dumps({**tiny.CONFIG, "model_type": "nonesuch"}).encode(), "nonesuch"),
        (json.dumps({**tiny.CONFIG, "quantization_config": []}).encode(), "quantization_config.*is not an object"),
        (json.dumps({**tiny.CONFIG, "quantization_config": {"quant_method": "bnb"}}).encode(), "quant_method bnb"),
    ],
)
def test_config_json(tmp_path, text, message):
    tiny.write(tmp_path, tiny.plain())
    if text is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        checkpoint.open(tmp_path)


def test_unknown_keys_pass_when_told(tmp_path):
    tiny.write(tmp_path, tiny.plain(), clip_qkv=8)
    with pytest.raises(ConfigError, match="clip_qkv"):
        checkpoint.open(tmp_path)
    assert checkpoint.open(tmp_path, ignore_config=["clip_qkv"]).config.n_layers == 2


def test_generation_config_must_be_json(tmp_path):
    tiny.write(tmp_path, tiny.plain())
    assert checkpoint.open(tmp_path).generation_config == {}
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"generation_config.json is not valid JSON"):
        checkpoint.open(tmp_path)


def test_damaged_bytes_anywhere_end_in_an_error_or_in_weights(tmp_path):
    tiny.write(tmp_path, tiny.quantized()[0], quantization_config=AWQ)
    names = ("config.json", "model.safetensors")
    good = {name: (tmp_path / name).read_bytes() for name in names}
    header = 8 + int.from_bytes(good["model.safetensors"][:8], "little")
    rng, refused = random.Random(1), 0
    for _ in range(200):
        name = rng.choice(names)
        data = bytearray(good[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(header, len(data)))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        (tmp_path / name).write_bytes(data)
        try:
            found = checkpoint.open(tmp_path)
            for i in range(found.config.n_layers):
                found.layer(i)
        except TinychatError:
            refused += 1
        (tmp_path / name).write_bytes(good[name])
    assert refused > 100


def test_reading_imports_no_torch(data_dir):
    code = (
        "import sys\nfrom tinychat import checkpoint\n"
        f"c = checkpoint.open({str(data_dir / 'pebble-11m')!r}); c.layer(0); c.embed(); c.head()\n"
        "assert not {'torch', 'transformers', 'safetensors', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
