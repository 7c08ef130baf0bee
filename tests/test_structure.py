"""The shape of the house: which module may import which, what stays light, how long a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tinychat"

# Arrows point down only: a unit may import the units of the floors below it, and what lies inside itself.
FLOORS = [
    {"errors"},
    {"config", "qtensor", "cache", "results", "progress", "cpuinfo"},
    {"alibi", "rope", "weights", "sampling", "memory", "prompt"},
    {"architectures", "tokenizer", "text_stream", "settings"},
    {"checkpoint", "decoder"},
    {"backends"},
    {"quantize", "engine"},
    {"chat", "info", "arguments"},
    {"bench", "evaluation"},
    {"doctor"},
    {"cli"},
]


def units() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(top, []).append(file)
    return found


def imports(file: Path) -> set[str]:
    """Units of tinychat that `file` imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "tinychat"]
    return {p[1] for p in parts if len(p) > 1}


def test_every_unit_has_a_floor():
    placed = set().union(*FLOORS) | {"__init__", "__main__"}
    assert set(units()) == placed


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_arrows_point_down(floor):
    known = set().union(*FLOORS)
    below = set().union(*FLOORS[:floor]) if floor else set()
    for unit in sorted(FLOORS[floor]):
        for file in units()[unit]:
            upward = (imports(file) & known) - below - {unit}
            assert not upward, f"{file.relative_to(PACKAGE)} imports {sorted(upward)}"


def test_quantizer_knows_no_device_layout():
    for file in units()["quantize"]:
        assert "tinychat.backends.cpu" not in file.read_text(), file


def test_files_stay_small():
    for root in ("tinychat", "csrc"):
        for file in (PACKAGE.parent / root).rglob("*"):
            if file.suffix in {".py", ".cpp", ".h", ".cu"}:
                lines = len(file.read_text().splitlines())
                assert lines <= 500, f"{file}: {lines} lines"


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    program = f"{code}\nimport sys; print('\\n'.join({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split("\n"))


def test_importing_the_package_is_light():
    assert not imported_by("import tinychat, tinychat.cli") & {"numpy", "torch", "transformers", "tokenizers"}


def test_cpu_path_imports_neither_torch_nor_transformers():
    code = (
        "import tinychat\n"
        "with tinychat.load('pebble', device='cpu') as llm:\n"
        "    tinychat.generate(llm, [{'role': 'user', 'content': 'Hi'}], max_tokens=4)\n"
    )
    pytest.importorskip("tinychat._cpu", reason="the compiled kernels are not built")
    assert not imported_by(code) & {"torch", "transformers"}
