"""Prompts, in the three forms a user may give them, to token ids: a text, chat messages, or the ids themselves."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from tinychat.errors import TemplateError, TokenizerError, UsageError

Message = Mapping[str, Any]  # "role" and "content", both text
Prompt = str | Sequence[int] | Sequence[Message]


class Tokenized(list):
    """Messages whose token ids are known already, among them those that the model itself chose for its answers."""

    def __init__(self, messages: Sequence[Message], tokens: Sequence[int]):
        super().__init__(messages)
        self.tokens = tokens


def is_chat(prompt: Any) -> bool:
    """Whether `prompt` is meant as a list of messages."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    return listed and isinstance(prompt[0], Mapping)


def encode(prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """The token ids of `prompt`, at least one; `tokenizer` may be None where it is token ids.

    Raises UsageError, TokenizerError where there is no tokenizer, TemplateError where there is no chat template.
    """
    if isinstance(prompt, str):
        tokens = _needed(tokenizer, "a text").encode(prompt)
    elif isinstance(prompt, Tokenized):
        tokens = token_ids(prompt.tokens, vocab_size)
    elif is_chat(prompt):
        # The template writes the beginning-of-sequence token itself where the model wants one.
        tokens = _needed(tokenizer, "messages").encode(render(prompt, tokenizer), add_bos=False)
    else:
        tokens = token_ids(prompt, vocab_size)
    if len(tokens) and max(tokens) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer gives token id {max(tokens)} and the model has ids 0 to {vocab_size - 1}: the tokenizer "
            "files are another model's, or the text spells a token that this model was not given"
        )
    if not len(tokens):
        raise UsageError("the prompt is empty and nothing stands before a text of this model; give it some text")
    return list(tokens)


def render(messages: Sequence[Message], tokenizer: Any) -> str:
    """`messages` as the model's chat template writes them, ending where the answer begins."""
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise UsageError(f"message {index} is {message!r:.80}; it must have 'role' and 'content', both text")
    if messages[-1]["role"] == "assistant":
        raise UsageError("the last message is the assistant's; end with the user's, or give a text to continue")
    template = _needed(tokenizer, "messages").chat_template
    if template is None:
        raise TemplateError(
            "this checkpoint has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja), so "
            "messages cannot be written as it was trained on them; plain completion works: give the prompt as a text"
        )
    return template.render([dict(message) for message in messages], add_generation_prompt=True)


def token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """`prompt` as a list of ints, each an id of the vocabulary; UsageError where it is none such."""
    try:
        if isinstance(prompt, bytes | bytearray):  # a list of ints too, but surely meant as a text
            raise TypeError
        tokens = list(prompt)
    except TypeError:
        raise UsageError(
            f"the prompt is {prompt!r:.80}; it must be a text, a list of messages or a list of token ids"
        ) from None
    for index, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise UsageError(f"item {index} of the prompt is {token!r:.80}; it must be a token id, or all be messages")
        if not 0 <= int(token) < vocab_size:
            raise UsageError(f"token {index} is {token}; the vocabulary has ids 0 to {vocab_size - 1}")
    return [int(token) for token in tokens]


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise TokenizerError(f"this checkpoint has no tokenizer, so {what} cannot be encoded; give token ids instead")
    return tokenizer
