"""`tinychat bench`: shapes and random weights, what a token reads, the probe's verdict, one run; on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tinychat
from tinychat import checkpoint, cli, engine, memory
from tinychat.backends import cpu
from tinychat.bench import command, contexts, measure, probe, shapes, traffic, write
from tinychat.bench.random_weights import RandomWeights
from tinychat.bench.subject import Options, Subject
from tinychat.cache import KVCache, Rows
from tinychat.doctor import models
from tinychat.engine import Engine
from tinychat.errors import BackendError, UsageError
from tinychat.qtensor import canonical

ROOT = Path(__file__).resolve().parent.parent
TINY = shapes.Shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 80,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    group_size=32,
)
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128}
QKV, OUT, UP, DOWN = 64 * (64 + 2 * 32), 64 * 64, 64 * 256, 128 * 64  # weights of a block
BLOCK, TABLE, HEAD_DIM = QKV + OUT + UP + DOWN, 80 * 64, 16
BODY = 3 * (BLOCK * (4 + 20 / 32) / 8 + 2 * 64 * 2) + 64 * 2  # codes, scales and zeros; norms

needs_kernels = pytest.mark.skipif(cpu.available() is not None, reason="the compiled kernels are not built")


@pytest.fixture
def tiny(monkeypatch):
    """A shape called 'tiny', and a probe that reads little."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    for name, size in (("BUFFER_BYTES", 4 << 20), ("SLICE_BYTES", 1 << 20), ("READ_BYTES", 8 << 20)):
        monkeypatch.setattr(probe, name, size)


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as leaving:
        return leaving.code or 0


# ---- shapes and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",  # as the hub counts them
    [
        ("llama-2-7b", 6_738_415_616),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-3b", 3_212_749_824),
        ("smollm2-360m", 361_821_120),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("mpt-7b", 6_649_286_656),
        ("falcon-7b", 6_921_720_704),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_shapes_are_those_of_the_published_models(name, parameters):
    shape = shapes.find(name)
    assert RandomWeights(*shape.translate(), shape.group_size).n_parameters == parameters


def test_other_engines_read_the_shapes_too():
    transformers = pytest.importorskip("transformers")
    for shape in shapes.SHAPES.values():
        config = transformers.AutoConfig.for_model(**shape.hf_config)
        assert config.architectures == shape.hf_config["architectures"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_weights_stay_finite_at_any_depth_and_no_two_matrices_are_equal(bits):
    deep = {**TINY.hf_config, "num_hidden_layers": 80}
    weights = RandomWeights(*shapes.Shape(deep).translate(), group_size=32, bits=bits)
    first, second = (weights.layer(i).up.segments for i in range(2))
    matrices = [canonical(segment).dequantize() for segment in (*first, *second)]
    assert len({m.tobytes() for m in matrices}) == 4
    for matrix in matrices:  # an input of unit size gives an output of about unit size
        assert 0.7 < matrix.std() * 64**0.5 < 1.5
    runner = tinychat.backends.choose()[0].build(weights, ctx_size=8)
    logits = runner.step(Rows.of([1, 2, 3], 0, wanted="all"))
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    assert all(segment.bits == bits for segment in first)


def test_weights_that_awq_cannot_hold_are_refused():
    config, names = TINY.translate()
    with pytest.raises(UsageError, match=r"64 inputs cannot be quantized: its 64 inputs are not a multiple of .* 48"):
        RandomWeights(config, names, group_size=48)


@pytest.mark.parametrize("plain", [False, True])
def test_a_written_shape_loads(tmp_path, plain):
    done = []
    path = write.write(TINY, tmp_path / "model", plain=plain, progress=lambda *at: done.append(at))
    assert done[-1] == (3, 3)
    opened = checkpoint.open(path)
    weights = RandomWeights(*TINY.translate(), None if plain else 32)
    assert opened.n_parameters == weights.n_parameters == 3 * (BLOCK + 2 * 64) + 2 * TABLE + 64
    assert opened.n_quantized == weights.n_quantized == (0 if plain else 3 * BLOCK)
    assert (opened.quantization is None) == plain
    for index in range(3):  # made anew from the same seed: what was written is what is measured
        for name in ("qkv", "out", "up", "down"):
            there, here = (getattr(w.layer(index), name).segments for w in (opened, weights))
            assert [s.shape for s in there] == [s.shape for s in here]
    with tinychat.load(path) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.from_pretrained(path).hidden_size == 64


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "name, changes",
    [
        ("mpt-7b", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
        ("falcon-7b", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}),
        ("qwen3-0.6b", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
    ],
)
def test_written_shapes_of_other_families_load(tmp_path, name, changes, plain):
    shape = shapes.Shape({**shapes.find(name).hf_config, **changes, "vocab_size": 80}, group_size=32)
    opened = checkpoint.open(write.write(shape, tmp_path / "model", plain=plain))
    weights = RandomWeights(*shape.translate(), None if plain else 32)
    assert (opened.n_parameters, opened.n_quantized) == (weights.n_parameters, weights.n_quantized)
    assert opened.config.tied_head and (opened.n_quantized == 0) == plain
    need, there = (traffic.of(source, head_bits=8) for source in (weights, opened))
    assert there == need
    with tinychat.load(opened.path) as llm:
        found = llm.logits([1, 2, 3])
    assert np.isfinite(found).all() and found.std() > 0.1


# ---- what a token reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_bits, head", [(16, 2 * TABLE), (8, TABLE * (1 + 2 / 128))])
def test_traffic_counts_what_is_needed(tmp_path, head_bits, head):
    for source in (
        RandomWeights(*TINY.translate(), 32),
        checkpoint.open(write.write(TINY, tmp_path / "model")),
    ):
        need = traffic.of(source, head_bits=head_bits)
        assert need.body == BODY and need.quantized == 3 * BLOCK * (4 + 20 / 32) / 8
        assert (need.head, need.table, need.row) == (head, 2 * TABLE, 2 * 64)
        assert need.kv(10) == 3 * 10 * 2 * 2 * HEAD_DIM * 2  # layers, positions, keys and values, heads, fp16
        assert need.token(10) == BODY + head + 2 * 64 + need.kv(10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "changes, biased",
    [
        ({"model_type": "phi", "hidden_act": "gelu_new"}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, False),
    ],
    ids=["a bias", "untied", "tied"],
)
def test_a_rounded_head_reads_a_byte_a_weight(tmp_path, changes, biased, dtype):
    shape = shapes.Shape({**TINY.hf_config, **changes}, group_size=32)
    path = write.write(shape, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = tensors[name].astype(dtype)
    if biased:
        tensors["lm_head.bias"] = np.zeros(80, dtype)
    save_file(tensors, path / "model.safetensors")
    source, bias = checkpoint.open(path), 80 * dtype().itemsize if biased else 0
    assert traffic.of(source, head_bits=16).head == TABLE * dtype().itemsize + bias
    need = traffic.of(source, head_bits=8)
    assert need.head == TABLE * (1 + 2 / 128) + bias
    sized = models.checked(source, cpu.FOOTPRINT, None, None, None, None)
    assert sized["bytes_per_token"] == round(need.token(models.SPEED_CONTEXT))


def test_traffic_of_a_tied_head_and_a_window():
    config = {**TINY.hf_config, "model_type": "mistral", "sliding_window": 4, "tie_word_embeddings": True}
    need = traffic.of(RandomWeights(*shapes.Shape(config).translate(), None), kv_dtype="fp32")
    assert (need.head, need.table, need.quantized) == (2 * TABLE, 0, 0)
    assert need.kv(100) == need.kv(4) == 3 * 4 * 2 * 2 * HEAD_DIM * 4


# ---- the probe -------------------------------------------------------------------------------------------------------


@needs_kernels
def test_the_probe_reads_with_every_thread_and_walks_its_buffer(tiny):
    found = probe.Probe(threads=3)
    places = []
    read = found._read

    def watched(address, size, threads):
        places.append(address)
        assert (size, threads) == (3 << 20, 3)
        return read(address, size, threads)

    found._read = watched
    found.complete()
    assert found.bytes_read >= 8 << 20
    assert all(0 < speed < 10_000 for speed in found.samples)  # GB/s: it does read
    assert 0 < found.core_share <= 1
    assert len(set(places)) == 1  # of a buffer of 4 MiB, one slice of 3 fits


@needs_kernels
@pytest.mark.parametrize("size", [0, 64, 4096 + 64, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_reading_any_size(size, threads):
    buffer = np.ones(size + 64, np.uint8)
    assert 0 <= tinychat._cpu.read_probe(buffer.ctypes.data + -buffer.ctypes.data % 64, size, threads) < 10


def test_a_probe_in_two_steady_modes_is_valid():
    verdict = probe.judge([45.0] * 20 + [80.0] * 20 + [45.0] * 10, 1 << 30, fraction=0.9)
    assert verdict.valid and verdict.gb_s == 45 and verdict.quartiles == (45, 80) and verdict.unsteadiness == 0


@pytest.mark.parametrize(
    "samples, fraction, least, share, reason",
    [
        ([10.0, 20.0] * 10, 0.9, None, 1.0, "a slice and the next differ by 67%"),
        ([10.0] * 9, 1.2, None, 1.0, "1.20 times as fast"),
        ([10.0] * 9, 0.9, 35, 1.0, "reads 10.0 GB/s, less than the 35"),
        ([10.0] * 9, 0.9, None, 0.62, "had a core 62% of the time"),
    ],
)
def test_a_probe_that_cannot_be_the_limit_is_invalid(samples, fraction, least, share, reason):
    verdict = probe.judge(samples, 1 << 30, fraction, least, share)
    assert not verdict.valid and reason in verdict.reasons[0] and len(verdict.reasons) == 1


def test_a_probe_that_a_cache_may_hold_is_invalid():
    verdict = probe.judge([40.0] * 9, 1 << 30, None, buffer_bytes=256 << 20, cache_bytes=256 << 20)
    assert verdict.reasons == ["it walks through 256 MiB, much of which a cache of 256 MiB may hold"]
    assert probe.judge([40.0] * 9, 1 << 30, None, buffer_bytes=256 << 20, cache_bytes=32 << 20).valid


def test_caches_excuse_a_model_that_is_faster_than_the_probe():
    assert probe.judge([10.0], 1 << 30, fraction=None).valid


# ---- one run, by a clock of our own ----------------------------------------------------------------------------------


class Clock:
    """perf_counter, moved by whoever works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)


class Work:
    """A `Runner` whose step takes 10 ms, a probe whose slice takes 5, twice as fast from the 8th on."""

    def __init__(self, clock):
        self.clock = clock
        self.config = TINY.translate()[0]
        self.cache = KVCache(1, 1, 1, 128, 2)
        self.weight_bytes = 1000
        self.reads = 0

    def step(self, rows):
        self.clock.now += 0.01 if self.reads < 8 else 0.005
        self.cache.lengths[:] = self.cache.check(rows)
        return np.zeros((len(rows.wanted), 80), np.float32)

    def read(self):
        self.clock.now += 0.005
        self.reads += 1
        return 10.0 if self.reads < 8 else 20.0


def test_decoding_is_paired_with_the_probe(monkeypatch):
    work = Work(Clock(monkeypatch))
    session = measure.Session(Engine(work))
    found = session.decode(100, lambda n: 80e6, work)  # 80 MB in 10 ms: 8 GB/s, then 16
    assert found.latencies == pytest.approx(found.steps) and len(found.latencies) == 99
    assert {round(latency, 6) for latency in found.latencies} == {0.01, 0.005}
    assert work.reads == len(found.stretches) + 1
    fractions = [stretch.fraction for stretch in found.stretches]
    assert sum(fraction == pytest.approx(0.8) for fraction in fractions) == len(fractions) - 1  # all but the turn
    assert sum(s.bytes_read for s in found.stretches) == 99 * 80e6


def test_no_prompt_is_in_the_cache(monkeypatch):
    session = measure.Session(Engine(Work(Clock(monkeypatch))))
    for _ in range(3):
        assert session.timings(5, 2).prefill_tokens == 5


@pytest.mark.parametrize(
    "limit, tokens, ctx_size, expected",
    [
        (4096, None, None, (512, 64, 128, 200, 513)),
        (4096, 1000, None, (512, 64, 128, 1000, 1004)),
        (128, None, None, (127, 64, 127, 124, 128)),
        (4096, None, 600, (512, 64, 128, 200, 600)),
    ],
)
def test_lengths_fit_the_model(limit, tokens, ctx_size, expected):
    assert measure.Lengths.of(limit, tokens, ctx_size) == measure.Lengths(*expected)


@pytest.mark.parametrize(
    "limit, tokens, ctx_size, message",
    [
        (128, 125, None, "125 tokens after a prompt of 4 need a context of 129; the model has 128"),
        (4096, 125, 128, "need a context of 129; --ctx-size is 128"),
        (128, None, 129, "a context of 129 was asked for; the model has 128 positions"),
        (128, None, 5, "too short"),
        (128, 1, None, "--tokens 2 or more"),
    ],
)
def test_lengths_that_cannot_be(limit, tokens, ctx_size, message):
    with pytest.raises(UsageError, match=message):
        measure.Lengths.of(limit, tokens, ctx_size)


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, free, expected",
    [
        ("llama-3-8b", 64 << 30, (0, 2048, 8192, 32768)),
        ("llama-3-8b", 8 << 30, (0, 2048, 8192)),
        ("llama-3-8b", 4 << 30, ()),
        ("llama-2-7b", 64 << 30, (0, 2048, 8192)),  # of 4096 positions, every head with keys of its own
        ("tinyllama-1.1b", None, (0, 2048, 8192, 32768)),  # of 2048
    ],
)
def test_default_contexts_are_those_that_fit(monkeypatch, shape, free, expected):
    monkeypatch.setattr(memory, "available", lambda: free)
    subject = Subject(Options(model=None, shape=shape))
    assert contexts.chosen(subject, None) == expected


def test_a_shape_goes_as_far_as_it_is_asked_and_a_model_does_not(tmp_path, tiny):
    assert contexts.chosen(Subject(Options(model=None, shape="tiny")), (500, 0, 500)) == (0, 500)
    path = write.write(TINY, tmp_path / "model")
    assert contexts.chosen(Subject(Options(model=str(path))), None) == (0, 96)
    with pytest.raises(UsageError, match=r"the model has 128 positions, and 32 are kept .* at most 96"):
        contexts.chosen(Subject(Options(model=str(path))), (0, 97))


def test_contexts_asked_for_that_do_not_fit_are_refused_before_anything_runs(tiny, monkeypatch, capsys):
    subject = Subject(Options(model=None, shape="llama-3-8b"))
    asked, total = (0, 32768), subject.memory(32768 + contexts.MOST)["total"]
    for free, message in (
        (total - 1, r"32800, .* read probe\) and .* choose a smaller context \(--contexts\)"),
        (total, "KV cache"),  # the probe has its buffer beside it
    ):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        with pytest.raises(BackendError, match=message):
            contexts.chosen(subject, asked)
    monkeypatch.setenv("TINYCHAT_NO_MEMORY_CHECK", "1")
    assert contexts.chosen(subject, asked) == asked
    monkeypatch.delenv("TINYCHAT_NO_MEMORY_CHECK")
    monkeypatch.setattr(memory, "available", lambda: total + contexts.BUFFER_BYTES)
    assert contexts.chosen(subject, asked) == asked
    monkeypatch.setattr(Subject, "load", lambda *given: pytest.fail("it was loaded"))
    assert run("bench", "--shape", "tiny", "--contexts", "0", str(10**8)) == 1
    assert "KV cache at context 100000032" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int8"])
def test_the_cache_is_filled_with_entries_that_differ(dtype):
    cache = KVCache(n_layers=2, n_slots=1, n_kv_heads=2, capacity=50, head_dim=16, dtype=dtype)
    contexts.fill(cache, 40)
    entries = [a[:, 0, :, :40].astype(np.float32) for a in (cache.keys, cache.values)]
    if dtype == "int8":
        scales = cache.key_scales[:, 0, :, :40, None], cache.value_scales[:, 0, :, :40, None]
        entries = [codes * scale for codes, scale in zip(entries, scales, strict=True)]
    flat = np.concatenate([e.reshape(-1, 16) for e in entries])
    assert len(np.unique(flat, axis=0)) == len(flat) and 0.8 < flat.std() < 1.2
    assert not cache.keys[:, :, :, 40:].any() and cache.lengths.tolist() == [40]


def test_an_int8_cache_has_a_scale_for_each_entry():
    need = traffic.of(RandomWeights(*TINY.translate(), 32), kv_dtype="int8")
    assert need.kv(10) == 3 * 10 * 2 * 2 * (HEAD_DIM + 4)


def test_what_a_context_adds_is_set_against_what_it_takes():
    need = traffic.of(RandomWeights(*TINY.translate(), 32))
    more = need.kv(1001) - need.kv(1)
    speed = 10.0  # GB/s
    short = need.token(1) / (0.9 * speed * 1e9)
    long = short + more / (0.5 * speed * 1e9)
    turns = [[(short, speed), (long, speed)], [(short, 2 * speed), (long, 2 * speed)], [(short, speed), (long, speed)]]
    first, second = (contexts._figures(c, i, turns, (0, 1000), need) for i, c in enumerate((0, 1000)))
    assert first["bandwidth_fraction"] == pytest.approx(0.9) and first["kv_bandwidth_fraction"] is None
    assert second["kv_bandwidth_fraction"] == pytest.approx(0.5)
    assert second["kv_bytes"] == need.kv(1001) and second["tokens_per_second"] == pytest.approx(1 / long)


# ---- the command -----------------------------------------------------------------------------------------------------

PROMISED = [
    *("decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token_s", "overhead_fraction"),
    *("bytes_per_token", "bandwidth_fraction", "probe_gb_s", "probe_valid", "load_s", "peak_rss_bytes"),
    *("threads", "isa", "activations", "head", "kv_dtype", "fetch"),
]


@needs_kernels
def test_a_shape_is_measured(tiny, capsys):
    assert run("bench", "--shape", "tiny", "--repeats", "2", "--tokens", "20", "--threads", "1", "--json") == 0
    *text, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert set(PROMISED) <= set(found)
    assert found["isa"] == tinychat._cpu.isa() and found["threads"] == 1 and found["fits_cache"] is not None
    assert all(found[name] > 0 for name in PROMISED if isinstance(found[name], float) and name != "overhead_fraction")
    assert 0 <= found["overhead_fraction"] < 1 and 0 < found["outside_kernels_fraction"] < 1
    assert found["bytes_per_token"] == pytest.approx(
        traffic.of(RandomWeights(*TINY.translate(), 32), head_bits=found["head"]).token(4 + 10), abs=1
    )
    assert [c["context"] for c in found["contexts"]] == [0, 2048, 8192, 32768]
    assert found["resident_bits_per_weight"] >= 4
    shown = "\n".join(text)
    for word in ("pp127", "pp64", "tg127", "first token", "decode", "overhead", "read probe", "█", "g32"):
        assert word in shown
    assert ("weights are" in shown) is bool(found["fetch"])


@needs_kernels
@pytest.mark.parametrize("shape", [name for name, shape in shapes.SHAPES.items() if shape.group_size == 128])
@pytest.mark.parametrize(("bits", "group", "most"), [(4, 128, 4.3), (3, 128, 3.3), (2, 64, 2.4)])
def test_what_a_weight_takes_of_memory_padding_included(shape, bits, group, most):
    config, _ = shapes.SHAPES[shape].translate()
    sizes = [
        (config.q_size + 2 * config.kv_size, config.hidden_size),
        (config.hidden_size, config.q_size),
        (config.up_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]
    _cpu = tinychat._cpu
    for isa in _cpu.supported_isas().split():
        made = [_cpu.LinearShape(_cpu.WeightType.quantized, n, k, group, bits=bits) for n, k in sizes]
        assert sum(_cpu.packed_bytes(isa, one) for one in made) * 8 <= most * sum(n * k for n, k in sizes)


@needs_kernels
@pytest.mark.parametrize("bits, group", [(2, 64), (3, 32)])
def test_a_shape_in_other_widths(tiny, capsys, bits, group):
    options = (
        "--bits",
        str(bits),
        "--group-size",
        str(group),
        "--repeats",
        "1",
        "--tokens",
        "9",
        "--contexts",
        "--json",
    )
    assert run("bench", "--shape", "tiny", *options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["weights"] == f"random weights, {bits}-bit g{group}"
    source = RandomWeights(*TINY.translate(), group, bits)
    assert (need := traffic.of(source, head_bits=found["head"])).quantized == 3 * BLOCK * (
        bits + (16 + bits) / group
    ) / 8
    assert found["bytes_per_token"] == pytest.approx(need.token(4 + 4.5), abs=1)
    assert bits + 24 / group <= found["resident_bits_per_weight"] < bits + 24 / group + 0.7  # small rows are padded
    estimate = memory.estimate(source.config, source.file_bytes, source.n_quantized, cpu.FOOTPRINT, 9, bits=bits)
    assert estimate["weights"] == source.file_bytes - TABLE * 2


@needs_kernels
def test_a_written_shape_is_measured_without_contexts(tiny, capsys, tmp_path):
    assert run("bench", "--shape", "tiny", "--write", str(tmp_path / "model")) == 0
    assert "4-bit" in capsys.readouterr().out
    assert run("bench", str(tmp_path / "model"), "--repeats", "1", "--tokens", "9", "--contexts", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "contexts" not in found and found["weights"] == "4-bit AWQ g32"


@pytest.mark.parametrize("options, bits", [((), "4-bit"), (("--float",), "fp16")])
def test_what_was_written_is_told_as_json(tiny, capsys, tmp_path, options, bits):
    path = tmp_path / "model"
    assert run("bench", "--shape", "tiny", "--write", str(path), *options, "--json") == 0
    text, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert 0 < found.pop("seconds") < 60
    size = (path / "model.safetensors").stat().st_size
    assert found == {"path": str(path), "shape": "tiny", "weights": f"random {bits} weights", "bytes": size}
    assert text == f"{path}: tiny, random {bits} weights, 0.00 GB"


@needs_kernels
@pytest.mark.parametrize("head, activations", [((), 16), (("--head", "8"), 8)])
def test_activations_are_those_in_use(tiny, monkeypatch, capsys, tmp_path, head, activations):
    monkeypatch.setattr(engine, "_warned", set())
    path = write.write(TINY, tmp_path / "model", plain=True)
    options = ("--activations", "8", *head, "--repeats", "1", "--tokens", "5", "--contexts", "--json")
    assert run("bench", str(path), *options) == 0
    shown = capsys.readouterr()
    assert ("8-bit activations meet quantized weights only" in shown.err) == (activations == 16)
    *text, last = shown.out.splitlines()
    assert json.loads(last)["activations"] == activations and f" {activations}-bit activations" in text[1]


@needs_kernels
def test_a_run_that_fails_loses_nothing_of_those_before(tiny, monkeypatch, capsys):
    def measured(options, threads, several):
        if threads == 2:
            raise BackendError("no room for two")
        return command._measure(options, threads)

    monkeypatch.setattr(command, "_measured", measured)
    options = ("--repeats", "1", "--tokens", "5", "--contexts", "--threads", "1", "2")
    assert run("bench", "--shape", "tiny", *options) == 1
    shown = capsys.readouterr()
    assert "1 thread ·" in shown.out and "pp64" in shown.out and "no room for two" in shown.err


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (("--shape", "lama-2-7b"), 2, "no shape 'lama-2-7b' (did you mean 'llama-2-7b'?); there are: llama-2-7b, tiny"),
        (("pebble", "--shape", "tiny"), 2, "give one"),
        (("--shape", "tiny", "--float"), 2, "--float says what --write writes"),
        (("--write", "somewhere"), 2, "--write needs --shape"),
        (("pebble", "--bits", "3"), 2, "a model has its own"),
        (("--shape", "tiny", "--write", "somewhere", "--bits", "3"), 2, "--write writes 4 bits"),
        *(
            (("--shape", "tiny", "--write", "somewhere", *given), 2, f"{given[0]} is for measuring, and --write")
            for given in (
                *(("--threads", "1"), ("--contexts",), ("--contexts", "0"), ("--tokens", "9"), ("--repeats", "1")),
                *(("--min-probe", "9"), ("--device", "cpu"), ("--ctx-size", "9"), ("--kv-type", "int8")),
                *(("--activations", "8"), ("--head", "8"), ("--revision", "r"), ("--offline",)),
                ("--ignore-config", "key"),
            )
        ),
        (("--shape", "tiny", "--contexts", "-1"), 2, "expected a whole number, 0 or more"),
        (("--shape", "tiny", "-c", "200"), 2, "the model has 128 positions"),
        (("--shape", "tiny", "--tokens", "125"), 2, "need a context of 129"),
    ],
)
def test_mistakes(tiny, capsys, argv, code, message):
    assert run("bench", *argv) == code
    assert message in capsys.readouterr().err


def test_writing_over_something_is_refused(tiny, capsys, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert run("bench", "--shape", "tiny", "--write", str(tmp_path)) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_shape_that_is_larger_than_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    with pytest.raises(BackendError, match=r"the model needs about 3.8 GB.* and 1.1 GB are available"):
        Subject(Options(model=None, shape="llama-2-7b")).load(513, 1)


def elsewhere(code: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=True)


@needs_kernels
def test_several_threads_are_runs_of_their_own():
    argv = ["bench", "--threads", "1", "2", "--repeats", "1", "--tokens", "5", "--contexts", "--json"]
    done = elsewhere(f"from tinychat.cli import main\nif __name__ == '__main__': main({argv})")
    found = json.loads(done.stdout.splitlines()[-1])
    assert [r["threads"] for r in found["runs"]] == [1, 2] and found["threads"] == 2
    for r in found["runs"]:
        assert r["peak_rss_bytes"] < 400 << 20 and r["probe_bytes"] >= 1 << 30  # whose buffer is not in the peak


@needs_kernels
def test_measuring_imports_nothing_heavy():
    argv = ["bench", "--repeats", "1", "--tokens", "5"]
    done = elsewhere(
        "from tinychat.bench import probe\nprobe.BUFFER_BYTES = probe.READ_BYTES = 1 << 24\n"
        f"import sys\nfrom tinychat.cli import main\nmain({argv})\nprint(*sys.modules, file=sys.stderr)"
    )
    assert not {"torch", "transformers"} & {module.split(".")[0] for module in done.stderr.split()}


def test_no_kernels_no_probe(tiny, monkeypatch):
    def missing(threads):
        raise BackendError("backend 'cpu' cannot be used here")

    pytest.importorskip("torch")
    monkeypatch.setattr(measure, "Probe", missing)
    subject = Subject(Options(model=None, shape="tiny", device="reference", kv_dtype="fp32", repeats=1, tokens=5))
    found = measure.measure(subject, 1)
    assert found["probe_gb_s"] is None and not found["probe_valid"] and found["bandwidth_fraction"] is None
    assert found["isa"] is None and found["backend"] == "reference"
    assert [c["context"] for c in found["contexts"]] == [0, 2048, 8192, 32768]
    from tinychat.bench.report import report

    assert "no valid probe: there is none" in report(found)


def test_widths_in_turns(tiny, monkeypatch, capsys):
    """benchmarks/widths.py: each width against the first, and what its bytes would give."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import widths

    widths.main(["--shape", "tiny", "--widths", "4:32", "2:32", "--rounds", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["width"] for result in found] == ["4:32", "2:32"] and found[0]["speed"] == 1
    assert 1 < found[1]["of_the_bytes"] < 2 and found[1]["speed"] > 0
    assert all(result["tokens_per_second"] > 0 for result in found)
