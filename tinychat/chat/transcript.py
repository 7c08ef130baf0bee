"""The tokens of a conversation, the model's own among them. Knows messages and a tokenizer, no engine.

Encoding an answer's text anew need not give the tokens that the model chose ("▁Hello" may come back as "Hello"), and
from there on the engine's cache would not fit. So the tokens are kept, and only what follows them is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinychat.prompt import Tokenized, render

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer


class Transcript:
    """Text and tokens of a conversation up to its last answer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: tuple[str, list[int]] = ("", [])  # as the template wrote it, to the end of the last answer
        self._asked: tuple[str, list[int]] = ("", [])  # the last prompt

    def prompt(self, messages: Sequence[dict[str, str]]) -> Tokenized:
        """`messages` and their tokens. Raises TemplateError, TokenizerError, UsageError as the engine does."""
        text = render(messages, self._tokenizer)
        tokens = self._continued(text) or self._tokenizer.encode(text, add_bos=False)
        self._asked = (text, tokens)
        return Tokenized(messages, tokens)

    def answered(self, text: str, tokens: Sequence[int]) -> None:
        """The model answered the last prompt by `tokens`, and `text` stays in the conversation.

        Where the text is not all that the tokens say (a stop string, a cut character or a control token was dropped)
        it will be encoded anew.
        """
        asked_text, asked_tokens = self._asked
        same = self._tokenizer.special_ids.isdisjoint(tokens) and self._tokenizer.decode(tokens) == text
        self._known = (asked_text + text, [*asked_tokens, *tokens]) if same else ("", [])

    def _continued(self, text: str) -> list[int] | None:
        """The tokens of `text` where it goes on from the last answer with a special token, which no token can span."""
        known_text, known_tokens = self._known
        if not known_text or not text.startswith(known_text):
            return None
        rest = self._tokenizer.encode(text[len(known_text) :], add_bos=False)
        return [*known_tokens, *rest] if rest and rest[0] in self._tokenizer.special_ids else None
