"""The quantizer on a GPU: everywhere on one that is pretended, to the last bit; with `-m gpu` on a real one."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretended_gpu import Pretended, pretended
from test_quantize_awq import PLAIN, random_weights, sequences, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinychat.backends import arithmetic
from tinychat.cli import main
from tinychat.config import Experts, Rope
from tinychat.decoder import Context
from tinychat.errors import BackendError, CheckpointError
from tinychat.qtensor import QTensor
from tinychat.quantize import device as devices
from tinychat.quantize import pipeline, quantize, quantize_in_memory
from tinychat.weights import NORMS, Layer, Linear, MemoryWeights

SMALL = {"hidden_size": 32, "intermediate_size": 40, "n_heads": 4, "n_kv_heads": 2}
ROOMY, FULL = 1 << 30, 1 << 10  # the calibration activations stay on the GPU, or with the CPU


def mixture(config, n=4):
    """A model whose blocks are mixtures of n experts, and one that is shared."""
    size, hidden = 24, config.hidden_size
    experts = Experts(n, 2, size, frozenset(range(config.n_layers)), True, size)
    dense = random_weights(config)
    generator = np.random.default_rng(3)

    def linear(*rows, k=hidden):
        return Linear(tuple((0.15 * generator.standard_normal((n, k))).astype(np.float32) for n in rows))

    layers = [
        replace(
            layer,
            up=linear(*[size] * 2 * n),
            down=linear(*[hidden] * n, k=size),
            router=linear(n, 1),
            shared_up=linear(size, size),
            shared_down=linear(hidden, k=size),
        )
        for layer in dense.layers
    ]
    return MemoryWeights(replace(config, experts=experts), dense.embedding, layers, dense.final_norm)


def model(name: str, **sizes) -> MemoryWeights:
    config = tiny_config(**{**SMALL, **sizes})
    if name == "mixture":
        return mixture(config)
    if name == "llama":
        return random_weights(replace(config, sliding_window=9, windowed_layers=frozenset({0})))
    alibi = {"n_kv_heads": config.n_heads, "slopes": (0.5, 0.25, 0.1, 0.05), "rope": Rope(dim=0)}
    every = frozenset({"qkv", "out", "up", "down"})
    return random_weights(replace(config, norm_bias=True, biases=every, **alibi, **PLAIN))


def tensors(layer: Layer) -> dict[str, QTensor | np.ndarray]:
    found = {name: getattr(layer, name) for name in (*NORMS, "act_scale") if getattr(layer, name) is not None}
    for name, linear in vars(layer).items():
        if isinstance(linear, Linear):
            found |= {f"{name}[{i}]": segment for i, segment in enumerate(linear.segments)}
            found |= {} if linear.bias is None else {f"{name}.bias": linear.bias}
    return found


def assert_same(made: MemoryWeights, expected: MemoryWeights) -> None:
    for one, other in zip(made.layers, expected.layers, strict=True):
        found, wanted = tensors(one), tensors(other)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert type(found[name]) is type(value), name
            for field in ("codes", "scales", "zeros", "permutation") if isinstance(value, QTensor) else ("real",):
                assert np.array_equal(getattr(found[name], field), getattr(value, field)), (name, field)


def in_files(tmp_path, name: str, **options):
    """The files of a quantization of a tiny checkpoint, and its report."""
    pytest.importorskip("safetensors")
    import tiny_checkpoints as tiny

    source = tmp_path / "source"
    if not source.exists():
        tiny.write(source, {name: array * np.float16(0.3) for name, array in tiny.plain().items()}, bos_token_id=1)
    small = {"group_size": 32, "n_sequences": 4, "length": 24, "progress": False}
    report = quantize(source, tmp_path / name, **{**small, **options})
    return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}, report


@pytest.fixture
def stops_once(monkeypatch):
    """The next quantization ends, at its second layer, with what this is called with."""

    def stop(error: BaseException) -> None:
        given = pipeline._layer

        def layer(source, method, grid, activations, index, *more):
            if index == 1:
                monkeypatch.setattr(pipeline, "_layer", given)
                raise error
            return given(source, method, grid, activations, index, *more)

        monkeypatch.setattr(pipeline, "_layer", layer)

    return stop


def test_the_pretended_gpu_is_apart_from_the_cpu():
    with pretended() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert isinstance(there + there, Pretended) and isinstance(here + here, torch.Tensor)
        assert there.device == device and there.cpu().device.type == "cpu" and not there.is_cpu
        for meet in (lambda: there + here, lambda: there[torch.tensor([0])], lambda: here.addcmul_(there, there)):
            with pytest.raises(RuntimeError, match=r"on cuda:0 and on the CPU"):
                meet()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        with torch.device(device):
            assert all(isinstance(x, Pretended) for x in (torch.arange(3), torch.tensor([1]), torch.zeros(2)))
        here[:] = there + torch.tensor(1.0)
        assert here.tolist() == [2, 2, 2] and (there * 2).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "method", "more", "free"),
    [
        ("llama", "rtn", {}, ROOMY),
        ("llama", "awq", {}, ROOMY),
        ("plain", "awq", {"symmetric": True}, FULL),
        ("mixture", "awq", {"symmetric": True}, ROOMY),
        ("llama", "gptq", {"act_order": "static"}, FULL),
        ("llama", "gptq", {"act_order": "free", "group_size": 16}, FULL),
        ("plain", "gptq", {}, ROOMY),
        ("mixture", "gptq", {"bits": 3}, FULL),
        ("llama", "awq+gptq", {"bits": 2}, ROOMY),
    ],
)
def test_nothing_is_left_behind_and_choices_are_the_same(name, method, more, free, monkeypatch):
    monkeypatch.setattr(arithmetic, "engine", lambda: None)  # the kernels, which a GPU does without
    source = model(name, n_layers=1 if name == "mixture" and method == "awq" else 2)
    options = {"method": method, "group_size": -1, "sequences": sequences(source.config, (24, 7, 16)), **more}
    with sdpa_kernel(SDPBackend.MATH):  # as on the GPU
        expected, report = quantize_in_memory(source, device="cpu", **options)
    with pretended(free):
        made, found = quantize_in_memory(source, device="cuda", **options)
    assert_same(made, expected)
    assert (found.groups, found.rounding, found.kept) == (report.groups, report.rounding, report.kept)


@pytest.mark.parametrize("broken", ["the contexts", "what is made anew", "the biases"])
def test_what_is_left_behind_is_found(broken, monkeypatch):
    if broken == "the contexts":
        monkeypatch.setattr(Context, "to", lambda self, device: self)
    elif broken == "what is made anew":
        monkeypatch.setattr(devices, "computing_on", lambda device: nullcontext())
    else:
        monkeypatch.setattr("tinychat.quantize.dense.as_float", lambda array: _Stuck(torch.from_numpy(array)))
    source = model("plain", n_layers=1)
    with pretended(), pytest.raises(RuntimeError, match=r"on cuda:0 and on the CPU"):
        quantize_in_memory(source, method="gptq", group_size=-1, sequences=sequences(source.config, (8, 8)))


class _Stuck:
    """A tensor that does not go where it is told to."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def to(self, device: torch.device) -> torch.Tensor:
        return self._tensor


@pytest.mark.parametrize(("method", "free"), [("awq", FULL), ("gptq", ROOMY)])
def test_a_stopped_run_goes_on_on_its_own_device_only(tmp_path, stops_once, method, free):
    options = {"method": method, "symmetric": True}
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = in_files(tmp_path, "expected", device="cpu", **options)
    with pretended(free):
        stops_once(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            in_files(tmp_path, "out", **options)
    with pytest.raises(CheckpointError, match=r"device was cuda \(pretended\), now cpu.*--restart"):
        in_files(tmp_path, "out", **options)
    with pretended(free):
        made, report = in_files(tmp_path, "out", **options)
    assert made == expected and "computed on cuda (pretended)" in str(report)


def test_too_little_memory_is_told_and_keeps_what_is_done(tmp_path, stops_once):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.94 GiB of which"
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = in_files(tmp_path, "expected", method="gptq")
    with pretended():
        stops_once(torch.cuda.OutOfMemoryError(said))
        with pytest.raises(BackendError, match=r"for a layer \(CUDA .* 2.00 GiB\): end what else uses it .*--restart"):
            in_files(tmp_path, "out", method="gptq")
        assert (tmp_path / ".out.partial" / "state.json").exists()
        assert in_files(tmp_path, "out", method="gptq")[0] == expected


def test_devices_are_found_by_name(monkeypatch, tmp_path, capsys):
    assert devices.find("cpu") == devices.CPU and devices.describe(devices.CPU) == "cpu"
    with pretended() as device:
        assert devices.find("auto") == devices.find("cuda") == device and devices.find("cpu") == devices.CPU
        assert devices.describe(device) == "cuda (pretended)"
        monkeypatch.setattr(devices, "_unusable", lambda: "no code for it")
        with pytest.warns(UserWarning, match="cuda not used: no code for it"):
            assert devices.find("auto") == devices.CPU
        with pytest.raises(BackendError, match="cannot be used here: no code for it; --device cpu"):
            devices.find("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find("auto") == devices.CPU
    with pytest.raises(BackendError, match="no device 'tpu' to quantize on; there are: auto, cuda, cpu"):
        quantize_in_memory(model("llama"), method="rtn", device="tpu")
    assert main(["quantize", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cuda"]) == BackendError.exit_code
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["ieee", "tf32"])
def test_without_tf32_and_then_as_before(given):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has another setting for it")
    before, matmul.fp32_precision = matmul.fp32_precision, given
    try:
        with pytest.raises(ZeroDivisionError), devices.computing_on(devices.CPU):
            assert matmul.fp32_precision == given
            raise ZeroDivisionError
        with pretended() as device, devices.computing_on(device):
            assert matmul.fp32_precision == "ieee" and torch.zeros(2).device == device
        assert matmul.fp32_precision == given and torch.zeros(2).device == devices.CPU
    finally:
        matmul.fp32_precision = before


LARGER = {"hidden_size": 128, "intermediate_size": 192, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "rope": Rope(32)}


def compared(made: MemoryWeights, expected: MemoryWeights) -> float:
    """The share of codes that are equal."""
    same = total = 0
    for one, other in zip(made.layers, expected.layers, strict=True):
        found, wanted = tensors(one), tensors(other)
        for name, value in wanted.items():
            if isinstance(value, QTensor):
                same += int((found[name].codes == value.codes).sum())
                total += value.codes.size
    return same / total


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [{}, {"act_order": "static"}, {"act_order": "free"}, {"bits": 3, "symmetric": True}], ids=str
)
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq"])
@pytest.mark.parametrize("name", ["llama", "plain", "mixture"])
def test_a_gpu_chooses_as_the_cpu_does(name, method, more):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a PyTorch without CUDA")
    if "act_order" in more and "gptq" not in method:
        pytest.skip("act-order is of gptq")
    if more.get("act_order") == "free" and name == "mixture":
        pytest.skip("free act-order is not of experts")
    source = model(name, **LARGER)
    lengths = (100, 60, 128, 128, 30, 90)
    options = {"method": method, "group_size": 64, "sequences": sequences(source.config, lengths), **more}
    expected, report = quantize_in_memory(source, device="cpu", **options)
    made, found = quantize_in_memory(source, device="cuda", **options)
    again, _ = quantize_in_memory(source, device="cuda", **options)
    assert_same(again, made)
    if method == "rtn":
        assert_same(made, expected)
    share = compared(made, expected)
    print(f"{name}, {method}, {more}: {100 * share:.4f} % of codes equal")
    assert share >= 0.999
    for one, other in zip(found.groups, report.groups, strict=True):
        assert (one.layer, one.group, one.alpha, one.clipped) == (other.layer, other.group, other.alpha, other.clipped)
        assert one.loss == pytest.approx(other.loss, rel=1e-3), one
        assert one.loss_rtn == pytest.approx(other.loss_rtn, rel=1e-3), one


@pytest.mark.gpu
def test_a_gpu_goes_on_to_the_same_bytes(tmp_path, stops_once):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a PyTorch without CUDA")
    options = {"device": "cuda", "method": "gptq"}
    expected, report = in_files(tmp_path, "whole", **options)
    assert f"computed on cuda ({torch.cuda.get_device_name()})" in str(report)
    stops_once(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        in_files(tmp_path, "stopped", **options)
    assert in_files(tmp_path, "stopped", **options)[0] == expected
