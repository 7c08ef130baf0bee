"""GGUF files, written by the gguf package: logits, what is refused, and tokenizers against llama.cpp's own ids."""

import json
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from test_architectures import TOLERANCE, every_backend, ours, theirs, tokens
from test_lowered_decoder import nmse
from tiny_models import tiny
from tokenizer_files import PIECES, SEPARATOR

from tinychat import checkpoint, memory, rope
from tinychat.backends import cpu, reference
from tinychat.bench import traffic
from tinychat.checkpoint.gguf_file import GgufFile
from tinychat.config import Rope, RopeScaling
from tinychat.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from tinychat.quantize import quantize
from tinychat.tokenizer.gguf_vocabulary import Vocabulary

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'tinychat[test]')")
Kind = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "rope_theta": 5e5}
# Of 2-dimensional tensors: of linears, of the embedding, of the head.
STORED = {
    "F32": (Kind.F32, Kind.F32, Kind.F32),
    "F16": (Kind.F16, Kind.F16, Kind.F16),
    "BF16": (Kind.BF16, Kind.BF16, Kind.F32),
    "Q4_0": (Kind.Q4_0, Kind.Q4_0, Kind.Q8_0),
    "Q8_0": (Kind.Q8_0, Kind.Q8_0, Kind.F16),
}


def write(path, family, config, tensors, stored=STORED["F32"], extra=(), raw=None, widened=True):
    """A file as llama.cpp's converter makes it, of Hugging Face's tensors. Returns what its tensors stand for.

    extra  more metadata; raw: tensors to write as they are, by llama.cpp's name
    widened  a table of codes stands for what it is widened to, fp16; the cpu backend looks rows up in the codes
    """
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for add, *values in extra:
        getattr(writer, add)(*values)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    meant = {}
    for theirs_name, tensor in tensors.items():
        module, _, ending = theirs_name.rpartition(".")
        block = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        name, values = NAMES[module], np.asarray(tensor, np.float32)
        if family == "llama" and name in heads:  # neighbours are rotated together, where here halves are
            values = values.reshape(heads[name], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        kind = Kind.F32 if values.ndim == 1 else stored[{"token_embd": 1, "output": 2}.get(name, 0)]
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{block}{name}.{ending}", data, raw_dtype=kind)
        values = gguf.quants.dequantize(data, kind)
        if name == "token_embd" and kind in (Kind.Q4_0, Kind.Q8_0) and widened:
            values = values.astype(np.float16)
        if family == "llama" and name in heads:
            values = values.reshape(heads[name], -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        meant[theirs_name] = torch.tensor(values.astype(np.float32))
    for name, (data, kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def written(path, family="llama", stored="F32", extra=(), raw=None, widened=True, **changes):
    """(transformers' model with the weights of the file, its config), and the file is there."""
    model, config = tiny(family, **{**SIZES, **changes})
    tied = config["tie_word_embeddings"]
    state = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    meant = write(path, family, config, state, STORED[stored], extra, raw, widened)
    model.load_state_dict(meant, strict=False)
    model.tie_weights()
    return model, config


@every_backend
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_equal_transformers(family, stored, backend, tmp_path):
    model, config = written(tmp_path / "a.gguf", family, stored, widened=backend is not cpu)
    found = checkpoint.open(tmp_path / "a.gguf")
    text = tokens(23, config["vocab_size"])
    want, y = theirs(model, text), ours(found, text, [9, 1, 1, 12], backend)
    if not stored.startswith("Q") or backend is reference:
        assert np.abs(y - want).max() < TOLERANCE
    assert nmse(y, want) < 1e-7
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    head = 97 * 64 if stored == "Q4_0" else 0
    assert found.n_quantized == (linears + head if stored.startswith("Q") else 0)
    need = traffic.of(found)
    if stored.startswith("Q"):
        each, of_head = {"Q4_0": (4.5, 8.5), "Q8_0": (8.5, 16)}[stored]
        assert need.quantized == linears * each / 8 and need.head == 97 * 64 * of_head / 8
    assert traffic.of(found, head_bits=8).head == 97 * 64 * (8.5 / 8 if stored == "Q4_0" else 1 + 2 / 128)


@pytest.mark.skipif(cpu.available() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("stored", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [8, 16])
def test_a_table_of_codes_is_not_widened(stored, tied, head, tmp_path, monkeypatch):
    written(tmp_path / "a.gguf", stored=stored, tie_word_embeddings=tied)
    found = checkpoint.open(tmp_path / "a.gguf")
    monkeypatch.setattr(type(found), "embed", lambda self: pytest.fail("the table as floats"))
    resident = cpu.build(found, ctx_size=16, head=head).weight_bytes
    if tied:
        assert 0.9 < memory.needed(found, cpu.FOOTPRINT, 16, head=head)["weights"] / resident < 1.1


@pytest.mark.skipif(cpu.available() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("rows", [16, 32, 4096])
def test_a_tied_head_is_rounded_in_pieces(rows, tmp_path, monkeypatch):
    written(tmp_path / "a.gguf", stored="Q8_0", tie_word_embeddings=True)
    monkeypatch.setattr(cpu, "PIECE_ROWS", rows)
    monkeypatch.setattr(cpu, "PIECE_WEIGHTS", 5 * 64)
    found, text = checkpoint.open(tmp_path / "a.gguf"), tokens(12, 97)
    pieces = ours(found, text, [7, 5], cpu, head=8)
    monkeypatch.setattr(type(found), "table", lambda self: self.embed())
    np.testing.assert_array_equal(pieces, ours(found, text, [7, 5], cpu, head=8))


@every_backend
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    ],
    ids=["tied", "biases", "wide heads"],
)
def test_shapes_of_llama(changes, backend, tmp_path):
    model, config = written(tmp_path / "a.gguf", "llama", "Q8_0", widened=backend is not cpu, **changes)
    text = tokens(12, config["vocab_size"])
    assert nmse(ours(checkpoint.open(tmp_path / "a.gguf"), text, [7, 5], backend), theirs(model, text)) < 1e-7


@every_backend
def test_codes_of_six_bits(backend, tmp_path):
    """The gguf package writes none: linears and a table of any bytes."""
    rng, raw, meant = np.random.default_rng(0), {}, {}

    def codes(name, n, largest):
        blocks = rng.integers(0, 256, (n, 210), np.uint8)
        blocks[:, 208:] = (rng.random((n, 1)) * largest).astype(np.float16).view(np.uint8)
        raw[name] = blocks, Kind.Q6_K
        return torch.tensor(gguf.quants.dequantize(blocks, Kind.Q6_K))

    for layer in range(2):
        for name in ("gate", "up"):
            made = codes(f"blk.{layer}.ffn_{name}.weight", 96, 6e-5)
            meant[f"model.layers.{layer}.mlp.{name}_proj.weight"] = made
    table = codes("token_embd.weight", 97, 1e-3)
    meant["model.embed_tokens.weight"] = table if backend is cpu else table.half().float()
    model, config = tiny("llama", **{**SIZES, "hidden_size": 256})
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in meant}
    write(tmp_path / "a.gguf", "llama", config, rest, raw=raw)
    model.load_state_dict(meant, strict=False)
    found, text = checkpoint.open(tmp_path / "a.gguf"), tokens(12, config["vocab_size"])
    q = found.layer(1).up.segments[0].tensor()
    assert (q.bits, q.group_size) == (6, 16)
    np.testing.assert_array_equal(q.dequantize(), meant["model.layers.1.mlp.gate_proj.weight"].numpy())
    assert nmse(ours(found, text, [7, 5], backend), theirs(model, text)) < 1e-7


def test_a_stretched_context_of_llama_3(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    stretched = Rope(5e5, 16, RopeScaling.LLAMA3, 8.0, 8192, 1.0, 4.0)
    factors = rope.inv_freq(Rope(5e5, 16), 1)[0] / rope.inv_freq(stretched, 1)[0]
    assert factors.max() == 8 and factors.min() == 1
    changes = {"rope_parameters": scaling, "max_position_embeddings": 65536}
    raw = {"rope_freqs.weight": (factors.astype(np.float32), Kind.F32)}
    model, config = written(tmp_path / "a.gguf", raw=raw, **changes)
    found, text = checkpoint.open(tmp_path / "a.gguf"), tokens(600, config["vocab_size"])
    assert np.abs(ours(found, text, [600]) - theirs(model, text)).max() < TOLERANCE
    raw = {"rope_freqs.weight": (np.linspace(1, 8, 8, dtype=np.float32), Kind.F32)}
    written(tmp_path / "b.gguf", raw=raw, **changes)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight are not what Llama 3"):
        checkpoint.open(tmp_path / "b.gguf")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_stretched_contexts(kind, tmp_path):
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    extra = [("add_rope_scaling_type", gguf.RopeScalingType(kind)), ("add_rope_scaling_factor", 4.0)]
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
        extra.append(("add_rope_scaling_orig_ctx_len", 64))
    model, config = written(tmp_path / "a.gguf", "qwen2", extra=extra, rope_parameters=scaling)
    text = tokens(250, config["vocab_size"])
    assert np.abs(ours(checkpoint.open(tmp_path / "a.gguf"), text, [250]) - theirs(model, text)).max() < TOLERANCE


REFUSED = {
    "another family": ({}, ConfigError, "architecture gemma is not read from GGUF, only llama, qwen2, qwen3 are"),
    "a key": ({"extra": [("add_sliding_window", 8)]}, ConfigError, "llama.attention.sliding_window = 8"),
    "experts": ({"extra": [("add_expert_count", 8)]}, ConfigError, "llama.expert_count = 8"),
    "parts": ({"extra": [("add_uint16", "split.count", 2)]}, CheckpointError, "one of several parts"),
    "a tensor": (
        {"raw": {"blk.0.attn_sinks.weight": (np.zeros(4, np.float32), Kind.F32)}},
        CheckpointError,
        r"does not have: blk\.0\.attn_sinks\.weight",
    ),
    "Q4_1": (
        {"raw": {"blk.0.x.weight": (np.zeros((2, 20), np.uint8), Kind.Q4_1)}},
        CheckpointError,
        "1 tensors of Q4_1, which are not read.*Take the model's Q4_0, Q6_K or Q8_0",
    ),
    "Q4_K": (
        {"raw": {"blk.0.x.weight": (np.zeros((2, 144), np.uint8), Kind.Q4_K)}},
        CheckpointError,
        "1 tensors of Q4_K",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    options, error, message = REFUSED[case]
    path = tmp_path / "a.gguf"
    if case == "another family":
        written(path)
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
    else:
        written(path, **options)
    with pytest.raises(error, match=message):
        checkpoint.open(path)


def test_damaged_files_are_refused(tmp_path):
    path, cut = tmp_path / "a.gguf", tmp_path / "b.gguf"
    written(path)
    data = path.read_bytes()
    end = len(data) - sum(tensor.nbytes for tensor in GgufFile(path).tensors.values())
    for length in (*range(0, end, 97), end - 1, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoint.open(cut)
    rng = np.random.default_rng(0)
    for _ in range(200):  # whatever it says, it is a word of ours
        damaged = bytearray(data)
        damaged[int(rng.integers(end))] ^= int(rng.integers(1, 256))
        cut.write_bytes(damaged)
        with suppress(CheckpointError, ConfigError):
            checkpoint.open(cut)
    for begin, message in ((b"GGUF\0\0\0\3", "other byte order"), (b"GGUF\1\0\0\0", "version 1"), (b"PK\3\4", "begin")):
        cut.write_bytes(begin + data[8:])
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(cut)
    broken = bytearray(data)
    broken[-4:] = struct.pack("<f", np.nan)
    cut.write_bytes(broken)
    last = checkpoint.open(cut)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        last.layer(1), last.norm(), last.head()
    written(path, stored="Q4_0")
    tensor = GgufFile(path).tensors["blk.1.attn_v.weight"]
    broken = bytearray(path.read_bytes())
    broken[tensor.begin + 18 : tensor.begin + 20] = struct.pack("<H", 0x7C00)  # of the second block
    cut.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"scales in blk\.1\.attn_v\.weight that are not finite"):
        checkpoint.open(cut).layer(1)
    with pytest.raises(UsageError, match="is a GGUF file"):
        quantize(path, tmp_path / "q", progress=False)


TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
WORDS = [
    ("add_tokenizer_model", "llama"),
    ("add_token_list", [text for text, _ in PIECES]),
    ("add_token_scores", [-float(i) for i in range(len(PIECES))]),
    ("add_token_types", [kind for _, kind in PIECES]),
    ("add_bos_token_id", 1),
    ("add_eos_token_id", 2),
    ("add_chat_template", TEMPLATE),
]


def test_a_file_alone_is_a_model(tmp_path):
    """Text in, text out, at the command line; nothing heavy is imported."""
    path = tmp_path / "small.gguf"
    written(path, stored="Q4_0", vocab_size=len(PIECES), extra=WORDS)
    opened = checkpoint.open(path)
    words = opened.tokenizer()
    assert words.encode("the <|user|>in")[0] == 1 and words.decode(words.encode("the sea")) == "the sea"
    assert words.encode("the <|user|>in").count(PIECES.index(("<|user|>", 4))) == 1
    assert words.chat_template.render([{"role": "user", "content": "Hi"}]) == "<|user|>Hi<|end|>"
    assert opened.hf_config["eos_token_id"] == [2] and words.eos_id == 2
    code = (
        "import sys; from tinychat.cli import main\n"
        f"code = main(['generate', {str(path)!r}, '--prompt', 'the sea', '--max-tokens', '5', '--ignore-eos'])\n"
        "assert not code and not {'torch', 'transformers', 'gguf'} & sys.modules.keys(), code"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in (["info", str(path), "--json"], ["info", str(path)]):
        run = subprocess.run([sys.executable, "-m", "tinychat", *command], capture_output=True, text=True)
        assert run.returncode == 0 and "gguf" in run.stdout, run.stderr
    written(path)
    assert checkpoint.open(path).tokenizer() is None


def expected(folder, name):
    """(text, llama.cpp's ids) of its own tests."""
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_text().split(SEPARATOR)
    ids = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(ids) > 40
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, ids, strict=True)]


@pytest.mark.parametrize(
    ("name", "pre"), [("llama-spm", None), ("phi-3", None), ("gpt-2", None), ("starcoder", "smollm")]
)
def test_ids_are_those_of_llama_cpp(name, pre, data_dir):
    folder = data_dir / "tokenizers/gguf-vocab"
    metadata = GgufFile(folder / f"ggml-vocab-{name}.gguf").metadata
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    words = Vocabulary(given | ({"pre": pre} if pre else {})).tokenizer()
    for text, ids in expected(folder, name):
        assert words.encode(text, add_bos=False) == ids, text
        assert words.decode(ids) == text


def test_ids_of_llama_3(data_dir):
    files = data_dir / "tokenizers/llama3.2"
    ids = json.loads((files / "encoder.json").read_text())
    lines = (files / "vocab.bpe").read_text().split("\n")
    merges = [line for line in lines if line.count(" ") == 1 and not line.startswith("#")]
    given = {"model": "gpt2", "pre": "llama-bpe", "tokens": sorted(ids, key=ids.__getitem__), "merges": merges}
    words = Vocabulary(given).tokenizer()
    for text, wanted in expected(data_dir / "tokenizers/gguf-vocab", "llama-bpe"):
        assert words.encode(text, add_bos=False) == wanted, text


def test_text_is_cut_as_qwen_cuts_it():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from tinychat.tokenizer.gguf_vocabulary import _CUTS

    assert _CUTS["qwen2"] == (PRETOKENIZE_REGEX,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "kind 't5' is not read"),
        ({"model": "gpt2", "pre": "tekken"}, "'tekken', whose way to cut text is not known"),
        ({"tokens": ["a", "a"]}, "2 tokens, 1 of them different"),
        ({"token_type": [1]}, "1 of their kinds"),
        ({"scores": []}, "0 scores"),
        ({"bos_token_id": 9}, "bos_token_id is 9"),
    ],
)
def test_vocabularies_that_are_refused(changes, message):
    with pytest.raises(TokenizerError, match=message):
        Vocabulary({"model": "llama", "tokens": ["a", "b"], "scores": [0.0, 1.0], **changes}).tokenizer()
