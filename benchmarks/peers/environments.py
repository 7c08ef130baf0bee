"""An environment of its own for every peer: made with venv and pip when it is first needed, then kept.

A folder without the mark that says it is complete, or complete by another recipe, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from process import WorkerError

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
MARK = "complete.json"


@dataclass(frozen=True)
class Recipe:
    """pip's argument lists, run in order, and what they find in their environment."""

    steps: tuple[tuple[str, ...], ...]
    variables: dict[str, str] = field(default_factory=dict)


RECIPES = {
    "llama.cpp": Recipe(
        (("install", "--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf"),),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_BLAS=OFF", "CXXFLAGS": f"-include {HERE / 'gcc_amx.h'}"},
    ),
    "transformers": Recipe((("install", TORCH), ("install", TORCH, "transformers", "accelerate"))),
    "gptqmodel": Recipe(
        (("install", TORCH), ("install", TORCH, "gptqmodel", "transformers>=5", "optimum", "sentencepiece"))
    ),
    "openvino": Recipe(
        (
            ("install", TORCH),
            ("install", TORCH, "optimum-intel[openvino]", "openvino-genai", "nncf"),
            ("uninstall", "--yes", "torchvision"),  # another build than torch's, and transformers imports it
        )
    ),
}


def python(name: str, folder: Path) -> Path:
    """The interpreter of the environment `name` below `folder`. WorkerError where pip fails, with its log's place."""
    home = folder / name
    interpreter = home / "bin" / "python"
    recipe = RECIPES[name]
    text = json.dumps([recipe.steps, recipe.variables.get("CMAKE_ARGS", "")])
    mark = {"recipe": hashlib.sha256(text.encode()).hexdigest()}
    if interpreter.exists() and (home / MARK).is_file() and json.loads((home / MARK).read_text()) == mark:
        return interpreter
    print(f"making the environment of {name} in {home} (once; minutes) ...", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    log = home / "pip.log"
    pip = [str(interpreter), "-m", "pip"]
    with log.open("wb") as out:
        for command in ([sys.executable, "-m", "venv", str(home)], *([*pip, *step] for step in recipe.steps)):
            if subprocess.run(command, env=environment | recipe.variables, stdout=out, stderr=out).returncode:
                raise WorkerError(f"{command[2]} failed for {name}: see {log}")
    (home / MARK).write_text(json.dumps(mark))
    return interpreter
