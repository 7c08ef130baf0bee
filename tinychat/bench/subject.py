"""What is measured: a checkpoint, or a published shape with random weights, and the options it is loaded with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinychat import backends, checkpoint, engine, memory
from tinychat.bench import shapes
from tinychat.bench.random_weights import RandomWeights
from tinychat.config import ModelConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """Of `tinychat bench`, but for those of a single run; plain data, as it crosses into other processes.

    model, shape  one of them
    bits          of the shape's weights
    group_size    of the shape's weights; None: as its published 4-bit version has it
    tokens        to generate; None: 200, or what the model's context holds
    contexts      at which to decode; None: those of 0, 2k, 8k and 32k that the model and the memory allow
    min_probe     GB/s; where the probe reads less, it is reported as invalid
    """

    model: str | None = "pebble"
    shape: str | None = None
    bits: int = 4
    group_size: int | None = None
    device: str = "auto"
    ctx_size: int | None = None
    kv_dtype: str = "fp16"
    activations: int = 16
    head: int | None = None
    repeats: int = 3
    tokens: int | None = None
    contexts: tuple[int, ...] | None = None
    min_probe: float | None = None
    revision: str | None = None
    offline: bool = False
    ignore_config: tuple[str, ...] = ()


class Subject:
    """A model to measure; `load` makes an engine of it, as often as it is asked to.

    name     as the user gave it
    weights  what they are, in words
    source   a checkpoint that is open, or random weights
    backend  the module that will run it
    """

    def __init__(self, options: Options):
        self.options = options
        self.source: RandomWeights | checkpoint.Checkpoint
        self.backend: ModuleType = backends.choose(options.device)[0]
        if options.shape is not None:
            shape = shapes.find(options.shape)
            group = options.group_size or shape.group_size
            self.source = RandomWeights(*shape.translate(), group, options.bits)
            self.name, self.weights = options.shape, f"random weights, {options.bits}-bit g{group}"
        else:
            self.name = str(options.model)
            path = checkpoint.locate(self.name, revision=options.revision, offline=options.offline)
            self.source = checkpoint.open(path, ignore_config=options.ignore_config)
            self.weights = engine.precision(self.source)

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.source.config

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU runs it, and its memory is what is probed."""
        return backends.name_of(self.backend) == "cuda"

    @property
    def head(self) -> int:
        """Bits of the output head, as `engine.load` decides them."""
        return engine.head_bits(self.options.head, self.source.n_quantized)

    @property
    def activations(self) -> int:
        """Bits that activations keep."""
        return engine.activation_bits(self.options.activations, self.source.n_quantized, self.head)

    @property
    def limit(self) -> int:
        """Positions that the model can use."""
        return engine.max_context_size(self.config)

    @property
    def free(self) -> int | None:
        """Bytes left of the memory that will hold it; None where nobody knows."""
        return backends.free_bytes(self.backend)

    def memory(self, ctx_size: int) -> dict[str, int]:
        """See `memory.estimate`."""
        kv_dtype = self.options.kv_dtype
        return memory.needed(self.source, self.backend.FOOTPRINT, ctx_size, head=self.head, kv_dtype=kv_dtype)

    def load(self, ctx_size: int, threads: int | None, progress: Progress | None = None) -> engine.Engine:
        """An engine with a context of `ctx_size`. Raises what `engine.load` does.

        A shape has no context that would end: past its model's limit, random weights are as fast as before it.
        """
        o = self.options
        if isinstance(self.source, RandomWeights):
            memory.check(self.memory(ctx_size), ctx_size, self.free)
            runner = self.backend.build(
                self.source,
                ctx_size=ctx_size,
                threads=threads,
                kv_dtype=o.kv_dtype,
                activations=o.activations,
                head=self.head,
                progress=progress,
            )
            return engine.Engine(runner)
        return engine.load(
            self.name,
            device=o.device,
            ctx_size=ctx_size,
            threads=threads,
            kv_dtype=o.kv_dtype,
            activations=o.activations,
            head=self.head,
            revision=o.revision,
            offline=o.offline,
            ignore_config=o.ignore_config,
            progress=progress,
        )

    def facts(self) -> dict[str, Any]:
        """For the report: what was measured."""
        return {"model": self.name, "weights": self.weights, "n_parameters": self.source.n_parameters}
