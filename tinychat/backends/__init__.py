"""Backends: one file per device, found by its name; each turns a `WeightSource` into a `Runner`.

A backend module has `available() -> str | None` (None, or why it cannot be used), `describe(threads) -> str` (one line:
what runs), `FOOTPRINT` (what it takes in memory, see `memory`) and `build(source, **options) -> Runner`. One of a
device that most machines lack has `present() -> bool` (whether it seems to be there), one with memory of its own
`free_bytes() -> int | None`. `reference` is the specification; the others are checked against it, op by op and model by
model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np

from tinychat import memory
from tinychat.cache import KVCache, Rows
from tinychat.config import ModelConfig
from tinychat.errors import BackendError
from tinychat.sampling import SamplingParams

PREFERENCE = ("cuda", "cpu", "reference")  # what "auto" tries, in order
FASTEST = "the fastest available"


class Runner(Protocol):
    """A model ready to run on one device."""

    config: ModelConfig
    cache: KVCache
    weight_bytes: int  # of the packed weights, resident

    def step(self, rows: Rows) -> np.ndarray:
        """Run `rows` (see `cache.py`), extend the cache, return fp32 logits [len(rows.wanted), vocab_size]."""
        ...


@runtime_checkable
class DrawingRunner(Protocol):
    """A `Runner` that can draw the next token where the logits are, so that they need not come to Python.

    draws_ahead  a token's step may have run before it is asked for
    """

    draws_ahead: bool

    def drawing(self, slot: int, params: SamplingParams, rng: np.random.Generator) -> Callable[[int], int] | None:
        """A function that runs a token at the end of `slot` and returns the next, or -1 where logits are not finite.

        It extends the cache as `step` does, and serves until the next call of `drawing`. `rng` is its own from now on.
        None where these params need the logits.
        """
        ...


def backend(name: str) -> ModuleType:
    """The module of backend `name`; BackendError where there is none or it cannot run here."""
    if name not in PREFERENCE:
        raise BackendError(f"no backend {name!r}; there are: auto, {', '.join(PREFERENCE)}")
    module = importlib.import_module(f"tinychat.backends.{name}")
    if reason := module.available():
        raise BackendError(f"backend {name!r} cannot be used here: {reason}")
    return module


def name_of(module: ModuleType) -> str:
    """What a backend module is called in `PREFERENCE`."""
    return module.__name__.rpartition(".")[2]


def free_bytes(module: ModuleType) -> int | None:
    """Bytes left of the memory that a backend keeps models in; None where nobody knows."""
    found: int | None = getattr(module, "free_bytes", memory.available)()
    return found


def choose(device: str = "auto") -> tuple[ModuleType, str]:
    """(backend module, why): the one asked for, or the first of `PREFERENCE` that runs here.

    `why` is FASTEST unless one before it could not be used although its device seems to be there.
    """
    if device != "auto":
        return backend(device), "asked for"
    reasons: list[str] = []
    for name in PREFERENCE:
        module = importlib.import_module(f"tinychat.backends.{name}")
        reason = module.available()
        if reason is None:
            return module, "; ".join(reasons) or FASTEST
        if getattr(module, "present", lambda: True)():
            reasons.append(f"{name} not used: {reason}")
    raise BackendError("no backend can be used here: " + "; ".join(reasons))
