"""Which kernels are set side by side at which level: ours, and the best that llama.cpp has for Q4_0 there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """A kernel of llama.cpp: outputs interleaved as `interleaved` says, or "" where none are; what it is built from."""

    interleaved: str
    architecture: str
    sources: tuple[str, ...]


# Of llama.cpp's choice at load (ggml-cpu/repack.cpp): without a dot product it repacks nothing.
FORMS = {
    "neon": Form("", "armv8-a", ("quants.c",)),
    "dotprod": Form("4x4", "armv8.2-a+dotprod+fp16", ("quants.c", "repack.cpp")),
    "i8mm": Form("4x8", "armv8.2-a+dotprod+fp16+i8mm", ("quants.c", "repack.cpp")),
}
CPUS = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "max"}  # of qemu
# Of llvm-mca, the cores that run a level. LLVM gives cortex-a72, -a76 and -a78 the pipelines of a Cortex-A57; those of a
# Neoverse are its own, and N1 is the A76's design.
CORES = {
    "neon": ("cortex-a72",),
    "dotprod": ("cortex-a76", "cortex-a78", "neoverse-n1"),
    "i8mm": ("neoverse-n2", "neoverse-v1"),
}
