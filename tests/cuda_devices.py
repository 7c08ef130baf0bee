"""Where tests of the CUDA kernels run: on the CPU through tinychat._cuda_host, and with `-m gpu` on a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch

# oneDNN multiplies bf16 by instructions that some virtual machines show and do not run.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

DEVICES = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


def kernels(name: str) -> tuple[ModuleType, torch.device]:
    """The module and the device of its tensors; skips where there is none."""
    if name == "host":
        reason = "the CUDA kernels are not built for the host (cmake -DTINYCHAT_CUDA_HOST=ON)"
        return pytest.importorskip("tinychat._cuda_host", reason=reason), torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a PyTorch without CUDA")
    return importlib.import_module("tinychat._cuda"), torch.device("cuda", 0)
