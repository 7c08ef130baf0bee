"""The terminal chat: a conversation (`session.py`, `commands.py`) and the terminal it happens on (`terminal.py`)."""

from tinychat.chat.terminal import run

__all__ = ["run"]
