"""Whole models on the CUDA backend against `reference`: on the host build of its kernels, and with `-m gpu`."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from cuda_devices import DEVICES, kernels
from tiny_models import memory_weights, tiny

from tinychat import sampling
from tinychat.backends import cuda_sampling, reference
from tinychat.backends.cuda_runner import CudaRunner, build_on
from tinychat.backends.cuda_sampling import DeviceSampler
from tinychat.bench import contexts
from tinychat.bench.measure import Session
from tinychat.cache import Rows
from tinychat.config import ModelConfig
from tinychat.engine import Engine
from tinychat.qtensor import QTensor
from tinychat.sampling import SamplingParams
from tinychat.weights import Linear, MemoryWeights

PROMPT = np.random.default_rng(0).integers(0, 97, 21)

# What each family brings: grouped queries; ALiBi; one head of keys for all and parallel blocks; capped scores, windows
# and norms after; a part of a head that turns, LayerNorm and biases; norms of heads; and so on.
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mpt": ("mpt", {}),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "phi": ("phi", {}),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 28}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {"num_key_value_heads": 6}),
    "cohere2": ("cohere2", {}),
    "granite": ("granite", {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "mixtral": ("mixtral", {}),
}


def rounded(weights: MemoryWeights, bits: int | None = None, group_size: int = 32) -> MemoryWeights:
    """The same model in fp16, or with its linears of codes: what both backends are given."""
    rng = np.random.default_rng(5)

    def weight(values):
        if bits is None:
            return values.astype(np.float16)
        n, k = values.shape
        groups = -(-k // group_size)
        zeros = rng.integers(0, 2**bits, (n, groups), np.uint8)
        scales = np.full((n, groups), 0.2 / 2**bits) * rng.uniform(0.5, 1.5, (n, groups))
        return QTensor(rng.integers(0, 2**bits, (n, k), np.uint8), scales.astype(np.float16), zeros, bits, group_size)

    def linear(found):
        return found and Linear(tuple(map(weight, found.segments)), found.bias)

    def layer(found):
        names = [f.name for f in dataclasses.fields(found) if isinstance(getattr(found, f.name), Linear)]
        return dataclasses.replace(found, **{name: linear(getattr(found, name)) for name in names})

    ends = weights.other_ends
    half = {f.name: getattr(ends, f.name) for f in dataclasses.fields(ends)}
    half["positions"] = None if ends.positions is None else ends.positions.astype(np.float16)
    head = weights.output_head
    return dataclasses.replace(
        weights,
        embedding=weights.embedding.astype(np.float16),
        layers=[layer(found) for found in weights.layers],
        output_head=head and Linear(tuple(s.astype(np.float16) for s in head.segments), head.bias),
        other_ends=type(ends)(**half),
    )


def family(name: str, bits: int | None = None, **changes) -> MemoryWeights:
    model_type, own = FAMILIES[name]
    return rounded(memory_weights(*tiny(model_type, **{**own, **changes})), bits)


def build(device: str, weights: MemoryWeights, **options) -> CudaRunner:
    return build_on(*kernels(device), weights, **{"ctx_size": 64, **options})


def distance(got: np.ndarray, want: np.ndarray, worst: float = 1.0) -> float:
    """Of logits, relative to their own size, without what adds the same to all: of the worst row, or of a quantile."""
    assert got.dtype == np.float32 and got.shape == want.shape and np.isfinite(got).all()
    got, want = (logits.astype(float) - logits.mean(-1, keepdims=True) for logits in (got, want))
    return float(np.quantile(np.sqrt(((got - want) ** 2).mean(-1) / (want**2).mean(-1)), worst))


def steps(runner, tokens=PROMPT) -> np.ndarray:
    """A prompt in two chunks, then token by token."""
    found = [runner.step(Rows.of(tokens[:11], 0, wanted="all")), runner.step(Rows.of(tokens[11:16], 11, wanted="all"))]
    found += [runner.step(Rows.of(tokens[i : i + 1], i, wanted="all")) for i in range(16, len(tokens))]
    return np.concatenate(found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:a mixture")
def test_a_family_in_fp16(device, name):
    weights = family(name)
    want = steps(reference.build(weights, ctx_size=64, dtype="fp64"))
    worst = 0.6 if weights.config.experts else 1.0  # where two experts are almost equal, one may be taken for the other
    assert distance(steps(build(device, weights)), want, worst) <= 5e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"kv_dtype": "int8"}, {"head": 8}], ids=str)
def test_options(device, name, options):
    weights = family(name)
    same = {k: v for k, v in options.items() if k != "dtype"}
    want = steps(reference.build(weights, ctx_size=64, dtype="fp64", **same))
    assert distance(steps(build(device, weights, **options)), want) <= (3e-2 if "dtype" in options else 2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "mpt", "falcon", "gemma2", "phi"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_family(device, name, bits):
    sizes = {"mpt": {"d_model": 64, "n_heads": 4}}.get(name, {"hidden_size": 64, "num_attention_heads": 4})
    weights = family(name, bits, **sizes)
    want = steps(reference.build(weights, ctx_size=64, dtype="fp64", head=8))
    assert distance(steps(build(device, weights, head=8)), want) <= 5e-3


@pytest.mark.parametrize("device", DEVICES)
def test_slots_and_what_a_slot_keeps(device):
    """The step contract: several chats at once, copies, truncation, embeddings in the place of tokens."""
    weights = family("llama")
    runners = [build(device, weights, n_slots=3), reference.build(weights, ctx_size=64, n_slots=3, dtype="fp64")]
    every = np.arange(3, dtype=np.int32)

    def run(runner):
        found = [runner.step(Rows.of(PROMPT[:9], 0)), runner.step(Rows.of(PROMPT[:12], 0, slot=2))]
        runner.cache.copy(0, 1)
        runner.cache.truncate(2, 9)
        for at in range(9, 13):
            tokens = np.array([PROMPT[at], 5, PROMPT[at]], np.int32)
            found.append(runner.step(Rows(tokens, np.full(3, at, np.int32), every, every)))
        vectors = weights.embedding[[3]].astype(np.float32)
        at = np.array([13], np.int32)
        found.append(runner.step(Rows(None, at, np.zeros(1, np.int32), np.zeros(1, np.int32), vectors)))
        found.append(runner.step(Rows.of(PROMPT[:3], 14, wanted="none")))
        assert runner.cache.lengths.tolist() == [17, 13, 13]
        for wrong in (Rows.of([1], 3), Rows.of([97], 17), Rows.of([-1], 17), Rows.of([1], 0, slot=3)):
            with pytest.raises(ValueError, match=r"slot|positions|token"):
                runner.step(wrong)
        assert runner.cache.lengths.tolist() == [17, 13, 13]
        return np.concatenate(found)

    assert distance(*map(run, runners)) <= 5e-3


DRAWS = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 5.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 3, 97, 4096, 5003])
def test_the_likeliest_token(device, width):
    """The first of equals; -1 is reported where a logit is not finite, and the next step has a token all the same."""
    module, where = kernels(device)
    sampler, rng = DeviceSampler(module, where), np.random.default_rng()
    sampler.begin(SamplingParams(temperature=0.0), rng)
    told = torch.tensor([[5, 7], [40, 41]], device=where)

    def drawn(logits: np.ndarray) -> int:
        before = told.clone()
        sampler.draw(torch.from_numpy(logits[None]).to(where), told[0, :1], told[1, :1])
        assert 0 <= told[0, 0] < width and told[1, 0] == before[1, 0] + 1 and torch.equal(told[:, 1], before[:, 1])
        assert sampler.reported.item() in (-1, told[0, 0].item())
        return sampler.reported.item()

    for _ in range(3):
        logits = rng.standard_normal(width).astype(np.float32)
        assert drawn(logits) == logits.argmax()
        logits[rng.integers(width, size=3)] = 9.0
        assert drawn(logits) == logits.argmax()
        assert drawn(np.full(width, -3.0, np.float32)) == 0
        for wrong in (np.nan, np.inf, -np.inf):
            logits[rng.integers(width)] = wrong
            assert drawn(logits) == -1
            logits[:] = rng.standard_normal(width)
    assert drawn(np.full(width, np.nan, np.float32)) == -1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "k"), [(2, 1), (97, 12), (5003, 40)])
def test_the_largest_are_those_of_the_host(device, width, k):
    """Of equals the first, where the k-th has equals too; zeros of both signs are equal."""
    _, where = kernels(device)
    rng = np.random.default_rng()
    for spread in (1, 3, 1000):
        values = (rng.integers(0, spread, width, endpoint=True) * rng.choice([-1.0, 1.0], width)).astype(np.float32)
        values[rng.random(width) < 0.2] *= 1e30
        found, ids = cuda_sampling._largest(torch.from_numpy(values).to(where), k)
        assert (
            ids.tolist() == sampling._largest(values, k).tolist()
            and found.tolist() == values[ids.cpu().numpy()].tolist()
        )


class OnTheHost:
    """A runner without its own way of drawing."""

    def __init__(self, runner):
        self.config, self.cache, self.weight_bytes, self.step = runner.config, runner.cache, 0, runner.step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_tokens_drawn_on_the_device_are_those_drawn_on_the_host(device, options):
    """One seed, one text; again from a cache that a longer answer left."""
    runner = build(device, family("llama"))
    ours, host = Engine(runner), Engine(OnTheHost(runner))
    asked = {"max_tokens": 12, "seed": 7, **options}
    want = host.generate(PROMPT.tolist(), **asked).tokens
    assert len(want) == 12
    for _ in range(2):
        assert ours.generate(PROMPT.tolist(), **asked).tokens == want
    other = ours.generate(PROMPT.tolist(), **{**asked, "seed": 8}).tokens
    assert options["temperature"] == 0 or options.get("top_k") == 1 or other != want


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_may_fill_the_context(device):
    runner = build(device, family("llama"), ctx_size=24)
    result = Engine(runner).generate(PROMPT.tolist(), max_tokens=100, temperature=0.0)
    assert len(result.tokens) == 3 and result.finish_reason == "length"
    assert runner.cache.lengths.tolist() == [23]


def test_more_draws_than_numbers_are_sent_ahead(monkeypatch):
    monkeypatch.setattr("tinychat.backends.cuda_sampling.AHEAD", 3)
    runner = build("host", family("llama"))
    asked = {"max_tokens": 8, "seed": 3, "temperature": 1.0}
    want = Engine(OnTheHost(runner)).generate(PROMPT.tolist(), **asked).tokens
    assert Engine(runner).generate(PROMPT.tolist(), **asked).tokens == want


@pytest.mark.parametrize("device", DEVICES)
def test_the_bench_measures_it(device):
    """Tokens are drawn on the device there too, and a cache filled with random entries is read."""
    runner = build(device, family("llama"), ctx_size=40 + contexts.MOST)
    session = Session(Engine(runner))
    found = session.decode(6, lambda n: 1.0, None)
    assert len(found.latencies) == 5 and all(0 < a <= b for a, b in zip(found.steps, found.latencies, strict=True))
    for kv_dtype in ("fp16", "int8"):
        cache = build(device, family("llama"), kv_dtype=kv_dtype).cache
        contexts.fill(cache, 40)
        assert cache.keys[1, 0, :, :40, :10].any() and not cache.keys[..., 10:].any()
        assert not cache.values[:, 0, :, 40:].any()
    contexts.fill(runner.cache, 40)
    seconds, _ = contexts._one(runner, 40, None)
    assert seconds > 0 and runner.cache.lengths[0] > 41


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_kernels_that_begin_early_compute_the_same(kv_dtype):
    """Each kernel of a step reads what the one before wrote: on sm_90 it begins before that one has ended."""
    module, _ = kernels("gpu")
    weights = family("llama", 4, hidden_size=256, num_attention_heads=8, num_hidden_layers=6)

    def logits(graphs: bool) -> np.ndarray:
        runner = build("gpu", weights, kv_dtype=kv_dtype, graphs=graphs, head=8)
        found = [runner.step(Rows.of(PROMPT[:9], 0))]
        found += [runner.step(Rows.of([int(token)], 9 + i)) for i, token in enumerate(np.tile(PROMPT, 2))]
        return np.concatenate(found)

    module.overlap(False)
    try:
        want = logits(False)
        assert np.array_equal(logits(True), want)
        module.overlap(True)
        for _ in range(3):
            assert np.array_equal(logits(False), want)
            assert np.array_equal(logits(True), want)
    finally:
        module.overlap(True)


@pytest.mark.gpu
def test_another_device_or_stream_may_be_current():
    """Steps on a stream of the caller's, from another thread, whose device is its own."""
    runner, found = build("gpu", family("llama")), []
    want = runner.step(Rows.of(PROMPT[:9], 0)), runner.step(Rows.of(PROMPT[9:10], 9))

    def again():
        with torch.cuda.stream(torch.cuda.Stream()):
            runner.cache.truncate(0, 0)
            found.extend([runner.step(Rows.of(PROMPT[:9], 0)), runner.step(Rows.of(PROMPT[9:10], 9))])

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert all(map(np.array_equal, found, want))


def test_penalties_and_logprobs_are_left_to_the_host():
    runner, rng = build("host", family("llama")), np.random.default_rng(0)
    assert runner.drawing(0, SamplingParams(logprobs=1), rng) is None
    assert runner.drawing(0, SamplingParams(repetition_penalty=1.1), rng) is None
    assert runner.drawing(0, SamplingParams(), rng) is not None


def test_the_config_says_which_16_bits():
    weights = family("llama")
    assert isinstance(weights.config, ModelConfig)
    for name, want in (("bfloat16", "torch.bfloat16"), ("float16", "torch.float16"), ("float32", "torch.float16")):
        found = dataclasses.replace(weights, config=dataclasses.replace(weights.config, dtype=name))
        assert str(build("host", found)._ops.dtype) == want
