"""What can go wrong through no fault of the program: one exception per kind, all `TinychatError`.

The command line prints such an error without a traceback and exits with its `exit_code`.
A message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class TinychatError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 1


class UsageError(TinychatError):
    """A wrong argument: an unknown option value, a number out of its range."""

    exit_code = 2


class ConfigError(TinychatError):
    """`config.json` asks for something that is not implemented, or is damaged."""


class CheckpointError(TinychatError):
    """A file of a checkpoint is missing, damaged, unsafe or not what its header says."""


class TokenizerError(TinychatError):
    """A tokenizer is missing or damaged, or text cannot be encoded."""


class TemplateError(TinychatError):
    """A chat template is missing, refuses the messages, or is unsafe or too slow."""


class BackendError(TinychatError):
    """The device or instruction set asked for is not there."""


class ContextOverflowError(TinychatError):
    """The tokens do not fit in the context."""

    def __init__(self, n_tokens: int, ctx_size: int, max_ctx_size: int):
        super().__init__(
            f"the prompt has {n_tokens} tokens and the context holds {ctx_size}, one of them kept for the answer; "
            + (
                f"shorten the prompt, or load with a larger context (--ctx-size, at most {max_ctx_size})"
                if max_ctx_size > ctx_size
                else "that is all this model can hold: shorten the prompt"
            )
        )
        self.n_tokens = n_tokens
        self.ctx_size = ctx_size
