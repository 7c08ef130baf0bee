"""Calibration activations: tokens carried through the unquantized model block by block, and what each linear sees.

Statistics are of the unquantized model, as in all published implementations of AWQ. The sampled tokens go through the
quantized model too, where that is asked for: what a search may then still put right is what the layers before it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import torch

from tinychat.backends.reference import QSegment, TorchLinear, TorchOps
from tinychat.config import ModelConfig
from tinychat.decoder import Context, Entrance, PackedLayer, block, pack_layer
from tinychat.errors import CheckpointError
from tinychat.quantize.dense import Dense, DenseOps, linears_of
from tinychat.quantize.device import CPU, room_for
from tinychat.quantize.gram import Gram
from tinychat.weights import Ends, Layer, Linear

NO_ENDS = Ends()
SAMPLED_NUMBERS = 2**22  # of a block's input: what narrow models are sampled to
CHUNK_TOKENS = 4096  # run at once: bounds the memory of intermediate activations
CHUNK_NUMBERS = 2**23  # of what the widest linear makes of tokens run at once, unless they are sampled
STATE = ("activations", "drifted")
CHANNELS = 2048  # whose magnitudes are computed at once: likewise
FEW_TOKENS = 16  # that went to an expert among those sampled: with fewer a search fits these tokens, not the expert


class Use(Enum):
    """What a sequence is kept for, statistics apart."""

    SEARCH = "search"
    HELD_OUT = "held out"
    STATISTICS = "statistics"


@dataclass(frozen=True, eq=False)
class Sample:
    """What one chunk of sequences, kept whole for the searches, looks like inside a block."""

    context: Context
    x: torch.Tensor  # the block's input, fp32 [T, hidden_size]
    y: torch.Tensor  # its output, likewise, until the next block has been run
    drifted: torch.Tensor  # what the quantized layers before make of x, likewise; x itself where they are not followed.
    # Where they are, a transformation leaves here what this block, quantized, makes of it
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of each canonical linear, [T, K]
    middle: list[torch.Tensor] = field(default_factory=list)  # one: what the block's last norm read, as x


@dataclass(frozen=True, eq=False)
class Observed:
    """What the linears of one block see.

    magnitude  fp32 [K] by canonical linear: mean |x| of each channel over all tokens, or those that an expert took
    samples    for searches
    held_out   others, to judge what was found on `samples`; none where the calibration set is one sequence
    grams      by canonical linear: the sum of x^T x over all tokens, where it was asked for
    """

    magnitude: dict[str, torch.Tensor]
    samples: list[Sample]
    held_out: list[Sample]
    grams: dict[str, Gram]


class Activations:
    """The calibration tokens at the entrance of a block; `advance` takes them through it."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: np.ndarray,
        sequences: Sequence[Sequence[int]],
        sample_tokens: int,
        seed: int = 0,
        ends: Ends = NO_ENDS,
        follow: bool = False,
        device: torch.device = CPU,
    ):
        """About `sample_tokens` tokens (more of a narrow model), in whole sequences drawn with `seed`, are sampled.

        Half of them are held out. `follow`: they go through the quantized layers too (see `Sample.drifted`). `device`:
        where blocks run; what is carried from one to the next stays there too where it fits.
        """
        self.unseen: list[str] = []  # linears of experts that no token went to in the last block, or few sampled ones
        self.dead: dict[str, int] = {}  # inputs of linears that were 0 in all tokens in the last block, where any were
        self._config = config
        sample_tokens = max(sample_tokens, SAMPLED_NUMBERS // config.hidden_size)
        use = _drawn(sequences, sample_tokens, seed)
        self._chunks: list[tuple[slice, Context, Use]] = []
        ids: list[int] = []
        positions: list[torch.Tensor] = []
        for kind in Use:
            some = [s for s, its in zip(sequences, use, strict=True) if its is kind]
            if kind is Use.STATISTICS:
                n = min(CHUNK_TOKENS, CHUNK_NUMBERS // config.up_size)
            else:  # in two chunks at least, where it can be, so that half of them can choose
                n = min(CHUNK_TOKENS, -(-sum(map(len, some)) // 2))
            for chunk in _chunks(some, n):
                begin = len(ids)
                ids += [token for sequence in chunk for token in sequence]
                context = Context.of_sequences(config, [len(sequence) for sequence in chunk])
                positions.append(context.positions)
                self._chunks.append((slice(begin, len(ids)), context.to(device), kind))
        entrance = Entrance(config, TorchOps(), embedding[np.asarray(ids)], ends)
        self._x = entrance.of_tokens(torch.arange(len(ids)), torch.cat(positions))  # [tokens, hidden_size]
        sampled = sum(len(context.positions) for _, context, kind in self._chunks if kind is not Use.STATISTICS)
        self._drifted = self._x[:sampled].to(device, copy=True) if follow else None  # these come first
        self._device = device
        self._x = self._x.to(room_for(self._x.nbytes, device))

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration set."""
        return len(self._x)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """What `resume` wants: fp32 [tokens, hidden_size] by the names of STATE; the second of what is followed."""
        found = (self._x,) if self._drifted is None else (self._x, self._drifted)
        return {name: x.cpu().numpy() for name, x in zip(STATE, found, strict=False)}

    def resume(self, state: dict[str, np.ndarray]) -> None:
        """Stand where the activations of the same sequences stood when their `state` was this."""
        self._x = torch.from_numpy(state[STATE[0]]).to(self._x.device)
        if self._drifted is not None:
            self._drifted = torch.from_numpy(state[STATE[1]]).to(self._device)

    def drifted(self) -> torch.Tensor:
        """A copy of what the quantized layers so far made of the sampled tokens; see `follow`."""
        assert self._drifted is not None
        return self._drifted.clone()

    @torch.inference_mode()
    def follow(self, made: Layer, index: int, entered: torch.Tensor) -> None:
        """Take the sampled tokens, as they `entered` block `index`, through it as it is written."""
        assert self._drifted is not None
        ops, experts = _WrittenOps(self._device), self._config.experts_of(index)
        layer = pack_layer(ops, made, experts.n_experts if experts else 0)
        for rows, context, use in self._chunks:
            if use is not Use.STATISTICS:
                self._drifted[rows] = block(self._config, ops, layer, index, entered[rows], context)

    @torch.inference_mode()
    def advance(self, layer: PackedLayer, index: int, grams: bool = False, samples: bool = True) -> Observed:
        """Run block `index` on all tokens and say what its linears saw, with `grams` and `samples` where asked for.

        CheckpointError where what comes out is not finite.
        """
        found = Observed({}, [], [], {})
        totals: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for rows, context, use in self._chunks:
            there = self._x[rows].to(self._device)
            keep = samples and use is not Use.STATISTICS
            sample = None
            if keep:
                x = there.clone()
                sample = Sample(context, x, there, x if self._drifted is None else self._drifted[rows])

            def watch(linear: Dense, x: torch.Tensor, sample: Sample | None = sample) -> None:
                _add(totals, linear.name, torch.cat([part.abs().sum(0, dtype=torch.float64) for part in _parts(x)]))
                counts[linear.name] = counts.get(linear.name, 0) + len(x)
                if grams:
                    found.grams.setdefault(linear.name, Gram()).add(x)
                if sample:
                    sample.inputs[linear.name] = x

            ops = DenseOps(watch)
            there[:] = block(self._config, ops, layer, index, there, context)
            if self._x.device != self._device:
                self._x[rows] = there
            if sample:
                sample.middle.append(ops.stream)
                (found.samples if use is Use.SEARCH else found.held_out).append(sample)
        if not torch.isfinite(self._x).all():
            raise CheckpointError(
                f"layer {index} turns the calibration text into values that are not finite; "
                f"its weights are damaged, or the model does not run in fp32"
            )
        found.magnitude.update({name: (total / counts[name]).float() for name, total in totals.items()})
        self.dead = {name: n for name, total in totals.items() if (n := int((total == 0).sum()))}
        self.unseen = [
            name
            for name in linears_of(layer)
            if (name not in found.grams if grams else starved(name, [sample.inputs for sample in found.samples]))
        ]
        return found


def starved(name: str, inputs: Iterable[Mapping[str, torch.Tensor]]) -> bool:
    """Whether a linear is an expert's to which few tokens went, of samples with these inputs by name."""
    return "." in name and sum(len(some[name]) for some in inputs if name in some) < FEW_TOKENS


class _WrittenOps(TorchOps):
    """The reference operations on linears as they are written, on `device`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def pack(self, linear: Linear) -> TorchLinear:
        """See `TorchOps`."""
        packed = super().pack(linear)
        return replace(packed, segments=tuple(_moved(segment, self._device) for segment in packed.segments))

    def vector(self, values: np.ndarray) -> torch.Tensor:
        """See `TorchOps`."""
        return super().vector(values).to(self._device)


def _moved(segment: QSegment | torch.Tensor, device: torch.device) -> QSegment | torch.Tensor:
    if isinstance(segment, torch.Tensor):
        return segment.to(device)
    order = None if segment.order is None else segment.order.to(device)
    packed, scales, zeros = (x.to(device) for x in (segment.packed, segment.scales, segment.zeros))
    return replace(segment, packed=packed, scales=scales, zeros=zeros, order=order)


def _add(totals: dict[str, torch.Tensor], name: str, part: torch.Tensor) -> None:
    totals[name] = totals[name].add_(part) if name in totals else part


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A few channels of x [T, K] each; in fp64 they would take twice what x does."""
    return x.split(CHANNELS, dim=1)


def _drawn(sequences: Sequence[Sequence[int]], n_tokens: int, seed: int) -> list[Use]:
    """What each sequence is for: at least one for the search, and where there are more at least one held out."""
    use = [Use.STATISTICS] * len(sequences)
    taken = dict.fromkeys((Use.SEARCH, Use.HELD_OUT), 0)
    for i in np.random.default_rng(seed).permutation(len(sequences)).tolist():
        kind = min(taken, key=lambda kind: taken[kind])  # the search first
        if taken[kind] >= n_tokens / 2:
            break
        use[i] = kind
        taken[kind] += len(sequences[i])
    return use


def _chunks(sequences: list[Sequence[int]], n_tokens: int) -> list[list[Sequence[int]]]:
    """Sequences in runs of at most `n_tokens` tokens, at least one sequence each."""
    chunks: list[list[Sequence[int]]] = []
    filled = n_tokens
    for sequence in sequences:
        if filled + len(sequence) > n_tokens:
            chunks.append([])
            filled = 0
        chunks[-1].append(sequence)
        filled += len(sequence)
    return chunks
