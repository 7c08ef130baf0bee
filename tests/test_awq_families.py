"""AWQ "gemm" checkpoints of every family as AutoAWQ publishes them.

Modules are named, fused or separate as in transformers; biases are in fp16, tied heads absent, the activation's scales
where AutoAWQ has them.
The other side is transformers' own model, holding the very numbers that the files' codes, zeros and scales stand for.
"""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_architectures import BACKENDS, TOLERANCE, ours, theirs, tokens
from tiny_families import whole_words
from tiny_models import MIXTURES, tiny
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from tinychat import architectures, checkpoint
from tinychat.backends import cpu
from tinychat.quantize import quantize
from tinychat.weights import LINEARS

GROUP = 32
# The modules that AutoAWQ replaces by one that divides what it returns by `scales`.
SCALED = {
    "bloom": "mlp.gelu_impl",
    "falcon": "mlp.act",
    "gpt_bigcode": "mlp.act",
    "gpt_neox": "mlp.act",
    "mpt": "ffn.act",
    "starcoder2": "mlp.act",
}
EXPERTS, ROUTER = ".experts.", "gate"  # in the names of modules


class ScaledActivation(nn.Module):
    """What AutoAWQ puts in the place of an activation."""

    def __init__(self, act: nn.Module, scales: torch.Tensor):
        super().__init__()
        self.act, self.scales = act, nn.Parameter(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) / self.scales


def packed(values: np.ndarray) -> np.ndarray:
    """[rows, N] of 0..15 -> int32 [rows, N / 8]: nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its 8."""
    eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
    words = (eights << np.arange(0, 32, 4, dtype=np.uint64)).sum(-1)
    return np.ascontiguousarray(words.astype(np.uint32).view(np.int32))


def rounded(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(tensors of a linear [N, K], the weight that they stand for)."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.round(-low / wide), 0, 15)
    codes = np.clip(np.round(groups / wide[..., None]) + zeros[..., None], 0, 15)
    values = ((codes - zeros[..., None]) * wide[..., None]).reshape(weight.shape)
    tensors = {
        "qweight": packed(codes.reshape(weight.shape).T),
        "qzeros": packed(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
    }
    return tensors, values.astype(np.float32)


def published(directory, family: str, **changes):
    """Write the checkpoint; transformers' model of the same numbers."""
    model, config = tiny(family, **{**whole_words(family), **changes})
    for parameter in model.parameters():  # what is not quantized is in fp16
        parameter.data = parameter.half().float()
    generator = torch.Generator().manual_seed(1)
    inside = re.compile(r"\.\d+\.")  # of a decoder layer
    for name, module in list(model.named_modules()):
        if family in SCALED and name.endswith(SCALED[family]):
            parent, _, leaf = name.rpartition(".")
            *_, down = (child for child in model.get_submodule(parent).children() if isinstance(child, nn.Linear))
            scales = (4 ** (2 * torch.rand(down.in_features, generator=generator) - 1)).half().float()
            down.weight.data *= scales
            setattr(model.get_submodule(parent), leaf, ScaledActivation(module, scales))
    tensors: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and inside.search(name) and not name.endswith(ROUTER):
            parts, values = rounded(module.weight.detach().numpy())
            module.weight.data = torch.from_numpy(values)
            tensors |= {f"{name}.{ending}": array for ending, array in parts.items()}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if EXPERTS in name:  # one by one, where transformers has all of a layer as [experts, N, K]
            parts, _ = rounded(tensor.numpy())
            tensors |= {f"{name.removesuffix('.weight')}.{ending}": array for ending, array in parts.items()}
    for name, parameter in model.named_parameters():
        if EXPERTS in name:
            _, values = rounded(parameter.detach().flatten(0, 1).numpy())
            parameter.data = torch.from_numpy(values).view(parameter.shape)
    quantized = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if name.removesuffix(".weight") in quantized:
            continue
        if name in (model._tied_weights_keys or {}) and model.config.tie_word_embeddings:
            continue
        tensors[name] = tensor.numpy().astype(np.float16)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    if any(EXPERTS in name for name in tensors):
        how["modules_to_not_convert"] = [ROUTER]
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16", "quantization_config": how}))
    return model


@pytest.mark.parametrize("family", architectures.supported())
def test_what_is_published_gives_the_logits_of_its_numbers(family, tmp_path, record_property):
    model = published(tmp_path / "awq", family)
    source = checkpoint.open(tmp_path / "awq")
    assert source.quantization.method == "awq" and len(source.layer(0).qkv.segments) in (1, 3)
    assert all(segment.bits == 4 for name in LINEARS for segment in getattr(source.layer(0), name).segments)
    assert (source.layer(1).act_scale is not None) == (family in SCALED)
    assert (source.layer(0).router is not None) == (family in MIXTURES)
    ids = tokens(23)
    want = theirs(model, ids)
    assert 0.2 < want.std() < 4
    found = ours(source, ids, [20, 3])
    record_property("reference", float(np.abs(found - want).max()))
    assert np.abs(found - want).max() < TOLERANCE
    if cpu in BACKENDS:  # activations of 16 bits
        lowered = ours(source, ids, [20, 3], cpu)
        record_property("cpu", float(np.abs(lowered - want).max()))
        assert ((lowered - want) ** 2).sum() / (want**2).sum() < 1e-6


@pytest.mark.parametrize(("bits", "kept"), [(4, True), (8, False)])
def test_interleaved_heads_that_do_not_fill_words_stay_in_16_bits(tmp_path, bits, kept):
    """Of 12 rows: a word of AWQ's layout holds codes of 8."""
    model, config = tiny("bloom", hidden_size=96, n_head=8)
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: x.numpy().copy() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    report = quantize(source, tmp_path / "out", method="rtn", bits=bits, group_size=32, progress=False)
    opened = checkpoint.open(tmp_path / "out")
    assert isinstance(opened.layer(0).qkv.segments[0], np.ndarray) == kept
    assert all("heads of 12 rows do not end at whole words of 8" in why for why in report.kept.values())
    assert [name.rpartition(".")[2] for name in report.kept] == ["query_key_value"] * opened.config.n_layers * kept
