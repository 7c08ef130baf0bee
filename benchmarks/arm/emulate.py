"""The instructions that an emulated ARM program runs between two marks, and the cycles a core's model gives them.

qemu, told to translate one instruction at a time, logs each that it runs with its address; what lies between the two calls
of `count_mark` is the kernel, counted exactly: loop, epilogue, prologue, calls. The same sequence, disassembled in the order
in which it ran, goes through llvm-mca: cycles of the core's pipelines with every load in the first cache and every branch
foreseen.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

MARK = "count_mark"


def run(program: Path, arguments: list[str], cpu: str) -> list[int]:
    """Addresses of the instructions between the marks, in the order in which they ran."""
    log = program.with_suffix(".log")
    emulator = ["qemu-aarch64-static", "-cpu", cpu, one_at_a_time(), "-d", "nochain,exec", "-D", str(log)]
    subprocess.run([*emulator, str(program), *arguments], check=True)
    addresses = [int(line.split("/", 2)[1], 16) for line in log.read_text().splitlines() if line.startswith("Trace")]
    log.unlink()
    mark = symbol(program, MARK)
    entries = [i for i, address in enumerate(addresses) if address == mark]
    if len(entries) != 2:
        raise RuntimeError(f"{program.name} {' '.join(arguments)}: {len(entries)} calls of {MARK} in the log, expected 2")
    return addresses[entries[0] + 1 : entries[1]]


def one_at_a_time() -> str:
    text = subprocess.run(["qemu-aarch64-static", "-help"], capture_output=True, text=True, check=True).stdout
    return "-one-insn-per-tb" if "one-insn-per-tb" in text else "-singlestep"


def symbol(program: Path, name: str) -> int:
    listing = subprocess.run(["aarch64-linux-gnu-nm", str(program)], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^([0-9a-f]+) \w {name}$", listing, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{program}: no symbol {name}")
    return int(found[1], 16)


def disassembled(program: Path) -> dict[int, str]:
    """The instruction at each address, without comments; a branch's target is left out, since the order is known."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for address, text in re.findall(r"^ *([0-9a-f]+):\t(.+)$", listing, re.MULTILINE):
        text = re.sub(r"\s*//.*|\s*<.*", "", text.replace("\t", " "))
        found[int(address, 16)] = re.sub(r"^(b|bl|b\.\w+|cbz|cbnz|tbz|tbnz|adr|adrp) (.*?)[0-9a-f]+$", r"\1 \g<2>next", text)
    return found


def cycles(instructions: list[str], mca: str, core: str) -> float:
    """Of the sequence on `core`, a model of llvm-mca; the whole once, its start included."""
    program = "\n".join(("next:", *instructions, ""))
    extensions = "-mattr=+dotprod,+i8mm"
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", extensions, "-iterations=1", "-instruction-info=false", "-resource-pressure=false"]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    found = re.search(r"^Total Cycles:\s+(\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"{mca} -mcpu={core}: {done.stderr.strip()[:2000]}")
    return int(found[1])
