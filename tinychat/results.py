"""What the engine hands out: pieces while it streams, one result when all is gathered. Plain data, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a chosen token, and the likeliest (token, logprob) pairs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt's were still in the KV cache and were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds, from the moment the engine took the request up.

    `prefill_s` and `decode_s` count the engine's work only, not the time a consumer of the stream takes;
    `first_token_s` and `total_s` are by the clock on the wall.
    """

    prefill_s: float
    decode_s: float
    first_token_s: float | None  # None where no token was generated
    total_s: float
    prefill_tokens: int  # computed, cached ones excluded
    decode_tokens: (
        int  # steps of one token, the last of which may have ended the answer; prefill yields the first token
    )

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None where nothing was prefilled."""
        return self.prefill_tokens / self.prefill_s if self.prefill_tokens and self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None where prefill was all."""
        return self.decode_tokens / self.decode_s if self.decode_tokens and self.decode_s else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the two rates included."""
        return asdict(self) | {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


def _ending(finish_reason: str | None, usage: Usage | None, timings: Timings | None) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason,
        "usage": asdict(usage) if usage else None,
        "timings": timings.to_dict() if timings else None,
    }


@dataclass(slots=True)  # made for every token: not frozen, which would take several times as long
class Piece:
    """One step of a stream. The last one, and only it, has a finish_reason, usage and timings.

    text           whole characters, possibly none: an unfinished character or a possible stop string is held back
    tokens         the new token ids: one, or none where the model ended (an end-of-sequence token is not handed out)
    logprobs       one entry for each of `tokens`, or None where they were not asked for
    finish_reason  "stop": an end-of-sequence token or a stop string; "length": max_tokens or the context is full;
                   "cancelled"; None: more is to come
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is None is left out."""
        logprobs = {} if self.logprobs is None else {"logprobs": [asdict(entry) for entry in self.logprobs]}
        ending = _ending(self.finish_reason, self.usage, self.timings) if self.finish_reason else {}
        return {"text": self.text, "tokens": self.tokens} | logprobs | ending


@dataclass(frozen=True)
class Result:
    """A whole answer; the fields are a stream's, gathered (see `Piece`)."""

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; logprobs only where they were asked for."""
        logprobs = {} if self.logprobs is None else {"logprobs": [asdict(entry) for entry in self.logprobs]}
        ending = _ending(self.finish_reason, self.usage, self.timings)
        return {"text": self.text, "tokens": self.tokens} | ending | logprobs
