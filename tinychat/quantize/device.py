"""Where the quantizer computes: on the CPU, or layer by layer on an NVIDIA GPU with the same choices.

Within `computing_on` what PyTorch makes anew lies on the device, so that searches and solvers need not name it.
`dense_layer` brings the weights there and `Activations` the tokens; what is written comes back in `Grid.tensor` and
`quantized_layer`. Reading, bits packed into words, and files are the CPU's. This file knows no method.

The GPU computes in fp32 and fp64 as the CPU does, without TF32, and attention by its formula; sums are taken in another
order, so that of two choices as good as each other it may take the other. Rounding to nearest knows no sums, and is
computed so that it is the same to the last bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinychat.errors import BackendError

NAMES = ("auto", "cuda", "cpu")
CPU = torch.device("cpu")
SHARE = 0.25  # of the GPU's free memory that the calibration activations may take; where they do not fit, the host's


def find(name: str = "auto") -> torch.device:
    """The device called `name`; auto: cuda where PyTorch can use a GPU, else the CPU, with a warning if there is one.

    BackendError where there is no such device, or it cannot be used here.
    """
    if name not in NAMES:
        raise BackendError(f"no device {name!r} to quantize on; there are: {', '.join(NAMES)}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    reason = _unusable()
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise BackendError(f"device 'cuda' cannot be used here: {reason}; --device cpu quantizes without it")
    warnings.warn(f"cuda not used: {reason}", stacklevel=3)
    return CPU


def describe(device: torch.device) -> str:
    """For reports, and to tell the runs of two devices apart: 'cpu', or 'cuda (NVIDIA H200)'."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """See above; what was set is restored. BackendError where the GPU's memory does not suffice."""
    if device == CPU:
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        with torch.device(device), sdpa_kernel(SDPBackend.MATH):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise BackendError(
            f"the GPU's memory does not suffice for a layer ({str(error).partition('. GPU')[0]}): end what else uses "
            f"it and repeat the command, which goes on after the last finished layer; or begin anew on the CPU "
            f"(--device cpu --restart)"
        ) from None
    finally:
        setattr(matmul, setting, before)


def room_for(n_bytes: int, device: torch.device) -> torch.device:
    """Where so many bytes stay between layers: on the device where that leaves it enough room to work, else the CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the model that calibration text was sampled from
        free, _ = torch.cuda.mem_get_info(device)
        return device if n_bytes <= SHARE * free else CPU
    return device


def _unusable() -> str | None:
    """Why PyTorch cannot compute on a GPU; None where it can."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch ({torch.__version__}) finds no NVIDIA GPU, or no driver that it can use"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # a GPU that this build has no code for, or that another program has to itself
        return str(error).strip().partition("\n")[0]
    return None
