"""What the CUDA backend keeps on the device beside weights: the KV cache, rotary angles, and what a step is told.

Positions and slots are tensors of the device, so that a captured step serves every later token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tinychat import rope
from tinychat.cache import KVCache, Rows
from tinychat.config import ModelConfig, Rope, RopeScaling

_VECTOR = 8  # numbers that a lane reads of an entry
_TORCH = {np.dtype(np.float16): torch.float16, np.dtype(np.int8): torch.int8, np.dtype(np.float32): torch.float32}


class DeviceCache(KVCache):
    """A `KVCache` in tensors of a device, each entry padded with zeros to whole vectors of 8 numbers.

    head_dim  of an entry; `keys` and `values` are [n_layers, n_slots, n_kv_heads, capacity, padded]
    """

    def __init__(self, config: ModelConfig, n_slots: int, capacity: int, dtype: str, device: torch.device):
        """`dtype` fp16 or int8."""
        self._device = device
        self.head_dim = config.head_dim
        self.padded = -(-config.head_dim // _VECTOR) * _VECTOR
        super().__init__(config.n_layers, n_slots, config.n_kv_heads, capacity, self.padded, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """See `KVCache`."""
        return torch.zeros(shape, dtype=_TORCH[np.dtype(dtype)], device=self._device)

    def given(self, entries: np.ndarray) -> Any:
        """See `KVCache`; [..., padded], what lies past head_dim is taken for zeros."""
        tensor = torch.from_numpy(np.ascontiguousarray(entries)).to(self._device)
        tensor[..., self.head_dim :] = 0
        return tensor

    def entries(self, index: int, slot: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slot's first positions in layer `index`, [n_kv_heads, length, padded] in `dtype`."""
        found = []
        for codes, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            part = codes[index, slot, :, :length]
            if scales is not None:
                part = part * scales[index, slot, :, :length, None]
            found.append(part.to(dtype))
        return found[0], found[1]


Angles = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # cosines, sines fp32 [n, dim / 2]; int64 [T]: the row of each


class DeviceAngles:
    """Cosines and sines by position, on the device."""

    def __init__(self, ropes: Sequence[Rope], capacity: int, device: torch.device):
        """For positions below `capacity`, each the last of its slot: what a decoded token has, under every scaling."""
        self._ropes = tuple(ropes)
        self._device = device
        known = np.arange(capacity, dtype=np.int32)
        self._tables = [self._sent(rope.angles(table, known, known + 1)) for table in self._ropes]

    def alone(self, positions: torch.Tensor) -> tuple[Angles, ...]:
        """Of rows that are each the last of their slot."""
        return tuple((cos, sin, positions) for cos, sin in self._tables)

    def of_rows(self, rows: Rows, lengths: np.ndarray, positions: torch.Tensor) -> tuple[Angles, ...]:
        """Of any rows; `lengths` [n_slots]: of the slots after the step."""
        found: list[Angles] = []
        for table, (cos, sin) in zip(self._ropes, self._tables, strict=True):
            by_length = table.scaling in (RopeScaling.DYNAMIC, RopeScaling.LONGROPE)
            seq_lens = lengths[rows.slots]
            if by_length and len(rows) and seq_lens.max() > table.original_max_positions:
                made = self._sent(rope.angles(table, rows.positions, seq_lens))
                found.append((*made, torch.arange(len(rows), device=self._device)))
            else:
                found.append((cos, sin, positions))
        return tuple(found)

    def _sent(self, angles: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (torch.from_numpy(np.ascontiguousarray(values)).to(self._device) for values in angles)
        return cos, sin


@dataclass(frozen=True)
class Stretch:
    """Rows [begin, end) of a step: consecutive tokens of one slot from position `start`."""

    begin: int
    end: int
    slot: int
    start: int


@dataclass(frozen=True, eq=False)
class DeviceContext:
    """What attention wants to know of a step.

    positions, slots  int64 [T] on the device
    angles            of each of the config's `ropes`
    stretches         of all rows; None where each row is the only one of its slot, as while decoding
    masks             made for a stretch in one layer, and used again in the next that wants the same
    """

    positions: torch.Tensor
    slots: torch.Tensor
    angles: tuple[Angles, ...]
    cache: DeviceCache
    stretches: tuple[Stretch, ...] | None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)


def stretches(rows: Rows) -> tuple[Stretch, ...] | None:
    """The runs of rows of one slot, or None where no slot has more than one row. A slot's rows are in order, but others
    may lie between them: then it has several."""
    if len(np.unique(rows.slots)) == len(rows):
        return None
    ends = [*(np.flatnonzero(np.diff(rows.slots)) + 1).tolist(), len(rows)]
    found, begin = [], 0
    for end in ends:
        found.append(Stretch(begin, end, int(rows.slots[begin]), int(rows.positions[begin])))
        begin = end
    return tuple(found)
