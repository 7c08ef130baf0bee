"""The quantizer's walk: layers one at a time from a source, through a method, to memory or to a checkpoint.

What is handed on is what is written, fp16 rounding included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinychat import checkpoint
from tinychat.architectures.names import TensorNames
from tinychat.checkpoint import heads, layouts
from tinychat.config import ModelConfig
from tinychat.errors import UsageError
from tinychat.qtensor import QTensor, canonical
from tinychat.quantize import calibration as calibrating
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import dense_layer, half
from tinychat.quantize.grid import Grid
from tinychat.quantize.method import Method, find
from tinychat.quantize.report import Report
from tinychat.weights import LINEARS, NORMS, Layer, Linear, MemoryWeights, WeightSource

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
    calibration: str | Path | None = None,
    n_sequences: int = 128,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
) -> Report:
    """Quantize the checkpoint `source` and write it to the directory `output`: 4 bits as AWQ; 2, 3 and 8 as GPTQ.

    calibration  a text file, or JSON lines of {"text"} or {"messages"}; None: text sampled from the model itself
    n_sequences, length  of the calibration set, at most; None: 512 tokens from a file, 128 sampled
    progress     bars on stderr
    revision, offline, ignore_config  of the source: see `checkpoint.locate` and `checkpoint.open`

    Raises UsageError for arguments that cannot be, CheckpointError for what is wrong with the source or the output.
    """
    began = time.monotonic()
    grid, chosen = Grid(bits, group_size), find(method)
    layout = layouts.for_writing(bits, group_size)
    path = checkpoint.locate(source, revision=revision, offline=offline)
    opened = checkpoint.open(path, ignore_config=ignore_config)
    if opened.quantization is not None:
        raise UsageError(f"{opened.path} is quantized already; quantize the original checkpoint instead")
    report = Report(method, bits, group_size, bytes_before=opened.file_bytes)
    with checkpoint.CheckpointWriter(output, source=opened.path, overwrite=overwrite) as writer:
        sequences: Sequences | None = None
        if chosen.needs_calibration:
            wanted = length or (SAMPLED if calibration is None else FROM_FILE)
            length = min(wanted, opened.config.max_positions)
            if calibration is None:
                sequences = calibrating.self_generated(
                    opened,
                    starts=calibrating.start_tokens(opened.generation_config, opened.hf_config),
                    n_sequences=n_sequences,
                    length=length,
                    seed=seed,
                    progress=progress,
                )
            else:
                sequences = calibrating.from_file(calibration, opened.path, n_sequences=n_sequences, length=length)
            origin = "text sampled from the model itself" if calibration is None else str(calibration)
            report.calibration = _described(sequences, origin)

        names = opened.names

        def plan(index: int, linear: str, i: int, shape: tuple[int, int]) -> tuple[str, str | None]:
            return names.layer.format(index) + getattr(names, linear)[i], layout.misfit(shape)

        writer.add(f"{names.embed}.weight", half(opened.embed(), names.embed))
        for index, layer in enumerate(_layers(opened, chosen, grid, sequences, plan, report, progress)):
            _write(writer, opened.config, names, layout, index, layer)
        writer.add(f"{names.norm}.weight", half(opened.norm(), names.norm))
        if (norm_bias := opened.norm_bias()) is not None:
            writer.add(f"{names.norm}.bias", half(norm_bias, names.norm))
        if head := _half_head(opened):
            writer.add(f"{names.head}.weight", np.asarray(head.segments[0]))
        if not report.quantized_weights:
            raise UsageError(
                f"no linear of {opened.path} can be quantized: "
                + "; ".join(sorted(set(report.kept.values())))
                + ". Choose another --group-size"
            )
        config = {**opened.hf_config, "torch_dtype": "float16"}
        if "dtype" in config:
            config["dtype"] = "float16"
        path = writer.finish(config, layout.excluding(report.kept))
    report.bytes_after = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    report.seconds = time.monotonic() - began
    return report


def quantize_in_memory(
    source: WeightSource,
    *,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: bool = False,
    sequences: Sequences | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[MemoryWeights, Report]:
    """Every linear of `source` as a `QTensor`, whatever its shape; the rest in fp16. `sequences` are token ids.

    symmetric, act_order  see `Grid` and `Method`; seed: of the choice of sequences on which searches measure losses

    Raises UsageError where the method needs calibration and there are no sequences.
    """
    began = time.monotonic()
    grid, chosen = Grid(bits, group_size, symmetric), find(method, act_order)
    report = Report(method, bits, group_size)
    if chosen.needs_calibration:
        if not sequences:
            raise UsageError(f"method {method!r} needs calibration: give token sequences")
        report.calibration = _described(sequences, "the tokens given")

    def plan(index: int, linear: str, i: int, shape: tuple[int, int]) -> tuple[str, str | None]:
        return f"layers.{index}.{linear}[{i}]", None

    layers = list(_layers(source, chosen, grid, sequences, plan, report, progress, seed))
    norm_bias = source.norm_bias()
    weights = MemoryWeights(
        config=source.config,
        embedding=half(source.embed(), "embed"),
        layers=layers,
        final_norm=half(source.norm(), "norm").astype(np.float32),
        output_head=_half_head(source),
        final_norm_bias=None if norm_bias is None else half(norm_bias, "norm").astype(np.float32),
    )
    report.seconds = time.monotonic() - began
    return weights, report


def _layers(
    source: WeightSource,
    method: Method,
    grid: Grid,
    sequences: Sequences | None,
    plan: LayerPlan,
    report: Report,
    progress: bool,
    seed: int = 0,
) -> Iterator[Layer]:
    """The layers as they are written, one after the other; what is found goes to the report."""
    activations = None
    if method.needs_calibration:
        activations = Activations(source.config, source.embed(), sequences or [], SEARCH_TOKENS, seed)
    layers = tqdm(range(source.config.n_layers), desc="quantizing", unit="layer", disable=not progress)
    for index in layers:
        layer = dense_layer(source.layer(index), partial(plan, index))
        changed, done, results = method.apply(source.config, layer, index, activations, grid)
        report.groups += results
        for name in LINEARS:
            report.kept |= {module: reason for _, module, reason in getattr(layer, name).segments() if reason}
        report.count(changed, done)
        yield done


def _write(
    writer: checkpoint.CheckpointWriter,
    config: ModelConfig,
    names: TensorNames,
    layout: layouts.Layout,
    index: int,
    layer: Layer,
) -> None:
    prefix = names.layer.format(index)
    for norm in NORMS:
        if (values := getattr(layer, norm)) is not None:
            writer.add(names.vector(norm, index), half(values, norm))
    if layer.act_scale is not None:
        writer.add(names.vector("act_scale", index), half(layer.act_scale, "act_scale"))
    for name in LINEARS:
        linear: Linear = getattr(layer, name)
        if name == "qkv" and names.heads_interleaved:
            linear = heads.together(linear, config)
        first = 0
        for part, segment in zip(getattr(names, name), linear.segments, strict=True):
            module = prefix + part
            segment = canonical(segment)
            if isinstance(segment, QTensor):
                for ending, array in layout.pack(segment).items():
                    writer.add(f"{module}.{ending}", array)
            else:
                writer.add(f"{module}.weight", segment)
            if linear.bias is not None:
                writer.add(f"{module}.bias", half(linear.bias[first : first + segment.shape[0]], module))
            first += segment.shape[0]


def _described(sequences: Sequences, origin: str) -> str:
    return f"{origin}, {len(sequences)} sequences, {sum(map(len, sequences)):,} tokens"


def _half_head(source: WeightSource) -> Linear | None:
    head = source.head()
    if head is None:
        return None
    if not all(isinstance(segment, np.ndarray) for segment in head.segments):
        raise UsageError("the output head is quantized already; quantize the original checkpoint instead")
    return Linear(tuple(half(np.asarray(segment), "the output head") for segment in head.segments), head.bias)
