"""One model on a text, or a model against another: perplexity, KL divergence, top-1 agreement.

The protocol is the AWQ paper's: the text is tokenized whole, the stream of tokens cut into windows that do not overlap
(2048 tokens, or the model's context where that is shorter), a rest shorter than a window left out, and in every window
each token but the first predicted. A beginning token stands where the tokenizer puts one, before the whole text; the
later windows have none.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinychat import checkpoint, engine, tokenizer
from tinychat.config import ModelConfig
from tinychat.engine import Engine
from tinychat.errors import TokenizerError, UsageError
from tinychat.evaluation import likelihood
from tinychat.evaluation.likelihood import Estimate
from tinychat.progress import Loading
from tinychat.prompt import encode

WINDOW = 2048

Model = Engine | str | Path


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how. Perplexities are exp of nats per token; intervals are of 95 %.

    text       what it is called: a file's name, or 'the text given'
    tokens     that were predicted: all of the windows' but the first of each
    left_out   tokens at the end of the text that did not fill a window, or lay beyond max_tokens
    window     tokens in each of `windows` windows
    begins     the token that the tokenizer put before the text, as text; None: it puts none
    settings   how models given by name were run: head and activations (bits), kv_dtype
    against... None where there is no other model: the other's name and perplexity, the paired difference of the
               log-likelihood of a token (nats), KL(other || model) (nats) and the share of places where both find the
               same token likeliest
    """

    model: str
    text: str
    tokens: int
    window: int
    windows: int
    left_out: int
    begins: str | None
    settings: dict[str, Any]
    log_likelihood: Estimate
    seconds: float
    against: str | None = None
    against_log_likelihood: Estimate | None = None
    change: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return likelihood.perplexity(self.log_likelihood.mean)

    @property
    def kl_divergence(self) -> float | None:
        """Mean KL(other || model), nats."""
        return self.kl.mean if self.kl else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of places, 0 to 1."""
        return self.top1.mean if self.top1 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None where there is none (an interval of a single token, no other model)."""
        other = self.against_log_likelihood
        return {
            "model": self.model,
            "against": self.against,
            "text": self.text,
            "perplexity": _finite(self.perplexity),
            "perplexity_interval": _perplexities(self.log_likelihood),
            "against_perplexity": _finite(likelihood.perplexity(other.mean)) if other else None,
            "log_likelihood_change": self.change.mean if self.change else None,
            "log_likelihood_change_interval": _interval(self.change),
            "kl_divergence": self.kl_divergence,
            "kl_divergence_interval": _interval(self.kl),
            "top1_agreement": self.top1_agreement,
            "top1_agreement_interval": _interval(self.top1),
            "tokens": self.tokens,
            "window": self.window,
            "windows": self.windows,
            "left_out": self.left_out,
            "begins": self.begins,
            **self.settings,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        begins = f"begins with {self.begins}" if self.begins else "no beginning token"
        plural = "s" if self.windows > 1 else ""
        rest = f", {self.left_out:,} tokens at the end left out" if self.left_out else ""
        settings = {"head": "{}-bit head", "activations": "{}-bit activations", "kv_dtype": "{} KV cache"}
        words = [settings[key].format(value) for key, value in self.settings.items()]
        if self.settings.get("head") == 16:
            words[0] = "output head as stored"
        lines = [
            f"model    {self.model}",
            *([f"against  {self.against}"] if self.against else []),
            f"text     {self.text}: {self.windows} window{plural} of {self.window} tokens, {self.tokens:,} predicted "
            f"({begins}, windows on their own{rest})",
            f"run      {', '.join(words)}; {self.seconds:.1f} s",
            "",
            f"{'':<28}{'':>12}   95 % interval",
            _row("perplexity", f"{self.perplexity:.4f}", _perplexities(self.log_likelihood), ".4f"),
        ]
        if self.against_log_likelihood and self.change and self.kl and self.top1:
            other = self.against_log_likelihood
            theirs = likelihood.perplexity(other.mean)
            lines += [
                _row("perplexity of the other", f"{theirs:.4f}", _perplexities(other), ".4f"),
                _row("log-likelihood change, nats", f"{self.change.mean:+.5f}", _interval(self.change), "+.5f"),
                _row("KL(other || model), nats", f"{self.kl.mean:.5f}", _interval(self.kl), ".5f"),
                _row("same likeliest token", f"{self.top1.mean:.2%}", _interval(self.top1), ".2%"),
            ]
        return "\n".join(lines)


def evaluate(
    model: Model,
    text: str | Path,
    *,
    against: Model | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    ctx_size: int | None = None,
    threads: int | None = None,
    kv_dtype: str = "fp32",
    activations: int = 16,
    head: int | None = 16,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
    progress: bool = False,
) -> Evaluation:
    """How well `model` predicts `text`, and how far it lies from the model `against`, on the paper's protocol.

    model, against  what `load` returned, or what it takes; loaded ones are let go afterwards. Both are in memory at
                    once, and must have one vocabulary
    text            the text itself, or the Path of a UTF-8 file
    window          tokens; by default 2048, or the context where that is shorter
    max_tokens      of the text, from its beginning (default: all)
    ctx_size        of models given by name, where it is to be larger than a window
    revision        of `model` alone
    device ... ignore_config  of models given by name: see `load`. Unlike there, the output head stays as it is stored
                    and the KV cache rounds nothing, so that the figures are the weights'
    progress        shown on stderr, where that is a terminal

    Raises UsageError for a text or window that cannot be, TokenizerError where the tokenizers differ or there is none,
    and what `load` raises.
    """
    name, content = _read(text)
    for what, value, least in (("window", window, 2), ("max_tokens", max_tokens, 2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{what} is {value!r}; it must be a whole number, {least} or more")
    if isinstance(model, Engine) and against is model:
        raise UsageError("the two models are one engine; give another, or leave `against` out")
    where = {"offline": offline, "ignore_config": tuple(ignore_config)}
    subject = _Subject(model, revision=revision, **where)
    other = None if against is None else _Subject(against, revision=None, **where)
    both = [subject, other] if other else [subject]
    size = _window(both, window, ctx_size)
    ids, left_out, begins = _tokens(subject, other, content, name, max_tokens)
    token_windows = likelihood.windows(ids, size)
    used = sum(map(len, token_windows))
    settings = {"head": head, "activations": activations, "kv_dtype": kv_dtype}
    options = {"device": device, "ctx_size": max(size, ctx_size or 0), "threads": threads, **settings}
    n_tokens = used - len(token_windows)
    with ExitStack() as stack:
        engines = [stack.enter_context(s.loaded(options, progress)) for s in both]
        runners = [stack.enter_context(e.exclusive()) for e in engines]
        for of, runner in zip(both, runners, strict=True):
            if of.engine is None:  # a backend may keep less than was asked for
                settings["kv_dtype"] = runner.cache.kv_dtype
        bar = stack.enter_context(
            tqdm(total=n_tokens, desc="evaluating", unit="token", leave=False, disable=None if progress else True)
        )
        began = time.monotonic()
        measured: dict[str, Any] = {}
        if other:
            found = likelihood.compare_runs(runners[0], runners[1], token_windows, bar.update)
            score = found.score
            measured = {
                "against": engines[1].description,
                "against_log_likelihood": found.baseline.mean,
                "change": found.change,
                "kl": found.kl,
                "top1": found.top1,
            }
        else:
            score = likelihood.score(runners[0], token_windows, bar.update)
        return Evaluation(
            model=engines[0].description,
            text=name,
            tokens=n_tokens,
            window=len(token_windows[0]),
            windows=len(token_windows),
            left_out=left_out + len(ids) - used,
            begins=begins,
            settings=settings if any(s.engine is None for s in both) else {},
            log_likelihood=score.mean,
            seconds=time.monotonic() - began,
            **measured,
        )


class _Subject:
    """A model before its weights are needed: mistakes are found before they are loaded."""

    config: ModelConfig
    tokenizer: tokenizer.Tokenizer | None

    def __init__(self, model: Model, **where: Any):
        self.engine = model if isinstance(model, Engine) else None
        self._where = where
        if isinstance(model, Engine):
            self.name, self.config = model.description, model.config
            self.tokenizer, self.limit = model.tokenizer, model.ctx_size
            return
        self.name = str(model)
        path = checkpoint.locate(self.name, revision=where["revision"], offline=where["offline"])
        source = checkpoint.open(path, ignore_config=where["ignore_config"])
        self.config, self.tokenizer = source.config, source.tokenizer()
        self.limit = engine.max_context_size(self.config)

    def loaded(self, options: dict[str, Any], progress: bool) -> AbstractContextManager[Engine]:
        """A context manager of the engine, closed at its end unless it was given."""
        if self.engine is not None:
            return nullcontext(self.engine)
        if not progress:
            return engine.load(self.name, **options, **self._where)
        with Loading(self.name) as loading:
            return engine.load(self.name, **options, **self._where, progress=loading)


def _read(text: str | Path) -> tuple[str, str]:
    """(what to call it, the text)."""
    if isinstance(text, str):
        if len(text) < 4096 and "\n" not in text and "\0" not in text and text.strip() and Path(text).is_file():
            raise UsageError(f"the text is {text!r}, which is a file: give a Path of it to have it read")
        name, content = "the text given", text
    else:
        name = str(text)
        try:
            content = text.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise UsageError(f"the text {name} does not exist") from None
        except IsADirectoryError:
            raise UsageError(f"the text {name} is a directory; give a file") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the text {name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
            ) from None
    if not content.strip():
        raise UsageError(f"{name} is empty; there is nothing to predict")
    return name, content


def _window(subjects: list[_Subject], window: int | None, ctx_size: int | None) -> int:
    """The tokens of a window."""
    limit = min(subject.limit for subject in subjects)
    context = f"a context of {limit}"
    if ctx_size is not None:
        if ctx_size > limit:
            raise UsageError(f"a context of {ctx_size} was asked for; the model has {limit} positions")
        limit, context = ctx_size, f"the context asked for, {ctx_size}"
    if window is not None and window > limit:
        raise UsageError(f"windows of {window} tokens do not fit in {context}; ask for at most that")
    size = window or min(WINDOW, limit)
    if size < 2:
        raise UsageError(f"windows of {size} token predict nothing; ask for at least 2")
    return size


def _tokens(
    subject: _Subject, other: _Subject | None, text: str, name: str, max_tokens: int | None
) -> tuple[list[int], int, str | None]:
    """(the text's tokens, how many of them max_tokens leaves out, the beginning token)."""
    words = subject.tokenizer or (other.tokenizer if other else None)
    if words is None:
        raise TokenizerError(f"{subject.name} has no tokenizer, without which a text cannot be evaluated")
    vocab = subject.config.vocab_size
    if other and other.config.vocab_size != vocab:
        raise TokenizerError(
            f"the models cannot be compared: one has a vocabulary of {vocab} tokens, the other of "
            f"{other.config.vocab_size}; --against takes the model that this one was made from"
        )
    ids = encode(text, words, vocab)
    theirs = other.tokenizer if other else None
    if theirs is not None and theirs is not words and encode(text, theirs, vocab) != ids:
        raise TokenizerError(
            "the models cannot be compared: their tokenizers make different tokens of the text; --against takes the "
            "model that this one was made from"
        )
    if len(ids) < 2:
        raise UsageError(f"{name} is {len(ids)} token; it takes at least two to predict one")
    begins = words.token(ids[0]) if words.encode("")[:1] == ids[:1] else None
    kept = ids[:max_tokens]
    return kept, len(ids) - len(kept), begins


def _perplexities(log_likelihood: Estimate) -> list[float | None] | None:
    return [_finite(likelihood.perplexity(x)) for x in (log_likelihood.high, log_likelihood.low)]


def _interval(found: Estimate | None) -> list[float | None] | None:
    return None if found is None else [_finite(found.low), _finite(found.high)]


def _finite(x: float) -> float | None:
    return x if abs(x) < float("inf") else None


def _row(name: str, value: str, interval: list[float | None] | None, form: str) -> str:
    between = " .. ".join("unknown" if x is None else format(x, form) for x in interval or [])
    return f"{name:<28}{value:>12}   {between}".rstrip()
