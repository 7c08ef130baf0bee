"""What determines the bytes that a quantization writes, so that one that was stopped is continued by its like only.

A file of the source is told by its size and the time of its last change, to the nanosecond. A hash of its header would
not see new values in old shapes, as fine-tuning writes them, and one of all its bytes would read 140 GB at each start;
the price is that a source that was copied anew does not continue the quantization of the first copy. The program is
told by its files, as a version lasts for many of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import tinychat
from tinychat.backends import arithmetic
from tinychat.errors import UsageError

_KINDS = "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"  # that are read, or copied


def run(source: Path, calibration: str | Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The identity of quantizing `source` with `options`, as plain values by the names that a user knows them by."""
    files = {path.name: _file(path) for path in sorted(path for kind in _KINDS for path in source.glob(kind))}
    engine = arithmetic.engine()  # whose levels add in orders of their own
    software = {
        "tinychat": f"{tinychat.__version__}, sha256 {_program()}",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": engine.isa() if engine else "none",
    }
    return {**files, **software, **options, "calibration": _text(calibration)}


def _program() -> str:
    folder = Path(__file__).parents[1]
    native = importlib.util.find_spec("tinychat._cpu")
    files = [*folder.rglob("*.py"), *([Path(native.origin)] if native and native.origin else [])]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _file(path: Path) -> str:
    found = path.stat()
    changed = datetime.fromtimestamp(found.st_mtime_ns // 10**9).isoformat(" ")
    return f"{found.st_size} bytes of {changed}.{found.st_mtime_ns % 10**9:09}"


def _text(calibration: str | Path | None) -> str:
    if calibration is None:
        return "sampled from the model itself"
    if str(calibration).startswith("hf:"):
        return str(calibration)
    digest = hashlib.sha256()
    try:
        with Path(calibration).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UsageError(f"calibration file {calibration} does not exist") from None
    except OSError as error:
        raise UsageError(f"calibration file {calibration} cannot be read: {error.strerror}") from None
    return f"{Path(calibration).name}, sha256 {digest.hexdigest()}"
