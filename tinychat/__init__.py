"""tinychat: 4-bit language models on the device in front of you.

    import tinychat
    llm = tinychat.load("pebble")
    print(tinychat.generate(llm, "Once upon a time", max_tokens=64).text)

Importing this module is nearly free: each public name is imported from its home when it is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinychat.engine import Engine as Engine
    from tinychat.engine import generate as generate
    from tinychat.engine import load as load
    from tinychat.engine import stream as stream
    from tinychat.errors import TinychatError as TinychatError
    from tinychat.evaluation.evaluate import Evaluation as Evaluation
    from tinychat.evaluation.evaluate import evaluate as evaluate
    from tinychat.results import Piece as Piece
    from tinychat.results import Result as Result
    from tinychat.sampling import SamplingParams as SamplingParams

# Python started inside a clone finds the sources first, which hold no compiled kernels; those installed serve them too.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"

_HOMES = {
    "load": "engine",
    "generate": "engine",
    "stream": "engine",
    "evaluate": "evaluation.evaluate",
    "Engine": "engine",
    "Evaluation": "evaluation.evaluate",
    "Piece": "results",
    "Result": "results",
    "SamplingParams": "sampling",
    "TinychatError": "errors",
}

__all__ = [
    *("Engine", "Evaluation", "Piece", "Result", "SamplingParams", "TinychatError"),
    *("evaluate", "generate", "load", "quantize", "stream"),
]


def __getattr__(name: str) -> Any:
    if name == "quantize":  # a package, and callable: see there
        return importlib.import_module("tinychat.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module 'tinychat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tinychat.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
