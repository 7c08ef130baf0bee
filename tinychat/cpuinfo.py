"""What this machine computes with: its processor, its largest cache, and how many threads are worth running.

Reads what the system says of itself (/proc, /sys) and knows no backend. Where nothing can be read it falls back to
`os.cpu_count()`.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores within this process's affinity mask and its cgroup's CPU quota; at least 1.

    Two threads of one core share its arithmetic and its path to memory: a second one does not help these kernels. Where
    cores are of two kinds, all count: the fast ones take over what is left of the shares of the slow.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core(root, cpu) for cpu in cpus}
    quota = _quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def processor(root: Path = Path("/")) -> str:
    """The processor's name, as far as the system tells it."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def last_level_cache(root: Path = Path("/")) -> int | None:
    """Bytes of the largest cache of the first CPU; None where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for entry in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(entry).strip()
        if text[:-1].isdigit() and text[-1:] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=None)


def _core(root: Path, cpu: int) -> tuple[str, ...]:
    """What tells a physical core from others; the CPU's own number where the system does not say."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _quota(root: Path) -> float | None:
    """CPUs granted by the strictest cgroup above this process, version 2 or 1; None where there is no limit."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        group = base / path.lstrip("/")
        while True:  # a container may see its own group as the root: look at every level that exists
            limits.append(read(group))
            if group == base or base not in group.parents:
                break
            group = group.parent
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _quota_v2(group: Path) -> float | None:
    fields = _read(group / "cpu.max").split()  # "max 100000" or "150000 100000": microseconds in each period
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(group: Path) -> float | None:
    quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
