"""The worker's side: one peer with its model in memory, answering requests for timings.

Runs in the environment of whichever peer it serves, so it needs nothing but Python's own library. A request is a line
of JSON on standard input, its answer a line of JSON on what was standard output; whatever libraries print goes to
standard error. All peers are timed by this code: they differ only in `generate`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    """An engine with a model loaded, on a number of threads that does not change.

    about  what it is: version, setting, and but for tinychat, where the parent counts them, bytes_per_token: read for
           one token, all weights but the embedding table
    """

    about: dict[str, Any]

    def generate(self, prompt: list[int], seen: Callable[[], bool]) -> None:
        """Generate greedily after `prompt`; call `seen` as soon as a token is known, and end where it says False."""
        ...


def run(load: Callable[[argparse.Namespace], Peer]) -> None:
    """Load the peer and answer until standard input ends. `--first-token` measures the start instead."""
    started = time.clock_gettime(time.CLOCK_BOOTTIME) - _boot_seconds_of_start()
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--first-token", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    peer = load(args)
    hello = {**peer.about, "interpreter_s": started, "load_s": time.perf_counter() - began, "pid": os.getpid()}
    if args.first_token:
        peer.generate([1, 2, 3, 4], lambda: False)
        hello["first_token_s"] = time.perf_counter() - began
    _answer(answers, hello)
    if args.first_token:  # a cache that nobody has written to takes no memory, so the whole context is
        peer.generate([1 + i % 99 for i in range(args.context - 1)], lambda: False)
        _answer(answers, _memory())
    for line in [] if args.first_token else sys.stdin:
        request = json.loads(line)
        _answer(answers, REQUESTS[request.pop("do")](peer, **request))


def _decode(peer: Peer, prompt: list[int], tokens: int, seconds: float) -> dict[str, Any]:
    """Latencies of `tokens` tokens after the first, or of as many as fit into `seconds`."""
    times: list[float] = []

    def seen() -> bool:
        times.append(time.perf_counter())
        return len(times) <= tokens and times[-1] - times[0] < seconds

    peer.generate(prompt, seen)
    return {"latencies": [after - before for before, after in itertools.pairwise(times)]}


def _prefill(peer: Peer, prompt: list[int]) -> dict[str, Any]:
    """Seconds from the prompt to the first token."""
    times: list[float] = []

    def seen() -> bool:
        times.append(time.perf_counter())
        return False

    began = time.perf_counter()
    peer.generate(prompt, seen)
    return {"seconds": times[0] - began}


def _memory_of(_: Peer) -> dict[str, Any]:
    return _memory()


REQUESTS = {"decode": _decode, "prefill": _prefill, "memory": _memory_of}


def _memory() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024}


def _boot_seconds_of_start() -> float:
    """When this process began, on the clock that counts from the machine's start."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _answer(to: Any, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=to, flush=True)
