"""Runs programs that a model wrote, one at a time, in a process of their own with limits on time, memory and files.

The limits stop accidents, not attacks: a program may still read, write and remove what its user may, fill the disk file
by file, and reach the network; only the superuser's may start others. Run it in a container or a virtual machine where
the model is not trusted. POSIX only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PASSED = b"passed"  # written by the last line alone: a program that ends itself early has not passed
# Run by the child: the limits are set before the program is read, and cannot be raised again.
_CHILD = f"""
import os, resource, sys
path, seconds, megabytes, out = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
exec(compile(open(path, encoding="utf-8").read(), "program", "exec"), {{"__name__": "program"}})
os.write(out, {PASSED})
os._exit(0)
"""


def passes(program: str, seconds: int = 5, megabytes: int = 512) -> bool:
    """Whether `program`, its assertions included, runs to its end within the limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        said, out = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(path), str(seconds), str(megabytes), str(out)],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(out,),
        )
        try:
            child.wait(timeout=2 * seconds)
            os.set_blocking(said, False)
            return os.read(said, len(PASSED)) == PASSED
        except (subprocess.TimeoutExpired, BlockingIOError):  # nothing was written
            return False
        finally:
            _end(child)
            os.close(said)
            os.close(out)


def _end(child: subprocess.Popen) -> None:
    """The child and what it started, all in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
