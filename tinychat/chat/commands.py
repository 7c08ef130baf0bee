"""What a line that starts with a slash does to a session: text in, text out. Knows no terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinychat import settings as table
from tinychat.chat.session import Session
from tinychat.errors import UsageError

_COMMAND = re.compile(r"/([A-Za-z?]+)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command: its name and arguments as /help shows them, other names, and the function `(session, argument)`."""

    name: str
    argument: str
    help: str
    run: Callable[[Session, str], str | None]  # the reply; None leaves the chat
    aliases: tuple[str, ...] = ()


def is_command(text: str) -> bool:
    """Whether `text` is a command: '/word', alone or followed by space. '/usr/bin' and several lines are not."""
    return "\n" not in text and _COMMAND.fullmatch(text) is not None


def execute(session: Session, text: str) -> str | None:
    """Run the command `text`; its reply, or None where it leaves the chat. UsageError suggests the nearest name."""
    match = _COMMAND.fullmatch(text.strip())
    name, argument = (match[1].lower(), (match[2] or "").strip()) if match else (text, "")
    by_name = {spelling: command for command in COMMANDS for spelling in (command.name, *command.aliases)}
    if name not in by_name:
        near = table.suggest(f"/{name}", [f"/{spelling}" for spelling in by_name])
        raise UsageError(f"no command /{name}{near}; /help lists them")
    return by_name[name].run(session, argument)


def _help(session: Session, argument: str) -> str:
    rows = [(f"/{command.name} {command.argument}".rstrip(), command) for command in COMMANDS]
    width = max(len(left) for left, _ in rows) + 2
    lines = [f"{left:<{width}}{command.help}" for left, command in rows]
    return "\n".join(
        [
            *lines,
            "Also: " + ", ".join(f"/{alias} for /{c.name}" for c in COMMANDS for alias in c.aliases),
            "",
            "Enter sends, Alt-Enter starts a new line. Ctrl-C stops an answer, Ctrl-D leaves.",
            'A text of several lines may also stand between """ and """.',
        ]
    )


def _clear(session: Session, argument: str) -> str:
    session.clear()
    return "conversation cleared" + ("; the system prompt stays" if session.system else "")


def _system(session: Session, argument: str) -> str:
    if argument:
        session.system = "" if argument.lower() == "none" else argument
    return f"system prompt: {session.system or 'none'}"


def _set(session: Session, argument: str) -> str:
    key, value = (*argument.split(maxsplit=1), "", "")[:2]
    if not key:
        return _settings(session)
    setting = table.find(key)
    value = value.strip()
    if not value:
        raise UsageError(f"/set {setting.name} needs a value, or 'default': {setting.help}")
    if value.lower() == "default":
        session.settings.pop(setting.name, None)
        return f"{setting.name}: default"
    session.settings |= table.check({setting.name: setting.parse(value)})
    return f"{setting.name}: {json.dumps(session.settings[setting.name], ensure_ascii=False)}"


def _settings(session: Session) -> str:
    """Every setting as the next answer will have it; a star marks those that were set."""
    width = max(len(setting.name) for setting in table.SETTINGS) + 1
    now = session.sampling()
    rows = []
    for setting in table.SETTINGS:
        value = getattr(now, setting.name)
        shown = "none" if value in (None, ()) else json.dumps(value, ensure_ascii=False)
        star = "*" if setting.name in session.settings else " "
        rows.append(f"{star}{setting.name:<{width}}{shown:<7} {setting.help}")
    return "\n".join(rows)


def _show(session: Session, argument: str) -> str:
    return "\n".join(
        [
            f"model     {session.engine.description}",
            f"context   {_used(session)}",
            f"messages  {len(session.messages)}",
            f"system    {session.system or 'none'}",
            "settings  "
            + (
                ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in session.settings.items())
                or "default"
            ),
        ]
    )


def _used(session: Session) -> str:
    if session.messages and not session.used:  # loaded, not yet encoded
        return f"{session.engine.ctx_size} tokens; the next answer tells how many are used"
    return f"{session.used} of {session.engine.ctx_size} tokens used"


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"/{name} needs a file name: /{name} talk.json")
    return Path(argument).expanduser()


def _save(session: Session, argument: str) -> str:
    path = _path("save", argument)
    session.save(path)
    return f"saved {len(session.messages)} messages to {path}"


def _load(session: Session, argument: str) -> str:
    path = _path("load", argument)
    model = session.load(path)
    other = f"; it was held with {model}" if model and model != session.model else ""
    return f"loaded {len(session.messages)} messages from {path}{other}"


COMMANDS = (
    Command("help", "", "this list", _help, ("?",)),
    Command("clear", "", "forget the conversation; prompt and settings stay", _clear, ("reset",)),
    Command("system", "TEXT", "set the system prompt; 'none' removes it", _system),
    Command("set", "KEY VALUE", "change a setting (temperature 0); 'default' undoes it", _set),
    Command("show", "", "model, context used, system prompt, settings", _show),
    Command("save", "FILE", "write the conversation to a file", _save),
    Command("load", "FILE", "take up a saved conversation", _load),
    Command("exit", "", "leave", lambda session, argument: None, ("quit", "bye")),
)
