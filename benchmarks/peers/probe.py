"""The speed of reading memory, with as many threads as the engines have, between their runs."""

from __future__ import annotations

import threading
import time

from tinychat.backends.cpu_linear import aligned, extension

BUFFER_BYTES = 1 << 30


class Probe:
    """A buffer of 1 GiB, read by `threads` threads at once, one linear stream each."""

    def __init__(self, threads: int):
        self._buffer = aligned(BUFFER_BYTES)
        self._buffer[:] = 1
        part = BUFFER_BYTES // threads // 4096 * 4096
        address = self._buffer.ctypes.data
        self._parts = [(address + i * part, part) for i in range(threads)]

    def read(self) -> float:
        """GB/s of one pass."""
        began = time.perf_counter()
        readers = [threading.Thread(target=extension().read_probe, args=part) for part in self._parts]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return sum(size for _, size in self._parts) / (time.perf_counter() - began) / 1e9
