"""The engine: tokens in, tokens out. Prefill in chunks, decode, sample, stop.

The command line, the chat and the Python interface stand on it. It knows one model on one backend and serves one
request at a time; it knows no terminal and no file format.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tinychat import memory
from tinychat.backends import FASTEST, DrawingRunner, Runner
from tinychat.cache import KV_DTYPES, Rows
from tinychat.config import ModelConfig, RopeScaling
from tinychat.errors import BackendError, ContextOverflowError, TokenizerError, UsageError
from tinychat.prompt import Prompt, encode, is_chat, token_ids
from tinychat.results import Piece, Result, Timings, TokenLogprob, Usage
from tinychat.sampling import History, SamplingParams, sample
from tinychat.text_stream import TextStream

DEFAULT_CTX_SIZE = 4096  # at most: the KV cache is allocated whole, and few conversations are longer
PREFILL_CHUNK = 128  # rows: enough to keep the arithmetic busy, few enough that a cancelled prompt ends soon
LOGITS_CHUNK = 512  # rows, where logits of all are wanted: of a large vocabulary they take more than the model's part
PRIMING = 8  # prompt tokens that the decoder sees first, so that an answer continuing a text keeps its leading space

Cancel = Callable[[], bool] | threading.Event


def load(
    model: str | Path = "pebble",
    *,
    device: str = "auto",
    ctx_size: int | None = None,
    threads: int | None = None,
    kv_dtype: str = "fp16",
    activations: int = 16,
    head: int | None = None,
    n_slots: int = 1,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Engine:
    """The engine of `model`: a directory, a GGUF file, a hub id, or "pebble", the model that ships with tinychat.

    device         "auto", or a backend's name
    ctx_size       positions of the KV cache; by default the model's own maximum, at most 4096
    threads        by default the backend's choice
    kv_dtype       of the KV cache: fp16, fp32 or int8
    activations    bits that activations keep where they meet quantized weights: 16, or 8 (faster with many rows)
    head           bits of the output head: 8, or 16 for as it is stored; by default 8 where the checkpoint is quantized
    n_slots        KV caches: as many conversations keep their prefix, each at a whole context's memory
    revision       of a hub id; `offline`: look for it in the local cache only
    ignore_config  keys of config.json to pass over although they are not known
    progress       called as progress(done, total) while weights are packed

    Raises a TinychatError: UsageError, CheckpointError, ConfigError, TokenizerError or BackendError, the last also
    where the memory would not do (TINYCHAT_NO_MEMORY_CHECK=1 skips that check). On a backend slower than the best,
    taken because that one cannot run, a RuntimeWarning says why, once in a process; another, where nothing is quantized
    that activations of 8 bits could meet.
    """
    from tinychat import backends, checkpoint

    for name, value in (("ctx_size", ctx_size), ("threads", threads), ("n_slots", n_slots)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}; it must be a positive integer")
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype is {kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")
    if activations not in (8, 16) or head not in (None, 8, 16):
        name, value = ("head", head) if activations in (8, 16) else ("activations", activations)
        raise UsageError(f"{name} is {value!r}; it must be 8 or 16")
    module, why = backends.choose(device)
    path = Path(checkpoint.locate(str(model), revision=revision, offline=offline))
    source = checkpoint.open(path, ignore_config=ignore_config)
    config = source.config
    size = context_size(config, ctx_size)
    head = head_bits(head, source.n_quantized)
    needed = memory.needed(source, module.FOOTPRINT, size, head=head, kv_dtype=kv_dtype, n_slots=n_slots)
    memory.check(needed, size, backends.free_bytes(module))
    words = source.tokenizer()
    runner = module.build(
        source,
        n_slots=n_slots,
        ctx_size=size,
        threads=threads,
        kv_dtype=kv_dtype,
        activations=activations,
        head=head,
        progress=progress,
    )
    if device == "auto" and why != FASTEST:
        backend = backends.name_of(module)
        _warn_once(f"the {'slow ' if backend == 'reference' else ''}{backend} backend runs the model: {why}")
    used = activation_bits(activations, source.n_quantized, head)
    if used != activations:
        _warn_once("8-bit activations meet quantized weights only and this model has none: they change nothing here")
    name = path.resolve().name if Path(model).exists() else Path(model).name
    n = source.n_parameters
    weights = f"{n / 1e9:.2f}B parameters" if n >= 1e9 else f"{n / 1e6:.1f}M parameters"
    return Engine(
        runner,
        words,
        description=f"{name}: {config.model_type}, {weights}, {precision(source)}"
        f"{_unusual(source, head, used, module.FOOTPRINT)} · {module.describe(threads)} · context {size}",
        generation_config=source.generation_config,
        eos_ids=_eos_ids(source.generation_config, source.hf_config, words),
    )


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def max_context_size(config: ModelConfig) -> int:
    """Positions that the model can use; under dynamic, yarn and llama3 rope scaling the stretched number."""
    rope = config.rope
    stretched = rope.scaling in (RopeScaling.DYNAMIC, RopeScaling.YARN, RopeScaling.LLAMA3)
    return max(config.max_positions, int(rope.factor * rope.original_max_positions) if stretched else 0)


def context_size(config: ModelConfig, asked: int | None = None) -> int:
    """The context to allocate: `asked`, or the model's maximum up to 4096. UsageError where it exceeds the maximum."""
    limit = max_context_size(config)
    if asked is not None and asked > limit:
        raise UsageError(f"a context of {asked} was asked for; the model has {limit} positions; ask for at most that")
    return asked or min(limit, DEFAULT_CTX_SIZE)


class Engine:
    """One model, ready to run. A context manager; safe to share between threads, where a second stream waits.

    config       the model's
    tokenizer    None where the checkpoint has none: prompts are token ids then, and results carry no text
    ctx_size     positions that prompt and answer share; at most max_ctx_size, the model's own limit
    description  one line: model, precision, backend, context
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any = None,
        *,
        description: str = "",
        generation_config: Mapping[str, Any] | None = None,
        eos_ids: frozenset[int] = frozenset(),
        prefill_chunk: int | None = None,
    ):
        self.config = runner.config
        self.tokenizer = tokenizer
        self.ctx_size: int = runner.cache.capacity
        self.max_ctx_size = max_context_size(runner.config)
        self.description = description
        self.generation_config = dict(generation_config or {})
        self.eos_ids = eos_ids
        self._runner: Runner | None = runner
        chunk: int = getattr(runner, "prefill_chunk", PREFILL_CHUNK)
        self._prefill_chunk = prefill_chunk or chunk
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread that last advanced the open stream
        self._slots: list[list[int]] = [[] for _ in range(runner.cache.n_slots)]  # the tokens whose keys each holds
        self._last_use = [0.0] * len(self._slots)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def runner(self) -> Runner:
        """The model itself, step by step; UsageError once the engine is closed."""
        return self._alive()

    def close(self) -> None:
        """Let go of weights and cache. A stream still open runs to its end; a new one raises UsageError."""
        self._runner = None

    def generate(self, prompt: Prompt, *, cancel: Cancel | None = None, **options: Any) -> Result:
        """The whole answer to `prompt`; arguments and errors as for `stream`."""
        texts: list[str] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprob] | None = None
        for piece in self.stream(prompt, cancel=cancel, **options):
            texts.append(piece.text)
            tokens += piece.tokens
            if piece.logprobs is not None:
                logprobs = (logprobs or []) + piece.logprobs
        assert piece.finish_reason and piece.usage and piece.timings  # the last piece of every stream has them
        return Result("".join(texts), tokens, piece.finish_reason, piece.usage, piece.timings, logprobs)

    def stream(self, prompt: Prompt, *, cancel: Cancel | None = None, **options: Any) -> Generator[Piece, None, None]:
        """The answer to `prompt`, piece by piece, one for each token; closing the generator ends it at once.

        prompt   a text to continue, a list of messages ({"role", "content"}) for the model's chat template, or a list
                 of token ids
        cancel   an Event or a function; looked at before each token and each chunk of the prompt
        options  the fields of `SamplingParams`; those not given follow the model's generation_config.json

        Everything is checked before the first piece is asked for: raises UsageError, TokenizerError, TemplateError,
        and ContextOverflowError where the prompt leaves no position for an answer. While streaming, BackendError where
        the model's output is not finite.
        """
        self._alive()
        params = self.sampling(**options)
        if params.stop and self.tokenizer is None:
            raise TokenizerError("stop strings need a tokenizer and this checkpoint has none; use max_tokens")
        tokens = self.prompt_tokens(prompt)
        if len(tokens) >= self.ctx_size:
            raise ContextOverflowError(len(tokens), self.ctx_size, self.max_ctx_size)
        text = TextStream(self.tokenizer.decoder() if self.tokenizer else None, params.stop)
        if not is_chat(prompt):
            text.prime(tokens[-PRIMING:])
        return self._stream(tokens, params, text, _check_of(cancel))

    def sampling(self, **options: Any) -> SamplingParams:
        """What `options` amount to: they win over the model's generation_config.json, which wins over the defaults."""
        return SamplingParams.resolve(options, self.generation_config)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The token ids of `prompt` in any of the forms that `stream` takes; at least one."""
        return encode(prompt, self.tokenizer, self.config.vocab_size)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits after each of the token ids `tokens`, fp32 [tokens, vocab_size], computed anew in slot 0.

        Raises UsageError for an id out of range, ContextOverflowError for more tokens than the context.
        """
        runner = self._alive()
        tokens = token_ids(tokens, self.config.vocab_size)
        if len(tokens) > self.ctx_size:
            raise ContextOverflowError(len(tokens), self.ctx_size, self.max_ctx_size)
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        self._acquire(lambda: False)
        try:
            self._keep(runner, 0, 0)
            rows = min(self._prefill_chunk, LOGITS_CHUNK)
            for start in range(0, len(tokens), rows):
                chunk = tokens[start : start + rows]
                out[start : start + len(chunk)] = self._run(runner, 0, chunk, wanted="all")
        finally:
            self._release(runner)
        return out

    @contextmanager
    def exclusive(self) -> Iterator[Runner]:
        """The model itself, its caches empty, for this thread alone: streams of others wait until the block ends."""
        runner = self._alive()
        self._acquire(lambda: False)
        try:
            for slot in range(len(self._slots)):
                self._keep(runner, slot, 0)
            yield runner
        finally:
            for slot in range(len(self._slots)):
                runner.cache.truncate(slot, 0)
            self._release(runner)

    def _stream(
        self, prompt: list[int], params: SamplingParams, text: TextStream, cancelled: Callable[[], bool]
    ) -> Generator[Piece, None, None]:
        runner = self._alive()
        if not self._acquire(cancelled):
            nothing = Timings(0.0, 0.0, None, 0.0, 0, 0)
            yield Piece("", finish_reason="cancelled", usage=Usage(len(prompt), 0, 0), timings=nothing)
            return
        try:
            yield from self._answer(runner, prompt, params, text, cancelled)
        finally:
            self._release(runner)

    def _answer(
        self,
        runner: Runner,
        prompt: list[int],
        params: SamplingParams,
        text: TextStream,
        cancelled: Callable[[], bool],
    ) -> Generator[Piece, None, None]:
        """One request, with the lock held."""
        started = time.perf_counter()
        decode_s, first_token_s, n_tokens, n_decoded = 0.0, None, 0, 0
        slot = self._best_slot(prompt)
        self._last_use[slot] = started
        # One token is always run anew: its row gives the first logits.
        cached = self._keep(runner, slot, min(common_prefix(self._slots[slot], prompt), len(prompt) - 1))
        done, logits = cached, None
        while done < len(prompt) and not cancelled():
            chunk = prompt[done : done + self._prefill_chunk]
            done += len(chunk)
            logits = self._run(runner, slot, chunk, wanted="last" if done == len(prompt) else "none")
        prefill_s = time.perf_counter() - started

        def last(piece_text: str, reason: str, tokens: Sequence[int] = (), logprobs: Any = None) -> Piece:
            usage = Usage(len(prompt), n_tokens, cached)
            total_s = time.perf_counter() - started
            timings = Timings(prefill_s, decode_s, first_token_s, total_s, done - cached, n_decoded)
            return Piece(piece_text, list(tokens), logprobs, reason, usage, timings)

        pending: list[int] = []  # sampled, not yet run
        history = History(self.config.vocab_size, prompt)
        rng = np.random.default_rng(params.seed)
        follow = runner.drawing(slot, params, rng) if isinstance(runner, DrawingRunner) else None
        limit = min(params.max_tokens, self.ctx_size - len(prompt))
        penalized, stops = params.penalized, bool(params.stop)
        ends = frozenset() if params.ignore_eos else self.eos_ids
        held = self._slots[slot]
        while True:
            if cancelled():
                yield last(text.flush(), "cancelled")
                return
            begun = time.perf_counter()
            if pending and follow:
                token, logprob = follow(pending[0]), None
                held += pending
            else:
                if pending:
                    logits = self._run(runner, slot, pending, wanted="last")
                assert logits is not None  # cancelled() did not change its mind: prefill ran to the end
                finite = np.isfinite(logits).all()
                token, logprob = sample(logits[0], params, history, rng) if finite else (-1, None)
            if token < 0:
                self._keep(runner, slot, 0)
                raise BackendError(
                    f"the model's output is not finite after {len(prompt) + n_tokens} tokens: the checkpoint is "
                    "damaged, or its activations do not fit the backend's number format; try another device"
                )
            if pending:
                decode_s += time.perf_counter() - begun
                n_decoded += 1
            if token in ends:
                yield last(text.flush(), "stop")
                return
            pending = [token]
            if penalized:
                history.add(token)
            shown = text.push(token)
            n_tokens += 1
            if first_token_s is None:
                first_token_s = time.perf_counter() - started
            logprobs = None if logprob is None else [logprob]
            if n_tokens >= limit or (stops and text.stopped):
                shown += text.flush()
                yield last(shown, "stop" if text.stopped else "length", [token], logprobs)
                return
            yield Piece(shown, [token], logprobs)
            self._holder = threading.get_ident()  # whoever resumed the stream

    def _run(self, runner: Runner, slot: int, tokens: list[int], wanted: str) -> np.ndarray:
        """Run `tokens` where the slot ends; fp32 logits [rows wanted, vocab_size]."""
        held = self._slots[slot]
        logits = runner.step(Rows.of(tokens, len(held), slot, wanted))
        held += tokens
        return logits

    def _keep(self, runner: Runner, slot: int, length: int) -> int:
        """Forget what `slot` holds from `length` on; `length`."""
        runner.cache.truncate(slot, length)
        del self._slots[slot][length:]
        return length

    def _best_slot(self, prompt: list[int]) -> int:
        """The slot that holds most of `prompt`; of equals the one used longest ago."""
        return max(range(len(self._slots)), key=lambda s: (common_prefix(self._slots[s], prompt), -self._last_use[s]))

    def _acquire(self, cancelled: Callable[[], bool]) -> bool:
        """Wait for the engine; False where `cancelled` came first."""
        while not self._lock.acquire(timeout=0.05):
            if self._holder == threading.get_ident():
                raise UsageError(
                    "this thread has another stream of the engine open and would wait for itself; "
                    "finish it or close() it first"
                )
            if cancelled():
                return False
        self._holder = threading.get_ident()
        return True

    def _release(self, runner: Runner) -> None:
        """Give the engine free; after a step that failed, cut slots back to what both sides know to be there."""
        for slot, held in enumerate(self._slots):
            self._keep(runner, slot, min(len(held), int(runner.cache.lengths[slot])))
        self._holder = None
        self._lock.release()

    def _alive(self) -> Runner:
        if self._runner is None:
            raise UsageError("this engine is closed; load the model again")
        return self._runner


def common_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(held, prompt, strict=False)):
        if a != b:
            return index
    return min(len(held), len(prompt))


def _check_of(cancel: Cancel | None) -> Callable[[], bool]:
    """A function that says whether to end; once it has said so it stays with it."""
    if cancel is None:
        return lambda: False
    ask = cancel.is_set if isinstance(cancel, threading.Event) else cancel
    if not callable(ask):
        raise UsageError(f"cancel is {cancel!r}; it must be a function or a threading.Event")
    ended = False

    def check() -> bool:
        nonlocal ended
        ended = ended or bool(ask())
        return ended

    return check


def _eos_ids(generation_config: Mapping[str, Any], hf_config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """All end-of-sequence ids that any of the checkpoint's files names: they often differ, and each ends a turn."""
    ids: set[int] = set()
    for value in (
        generation_config.get("eos_token_id"),
        hf_config.get("eos_token_id"),
        getattr(tokenizer, "eos_id", None),
    ):
        values = value if isinstance(value, list) else [value]
        ids.update(v for v in values if isinstance(v, int) and not isinstance(v, bool))
    return frozenset(ids)


def precision(checkpoint: Any) -> str:
    """The precision of a checkpoint's weights in words."""
    q = checkpoint.quantization
    if q is None:
        return str(checkpoint.config.dtype)
    return f"{q.bits}-bit {q.method.upper()} " + ("per row" if q.group_size == -1 else f"g{q.group_size}")


def head_bits(asked: int | None, n_quantized: int) -> int:
    """Bits of the output head: those asked for, or 8 where something is quantized, else 16 for as it is stored."""
    return asked or (8 if n_quantized else 16)


def activation_bits(asked: int, n_quantized: int, head: int) -> int:
    """Bits that activations keep: as asked for where a weight is quantized, be it the head alone; else 16."""
    return asked if n_quantized or head == 8 else 16


def _unusual(checkpoint: Any, head: int, activations: int, footprint: memory.Footprint) -> str:
    """How the weights are kept, and what was asked for beside them, where it is not as usual."""
    bits = checkpoint.quantization.bits if checkpoint.quantization else 0
    kept = f" (kept in {footprint.kept(bits)} bits)" if bits and footprint.kept(bits) != bits else ""
    head_words = f", {head}-bit head" if (head == 8) != (checkpoint.quantization is not None) else ""
    return kept + head_words + (", 8-bit activations" if activations == 8 else "")


_loaded: dict[str, Engine] = {}  # of a model given by name; one, as two may be more than a small machine holds
_loading = threading.Lock()


def _engine(model: Engine | str | Path) -> Engine:
    """`model` itself, or the engine of the model it names, which is kept for the next call."""
    if isinstance(model, Engine):
        return model
    if not isinstance(model, str | Path):
        raise UsageError(f"the model is {model!r:.80}; it must be what load() returned, a directory or a hub id")
    name = str(model)
    with _loading:
        if name not in _loaded:
            _loaded.clear()
            _loaded[name] = load(model)
        return _loaded[name]


def generate(llm: Engine | str | Path, prompt: Prompt, *, cancel: Cancel | None = None, **options: Any) -> Result:
    """The whole answer to `prompt`: see `Engine.stream`. A path or hub id in place of `llm` is loaded, and kept."""
    return _engine(llm).generate(prompt, cancel=cancel, **options)


def stream(
    llm: Engine | str | Path, prompt: Prompt, *, cancel: Cancel | None = None, **options: Any
) -> Generator[Piece, None, None]:
    """The answer to `prompt`, piece by piece: see `Engine.stream`. A path or hub id is loaded, and kept."""
    return _engine(llm).stream(prompt, cancel=cancel, **options)
