"""Choosing the next token: options, their precedence, and the draw itself. Knows logits, not models or text.

The order of operations is that of llama.cpp and transformers: penalties, temperature, top_k, top_p, min_p; each filter
sees what the one before it left, renormalized.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tinychat.errors import ConfigError, UsageError
from tinychat.results import TokenLogprob

GREEDY_BELOW = 1e-5  # temperatures below this are greedy: dividing by them would overflow before it changed the draw
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_LOGPROBS = 20
_BLOCK = 256
FP32_MAX = float(np.finfo(np.float32).max)

# name: (lowest, highest, is the lowest itself refused)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, math.inf, True),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
}
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "max_tokens": (1, None),
    "top_k": (-1, None),
    "seed": (-1, 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
_FROM_MODEL = {  # our name: its name in generation_config.json
    "max_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
}


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn and where it ends. A value out of range or of another type is a UsageError that names it.

    max_tokens          at most this many new tokens; more than the context has room for is clipped to it
    temperature         divides the logits; below 1e-5: greedy, no draw
    top_k               keep the k likeliest tokens; 0 or -1: off; ties go to the lower id
    top_p               keep the fewest likeliest tokens that together reach this probability; 1: off
    min_p               keep tokens at least this fraction as likely as the likeliest; 0: off
    repetition_penalty  divides positive and multiplies negative logits of tokens seen in prompt or answer
                        (CTRL, arXiv 1909.05858, section 4.1); 1: off
    presence_penalty    subtracted once from the logit of each token of the answer so far
    frequency_penalty   subtracted as often as the token occurs in the answer so far
    seed                None or -1: a fresh one each time
    stop                the answer ends before the first of these strings; at most 16
    logprobs            None: none; n: log-probability of the chosen token and of the n likeliest, n <= 20, under the
                        model's own distribution (temperature 1, no penalties or filters)
    ignore_eos          go on past end-of-sequence tokens, for measurements
    """

    max_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name)))

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken, nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Some penalty is on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def needs_logits(self) -> bool:
        """A token cannot be drawn where the logits are: penalties and log-probabilities want them here."""
        return self.penalized or self.logprobs is not None

    @staticmethod
    def resolve(request: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> SamplingParams:
        """The request's values, else the model's (`generation_config.json`), else the defaults; None means absent.

        `do_sample: false` in the model's file makes greedy its default temperature. Raises UsageError for a bad or
        unknown option, ConfigError for a bad value in the model's file that the request does not override.
        """
        names = [f.name for f in fields(SamplingParams)]
        for name in request:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UsageError(f"unknown option {name!r}; {hint}there are: {', '.join(names)}")
        values = {name: value for name, value in request.items() if value is not None}
        model = dict(generation_config or {})
        if model.get("do_sample") is False:
            model["temperature"] = 0.0
        for name, key in _FROM_MODEL.items():
            if name not in values and model.get(key) is not None:
                try:
                    values[name] = _checked(name, model[key])
                except UsageError as error:
                    raise ConfigError(
                        f"generation_config.json, {key}: {error}; correct the file or give {name} yourself"
                    ) from None
        return SamplingParams(**values)


def _checked(name: str, value: Any) -> Any:
    """`value` as the plain Python type of field `name`; UsageError where it is none such or out of range."""
    if name == "stop":
        return _stops(value)
    if name == "ignore_eos":
        if not isinstance(value, bool):
            raise UsageError(f"ignore_eos is {value!r}; it must be True or False")
        return value
    if name in _INTEGERS:
        if value is None and name in ("seed", "logprobs"):
            return None
        low, high = _INTEGERS[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UsageError(f"{name} is {value!r}; it must be an integer")
        number = int(value)
        if number < low or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"{name} is {_short(number)}; it must be {bounds}")
        if name == "seed" and number == -1:
            return None
        return max(number, 0) if name == "top_k" else number
    lowest, highest, open_below = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} is {value!r}; it must be a number")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    inside = math.isfinite(real) and (lowest < real if open_below else lowest <= real) and real <= highest
    if not inside:
        above = f"above {lowest:g}" if open_below else f"at least {lowest:g}"
        bounds = f"{above} and at most {highest:g}" if math.isfinite(highest) else f"{above} and finite"
        raise UsageError(f"{name} is {_short(value)}; it must be {bounds}")
    return real


def _short(value: object) -> str:
    """`value` for a message; integers may have more digits than Python agrees to print."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"stop is {value!r:.80}; it must be a string or a list of strings")
    if any(not stop or len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise UsageError(f"stop has a string that is empty or longer than {MAX_STOP_LENGTH} characters")
    unique = tuple(dict.fromkeys(stops))
    if len(unique) > MAX_STOPS:
        raise UsageError(f"stop has {len(unique)} strings; at most {MAX_STOPS} are supported")
    return unique


class History:
    """The tokens that penalties look at: which occurred at all, and how often in the answer."""

    def __init__(self, vocab_size: int, prompt: Sequence[int] = ()):
        self.seen = np.zeros(vocab_size, bool)
        self.counts = np.zeros(vocab_size, np.int32)  # of the answer only
        self.seen[list(prompt)] = True

    def add(self, token: int) -> None:
        """Note a generated token."""
        self.seen[token] = True
        self.counts[token] += 1


def sample(
    logits: np.ndarray, params: SamplingParams, history: History, rng: np.random.Generator
) -> tuple[int, TokenLogprob | None]:
    """The next token, and its log-probability where `params.logprobs` asks for it.

    logits fp32 [vocab]: finite, or -inf for a token that must not come. Where all are, the result is the first.
    Greedy ties go to the lower id. `rng` is advanced by one draw exactly where the choice is random.
    """
    adjusted = penalize(logits, params, history) if params.penalized else logits
    if params.greedy or adjusted.max() == -np.inf:
        token = int(adjusted.argmax())
    else:
        ids, weights = candidates(adjusted, params)
        token = int(ids[_place(weights, rng.random())])
    return token, None if params.logprobs is None else logprob(logits, token, params.logprobs)


def penalize(logits: np.ndarray, params: SamplingParams, history: History) -> np.ndarray:
    """A copy of `logits` with the penalties applied. What was finite stays so, whatever the size of the penalty."""
    out = logits.copy()
    ids = np.flatnonzero(history.seen)
    ids = ids[logits[ids] > -np.inf]
    values = logits[ids].astype(np.float64)
    penalty = params.repetition_penalty
    with np.errstate(over="ignore"):
        values = np.where(values > 0, values / penalty, values * penalty)
    counts = history.counts[ids]
    values -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    limit = np.finfo(np.float32).max
    out[ids] = np.clip(values, -limit, limit)
    return out


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights): the tokens that pass top_k, top_p and min_p, and their unnormalized probabilities in fp32.

    fp32 is exact to about 1e-5 of a weight, and takes a tenth of fp64's time, which with a vocabulary of 150,000 tokens
    would be a good part of a small model's step. Sums of weights are taken in fp64.
    """
    ids = _largest(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    chosen = logits if ids is None else logits[ids]
    with np.errstate(over="ignore"):  # a difference beyond fp32 is of a weight of 0
        weights = chosen - logits.max()
        weights /= np.float32(min(params.temperature, FP32_MAX))
    np.exp(weights, out=weights)
    least = params.min_p * float(weights.max())
    if params.top_p < 1.0:
        kept = _nucleus(chosen, weights, params.top_p, least)
    elif least > 0.0:
        kept = np.flatnonzero(weights >= least)
    else:
        return np.arange(len(logits)) if ids is None else ids, weights
    return kept if ids is None else ids[kept], weights[kept]


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values, descending, ties to the lower index."""
    n = len(values)
    # a threshold and a scan, because which of several equal values a partition keeps is its own business
    pool = np.flatnonzero(values >= np.partition(values, n - k)[n - k]) if k < n else np.arange(n)
    return pool[np.argsort(-values[pool], kind="stable")[:k]]


def _nucleus(logits: np.ndarray, weights: np.ndarray, top_p: float, least: float) -> np.ndarray:
    """Indices of the fewest tokens, from the largest logit down, whose weights sum to top_p; none below `least`."""
    total = weights.sum(dtype=np.float64)
    # Tokens below the mean of what may be left out have less than that together: none of them is of the nucleus.
    pool = np.flatnonzero(weights >= max(least, (1 - top_p) * total / len(weights)))
    if weights[pool].sum(dtype=np.float64) < top_p * total:
        return pool
    size = 256  # mostly enough; to sort the pool may take many times longer
    while True:
        order = pool[_largest(logits[pool], size)]  # weights of unlike logits may have become equal
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        if cumulative[-1] >= top_p * total or size >= len(pool):
            return order[: np.searchsorted(cumulative, top_p * total) + 1]
        size *= 8


def _place(weights: np.ndarray, part: float) -> int:
    """Where the running sum of `weights` first exceeds `part` (below 1) of the whole: never at a weight of 0.

    By blocks, because a running sum of 150,000 takes longer than all else of a draw.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    goal = part * sums[-1]
    block = _first_above(sums, goal)
    within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_above(within, goal - (sums[block - 1] if block else 0.0))


def _first_above(sums: np.ndarray, goal: float) -> int:
    """Index of the first of ascending sums above `goal`; where rounding leaves none, of the first largest."""
    return int(min(np.searchsorted(sums, goal, side="right"), np.searchsorted(sums, sums[-1])))


def logprob(logits: np.ndarray, token: int, n_top: int) -> TokenLogprob:
    """log softmax of `logits` at `token` and at the `n_top` likeliest tokens."""
    shifted = logits.astype(np.float64) - logits.max()
    log_total = np.log(np.exp(shifted).sum())
    top = _largest(logits, min(n_top, len(logits))) if n_top else np.empty(0, np.int64)
    return TokenLogprob(
        token,
        float(shifted[token] - log_total),
        tuple((int(i), float(shifted[i] - log_total)) for i in top),
    )
