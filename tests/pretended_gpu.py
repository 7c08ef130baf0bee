"""A GPU, pretended: tensors of the device "cuda" that compute on the CPU, and refuse to meet the CPU's own.

Code that leaves a tensor behind fails within `pretended()` as it would on a GPU, and code that does not returns what
the CPU does, to the last bit. What a real one allows is allowed: tensors without dimensions may come from the CPU,
`copy_` goes from one to the other. Indices from the CPU, which a GPU fetches with a delay, are refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
_WITHIN = torch.device("meta")  # what PyTorch's own code takes it for: it is built with no guard for a GPU
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Pretended(torch.Tensor):
    """A tensor of `DEVICE`; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # there are no views within it of what was made outside
            made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=_WITHIN)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, given=(), more=None):
        return _run(function, given, more or {})

    @property
    def device(self):
        """Where it pretends to be."""
        return DEVICE

    def tolist(self):
        """PyTorch has none of such classes."""
        return self.held.tolist()


class _Everything(TorchDispatchMode):
    """Sees what has no tensor of `DEVICE` among its arguments: what is made there, or brought."""

    @classmethod
    def _should_skip_dynamo(cls):
        """There is none to skip, and skipping takes longer than all the rest."""
        return False

    def __torch_dispatch__(self, function, types, given=(), more=None):
        return _run(function, given, more or {})


@contextmanager
def pretended(free_bytes: int = 1 << 30) -> Iterator[torch.device]:
    """`DEVICE`, with so much memory, to be used within."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device=DEVICE) then is a copy that can be seen
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "current_device": 0,
        "get_device_name": "pretended",
        "mem_get_info": (free_bytes, free_bytes),
    }
    known = {name: mock.Mock(return_value=answer) for name, answer in answers.items()}
    try:
        with mock.patch.multiple(torch.cuda, **known), mock.patch.object(torch.version, "cuda", "0"), _Everything():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(function: Any, given: Any, more: dict[str, Any]) -> Any:
    met: list[torch.Tensor] = []
    _each(met.append, (given, more))
    there = [x for x in met if isinstance(x, Pretended)]
    here = [x for x in met if not isinstance(x, Pretended) and x.dim()]
    if there and here and function not in COPIES:
        raise RuntimeError(f"{function}: tensors on {DEVICE} and on the CPU: {[tuple(x.shape) for x in met]}")
    wanted = more.get("device")
    goes_there = bool(there) if wanted is None else torch.device(wanted).type in (DEVICE.type, _WITHIN.type)
    if function is torch.ops.aten.copy_.default:
        goes_there = isinstance(given[0], Pretended)
    held, options = _each(_held, given), _each(_held, more)
    if wanted is not None:
        options["device"] = torch.device("cpu")
    made = function(*held, **options)
    if not goes_there:
        return made
    changed = {id(x.held): x for x in there}  # what is changed in its place stays what it is
    return _each(lambda x: changed[id(x)] if id(x) in changed else Pretended(x), made)


def _held(x: torch.Tensor) -> torch.Tensor:
    return x.held if isinstance(x, Pretended) else x


def _each(change: Callable[[torch.Tensor], Any], values: Any) -> Any:
    """`values` with each tensor among them changed."""
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, tuple | list):
        return type(values)([_each(change, value) for value in values])
    if isinstance(values, dict):
        return {name: _each(change, value) for name, value in values.items()}
    return values
