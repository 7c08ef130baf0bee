"""What the machine is: board, processor, GPU, memory and swap, as the system tells it. Runs nothing."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from tinychat import cpuinfo, memory

MACHINES = {"arm64": "aarch64", "AMD64": "x86_64"}  # one name for each


def board(root: Path) -> str | None:
    """What the firmware calls the board: of PCs too, where the system shows it; None where it is not told."""
    tree = cpuinfo.read(root / "proc/device-tree/model").strip()
    return tree or cpuinfo.read(root / "sys/class/dmi/id/product_name").strip() or None


def architecture(root: Path) -> str:
    """aarch64 or x86_64, by the names that the processor's features have; this machine's where they do not tell."""
    found = cpuinfo.features(root)
    if "asimd" in found:
        return "aarch64"
    return "x86_64" if "sse2" in found and root != Path("/") else MACHINES.get(platform.machine(), platform.machine())


def processor(root: Path) -> dict[str, Any]:
    """The processor; cores are physical ones, of those CPUs that this process may use.

    cpus     that this process may run on; 'online' and 'present': of the machine, None where it is not told
    quota    CPUs that the control group grants, None without a limit
    threads  that tinychat runs by default
    """
    cpus = cpuinfo.cpus(root)
    system = root / "sys/devices/system/cpu"
    return {
        "name": cpuinfo.processor(root) if (root / "proc/cpuinfo").is_file() or root == Path("/") else "unknown",
        "architecture": architecture(root),
        "cpus": len(cpus),
        "online": len(cpuinfo.cpu_list(cpuinfo.read(system / "online"))) or None,
        "present": len(cpuinfo.cpu_list(cpuinfo.read(system / "present"))) or None,
        "quota": cpuinfo.quota(root),
        "threads": cpuinfo.physical_cores(root),
        "cache_bytes": cpuinfo.last_level_cache(root),
    }


def gpus(root: Path) -> list[dict[str, Any]]:
    """NVIDIA GPUs that the system shows: 'name', 'driver' (None where unknown), 'shared_memory'."""
    version = re.search(r"Module.*?\b(\d+\.\d+(?:\.\d+)?)\b", cpuinfo.read(root / "proc/driver/nvidia/version"))
    driver = version.group(1) if version else None
    found = [
        {"name": cpuinfo.fields(file).get("Model") or "NVIDIA GPU", "driver": driver, "shared_memory": False}
        for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    ]
    if is_jetson(root) and not found:
        release = re.search(r"R(\d+).*?REVISION: *([\d.]+)", cpuinfo.read(root / "etc/nv_tegra_release"))
        linux = f"Jetson Linux {release.group(1)}.{release.group(2)}" if release else None
        found = [{"name": "the Jetson's own", "driver": linux, "shared_memory": True}]
    return found


def is_jetson(root: Path) -> bool:
    """Whether the board is one."""
    return "jetson" in (board(root) or "").lower() or (root / "etc/nv_tegra_release").is_file()


def memory_facts(root: Path) -> dict[str, Any]:
    """Bytes: 'total', 'available' to this process, 'group_room' (None without a limit), swap and what it lies on."""
    system = memory.system(root)
    swaps = [line.split()[0] for line in cpuinfo.read(root / "proc/swaps").splitlines()[1:] if line.split()]
    return {
        "total": system.get("MemTotal"),
        "available": memory.available(root),
        "group_room": memory.group_room(root),
        "swap_total": system.get("SwapTotal", 0),
        "swap_used": max(0, system.get("SwapTotal", 0) - system.get("SwapFree", 0)),
        "swap_on": swaps,
    }
