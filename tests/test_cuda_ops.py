"""Norm, activation and attention of the CUDA backend against float64, op by op: on the host build, and `-m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_devices import DEVICES, kernels
from fakes import tiny_config

from tinychat.backends import cuda_cache, cuda_ops, reference
from tinychat.cache import KVCache, Rows
from tinychat.config import Activation, ModelConfig, Norm, QKNorm, Rope, RopeScaling

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NMSE = {"fp16": 1e-6, "bf16": 1e-5}


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape and torch.isfinite(got).all()
    return float((got - want).square().sum() / want.square().sum())


def config_of(**changes) -> ModelConfig:
    return tiny_config(**{"n_heads": 6, "n_kv_heads": 2, "head_dim": 20, "rope": Rope(dim=20), **changes})


def ops_of(device: str, dtype: str, config: ModelConfig, kv_dtype="fp16", n_slots=1, capacity=64) -> cuda_ops.CudaOps:
    module, where = kernels(device)
    cache = cuda_cache.DeviceCache(config, n_slots, capacity, kv_dtype, where)
    ops = cuda_ops.CudaOps(module, config, cache, DTYPES[dtype])
    ops.cache = cache
    return ops


def random(ops: cuda_ops.CudaOps, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(ops.device, ops.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("width", [1, 60, 512, 1000, 4096, 4544, 5000, 32768])
def test_norm_of_a_sum(device, dtype, kind, width):
    ops, exact = ops_of(device, dtype, config_of()), reference.TorchOps("fp64")
    rows = 3 if width < 4096 else 2
    x = 5 + random(ops, rows, width)
    parts = random(ops, rows, width, seed=1), random(ops, rows, width, seed=2)
    weight, bias = np.random.default_rng(0).normal(1, 0.5, (2, width)).astype(np.float32)
    for added, scale, use_bias in (((), 1.0, True), (parts[:1], 0.3, False), (parts, 1.0, True)):
        bias_of = (lambda o: o.vector(bias)) if use_bias else (lambda o: None)
        total, got = ops.add_norm(x, added, scale, ops.vector(weight), 1e-5, kind, bias_of(ops))
        wide = [tensor.double().cpu() for tensor in (x, *added)]
        want_total, want = exact.add_norm(
            wide[0], tuple(wide[1:]), scale, exact.vector(weight), 1e-5, kind, bias_of(exact)
        )
        assert nmse(total, want_total) <= NMSE[dtype]
        rounded = total.double().cpu()  # the norm is of the stream as it is kept
        want = exact.norm(rounded, exact.vector(weight), 1e-5, kind, bias_of(exact))
        if width > 1 or use_bias:
            assert nmse(got, want) <= NMSE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_rows_apart(device):
    """Queries are normed where they stand, among keys and values."""
    ops, exact = ops_of(device, "fp16", config_of()), reference.TorchOps("fp64")
    qkv = random(ops, 4, 100)
    weight = np.linspace(0.5, 2, 60).astype(np.float32)
    for begin in (0, 7, 40):
        part = qkv[:, begin : begin + 60]
        want = exact.norm(part.double().cpu(), exact.vector(weight), 1e-6)
        assert nmse(ops.norm(part, ops.vector(weight), 1e-6), want) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("gated", [False, True])
def test_activation(device, dtype, kind, gated):
    ops, exact = ops_of(device, dtype, config_of()), reference.TorchOps("fp64")
    for width, rows in ((1, 1), (107, 5), (4096, 2), (2056, 3)):
        up = 3 * random(ops, rows, width * (2 if gated else 1))
        scale = np.random.default_rng(1).uniform(0.5, 2, width).astype(np.float32)
        for values in (None, scale):
            got = ops.activation(up, kind, gated, None if values is None else ops.vector(values))
            want = exact.activation(up.double().cpu(), kind, gated, None if values is None else exact.vector(values))
            assert nmse(got, want) <= NMSE[dtype] or want.abs().max() == 0


def test_activation_keeps_what_is_not_finite():
    ops = ops_of("host", "fp16", config_of())
    up = torch.tensor([[float("nan")] * 8], dtype=torch.float16)
    for kind in Activation:
        assert torch.isnan(ops.activation(up, kind, gated=False)).all()


# ---- attention

CASES = {
    "grouped": {},
    "a head each": {"n_kv_heads": 6},
    "one for all": {"n_heads": 19, "n_kv_heads": 1, "head_dim": 64, "rope": Rope(dim=64)},
    "pairs turn": {"rope": Rope(dim=20, interleaved=True)},
    "a part turns": {"rope": Rope(dim=8)},
    "ALiBi": {"rope": Rope(), "slopes": tuple(2.0**-i for i in range(1, 7))},
    "window": {"sliding_window": 7, "windowed_layers": frozenset({0})},
    "cap": {"attention_cap": 2.0, "attention_scale": 0.7},
    "head norms": {"qk_norm": QKNorm.HEAD},
    "heads of 80": {"head_dim": 80, "rope": Rope(dim=32)},
    "heads of 100": {"head_dim": 100, "rope": Rope(dim=100), "n_heads": 4},
    "heads of 128": {"head_dim": 128, "rope": Rope(dim=128), "n_heads": 8},
    "heads of 256": {"head_dim": 256, "rope": Rope(dim=256), "n_heads": 5, "n_kv_heads": 1},
    "all at once": {
        "qk_norm": QKNorm.HEAD,
        "attention_cap": 3.0,
        "sliding_window": 70,
        "windowed_layers": frozenset({0}),
        "slopes": tuple(0.1 * i for i in range(6)),
    },
}


class Both:
    """One layer's attention on the device and in float64, on caches that get the same rows."""

    def __init__(self, device: str, dtype: str, config: ModelConfig, kv_dtype: str = "fp16", n_slots=1, capacity=256):
        self.ops = ops_of(device, dtype, config, kv_dtype, n_slots, capacity)
        self.exact = reference.TorchOps("fp64")
        self.config = config
        self.cache = KVCache(1, n_slots, config.n_kv_heads, capacity, config.head_dim, "fp32")
        rng = np.random.default_rng(3)
        self.norms = rng.normal(1, 0.3, (2, config.head_dim)).astype(np.float32)
        self.seed = 0

    def step(self, *parts: tuple[int, int]) -> float:
        """NMSE after a step of (slot, rows) each, where the slots end."""
        c = self.config
        slots = np.concatenate([np.full(n, slot, np.int32) for slot, n in parts])
        positions = np.array([self.cache.lengths[slot] + (slots[:i] == slot).sum() for i, slot in enumerate(slots)])
        rows = Rows(None, positions.astype(np.int32), slots, np.zeros(0, np.int32))
        self.seed += 1
        qkv = random(self.ops, len(rows), c.q_size + 2 * c.kv_size, seed=self.seed)
        found = []
        for ops, cache, x in ((self.ops, self.ops.cache, qkv), (self.exact, self.cache, qkv.double().cpu())):
            context = ops.context(c, rows, cache)
            q, k, v = x.split([c.q_size, c.kv_size, c.kv_size], dim=-1)
            heads = (q.unflatten(-1, (-1, c.head_dim)), *(t.unflatten(-1, (-1, c.head_dim)) for t in (k, v)))
            norms = tuple(map(ops.vector, self.norms)) if c.qk_norm is QKNorm.HEAD else None
            found.append(ops.attention(*heads, c, 0, context, norms))
            np.add.at(cache.lengths, slots, 1)
        return nmse(*found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_attention(device, name):
    """A prompt, tokens one by one, a second prompt after them: the cache is of one piece."""
    both = Both(device, "fp16", config_of(**CASES[name]))
    for rows in (1, 1, 70, 1, 11, 1, 3, 20, 1):
        assert both.step((0, rows)) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["grouped", "one for all", "heads of 256", "all at once"])
def test_attention_in_bf16(device, name):
    both = Both(device, "bf16", config_of(**CASES[name]))
    for rows in (30, 1, 90, 1):
        assert both.step((0, rows)) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["cap", "all at once", "window"])
def test_a_prompt_in_pieces(device, name, monkeypatch):
    monkeypatch.setattr(cuda_ops, "_PIECE", 32)
    monkeypatch.setattr(cuda_ops, "_SCORES", 4000)  # of 6 heads and 100 positions: 6 rows
    both = Both(device, "fp16", config_of(**CASES[name]))
    for rows in (45, 1, 90):
        assert both.step((0, rows)) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["grouped", "a head each", "heads of 100", "ALiBi"])
def test_attention_on_an_int8_cache(device, name):
    """Entries are those of `cache.quantize_entries`, of the fp16 stream's rounding aside."""
    config = config_of(**CASES[name])
    both = Both(device, "fp16", config, "int8")
    both.cache = KVCache(1, 1, config.n_kv_heads, 256, config.head_dim, "int8")
    for rows in (1, 70, 1, 12, 1):
        assert both.step((0, rows)) <= 1e-4  # a code that fell on the other side of a half
    length = 85
    got, want = both.ops.cache, both.cache
    codes = got.keys[0, 0, :, :length, : config.head_dim].cpu().numpy().astype(int)
    off = np.abs(codes - want.keys[0, 0, :, :length])
    assert off.max() <= 1 and (off > 0).mean() < 0.01
    np.testing.assert_allclose(got.key_scales[0, 0, :, :length].cpu(), want.key_scales[0, 0, :, :length], rtol=1e-4)
    assert not got.keys[..., config.head_dim :].any() and not got.values[..., config.head_dim :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_slots_in_one_step(device):
    """Several chats decode; one prefills beside them; rows of one slot lie apart."""
    both = Both(device, "fp16", config_of(), n_slots=4)
    assert both.step((0, 40), (2, 9)) <= 1e-6
    for _ in range(3):
        assert both.step((2, 1), (0, 1), (3, 1)) <= 1e-6
    assert both.step((1, 70), (0, 1), (1, 20), (3, 12)) <= 1e-6
    assert both.step((3, 1), (1, 1), (0, 1), (2, 1)) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaling", [RopeScaling.DYNAMIC, RopeScaling.LONGROPE, RopeScaling.LLAMA3])
def test_angles_that_depend_on_the_length(device, scaling):
    factors = {"short_factors": (1.0,) * 10, "long_factors": tuple(1.0 + 0.2 * i for i in range(10))}
    rope = Rope(dim=20, scaling=scaling, factor=4.0, original_max_positions=32, **factors)
    both = Both(device, "fp16", config_of(rope=rope))
    for rows in (30, 1, 1, 1, 1, 20, 1):
        assert both.step((0, rows)) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_long_contexts_are_split(device):
    """More positions than one block takes: the parts of all are joined, in whichever order the blocks end."""
    module, _ = kernels(device)
    both = Both(device, "fp16", config_of(n_heads=4, n_kv_heads=2), capacity=1100)
    both.step((0, 1023))
    for turned in (False, True, False):
        if device == "host":
            module.reverse(turned)
        assert both.step((0, 1)) <= 1e-6
    if device == "host":
        module.reverse(False)
    assert not both.ops._arrived.any()
    assert both.ops._splits > 1


def test_a_value_that_is_not_finite_is_not_hidden():
    """NaN in a key or value comes out, through an int8 cache too: the engine looks for it in the logits."""
    for kv_dtype in ("fp16", "int8"):
        both = Both("host", "fp16", config_of(), kv_dtype)
        c, ops = both.config, both.ops
        rows = Rows(None, np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32))
        v = torch.full((1, c.n_kv_heads, c.head_dim), float("nan"), dtype=torch.float16)
        q, k = torch.ones(1, c.n_heads, c.head_dim).half(), torch.ones_like(v)
        assert torch.isnan(ops.attention(q, k, v, c, 0, ops.context(c, rows, ops.cache))).all()


def test_what_does_not_fit_is_refused():
    ops = ops_of("host", "fp16", config_of())
    x = torch.zeros(2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected"):
        ops.activation(x.float(), Activation.SILU)
    with pytest.raises(ValueError, match="expected"):
        ops.add_norm(x, (x.T,), 1.0, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="norm"):
        ops.norm(x, torch.ones(9), 1e-5)
    with pytest.raises(ValueError, match="heads"):
        heads = torch.zeros(1, 6, 20)
        rows = Rows(None, np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32))
        ops.attention(heads, heads, heads, config_of(), 0, ops.context(config_of(), rows, ops.cache))


def test_contexts_know_alone_rows_from_prompts():
    def found(*slots):
        starts, positions = dict.fromkeys(slots, 0), []
        for slot in slots:
            positions.append(starts[slot])
            starts[slot] += 1
        rows = Rows(None, np.array(positions, np.int32), np.array(slots, np.int32), np.zeros(0, np.int32))
        return cuda_cache.stretches(rows)

    assert found(3, 1) is None
    whole = cuda_cache.Stretch
    assert found(0, 0, 2) == (whole(0, 2, 0, 0), whole(2, 3, 2, 0))
    assert found(1, 0, 1) == (whole(0, 1, 1, 0), whole(1, 2, 0, 0), whole(2, 3, 1, 1))
