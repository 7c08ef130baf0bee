"""Architectures: one small data-only file per model family, found by its `model_type`. The directory is the registry.

A family's file has `NAMES` (its checkpoint's tensor names, see `names.py`), where they depend on the config also
`names(config)`, and `translate(reader) -> ModelConfig`, which reads config.json through a `ConfigReader`: what it does
not read and `config_reader.py` does not list as harmless is refused. `ALSO` is other model_types it is found by. Its
docstring begins with "<checkpoints>: <what is special>.", which is the family's row in the table of `described`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig
from tinychat.errors import ConfigError


def supported() -> list[str]:
    """The `model_type` of every family there is a file for."""
    return [name for name in _files() if hasattr(_load(name), "NAMES")]


@dataclass(frozen=True)
class Family:
    """A row of the table of families. `also`: other model_types of it."""

    model_type: str
    also: tuple[str, ...]
    checkpoints: str
    special: str


def described() -> list[Family]:
    """What every family's file says of itself."""
    rows = []
    for name in supported():
        module = _load(name)
        checkpoints, _, special = " ".join((module.__doc__ or "").split("\n\n")[0].split()).partition(": ")
        rows.append(Family(name, getattr(module, "ALSO", ()), checkpoints, special.rstrip(".")))
    return rows


def find(model_type: str) -> ModuleType:
    """The file of a family; ConfigError, listing those there are, where there is none."""
    if model_type in _files() and hasattr(module := _load(model_type), "NAMES"):
        return module
    for name in supported():
        if model_type in getattr(_load(name), "ALSO", ()):
            return _load(name)
    raise ConfigError(
        f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(supported())}"
    )


def translate(hf_config: dict[str, Any], ignore: Collection[str] = ()) -> tuple[ModelConfig, TensorNames]:
    """Hugging Face's config.json, parsed, as (ModelConfig, tensor names).

    Keys in `ignore` (a key of `rope_scaling` as "rope_scaling.key") are treated as absent. Raises ConfigError for an
    unknown model_type, a key that is neither translated nor harmless, and a value that is missing or not possible.
    """
    reader = ConfigReader(hf_config, ignore)
    family = find(reader.text("model_type"))
    config = family.translate(reader)
    reader.finish()
    return config, family.names(config) if hasattr(family, "names") else family.NAMES


def _files() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
