"""The CUDA backend: the decoder in PyTorch (`tinychat/decoder.py`) on an NVIDIA GPU, its operations our own kernels.

Looking whether it can be used costs little and imports no torch: without NVIDIA's driver, and on a machine whose build
left the kernels out, the light path stays light. What needs torch is in `cuda_ops.py`, `cuda_runner.py` and their kin.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.errors import BackendError, UsageError
from tinychat.memory import Footprint
from tinychat.weights import WeightSource

if TYPE_CHECKING:
    from tinychat.backends.cuda_runner import CudaRunner

# torch, CUDA's context and cuBLAS; codes as the kernels keep them; the largest weight in 16 bits while it is prefilled.
FOOTPRINT = Footprint(program=768 << 20, widths=(4, 8), step_bytes=0)
# What the cache holds: activations have 16 bits, so fp32 would keep of them what fp16 does, but for the last bits of a
# rotation.
KEPT_AS = {"fp16": "fp16", "fp32": "fp16", "int8": "int8"}

# What NVIDIA's driver shows: of a card, under WSL, and on a Jetson.
_TRACES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl-gpu", "/dev/nvgpu")


def present() -> bool:
    """Whether there seems to be an NVIDIA GPU with a driver; it may be of no use all the same."""
    return any(Path(trace).exists() for trace in _TRACES)


def available() -> str | None:
    """None, or why this backend cannot be used."""
    if not present():
        return "there is no NVIDIA GPU, or no driver for it"
    if importlib.util.find_spec("tinychat._cuda") is None:
        return "its kernels are not built; install tinychat anew where CUDA's compiler is at hand (nvcc in PATH)"
    try:
        kernels = importlib.import_module("tinychat._cuda")
    except ImportError as error:
        return f"its kernels do not load ({error})"
    if kernels.device_count() == 0:
        return "NVIDIA's driver shows no GPU (or is older than the CUDA that the kernels were built with)"
    major, minor = _device()["capability"]
    if (major, minor) < (7, 5):
        return f"a GPU of compute capability {major}.{minor}; the kernels need 7.5 (Turing) or later"
    if not kernels.compiled():
        return (
            f"its kernels are not compiled for a GPU of compute capability {major}.{minor}; install tinychat anew with "
            f"CUDAARCHS={major}{minor}"
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"PyTorch does not load ({error}); install it with: pip install torch"
    if not torch.cuda.is_available():
        return f"this PyTorch ({torch.__version__}) is built without CUDA, or for another driver"
    return None


def describe(threads: int | None = None) -> str:
    """One line: the GPU, as 'cuda (NVIDIA H200, sm_90)'; threads are the cpu backend's."""
    found = _device()
    major, minor = found["capability"]
    shared = ", memory shared with the CPU" if found["integrated"] else ""
    return f"cuda ({found['name']}, sm_{major}{minor}{shared})"


def free_bytes() -> int | None:
    """Bytes of the GPU's memory that are free. Where it is the CPU's own, what the system can give counts."""
    if _device()["integrated"]:
        from tinychat import memory

        return memory.available()
    import torch

    return torch.cuda.mem_get_info()[0]


def peak_bytes() -> int:
    """Bytes that torch's tensors took on the GPU at the most."""
    import torch

    return torch.cuda.max_memory_allocated()


def build(
    source: WeightSource,
    *,
    ctx_size: int,
    n_slots: int = 1,
    threads: int | None = None,
    kv_dtype: str = "fp16",
    activations: int = 16,
    head: int = 16,
    dtype: str | None = None,
    graphs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CudaRunner:
    """A runner of `source` with `n_slots` caches of `ctx_size` positions each.

    threads: not used; kv_dtype fp16, int8, or fp32, which is kept as fp16; activations: 16 alone; head: 16 for the
    output head as it is stored, 8 to round it; dtype: of activations, fp16 or bf16, by default bf16 where the
    checkpoint's own is and the GPU multiplies it (8.0 and later); graphs: decoding steps are captured once and
    replayed; progress(done, total): called after each layer. Where the GPU can (9.0 and later), kernels begin while the
    one before them ends, but for TINYCHAT_CUDA_OVERLAP=0.
    Raises UsageError for another option, BackendError where the GPU cannot hold or run the model.
    """
    if reason := available():
        raise BackendError(f"backend 'cuda' cannot be used here: {reason}")
    import torch

    from tinychat.backends.cuda_runner import build_on

    check_options(kv_dtype, activations, dtype)
    kernels = importlib.import_module("tinychat._cuda")
    kernels.overlap(os.environ.get("TINYCHAT_CUDA_OVERLAP", "1") != "0")
    where = torch.device("cuda", torch.cuda.current_device())
    options: dict[str, Any] = {"kv_dtype": KEPT_AS[kv_dtype], "head": head, "dtype": dtype, "graphs": graphs}
    try:
        return build_on(kernels, where, source, ctx_size=ctx_size, n_slots=n_slots, progress=progress, **options)
    except torch.cuda.OutOfMemoryError:
        need = n_slots * source.config.kv_bytes(ctx_size, 1 if kv_dtype == "int8" else 2)
        raise BackendError(
            f"not enough memory on the GPU for the model and a KV cache of {need / 1e9:.2f} GB ({n_slots} x {ctx_size} "
            "positions); load with a smaller context (--ctx-size)"
        ) from None


def check_options(kv_dtype: str, activations: int, dtype: str | None) -> None:
    """UsageError where this backend has no such thing."""
    if kv_dtype not in KEPT_AS:
        raise UsageError(f"kv_dtype {kv_dtype!r}; the cuda backend has {', '.join(KEPT_AS)}")
    if activations != 16:
        raise UsageError(f"activations {activations!r}; the cuda backend keeps 16 bits: leave it at 16")
    if dtype not in (None, "fp16", "bf16"):
        raise UsageError(f"dtype {dtype!r}; the cuda backend computes in fp16 or bf16")


def _device() -> dict[str, Any]:
    """Of the GPU that is used: the process's current one."""
    kernels = importlib.import_module("tinychat._cuda")
    return kernels.device(kernels.current_device())
