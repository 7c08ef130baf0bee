"""The parent's side of a worker: a process that is asked, and stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
WARM_UP = {"do": "decode", "prompt": [1, 2, 3, 4], "tokens": 4, "seconds": 5.0}
# oneDNN takes the sizes of AMX tiles from CPUID. Some hypervisors show AMX and hide those: it dies at its first tile.
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}


class WorkerError(SystemExit):
    """An engine that cannot be measured: why, and where its output is. Uncaught, it ends the program with that."""


class Worker:
    """One peer, loaded and warm, stopped (SIGSTOP) unless it is being asked.

    command    python, script, model and options; `--threads` and `--context` are added
    variables  of its environment, besides this process's
    log        a file for what it prints
    limited    whether it runs without AMX, having died with it
    Raises WorkerError. A context manager: the process ends with it.
    """

    def __init__(self, command: list[str], *, threads: int, context: int, log: Path, variables: dict[str, str]):
        self._command = [*command, "--threads", str(threads), "--context", str(context)]
        self._log = log
        self._variables = {**os.environ, **variables, "OMP_NUM_THREADS": str(threads)}
        self.limited = False
        try:
            self.about = self._start()
        except WorkerError:
            if self._process.returncode != -signal.SIGILL:
                raise
            self._variables |= WITHOUT_AMX
            self.about = self._start()
            self.limited = True

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to `request`; the process runs from here to there only."""
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            raise self._death() from None
        finally:
            self._process.send_signal(signal.SIGSTOP)
            if self._process.returncode is None:  # until it has stopped: a signal takes its time
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended between two requests
            raise self._death() from None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self) -> dict[str, Any]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            about = self._answer()
            self.ask(WARM_UP)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return about

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        return json.loads(line)

    def _death(self) -> WorkerError:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return WorkerError(f"{' '.join(self._command)} ended with {how}; its output is in {self._log}")


def first_token(
    command: list[str], *, threads: int, context: int, log: Path, variables: dict[str, str]
) -> dict[str, Any]:
    """A fresh process from its start to its first token: what it answers, and `seconds` by the clock on the wall; then
    to the end of its context: `peak_rss_bytes`."""
    command = [*command, "--threads", str(threads), "--context", str(context), "--first-token"]
    with log.open("ab") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=out, text=True
        )
        assert process.stdout
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        memory, _ = process.communicate()
    if not line.endswith("\n") or not memory.endswith("\n"):
        when = "with its context full" if line.endswith("\n") else "before its first token"
        raise WorkerError(f"{' '.join(command)} ended {when}; its output is in {log}")
    return {**json.loads(line), **json.loads(memory), "seconds": seconds}
