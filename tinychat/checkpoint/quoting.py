"""Text that came out of a file or from a user, made fit for a message.

Names in a checkpoint are chosen by whoever wrote it: they may hold terminal escapes, line breaks or a megabyte.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 160


def quote(text: object) -> str:
    """`text` in printable ASCII, everything else as an escape, at most `LONGEST` characters."""
    shown = ascii(text if isinstance(text, str) else repr(text))[1:-1]
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}... ({len(shown)} characters)"


def listing(items: Sequence[str], limit: int = 5) -> str:
    """The first `limit` items, quoted, and how many more there are."""
    shown = ", ".join(quote(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
