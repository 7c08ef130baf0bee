"""GPTQ checkpoints as files: what the quantizer writes is read back and runs, and what is wrong is refused by name."""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny
from test_gptq_layout import random_qtensor, same

from tinychat import checkpoint
from tinychat.backends import cpu, reference
from tinychat.cache import Rows
from tinychat.checkpoint.gptq import GptqFormat
from tinychat.errors import CheckpointError
from tinychat.quantize import quantize, quantize_in_memory

V2 = {
    "quant_method": "gptq",
    "bits": 3,
    "group_size": 32,
    "desc_act": True,
    "sym": False,
    "checkpoint_format": "gptq_v2",
}
BACKENDS = [backend for backend in (reference, cpu) if backend.available() is None]


def gptq(bits=3, group_size=32, permuted=False):
    """(tensors of a checkpoint of tiny.CONFIG, its QTensors by module)."""
    tensors, made = tiny.plain(), {}
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors.pop(f"{name}.weight").shape
        q = random_qtensor(n, k, group_size, bits, seed=len(made), permuted=permuted)
        q.scales[...] = np.abs(q.scales) / 2**bits + np.float16(0.01)
        made[name] = q
        tensors |= {f"{name}.{e}": a for e, a in GptqFormat(bits, group_size, act_order=permuted).pack(q).items()}
    return tensors, made


def logits(source, backend):
    return backend.build(source, ctx_size=8).step(Rows.of([1, 5, 9, 30], 0, wanted="all"))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_the_quantizer_writes(tmp_path, bits):
    source = checkpoint.open(tiny.write(tmp_path / "source", tiny.plain()))
    quantize(source.path, tmp_path / "out", method="rtn", bits=bits, group_size=32, progress=False)
    opened = checkpoint.open(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["checkpoint_format"] == "gptq_v2" and written["bits"] == opened.quantization.bits == bits
    made, _ = quantize_in_memory(source, method="rtn", bits=bits, group_size=32)
    for index in range(2):
        for linear in ("qkv", "out", "up", "down"):
            found, meant = (getattr(model.layer(index), linear).segments for model in (opened, made))
            assert all(same(a.tensor(), b) for a, b in zip(found, meant, strict=True))
    first = logits(opened, reference)
    assert np.array_equal(first, logits(made, reference))
    for backend in BACKENDS[1:]:
        assert ((logits(opened, backend) - first) ** 2).sum() / (first**2).sum() < 1e-6


def test_what_is_wrong_is_named(tmp_path):
    tensors, _ = gptq()
    assert checkpoint.open(tiny.write(tmp_path / "right", tensors, quantization_config=V2)).n_quantized == 61440
    without = {name: array for name, array in tensors.items() if not name.endswith("g_idx")}
    assert checkpoint.open(tiny.write(tmp_path / "bare", without, quantization_config=V2)).layer(1)
    at = f"{tiny.Q_PROJ}."
    for i, (name, array, message) in enumerate(
        [
            ("qweight", tensors[at + "qweight"][:-1], r"q_proj.qweight.* has shape \[5, 64\]; expected is \[6, 64\]"),
            ("qzeros", None, "q_proj.qzeros is missing"),
            ("scales", tensors[at + "scales"].astype(np.float32), "q_proj.scales.* is F32; expected is F16 or BF16"),
            ("g_idx", tensors[at + "g_idx"].astype(np.int64), "q_proj.g_idx.* is I64; expected is I32"),
            ("qweigth", tensors[at + "qweight"], "tensors that this model does not have: .*qweigth"),
        ]
    ):
        changed = {n: a for n, a in {**tensors, at + name: array}.items() if a is not None}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(tiny.write(tmp_path / str(i), changed, quantization_config=V2))
    wrong = {**tensors, at + "g_idx": np.zeros(64, np.int32)}
    with pytest.raises(CheckpointError, match=r"q_proj.qweight in model.safetensors: its g_idx does not make groups"):
        checkpoint.open(tiny.write(tmp_path / "groups", wrong, quantization_config=V2)).layer(0)
    with pytest.raises(CheckpointError, match="no quantization_config that says how"):
        checkpoint.open(tiny.write(tmp_path / "none", tensors))
    with pytest.raises(CheckpointError, match=r"q_proj.* cannot be quantized .*: its 40 outputs"):
        checkpoint.open(tiny.write(tmp_path / "odd", tensors, quantization_config=V2, head_dim=10))


def test_act_order_in_its_own_order(tmp_path):
    tensors, made = gptq(permuted=True)
    opened = checkpoint.open(tiny.write(tmp_path, tensors, quantization_config=V2))
    for module, segment in zip(tiny.LINEARS, opened.layer(1).qkv.segments, strict=False):
        assert np.array_equal(segment.tensor().dequantize(), made[f"model.layers.1.{module}"].dequantize())
    plain = tiny.plain()
    for module, q in made.items():
        plain[f"{module}.weight"] = q.dequantize()
    meant = logits(checkpoint.open(tiny.write(tmp_path / "plain", plain)), reference)
    assert np.abs(logits(opened, reference) - meant).max() <= 1e-4 * np.abs(meant).max()
