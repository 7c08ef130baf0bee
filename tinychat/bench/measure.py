"""One run: a model loaded with one number of threads, its speeds, what it reads, and the memory it took."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from tinychat import backends, cpuinfo, memory
from tinychat.backends import DrawingRunner, Runner, cpu
from tinychat.backends.cpu_linear import extension
from tinychat.bench import contexts, traffic
from tinychat.bench.probe import Probe, between, judge
from tinychat.bench.subject import Options, Subject
from tinychat.cache import Rows
from tinychat.engine import PREFILL_CHUNK, Engine
from tinychat.errors import BackendError, UsageError
from tinychat.results import Piece, Timings

DECODE_PROMPT, DECODE_TOKENS = 4, 200  # the AWQ paper's protocol
LONG, SHORT, GENERATED = 512, 64, 128  # llama-bench's pp512, pp64 and tg128
PROFILED = 8  # tokens at a time
STRETCH_S = 0.1  # of decoding between two slices of the probe; the first token after one is slower, the median is not

Say = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """A figure of several repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Lengths:
    """In tokens: what is run, shortened to what the model holds, and the context that takes it."""

    long: int
    short: int
    generated: int
    tokens: int
    ctx_size: int

    @classmethod
    def of(cls, limit: int, tokens: int | None, ctx_size: int | None) -> Lengths:
        """UsageError where `tokens` to generate or the context asked for cannot be."""
        if ctx_size is not None and ctx_size > limit:
            raise UsageError(f"a context of {ctx_size} was asked for; the model has {limit} positions")
        room = ctx_size or limit
        if room < DECODE_PROMPT + 2:
            raise UsageError(f"a context of {room} is too short to measure anything in; give at least 6")
        if tokens == 1:
            raise UsageError("one token comes with the prompt's last row: give --tokens 2 or more to see any decoded")
        if tokens is not None and DECODE_PROMPT + tokens > room:
            raise UsageError(
                f"{tokens} tokens after a prompt of {DECODE_PROMPT} need a context of {DECODE_PROMPT + tokens}; "
                f"{'--ctx-size is' if ctx_size else 'the model has'} {room}"
            )
        tokens = tokens or min(DECODE_TOKENS, room - DECODE_PROMPT)
        long, short, generated = (min(n, room - 1) for n in (LONG, SHORT, GENERATED))
        return cls(long, short, generated, tokens, ctx_size or max(long + 1, generated + 1, DECODE_PROMPT + tokens))


class Stopwatch:
    """A `Runner` that tells how long its last step took."""

    def __init__(self, runner: Runner):
        self.config, self.cache, self.weight_bytes = runner.config, runner.cache, runner.weight_bytes
        self.fetch: dict[str, str] | None = getattr(runner, "fetch", None)
        self._runner = runner
        self.seconds = 0.0
        if isinstance(runner, DrawingRunner):
            self.drawing, self.draws_ahead = self._drawing, runner.draws_ahead
            self.prefill_chunk = getattr(runner, "prefill_chunk", PREFILL_CHUNK)

    def step(self, rows: Rows) -> np.ndarray:
        """See `Runner`."""
        return self._timed(self._runner.step, rows)

    def _drawing(self, *request: Any) -> Callable[[int], int] | None:
        """See `DrawingRunner`."""
        assert isinstance(self._runner, DrawingRunner)
        follow = self._runner.drawing(*request)
        return follow and (lambda token: self._timed(follow, token))

    def _timed(self, work: Callable[[Any], Any], *given: Any) -> Any:
        began = time.perf_counter()
        found = work(*given)
        self.seconds = time.perf_counter() - began
        return found


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens between two slices of the probe."""

    seconds: float
    bytes_read: float
    before: float  # GB/s
    after: float

    @property
    def fraction(self) -> float:
        """Speed of reading what the tokens needed, of the probe's."""
        return self.bytes_read / self.seconds / 1e9 / between(self.before, self.after)


class Session:
    """An engine under measurement: greedy, ignoring the end of the text, no prompt beginning like another."""

    def __init__(self, llm: Engine):
        self._runner = llm.runner
        self.watch = Stopwatch(llm.runner)
        self.engine = Engine(self.watch, llm.tokenizer)
        self._vocab = llm.config.vocab_size
        self._rng = np.random.default_rng(1)
        self._prompts = 0

    def prompt(self, n: int) -> list[int]:
        """`n` random tokens, the first another than before: nothing of it is in the cache."""
        self._prompts += 1
        return [self._prompts % self._vocab, *self._rng.integers(0, self._vocab, n - 1).tolist()]

    def timings(self, prompt: int, generated: int) -> Timings:
        """Of `generated` tokens after a prompt of so many."""
        options: dict[str, Any] = {"max_tokens": generated, "temperature": 0.0, "ignore_eos": True}
        return self.engine.generate(self.prompt(prompt), **options).timings

    def kernel_fraction(self, tokens: int) -> float | None:
        """Of the time of `tokens`, how much threads spend inside kernels; None where the runner does not tell.

        Tokens whose steps are profiled, which takes a microsecond or two of each, in turns with others that are timed.
        """
        runner: Any = self._runner
        if not hasattr(runner, "profile"):
            return None
        # Without the stopwatch. The last of the session: `self.engine` does not hear of what is in the cache now.
        stream = self._started(tokens, Engine(runner, self.engine.tokenizer))
        inside, whole = [], []  # seconds a token, of each turn
        length = max(min(PROFILED, (tokens - 1) // 2), 1)
        for _ in range(max((tokens - 1) // (2 * length), 1)):
            runner.profile(True)
            profiled_s = _per_token(stream, length)
            runner.profile(False)
            inside.append(runner.profiled().kernel_s)
            whole.append(_per_token(stream, length) or profiled_s)  # of two tokens one is decoded
        return min(statistics.median(inside) / statistics.median(whole), 1.0)

    def _started(self, tokens: int, engine: Engine) -> Generator[Piece, None, None]:
        """The stream of `tokens` after a prompt of 4, of which the first, that comes with the prompt, is taken."""
        stream = engine.stream(self.prompt(DECODE_PROMPT), max_tokens=tokens, temperature=0.0, ignore_eos=True)
        next(stream)
        return stream

    def decode(self, tokens: int, read: Callable[[float], float], probe: Probe | None) -> Decoded:
        """`tokens` after a prompt of 4, the probe read between them. read(n): bytes that a text's n-th token reads."""
        found = Decoded([], [], [])
        stream = self._started(tokens, self.engine)
        before = probe.read() if probe else 0.0
        seconds, bytes_read = 0.0, 0.0
        early = getattr(self.watch, "draws_ahead", False)  # a step then runs before the probe
        fresh = True
        for index in range(tokens - 1):
            began = time.perf_counter()
            next(stream)
            latency = time.perf_counter() - began
            found.latencies.append(latency)
            found.steps.append(self.watch.seconds)
            if not (early and fresh):
                seconds += latency
                bytes_read += read(DECODE_PROMPT + index + 1)
            fresh = False
            if probe and seconds and (seconds >= STRETCH_S or index == tokens - 2):
                after = probe.read()
                found.stretches.append(Stretch(seconds, bytes_read, before, after))
                before, seconds, bytes_read, fresh = after, 0.0, 0.0, True
        return found


def _per_token(stream: Generator[Piece, None, None], length: int) -> float:
    """Seconds that each of the next `length` tokens takes; 0 where none comes."""
    began = time.perf_counter()
    n = sum(1 for _ in islice(stream, length))
    return (time.perf_counter() - began) / n if n else 0.0


@dataclass(frozen=True)
class Decoded:
    """What a run of tokens took: of each its latency, and the model's step within; seconds."""

    latencies: list[float]
    steps: list[float]
    stretches: list[Stretch]


def measure(subject: Subject, threads: int | None, say: Say = lambda text: None) -> dict[str, Any]:
    """All figures of one run under the names that `--json` prints."""
    o = subject.options
    lengths = Lengths.of(subject.limit, o.tokens, o.ctx_size)
    asked = contexts.chosen(subject, o.contexts)

    began = time.perf_counter()
    llm = subject.load(lengths.ctx_size, threads, lambda done, total: say(f"loading: {100 * done // total} %"))
    load_s = time.perf_counter() - began
    kv_dtype = llm.runner.cache.kv_dtype  # a backend may keep less than was asked for
    need = traffic.of(subject.source, head_bits=subject.head, kv_dtype=kv_dtype)
    session = Session(llm)
    resident = session.watch.weight_bytes
    say("warming up")
    session.timings(DECODE_PROMPT, 2)
    long, short, generated, first = [], [], [], []
    for repeat in range(o.repeats):
        say(f"prefill and tokens, {repeat + 1} of {o.repeats}")
        first.append(session.timings(DECODE_PROMPT, 1).first_token_s or 0.0)
        long.append(session.timings(lengths.long, 1))
        short.append(session.timings(lengths.short, 1))
        generated.append(session.timings(1, lengths.generated + 1))
    # Before the probe has its buffer: the peak is that of loading and running.
    peak = memory.peak_rss()
    peak_device = subject.backend.peak_bytes() if subject.on_gpu else None
    probe = _probe(subject, threads)
    runs = []
    for repeat in range(o.repeats):
        say(f"decoding beside the probe, {repeat + 1} of {o.repeats}")
        runs.append(session.decode(lengths.tokens, need.token, probe))
    latencies = [latency for run in runs for latency in run.latencies]
    steps = [step for run in runs for step in run.steps]
    fractions = [stretch.fraction for run in runs for stretch in run.stretches]
    bytes_per_token = statistics.fmean(need.token(DECODE_PROMPT + 1 + i) for i in range(lengths.tokens - 1))
    token_s = statistics.median(latencies)
    cache = copy_probe().last_level_cache() if subject.on_gpu else cpuinfo.last_level_cache()
    in_cache = cache is not None and bytes_per_token < 2 * cache
    fraction = statistics.median(fractions) if fractions else None
    say("inside kernels")
    kernels = session.kernel_fraction(lengths.tokens)
    result = {
        "decode_tokens_per_second": 1 / token_s,
        "decode_spread": asdict(Spread.of([1 / statistics.median(run.latencies) for run in runs])),
        "decode_prompt": DECODE_PROMPT,
        "decode_tokens": lengths.tokens,
        "prefill_tokens_per_second": statistics.median(rates(long)),
        f"pp{lengths.long}": asdict(Spread.of(rates(long))),
        f"pp{lengths.short}": asdict(Spread.of(rates(short))),
        f"tg{lengths.generated}": asdict(Spread.of([t.decode_tokens_per_s or 0.0 for t in generated])),
        "time_to_first_token_s": statistics.median(first),
        f"time_to_first_token_{lengths.long}_s": statistics.median(t.first_token_s or 0.0 for t in long),
        "bytes_per_token": round(bytes_per_token),
        "decode_gb_s": bytes_per_token / token_s / 1e9,
        "bandwidth_fraction": fraction,
        "bandwidth_fraction_spread": asdict(Spread.of(fractions)) if fractions else None,
        "fits_cache": in_cache,
        "cache_bytes": cache,
        "overhead_fraction": statistics.median(a - b for a, b in zip(latencies, steps, strict=True)) / token_s,
        "outside_kernels_fraction": None if kernels is None else 1 - kernels,
        "kv_dtype": kv_dtype,
        "fetch": session.watch.fetch,
        "load_s": load_s,
        "peak_rss_bytes": peak,
        "peak_device_bytes": peak_device,
        "resident_bytes": resident,
        "embedding_bytes": round(need.table),
        "resident_bits_per_weight": _resident_bits(subject, need, resident),
        "ctx_size": lengths.ctx_size,
        "repeats": o.repeats,
    }
    llm.close()
    del llm, session, runs
    gc.collect()  # two models at once may be more than the machine holds
    if asked:
        result["contexts"] = contexts.measure(subject, asked, threads, need, probe, say)
    return {**_what(subject, threads), **result, **_verdict(probe, fraction, in_cache, o)}


def rates(timings: list[Timings]) -> list[float]:
    """Prompt tokens per second."""
    return [t.prefill_tokens_per_s or 0.0 for t in timings]


def _what(subject: Subject, threads: int | None) -> dict[str, Any]:
    """What was measured, on what."""
    name = backends.name_of(subject.backend)
    return {
        **subject.facts(),
        "machine": subject.backend.describe() if subject.on_gpu else cpuinfo.processor(),
        "date": time.strftime("%Y-%m-%d"),
        "backend": name,
        "isa": extension().isa() if name == "cpu" else None,
        "threads": None if subject.on_gpu else cpu.thread_count(threads),
        "activations": subject.activations,
        "head": subject.head,
    }


def copy_probe() -> Any:
    """The module of the GPU's probe, which needs torch."""
    return importlib.import_module("tinychat.bench.copy_probe")


def _probe(subject: Subject, threads: int | None) -> Any:
    """A `Probe`, or a GPU's; None where the kernels are not built: nothing here could read as fast as the machine."""
    if subject.on_gpu:
        return copy_probe().CopyProbe()
    try:
        return Probe(cpu.thread_count(threads))
    except BackendError:
        return None


def _verdict(probe: Probe | None, fraction: float | None, in_cache: bool, options: Options) -> dict[str, Any]:
    if probe is None:
        nothing = {"probe_gb_s": None, "probe_valid": False}
        return {**nothing, "probe_reasons": ["there is none: the compiled kernels are missing"]}
    probe.complete()
    share = getattr(probe, "core_share", 1.0)  # a GPU's probe needs no core
    sizes = (probe.buffer_bytes, cpuinfo.last_level_cache()) if isinstance(probe, Probe) else ()
    verdict = judge(probe.samples, probe.bytes_read, None if in_cache else fraction, options.min_probe, share, *sizes)
    return {
        "probe_gb_s": verdict.gb_s,
        "probe_quartiles": list(verdict.quartiles),
        "probe_unsteadiness": verdict.unsteadiness,
        "probe_bytes": verdict.bytes_read,
        "probe_valid": verdict.valid,
        "probe_reasons": verdict.reasons,
    }


def _resident_bits(subject: Subject, need: traffic.Traffic, resident: int) -> float | None:
    """Of a quantized weight; all padding, that of other parts too, is counted here."""
    n = round(need.quantized and subject.source.n_quantized)
    others = need.body - need.quantized + need.head
    return (resident - others) * 8 / n if n else None
