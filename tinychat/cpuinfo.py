"""What this machine computes with: its processor, its largest cache, and how many threads are worth running.

Reads what the system says of itself (/proc, /sys; below `root`, so that another machine's can be looked at) and knows
no backend. Where nothing can be read, or nothing that makes sense, it falls back to `os.cpu_count()`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

_MOST_CPUS = 1 << 16
# MIDR_EL1 as Linux prints it, implementer and part: 64-bit ARM kernels give no name.
_ARM_PARTS = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores within this process's affinity mask and its cgroup's CPU quota; at least 1.

    Two threads of one core share its arithmetic and its path to memory: a second one does not help these kernels. Where
    cores are of two kinds, all count: the fast ones take over what is left of the shares of the slow.
    """
    cores = {_core(root, cpu) for cpu in cpus(root)}
    granted = quota(root)
    return max(1, len(cores) if granted is None else min(len(cores), int(granted)))


def cpus(root: Path = Path("/")) -> set[int]:
    """Numbers of the CPUs that this process may run on; of another root, those that it says."""
    allowed = "" if root == Path("/") else fields(root / "proc/self/status").get("Cpus_allowed_list", "")
    if numbers := cpu_list(allowed):
        return numbers
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def processor(root: Path = Path("/")) -> str:
    """The processor's name, as far as the system tells it; of cores of several kinds, all."""
    names: list[str] = []
    implementer = ""
    for line in read(root / "proc/cpuinfo").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            return value
        if name == "CPU implementer":
            implementer = value
        if name == "CPU part":
            found = _ARM_PARTS.get((implementer, value), f"ARM core {implementer}/{value}")
            names += [found] if found not in names else []
    return " and ".join(names) or platform.processor() or platform.machine()


def features(root: Path = Path("/")) -> frozenset[str]:
    """The instruction-set extensions that the system lists, under the names it gives them."""
    found = fields(root / "proc/cpuinfo")
    return frozenset((found.get("flags") or found.get("Features") or "").split())


def last_level_cache(root: Path = Path("/")) -> int | None:
    """Bytes of the largest cache of the first CPU; None where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for entry in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = read(entry).strip()
        if (size := _whole(text[:-1])) is not None and text[-1:] in units:
            sizes.append(size * units[text[-1]])
    return max(sizes, default=None)


def quota(root: Path = Path("/")) -> float | None:
    """CPUs granted by the strictest cgroup above this process, version 2 or 1; None where there is no limit."""
    limits = (_quota_v1(group) if version == 1 else _quota_v2(group) for version, group in control_groups("cpu", root))
    return min((limit for limit in limits if limit is not None), default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, directory) of the cgroups in which `controller` may limit this process: its own and those around it.

    Not all need exist: a container may see its own group as the root.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        base = root / "sys/fs/cgroup"
        if controllers and controller not in controllers.split(","):
            continue
        if controllers:
            base /= controller
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            yield 1 if controllers else 2, folder
            if folder == base:
                break


def cpu_list(text: str) -> set[int]:
    """The CPUs of a list as the kernel writes it, "0-3,8"; empty where it is none."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        begin, end = _whole(first), _whole(last if dash else first)
        if begin is None or end is None or end > _MOST_CPUS:
            return set()
        numbers |= set(range(begin, end + 1))
    return numbers


def fields(path: Path) -> dict[str, str]:
    """The first value of each name in a file of 'name: value' lines; empty where it cannot be read."""
    found: dict[str, str] = {}
    for line in read(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def read(path: Path) -> str:
    """The file's text, less what ends a string of a device tree; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except (OSError, ValueError):
        return ""


def number(path: Path) -> int | None:
    """The whole number in a file; None where there is none."""
    return _whole(read(path).strip())


def _core(root: Path, cpu: int) -> tuple[str, ...]:
    """What tells a physical core from others; the CPU's own number where the system does not say.

    That is its threads, by whichever name this Linux has for them: on ARM a core's number may be another's of another
    cluster too.
    """
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if threads := cpu_list(read(topology / name)):
            return tuple(map(str, sorted(threads)))
    place = tuple(read(topology / name).strip() for name in ("physical_package_id", "core_id"))
    return place if all(place) else (str(cpu),)


def _quota_v2(group: Path) -> float | None:
    return _share(read(group / "cpu.max").split())  # "max 100000" or "150000 100000": microseconds in each period


def _quota_v1(group: Path) -> float | None:
    return _share([read(group / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")])


def _share(words: list[str]) -> float | None:
    """ "150000", "100000": 1.5. None for what is no limit, or nonsense."""
    numbers = [_whole(word) for word in words]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[0] and numbers[1] else None


def _whole(text: str) -> int | None:
    """The number that some ASCII digits spell; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
