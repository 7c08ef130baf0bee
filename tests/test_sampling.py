"""Sampling against a plain rendering of its definitions, statistics of the draw, and everything a request may hold."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.errors import ConfigError, UsageError
from tinychat.sampling import History, SamplingParams, candidates, logprob, penalize, sample

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def normal(n, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def distribution(logits, params):
    """Probability of each token, fp64, straight from the definitions: one filter after the other, renormalized."""
    p = [math.exp((float(x) - float(max(logits))) / params.temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: (-float(logits[i]), i))
    kept = order[: params.top_k] if params.top_k else order
    if params.top_p < 1:
        total, reached, nucleus = math.fsum(p[i] for i in kept), 0.0, []
        for i in kept:
            if nucleus and reached >= params.top_p * total:
                break
            nucleus.append(i)
            reached += p[i]
        kept = nucleus
    kept = [i for i in kept if p[i] >= params.min_p * p[order[0]]]
    total = math.fsum(p[i] for i in kept)
    return np.array([p[i] / total if i in kept else 0.0 for i in range(len(p))])


def filtered(logits, params):
    ids, weights = candidates(logits, params)
    out = np.zeros(len(logits))
    out[ids] = weights / weights.sum()
    return out


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.floats(0.05, 5),
    st.integers(0, 45),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_filters_do_as_defined(values, temperature, top_k, top_p, min_p):
    logits = np.array(values, np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, found = distribution(logits, params), filtered(logits, params)
    if (expected > 0).sum() != (found > 0).sum():  # a sum within rounding of top_p may fall on either side
        nudged = [dataclasses.replace(params, top_p=min(1.0, top_p * (1 + s))) for s in (1e-6, -1e-6)]
        expected = min((distribution(logits, p) for p in nudged), key=lambda e: np.abs(e - found).max())
    assert np.allclose(found, expected, rtol=2e-5, atol=1e-9)


def test_a_wide_nucleus_grows_past_the_first_slice():
    logits = normal(5000, scale=0.1)
    params = SamplingParams(**OFF | {"top_p": 0.9})
    ids, weights = candidates(logits, params)
    p = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    assert len(ids) == np.searchsorted(np.cumsum(p), 0.9 * p.sum()) + 1 > 256
    assert np.all(np.diff(weights) <= 0)


def test_ties_go_to_the_lower_id():
    logits = np.array([1, 5, 5, 5, 0], np.float32)
    assert candidates(logits, SamplingParams(**OFF | {"top_k": 2}))[0].tolist() == [1, 2]
    assert sample(logits, SamplingParams(temperature=0), History(5), rng())[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 15, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(options):
    params = SamplingParams(**OFF | options)
    logits = normal(30, seed=1, scale=1.0)
    expected = distribution(logits, params) * 20_000
    generator, history = rng(5), History(30)
    counts = np.bincount([sample(logits, params, history, generator)[0] for _ in range(20_000)], minlength=30)
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi2 = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    # Wilson and Hilferty: chi2 / freedom to the power 1/3 is nearly normal; 3.09 deviations are p = 0.001
    assert ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 3.09


def test_a_token_without_probability_is_not_drawn_at_the_edge():
    class Lowest:
        def random(self):
            return 0.0

    assert sample(np.array([-3e38, 0, 1], np.float32), SamplingParams(**OFF), History(3), Lowest())[0] == 1


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 1 - 2**-53])
def test_of_many_tokens_only_those_with_probability_are_drawn(part):
    class Fixed:
        def random(self):
            return part

    logits = np.full(2000, -np.inf, np.float32)
    logits[[300, 511, 512, 1300]] = 1.0  # at ends of blocks, with whole blocks of none before, between and after
    expected = {0.0: 300, 0.3: 511, 0.5: 512}.get(part, 1300)
    assert sample(logits, SamplingParams(**OFF), History(2000), Fixed())[0] == expected


def test_a_small_nucleus_is_the_likeliest_token():
    logits = np.array([-1e-29, 0.0], np.float32)
    assert candidates(logits, SamplingParams(**OFF | {"top_p": 0.1}))[0].tolist() == [1]


def test_the_same_seed_draws_the_same():
    logits, params = normal(1000), SamplingParams()
    draws = [[sample(logits, params, History(1000), g)[0] for _ in range(50)] for g in (rng(1), rng(1), rng(2))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("temperature", [0, 1e-6, 9.9e-6])
def test_low_temperatures_are_greedy(temperature):
    logits = normal(100)
    generator = rng()
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1.0)
    assert {sample(logits, params, History(100), generator)[0] for _ in range(20)} == {int(logits.argmax())}
    assert generator.random() == rng().random()  # nothing was drawn


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e6, 1e300])
def test_extreme_temperatures_stay_finite(temperature):
    logits = normal(100, scale=1e4)
    ids, weights = candidates(logits, SamplingParams(**OFF | {"temperature": temperature}))
    assert np.isfinite(weights).all() and weights.sum() > 0 and len(ids) == 100


def test_masked_tokens_never_come():
    logits = np.full(50, -np.inf, np.float32)
    logits[[3, 7]] = -1e4, -1e4
    for options in (OFF, {}, OFF | {"top_k": 10}, OFF | {"top_p": 0.99}, {"repetition_penalty": 1e300}):
        params, history = SamplingParams(**options), History(50, [3, 7, 9])
        assert {sample(logits, params, history, rng(i))[0] for i in range(30)} <= {3, 7}
    everything = np.full(50, -np.inf, np.float32)
    assert sample(everything, SamplingParams(), History(50), rng())[0] == 0


# -- penalties


def test_repetition_divides_positive_and_multiplies_negative_logits():
    history = History(4, [0, 1])
    history.add(3)
    out = penalize(np.array([2, -2, 2, 0], np.float32), SamplingParams(repetition_penalty=2.0), history)
    assert out.tolist() == [1.0, -4.0, 2.0, 0.0]


def test_presence_and_frequency_look_at_the_answer_only():
    history = History(4, [0, 0, 0])
    for token in (1, 2, 2, 2):
        history.add(token)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalize(np.zeros(4, np.float32), params, history).tolist() == [0.0, -0.75, -1.25, 0.0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e30, 1.7e308])
def test_no_penalty_makes_the_draw_fail(penalty):
    logits = normal(20)
    params = SamplingParams(repetition_penalty=penalty, presence_penalty=2.0, frequency_penalty=-2.0)
    history = History(20, range(20))
    for token in range(20):
        history.add(token)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(penalize(logits, params, history)).all()
        assert 0 <= sample(logits, params, history, rng())[0] < 20


def test_the_logits_are_left_as_they_were():
    logits = normal(100)
    before = logits.copy()
    sample(logits, SamplingParams(repetition_penalty=1.3, logprobs=3), History(100, [1]), rng())
    assert np.array_equal(logits, before)


# -- log-probabilities


def test_logprobs_are_the_models_own():
    logits = normal(200)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=0.3, repetition_penalty=1.5, logprobs=5)
    token, entry = sample(logits, params, History(200, range(100)), rng())
    assert entry.token == token and entry.logprob == pytest.approx(expected[token])
    assert [t for t, _ in entry.top] == np.argsort(-expected)[:5].tolist()
    assert [p for _, p in entry.top] == pytest.approx(sorted(expected)[::-1][:5])
    assert sample(logits, SamplingParams(logprobs=0), History(200), rng())[1].top == ()
    assert sample(logits, SamplingParams(), History(200), rng())[1] is None


def test_logprobs_of_masked_and_few_tokens():
    entry = logprob(np.array([0, -np.inf, 0], np.float32), 1, 20)
    assert entry.logprob == -math.inf and [t for t, _ in entry.top] == [0, 2, 1]


# -- options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-1, -1e-9, math.nan, math.inf, 10**400, "0.7", True, [0.7], 1j)],
        *[("top_p", v) for v in (0, -0.0, 1.1, -0.1, math.nan, "1", False)],
        *[("top_k", v) for v in (-2, 1.5, 40.0, "40", True)],
        *[("min_p", v) for v in (-0.1, 1.5, math.nan, True)],
        *[("repetition_penalty", v) for v in (0, -1, math.inf, math.nan)],
        *[("presence_penalty", v) for v in (3, -2.1, math.nan)],
        *[("frequency_penalty", v) for v in (2.001, -math.inf)],
        *[("max_tokens", v) for v in (0, -1, 1.5, "5", True)],
        *[("seed", v) for v in (-2, 2**64, 10**4000, 1.0, "1", True)],
        *[("logprobs", v) for v in (-1, 21, 1.0, True)],
        *[("stop", v) for v in ("", [""], ["a", 1], 5, {"a": 1}, b"a", "x" * 1025, [str(i) for i in range(17)])],
        *[("ignore_eos", v) for v in (1, "yes")],
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    for make in (lambda: SamplingParams(**{name: value}), lambda: SamplingParams.resolve({name: value})):
        with pytest.raises(UsageError, match=rf"^{name}") as caught:
            make()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_k": np.int64(3)}, {"top_k": 3}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 2**40}, {"top_k": 2**40}),
        ({"max_tokens": 2**63}, {"max_tokens": 2**63}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": []}, {"stop": ()}),
        ({"stop": ["a", "b", "a"]}, {"stop": ("a", "b")}),
        ({"stop": ["a"] * 20}, {"stop": ("a",)}),
    ],
)
def test_good_values_become_plain_ones(given, kept):
    params = SamplingParams(**given)
    for name, value in kept.items():
        assert getattr(params, name) == value and type(getattr(params, name)) is type(value)


def test_top_k_larger_than_the_vocabulary_is_the_vocabulary():
    logits = normal(10)
    assert len(candidates(logits, SamplingParams(**OFF | {"top_k": 2**40}))[0]) == 10


def test_precedence():
    model = {"temperature": 0.6, "top_p": 0.8, "top_k": None, "do_sample": True, "bos_token_id": 1}
    params = SamplingParams.resolve({"top_p": 0.5, "temperature": None, "seed": None}, model)
    assert (params.top_p, params.temperature, params.top_k, params.min_p) == (0.5, 0.6, 40, 0.05)
    assert SamplingParams.resolve({}, None) == SamplingParams()
    assert SamplingParams.resolve({}, {"max_new_tokens": 99, "top_k": 0}).max_tokens == 99


def test_a_model_that_does_not_sample_is_greedy_by_default():
    model = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams.resolve({}, model).greedy
    assert SamplingParams.resolve({"temperature": 0.9}, model).temperature == 0.9
    assert not SamplingParams.resolve({}, {}).greedy


def test_unknown_options_and_bad_files_are_named():
    with pytest.raises(UsageError, match=r"unknown option 'temprature'; did you mean 'temperature'\?"):
        SamplingParams.resolve({"temprature": 1})
    with pytest.raises(ConfigError, match=r"generation_config.json, repetition_penalty.*'big'"):
        SamplingParams.resolve({}, {"repetition_penalty": "big"})
    assert SamplingParams.resolve({"repetition_penalty": 1.1}, {"repetition_penalty": "big"})


def test_a_large_vocabulary_is_fast():
    logits = normal(150_000)
    params = [SamplingParams(), SamplingParams(**OFF | {"top_p": 0.95}), SamplingParams(repetition_penalty=1.1)]
    for p in params:
        history, generator = History(150_000, range(0, 4000)), rng()
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            sample(logits, p, history, generator)
            times.append(time.perf_counter() - begun)
        assert min(times) < 0.03  # a few milliseconds; a whole sort takes more
