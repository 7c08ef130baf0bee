"""The instructions that an emulated ARM program runs between two marks, and the cycles a core's model gives them.

qemu, told to translate one instruction at a time, logs each that it runs with its address; what lies between the two
calls of `count_mark` is the kernel, counted exactly: loop, epilogue, prologue, calls. The same sequence, disassembled
in the order in which it ran, goes through llvm-mca: cycles of the core's pipelines with every load in the first cache
and every branch foreseen.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

MARK = "count_mark"
EMULATOR = "qemu-aarch64-static"
MCA = ("llvm-mca-19", "llvm-mca")


def executed(program: Path, arguments: list[str], cpu: str) -> list[str]:
    """The instructions between the marks, in the order in which they ran on `cpu`, a model of qemu."""
    log = program.with_suffix(".log")
    command = [EMULATOR, "-cpu", cpu, one_at_a_time(), "-d", "nochain,exec", "-D", str(log), str(program), *arguments]
    try:
        subprocess.run(command, check=True)
        with log.open() as lines:
            addresses = traced(lines, address_of(MARK, output("aarch64-linux-gnu-nm", str(program))))
    finally:
        log.unlink(missing_ok=True)
    listing = disassembled(output("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(program)))
    return [listing[address] for address in addresses]


def output(*command: str) -> str:
    """What a command prints; CalledProcessError where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def one_at_a_time() -> str:
    """The option's name, which changed with qemu 8.1."""
    return "-one-insn-per-tb" if "one-insn-per-tb" in output(EMULATOR, "-help") else "-singlestep"


def traced(log: Iterable[str], mark: int) -> list[int]:
    """Addresses between the first and the second visit of `mark`, of qemu's log of translation blocks."""
    addresses = [int(line.split("/", 2)[1], 16) for line in log if line.startswith("Trace")]
    visits = [i for i, address in enumerate(addresses) if address == mark]
    if len(visits) != 2:
        raise RuntimeError(f"{len(visits)} visits of {MARK} in the log of {len(addresses)} instructions, expected 2")
    return addresses[visits[0] + 1 : visits[1]]


def address_of(name: str, symbols: str) -> int:
    """Where `name` is, of what nm prints."""
    found = re.search(rf"^([0-9a-f]+) \w {name}$", symbols, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no symbol {name} in the program")
    return int(found[1], 16)


def disassembled(listing: str) -> dict[int, str]:
    """The instruction at each address, of what objdump prints: without comments, and with one target for all branches,
    since the order is known. A call becomes a jump: llvm-mca lets a call take 100 cycles, for all it does not see."""
    found = {}
    for address, text in re.findall(r"^ *([0-9a-f]+):\t(.+)$", listing, re.MULTILINE):
        text = re.sub(r"^bl(r?) ", r"b\1 ", re.sub(r"\s*//.*|\s*<.*", "", text.replace("\t", " ")))
        found[int(address, 16)] = re.sub(r"^(b|b\.\w+|cbn?z|tbn?z|adrp?) (.*?)[0-9a-f]+$", r"\1 \g<2>next", text)
    return found


def mca() -> str | None:
    """The newest llvm-mca here: older ones model a Neoverse as a Cortex-A57."""
    return next((name for name in MCA if shutil.which(name)), None)


def cycles(instructions: list[str], core: str) -> int:
    """Of the sequence on `core`, a model of llvm-mca; the whole once, its start included."""
    options = ["-mattr=+dotprod,+i8mm", "-iterations=1", "-instruction-info=false", "-resource-pressure=false"]
    command = [mca() or MCA[0], "-mtriple=aarch64", f"-mcpu={core}", *options]
    done = subprocess.run(command, input="\n".join(("next:", *instructions, "")), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[:2000]}")
    return total_cycles(done.stdout)


def total_cycles(report: str) -> int:
    """Of what llvm-mca prints."""
    found = re.search(r"^Total Cycles:\s+(\d+)$", report, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no 'Total Cycles' in what llvm-mca prints: {report[:500]}")
    return int(found[1])
