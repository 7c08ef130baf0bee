"""benchmarks/arm: what it reads of the tools it runs, and the arithmetic of its predictions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARM = ROOT / "benchmarks" / "arm"
LOG = """\
Trace 0: 0x7f10 [00000000/0000000000400580/00000002/ff000201] main
Trace 0: 0x7f20 [00000000/0000000000400700/00000002/ff000201] count_mark
Trace 0: 0x7f30 [00000000/0000000000400584/00000002/ff000201] main
IN: something else
Trace 0: 0x7f40 [00000000/0000000000400588/00000002/ff000201] main
Trace 0: 0x7f30 [00000000/0000000000400584/00000002/ff000201] main
Trace 0: 0x7f20 [00000000/0000000000400700/00000002/ff000201] count_mark
Trace 0: 0x7f50 [00000000/000000000040058c/00000002/ff000201] main
"""
LISTING = """\
/build/count:     file format elf64-littleaarch64

0000000000400580 <main>:
  400580:\tstp\tx29, x30, [sp, #-48]!
  400584:\tsdot\tv0.4s, v1.16b, v2.4b[3]
  400588:\tb.ne\t400584 <main+0x4>  // b.any
  40058c:\ttbz\tw3, #4, 400580 <main>
  400590:\tadrp\tx0, 48b000 <tunable_list+0x618>
  400594:\tmov\tw1, #0x80                  \t// #128
  400598:\tbl\t400700 <count_mark>
  40059c:\tblr\tx3
"""


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ARM))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ARM) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_what_ran_between_the_marks(module):
    emulate = module("emulate")
    assert emulate.address_of("count_mark", "0000000000400580 T main\n0000000000400700 T count_mark\n") == 0x400700
    assert emulate.traced(LOG.splitlines(), 0x400700) == [0x400584, 0x400588, 0x400584]
    with pytest.raises(RuntimeError, match="0 visits of count_mark in the log of 7 instructions, expected 2"):
        emulate.traced(LOG.splitlines(), 0x400800)
    with pytest.raises(RuntimeError, match="no symbol count_mark"):
        emulate.address_of("count_mark", "0000000000400580 T main\n")


def test_a_listing_becomes_a_program_with_one_label(module):
    assert module("emulate").disassembled(LISTING) == {
        0x400580: "stp x29, x30, [sp, #-48]!",
        0x400584: "sdot v0.4s, v1.16b, v2.4b[3]",
        0x400588: "b.ne next",
        0x40058C: "tbz w3, #4, next",
        0x400590: "adrp x0, next",
        0x400594: "mov w1, #0x80",
        0x400598: "b next",
        0x40059C: "br x3",
    }


def test_cycles_of_a_report(module):
    emulate = module("emulate")
    assert emulate.total_cycles("Iterations:        1\nInstructions:      400\nTotal Cycles:      304\n") == 304
    with pytest.raises(RuntimeError, match="no 'Total Cycles'"):
        emulate.total_cycles("error: unknown target\n")


def test_a_program_is_counted_by_the_tools_themselves(module, tmp_path):
    emulate = module("emulate")
    needed = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump", emulate.EMULATOR)
    if missing := [tool for tool in needed if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not found; see benchmarks/arm --help")
    (tmp_path / "three.c").write_text(
        '__attribute__((noinline)) void count_mark(void) { __asm__ volatile("" ::: "memory"); }\n'
        "int main(int argc, char** argv) {\n"
        "    count_mark();\n"
        '    for (int i = 0; i < argc; i++) __asm__ volatile("nop\\n sdot v0.4s, v1.16b, v2.16b");\n'
        "    count_mark();\n"
        "}\n"
    )
    command = ["aarch64-linux-gnu-gcc", "-O1", "-static", "-march=armv8.2-a+dotprod", "three.c", "-o", "three"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ran = emulate.executed(tmp_path / "three", ["a", "b"], "cortex-a76")
    assert [text.split()[0] for text in ran].count("nop") == 3 and ran.count("sdot v0.4s, v1.16b, v2.16b") == 3, ran
    assert ran[-1] == "b next" and len(ran) < 30, ran
    if emulate.mca():
        assert 3 <= emulate.cycles(ran, "cortex-a76") < 60
    with pytest.raises(subprocess.CalledProcessError):  # the emulator's A72 has no dot product
        emulate.executed(tmp_path / "three", [], "cortex-a72")


def test_a_prediction_is_the_lower_limit(module):
    boards = module("boards")
    token = boards.Need(bytes=2e9, weights=4e9, head=1e9)
    board = boards.Board("made up", "neon", "cortex-a72", cores=2, ghz=1.5, peak=10.0, measured=4.0)
    limits = boards.predicted(board, token, cycles=0.25, head_cycles=0.5)
    assert (limits.memory, limits.arithmetic) == (2.0, 2.0)  # 4e9 / 2e9; 3e9 / (1e9 + 5e8)
    assert boards.predicted(board, token, 0.5, 0.5).at_most == pytest.approx(1.2)
    assert boards.predicted(board, token, 0.5, 0.5).bound == "arithmetic"
    unmeasured = boards.Board("made up", "neon", "cortex-a72", 2, 1.5, peak=10.0)
    assert boards.predicted(unmeasured, token, 0.1, 0.1).memory == pytest.approx(boards.SHARE * 5)
    assert boards.predicted(unmeasured, token, 0.1, 0.1).bound == "memory"


def test_the_need_of_a_model_is_that_of_its_shape(module):
    need = module("boards").need("llama-2-7b")
    layers, hidden, inner, vocabulary = 32, 4096, 11008, 32000
    assert need.weights == layers * (4 * hidden * hidden + 3 * hidden * inner)
    assert need.head == vocabulary * hidden
    codes = need.weights / 2 + need.head
    assert codes < need.bytes < codes * 1.1  # scales, zeros and 256 positions of keys and values more


def test_tables(module):
    boards, report = module("boards"), module("report")
    ours, head = report.Case("tinychat", "neon", 4, 16, 1), report.Case("tinychat", "neon", 8, 16, 1)
    peer = report.Case("llama.cpp", "neon", 4, 8, 1)
    found = {
        ours: {"instructions": 0.5, "cycles": {"cortex-a72": 0.25}},
        head: {"instructions": 0.6, "cycles": {"cortex-a72": 0.3}},
        peer: {"instructions": 1.0, "cycles": {"cortex-a72": 0.4}},
    }
    lines = report.kernels(found).splitlines()
    assert lines[2] == "| neon | tinychat, 4 x 16 bits, decode | 0.5000 | 0.50 | 0.250 |  |  |  |  |  |"
    assert lines[4].startswith("| neon | llama.cpp Q4_0, 4 x 8 bits, decode | 1.0000 | 1.00 | 0.400 |")
    rows = report.predictions(found, boards.BOARDS).splitlines()
    assert len(rows) == 3 and rows[0].startswith("| PREDICTED") and rows[2].startswith("| Raspberry Pi 4B | 5.5 | 16 |")
    assert "(memory; arithmetic" in rows[2]
    assert report.predictions({peer: found[peer]}, boards.BOARDS) == ""


def test_every_board_runs_a_level_on_a_core_that_is_modelled(module):
    boards, peers = module("boards"), module("peers")
    assert {board.level for board in boards.BOARDS} == set(peers.CORES) == set(peers.CPUS) == set(peers.FORMS)
    assert all(board.core in peers.CORES[board.level] for board in boards.BOARDS)


def test_the_command_says_what_it_does_and_needs():
    found = subprocess.run([sys.executable, str(ARM), "--help"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and "apt-get install" in found.stdout and "PREDICTED" in found.stdout, found.stderr


@pytest.mark.parametrize("page", ["raspberry_pi", "jetson"])
def test_the_boards_pages_show_the_published_prediction(page):
    results = (ROOT / "benchmarks" / "results" / "arm.md").read_text()
    text = (ROOT / "demo" / page / "README.md").read_text()
    shown = re.search(r"<!-- benchmarks/results/arm.md -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert shown and "PREDICTED" in shown.group(1)
    rows = shown.group(1).splitlines()
    assert len(rows) > 2 and all(f"\n{row}\n" in results for row in rows), (
        "a row is not that of benchmarks/results/arm.md"
    )
