"""What was measured, as tables for people and as one object for programs."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from measure import PREFILL, Run, Start

from tinychat.bench.probe import TOO_SLOW

GB = 1e9
QUIET = 0.1  # cores


def speeds(runs: list[Run]) -> str:
    """Two tables: what each engine did, and how many times as fast tinychat is."""
    measured = [
        "| engine | setting | threads | decode, tokens/s | of the read bandwidth | probe, GB/s "
        f"| prefill {PREFILL}, tokens/s | peak RSS, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        cells = (
            run.contender.name,
            run.contender.what + (", AMX off" if run.about["without_amx"] else ""),
            str(run.threads),
            _spread(run.decode, ".1f"),
            _fraction(run),
            _spread(run.probe_gb_s, ".1f"),
            _spread(run.prefill, ".0f"),
            f"{run.peak_rss_bytes / GB:.2f}",
        )
        measured.append(f"| {' | '.join(cells)} |")
    compared = ["| ours | threads | beside | decode, times as fast | prefill, times as fast |", "|---|---|---|---|---|"]
    for row in ratios(runs):
        cells = (row["ours"], str(row["threads"]), row["peer"], _times(row["decode"]), _times(row["prefill"]))
        compared.append(f"| {' | '.join(cells)} |")
    return "\n".join([*measured, "", *compared, "", _disturbance(runs)])


def _fraction(run: Run) -> str:
    fraction = statistics.median(run.fraction)
    return f"{fraction:.2f}" + " (the probe was disturbed)" * (fraction > TOO_SLOW)


def _disturbance(runs: list[Run]) -> str:
    """Whether the machine was quiet enough to believe the tables."""
    shares = [share for run in runs for share in run.others]
    if not shares:
        return "Nothing was measured."
    loud = sum(share > QUIET for share in shares)
    text = f"Other programs kept {statistics.median(shares):.2f} cores busy (median), {max(shares):.2f} at most"
    return (
        f"{text}: {loud} of {len(shares)} turns were disturbed; measure again on a quiet machine."
        if loud
        else f"{text}."
    )


def ratios(runs: list[Run]) -> list[dict[str, Any]]:
    """tinychat's speed over each peer's, round by round: median, least and greatest for decode and for prefill.

    Where one of the two failed, the rounds before that count: those that both have.
    Settings of one engine ("llama.cpp", "llama.cpp-repack") are also taken together: the faster one of each figure.
    """
    rows = []
    for ours in (run for run in runs if run.contender.ours):
        peers = [run for run in runs if not run.contender.ours and run.threads == ours.threads]
        families = {_family(peer): [p for p in peers if _family(p) == _family(peer)] for peer in peers}
        for family, members in families.items():
            best = [max(members, key=lambda run: statistics.median(getattr(run, figure))) for figure in FIGURES]
            if len(members) > 1:
                rows.append(_ratio(ours, f"{family}, best of each", best))
            rows += [_ratio(ours, member.contender.name, [member] * len(FIGURES)) for member in members]
    return rows


FIGURES = ("decode", "prefill")


def _family(run: Run) -> str:
    return str(run.contender.environment)


def _ratio(ours: Run, name: str, peers: list[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {"ours": ours.contender.name, "threads": ours.threads, "peer": name}
    for figure, peer in zip(FIGURES, peers, strict=True):
        values = [a / b for a, b in zip(getattr(ours, figure), getattr(peer, figure), strict=False)]
        row[figure] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        row[figure]["against"] = peer.contender.name
    return row


def starts(found: list[Start]) -> str:
    """The table of starts; times over tinychat's are taken within rounds, over the rounds of both."""
    lines = [
        "| engine | setting | threads | from the command to the first token, s | of it before its own code, s "
        "| peak RSS, GB | time over tinychat's |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = next((start for start in found if start.contender.ours), None)
    for start in found:
        times = [a / b for a, b in zip(start.seconds, ours.seconds, strict=False)] if ours else []
        cells = (
            start.contender.name,
            start.contender.what,
            str(start.threads),
            _spread(start.seconds, ".2f"),
            f"{statistics.median(start.interpreter):.2f}",
            f"{max(start.peak_rss_bytes) / GB:.2f}",
            f"{statistics.median(times):.2f}" if times else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(shape: str) -> str:
    """What the tables are of: shape, date, machine and command."""
    return "\n".join(
        (
            f"# Beside other engines: {shape}",
            "",
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine()}.",
            "",
            f"    {command()}",
            "",
        )
    )


def engines(abouts: Iterable[tuple[str, dict[str, Any]]], missing: dict[str, str]) -> str:
    """Versions and what each engine says of itself, and who failed and why."""
    lines = {f"- {name}: {about['version']}; {about['setting']}": None for name, about in abouts}
    return "\n".join([*lines, *(f"- {name} failed: {why}" for name, why in missing.items())])


def command() -> str:
    """The command line that is running."""
    return shlex.join(["python", "benchmarks/peers", *sys.argv[1:]])


def facts(shape: str) -> dict[str, Any]:
    """What every JSON object says of its origin."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"benchmark": "peers", "shape": shape, "machine": machine(), "date": now, "command": command()}


def machine() -> str:
    """The processor and memory, as far as the system tells."""
    info = _read("/proc/cpuinfo")
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _spread(values: list[float], form: str) -> str:
    """Median, and the least and greatest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"
