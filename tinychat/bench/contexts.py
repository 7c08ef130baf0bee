"""Decoding speed against context length, on a cache filled with random entries: no prompt of that length is run.

The contexts are measured in turns, round by round, with slices of the probe between them, so that a busy moment of the
machine falls on all of them alike. What a context adds to a token's time, and the keys and values it adds to its
traffic, give the speed of attention alone.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tinychat import memory
from tinychat.backends import DrawingRunner, Runner
from tinychat.bench.probe import BUFFER_BYTES, Probe, between
from tinychat.bench.subject import Subject
from tinychat.bench.traffic import Traffic
from tinychat.cache import KVCache, Rows
from tinychat.errors import UsageError
from tinychat.sampling import SamplingParams

CONTEXTS = (0, 2048, 8192, 32768)
GROUPED_ONLY = 32768  # from here on: without grouped queries the cache alone is larger than most machines
ROUNDS = 5
STRETCH_S, FEWEST, MOST = 0.1, 2, 32  # tokens of a context in one round: so long, at least and at most so many
PLACES = 1 << 16  # where entries may begin in the pool they are taken from


def chosen(subject: Subject, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """The contexts to measure, rising: those asked for, or those of `CONTEXTS` that the model and the memory allow
    (of a model too short for them, none and as long as it goes).

    UsageError where one that was asked for is beyond the model's limit. A shape has random weights, whose speed does
    not end there: it has no limit. BackendError where the memory would not hold the longest.
    """
    config, free = subject.config, subject.free
    limit = subject.limit if subject.options.shape is None else sys.maxsize
    if asked is not None:
        beyond = [context for context in asked if context + MOST > limit]
        if beyond:
            raise UsageError(
                f"a context of {beyond[0]} cannot be measured: the model has {limit} positions, and {MOST} are kept to "
                f"decode in; ask for at most {max(0, limit - MOST)} (--contexts)"
            )
        if asked:
            size = max(asked) + MOST
            needed = subject.memory(size)
            if free is not None:  # the probe has its buffer by then, made beside the model at a short context
                needed["probe"] = min(BUFFER_BYTES, max(0, free - subject.memory(0)["total"]) // 4)
                needed["total"] += needed["probe"]
            memory.check(needed, size, free, "--contexts")
        return tuple(sorted(set(asked)))
    grouped = config.n_kv_heads < config.n_heads
    candidates = CONTEXTS if CONTEXTS[1] + MOST <= limit else (0, limit - MOST)
    return tuple(
        context
        for context in candidates
        if 0 <= context <= limit - MOST
        and (grouped or context < GROUPED_ONLY)
        and (free is None or subject.memory(context + MOST)["total"] + BUFFER_BYTES <= free)
    )


def measure(
    subject: Subject,
    contexts: tuple[int, ...],
    threads: int | None,
    need: Traffic,
    probe: Probe | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """For each context its speed, its traffic, and both as fractions of the probe's speed.

    kv_bandwidth_fraction: keys and values beyond those of the shortest context, over the time they add; None for the
    shortest itself, and where the time they add is too little to be told from chance.
    """
    say("contexts: loading")
    with subject.load(contexts[-1] + MOST, threads) as llm:
        runner = llm.runner
        say("contexts: filling the cache")
        fill(runner.cache, contexts[-1])
        rounds = []
        for done in range(ROUNDS + 1):
            say(f"contexts: round {done} of {ROUNDS}")
            rounds.append([_one(runner, context, probe) for context in contexts])
    del llm, runner
    gc.collect()
    return [_figures(context, index, rounds[1:], contexts, need) for index, context in enumerate(contexts)]


def fill(cache: KVCache, length: int, seed: int = 2) -> None:
    """Make the first `length` positions of slot 0 hold random numbers, other ones in every layer and head."""
    shape = cache.keys[0, 0, :, :length].shape  # [n_kv_heads, length, head_dim]
    size = int(np.prod(shape))
    numbers = np.random.default_rng(seed).standard_normal(PLACES + 1, np.float32)
    scale = float(np.abs(numbers).max() / 127)
    pool = np.resize((numbers / scale if cache.dtype == np.int8 else numbers).astype(cache.dtype), size + PLACES)
    for layer in range(len(cache.keys)):
        for side, array in enumerate((cache.keys, cache.values)):
            place = (2 * layer + side) * 7919 % PLACES
            array[layer, 0, :, :length] = cache.given(pool[place : place + size].reshape(shape))
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales[:, 0, :, :length] = scale
    cache.lengths[0] = length


def _one(runner: Runner, context: int, probe: Probe | None) -> tuple[float, float]:
    """(seconds of a token at `context`, GB/s of the probe around it)."""
    before = probe.read() if probe else 0.0
    runner.cache.lengths[0] = context
    seconds: list[float] = []
    follow, token = _follow(runner), 0
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < STRETCH_S):
        began = time.perf_counter()
        if follow:
            token = max(0, follow(token))
        else:
            runner.step(Rows.of([len(seconds) % runner.config.vocab_size], context + len(seconds)))
        seconds.append(time.perf_counter() - began)
    after = probe.read() if probe else 0.0
    return statistics.median(seconds), between(before, after) if probe else 0.0


def _follow(runner: Runner) -> Callable[[int], int] | None:
    """Greedy drawing where the logits are, if the runner has it: on a GPU their way to the host would count."""
    if not isinstance(runner, DrawingRunner):
        return None
    return runner.drawing(0, SamplingParams(temperature=0.0), np.random.default_rng(0))


def _figures(
    context: int,
    index: int,
    rounds: list[list[tuple[float, float]]],
    contexts: tuple[int, ...],
    need: Traffic,
) -> dict[str, Any]:
    token_s = [turn[index][0] for turn in rounds]
    kv = need.kv(context + 1)
    more = kv - need.kv(contexts[0] + 1)
    total = need.token(context + 1)
    fractions = [total / s / 1e9 / speed for s, speed in (turn[index] for turn in rounds) if speed]
    added = statistics.median(turn[index][0] - turn[0][0] for turn in rounds)
    speeds = [between(turn[0][1], turn[index][1]) for turn in rounds if turn[index][1]]
    told = speeds and added > 0.02 * statistics.median(token_s)
    return {
        "context": context,
        "tokens_per_second": 1 / statistics.median(token_s),
        "spread": {"low": 1 / max(token_s), "high": 1 / min(token_s)},
        "bytes_per_token": round(total),
        "kv_bytes": round(kv),
        "bandwidth_fraction": statistics.median(fractions) if fractions else None,
        "kv_bandwidth_fraction": more / added / 1e9 / statistics.median(speeds) if told else None,
    }
