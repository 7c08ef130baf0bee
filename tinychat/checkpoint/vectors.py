"""What a model has beside its linears, the embedding and the head, as files have it: norms, positions, projections.

Names and shapes follow from config and names; a norm that a family counts from 1 is stored as what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig
from tinychat.weights import ROW_NORMS, Layer, WeightSource, norm_sizes


def vectors(config: ModelConfig, names: TensorNames, layer: int) -> dict[str, tuple[str, int]]:
    """Tensor and length of those norms of `layer` that files have, by their canonical names."""
    sizes = norm_sizes(config)
    stored = [name for name in sizes if config.norm_weight or name not in ROW_NORMS]
    return {name: (names.vector(name, layer), sizes[name]) for name in stored}


def ends(config: ModelConfig, names: TensorNames) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor and shape of what `weights.Ends` has, by its fields, and of the final norm as final_norm(_bias)."""
    c = config
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    if c.position_offset is not None:
        found["positions"] = f"{names.positions}.weight", (c.position_offset + c.max_positions, c.hidden_size)
    norms = {"norm": names.embed_norm} if c.embed_norm else {}
    if c.block is not Block.POST_NORM:
        norms["final_norm"] = names.norm
    for name, module in norms.items():
        if c.norm_weight:
            found[name] = f"{module}.weight", (c.hidden_size,)
        if c.norm_bias:
            found[f"{name}_bias"] = f"{module}.bias", (c.hidden_size,)
    if c.table_width != c.hidden_size:
        found["project_in"] = f"{names.project_in}.weight", (c.hidden_size, c.table_width)
        found["project_out"] = f"{names.project_out}.weight", (c.table_width, c.hidden_size)
    return found


def of_layer(layer: Layer, config: ModelConfig, names: TensorNames, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor, its values, fp32) of the norms of `layer`."""
    for name, (tensor, _) in vectors(config, names, index).items():
        yield tensor, _stored(getattr(layer, name), tensor, names)


def of_ends(source: WeightSource, names: TensorNames) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor, its values) of everything in `ends`."""
    there = source.ends()
    for name, (tensor, _) in ends(source.config, names).items():
        if name.startswith("final_norm"):
            values = source.norm() if name == "final_norm" else source.norm_bias()
        elif name.startswith("project"):
            values = getattr(there, name).segments[0]
        else:
            values = getattr(there, name)
        if values is None:
            raise ValueError(f"{tensor}: the config says that there is one")
        yield tensor, values if name == "positions" else _stored(values, tensor, names)


def _stored(values: np.ndarray, tensor: str, names: TensorNames) -> np.ndarray:
    weight = values.ndim == 1 and tensor.endswith(".weight")
    return values - np.float32(names.norm_offset) if weight and names.norm_offset else values
