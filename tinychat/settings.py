"""The settings of an answer as people type them: one table for command-line flags and for `/set`.

It repeats the names and defaults of `sampling.SamplingParams` (a test holds them together) because `tinychat --help`
must not wait for numpy. Ranges are `sampling`'s alone; a setting that nobody gave is not passed on, so that the model's
own preference holds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tinychat.errors import UsageError

Value = int | float | list[str]


@dataclass(frozen=True)
class Setting:
    """One setting: its name in the API, its kind, the flags that set it, our default, what it does."""

    name: str
    kind: type  # int, float, or list: of strings
    flags: tuple[str, ...]
    default: Value | None
    help: str

    def parse(self, text: str) -> Value:
        """The value that `text` spells; UsageError where it is of another kind. Its range is `check`'s matter."""
        if self.kind is list:
            return _texts(text)
        try:
            return self.kind(text)
        except ValueError:
            noun = "a whole number" if self.kind is int else "a number"
            raise UsageError(f"{self.name} is {text!r}; it must be {noun}") from None


_LENGTH = ("-n", "--max-tokens", "--n-predict", "--max-new-tokens")
_REPETITION = ("--repeat-penalty", "--repetition-penalty")

SETTINGS = (
    Setting("max_tokens", int, _LENGTH, 512, "stop after this many new tokens"),
    Setting("temperature", float, ("--temp", "--temperature"), 0.7, "randomness; 0 always takes the likeliest token"),
    Setting("top_k", int, ("--top-k",), 40, "choose among the K likeliest tokens; 0: all"),
    Setting("top_p", float, ("--top-p",), 0.95, "keep the likeliest, up to this probability; 1: all"),
    Setting("min_p", float, ("--min-p",), 0.05, "drop below this share of the likeliest; 0: none"),
    Setting("repetition_penalty", float, _REPETITION, 1.0, "above 1 discourages tokens already seen"),
    Setting("presence_penalty", float, ("--presence-penalty",), 0.0, "lowers tokens that the answer already has"),
    Setting("frequency_penalty", float, ("--frequency-penalty",), 0.0, "the same, once for each time they occurred"),
    Setting("seed", int, ("-s", "--seed"), None, "same seed, same answer; -1: a fresh one"),
    Setting("stop", list, ("--stop",), None, "end the answer before this text"),
)


def find(name: str) -> Setting:
    """The setting called `name`, or with a flag called so, dashes or none. UsageError suggests the nearest."""
    wanted = _plain(name)
    known = {_plain(spelling): setting for setting in SETTINGS for spelling in (*setting.flags, setting.name)}
    if wanted in known:
        return known[wanted]
    names = ", ".join(setting.name for setting in SETTINGS)
    raise UsageError(f"no setting {name!r}{suggest(wanted, known)}; there are: {names}")


def check(values: dict[str, Any]) -> dict[str, Value]:
    """`values`, all settings known by name, kinds and ranges right; UsageError says which is not. Imports numpy."""
    from tinychat.sampling import SamplingParams

    named = {find(name).name: value for name, value in values.items()}
    SamplingParams.resolve(named)
    return named


def suggest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' where something known is near `word`, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _texts(text: str) -> list[str]:
    """A JSON string or list of strings as it is spelled (so that a newline can be typed), any other text as itself."""
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    if isinstance(found, str):
        return [found]
    return found if isinstance(found, list) and all(isinstance(entry, str) for entry in found) else [text]


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").lower()
