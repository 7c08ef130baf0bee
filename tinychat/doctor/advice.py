"""What would make it faster, or make it fit: sentences that follow from the facts, the weightiest first.

Each is a conclusion from something that was read or measured; where nothing is wrong there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinychat.memory import megabytes

HOT_C = 80  # where a zone does not tell its limit: a Raspberry Pi slows down from here on
NEAR_C = 5  # below the limit
SCALED_BY_HARDWARE = ("intel_pstate", "amd-pstate-epp", "amd-pstate")  # drivers whose "powersave" is no cap
PI_SUPPLY = "the supply or its cable does not hold 5 V: use the official one (3 A for a Pi 4, 5 A for a Pi 5)"
WHOLE_CORE = 1.0


def advise(facts: dict[str, Any]) -> list[str]:
    """Sentences about `facts`, as `command.gather` makes them."""
    parts = (_kernels, _cores, _raspberry_pi, _heat, _clocks, _power_mode, _gpu, _memory, _model, _bound)
    return [sentence for part in parts for sentence in part(facts)]


def _kernels(facts: dict[str, Any]) -> Iterator[str]:
    kernels = facts["kernels"]
    if kernels["backend"] is None:
        yield "tinychat cannot run a model here; why is said above, under 'backend'."
    elif kernels["backend"] == "reference":
        yield f"The slow PyTorch reference would run the model: {kernels['reason']}."
    if asked := kernels["forced"].get("TINYCHAT_FETCH"):
        yield f"TINYCHAT_FETCH asks for {asked}: unset it, and a model finds out what is fastest where it can."
    if asked := kernels["forced"].get("TINYCHAT_ISA"):
        if kernels["supported"] and asked != kernels["supported"][0]:
            yield f"TINYCHAT_ISA asks for {asked}: unset it, and the kernels take {kernels['supported'][0]}."
    elif kernels["unused"] and kernels["asked"] in ("auto", "cpu"):
        level = kernels["unused"][0]
        yield (
            f"The processor could run the kernels of level {level} and they are not used: this build of tinychat has "
            "none for it, or the system keeps it from programs; a newer tinychat or kernel may help."
        )


def _cores(facts: dict[str, Any]) -> Iterator[str]:
    cpu, threads = facts["processor"], facts["kernels"]["threads"] or facts["processor"]["threads"]
    quota, online, present = cpu["quota"], cpu["online"], cpu["present"]
    if quota is not None and quota < cpu["cpus"]:
        yield f"The control group grants {quota:g} of {cpu['cpus']} CPUs: give the container more (docker --cpus)."
        if quota < WHOLE_CORE:
            yield "Less than one whole CPU means that every token waits for the next period of the quota."
    elif online is not None and cpu["cpus"] < online:
        yield f"This process may use {cpu['cpus']} of {online} CPUs: an affinity mask (taskset, cpuset) keeps the rest."
    if online is not None and present is not None and online < present:
        yield f"{present - online} of {present} CPUs are offline: a power mode or the kernel's command line did that."
    if (asked := facts["kernels"]["forced"].get("TINYCHAT_THREADS")) and threads != cpu["threads"]:
        yield f"TINYCHAT_THREADS asks for {asked} threads; without it, it would be {cpu['threads']}, one for each core."


def _raspberry_pi(facts: dict[str, Any]) -> Iterator[str]:
    flags = facts["throttling"]["raspberry_pi"]
    if flags is None:
        return
    now, earlier = flags["now"], [flag for flag in flags["since_start"] if flag not in flags["now"]]
    if "under-voltage" in now:
        yield f"Under-voltage at this moment: {PI_SUPPLY}. Until then the clock stays low."
    elif "under-voltage" in earlier:
        yield f"There has been under-voltage since the start: {PI_SUPPLY}."
    hot = {"soft temperature limit", "throttled", "clock capped"}
    if hot & set(now):
        yield "The board slows itself down at this moment: it needs a heat sink or a fan, or a better supply (above)."
    elif hot & set(earlier):
        yield "The board has slowed itself down since the start: a fan keeps its clock up in long answers."


def _heat(facts: dict[str, Any]) -> Iterator[str]:
    for zone in facts["throttling"]["temperatures"]:
        limit = zone["limit"] or HOT_C
        if zone["celsius"] >= limit - NEAR_C:
            yield (
                f"{zone['zone']} is at {zone['celsius']:.0f} °C and slows down from {limit:.0f} °C on: "
                "cool it, or expect long answers to become slower."
            )
            return
    if facts["throttling"]["throttle_count"]:
        yield f"The processor has slowed down for heat {facts['throttling']['throttle_count']} times since the start."


def _clocks(facts: dict[str, Any]) -> Iterator[str]:
    for clock in facts["throttling"]["clocks"]:
        allowed, possible = clock["allowed"], clock["possible"]
        if allowed is not None and possible is not None and allowed < 0.98 * possible:
            yield f"The clock is held at {allowed} of {possible} MHz, by a power mode, a daemon or scaling_max_freq."
            return
        if clock["governor"] == "powersave" and clock["driver"] not in SCALED_BY_HARDWARE:
            yield (
                "The governor 'powersave' keeps the lowest clock: 'echo performance | sudo tee "
                "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor' until the next start."
            )
            return


def _power_mode(facts: dict[str, Any]) -> Iterator[str]:
    mode = facts["throttling"]["power_mode"]
    if mode is not None and mode["fastest_id"] is not None and mode["id"] != mode["fastest_id"]:
        yield (
            f"Power mode {mode['name'] or mode['id']} holds clocks and cores back: "
            f"'sudo nvpmodel -m {mode['fastest_id']}' ({mode['fastest']}), then 'sudo jetson_clocks'."
        )


def _gpu(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["gpus"] or facts["kernels"]["backend"] != "cpu":
        return
    name = facts["gpus"][0]["name"]
    if "cuda not used" in facts["kernels"]["reason"]:
        yield f"There is a GPU ({name}) and it is not used; why is said above, under 'backend'."


def _memory(facts: dict[str, Any]) -> Iterator[str]:
    m = facts["memory"]
    if m["group_room"] is not None and m["available"] is not None and m["group_room"] <= m["available"]:
        yield f"The control group leaves {megabytes(m['group_room'])} of memory: a larger limit allows larger models."
    if m["swap_used"] > 0.1 * (m["total"] or 0) > 0:
        yield (
            f"{megabytes(m['swap_used'])} of swap are in use: close other programs. A model that is swapped out is "
            "read from the disk again for every token."
        )


def _model(facts: dict[str, Any]) -> Iterator[str]:
    model = facts["model"]
    if model is None or model["fits"]:
        return
    if model["longest_context"]:
        yield f"{model['name']} fits with a context of {model['longest_context']} (-c {model['longest_context']})."
    elif model["longest_context_int8"]:
        yield f"{model['name']} fits with --kv-type int8 and a context of {model['longest_context_int8']}."
    else:
        yield f"{model['name']} does not fit at any useful context: take a smaller model, or fewer bits."


def _bound(facts: dict[str, Any]) -> Iterator[str]:
    """What the speed of decoding hangs on, where it was measured."""
    if facts["speed"] is None:
        return
    for doubt in facts["speed"]["doubts"]:
        yield f"The measurement of memory is doubtful ({doubt}): run it again when nothing else is running."
    rows = facts["models"] if facts["model"] is None else [facts["model"]]
    limits = [row["tokens_per_s"]["limit"] for row in rows if row["tokens_per_s"]]
    if limits and limits.count("memory") > len(limits) / 2:
        yield "Decoding waits for memory here: only fewer bytes a token make it faster, a smaller model or fewer bits."
    elif limits and limits.count("arithmetic") > len(limits) / 2:
        yield "Decoding waits for arithmetic here, not for memory: cores and clock decide; --activations 8 may help."
