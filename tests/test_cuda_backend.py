"""Whether the CUDA backend can be used, and what is said where it cannot."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import memory_weights, tiny

from tinychat import backends
from tinychat.backends import cuda
from tinychat.errors import BackendError, UsageError


def test_without_a_driver_it_is_not_there_and_nothing_heavy_is_imported(monkeypatch):
    monkeypatch.setattr(cuda, "_TRACES", ("/nowhere/nvidiactl",))
    assert not cuda.present() and "no NVIDIA GPU" in cuda.available()
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        backends.choose("cuda")
    module, why = backends.choose()
    assert module is not cuda and "cuda" not in why
    code = (
        "from tinychat.backends import cuda, choose\n"
        "cuda._TRACES = ()\n"
        "choose()\n"
        "import sys; print(sorted({'torch', 'transformers'} & set(sys.modules)), 'tinychat._cuda' in sys.modules)"
    )
    pytest.importorskip("tinychat._cpu", reason="the compiled kernels are not built")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[] False"


def kernels(devices=1, capability=(9, 0), integrated=False, compiled=True):
    found = {"name": "NVIDIA H200", "capability": capability, "integrated": integrated}
    return SimpleNamespace(
        device_count=lambda: devices,
        current_device=lambda: 0,
        device=lambda index: found,
        compiled=lambda: compiled,
    )


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine with a driver; `built(module)` gives it the kernels."""
    trace = tmp_path / "nvidiactl"
    trace.touch()
    monkeypatch.setattr(cuda, "_TRACES", (str(trace),))
    find, load = importlib.util.find_spec, importlib.import_module

    def built(module):
        absent = module is None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (None if absent else name) if name == "tinychat._cuda" else find(name),
        )
        monkeypatch.setattr(
            importlib, "import_module", lambda name, *rest: module if name == "tinychat._cuda" else load(name, *rest)
        )

    return built


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "nvcc"),
        (kernels(devices=0), "shows no GPU"),
        (kernels(capability=(7, 0)), "7.0"),
        (kernels(capability=(12, 1), compiled=False), "CUDAARCHS=121"),
        (kernels(), "without CUDA"),  # PyTorch
    ],
)
def test_a_device_that_is_not_used_is_spoken_of(driver, monkeypatch, module, reason):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    driver(module)
    assert cuda.present() and reason in cuda.available()
    other, why = backends.choose()
    assert other is not cuda and why.startswith("cuda not used: ") and reason in why


def test_a_device_that_is_used(driver, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    driver(kernels())
    assert backends.choose() == (cuda, backends.FASTEST)
    assert cuda.describe() == "cuda (NVIDIA H200, sm_90)" and cuda.free_bytes() == 7
    driver(kernels(capability=(8, 7), integrated=True))
    assert "shared with the CPU" in cuda.describe()
    free = cuda.free_bytes()
    assert free is None or free > 9


def test_options_it_does_not_have():
    for options, word in (
        (("fp64", 16, None), "fp64"),
        (("fp16", 8, None), "activations"),
        (("fp16", 16, "fp32"), "fp32"),
    ):
        with pytest.raises(UsageError, match=word):
            cuda.check_options(*options)
    cuda.check_options("fp32", 16, "bf16")


@pytest.mark.gpu
def test_it_loads_and_steps():
    """All of `build`, as `engine.load` calls it."""
    if reason := cuda.available():
        pytest.skip(reason)
    from tinychat.cache import Rows

    runner = cuda.build(memory_weights(*tiny("llama")), ctx_size=32, threads=None, kv_dtype="fp32")
    logits = runner.step(Rows.of([1, 2, 3], 0))
    assert logits.shape == (1, 97) and np.isfinite(logits).all()
