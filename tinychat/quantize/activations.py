"""Calibration activations: tokens carried through the unquantized model block by block, and what each linear sees.

The inputs of a block are those of the unquantized model, as in all published implementations of AWQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tinychat.config import ModelConfig
from tinychat.decoder import Context, PackedLayer, block
from tinychat.errors import CheckpointError
from tinychat.quantize.dense import Dense, DenseOps
from tinychat.quantize.grid import as_float

CHUNK_TOKENS = 4096  # run at once: bounds the memory of intermediate activations


@dataclass(frozen=True, eq=False)
class Sample:
    """What one chunk of sequences, kept whole for the searches, looks like inside a block."""

    context: Context
    x: torch.Tensor  # the block's input, fp32 [T, hidden_size]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of each canonical linear, [T, K]


@dataclass(frozen=True, eq=False)
class Observed:
    """What the linears of one block see: mean |x| of each channel over all tokens, and samples of the inputs."""

    magnitude: dict[str, torch.Tensor]  # fp32 [K], by canonical linear
    samples: list[Sample]

    def rows(self, linear: str) -> torch.Tensor:
        """All sampled inputs of a linear, [T, K]."""
        return torch.cat([sample.inputs[linear] for sample in self.samples])


class Activations:
    """The calibration tokens at the entrance of a block; `advance` takes them through it."""

    def __init__(
        self, config: ModelConfig, embedding: np.ndarray, sequences: Sequence[Sequence[int]], sample_tokens: int
    ):
        """At most about `sample_tokens` tokens, in whole sequences spread over the calibration set, are sampled."""
        self._config = config
        chosen = _spread(sequences, sample_tokens)
        self._chunks: list[tuple[slice, Context, bool]] = []
        ids: list[int] = []
        for sampled in (True, False):
            part = [s for s, is_chosen in zip(sequences, chosen, strict=True) if is_chosen == sampled]
            for chunk in _chunks(part):
                begin = len(ids)
                ids += [token for sequence in chunk for token in sequence]
                context = Context.of_sequences(config.rope, [len(sequence) for sequence in chunk])
                self._chunks.append((slice(begin, len(ids)), context, sampled))
        self._x = as_float(embedding[np.asarray(ids)])  # [tokens, hidden_size]

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration set."""
        return len(self._x)

    @property
    def state(self) -> np.ndarray:
        """What `resume` wants: fp32 [tokens, hidden_size]."""
        return self._x.numpy()

    def resume(self, state: np.ndarray) -> None:
        """Stand where the activations of the same sequences stood when their `state` was this."""
        self._x = torch.from_numpy(state)

    @torch.inference_mode()
    def advance(self, layer: PackedLayer, index: int) -> Observed:
        """Run block `index` on all tokens and say what its linears saw. CheckpointError where they are not finite."""
        totals: dict[str, torch.Tensor] = {}
        samples: list[Sample] = []
        for rows, context, sampled in self._chunks:
            sample = Sample(context, self._x[rows].clone()) if sampled else None

            def watch(linear: Dense, x: torch.Tensor, sample: Sample | None = sample) -> None:
                total = x.abs().sum(0, dtype=torch.float64)
                totals[linear.name] = totals[linear.name] + total if linear.name in totals else total
                if sample:
                    sample.inputs[linear.name] = x

            self._x[rows] = block(self._config, DenseOps(watch), layer, index, self._x[rows], context)
            if sample:
                samples.append(sample)
        if not torch.isfinite(self._x).all():
            raise CheckpointError(
                f"layer {index} turns the calibration text into values that are not finite; "
                f"its weights are damaged, or the model does not run in fp32"
            )
        return Observed({name: (total / self.n_tokens).float() for name, total in totals.items()}, samples)


def _spread(sequences: Sequence[Sequence[int]], n_tokens: int) -> list[bool]:
    """Which sequences to take, evenly, to reach about n_tokens: at least one."""
    total = sum(map(len, sequences))
    share = min(1.0, n_tokens / total)
    chosen, due = [], 1.0
    for _ in sequences:
        chosen.append(due >= 1)
        due += share - (due >= 1)
    return chosen


def _chunks(sequences: list[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Sequences in runs of at most CHUNK_TOKENS tokens, at least one sequence each."""
    chunks: list[list[Sequence[int]]] = []
    filled = CHUNK_TOKENS
    for sequence in sequences:
        if filled + len(sequence) > CHUNK_TOKENS:
            chunks.append([])
            filled = 0
        chunks[-1].append(sequence)
        filled += len(sequence)
    return chunks
