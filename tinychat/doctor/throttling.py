"""What holds the machine back: heat, supply, power modes and clocks, as far as the system lets them be read.

Raspberry Pi: the firmware's word of flags, by `vcgencmd get_throttled` or its file. Jetson: nvpmodel's mode, by its own
files. Everything else is Linux': thermal zones, cpufreq, and what x86 counts of its own throttling.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tinychat import cpuinfo

# Bits of the firmware's word; 16 higher is the same of any time since the start.
PI_FLAGS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
SINCE_START = 16
VCGENCMD_S = 5  # to answer in: it talks to the firmware


def facts(root: Path) -> dict[str, Any]:
    """All of it; a matter that cannot be read is None or empty."""
    return {
        "raspberry_pi": raspberry_pi(root),
        "power_mode": power_mode(root),
        "temperatures": temperatures(root),
        "clocks": clocks(root),
        "throttle_count": throttle_count(root),
    }


def raspberry_pi(root: Path) -> dict[str, Any] | None:
    """The firmware's flags: 'word', those set 'now', and those set at some time 'since_start'."""
    files = (root / "sys/devices/platform").glob("soc*/*firmware/get_throttled")
    words = [cpuinfo.read(file).strip() for file in sorted(files)]
    if not words and root == Path("/") and shutil.which("vcgencmd"):
        words = [_vcgencmd()]
    for text in words:
        word = text.rpartition("=")[2].removeprefix("0x")
        if re.fullmatch("[0-9a-fA-F]{1,8}", word):
            return decode(int(word, 16))
    return None


def decode(word: int) -> dict[str, Any]:
    """The flags of a word such as 0x50005."""
    return {
        "word": f"{word:#x}",
        "now": [name for bit, name in PI_FLAGS.items() if word >> bit & 1],
        "since_start": [name for bit, name in PI_FLAGS.items() if word >> bit + SINCE_START & 1],
    }


def power_mode(root: Path) -> dict[str, Any] | None:
    """A Jetson's power mode: 'id', 'name', and the 'fastest' one that its table has (MAXN, or the most watts)."""
    table = cpuinfo.read(root / "etc/nvpmodel.conf")
    modes = {int(i): name for i, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,3})\s+NAME=(\S+?)\s*>", table)}
    status = re.search(r"pmode:(\d{1,4})", cpuinfo.read(root / "var/lib/nvpmodel/status"))
    if status is None:
        return None
    mode = int(status.group(1))
    fastest = max(modes, key=lambda i: _watts(modes[i]), default=None)
    return {
        "id": mode,
        "name": modes.get(mode),
        "fastest_id": fastest,
        "fastest": None if fastest is None else modes[fastest],
    }


def temperatures(root: Path) -> list[dict[str, Any]]:
    """Thermal zones, hottest first: 'zone', 'celsius', and 'limit', from which on it slows down (None if untold)."""
    found = []
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        celsius = _milli(cpuinfo.read(zone / "temp"))
        if celsius is None:
            continue
        trips = [
            _milli(cpuinfo.read(kind.with_name(kind.name.replace("_type", "_temp"))))
            for kind in zone.glob("trip_point_*_type")
            if cpuinfo.read(kind).strip() in ("passive", "hot")
        ]
        limit = min((trip for trip in trips if trip is not None and trip > 0), default=None)
        name = cpuinfo.read(zone / "type").strip() or zone.name
        found.append({"zone": name, "celsius": celsius, "limit": limit})
    return sorted(found, key=lambda zone: (-zone["celsius"], zone["zone"]))


def clocks(root: Path) -> list[dict[str, Any]]:
    """One entry for each group of cores that share a clock: MHz 'now', 'allowed' and 'possible', and the 'governor'."""
    found = []
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        khz = {name: cpuinfo.number(policy / f"{name}_freq") for name in ("scaling_cur", "scaling_max", "cpuinfo_max")}
        if khz["cpuinfo_max"] is None:
            continue
        found.append(
            {
                "cpus": cpuinfo.read(policy / "affected_cpus").strip(),
                "now": _mhz(khz["scaling_cur"]),
                "allowed": _mhz(khz["scaling_max"]),
                "possible": _mhz(khz["cpuinfo_max"]),
                "governor": cpuinfo.read(policy / "scaling_governor").strip() or None,
                "driver": cpuinfo.read(policy / "scaling_driver").strip() or None,
            }
        )
    return found


def throttle_count(root: Path) -> int | None:
    """How often an x86 package has slowed down for heat since the start; None where it does not count."""
    files = (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/package_throttle_count")
    counts = [count for file in files if (count := cpuinfo.number(file)) is not None]
    return max(counts, default=None)


def _vcgencmd() -> str:
    try:
        run = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, encoding="utf-8", errors="replace", timeout=VCGENCMD_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _milli(text: str) -> float | None:
    """Thousandths as the kernel writes them, also below zero; None for what is no temperature."""
    text = text.strip()
    return int(text) / 1000 if re.fullmatch("-?[0-9]{1,6}", text) else None


def _mhz(khz: int | None) -> int | None:
    return None if khz is None else round(khz / 1000)


def _watts(name: str) -> float:
    """How a power mode ranks: MAXN and its kin are beyond all that name their watts."""
    if name.upper().startswith("MAXN"):
        return 1000 + len(name)  # MAXN_SUPER beyond MAXN
    watts = re.search(r"(\d+)W", name.upper())
    return float(watts.group(1)) if watts else 0.0
