"""Writing a shape with random weights as a checkpoint: for load tests, other engines, and the quantizer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tinychat.bench.random_weights import RandomWeights
from tinychat.bench.shapes import Shape
from tinychat.checkpoint import AwqFormat, CheckpointWriter, awq, vectors
from tinychat.checkpoint.inventory import segments
from tinychat.qtensor import AwqWords
from tinychat.weights import Linear, linears


def write(
    shape: Shape, directory: Path | str, *, plain: bool = False, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write a checkpoint of `shape` to `directory`: 4 bits in the AWQ layout, or all of it in fp16 where `plain`.

    It appears whole or not at all; a directory that holds files is refused. progress(done, total) counts layers.
    Raises CheckpointError, and ConfigError for a family that is not implemented.
    """
    config, names = shape.translate()
    with CheckpointWriter(directory) as writer:
        weights = RandomWeights(config, names, None if plain else shape.group_size)
        for done, group in enumerate(_groups(weights)):
            for name, array in group:
                writer.add(name, array)
            if progress:
                progress(min(done, config.n_layers), config.n_layers)
        return writer.finish(shape.hf_config, None if plain else AwqFormat(group_size=shape.group_size))


def _groups(weights: RandomWeights) -> Iterator[Iterator[tuple[str, np.ndarray]]]:
    """Every tensor as the files have it, name and array: those of the embedding, of each layer, and of the end."""
    names = weights.names
    yield iter([(f"{names.embed}.weight", weights.embed())])
    for index in range(weights.config.n_layers):
        yield _layer(weights, index)
    end = [(name, values.astype(np.float16)) for name, values in vectors.of_ends(weights, names)]
    if head := weights.head():
        end.append((f"{names.head}.weight", np.asarray(head.segments[0])))
    yield iter(end)


def _layer(weights: RandomWeights, index: int) -> Iterator[tuple[str, np.ndarray]]:
    config, names, layer = weights.config, weights.names, weights.layer(index)
    for tensor, values in vectors.of_layer(layer, config, names, index):
        yield tensor, values.astype(np.float16)
    for name in linears(config, index):
        linear: Linear = getattr(layer, name)
        first = 0
        for part, segment in zip(segments(config, names, name, index), linear.segments, strict=True):
            module, after = part.module, first + segment.shape[0]
            if isinstance(segment, AwqWords):
                yield from ((f"{module}.{ending}", getattr(segment, ending)) for ending in awq.ENDINGS)
            else:
                yield f"{module}.weight", np.asarray(segment)
            if linear.bias is not None:
                yield f"{module}.bias", linear.bias[first:after].astype(np.float16)
            first = after
