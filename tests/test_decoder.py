"""The step contract and the block's free functions, on the reference backend."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from tiny_models import memory_weights, tiny

from tinychat import decoder
from tinychat.backends import reference
from tinychat.cache import Rows
from tinychat.errors import UsageError
from tinychat.qtensor import QTensor
from tinychat.weights import Layer, Linear, MemoryWeights

PROMPTS = [np.random.default_rng(n).integers(0, 97, n) for n in (4, 9, 17)]


@pytest.fixture(scope="module")
def weights() -> MemoryWeights:
    """Three layers, the later two with a window of 6; q and k norms and biases."""
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return memory_weights(*tiny("qwen3", num_hidden_layers=3, attention_bias=True, **window))


def alone(weights: MemoryWeights, tokens: np.ndarray, **options) -> np.ndarray:
    return reference.build(weights, ctx_size=32, **options).step(Rows.of(tokens, 0, wanted="all"))


def rows(*parts: tuple[int, int, np.ndarray], wanted: list[int]) -> Rows:
    """(slot, start, tokens) one after the other, in one step."""
    return Rows(
        np.concatenate([tokens for _, _, tokens in parts]).astype(np.int32),
        np.concatenate([np.arange(start, start + len(tokens)) for _, start, tokens in parts]).astype(np.int32),
        np.concatenate([np.full(len(tokens), slot) for slot, _, tokens in parts]).astype(np.int32),
        np.array(wanted, np.int32),
    )


def test_slots_of_unequal_length_in_one_step(weights):
    """One prefills in two chunks while two decode; each slot is as if alone."""
    first, second, third = PROMPTS
    runner = reference.build(weights, n_slots=3, ctx_size=32)
    runner.step(rows((2, 0, first[:3]), (0, 0, second[:8]), wanted=[]))
    together = runner.step(rows((1, 0, third[:11]), (2, 3, first[3:]), (0, 8, second[8:]), wanted=[12, 10, 11]))
    assert runner.cache.lengths.tolist() == [9, 11, 4]
    rest = runner.step(Rows.of(third[11:], 11, slot=1, wanted="all"))
    np.testing.assert_allclose(together[0], alone(weights, second)[-1], atol=1e-5)
    np.testing.assert_allclose(together[1], alone(weights, third)[10], atol=1e-5)
    np.testing.assert_allclose(together[2], alone(weights, first)[-1], atol=1e-5)
    np.testing.assert_allclose(rest, alone(weights, third)[11:], atol=1e-5)


def test_interleaved_rows(weights):
    first, second, _ = PROMPTS
    runner = reference.build(weights, n_slots=2, ctx_size=32)
    order = [0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1]
    streams, at = [first, second], [0, 0]
    tokens, positions = [], []
    for slot in order:
        tokens.append(streams[slot][at[slot]])
        positions.append(at[slot])
        at[slot] += 1
    got = runner.step(Rows(*(np.array(a, np.int32) for a in (tokens, positions, order, range(len(order))))))
    np.testing.assert_allclose(got[np.array(order) == 0], alone(weights, first), atol=1e-5)
    np.testing.assert_allclose(got[np.array(order) == 1], alone(weights, second), atol=1e-5)


def test_embeddings_instead_of_tokens(weights):
    tokens = PROMPTS[1]
    step = Rows.of(tokens, 0, wanted="all")
    vectors = Rows(None, step.positions, step.slots, step.wanted, weights.embedding[tokens])
    got = reference.build(weights, ctx_size=32).step(vectors)
    np.testing.assert_array_equal(got, alone(weights, tokens))


def test_truncate_and_copy(weights):
    tokens = PROMPTS[2]
    runner = reference.build(weights, n_slots=2, ctx_size=32)
    runner.step(Rows.of(tokens[::-1], 0, wanted="none"))
    runner.cache.truncate(0, 0)
    runner.step(Rows.of(tokens[:10], 0, wanted="none"))
    runner.cache.copy(0, 1)
    runner.step(Rows.of(tokens[:3], 10, wanted="none"))
    got = runner.step(Rows.of(tokens[10:], 10, slot=1, wanted="all"))
    np.testing.assert_allclose(got, alone(weights, tokens)[10:], atol=1e-5)


def test_wanted_rows(weights):
    tokens = PROMPTS[1]
    everything = alone(weights, tokens)
    for which in ("last", "none"):
        runner = reference.build(weights, ctx_size=32)
        got = runner.step(Rows.of(tokens, 0, wanted=which))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, everything[-1:] if which == "last" else everything[:0], atol=1e-5)
        assert runner.cache.lengths.tolist() == [len(tokens)]


def test_rows_that_do_not_fit_change_nothing(weights):
    runner = reference.build(weights, ctx_size=8)
    runner.step(Rows.of([1, 2], 0))
    for wrong in (
        Rows.of([1], 3),  # leaves a gap
        Rows.of([1], 0),  # goes back
        Rows.of([1], 0, slot=1),
        Rows.of(range(7), 2),  # beyond the capacity
        Rows.of([97], 2),
        Rows.of([-1], 2),
        Rows(None, *(np.array([n], np.int32) for n in (2, 0, 0))),
    ):
        with pytest.raises(ValueError, match=r"slot|positions|token"):
            runner.step(wrong)
        assert runner.cache.lengths.tolist() == [2]


def test_fp16_cache_and_fp64(weights):
    tokens = PROMPTS[2]
    exact = alone(weights, tokens, dtype="fp64")
    single = np.abs(alone(weights, tokens) - exact).max()
    half = np.abs(alone(weights, tokens, kv_dtype="fp16") - exact).max()
    assert 0 < single < 1e-5
    assert 1e-5 < half < 1e-2
    with pytest.raises(UsageError, match="int4"):
        reference.build(weights, ctx_size=8, kv_dtype="int4")
    with pytest.raises(UsageError, match="bf16"):
        reference.build(weights, ctx_size=8, dtype="bf16")


def quantized(shape: tuple[int, int], group_size: int, scales: type, seed: int) -> QTensor:
    rng = np.random.default_rng(seed)
    groups = (shape[0], -(-shape[1] // group_size))
    return QTensor(
        rng.integers(0, 16, shape, np.uint8),
        rng.uniform(0.01, 0.03, groups).astype(scales),
        rng.integers(0, 16, groups, np.uint8),
        4,
        group_size,
    )


def test_mixed_precision_segments():
    """A fused linear of q4, fp16, bf16 and fp32 segments is the stack of their float weights."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((9, 50)).astype(np.float32)
    segments = (
        quantized((11, 50), 16, np.float16, 1),  # the last group is of 2
        quantized((3, 50), 50, np.float32, 2),  # a group per row
        quantized((2, 50), 32, ml_dtypes.bfloat16, 3),
        plain.astype(np.float16),
        plain.astype(ml_dtypes.bfloat16),
        plain,
    )
    bias = rng.standard_normal(43).astype(np.float32)
    ops = reference.TorchOps("fp64")
    packed = ops.pack(Linear(segments, bias))
    dense = [s.dequantize(np.float64) if isinstance(s, QTensor) else s.astype(np.float64) for s in segments]
    x = rng.standard_normal((5, 50))
    np.testing.assert_allclose(ops.linear(torch.from_numpy(x), packed), x @ np.concatenate(dense).T + bias, rtol=1e-12)
    codes = (11 + 3 + 2) * 7 * 4 + 11 * 4 + 3 + 2 * 2  # 8 codes in 4 bytes, and a byte for each zero
    scales = 11 * 4 * 2 + 3 * 4 + 2 * 2 * 2
    assert ops.packed_bytes(packed) == codes + scales + 9 * 50 * (2 + 2 + 4) + 43 * 8


def test_read_only_arrays_and_a_tied_head_share_one_copy():
    weights = memory_weights(*tiny("llama", tie_word_embeddings=True))
    weights.embedding.flags.writeable = False
    runner = reference.build(weights, ctx_size=8)
    table = runner._entrance._embed
    assert runner._head.segments[0].data_ptr() == table.data_ptr()
    layers = sum(a.nbytes for layer in weights.layers for a in (layer.norm1, layer.norm2))
    layers += sum(linear.nbytes for y in weights.layers for linear in (y.qkv, y.out, y.up, y.down))
    assert runner.weight_bytes == layers + weights.embedding.nbytes + weights.final_norm.nbytes


class Recorder:
    """What the quantizer does: ops that note the input of every linear."""

    def __init__(self, ops: reference.TorchOps):
        self._ops = ops
        self.seen: list[tuple[reference.TorchLinear, torch.Tensor]] = []

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def linear(self, x, weight):
        self.seen.append((weight, x))
        return self._ops.linear(x, weight)


def test_one_layer_alone_on_independent_sequences(weights):
    """A block without a cache is the block of a step, sequence by sequence, and shows what each linear sees."""
    config, layer = weights.config, weights.layers[1]
    lengths = [5, 1, 12]
    ops = Recorder(reference.TorchOps())
    packed = decoder.pack_layer(ops, layer)
    x = torch.randn(sum(lengths), config.hidden_size, generator=torch.Generator().manual_seed(0))
    got = decoder.block(config, ops, packed, 1, x, decoder.Context.of_sequences(config, lengths))
    assert [weight for weight, _ in ops.seen] == [packed.qkv, packed.out, packed.up, packed.down]
    assert [seen.shape[1] for _, seen in ops.seen] == [60, 60, 60, 107]
    start = 0
    for length in lengths:
        runner = reference.build(weights, ctx_size=16)
        context = decoder.Context.of_rows(config, Rows.of(range(length), 0), runner.cache)
        want = decoder.block(config, reference.TorchOps(), packed, 1, x[start : start + length], context)
        torch.testing.assert_close(got[start : start + length], want, atol=1e-5, rtol=0)
        start += length


def test_layers_are_taken_one_at_a_time(weights):
    class Streamed(MemoryWeights):
        taken: list[int] = []  # noqa: RUF012

        def layer(self, index: int) -> Layer:
            self.taken.append(index)
            return super().layer(index)

    done = []
    source = Streamed(**vars(weights))
    reference.build(source, ctx_size=8, progress=lambda *counts: done.append((*counts, len(source.taken))))
    assert done == [(1, 3, 1), (2, 3, 2), (3, 3, 3)]


def test_without_torch_the_backend_says_so():
    code = "import sys; sys.modules['torch'] = None; from tinychat.backends import reference as r; print(r.available())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "PyTorch does not load" in out and "pip install torch" in out
    assert reference.available() is None
    assert torch.__version__ in reference.describe()


def test_configs_and_angles_need_no_torch():
    code = "import sys, tinychat.architectures as a, tinychat.rope; a.supported(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
