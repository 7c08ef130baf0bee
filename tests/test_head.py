"""The output head in 8 bits and the embedding beside it: rounded as specified, held once or read in place."""

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from test_lowered_decoder import f32, model
from tiny_checkpoints import AWQ

import tinychat
from tinychat import _cpu, checkpoint
from tinychat.backends import cpu, reference
from tinychat.cache import Rows
from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import bfloat16, round_symmetric
from tinychat.weights import Linear, RoundedHead

ISAS = _cpu.supported_isas().split()
TOKENS = np.random.default_rng(1).integers(0, 97, 9).tolist()


def logits(module, weights, **options):
    return module.build(weights, ctx_size=16, kv_dtype="fp32", **options).step(Rows.of(TOKENS, 0, wanted="all"))


def distance(a, b):
    return float(np.square(a - b).sum() / np.square(b).sum())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("table", [np.float32, np.float16, bfloat16])
def test_a_rounded_head_equals_the_reference(isa, tied, table):
    weights = model(tied=tied, table=table, weight="q4", hidden=160, heads=4, dim=16)
    if not tied:
        weights = type(weights)(**{**vars(weights), "output_head": Linear((f32(97, 160, seed=5).astype(table),))})
    found = logits(cpu, weights, isa=isa, head=8)
    assert distance(found, logits(reference, weights, head=8)) < 1e-6
    assert distance(found, logits(cpu, RoundedHead(weights), isa=isa)) < 1e-12  # the same codes, given as a QTensor
    exact = logits(reference, weights)
    assert 1e-7 < distance(found, exact) < 1e-3  # it is rounded, and by no more than 8 bits
    assert distance(logits(cpu, weights, isa=isa, head=16), exact) < 1e-6


@pytest.mark.parametrize("isa", [ISAS[0], "scalar"])
def test_embedding_rows_come_from_a_tied_head(isa):
    weights = model(tied=True, layers=0, hidden=64)
    q = round_symmetric(weights.embedding)
    rows = q.dequantize()[TOKENS].astype(np.float64)
    normed = rows / np.sqrt(np.square(rows).mean(1, keepdims=True) + 1e-5) * weights.final_norm
    assert distance(logits(cpu, weights, isa=isa, head=8), normed @ q.dequantize(np.float64).T) < 1e-6


def test_what_is_held():
    """Exact bytes: a tied table once; a table of its own not at all, its rows are read where they are."""
    config = {"hidden": 128, "inter": 128, "vocab": 64, "heads": 2, "dim": 64, "kv_heads": 2, "layers": 0}
    tied, untied = model(tied=True, **config), model(**config)
    norm, in_16, in_8 = 128 * 4, 64 * 128 * 4, 4 * (128 * 16 + 64)  # of 8 bits, 4 tiles with their scales and zeros
    for weights in (tied, untied):
        for head, nbytes in ((16, in_16), (8, in_8)):
            runner = cpu.build(weights, ctx_size=4, head=head)
            assert runner.weight_bytes == norm + nbytes
    assert not hasattr(cpu.build(tied, ctx_size=4), "_table")
    table = untied.embedding
    assert not np.shares_memory(cpu.build(untied, ctx_size=4)._table, table)  # the caller may write to it
    table.flags.writeable = False
    assert np.shares_memory(cpu.build(untied, ctx_size=4)._table, table)


def test_quantized_checkpoints_have_it_and_others_ask_for_it(tmp_path):
    tensors, _ = tiny.quantized()
    awq = tiny.write(tmp_path / "awq", tensors, quantization_config=AWQ)
    plain = tiny.write(tmp_path / "plain", tiny.plain())
    for path, default in ((awq, 8), (plain, 16)):
        found = {}
        for head in (None, 8, 16):
            with tinychat.load(path, device="cpu", ctx_size=8, head=head) as llm:
                found[head] = llm.logits([1, 2, 3])
        assert np.array_equal(found[None], found[default]) and not np.array_equal(found[8], found[16])
    with pytest.raises(UsageError, match="head"):
        tinychat.load(plain, device="cpu", head=4)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_source_pages_are_dropped(tmp_path):
    """After loading nothing of the mapped file is resident; a step reads rows of the embedding there."""

    def resident():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        maps = [i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "model.safetensors"))]
        sizes = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in maps]
        assert sizes
        return sum(int(size.split()[1]) * 1024 for size in sizes)

    rng = np.random.default_rng(0)
    tensors = tiny.plain()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # 4 MB each
        tensors[name] = rng.standard_normal((32_768, 64)).astype(np.float16)
    source = checkpoint.open(tiny.write(tmp_path, tensors, vocab_size=32_768))
    assert resident() < 1 << 20
    source.embed().sum(), source.head().segments[0].sum()
    assert resident() > 3 << 20  # the last of them
    runner = cpu.build(source, ctx_size=8, head=8)
    assert runner._table.base is not None and not runner._table.flags.writeable
    assert resident() < 1 << 20
    runner.step(Rows.of([5, 30_000], 0))
    assert np.array_equal(runner._table, tensors["model.embed_tokens.weight"])  # and they can be read again


def test_damaged_numbers_are_named(tmp_path):
    for broken in ("lm_head.weight", "model.embed_tokens.weight", f"{tiny.Q_PROJ}.scales"):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            tensors, _ = tiny.quantized()
            tensors[broken][1, 5] = value
            path = tiny.write(tmp_path / "broken", tensors, quantization_config=AWQ)
            with pytest.raises(CheckpointError, match=f"{broken}.*model.safetensors.*NaN or infinity"):
                tinychat.load(path, device="cpu", ctx_size=8)
