"""Runs programs that a model wrote, one at a time, in a process of their own with limits on time, memory and files.

The limits stop accidents, not attacks: a program may still read files and reach the network. Run it in a container or a
virtual machine where the model is not trusted. POSIX only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PASSED = 77  # said by the last line alone: a program that ends itself early has not passed
# Run by the child: the limits are set before the program is read, and cannot be raised again.
_CHILD = f"""
import os, resource, sys
seconds, megabytes = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(open(sys.argv[1], encoding="utf-8").read(), "program", "exec"), {{"__name__": "program"}})
os._exit({PASSED})
"""


def passes(program: str, seconds: int = 5, megabytes: int = 512) -> bool:
    """Whether `program`, its assertions included, runs to its end within the limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(path), str(seconds), str(megabytes)],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return child.wait(timeout=2 * seconds) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)


def _end(child: subprocess.Popen) -> None:
    """The child and what it started, all in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
