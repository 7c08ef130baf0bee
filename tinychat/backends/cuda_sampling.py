"""The next token drawn where the logits are: what `sampling.sample` does without penalties, as operations of a device.

Nothing here looks at a value, so that a graph may capture it. The random numbers are the request's own, drawn by numpy
and sent ahead, so that a seed gives the same tokens on every backend, as far as their logits agree.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from tinychat.backends.cuda_linear import stream
from tinychat.sampling import SamplingParams

Tensor = torch.Tensor

AHEAD = 256  # random numbers sent at a time


class DeviceSampler:
    """Draws from logits [1, vocab_size]; one request at a time.

    reported  int64 [1]: what `draw` drew last, or -1 where the logits were not finite
    """

    def __init__(self, kernels: ModuleType, device: torch.device):
        """`kernels` and `device` as of `cuda_ops.CudaOps`."""
        self._kernels: Any = kernels
        self.reported = torch.zeros(1, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(AHEAD, dtype=torch.float64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._settings = torch.zeros(3, dtype=torch.float64, device=device)  # temperature, top_p, min_p
        self._params = SamplingParams(temperature=0.0)
        self._rng = np.random.default_rng(0)
        self._left = 0

    def begin(self, params: SamplingParams, rng: np.random.Generator) -> None:
        """From now on draw as `params` say, by numbers from `rng`."""
        self._params, self._rng, self._left = params, rng, 0
        settings = torch.tensor([params.temperature, params.top_p, params.min_p], dtype=torch.float64)
        self._settings.copy_(settings, non_blocking=True)

    def provide(self) -> None:
        """Before each draw, outside of any graph: see that there is a random number."""
        if self._params.greedy:
            return
        if not self._left:
            self._numbers.copy_(torch.from_numpy(self._rng.random(AHEAD)), non_blocking=True)
            self._place.zero_()
            self._left = AHEAD
        self._left -= 1

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What a draw changes beside its result."""
        return (self._place,)

    @property
    def kind(self) -> tuple[bool, int, bool, bool]:
        """What of `params` shapes the operations; all else is read from the device."""
        p = self._params
        return (True, 0, False, False) if p.greedy else (False, p.top_k, p.top_p < 1, p.min_p > 0)

    def draw(self, logits: Tensor, token: Tensor, position: Tensor) -> None:
        """The next token of fp32 logits [1, vocab_size], into `token`, at the next `position`, int64 [1] both."""
        greedy, top_k, nucleus, least = self.kind
        row = logits[0]
        if greedy and row.data_ptr() % 16 == 0 and row.is_contiguous():
            places = self.reported.data_ptr(), token.data_ptr(), position.data_ptr()
            self._kernels.greedy(row.data_ptr(), len(row), *places, stream(row.device))
            return
        drawn = row.argmax() if greedy else self._drawn(row, top_k, nucleus, least)
        token.copy_(drawn.reshape(1))
        position.add_(1)
        self.reported.copy_(torch.where(torch.isfinite(row).all(), drawn, -1).reshape(1))

    def _drawn(self, row: Tensor, top_k: int, nucleus: bool, least: bool) -> Tensor:
        """See `sampling.candidates`: tokens that a filter takes away keep their place, at a weight of 0."""
        temperature, top_p, min_p = self._settings.unbind()
        ids: Tensor | None = None
        if 0 < top_k < len(row):
            row, ids = _largest(row, top_k)
        elif nucleus:
            row, ids = torch.sort(row, descending=True, stable=True)
        weights = torch.exp((row.double() - row.max()) / temperature)
        if nucleus:
            sums = torch.cumsum(weights, 0)
            before = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
            weights = torch.where(before < top_p * sums[-1], weights, 0.0)
        if least:
            weights = torch.where(weights >= min_p * weights.max(), weights, 0.0)
        sums = torch.cumsum(weights, 0)
        number = self._numbers.index_select(0, self._place)
        self._place += 1
        place = torch.searchsorted(sums, number * sums[-1], right=True).clamp(max=len(row) - 1)
        return (place if ids is None else ids.index_select(0, place)).reshape(())


def _largest(row: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of fp32 [n], descending, ties to the lower index, and their indices: topk leaves ties to chance."""
    bits = (row + 0.0).view(torch.int32).long()  # -0 is 0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats have sign and size
    last = len(row) - 1
    keys = (order << 32) | (last - torch.arange(len(row), device=row.device))
    ids = last - (torch.topk(keys, k).values & 0xFFFFFFFF)
    return row.index_select(0, ids), ids
