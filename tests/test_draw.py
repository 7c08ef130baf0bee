"""The draw in C++ (`csrc/draw.h`) against `sampling.sample`, which says what a draw is."""

import itertools

import numpy as np
import pytest

from tinychat import engine
from tinychat.backends import cpu
from tinychat.cache import Rows
from tinychat.config import Rope, RopeScaling
from tinychat.sampling import History, SamplingParams, sample

if cpu.available():
    pytest.skip(f"cpu backend: {cpu.available()}", allow_module_level=True)

from tinychat import _cpu

NUMBERS = [0.0, 1e-9, 0.1, 0.37, 0.5, 0.9, 0.999, np.nextafter(1.0, 0.0)]


class Given:
    """A generator whose every number is `number`."""

    def __init__(self, number):
        self.random = lambda: number


def drawn(logits, number=0.0, top_k=0, temperature=1.0, top_p=1.0, min_p=0.0):
    logits = np.ascontiguousarray(logits, np.float32)
    return _cpu.draw(logits.ctypes.data, len(logits), top_k, temperature, top_p, min_p, number)


def expected(logits, number=0.0, **options):
    return sample(logits, SamplingParams(**options), History(len(logits)), Given(number))[0]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 4096])
def test_the_likeliest_token_is_the_first_of_equals(n):
    random = np.random.default_rng(n)
    for _ in range(20):
        logits = random.standard_normal(n).astype(np.float32)
        assert drawn(logits) == logits.argmax()
        logits = random.integers(-3, 3, n).astype(np.float32)
        assert drawn(logits) == logits.argmax()
    assert drawn(np.full(n, -np.finfo(np.float32).max)) == 0


@pytest.mark.parametrize("n", [2, 3, 64, 65, 200, 4096])
@pytest.mark.parametrize("top_p, min_p", [(1.0, 0.0), (0.95, 0.05), (0.3, 0.0), (1.0, 0.5), (1e-3, 1.0)])
def test_a_number_draws_what_the_specification_draws(n, top_p, min_p):
    random = np.random.default_rng(n)
    for top_k, temperature, scale in itertools.product((1, 2, 40, 1023), (0.1, 0.7, 3.0), (0.0, 1.0, 8.0)):
        if top_k >= n:
            continue
        logits = (scale * random.standard_normal(n)).astype(np.float32)
        options = {"top_k": top_k, "temperature": temperature, "top_p": top_p, "min_p": min_p}
        for number in NUMBERS:
            assert drawn(logits, number, **options) == expected(logits, number, **options)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "few values"])
def test_whatever_order_the_logits_come_in(order):
    n = 3000
    logits = {
        "rising": np.arange(n) / 100,
        "falling": -np.arange(n) / 100,
        "equal": np.zeros(n),
        "few values": np.arange(n) % 7,
    }[order].astype(np.float32)
    for top_k, number in itertools.product((1, 5, 64, 700), NUMBERS):
        assert drawn(logits, number, top_k=top_k) == expected(
            logits, number, top_k=top_k, temperature=1.0, top_p=1.0, min_p=0.0
        )


def test_logits_that_overflow_apart():
    logits = np.array([-3e38, 3e38, 0, 3e38], np.float32)
    found = {drawn(logits, number, top_k=3, temperature=1e-5) for number in NUMBERS}
    assert found == {1, 3}
    assert {drawn(logits, number, top_k=3, temperature=3.4e38, min_p=0.0) for number in NUMBERS} == {1, 2, 3}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_draws_nothing(wrong):
    for n, top_k in itertools.product((5, 64, 1001), (0, 1, 4)):
        for at in (0, n // 2, n - 1):
            logits = np.zeros(n, np.float32)
            logits[at] = wrong
            assert drawn(logits, top_k=top_k) == -1


def test_as_many_tokens_as_there_are_is_an_error():
    for n, top_k in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(ValueError, match="top_k"):
            drawn(np.zeros(n, np.float32), top_k=top_k)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {}, {"top_k": 1}, {"top_k": 5, "temperature": 1.5, "min_p": 0}], ids=str
)
def test_an_answer_is_that_of_the_specification(options):
    """Where log-probabilities are asked for, Python draws. Again from a cache that a longer answer left."""
    llm = engine.load("pebble", device="cpu", ctx_size=128)
    asked = {"max_tokens": 90, "seed": 7, "ignore_eos": True, **options}
    want = llm.generate("Once upon a time", logprobs=0, **asked).tokens
    for _ in range(2):
        assert llm.generate("Once upon a time", **asked).tokens == want
    full = llm.generate("Once upon a time", **{**asked, "max_tokens": 1000})
    assert full.finish_reason == "length" and full.tokens[:90] == want
    assert full.usage.prompt_tokens + len(full.tokens) == llm.ctx_size


def test_what_is_left_to_python():
    runner = engine.load("pebble", device="cpu", ctx_size=16).runner
    rng = np.random.default_rng(0)
    for options in ({"logprobs": 1}, {"repetition_penalty": 1.1}, {"top_k": 0}, {"top_k": 10**6}):
        assert runner.drawing(0, SamplingParams(**options), rng) is None
    follow = runner.drawing(0, SamplingParams(top_k=0, temperature=0), rng)
    for _ in range(16):
        assert follow(1) >= 0
    with pytest.raises(ValueError, match="17 positions in a cache of 16"):
        follow(1)
    runner.cache.truncate(0, 3)  # and on from there
    assert follow(1) >= 0 and runner.cache.lengths[0] == 4


FOLLOWED = {
    "one rope": {},
    "two ropes": {"layer_ropes": (Rope(dim=8), Rope(dim=8, theta=1e6))},
    "no rope": {"rope": Rope(dim=0), "n_kv_heads": 6, "slopes": tuple(2.0**-i for i in range(1, 7))},
    "angles by length": {"rope": Rope(dim=8, scaling=RopeScaling.DYNAMIC, factor=2.0, original_max_positions=40)},
}


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_following_is_stepping(name, kv_dtype, monkeypatch):
    """Over more positions than angles are looked up at a time, on the second slot of two."""
    monkeypatch.setattr(cpu, "ROTATED_AHEAD", 50)
    pytest.importorskip("torch")
    from test_quantize_awq import random_weights, tiny_config

    source, params = random_weights(tiny_config(max_positions=160, **FOLLOWED[name])), SamplingParams(top_k=40)
    runners = [cpu.build(source, ctx_size=150, n_slots=2, threads=n, kv_dtype=kv_dtype) for n in (2, 1)]
    follow = runners[0].drawing(1, params, np.random.default_rng(0))
    rng, history = np.random.default_rng(0), History(source.config.vocab_size)
    followed, stepped = [], []
    for position, token in enumerate(np.random.default_rng(1).integers(0, source.config.vocab_size, 140).tolist()):
        followed.append(follow(token))
        stepped.append(sample(runners[1].step(Rows.of([token], position, 1))[0], params, history, rng)[0])
    assert followed == stepped and len(set(followed)) > 10
    for one, other in zip(*((r.cache.keys, r.cache.values, r.cache.lengths) for r in runners), strict=True):
        assert np.array_equal(one, other)
