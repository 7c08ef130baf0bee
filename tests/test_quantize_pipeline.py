"""From a checkpoint to a checkpoint: what is written is what was evaluated, and what cannot be written is said."""

import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny_checkpoints as tiny
import tokenizer_files
from safetensors.numpy import load_file

import tinychat
from tinychat import backends, checkpoint, cli
from tinychat import quantize as package
from tinychat.backends import cpu, reference
from tinychat.cache import Rows
from tinychat.cli import main
from tinychat.errors import CheckpointError, ConfigError, TinychatError, TokenizerError, UsageError
from tinychat.evaluation import likelihood
from tinychat.qtensor import QTensor, canonical
from tinychat.quantize import calibration, progress, quantize, quantize_in_memory, rtn
from tinychat.weights import LINEARS

SMALL = {"n_sequences": 4, "length": 24, "progress": False}


@pytest.fixture
def source(tmp_path):
    tensors = {name: array * np.float16(0.3) for name, array in tiny.plain().items()}
    return tiny.write(tmp_path / "source", tensors, bos_token_id=1)


def weights_of(source):
    for index in range(source.config.n_layers):
        layer = source.layer(index)
        for name in ("norm1", "norm2"):
            yield name, getattr(layer, name)
        for name in LINEARS:
            for i, segment in enumerate(getattr(layer, name).segments):
                yield f"{index} {name} {i}", canonical(segment)


def assert_same(found, expected):
    if isinstance(expected, QTensor):
        assert isinstance(found, QTensor) and found.group_size == expected.group_size
        for field in ("codes", "scales", "zeros"):
            assert np.array_equal(getattr(found, field), getattr(expected, field))
    else:
        assert not isinstance(found, QTensor) and np.array_equal(found, expected)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 3), ("awq+gptq", 4)])
def test_free_act_order_is_written_as_gptq(source, tmp_path, method, bits):
    how = {"method": method, "bits": bits, "group_size": 16, "act_order": "free"}
    report = quantize(source, tmp_path / "out", **how, **SMALL)
    assert all(error < 0.3 for layers in report.rounding.values() for error in layers)
    opened, original = checkpoint.open(tmp_path / "out"), checkpoint.open(source)
    assert (opened.quantization.method, opened.bits, opened.quantization.act_order) == ("gptq", bits, True)
    sequences = calibration.self_generated(original, starts=[1], n_sequences=4, length=24)
    made, _ = quantize_in_memory(original, **how, sequences=sequences)
    moved = 0
    for index in range(2):
        for name in LINEARS:
            pairs = zip(
                getattr(opened.layer(index), name).segments, getattr(made.layer(index), name).segments, strict=True
            )
            for found, expected in pairs:
                assert np.array_equal(canonical(found).dequantize(), expected.dequantize())
                moved += found.permutation is not None
    assert moved == 2 * 7
    rows = Rows.of([1, 5, 9, 30], 0, wanted="all")
    exact, again = (backend.build(opened, ctx_size=8).step(rows) for backend in (reference, cpu))
    assert ((exact - again) ** 2).sum() < 1e-6 * (exact**2).sum()


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_is_written_is_what_is_in_memory(source, tmp_path, method):
    report = quantize(source, tmp_path / "out", method=method, group_size=32, **SMALL)
    opened, original = checkpoint.open(tmp_path / "out"), checkpoint.open(source)
    sequences = calibration.self_generated(original, starts=[1], n_sequences=4, length=24)
    made, _ = quantize_in_memory(original, method=method, group_size=32, sequences=sequences)
    for (name, found), (_, expected) in zip(weights_of(opened), weights_of(made), strict=True):
        assert_same(found, expected)
        assert name.startswith("norm") or isinstance(found, QTensor)
    assert np.array_equal(opened.embed(), original.embed())
    assert np.array_equal(opened.head().segments[0], original.head().segments[0])
    rows = Rows.of([1, 5, 9, 30], 0, wanted="all")
    logits = [reference.build(model, ctx_size=8).step(rows) for model in (opened, made, original)]
    assert np.array_equal(logits[0], logits[1])
    assert 0 < np.abs(logits[0] - logits[2]).max() < 0.5 * np.abs(logits[2]).max()
    assert report.kept == {} and report.bits_per_weight == 4 + 20 / 32
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size < report.bytes_before


def test_config_is_what_other_engines_read(source, tmp_path):
    quantize(source, tmp_path / "out", method="rtn", group_size=32, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.qweight"].shape == (96, 8)
    assert tensors["model.layers.1.mlp.down_proj.scales"].dtype == np.float16


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_the_layout_cannot_express_stays_in_16_bits(tmp_path, method):
    """104 inputs of down_proj are a multiple of no power of two that a group may have."""
    source = tiny.write(tmp_path / "source", with_inner(104), intermediate_size=104, bos_token_id=1)
    report = quantize(source, tmp_path / "out", method=method, group_size=64, **SMALL)
    expected = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(report.kept) == expected
    assert "not a multiple of the group size 64" in str(report)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    assert set(listed) == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(quantized) == 12
    for module in quantized:  # engines match these names as substrings, or as regular expressions at the beginning
        assert not any(name in module or re.match(name, module) for name in listed)
    opened = checkpoint.open(tmp_path / "out")
    assert opened.layer(0).down.segments[0].dtype == np.float16
    assert not any(result.group == "up -> down" for result in report.groups)


def test_gptq_says_what_is_quantized_in_each_layer(tmp_path):
    """104 codes of 3 bits do not fill whole words. Transformers reads no other list."""
    source = tiny.write(tmp_path / "source", with_inner(104), intermediate_size=104, bos_token_id=1)
    report = quantize(source, tmp_path / "out", method="rtn", bits=3, group_size=64, progress=False)
    mlp, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(report.kept) == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in mlp}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [[f"self_attn.{name}" for name in attention]]
    assert len(config["dynamic"]) == 6


def test_a_short_last_group_is_said(tmp_path):
    """GPTQ's layout has them; AWQ's has not."""
    source = tiny.write(tmp_path / "source", with_inner(160), intermediate_size=160, bos_token_id=1)
    report = quantize(source, tmp_path / "out", method="rtn", bits=3, group_size=64, progress=False)
    assert report.notes == ["of mlp.down_proj the last group has 32 inputs: 64 does not divide its 160"]
    assert report.group_size == 64 and report.kept == {}


def test_nothing_that_fits_is_seen_before_anything_is_done(source, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "load", None)
    with pytest.raises(UsageError, match=r"no linear .* can be quantized: .*31.*another --group-size"):
        quantize(source, tmp_path / "out", group_size=31, progress=False)
    with pytest.raises(UsageError, match="seed -1: give a whole number, 0 or more"):
        quantize(source, tmp_path / "out", seed=-1, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_says_nothing_is_counted(tmp_path):
    """Inputs that are 0 in all tokens, groups of weights that are all 0: rounded as they are, and reported."""
    tensors = {name: array * np.float16(0.3) for name, array in tiny.plain().items()}
    for index in range(2):
        tensors[f"model.layers.{index}.mlp.up_proj.weight"][:7] = 0
        tensors[f"model.layers.{index}.self_attn.o_proj.weight"][3:5, 32:64] = 0
    source = tiny.write(tmp_path / "source", tensors, bos_token_id=1)
    report = quantize(source, tmp_path / "out", group_size=32, **SMALL)
    groups = 7 * (tensors["model.layers.0.mlp.up_proj.weight"].shape[1] // 32)
    assert report.dead_inputs == {"down": 14} and report.zero_groups == 2 * (groups + 2)
    assert "0 in all calibration tokens: 14 of down" in str(report) and "all 0, and stay so" in str(report)
    opened = checkpoint.open(tmp_path / "out")
    up, out = (
        canonical(segment).dequantize() for segment in (opened.layer(1).up.segments[1], *opened.layer(1).out.segments)
    )
    assert not up[:7].any() and not out[3:5, 32:64].any() and up[7:].any(1).all()
    assert np.isfinite(canonical(opened.layer(1).down.segments[0]).dequantize()).all()


def test_the_same_seed_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        quantize(source, tmp_path / name, group_size=32, seed=3, **SMALL)
    quantize(source, tmp_path / "c", group_size=32, seed=4, **SMALL)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_package_is_called_as_its_function_is(source, tmp_path):
    report = tinychat.quantize(source, tmp_path / "out", method="rtn", bits=3, group_size=32, progress=False)
    assert report.bits == 3 and tinychat.load(tmp_path / "out", device="reference").config.n_layers == 2
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = tinychat.quantise


def test_report(source, tmp_path):
    report = quantize(source, tmp_path / "out", group_size=32, **SMALL)
    text = str(report)
    for part in ("norm1 -> qkv", "v -> out", "up -> down", "whole block", "alpha", "bits per quantized weight", " s"):
        assert part in text
    assert "4 sequences of 24, 96 tokens" in text
    found = json.loads(json.dumps(report.to_dict()))
    assert found["method"] == "awq" and len(found["groups"]) == 2 * 5 and found["seconds"] > 0
    plain = quantize(source, tmp_path / "rtn", method="rtn", group_size=32, progress=False)
    assert "relative squared error of the weights: qkv " in str(plain) and "scaled weights: qkv " in text
    assert {name: len(errors) for name, errors in plain.rounding.items()} == dict.fromkeys(LINEARS, 2)
    assert all(0 < error < 0.02 for errors in plain.rounding.values() for error in errors)


def test_progress_goes_to_stderr(source, tmp_path, capfd):
    quantize(source, tmp_path / "out", group_size=32, n_sequences=2, length=8)
    captured = capfd.readouterr()
    assert "quantizing" in captured.err and "sampling calibration text" in captured.err and not captured.out


def test_errors_leave_nothing_behind(source, tmp_path):
    out = tmp_path / "out"
    cases = [
        (UsageError, "5 bits cannot be written", {"bits": 5}),
        (UsageError, "no method", {"method": "magic"}),
        (UsageError, "group size", {"group_size": 0}),
        (UsageError, "no linear .* can be quantized", {"group_size": 31, "method": "rtn"}),
        (UsageError, "does not exist", {"calibration": tmp_path / "nowhere.txt"}),
    ]
    make_tokenizer(source)
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            quantize(source, out, **{**SMALL, **arguments})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    with pytest.raises(TinychatError, match="nowhere"):
        quantize(tmp_path / "nowhere", out)
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize(source, out, method="rtn", group_size=32, progress=False)
    assert (out / "config.json").read_text() == "{}"
    quantize(source, out, method="rtn", group_size=32, overwrite=True, progress=False)
    with pytest.raises(UsageError, match="quantized already"):
        quantize(out, tmp_path / "again", method="rtn", group_size=32)


def test_being_told_to_end_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def round_layer(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("a terminated program went on")

    monkeypatch.setattr(rtn, "round_layer", round_layer)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        main(["quantize", str(source), "-o", str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_unknown_keys_pass_when_told(tmp_path):
    source = tiny.write(tmp_path / "source", tiny.plain(), attn_logit_softcapping=50.0)
    arguments = {"method": "rtn", "group_size": 32, "progress": False}
    with pytest.raises(ConfigError, match="attn_logit_softcapping"):
        quantize(source, tmp_path / "out", **arguments)
    ignored = ["attn_logit_softcapping"]
    quantize(source, tmp_path / "out", **arguments, ignore_config=ignored)
    assert checkpoint.open(tmp_path / "out", ignore_config=ignored).quantization


def test_weights_that_fp16_cannot_hold(tmp_path):
    tensors = tiny.plain(np.float32)
    tensors["lm_head.weight"][3, 3] = 70000
    source = tiny.write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"head.*70000.*65504"):
        quantize(source, tmp_path / "out", method="rtn", group_size=32, progress=False)
    assert not (tmp_path / "out").exists()


def test_methods_are_the_files_that_transform():
    assert package.methods() == [*cli.METHODS] == ["awq", "awq+gptq", "gptq", "rtn"]


def with_inner(size):
    """The tensors of a tiny model of that intermediate size."""
    tensors = tiny.plain()
    rng = np.random.default_rng(0)
    for name, (n, k) in tiny.LINEARS.items():
        for i in range(2):
            shape = (size if n == 96 else n, size if k == 96 else k)
            tensors[f"model.layers.{i}.{name}.weight"] = rng.standard_normal(shape).astype(np.float16) * np.float16(0.3)
    return tensors


def test_groups_get_smaller_where_that_makes_the_checkpoint_smaller(source, tmp_path):
    """96 inputs of down_proj are not a multiple of 64, but of 32; in 16 bits they would double the checkpoint."""
    report = quantize(source, tmp_path / "out", method="rtn", group_size=64, progress=False)
    assert report.group_size == 32 and not report.kept
    assert "groups of 32, not 64: of mlp.down_proj, its 96 inputs are not a multiple of the group size 64" in str(
        report
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    assert checkpoint.open(tmp_path / "out").layer(0).down.segments[0].group_size == 32


def make_tokenizer(directory):
    (directory / "tokenizer.model").write_bytes(tokenizer_files.sentencepiece_model(tokenizer_files.PIECES))


# Calibration


def test_self_generated_is_what_the_model_says(source):
    opened = checkpoint.open(source)
    found = calibration.self_generated(opened, starts=[1], n_sequences=3, length=200, seed=1)
    assert len(found) == 3 and all(len(sequence) == 128 and sequence[0] == 1 for sequence in found)  # the context
    assert found == calibration.self_generated(opened, starts=[1], n_sequences=3, length=200, seed=1)
    assert found != calibration.self_generated(opened, starts=[1], n_sequences=3, length=200, seed=2)
    anywhere = calibration.self_generated(opened, starts=[], n_sequences=8, length=2)
    assert len({sequence[0] for sequence in anywhere}) > 2


def test_start_tokens():
    assert calibration.start_tokens({}, {"bos_token_id": 7, "eos_token_id": 9}) == [7]
    assert calibration.start_tokens({"bos_token_id": None, "eos_token_id": [9, 8]}, {}) == [9]
    assert calibration.start_tokens({}, {"eos_token_id": None}) == []


def read(path, model, n=4, length=16, seed=0):
    return calibration.from_file(path, model, n_sequences=n, length=length, seed=seed)


def test_text_files(data_dir, tmp_path):
    model = data_dir / "stories260K"
    tokenizer = calibration.tokenizers.load(model)
    text = (data_dir / "text" / "tinystories_val.txt").read_text()[:20000]
    (tmp_path / "long.txt").write_text(text)
    found = read(tmp_path / "long.txt", model)
    assert len(found) == 4 and all(len(s) == 16 and s[0] == tokenizer.bos_id for s in found)
    decoded = [tokenizer.decode(s).strip() for s in found]
    places = [text.replace("\n", " ").find(d.replace("\n", " ")[:12]) for d in decoded]
    assert places[-1] > 10000 and places == sorted(places)
    others = [read(tmp_path / "long.txt", model, seed=seed) for seed in (1, 2, 1)]
    assert others[0] == others[2] != others[1] and found not in others and all(map(len, others))
    (tmp_path / "short.txt").write_text("Once upon a time there was a cat.")
    found = read(tmp_path / "short.txt", model, length=512)
    assert len(found) == 1 and tokenizer.decode(found[0]).strip() == "Once upon a time there was a cat."


def test_json_lines(data_dir, tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
    path.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "A plain text"}) + "\n")
    found = read(path, data_dir / "pebble-11m", length=64)
    tokenizer = calibration.tokenizers.load(data_dir / "pebble-11m")
    texts = [tokenizer.decode(s, skip_special=False) for s in found]
    assert len(found) == 2 and "<|user|>" in texts[0] and "Hi there" in texts[0] and "A plain text" in texts[1]
    assert all(s.count(tokenizer.bos_id) == 1 for s in found)
    with pytest.raises(UsageError, match="line 1 holds messages, and the checkpoint has no chat template"):
        read(path, data_dir / "stories260K")


def test_full_sequences_come_first(source, tmp_path):
    """Where a text has enough of them; else its remainders serve too."""
    make_tokenizer(source)
    (tmp_path / "x.txt").write_text("the cat sat on the mat and " * 400)
    assert {len(s) for s in read(tmp_path / "x.txt", source, n=20, length=17)} == {17}
    (tmp_path / "x.txt").write_text("the cat sat on the mat and " * 3)
    assert min(len(s) for s in read(tmp_path / "x.txt", source, n=20, length=17)) < 17


def test_short_lines_are_joined_where_there_are_many(source, tmp_path):
    make_tokenizer(source)
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"{i} the cat\u2028sat\u0085on"}, ensure_ascii=False) for i in range(300)]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found = read(path, source, n=6, length=40)
    assert [len(s) for s in found] == [40] * 6
    few = read(path, source, n=300, length=40)
    assert len(few) == 300 and max(map(len, few)) < 40
    path.write_text("\n".join([*lines[:200], "{nonsense}", *lines[201:]]), encoding="utf-8")
    with pytest.raises(UsageError, match="line 201 is not JSON"):
        read(path, source, n=300, length=40)


def test_tokens_that_the_model_lacks(source, tmp_path):
    make_tokenizer(source)
    sequences = [[1, 2], [1, checkpoint.open(source).config.vocab_size]]
    with pytest.raises(TokenizerError, match=r"token id (\d+) and the model ids 0 to \d+: the tokenizer"):
        quantize_in_memory(checkpoint.open(source), sequences=sequences)
    (tmp_path / "x.txt").write_text("the cat")
    small = checkpoint.open(source)
    small.config = replace(small.config, vocab_size=3)
    with pytest.raises(TokenizerError, match="the model ids 0 to 2"):
        calibration.load(tmp_path / "x.txt", small, n_sequences=2, length=8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{nonsense}\n", "line 1 is not JSON"),
        ("x.jsonl", b'{"prompt": "Hi"}\n', "is neither"),
        ("x.txt", b"  \n", "no text to calibrate on"),
        ("x.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_files_that_are_no_calibration_text(source, tmp_path, name, content, message):
    make_tokenizer(source)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, source)


def test_text_needs_a_tokenizer(source, tmp_path):
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        read(tmp_path / "x.txt", source)


def test_awq_beats_rounding_on_real_weights(data_dir):
    """A trained model, small enough for int3 to hurt; likelihoods of held-out text, paired, window by window."""
    source = checkpoint.open(data_dir / "stories260K")
    encode = calibration.tokenizers.load(source.path).encode
    windows = likelihood.windows(encode((data_dir / "text" / "tinystories_val.txt").read_text())[:20_000], 512)
    sequences = read(data_dir / "text" / "tinystories_train.txt", source.path, 128, 256)
    scored = {"original": likelihood.score(backends.choose()[0].build(source, ctx_size=512, kv_dtype="fp32"), windows)}
    assert scored["original"].perplexity < 4.4
    for bits, goal in ((3, 0.40), (4, 0.80)):  # of what rounding adds to the perplexity
        for method in ("rtn", "awq"):
            made, _ = quantize_in_memory(source, method=method, bits=bits, group_size=64, sequences=sequences)
            scored[method] = likelihood.score(backends.choose()[0].build(made, ctx_size=512, kv_dtype="fp32"), windows)
        added = {n: scored[n].perplexity - scored["original"].perplexity for n in ("rtn", "awq")}
        assert 0 < added["awq"] < goal * added["rtn"], (bits, added)
        assert likelihood.compare(scored["awq"], scored["original"]).high < 0
        assert likelihood.compare(scored["awq"], scored["rtn"]).low > 0


def test_the_time_that_is_left(monkeypatch, capsys):
    now = iter((0.0, 300.0, 900.0, 901.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress(6, 1)
    for _ in range(2):
        shown.doing("awq")
        shown.done()
    assert capsys.readouterr().err.splitlines() == [
        "going on after layer 1 of 6, which an earlier run finished",
        "quantizing: layer 2 of 6 done; 5 min a layer, about 20 min left",
        "quantizing: layer 3 of 6 done; 8 min a layer, about 22 min left",
    ]
