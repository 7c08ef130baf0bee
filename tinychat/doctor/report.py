"""What the doctor found, in words, a line for each matter. Knows only plain data."""

from __future__ import annotations

from typing import Any

from tinychat.memory import megabytes

Rows = list[tuple[str, str]]


def report(facts: dict[str, Any]) -> str:
    """`facts` as `command.gather` makes them."""
    rows = [*_machine(facts), *_kernels(facts), *_memory(facts), *_speed(facts), *_throttling(facts)]
    lines = [f"{left:<14}{right}" for left, right in rows]
    if facts["model"] is not None:
        lines += ["", *_model(facts)]
    lines += ["", *_models(facts)]
    lines += ["", "what would make it faster" if facts["advice"] else "nothing was found that holds it back"]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in facts["advice"])])


def _machine(facts: dict[str, Any]) -> Rows:
    cpu = facts["processor"]
    total = "" if cpu["online"] in (None, cpu["cpus"]) else f" of {cpu['online']}"
    quota = "" if cpu["quota"] is None else f", of which {cpu['quota']:g} granted"
    rows = [] if facts["board"] is None else [("board", facts["board"])]
    rows.append(("processor", f"{cpu['name']}, {cpu['architecture']}"))
    rows.append(("", f"{cpu['cpus']}{total} CPUs for this process{quota}: {_threads(cpu['threads'])}"))
    for gpu in facts["gpus"]:
        driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
        shared = ", memory shared with the CPU" if gpu["shared_memory"] else ""
        rows.append(("gpu", f"{gpu['name']}{driver}{shared}"))
    return rows if facts["gpus"] else [*rows, ("gpu", "no NVIDIA GPU found")]


def _kernels(facts: dict[str, Any]) -> Rows:
    k = facts["kernels"]
    if k["backend"] is None:
        return [("backend", f"none: {k['reason']}")]
    rows = [("backend", f"{k['description']}: {k['reason']}")]
    if k["used"] is None:
        return rows
    asked = "TINYCHAT_ISA asks for it" if k["forced"].get("TINYCHAT_ISA") else "the best of those that run here"
    rows.append(("kernels", f"{k['used']}: {asked} ({', '.join(k['supported'])})"))
    rows += [("", f"not {level}: the processor lacks {', '.join(names)}") for level, names in k["lacking"].items()]
    rows += [("", f"not {level}: the processor has it, this build or the system does not") for level in k["unused"]]
    return rows


def _memory(facts: dict[str, Any]) -> Rows:
    m = facts["memory"]
    total, free = (_size(m[name]) for name in ("total", "available"))
    group = "" if m["group_room"] is None else f" ({megabytes(m['group_room'])} left by the control group)"
    swap = "no swap"
    if m["swap_total"]:
        on = f" on {', '.join(m['swap_on'])}" if m["swap_on"] else ""
        swap = f"swap {megabytes(m['swap_total'])}{on}, {megabytes(m['swap_used'])} used"
    return [("memory", f"{total}, {free} available{group}; {swap}")]


def _speed(facts: dict[str, Any]) -> Rows:
    s = facts["speed"]
    if s is None:
        return [("speed", "not measured")]
    return [
        ("speed", f"memory is read at {s['gb_s']:.1f} GB/s with {_threads(s['threads'])}"),
        ("", f"kernels multiply {s['weights_per_s'] / 1e9:.3g} billion 4-bit weights a second"),
    ]


def _throttling(facts: dict[str, Any]) -> Rows:
    t = facts["throttling"]
    rows: Rows = []
    if (pi := t["raspberry_pi"]) is not None:
        now, since = (", ".join(pi[when]) or "nothing" for when in ("now", "since_start"))
        rows.append(("throttling", f"now: {now}; since the start: {since} ({pi['word']})"))
    if t["throttle_count"] is not None:
        rows.append(("throttling", f"slowed down for heat {t['throttle_count']} times since the start"))
    if (mode := t["power_mode"]) is not None:
        fastest = f"; the fastest is {mode['fastest']}" if mode["fastest"] else ""
        rows.append(("power mode", f"{mode['name'] or mode['id']}{fastest}"))
    if t["temperatures"]:
        zone = t["temperatures"][0]
        limit = f", slows down from {zone['limit']:.0f} on" if zone["limit"] else ""
        rows.append(("temperature", f"{zone['celsius']:.0f} °C ({zone['zone']}){limit}"))
    seen = set()
    for clock in t["clocks"]:
        words = f"{clock['now'] or '?'} of {clock['possible']} MHz, governor {clock['governor'] or 'unknown'}"
        key = clock["possible"], clock["governor"], clock["allowed"]
        if key not in seen:  # one line for all groups of one kind
            rows.append(("clock", words))
        seen.add(key)
    return rows


def _model(facts: dict[str, Any]) -> list[str]:
    m = facts["model"]
    verdict = "fits" if m["fits"] else "does NOT fit"
    first = f"{m['name']}: {m['weights']}, {m['n_parameters'] / 1e9:.3g} B parameters"
    second = (
        f"  {verdict} at a context of {m['context']}: about {megabytes(m['needs']['total'])} "
        f"({megabytes(m['needs']['weights'])} weights, {megabytes(m['needs']['kv_cache'])} KV cache), "
        f"{_size(facts['memory']['available'])} available"
    )
    speed = _tokens(m["tokens_per_s"])
    return [first, second] + ([f"  {speed} tokens/s at most"] if speed else [])


def _models(facts: dict[str, Any]) -> list[str]:
    fitting = [row for row in facts["models"] if row["longest_context"] is not None]
    others = [row["name"] for row in facts["models"] if row["longest_context"] is None]
    lines = []
    if fitting:
        lines.append(f"{'published models in 4 bits':<28}{'needs':>8}{'longest context':>18}   tokens/s at most")
    for row in fitting:
        context = f"{row['longest_context']}" + (" (all)" if row["longest_context"] == row["limit"] else "")
        speed = _tokens(row["tokens_per_s"]) or "not measured"
        lines.append(f"  {row['name']:<26}{megabytes(row['needs']):>8}{context:>18}   {speed}")
    return lines + ([f"do not fit: {', '.join(others)}"] if others else [])


def _tokens(speed: dict[str, Any] | None) -> str | None:
    if speed is None or speed["at_most"] is None:
        return None
    return f"{speed['at_most']:.3g} ({speed['limit']})"


def _threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


def _size(n: int | None) -> str:
    return "unknown" if n is None else megabytes(n)
