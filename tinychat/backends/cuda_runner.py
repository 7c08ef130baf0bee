"""A model on a GPU: prompts through the decoder as they come, decoded tokens through a graph that is captured once.

Decoding is one launch a token. What changes from token to token lies in tensors of the device: the step itself moves
the position on and puts the token it drew where the next step reads it. So a step can be launched before the host has
seen the token that it continues: the GPU computes the next token while Python spells out the last.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tinychat.backends.cuda_cache import DeviceCache, DeviceContext
from tinychat.backends.cuda_ops import CudaOps
from tinychat.backends.cuda_sampling import DeviceSampler
from tinychat.cache import Rows
from tinychat.decoder import Decoder
from tinychat.sampling import SamplingParams
from tinychat.weights import RoundedHead, WeightSource

_DRAWS = 8  # kinds of draws whose graphs are kept
_WARM = 2  # runs before a capture: what libraries allocate at their first call does not belong into a graph


def build_on(
    kernels: ModuleType,
    device: torch.device,
    source: WeightSource,
    *,
    ctx_size: int,
    n_slots: int = 1,
    kv_dtype: str = "fp16",
    head: int = 16,
    dtype: str | None = None,
    graphs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CudaRunner:
    """See `cuda.build`; `kernels` and `device` as of `CudaOps`."""
    config = source.config
    if dtype is None:
        multiplied = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bf16" if config.dtype == "bfloat16" and multiplied else "fp16"
    if head == 8:
        source = RoundedHead(source)
    cache = DeviceCache(config, n_slots, ctx_size, kv_dtype, device)
    with torch.inference_mode():
        ops = CudaOps(kernels, config, cache, torch.bfloat16 if dtype == "bf16" else torch.float16)
        decoder = Decoder(source, ops, cache, progress)
    source.release()
    return CudaRunner(decoder, ops, cache, graphs)


class CudaRunner:
    """A `Runner` (see `backends`) of a decoder on one device; one step at a time."""

    draws_ahead = True
    prefill_chunk = 4096  # rows: a prompt of this length is one stretch, which torch's attention masks without a mask

    def __init__(self, decoder: Decoder, ops: CudaOps, cache: DeviceCache, graphs: bool):
        self.config = decoder.config
        self.cache = cache
        self.weight_bytes = decoder.weight_bytes
        self._decoder = decoder
        self._ops = ops
        self.on_gpu = ops.device.type == "cuda"
        self.sampler = DeviceSampler(ops.kernels, ops.device)
        self._graphs = graphs and self.on_gpu
        if self._graphs and self.config.experts is not None:
            self._graphs = False
            warnings.warn(
                "a mixture of experts decodes without CUDA graphs: which experts run is known to the host alone; slow",
                RuntimeWarning,
                stacklevel=2,
            )
        self._steps: dict[int, DecodeStep] = {}
        self._draws: dict[tuple, Captured] = {}
        if self._graphs:
            with torch.inference_mode(), self.here():
                # Captured at load, on an empty cache, not while the first token is waited for.
                for params in (SamplingParams(temperature=0.0), SamplingParams()):
                    self.sampler.begin(params, np.random.default_rng(0))
                    self.single.tell(*np.zeros((3, 1), np.int64))
                    self.run_and_draw()

    @torch.inference_mode()
    def step(self, rows: Rows) -> np.ndarray:
        """Run `rows`, extend the cache, return fp32 logits [len(rows.wanted), vocab_size].

        Raises ValueError where the rows do not continue their slots, or a token is not in the vocabulary.
        """
        with self.here():
            return self._step(rows)

    def _step(self, rows: Rows) -> np.ndarray:
        n = len(rows)
        alone = len(np.unique(rows.slots)) == n
        every = np.array_equal(rows.wanted, np.arange(n))
        if not (self._graphs and rows.tokens is not None and n and alone and every):
            return self._decoder.step(rows)
        lengths = self.cache.check(rows)
        self.check(rows.tokens)
        step = self._decode_step(n)
        step.tell(rows.tokens, rows.positions, rows.slots)
        step.run()
        self.cache.lengths[:] = lengths
        return step.logits.cpu().numpy()

    def here(self) -> AbstractContextManager[Any]:
        """The runner's device as the thread's own, whichever that was: kernels go to the current one."""
        return torch.cuda.device(self._ops.device) if self.on_gpu else nullcontext()

    def drawing(self, slot: int, params: SamplingParams, rng: np.random.Generator) -> Callable[[int], int] | None:
        """A function that runs a token at the end of `slot` and draws the next one, on the device: see `backends`."""
        return None if params.needs_logits else Drawing(self, slot, params, rng)

    def check(self, tokens: np.ndarray) -> None:
        """ValueError where a token is not in the vocabulary."""
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")

    def _decode_step(self, n: int) -> DecodeStep:
        if n not in self._steps:
            self._steps[n] = DecodeStep(self._decoder, self._ops, self.cache, n, self._graphs)
        return self._steps[n]

    def run_and_draw(self) -> None:
        """The step of one row, as it stands told, and a draw from its logits; then it stands told of the next."""
        step, sampler = self.single, self.sampler
        step.run()
        sampler.provide()
        if sampler.kind not in self._draws:
            if len(self._draws) >= _DRAWS:
                del self._draws[next(iter(self._draws))]

            def draw() -> None:
                sampler.draw(step.logits, step.tokens, step.positions)

            self._draws[sampler.kind] = Captured(draw, self._graphs, (step.tokens, step.positions, *sampler.state))
        self._draws[sampler.kind].run()

    @property
    def single(self) -> DecodeStep:
        """The step of one row."""
        return self._decode_step(1)


class Captured:
    """Operations of the device, captured at their first run and replayed from then on: one launch for all.

    run    what they are; it looks at no value on the host
    state  tensors that a run reads and changes: runs before the capture leave them as they were
    """

    def __init__(self, run: Callable[[], None], graphs: bool, state: tuple[torch.Tensor, ...] = ()):
        """Without `graphs` each run is a plain one."""
        self._operations = run
        self._graphs = graphs
        self._state = state
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """Once."""
        if not self._graphs:
            self._operations()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self._operations()
        torch.cuda.current_stream().wait_stream(aside)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # else torch's own, which is of the first device that captured
            self._operations()
        return graph


class DecodeStep:
    """The decoder on n rows, each alone on its slot. Its tensors stay where they are.

    tokens, positions, slots  int64 [n]: what the next run reads
    logits                    fp32 [n, vocab_size]: what the last run left
    """

    def __init__(self, decoder: Decoder, ops: CudaOps, cache: DeviceCache, n: int, graphs: bool):
        self._told = torch.zeros(3, n, dtype=torch.int64, device=ops.device)
        self.tokens, self.positions, self.slots = self._told.unbind()
        self.logits = torch.zeros(n, decoder.config.vocab_size, dtype=torch.float32, device=ops.device)
        context = DeviceContext(self.positions, self.slots, ops.angles.alone(self.positions), cache, None)

        def forward() -> None:
            self.logits.copy_(decoder.forward(decoder.enter(self.tokens, self.positions), context))

        # A run may be repeated: it writes the same entries to the cache.
        self._captured = Captured(forward, graphs)

    def tell(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> None:
        """The rows of the next run, integers [n] each."""
        rows = torch.from_numpy(np.stack([tokens, positions, slots]).astype(np.int64))
        self._told.copy_(rows.pin_memory() if self._told.is_cuda else rows, non_blocking=True)

    def run(self) -> None:
        """The cache is extended by the rows told."""
        self._captured.run()


class Drawing:
    """One request's tokens, drawn on the device; the next step is launched before the host asks for it."""

    def __init__(self, runner: CudaRunner, slot: int, params: SamplingParams, rng: np.random.Generator):
        self._runner = runner
        self._slot = slot
        on_gpu = runner.on_gpu
        self._places = [torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self._events = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self._launches = 0
        self._ahead: tuple[int, int] | None = None  # (token, position) that a step was launched for already
        with torch.inference_mode(), runner.here():
            runner.sampler.begin(params, rng)

    @torch.inference_mode()
    def __call__(self, token: int) -> int:
        """Run `token` at the end of the slot; the token drawn after it, or -1 where the logits are not finite."""
        with self._runner.here():
            return self._next(token)

    def _next(self, token: int) -> int:
        runner, cache = self._runner, self._runner.cache
        rows = Rows.of([token], int(cache.lengths[self._slot]), self._slot)
        lengths = cache.check(rows)
        at = int(rows.positions[0])
        if self._ahead != (token, at):
            tokens = np.array([token])
            runner.check(tokens)
            runner.single.tell(tokens, rows.positions, rows.slots)
            self._launch()
        mine = (self._launches - 1) % 2
        ahead = at + 1 < cache.capacity
        if ahead:
            self._launch()
        event = self._events[mine]
        if event is not None:
            event.synchronize()
        cache.lengths[:] = lengths
        drawn = int(self._places[mine])
        self._ahead = (drawn, at + 1) if ahead else None
        return drawn

    def _launch(self) -> None:
        self._runner.run_and_draw()
        which = self._launches % 2
        self._places[which].copy_(self._runner.sampler.reported, non_blocking=True)
        event = self._events[which]
        if event is not None:
            event.record()
        self._launches += 1
