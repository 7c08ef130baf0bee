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
    lines = [
        f"{left:<{width}}{command.help}" + (f" (also /{', /'.join(command.aliases)})" if command.aliases else "")
        for left, command in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            'Enter sends, Alt-Enter starts a new line; a text of several lines may also stand between """ and """.',
            "Ctrl-C stops an answer, Ctrl-D leaves.",
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
    width = max(len(setting.name) for setting in table.SETTINGS) + 2
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in session.settings.items()}
    return "\n".join(f"{s.name:<{width}}{shown.get(s.name, 'default'):<12}{s.help}" for s in table.SETTINGS)


def _show(session: Session, argument: str) -> str:
    return "\n".join(
        [
            f"model     {session.engine.description}",
            f"context   {session.used} of {session.engine.ctx_size} tokens used",
            f"messages  {len(session.messages)}",
            f"system    {session.system or 'none'}",
            "settings  "
            + (
                ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in session.settings.items())
                or "default"
            ),
        ]
    )


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
    Command("clear", "", "forget the conversation; system prompt and settings stay", _clear, ("reset",)),
    Command("system", "TEXT", "set the system prompt; 'none' removes it, no text shows it", _system),
    Command("set", "KEY VALUE", "change a setting, such as /set temperature 0; 'default' undoes it", _set),
    Command("show", "", "model, context used, system prompt, settings", _show),
    Command("save", "FILE", "write the conversation to a file", _save),
    Command("load", "FILE", "take up a saved conversation", _load),
    Command("exit", "", "leave", lambda session, argument: None, ("quit", "bye")),
)
