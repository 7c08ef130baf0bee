"""The tables that benchmarks/arm prints, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import boards
from peers import CORES, FORMS

ALL_CORES = tuple(dict.fromkeys(core for cores in CORES.values() for core in cores))


@dataclass(frozen=True)
class Case:
    """A kernel that is counted; naive is ours with codes in their natural order."""

    engine: str
    level: str
    bits: int
    activations: int
    rows: int

    def __str__(self) -> str:
        """As the tables call it."""
        rows = "decode" if self.rows == 1 else f"{self.rows} rows"
        peer = f"llama.cpp Q4_0 {FORMS[self.level].interleaved}".strip()
        words = {"tinychat": "tinychat", "naive": "naive order", "llama.cpp": peer}
        return f"{words[self.engine]}, {self.bits} x {self.activations} bits, {rows}"


def kernels(found: dict[Case, dict]) -> str:
    """A row for each kernel; its ratio is to llama.cpp's instructions at that level and as many rows."""
    head = ["level", "weights x activations", "instructions", "to llama.cpp", *ALL_CORES]
    lines = [head, ["---"] * len(head)]
    for case, figures in found.items():
        peer = found.get(Case("llama.cpp", case.level, 4, 8, case.rows))
        ratio = f"{figures['instructions'] / peer['instructions']:.2f}" if peer and case.bits == 4 else ""
        cycles = [f"{figures['cycles'][core]:.3f}" if core in figures["cycles"] else "" for core in ALL_CORES]
        lines.append([case.level, str(case), f"{figures['instructions']:.4f}", ratio, *cycles])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def predictions(found: dict[Case, dict], hardware: Iterable[boards.Board]) -> str:
    """Predicted tokens a second of each board whose kernels were counted, 4 bits; "" where cycles are missing."""
    head = ["PREDICTED, 4 bits", "GB/s taken", "activations"]
    lines = [[*head, *(f"{model}: tokens/s at most" for model in boards.MODELS)], ["---"] * (3 + len(boards.MODELS))]
    tokens = [boards.need(model) for model in boards.MODELS]
    for board in hardware:
        for activations in (16, 8):
            body, top = (found.get(Case("tinychat", board.level, bits, activations, 1)) for bits in (4, 8))
            if not body or not top or board.core not in body["cycles"]:
                continue
            cycles = body["cycles"][board.core], top["cycles"][board.core]
            limits = [boards.predicted(board, token, *cycles) for token in tokens]
            lines.append([board.name, f"{board.gb_s:.1f}", str(activations), *map(cell, limits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def cell(limits: boards.Limits) -> str:
    """The limit, what sets it, and the other one."""
    other = "arithmetic" if limits.bound == "memory" else "memory"
    return f"{limits.at_most:.3g} ({limits.bound}; {other} {max(limits.memory, limits.arithmetic):.3g})"
