"""How fast a GPU copies its memory, measured in slices between the tokens of a run: what `probe.Probe` is on a CPU.

A copy reads and writes; both count. Its time is the GPU's own, from event to event: a step that was launched ahead of
it does not disturb it.
"""

from __future__ import annotations

import torch

SLICE_BYTES = 1 << 29  # far beyond any cache
COPIES = 2  # of a slice: 2 GiB read and written
READ_BYTES = 4 << 30  # at least, in all


class CopyProbe:
    """Copies one half of a buffer to the other."""

    def __init__(self) -> None:
        free = torch.cuda.mem_get_info()[0]
        self._size = min(SLICE_BYTES, free // 4)
        self._source = torch.ones(self._size, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.samples: list[float] = []  # GB/s

    def read(self) -> float:
        """GB/s of the next slice."""
        began, ended = self._events
        began.record()
        for _ in range(COPIES):
            self._target.copy_(self._source)
        ended.record()
        ended.synchronize()
        speed = 2 * COPIES * self._size / began.elapsed_time(ended) / 1e6
        self.samples.append(speed)
        return speed

    @property
    def bytes_read(self) -> int:
        """And written, so far."""
        return len(self.samples) * 2 * COPIES * self._size

    def complete(self) -> None:
        """Go on until enough has been copied."""
        while self.bytes_read < READ_BYTES:
            self.read()


def last_level_cache() -> int | None:
    """Bytes of the GPU's L2 cache; None where torch does not tell."""
    return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", None)
