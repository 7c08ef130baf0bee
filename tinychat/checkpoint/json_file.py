"""Reading the JSON files of a checkpoint, which nobody has checked: bounded in size and depth, each key once.

Python's `json` takes the last of two equal keys, NaN and any depth that the stack bears; here these are errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from tinychat.checkpoint.quoting import quote
from tinychat.errors import CheckpointError, TinychatError

MAX_BYTES = 64 << 20  # the index of the largest published checkpoints is a few MB


def parse_object(data: bytes, where: str, error: type[TinychatError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in `data`. `where` names it in the message of `error`."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where} begins with a byte order mark, which JSON does not allow; save it as UTF-8 without BOM")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise error(f"{where} is nested too deeply to be what it claims; download it again") from None
    except UnicodeDecodeError as fault:
        raise error(f"{where} is not UTF-8 text: {fault.reason} at byte {fault.start}; download it again") from None
    except ValueError as fault:
        raise error(f"{where} is not valid JSON: {quote(str(fault))}; download it again or mend it") from None
    if not isinstance(found, dict):
        raise error(f"{where} holds a JSON {type(found).__name__} where an object {{...}} is expected")
    return found


def read_object(path: Path, error: type[TinychatError] = CheckpointError, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`; `error` where it is unreadable, too large, or not one."""
    where = quote(str(path))
    try:
        if not path.is_file():
            raise error(f"{where} is not a file" if path.exists() else f"{where} is missing")
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{where} has {size:,} bytes; at most {max_bytes:,} are read")
        data = path.read_bytes()
    except OSError as fault:
        raise error(f"{where} cannot be read: {fault.strerror}") from None
    return parse_object(data, where, error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
