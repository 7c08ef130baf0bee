"""Which backend and which level of kernels will run, and why not a better one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinychat import backends, cpuinfo
from tinychat.doctor import machine
from tinychat.errors import TinychatError, UsageError

# What a level needs, under Linux' names; best first. csrc/isa.cpp asks the processor itself.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": ("amx_int8", "amx_tile", "avx512_vnni"),
        "avx512vnni": ("avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
        "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        "avxvnni": ("avx_vnni", "avx2"),
        "avx2": ("avx2", "fma", "f16c"),
    },
    "aarch64": {"i8mm": ("i8mm", "asimddp"), "dotprod": ("asimddp",), "neon": ("asimd",)},
}
_TOLD = {"x86_64": "sse2", "aarch64": "asimd"}  # every processor has it: where it is not listed, nothing can be read


def here(device: str = "auto") -> dict[str, Any]:
    """What tinychat says of itself on this machine.

    backend, description, reason  the one that would run, its words, and why it is taken; None and why where none can
    used, supported               levels of the cpu backend: the one in use, all that run, best first; None and []
    threads                       that it would run; None where it is not the cpu backend
    device_memory                 bytes that are free on a device with memory of its own, else None
    forced                        environment variables that decide in its place
    asked                         `device`

    UsageError where there is no backend of that name.
    """
    if device not in (known := ("auto", *backends.PREFERENCE)):
        raise UsageError(f"there is no device {device!r}; choose one of {', '.join(known)}")
    found: dict[str, Any] = {"backend": None, "description": None, "used": None, "supported": [], "threads": None}
    found["device_memory"] = None
    found["forced"] = {n: v for n in ("TINYCHAT_ISA", "TINYCHAT_FETCH", "TINYCHAT_THREADS") if (v := os.environ.get(n))}
    try:
        module, found["reason"] = backends.choose(device)
        name = backends.name_of(module)
        if name == "cpu":
            from tinychat.backends import cpu, cpu_linear

            supported = cpu_linear.supported_isas()
            found |= {"used": cpu_linear.extension().isa(), "supported": supported, "threads": cpu.thread_count(None)}
        elif hasattr(module, "free_bytes"):
            found["device_memory"] = module.free_bytes()
        found |= {"backend": name, "description": module.describe()}
    except TinychatError as error:
        found["reason"] = str(error)
    found["asked"] = device
    return found


def judged(found: dict[str, Any], root: Path) -> dict[str, Any]:
    """`found` (see `here`) beside what the processor below `root` has.

    lacking  of levels better than the one in use: what the processor lacks for it
    unused   levels better than the one in use that the processor could run, and this build or the system does not
    """
    kind, has = machine.architecture(root), cpuinfo.features(root)
    levels: dict[str, tuple[str, ...]] = LEVELS.get(kind, {}) if _TOLD.get(kind) in has else {}
    lacking: dict[str, list[str]] = {}
    unused: list[str] = []
    for level, needed in levels.items():
        if level == found["used"]:
            break
        missing = [name for name in needed if name not in has]
        if missing:
            lacking[level] = missing
        elif level not in found["supported"]:
            unused.append(level)
    return {**found, "lacking": lacking, "unused": unused}
