"""Quantizers in processes of their own, which can be killed: forked from one that has imported everything."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, resource, signal, sys
import tinychat.quantize
from tinychat.checkpoint import CheckpointWriter
from tinychat.cli import main

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def touches_the_disk(event, arguments, root):
    if event == "open":
        return str(arguments[0]).startswith(root) and bool((arguments[2] or 0) & WRITING)
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate") and root in str(arguments[0])

def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    CheckpointWriter.__init__.__kwdefaults__["shard_bytes"] = job["shard_bytes"]
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if touches_the_disk(event, arguments, job["root"]):
            seen += 1
            if seen == job["at"]:
                os.kill(os.getpid(), job["signal"])
    sys.addaudithook(hook)
    try:
        code = main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    print(json.dumps({"events": seen}), flush=True)
    os._exit(code)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Quantizers:
    """`run` one after the other. A context manager."""

    def __init__(self, root: Path):
        self._root = root
        self._parent = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TINYCHAT_THREADS": "1"},
        )
        self.log = ""
        self.events = 0  # of the last run that was not killed

    def run(
        self, *argv, at: int = 0, signal: int = 9, largest_file: int | None = None, shard_bytes: int = 15_000
    ) -> int:
        """The exit code (-9: killed) of `tinychat ARGV`, which sends itself a signal before the `at`-th time that it
        opens a file for writing, renames or removes one below the root, may write no file beyond a size, and makes
        several shards of a tiny model."""
        log = self._root / "log"
        job = {"argv": [str(a) for a in argv], "log": str(log), "root": str(self._root) + "/work"}
        job |= {"at": at, "signal": signal, "largest_file": largest_file, "shard_bytes": shard_bytes}
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        code = int(self._parent.stdout.readline())
        self.log = log.read_text()
        with contextlib.suppress(ValueError, IndexError):
            self.events = json.loads(self.log.splitlines()[-1])["events"]
        return code

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait()
