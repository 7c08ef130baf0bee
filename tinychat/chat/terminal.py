"""The terminal side of the chat: reads lines, streams answers, turns Ctrl-C into a stop. Knows no tokens.

On a terminal prompt_toolkit reads (history, several lines, paste); from a pipe or on a dumb terminal plain lines do.
Answers go to stdout; everything that is said around them goes to stderr where stdout or stdin is not a terminal.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from tinychat.chat import commands
from tinychat.chat.escapes import EscapeFilter
from tinychat.chat.session import Session
from tinychat.errors import ContextOverflowError, TemplateError, TinychatError

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

    from tinychat.engine import Engine
    from tinychat.results import Piece, Result

PROMPT, CONTINUATION = ">>> ", "... "
BLOCK = '"""'
NEARLY_FULL = 0.8  # of the context: from here on each answer is followed by a notice


class Screen:
    """Where text goes: `write` is the model's, `note` is ours."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, *, interactive: bool | None = None):
        self.out = out or sys.stdout
        self.on_terminal = self.out.isatty()
        self.interactive = sys.stdin.isatty() and self.on_terminal if interactive is None else interactive
        self.notes = self.out if self.interactive else (err or sys.stderr)
        self.color = self.notes.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._filter = EscapeFilter() if self.on_terminal else None

    def write(self, text: str) -> None:
        """Show the model's text at once, without escape sequences where this is a terminal."""
        self.out.write(self._filter(text) if self._filter else text)
        self.out.flush()

    def note(self, text: str, *, dim: bool = False) -> None:
        """Say something of our own on lines of its own, `dim` or not; a terminal gets them broken between words."""
        if self.notes.isatty():
            width = shutil.get_terminal_size().columns
            text = "\n".join(_wrap(line, width) for line in text.split("\n"))
        self.notes.write(f"\x1b[2m{text}\x1b[0m\n" if dim and self.color else f"{text}\n")
        self.notes.flush()


def _wrap(line: str, width: int) -> str:
    return textwrap.fill(line, width, replace_whitespace=False, break_long_words=False, break_on_hyphens=False)


class Reader(Protocol):
    """Where a user's messages come from."""

    def read(self) -> str:
        """The next message; EOFError at the end, KeyboardInterrupt on Ctrl-C."""
        ...


class LineReader:
    """Plain lines, for pipes and dumb terminals; a text of several lines stands between two triple quotes."""

    def __init__(self, screen: Screen):
        self._screen = screen
        if not screen.interactive and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 is shown as such, not refused

    def read(self) -> str:
        """The next line or block."""
        text = self._line(PROMPT)
        while _open_block(text):
            try:
                text += "\n" + self._line(CONTINUATION)
            except EOFError:
                break
        return text

    def _line(self, prompt: str) -> str:
        if self._screen.interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class PromptReader:
    """prompt_toolkit: line editing, history kept from one run to the next, paste, Alt-Enter for a new line."""

    def __init__(self, screen: Screen, input: Input | None = None, output: Output | None = None):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        names = [f"/{name}" for command in commands.COMMANDS for name in (command.name, *command.aliases)]
        self._session: PromptSession[str] = PromptSession(
            [("bold", PROMPT)] if screen.color else PROMPT,
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_keys(),
            history=_history(),
            completer=WordCompleter(names, sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
            input=input,
            output=output,
        )

    def read(self) -> str:
        """What was typed up to Enter."""
        return self._session.prompt()


def _continuation(width: int, line_number: int, wrap_count: int) -> StyleAndTextTuples:
    return [("", CONTINUATION if wrap_count == 0 else " " * width)]


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # Enter takes the completion shown; the next one sends
        elif _open_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_path() -> Path | None:
    """Where typed messages are kept; None where TINYCHAT_NO_HISTORY asks for none."""
    if os.environ.get("TINYCHAT_NO_HISTORY"):
        return None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "tinychat" / "history"


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Lasting(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk costs the history, not the conversation
                super().store_string(string)

    try:
        path = history_path()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.read_bytes()
            return Lasting(str(path))
    except (OSError, RuntimeError):  # no home, or not ours to write
        pass
    return InMemoryHistory()


def _open_block(text: str) -> bool:
    """Whether `text` starts a triple-quoted block and does not end it."""
    text = text.strip()
    return text.startswith(BLOCK) and (len(text) < 2 * len(BLOCK) or not text.endswith(BLOCK))


def message_of(text: str) -> str:
    """The message in what was typed: without the triple quotes, and as valid Unicode (no lone surrogates)."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    stripped = text.strip()
    if stripped.startswith(BLOCK):
        text = stripped[len(BLOCK) :].removesuffix(BLOCK).strip("\n")
    return text


@contextlib.contextmanager
def interrupts(cancel: threading.Event) -> Iterator[None]:
    """Within, Ctrl-C sets `cancel`: the engine stops between two tokens, its cache whole. A second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    def stop(signum: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def closing_line(last: Piece | Result, ctx_size: int) -> str:
    """One line of figures for an answer: tokens and speed of both phases, what the cache saved, context used."""
    usage, timings = last.usage, last.timings
    assert usage is not None and timings is not None  # a last piece has both
    used = usage.prompt_tokens + usage.completion_tokens
    cached = f", {usage.cached_tokens} cached" if usage.cached_tokens else ""
    return (
        f"[{_count(usage.completion_tokens)}{_rate(timings.decode_tokens_per_s)}; "
        f"prefill {_count(usage.prompt_tokens - usage.cached_tokens)}{_rate(timings.prefill_tokens_per_s)}{cached}; "
        f"context {used}/{ctx_size}]"
    )


def _count(tokens: int) -> str:
    return f"{tokens} token" + ("" if tokens == 1 else "s")


def _rate(per_s: float | None) -> str:
    return "" if per_s is None else f" at {per_s:.3g}/s" if per_s < 100 else f" at {per_s:.0f}/s"


def answer(session: Session, screen: Screen, text: str, notices: Callable[[Session, Piece], Iterator[str]]) -> None:
    """Ask `text`, stream the answer, the line that closes it, and what `notices` says of its end."""
    cancel, last, ended = threading.Event(), None, True
    try:
        with interrupts(cancel):
            for piece in session.ask(text, cancel):
                screen.write(piece.text)
                if piece.text:
                    ended = piece.text.endswith("\n")
                if piece.finish_reason is not None:
                    last = piece
    finally:
        if not ended:
            screen.write("\n")
    if last is not None:
        screen.note(closing_line(last, session.engine.ctx_size), dim=True)
        for notice in notices(session, last):
            screen.note(notice)


def _notices(session: Session, last: Piece) -> Iterator[str]:
    used, size = session.used, session.engine.ctx_size
    if last.finish_reason == "cancelled":
        kept = session.messages and session.messages[-1].get("interrupted")
        yield (
            "(stopped; the part above stays in the conversation)"
            if kept
            else "(stopped; nothing was answered yet, so the question is dropped)"
        )
    elif last.finish_reason == "length" and used < size:
        yield "(cut at max_tokens; /set max_tokens N changes it, 'go on' continues)"
    if used >= size:
        yield f"(the context is full: {used} of {size} tokens. {_room(session.engine)})"
    elif used > NEARLY_FULL * size:
        yield f"(context {100 * used // size} % full: {used} of {size} tokens; /clear starts anew)"


def _only_notice(session: Session, last: Piece) -> Iterator[str]:
    """Of an answer after which nothing can be asked or set."""
    size = session.engine.ctx_size
    if last.finish_reason == "length":
        yield (
            f"(the context of {size} tokens is full{_larger(session.engine)})"
            if session.used >= size
            else "(cut at max_tokens; a larger -n gives more)"
        )


def _room(engine: Engine) -> str:
    """How to get room in the context, in words."""
    return f"/clear starts anew, /save FILE first keeps a copy{_larger(engine)}"


def _larger(engine: Engine) -> str:
    return f"; -c {engine.max_ctx_size} at the start gives more" if engine.max_ctx_size > engine.ctx_size else ""


def run(
    engine: Engine,
    *,
    model: str = "",
    system: str = "",
    settings: dict | None = None,
    prompt: str | None = None,
    screen: Screen | None = None,
    reader: Callable[[Screen], Reader] | None = None,
) -> int:
    """Chat until the user leaves; with `prompt`, one turn. Returns the exit code.

    On a terminal an error ends the turn and not the program; from a pipe the rest is answered and the code is 1.
    """
    _needs_template(engine, model)
    screen = screen or Screen()
    session = Session(engine, model=model, system=system, settings=settings)
    if prompt is not None:
        answer(session, screen, prompt, _only_notice)
        return 0
    if screen.interactive:
        screen.note(engine.description, dim=True)
        screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", dim=True)
    plain = not screen.interactive or os.environ.get("TERM") == "dumb"
    return _loop(session, screen, (reader or (LineReader if plain else PromptReader))(screen))


def _needs_template(engine: Engine, model: str) -> None:
    missing = "tokenizer" if engine.tokenizer is None else "chat template" if not engine.tokenizer.chat_template else ""
    if missing:
        raise TemplateError(
            f"{model or 'this model'} has no {missing}, so a conversation cannot be written as it was trained on one"
            + (f'; plain completion works: tinychat generate {model} "TEXT"' if engine.tokenizer is not None else "")
        )


def _loop(session: Session, screen: Screen, reader: Reader) -> int:
    failed = False
    while True:
        try:
            typed = reader.read()
        except KeyboardInterrupt:
            if not screen.interactive:
                raise
            screen.note("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            break
        try:
            if commands.is_command(typed.strip()):
                reply = commands.execute(session, typed)
                if reply is None:
                    break
                screen.note(reply)
            elif message_of(typed).strip():
                answer(session, screen, message_of(typed), _notices)
        except ContextOverflowError as error:
            failed = True
            screen.note(
                f"error: this message does not fit: with it the conversation has {error.n_tokens} tokens, and the "
                f"context holds {error.ctx_size}. The message is dropped, the conversation before it stays. "
                f"Shorten it, or: {_room(session.engine)}"
            )
        except TinychatError as error:
            failed = True
            screen.note(f"error: {error}")
    return 1 if failed and not screen.interactive else 0
