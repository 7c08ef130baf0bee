"""The lowered decoder against the PyTorch one, on tiny random models."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tinychat import rope
from tinychat.backends import cpu
from tinychat.cache import Rows
from tinychat.config import Activation, Block, ModelConfig, Norm, QKNorm, Rope
from tinychat.cpuinfo import physical_cores
from tinychat.errors import BackendError, UsageError
from tinychat.qtensor import QTensor, bfloat16
from tinychat.weights import Layer, Linear, MemoryWeights, norm_sizes

if cpu.available():
    pytest.skip(f"cpu backend: {cpu.available()}", allow_module_level=True)

from tinychat import _cpu

ISAS = _cpu.supported_isas().split()


def f32(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def quantized(n, k, group, seed, scales=np.float16, bits=4):
    """A random QTensor whose weights have a standard deviation near 0.15."""
    random = np.random.default_rng(seed)
    groups = -(-k // group)
    return QTensor(
        random.integers(0, 2**bits, (n, k)).astype(np.uint8),
        (random.uniform(0.02, 0.04, (n, groups)) * 2 ** (4 - bits)).astype(scales),
        random.integers(5 * 2**bits // 16, 11 * 2**bits // 16, (n, groups)).astype(np.uint8),
        bits,
        group,
    )


def model(
    *,
    vocab=97,
    hidden=60,
    inter=107,
    layers=2,
    heads=6,
    kv_heads=2,
    dim=10,
    weight="f32",
    group=32,
    tied=False,
    bias=(),
    qk_norm=QKNorm.NONE,
    window=None,
    windowed=(1,),
    table=np.float32,
    **extra,
):
    """A random model; `extra` are fields of ModelConfig.

    `weight`: f32, f16, bf16, q2, q3, q4, or mixed (segments of one linear differ).
    """
    config = ModelConfig(
        model_type="test",
        vocab_size=vocab,
        hidden_size=hidden,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=inter,
        max_positions=512,
        norm_eps=1e-5,
        rope=extra.pop("rope", Rope(dim=dim)),
        sliding_window=window,
        windowed_layers=frozenset(windowed if window else ()),
        qk_norm=qk_norm,
        biases=frozenset(bias),
        tied_head=tied,
        **extra,
    )
    seeds = iter(range(10_000))

    def one(n, k, kind):
        seed = next(seeds)
        if kind.startswith("q"):
            return quantized(n, k, group, seed, bfloat16 if kind.endswith("b") else np.float16, int(kind[1]))
        return f32(n, k, seed=seed, scale=0.15).astype({"f32": np.float32, "f16": np.float16, "bf16": bfloat16}[kind])

    def linear(name, sizes, k):
        kinds = {"mixed": ["q3", "bf16", "q4b"]}.get(weight, [weight] * 3)
        values = f32(sum(sizes), seed=next(seeds), scale=0.3) if name in bias else None
        return Linear(tuple(one(n, k, kind) for n, kind in zip(sizes, kinds, strict=False)), values)

    def norm(n):
        return 1 + f32(n, seed=next(seeds), scale=0.2)

    def layer():
        norms = {
            name: f32(size, seed=next(seeds), scale=0.3) if name.endswith("_bias") else norm(size)
            for name, size in norm_sizes(config).items()
        }
        return Layer(
            **norms,
            qkv=linear("qkv", [heads * dim, kv_heads * dim, kv_heads * dim], hidden),
            out=linear("out", [hidden], heads * dim),
            up=linear("up", [inter] * (2 if config.gated else 1), hidden),
            down=linear("down", [hidden], inter),
        )

    return MemoryWeights(
        config,
        f32(vocab, hidden, seed=next(seeds)).astype(table),
        [layer() for _ in range(layers)],
        norm(hidden),
        None if tied else linear("head", [vocab], hidden),
        f32(hidden, seed=next(seeds), scale=0.3) if config.norm_bias else None,
    )


PLAIN = {"activation": Activation.GELU, "gated": False, "norm": Norm.LAYER}
MODELS = {
    "plain": {},
    "mha-64": {"heads": 3, "kv_heads": 3, "dim": 64, "tied": True},
    "gqa-7": {"heads": 7, "kv_heads": 1, "dim": 8, "bias": ("qkv",), "hidden": 96},
    "gqa-3-80": {"heads": 6, "kv_heads": 2, "dim": 80, "bias": ("qkv", "out", "up", "down"), "vocab": 131},
    "qk-norm": {"qk_norm": QKNorm.HEAD, "dim": 16, "tied": True, "table": np.float16},
    "window": {"window": 5, "layers": 3, "windowed": (0, 2)},
    "alibi, gelu": {"rope": Rope(dim=0), "slopes": (0.5, 0.3, 0.2, 0.1, 0.05, 0.01), **PLAIN},
    "alibi, window": {"rope": Rope(dim=0), "slopes": (0.5, 0.3, 0.2, 0.1, 0.05, 0.01), "window": 5},
    "parallel": {"block": Block.PARALLEL, "norm_bias": True, "bias": ("qkv", "out", "up", "down"), **PLAIN},
    "parallel, one norm": {"block": Block.PARALLEL_ONE_NORM, "norm_bias": True, "kv_heads": 1, **PLAIN},
    "many pieces": {"hidden": 1100, "inter": 1537, "vocab": 50, "norm": Norm.LAYER},
    "bf16-table": {"tied": True, "table": bfloat16, "hidden": 33},
}


def reference(weights, **options):
    from tinychat.backends import reference

    return reference.build(weights, **{"ctx_size": 64, "kv_dtype": "fp32", "threads": 1, **options})


def build(weights, **options):
    return cpu.build(weights, **{"ctx_size": 64, "kv_dtype": "fp32", "threads": 2, **options})


def ids(n, vocab, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def nmse(y, expected):
    return ((y - expected) ** 2).sum() / (expected**2).sum()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name):
    weights = model(**MODELS[name])
    tokens = ids(40, weights.config.vocab_size)
    expected = reference(weights).step(Rows.of(tokens, 0, wanted="all"))
    for isa in ISAS:
        whole = build(weights, isa=isa).step(Rows.of(tokens, 0, wanted="all"))
        np.testing.assert_allclose(whole, expected, atol=1e-4 * max(1, expected.std()))
        runner = build(weights, isa=isa)
        pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(tokens[:23], 0), (tokens[23:30], 23)]]
        pieces += [runner.step(Rows.of(tokens[at : at + 1], at)) for at in range(30, 40)]
        np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-4 * max(1, expected.std()))
        assert runner.cache.lengths.tolist() == [40]


@pytest.mark.parametrize("weight", ["f16", "bf16", "q2", "q3", "q4", "mixed"])
@pytest.mark.parametrize("isa", ISAS)
def test_weights_of_every_type(weight, isa):
    weights = model(weight=weight, bias=("qkv",), kv_heads=2, dim=12, hidden=72, inter=131)
    tokens = ids(20, weights.config.vocab_size)
    expected = reference(weights, dtype="fp64").step(Rows.of(tokens, 0, wanted="all"))
    runner = build(weights, isa=isa)
    pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(tokens[:15], 0), (tokens[15:], 15)]]
    y = np.concatenate(pieces)
    assert nmse(y, expected) < 1e-6
    assert build(weights, isa=isa, kv_dtype="fp16").step(Rows.of(tokens, 0)).shape == (1, 97)


def test_a_cache_of_fp16_costs_little():
    weights = model()
    tokens = ids(30, 97)
    expected = reference(weights).step(Rows.of(tokens, 0))
    assert nmse(build(weights, kv_dtype="fp16").step(Rows.of(tokens, 0)), expected) < 1e-5


@pytest.mark.parametrize("name", ["mha-64", "gqa-7", "qk-norm", "window"])
def test_a_cache_of_int8_equals_the_reference(name):
    """Rounded at the same places, but for an ulp of a key or value: a few codes differ by one."""
    weights = model(**MODELS[name])
    tokens = ids(40, weights.config.vocab_size)
    plain = reference(weights, kv_dtype="int8")
    expected = plain.step(Rows.of(tokens, 0, wanted="all"))
    exact = reference(weights).step(Rows.of(tokens, 0, wanted="all"))
    assert 1e-7 < nmse(expected, exact) < 2e-3
    for isa in ISAS:
        runner = build(weights, isa=isa, kv_dtype="int8")
        pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(tokens[:30], 0), (tokens[30:37], 30)]]
        pieces += [runner.step(Rows.of(tokens[at : at + 1], at)) for at in range(37, 40)]
        assert nmse(np.concatenate(pieces), expected) < 1e-4
        for ours, theirs in ((runner.cache.keys, plain.cache.keys), (runner.cache.values, plain.cache.values)):
            first = ours[0].astype(int) - theirs[0]  # of the first layer: nothing has grown yet
            assert np.abs(first).max() <= 1 and (first != 0).mean() < 0.01
        np.testing.assert_allclose(runner.cache.key_scales[0], plain.cache.key_scales[0], rtol=1e-5)
        np.testing.assert_allclose(runner.cache.value_scales[0], plain.cache.value_scales[0], rtol=1e-5)


def test_a_cache_of_int8_is_cut_and_copied():
    weights = model()
    runner = build(weights, n_slots=2, kv_dtype="int8")
    tokens = ids(20, 97)
    whole = runner.step(Rows.of(tokens, 0, wanted="all"))
    runner.cache.truncate(0, 12)
    runner.cache.copy(0, 1)
    for slot in (0, 1):
        again = runner.step(Rows.of(tokens[12:], 12, slot, wanted="all"))
        assert nmse(again, whole[12:]) < 1e-5


LONG = {"heads": 6, "kv_heads": 2, "dim": 16, "hidden": 48, "inter": 32, "vocab": 40, "windowed": (0,), "window": 300}


@pytest.mark.parametrize("window", [300, 200])
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_long_contexts_are_cut_whatever_the_threads(kv_dtype, window):
    """More entries than a piece holds, a window over several pieces or one; decoding, a few rows, two slots at once."""
    weights = model(**(LONG | {"window": window}))
    tokens = ids(710, 40)
    steps = [
        Rows.of(tokens[:700], 0, wanted="last"),
        Rows.of(tokens[:650], 0, 1, wanted="last"),
        Rows.of(tokens[700:701], 700),
        joined(Rows.of(tokens[650:651], 650, 1), Rows.of(tokens[701:702], 701)),
        Rows.of(tokens[702:706], 702, wanted="all"),
        joined(Rows.of(tokens[651:653], 651, 1, wanted="all"), Rows.of(tokens[706:707], 706)),
    ]
    plain = reference(weights, ctx_size=720, n_slots=2, kv_dtype=kv_dtype)
    expected = [plain.step(rows) for rows in steps]
    results = []
    for threads in (1, 2, 5):
        runner = build(weights, ctx_size=720, n_slots=2, kv_dtype=kv_dtype, threads=threads)
        results.append([runner.step(rows) for rows in steps])
        for y, want, first in zip(results[-1], expected, results[0], strict=True):
            assert nmse(y, want) < (1e-4 if kv_dtype == "int8" else 1e-6)
            np.testing.assert_array_equal(y, first)


def joined(*parts):
    """One step of several; wanted rows shift along."""
    starts = np.cumsum([0, *(len(p) for p in parts)])
    return Rows(
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.positions for p in parts]),
        np.concatenate([p.slots for p in parts]),
        np.concatenate([p.wanted + start for p, start in zip(parts, starts[:-1], strict=True)]).astype(np.int32),
    )


@pytest.mark.parametrize("name", ["plain", "window", "qk-norm"])
def test_three_slots_in_one_step(name):
    """One slot prefills while two, of unequal length, decode: each gets what it gets alone."""
    weights = model(**MODELS[name])
    runner = build(weights, n_slots=3)
    texts = [ids(n, 97, seed=n) for n in (19, 6, 31)]
    alone = []
    for text in texts:
        single = build(weights)
        single.step(Rows.of(text[:5], 0))
        single.step(Rows.of(text[5:-1], 5, wanted="none"))
        alone.append(single.step(Rows.of(text[-1:], len(text) - 1)))
    runner.step(joined(*(Rows.of(texts[slot][:5], 0, slot) for slot in (2, 0))))
    runner.step(Rows.of(texts[0][5:-1], 5, 0, wanted="none"))
    runner.step(Rows.of(texts[2][5:-1], 5, 2, wanted="none"))
    decode0, decode2 = (Rows.of(texts[s][-1:], len(texts[s]) - 1, s) for s in (0, 2))
    y = runner.step(joined(decode2, Rows.of(texts[1], 0, 1), decode0))
    np.testing.assert_allclose(y, np.concatenate([alone[2], alone[1], alone[0]]), atol=2e-5)
    assert runner.cache.lengths.tolist() == [19, 6, 31]
    reference_runner = reference(weights)
    np.testing.assert_allclose(y[1:2], reference_runner.step(Rows.of(texts[1], 0)), atol=1e-4)
    # Rows of different slots may alternate.
    mixed = Rows(
        np.array([3, 4, 5, 6], np.int32),
        np.array([6, 19, 7, 20], np.int32),
        np.array([1, 0, 1, 0], np.int32),
        np.array([3, 2], np.int32),
    )
    apart = build(weights, n_slots=3)
    apart.cache.keys[:], apart.cache.values[:], apart.cache.lengths[:] = (
        runner.cache.keys,
        runner.cache.values,
        runner.cache.lengths,
    )
    expected = [apart.step(Rows.of([4, 6], 19, 0)), apart.step(Rows.of([3, 5], 6, 1))]
    np.testing.assert_allclose(runner.step(mixed), np.concatenate(expected), atol=2e-5)


def test_slots_are_cut_and_copied():
    weights = model()
    runner = build(weights, n_slots=2)
    tokens = ids(20, 97)
    whole = runner.step(Rows.of(tokens, 0, wanted="all"))
    runner.cache.truncate(0, 12)
    runner.cache.copy(0, 1)
    for slot in (0, 1):
        again = runner.step(Rows.of(tokens[12:], 12, slot, wanted="all"))
        np.testing.assert_allclose(again, whole[12:], atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", ["f32", "q4"])
def test_threads_do_not_change_a_bit(isa, weight):
    weights = model(weight=weight)
    tokens = ids(21, 97)
    results = []
    for threads in (1, 2, 3, 7):
        runner = build(weights, isa=isa, threads=threads)
        results.append([runner.step(Rows.of(tokens[:20], 0, wanted="all")), runner.step(Rows.of(tokens[20:], 20))])
    for result in results[1:]:
        for y, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("table", [np.float32, np.float16, bfloat16])
def test_embeddings_in_place_of_tokens(table):
    weights = model(table=table)
    tokens = ids(9, 97)
    by_token = Rows.of(tokens, 0, wanted="all")
    vectors = weights.embedding[tokens].astype(np.float32)
    by_vector = Rows(None, by_token.positions, by_token.slots, by_token.wanted, vectors)
    np.testing.assert_array_equal(build(weights).step(by_vector), build(weights).step(by_token))


def test_wanted_rows_come_in_the_order_asked():
    weights = model()
    rows = Rows.of(ids(6, 97), 0, wanted="all")
    every = build(weights).step(rows)
    wanted = np.array([5, 0, 0, 3, 5, 1, 2, 4, 5], np.int32)  # more than there are rows
    some = build(weights).step(Rows(rows.tokens, rows.positions, rows.slots, wanted))
    np.testing.assert_array_equal(some, every[wanted])
    assert build(weights).step(Rows.of(ids(6, 97), 0, wanted="none")).shape == (0, 97)


def test_partly_rotated_heads_pass_the_rest_through():
    """Keys in the cache where the first 4 of 10 dimensions are rotated, against those where all are, turned back."""
    weights = model(layers=1, heads=1, kv_heads=1, hidden=20)
    full, part = weights.config, dataclasses.replace(weights.config, rope=Rope(dim=4))
    runner = build(dataclasses.replace(weights, config=part))
    tokens = ids(5, 97)
    runner.step(Rows.of(tokens, 0))
    plain = build(dataclasses.replace(weights, config=full))
    plain.step(Rows.of(tokens, 0))
    positions = np.arange(5, dtype=np.int32)
    cos, sin = rope.angles(full.rope, positions, np.full(5, 5, np.int32))
    a, b = np.split(plain.cache.keys[0, 0, 0, :5], 2, axis=-1)
    raw = np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
    cos, sin = rope.angles(part.rope, positions, np.full(5, 5, np.int32))
    expected = raw.copy()
    expected[:, :2] = raw[:, :2] * cos - raw[:, 2:4] * sin
    expected[:, 2:4] = raw[:, 2:4] * cos + raw[:, :2] * sin
    np.testing.assert_allclose(runner.cache.keys[0, 0, 0, :5], expected, atol=1e-5)


def test_what_cannot_be_run_is_refused_before_it_runs():
    weights = model()
    runner = build(weights)
    for tokens in ([97], [-1], [3, 2**31 - 1]):
        with pytest.raises(ValueError, match="token ids"):
            runner.step(Rows.of(np.array(tokens, np.int32), 0))
    rows = Rows.of(ids(3, 97), 0)
    with pytest.raises(ValueError, match="wanted"):
        runner.step(Rows(rows.tokens, rows.positions, rows.slots, np.array([3], np.int32)))
    with pytest.raises(ValueError, match="neither"):
        runner.step(Rows(None, rows.positions, rows.slots, rows.wanted))
    with pytest.raises(ValueError, match="embeddings"):
        runner.step(Rows(None, rows.positions, rows.slots, rows.wanted, np.zeros((3, 7), np.float32)))
    with pytest.raises(ValueError, match="continues"):
        runner.step(Rows.of(ids(3, 97), 1))
    with pytest.raises(ValueError, match="cache"):
        runner.step(Rows.of(ids(65, 97), 0))
    assert runner.cache.lengths.tolist() == [0]
    with pytest.raises(UsageError, match="kv_dtype"):
        build(weights, kv_dtype="int4")
    with pytest.raises(BackendError, match=r"supported: .*scalar"):
        build(weights, isa="mmx")
    for threads in (0, -1, 10**9):
        with pytest.raises(UsageError, match="threads"):
            build(weights, threads=threads)


def test_a_weight_of_the_wrong_shape_is_named():
    weights = model()
    wrong = Layer(**{**vars(weights.layers[1]), "down": weights.layers[1].out})
    with pytest.raises(ValueError, match="down"):
        build(MemoryWeights(weights.config, weights.embedding, [weights.layers[0], wrong], weights.final_norm))


def test_options_from_the_environment(monkeypatch):
    monkeypatch.setenv("TINYCHAT_THREADS", "3")
    assert cpu.thread_count(None) == 3
    assert cpu.thread_count(2) == 2
    assert "3 threads" in cpu.describe()
    monkeypatch.setenv("TINYCHAT_ISA", "scalar")
    assert cpu.describe() == "cpu (scalar, 3 threads)"
    monkeypatch.setenv("TINYCHAT_ISA", "mmx")
    with pytest.raises(BackendError, match=r"TINYCHAT_ISA=mmx does not run here; supported: .*scalar"):
        cpu.available()
    monkeypatch.setenv("TINYCHAT_THREADS", "many")
    with pytest.raises(UsageError, match="TINYCHAT_THREADS is 'many'"):
        cpu.thread_count(None)


@pytest.mark.parametrize("isa", ISAS)
def test_weights_are_asked_for_as_the_environment_says(isa, monkeypatch):
    weights, tokens = model(weight="q4"), ids(4, 97)
    steps = [Rows.of(tokens[:3], 0), Rows.of(tokens[3:], 3)]
    found = build(weights, isa=isa)
    assert (found.fetch is None) is not cpu._cpu.asks(isa)
    linears = ("qkv", "out", "up", "down", "head")
    assert not found.fetch or sorted(found.fetch) == sorted(linears)
    logits = [found.step(rows).tobytes() for rows in steps]
    for name in cpu._cpu.Reading.__members__:
        monkeypatch.setenv("TINYCHAT_FETCH", name)
        runner = build(weights, isa=isa)
        assert runner.fetch == (dict.fromkeys(linears, name) if cpu._cpu.asks(isa) else None)
        assert [runner.step(rows).tobytes() for rows in steps] == logits
    monkeypatch.setenv("TINYCHAT_FETCH", "often")
    with pytest.raises(UsageError, match="TINYCHAT_FETCH is 'often'; expected one of far, near, none, two"):
        build(weights, isa=isa)


def test_physical_cores_within_the_quota(tmp_path):
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    assert physical_cores(tmp_path) >= 1
    for cpu_number in os.sched_getaffinity(0):  # every CPU a thread of one core
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu_number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text("0\n")
    assert physical_cores(tmp_path) == 1
    for cpu_number in os.sched_getaffinity(0):
        (tmp_path / f"sys/devices/system/cpu/cpu{cpu_number}/topology/core_id").write_text(f"{cpu_number}\n")
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n")
    (tmp_path / "sys/fs/cgroup/box/inner").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/box/inner/cpu.max").write_text("max 100000\n")
    (tmp_path / "sys/fs/cgroup/box/cpu.max").write_text("50000 100000\n")
    assert physical_cores(tmp_path) == 1


def test_physical_cores_of_two_kinds_and_the_quota_of_cgroup_1(tmp_path, monkeypatch):
    """Two fast cores of two threads each, four slow cores of one; then 2.5 CPUs granted by an outer group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for number, core in enumerate(["0", "0", "4", "4", "8", "9", "10", "11"]):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
    assert physical_cores(tmp_path) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 4}, raising=False)
    assert physical_cores(tmp_path) == 3
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/box\n3:cpu,cpuacct:/box/inner\n0::/\n")
    for path, quota in (("box/inner", "-1"), ("box", "250000"), ("", "-1")):
        (tmp_path / "sys/fs/cgroup/cpu" / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup/cpu" / path / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "sys/fs/cgroup/cpu" / path / "cpu.cfs_period_us").write_text("100000\n")
    assert physical_cores(tmp_path) == 2


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_physical_cores_whose_numbers_start_anew_in_each_cluster(name, tmp_path, monkeypatch):
    """An RK3588 under Linux 6: clusters of four, two and two; and the first core with a second thread."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    for number, core in enumerate([0, 1, 2, 3, 0, 1, 0, 1, 0]):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
        (topology / name).write_text("0,8\n" if number in (0, 8) else f"{number}\n")
    assert physical_cores(tmp_path) == 8


def test_helpers_sleep_while_no_step_runs():
    runner = build(model(), threads=4)
    runner.step(Rows.of([1], 0))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_a_profile_counts_steps_and_the_work_in_them():
    runner = build(model(weight="q4"), threads=2)
    runner.step(Rows.of([1], 0))
    assert runner.profiled().steps == 0
    runner.profile(True)
    for position in range(1, 4):
        runner.step(Rows.of([1], position))
    runner.profile(False)
    runner.step(Rows.of([1], 4))
    profile = runner.profiled()
    assert (profile.steps, profile.threads) == (3, 2)
    assert 0 < profile.busy_s < 2 * profile.step_s
    assert 0 < profile.kernel_s < profile.step_s / 3


def test_a_forked_child_steps_with_threads_of_its_own():
    weights = model()
    runner = build(weights)
    tokens = ids(8, 97)
    expected = runner.step(Rows.of(tokens, 0))
    runner.cache.truncate(0, 0)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs is killed
        same = np.array_equal(runner.step(Rows.of(tokens, 0)), expected)
        del runner
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(runner.step(Rows.of(tokens, 0)), expected)


def test_a_child_forked_within_a_step_steps_too():
    weights = model()
    runner, tokens = build(weights, ctx_size=512), ids(8, 97)
    expected = build(weights).step(Rows.of(tokens, 0))
    over = threading.Event()

    def steps():
        while not over.is_set():
            with suppress(RuntimeError, ValueError):  # of the last lines' doing
                runner.cache.truncate(0, 0)
                runner.step(Rows.of(ids(500, 97), 0))

    others = threading.Thread(target=steps)
    others.start()
    try:
        for _ in range(5):
            time.sleep(0.01)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                try:
                    runner.cache.truncate(0, 0)
                    os._exit(0 if np.array_equal(runner.step(Rows.of(tokens, 0)), expected) else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(RuntimeError, match="two steps of one decoder"):  # so one was going on
            for _ in range(10000):
                with suppress(ValueError):  # it does not continue the slot
                    runner.step(Rows.of([1], 0))
                time.sleep(0.001)
    finally:
        over.set()
        others.join()


@pytest.mark.parametrize("granted", [None, 0.5, 1.0, 64.0])
def test_results_are_those_of_any_quota(granted, monkeypatch):
    weights, tokens = model(weight="q4"), ids(20, 97)
    expected = build(weights, threads=1).step(Rows.of(tokens, 0, wanted="all"))
    monkeypatch.setattr(cpu, "quota", lambda: granted)
    np.testing.assert_array_equal(build(weights, threads=3).step(Rows.of(tokens, 0, wanted="all")), expected)


def test_torch_at_work_in_the_same_process():
    torch = pytest.importorskip("torch")
    weights, tokens = model(weight="q4"), ids(40, 97)
    expected = build(weights, threads=1).step(Rows.of(tokens, 0, wanted="all"))
    runner, over, same = build(weights, threads=2), threading.Event(), []
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    product = a @ a

    def multiply():
        while not over.is_set():
            same.append(torch.equal(a @ a, product))

    other = threading.Thread(target=multiply)
    other.start()
    try:
        for _ in range(30):
            runner.cache.truncate(0, 0)
            np.testing.assert_array_equal(runner.step(Rows.of(tokens, 0, wanted="all")), expected)
    finally:
        over.set()
        other.join()
    assert same and all(same)
    time.sleep(0.05)
    used = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - used < 0.1  # neither pool waits awake


def test_threads_that_cannot_be_started_are_an_error():
    resource = pytest.importorskip("resource")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            if os.getuid() == 0:  # whom the limit does not bind
                os.setuid(65534)
            build(model(), threads=64)
        except BackendError as error:
            os._exit(0 if "64 threads" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_two_decoders_step_at_the_same_time():
    weights = model(weight="q4")
    tokens = ids(40, 97)
    expected = build(weights, threads=1).step(Rows.of(tokens, 0, wanted="all"))

    def steps(runner):
        for _ in range(20):
            runner.cache.truncate(0, 0)
            np.testing.assert_array_equal(runner.step(Rows.of(tokens, 0, wanted="all")), expected)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(steps, [build(weights, threads=3) for _ in range(2)]))


def test_more_threads_than_cores_do_not_crawl():
    """All on one core: a step waits for no thread that is not running."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    weights, cores = model(weight="q4", layers=8), os.sched_getaffinity(0)
    times = {}
    try:
        os.sched_setaffinity(0, {min(cores)})
        for threads in (1, 4):
            runner = build(weights, threads=threads)
            runner.step(Rows.of([1], 0))
            start = time.perf_counter()
            for position in range(1, 60):
                runner.step(Rows.of([1], position))
            times[threads] = time.perf_counter() - start
    finally:
        os.sched_setaffinity(0, cores)
    assert times[4] < 10 * times[1] + 0.1  # seconds; with barriers it was 60 to 100 times as long


def test_the_interpreter_may_end_while_a_thread_is_inside_a_step():
    program = """
import threading, time
from test_lowered_decoder import Rows, build, ids, model
runner = build(model(weight="q4"), threads=3)
def steps():
    while True:
        runner.cache.truncate(0, 0)
        runner.step(Rows.of(ids(40, 97), 0, wanted="all"))
threading.Thread(target=steps, daemon=True).start()
time.sleep(0.05)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr


def test_progress_and_size():
    seen = []
    runner = build(model(tied=True), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    per_layer = 60 * (60 + 40) + 60 * 60 + 60 * 107 * 3 + 120
    assert 4 * (97 * 60 + 2 * per_layer + 60) <= runner.weight_bytes < 4.6 * (97 * 60 + 2 * per_layer + 60)
