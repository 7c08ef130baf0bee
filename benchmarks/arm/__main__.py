"""`python benchmarks/arm`: see HELP."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import boards
import cross_build
import emulate
import report
from peers import CORES, CPUS

HELP = """
Instructions and cycles of the ARM kernels on a machine without an ARM processor, beside llama.cpp's, and the speed of
decoding that they and the memory of boards allow.

Our kernels and llama.cpp's for Q4_0 are cross-built for each level (neon: ARMv8.0; dotprod; i8mm) by the same compiler.
One call of each runs under qemu, which logs every instruction: instructions a weight are exact, loops, epilogues and
calls alike for both. The same sequence goes through llvm-mca's model of a core: cycles a weight, with all loads in the
first cache. From cycles and published memory bandwidth follow the tokens a second that a board can give at most: these
are PREDICTED. On a board, `tinychat doctor` measures both limits and `tinychat bench` the speed.
"""
EXAMPLES = """
examples:
  python benchmarks/arm                            everything; llama-cpp-python's sources are downloaded (80 MB)
  python benchmarks/arm --llama ~/llama.cpp        with sources that are there
  python benchmarks/arm --no-llama --levels neon   our kernels of one level
  python benchmarks/arm --work build/arm-count     keeps what was built and downloaded

needs: apt-get install --no-install-recommends g++-aarch64-linux-gnu qemu-user-static llvm-19; pip install cmake
"""
TOOLS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", emulate.EMULATOR)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/arm",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--levels", nargs="+", choices=CPUS, default=list(CPUS), help="default: all three")
    p.add_argument("-k", type=int, default=4096, metavar="N", help="inputs, a multiple of 128 (default: 4096)")
    p.add_argument("-n", type=int, default=32, metavar="N", help="outputs, a multiple of 16 (default: 32)")
    p.add_argument("--llama", type=Path, metavar="DIR", help="sources of llama.cpp or llama-cpp-python")
    p.add_argument("--no-llama", action="store_true", help="our kernels only")
    p.add_argument("--work", type=Path, metavar="DIR", help="where to build (default: a temporary folder)")
    p.add_argument("--json", action="store_true", help="one JSON object more, on the last line")
    return p


def cases(level: str) -> list[report.Case]:
    """What is counted at a level: decoding at each width, a batch, the naive order of codes, and llama.cpp's."""
    found = [report.Case("tinychat", level, bits, act, 1) for bits in (4, 3, 2, 8) for act in (16, 8)]
    found += [report.Case("tinychat", level, 4, act, 4) for act in (16, 8)]
    if level != "i8mm":  # one row is dotprod's there
        found += [report.Case("naive", level, 4, act, 1) for act in (16, 8)]
    return [*found, report.Case("llama.cpp", level, 4, 8, 1), report.Case("llama.cpp", level, 4, 8, 4)]


def measure(case: report.Case, programs: dict[str, Path], n: int, k: int) -> dict:
    """Instructions and, of each core that runs the level, cycles: of one weight with one row."""
    if case.engine == "llama.cpp":
        program, arguments = programs[f"llama {case.level}"], [case.rows, n, k]
    else:
        name = f"naive-{case.level}" if case.engine == "naive" else case.level
        program, arguments = programs["ours"], [name, case.bits, case.activations, case.rows, n, k]
    ran = emulate.executed(program, [str(a) for a in arguments], CPUS[case.level])
    products = case.rows * n * k
    cycles = {core: emulate.cycles(ran, core) / products for core in CORES[case.level]} if emulate.mca() else {}
    return {"instructions": len(ran) / products, "cycles": cycles}


def run(args: argparse.Namespace, work: Path) -> dict[report.Case, dict]:
    """Builds, counts, and says on stderr what it is at."""
    print("building", file=sys.stderr)
    programs = {"ours": cross_build.ours(work)}
    if not args.no_llama:
        sources = args.llama or cross_build.llama_sources(work)
        programs |= {f"llama {level}": cross_build.llama(sources, work, level) for level in args.levels}
    found = {}
    for case in [case for level in args.levels for case in cases(level)]:
        if case.engine == "llama.cpp" and args.no_llama:
            continue
        found[case] = measure(case, programs, args.n, args.k)
        print(f"{case}: {found[case]['instructions']:.4f} instructions a weight", file=sys.stderr)
    return found


def main() -> int:
    """The command."""
    args = parser().parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or args.k % 128 or args.n % 16:
        wrong = f"{', '.join(missing)} not found" if missing else f"-k {args.k} -n {args.n}: no whole groups or tiles"
        print(f"benchmarks/arm: {wrong}; --help says what is needed", file=sys.stderr)
        return 2
    if emulate.mca() != emulate.MCA[0]:
        print(f"no {emulate.MCA[0]} here: cycles are missing, or an older model's", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work.resolve() if args.work else Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = run(args, work)
    print(report.kernels(found))
    predictions = report.predictions(found, boards.BOARDS)
    if predictions:
        print("\n" + predictions)
    if args.json:
        print(json.dumps([{**vars(case), **figures} for case, figures in found.items()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
