"""The quantizer's walk: layers one at a time from a source, through a method, to memory or to a checkpoint.

What is handed on is what is written, fp16 rounding included.

On the way to a checkpoint each finished layer is committed, with the activations at the entrance of the next: 4 bytes
for each token and channel on the disk (and again of tokens that are followed through the quantized layers), twice while
one commit replaces another. Forward passes could be repeated instead, but that takes minutes for a large model, and
would have to be equal to the last bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tinychat import checkpoint
from tinychat.checkpoint import CheckpointWriter
from tinychat.config import ModelConfig
from tinychat.errors import UsageError
from tinychat.quantize import calibration as calibrating
from tinychat.quantize import device as devices
from tinychat.quantize import identity
from tinychat.quantize.activations import STATE, Activations
from tinychat.quantize.dense import dense_layer, half, linears_of
from tinychat.quantize.grid import Grid
from tinychat.quantize.groups import passes_activation
from tinychat.quantize.method import Method, find
from tinychat.quantize.output import Output, plain_head
from tinychat.quantize.progress import Progress
from tinychat.quantize.report import Report
from tinychat.weights import Layer, Linear, MemoryWeights, WeightSource

SAMPLED, FROM_FILE = 128, 512  # tokens of a calibration sequence
SEARCH_TOKENS = 4096  # of the calibration set, on which losses are measured; statistics take all of it

Sequences = Sequence[Sequence[int]]
# (layer, canonical linear, segment, shape) -> (the segment's name for the user, why it stays in 16 bits or None)
LayerPlan = Callable[[int, str, int, tuple[int, int]], tuple[str, str | None]]


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: str | None = None,
    calibration: str | Path | None = None,
    n_sequences: int = 128,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
) -> Report:
    """Quantize the checkpoint `source` and write it to `output`, as AWQ: other widths and free act-order as GPTQ.

    method       'rtn', 'awq', 'gptq' or 'awq+gptq'
    bits         of a weight: 2, 3, 4 or 8
    group_size   inputs that share a scale: 32, 64, 128, or -1 for a whole row
    symmetric, act_order  see `Grid` and `Method`
    calibration  see `calibration.load`; None: text sampled from the model itself
    n_sequences, length  of the calibration set, at most; None: 512 tokens, 128 of sampled text
    overwrite    replace what is at `output`
    restart      throw away what an interrupted run left. Otherwise a run with the same arguments goes on after its last
                 finished layer, and writes the same bytes as one that was never interrupted
    device       'cpu', 'cuda' or 'auto': see `device.find`
    threads      of PyTorch, for the process, and of the backend that samples; None: as they are
    progress     on stderr
    revision, offline, ignore_config  of the source: see `checkpoint.locate` and `checkpoint.open`

    In memory are one layer as the source has it and in codes, parts of it in fp32, and the calibration activations:
    less than two layers in fp32, or about 1.1 GB where that is more. (Text that is sampled takes the packed model while
    it is written: see `rounded`.)
    Raises UsageError for arguments that cannot be, CheckpointError for what is wrong with the source or the output,
    which then is as it was before; ConfigError for a model that is not supported, TokenizerError for calibration text
    without a tokenizer, BackendError where the device is not there.
    """
    began = time.monotonic()
    if seed < 0:
        raise UsageError(f"seed {seed}: give a whole number, 0 or more")
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = find(method, act_order)
    grid = Grid(bits, group_size, symmetric)
    where = devices.find(device)
    opened = checkpoint.open(checkpoint.locate(source, revision=revision, offline=offline), ignore_config=ignore_config)
    if opened.path.is_file():
        raise UsageError(f"{opened.path} is a GGUF file; quantize the original checkpoint, a directory, instead")
    if opened.quantization is not None:
        raise UsageError(f"{opened.path} is quantized already; quantize the original checkpoint instead")
    chosen.check(opened.config)
    made = Output(opened, bits, group_size, symmetric, chosen.permutes)
    chosen = replace(chosen, act_scales=made.act_scales)
    length = min(length or (SAMPLED if calibration is None else FROM_FILE), opened.config.max_positions)
    options = {"method": method, "bits": bits, "group size": group_size, "seed": seed}
    options |= {"symmetric": symmetric, "act-order": act_order or False, "device": devices.describe(where)}
    options |= {"sequences": n_sequences, "length": length, "ignored keys": sorted(ignore_config)}
    run = identity.run(opened.path, calibration, options)
    way_out = ", or have it replaced (--overwrite)"
    with CheckpointWriter(
        output, source=opened.path, overwrite=overwrite, run=run, restart=restart, way_out=way_out
    ) as writer:
        state = _State(writer, Report(method, bits, made.group_size, bytes_before=opened.file_bytes), began)
        if writer.note is None:
            kept = n_sequences * length * opened.config.hidden_size * 4 if chosen.needs_calibration else 0
            kept *= 1 + chosen.follows(grid)
            made.require_room(writer.directory.parent, kept)
            state.report.notes += made.notes + _unscaled(chosen, opened.config)
            if chosen.permutes:
                state.report.notes.append("inputs of like activity share a group: written as GPTQ with g_idx")
            state.report.notes += [f"computed on {devices.describe(where)}"] if where != devices.CPU else []
        try:
            if chosen.needs_calibration and not state.sequences and not writer.complete:
                state.sequences, state.report.calibration = calibrating.load(
                    calibration,
                    opened,
                    n_sequences=n_sequences,
                    length=length,
                    seed=seed,
                    device="cpu" if device == "cpu" else "auto",
                    threads=threads,
                    offline=offline,
                    progress=progress,
                )
                state.commit(0)
            if not writer.complete:
                grid = replace(grid, group_size=made.group_size)
                _write_layers(writer, made, chosen, grid, state, seed, progress, where)
            path = made.finish(writer, state.report)
        except (KeyboardInterrupt, SystemExit):
            if progress and writer.kept_in:
                print(
                    f"\nstopped; {state.layers} of {opened.config.n_layers} layers are finished and kept: the same "
                    f"command goes on from there",
                    file=sys.stderr,
                )
            raise
    report = state.report
    report.bytes_after = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    report.seconds = state.seconds
    return report


def _unscaled(method: Method, config: ModelConfig) -> list[str]:
    if method.transformation is None or method.act_scales or not passes_activation(config):
        return []
    return ["what the MLP's last linear reads is not scaled: other engines would not find the scales in such files"]


class _State:
    """What is known between two layers, as a run finds and leaves it in the commits of `writer`."""

    def __init__(self, writer: CheckpointWriter, report: Report, began: float):
        self._writer = writer
        self._began = began
        self._before = 0.0  # seconds that earlier runs took
        self.report = report
        self.layers = 0  # finished
        self.sequences: list[list[int]] = []
        self.activations: dict[str, np.ndarray] = {}  # at the entrance of the next layer
        if writer.note is not None:
            self.report = Report.from_dict(writer.note["report"])
            self.layers, self._before = writer.note["layers"], writer.note["seconds"]
            self.activations = {name: writer.arrays.pop(name) for name in STATE if name in writer.arrays}
            if "tokens" in writer.arrays:
                ends = np.cumsum(writer.arrays["lengths"])
                self.sequences = [part.tolist() for part in np.split(writer.arrays["tokens"], ends[:-1])]

    @property
    def seconds(self) -> float:
        """Of work, over all runs."""
        return self._before + time.monotonic() - self._began

    def commit(self, layers: int, activations: dict[str, np.ndarray] | None = None) -> None:
        """Keep that `layers` are written, and where the next one starts."""
        self.layers = layers
        arrays = dict(activations or {})
        if self.sequences:
            arrays["tokens"] = np.concatenate([np.asarray(s, np.int32) for s in self.sequences])
            arrays["lengths"] = np.asarray([len(s) for s in self.sequences], np.int32)
        note = {"layers": layers, "seconds": self.seconds, "report": self.report.to_dict()}
        self._writer.commit(note, arrays)


def _write_layers(
    writer: CheckpointWriter,
    made: Output,
    method: Method,
    grid: Grid,
    state: _State,
    seed: int,
    progress: bool,
    device: torch.device,
) -> None:
    """Everything from the embedding to the head, from where `state` stands."""
    source = made.source
    n_layers = source.config.n_layers
    activations = None
    if method.needs_calibration and state.layers < n_layers:
        follow = method.follows(grid)
        activations = Activations(
            source.config, source.embed(), state.sequences, SEARCH_TOKENS, seed, source.ends(), follow, device
        )
        if state.activations:
            activations.resume(state.activations)
            state.activations = {}
    if not state.layers:
        made.add_embedding(writer)
    shown = Progress(n_layers, state.layers, shown=progress)
    for index in range(state.layers, n_layers):
        with devices.computing_on(device):
            layer = _layer(source, method, grid, activations, index, made.plan, state.report, shown, device)
        made.add_layer(writer, index, layer)
        rest = activations.state if activations is not None and index + 1 < n_layers else None
        state.commit(index + 1, rest)
        shown.done()
    made.add_end(writer)


def quantize_in_memory(
    source: WeightSource,
    *,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: str | None = None,
    sequences: Sequences | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> tuple[MemoryWeights, Report]:
    """Every linear of `source` as a `QTensor`, whatever its shape; the rest in fp16. `sequences` are token ids.

    symmetric, act_order  see `Grid` and `Method`; seed: of the choice of sequences on which searches measure losses;
    device: see `device.find`

    Raises UsageError where the method needs calibration and there are no sequences.
    """
    began = time.monotonic()
    grid, chosen, where = Grid(bits, group_size, symmetric), find(method, act_order), devices.find(device)
    chosen.check(source.config)
    report = Report(method, bits, group_size)
    if chosen.needs_calibration:
        if not sequences:
            raise UsageError(f"method {method!r} needs calibration: give token sequences")
        calibrating.check_ids(sequences, source.config.vocab_size)
        report.calibration = calibrating.describe(sequences, "the tokens given")

    def plan(index: int, linear: str, i: int, shape: tuple[int, int]) -> tuple[str, str | None]:
        return f"layers.{index}.{linear}[{i}]", None

    activations = None
    if chosen.needs_calibration:
        follow = chosen.follows(grid)
        activations = Activations(
            source.config, source.embed(), sequences or [], SEARCH_TOKENS, seed, source.ends(), follow, where
        )
    shown = Progress(source.config.n_layers, shown=progress)
    layers = []
    for index in range(source.config.n_layers):
        with devices.computing_on(where):
            layers.append(_layer(source, chosen, grid, activations, index, plan, report, shown, where))
        shown.done()
    norm, norm_bias = source.norm(), source.norm_bias()
    weights = MemoryWeights(
        config=source.config,
        embedding=half(source.embed(), "embed"),
        layers=layers,
        final_norm=None if norm is None else half(norm, "norm").astype(np.float32),
        output_head=_half_head(source),
        final_norm_bias=None if norm_bias is None else half(norm_bias, "norm").astype(np.float32),
        other_ends=source.ends(),
    )
    report.seconds = time.monotonic() - began
    return weights, report


def _layer(
    source: WeightSource,
    method: Method,
    grid: Grid,
    activations: Activations | None,
    index: int,
    plan: LayerPlan,
    report: Report,
    progress: Progress,
    device: torch.device,
) -> Layer:
    """Layer `index` as it is written, computed on `device`; what is found goes to the report."""
    progress.doing("reading")
    layer = dense_layer(source.layer(index), partial(plan, index), device)
    source.release()
    progress.doing(method.name)
    changed, done, results = method.apply(source.config, layer, index, activations, grid)
    report.groups += results
    if activations is not None and (idle := [name for name in activations.unseen if name.startswith("down.")]):
        experts = ", ".join(name.removeprefix("down.") for name in idle)
        report.notes.append(f"layer {index}: rounded to nearest for want of tokens that go there: experts {experts}")
    if activations is not None:
        report.count_dead(activations.dead)
    for linear in linears_of(layer).values():
        report.kept |= {module: reason for module, reason in zip(linear.modules, linear.kept, strict=True) if reason}
    report.count(changed, done)
    return done


def _half_head(source: WeightSource) -> Linear | None:
    head = source.head()
    return head and Linear((half(plain_head(head), "the output head"),), head.bias)
