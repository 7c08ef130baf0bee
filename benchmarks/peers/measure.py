"""Rounds: in each, every engine decodes and prefills once, alone, while the others are stopped; the order rotates.

What changes on the machine from minute to minute changes a whole round, so engines are compared within rounds: a ratio
is the median over the rounds of the quotients. Decoding lies between two reads of memory, and is compared with them.
An engine that fails is out from there on, with that number of threads; what it did before counts, and the others go on.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import Contender, Models
from process import Worker, WorkerError, first_token

from tinychat.bench.probe import Probe, between
from tinychat.memory import available

PROMPT, PREFILL = 4, 512
HEAD_BITS = 8  # of a quantized checkpoint in tinychat, unless it is told otherwise
SLICES = 5  # of the probe, before a run and after it


@dataclass
class Run:
    """One engine with one number of threads; a list has an entry for each round, until one in which the engine failed.

    Speeds are tokens per second.

    fraction  of the read bandwidth that decoding reached: bytes_per_token over the time, over the probes around it
    others    cores that other programs kept busy meanwhile; one is enough to stall an engine that spins at barriers
    """

    contender: Contender
    threads: int
    about: dict[str, Any]
    decode: list[float] = field(default_factory=list)
    fraction: list[float] = field(default_factory=list)
    probe_gb_s: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0


@dataclass
class Start:
    """Starts of one engine: seconds from the command to the first token, and of them those before the worker's code.

    A list has an entry for each round, until one in which the engine failed.
    """

    contender: Contender
    threads: int
    about: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    interpreter: list[float] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """What to measure: see `--help`."""

    contenders: list[Contender]
    models: Models
    threads: list[int]
    rounds: int
    tokens: int
    seconds: float
    logs: Path


def speeds(plan: Plan) -> tuple[list[Run], dict[str, str]]:
    """A run for each engine and number of threads; and why engines are missing, or rounds of them, by name."""
    runs: list[Run] = []
    commands, missing = _commands(plan)
    for threads in plan.threads:
        probe = Probe(threads)
        with ExitStack() as stack:
            workers: list[tuple[Run, Worker]] = []
            for contender in (contender for contender in plan.contenders if contender.name in commands):
                try:
                    worker = stack.enter_context(
                        Worker(
                            commands[contender.name],
                            threads=threads,
                            context=PREFILL + PROMPT + plan.tokens,
                            log=plan.logs / f"{contender.name}.log",
                            variables=contender.variables(),
                        )
                    )
                except WorkerError as error:
                    _miss(missing, contender, error, f"--threads {threads}")
                    continue
                about = worker.about | {"without_amx": worker.limited}
                if contender.ours:
                    about["bytes_per_token"] = plan.models.bytes_per_token(
                        contender.model, contender.options.get("head", HEAD_BITS)
                    )
                workers.append((Run(contender, threads, about), worker))
            runs += [run for run, _ in workers]
            for number in range(plan.rounds):
                turn = number % max(1, len(workers))
                for run, worker in workers[turn:] + workers[:turn]:
                    try:
                        _measure(run, worker, probe, plan, number)
                    except WorkerError as error:
                        _miss(missing, run.contender, error, f"--threads {threads}, round {number + 1}")
                        workers.remove((run, worker))
    return [run for run in runs if run.decode], missing


def _commands(plan: Plan) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The worker's command of each engine, its environment and model made; and why engines are missing, by name."""
    commands: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    failed: dict[tuple[str | None, str], WorkerError] = {}  # what takes minutes to fail is not tried again
    for contender in plan.contenders:
        parts = contender.environment, contender.model
        try:
            if parts in failed:
                raise failed[parts]
            commands[contender.name] = contender.command(plan.models)
        except WorkerError as error:
            failed[parts] = error
            _miss(missing, contender, error)
    return commands, missing


def _miss(missing: dict[str, str], contender: Contender, error: WorkerError, when: str = "") -> None:
    """Note why an engine is missing, and say it at once."""
    why = f"{when}: {error}" if when else str(error)
    missing[contender.name] = "; ".join(filter(None, (missing.get(contender.name), why)))
    _say(f"{contender.name} failed: {why}")


def _measure(run: Run, worker: Worker, probe: Probe, plan: Plan, number: int) -> None:
    numbers = random.Random(number)  # the same prompts for all, others in each round: nothing cached helps

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(3, 30000) for _ in range(length)]

    began, busy, own = time.perf_counter(), _busy_seconds(), worker.cpu_seconds()
    before = statistics.median(probe.read() for _ in range(SLICES))
    probed = time.perf_counter() - began
    decode = {"do": "decode", "prompt": prompt(PROMPT), "tokens": plan.tokens, "seconds": plan.seconds}
    latency = statistics.median(worker.ask(decode)["latencies"])
    read = between(before, statistics.median(probe.read() for _ in range(SLICES)))
    prefill = worker.ask({"do": "prefill", "prompt": prompt(PREFILL)})["seconds"]
    others = _busy_seconds() - busy - (worker.cpu_seconds() - own) - 2 * probed * run.threads
    seconds = time.perf_counter() - began
    run.peak_rss_bytes = worker.ask({"do": "memory"})["peak_rss_bytes"]
    # All answers are there: a round is in every list or in none.
    run.decode.append(1 / latency)
    run.probe_gb_s.append(read)
    run.fraction.append(run.about["bytes_per_token"] / latency / 1e9 / read)
    run.prefill.append(PREFILL / prefill)
    run.others.append(max(0.0, others / seconds))
    _say(
        f"{run.threads} threads, round {number + 1}: {run.contender.name:<16} {run.decode[-1]:7.2f} tokens/s, "
        f"{run.fraction[-1]:.2f} of {read:.1f} GB/s; prefill {run.prefill[-1]:7.1f}"
    )


def _busy_seconds() -> float:
    """CPU time that all programs have used since the machine's start, and what a hypervisor took from it."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for input, output


def starts(plan: Plan) -> tuple[list[Start], dict[str, str]]:
    """Starts of each engine with the files in the page cache and free memory at hand, interleaved; and why engines, or
    starts, are missing."""
    commands, missing = _commands(plan)
    found = [Start(contender, plan.threads[-1]) for contender in plan.contenders if contender.name in commands]
    files = [_read_once(plan.models.find(start.contender.model)[0]) for start in found]
    size = min(2 * max(files, default=0), (available() or 0) - sum(files))  # the files stay in the page cache
    for number in range(plan.rounds):
        for start in [start for start in found if start.contender.name not in missing]:
            name = start.contender.name
            _fetch_memory(size)
            try:
                answer = first_token(
                    commands[name],
                    threads=start.threads,
                    context=PREFILL,
                    log=plan.logs / f"{name}.log",
                    variables=start.contender.variables(),
                )
            except WorkerError as error:
                _miss(missing, start.contender, error, f"in round {number + 1}")
                continue
            start.about = answer
            start.seconds.append(answer["seconds"])
            start.interpreter.append(answer["interpreter_s"])
            start.peak_rss_bytes.append(answer["peak_rss_bytes"])
            _say(f"start {number + 1}: {name:<16} {answer['seconds']:6.2f} s")
    return [start for start in found if start.seconds], missing


def _read_once(path: Path) -> int:
    """Bring the files of a model into the page cache; their bytes."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return sum(file.stat().st_size for file in files)


def _fetch_memory(size: int) -> None:
    """Have the system hold as much free memory as a start may take.

    A virtual machine gives memory that is free for seconds back to its host, and to fetch it again takes longer than to
    load a model; whom that meets depends on the sizes of pages that the program before used.
    """
    with mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with suppress(AttributeError, OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
