"""A conversation: its messages, system prompt and settings, and how an answer joins them. Knows no terminal.

The whole conversation goes to the engine at every turn, its answers as the tokens that the model chose; the engine
keeps the longest prefix that its cache holds, so only new tokens are computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat import settings as table
from tinychat.chat.transcript import Transcript
from tinychat.errors import UsageError

if TYPE_CHECKING:
    from tinychat.engine import Engine
    from tinychat.results import Piece
    from tinychat.sampling import SamplingParams

MAX_FILE_BYTES = 64 << 20  # a saved conversation; anything larger is some other file


class Session:
    """One conversation with one engine."""

    def __init__(
        self, engine: Engine, *, model: str = "", system: str = "", settings: dict[str, table.Value] | None = None
    ):
        self.engine = engine
        self.model = model
        self.system = system
        self.settings = dict(settings or {})
        self.messages: list[dict[str, Any]] = []  # user and assistant in turn; an answer cut short has "interrupted"
        self.used = 0  # tokens of the context that the last turn filled
        self._transcript = Transcript(engine.tokenizer)

    def prompt(self) -> list[dict[str, str]]:
        """The messages as the chat template takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": m["role"], "content": m["content"]} for m in self.messages]

    def ask(self, text: str, cancel: threading.Event | None = None) -> Iterator[Piece]:
        """Stream the answer to `text`; question and answer join the conversation.

        An answer that is cut short (by `cancel`, by an error, by closing the iterator) is kept and marked; where
        nothing was answered the question is dropped too, because templates want the roles to alternate.
        """
        self.messages.append({"role": "user", "content": text})
        answer, reason = "", None
        tokens: list[int] = []
        try:
            for piece in self.engine.stream(self._transcript.prompt(self.prompt()), cancel=cancel, **self._options()):
                answer += piece.text
                tokens += piece.tokens
                if piece.finish_reason is not None and piece.usage is not None:
                    reason = piece.finish_reason
                    self.used = piece.usage.prompt_tokens + piece.usage.completion_tokens
                yield piece
        finally:
            interrupted = reason in (None, "cancelled")
            if interrupted and not answer:
                self.messages.pop()
            else:
                mark = {"interrupted": True} if interrupted else {}
                self.messages.append({"role": "assistant", "content": answer, **mark})
                self._transcript.answered(answer, tokens)

    def sampling(self) -> SamplingParams:
        """What the settings, the model's own preferences and the defaults amount to."""
        return self.engine.sampling(**self._options())

    def _options(self) -> dict[str, Any]:
        # An answer in a chat ends where the model ends it or where the context is full.
        return {"max_tokens": self.engine.ctx_size, **self.settings}

    def clear(self) -> None:
        """Forget the messages; system prompt and settings stay."""
        self.messages.clear()
        self.used = 0

    def save(self, path: Path) -> None:
        """Write the conversation to `path` as JSON, whole or not at all; only a saved conversation is overwritten."""
        if path.exists():
            try:
                _read(path)
            except UsageError:
                raise UsageError(
                    f"{path} exists and is not a saved conversation; it is left alone: choose another name"
                ) from None
        state = {"model": self.model, "system": self.system, "messages": self.messages, "settings": self.settings}
        try:
            _write_whole(path, json.dumps(state, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None

    def load(self, path: Path) -> str:
        """Take up the conversation in `path`; returns the name of the model that it was held with."""
        state = _read(path)
        self.system, self.messages, self.settings = state["system"], state["messages"], state["settings"]
        self.used = 0
        return state["model"]


def _read(path: Path) -> dict[str, Any]:
    """The conversation saved in `path`, checked; UsageError says what is wrong with it."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: not a conversation saved by /save")
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON: not a conversation saved by /save") from None
    if not isinstance(state, dict) or not isinstance(state.get("messages"), list):
        raise UsageError(f'{path} has no list "messages": not a conversation saved by /save')
    for key in ("model", "system"):
        if not isinstance(state.setdefault(key, ""), str):
            raise UsageError(f"{path}: {key!r} must be text; found {state[key]!r}")
    messages = [_message(path, index, message) for index, message in enumerate(state["messages"])]
    if len(messages) % 2:
        raise UsageError(f"{path}: the last question has no answer; remove it, or add the answer")
    settings = state.get("settings", {})
    if not isinstance(settings, dict):
        raise UsageError(f'{path}: "settings" must be an object; found {settings!r}')
    try:
        return {**state, "messages": messages, "settings": table.check(settings)}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _message(path: Path, index: int, message: object) -> dict[str, Any]:
    role = ("user", "assistant")[index % 2]
    if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
        raise UsageError(f'{path}: messages[{index}] must be {{"role": "{role}", "content": text}}; found {message!r}')
    mark = {"interrupted": True} if message.get("interrupted") is True else {}
    return {"role": role, "content": message["content"], **mark}


def _write_whole(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
