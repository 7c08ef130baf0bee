"""llama.cpp as a worker, through the C interface that the llama-cpp-python package wraps.

`--options '{"layout": L}'` says how the weights of the blocks lie in memory:

    default  llama.cpp's own choice: tiles for AMX instructions where the machine has them, else `repack`
    repack   eight rows interleaved for AVX2 and AVX-512
    plain    as they lie in the file, which stays mapped; nothing is copied
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import run

BLOCKS = rb"blk\..*(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight"


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class Llama:
    """One model, one context, greedy; logits are asked for after the last token of a batch only."""

    def __init__(self, args: argparse.Namespace):
        import numpy as np

        self._np, self._api = np, _binding()
        api, layout = self._api, args.options["layout"]
        used: set[str] = set()
        self._log = api.llama_log_callback(lambda _level, text, _data: _note(text, used))
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.use_extra_bufts = layout == "default"
        if layout == "repack":
            self._overrides = (_Override * 2)(_Override(BLOCKS, _extra_buffer_types()["CPU_REPACK"]))
            params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = api.llama_model_load_from_file(str(args.model).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {args.model}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = args.context, args.context
        options.n_threads = options.n_threads_batch = args.threads
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._capacity = args.context
        self.about: dict[str, Any] = {
            "version": importlib.metadata.version("llama-cpp-python"),
            "setting": ", ".join(sorted(used)),
            "features": api.llama_print_system_info().decode().strip(),
            "bytes_per_token": args.options["bytes_per_token"],
        }

    def generate(self, prompt: list[int], seen: Callable[[], bool]) -> None:
        """See `worker.Peer`."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        tokens = prompt
        for _ in range(self._capacity - len(prompt)):
            batch = (api.llama_token * len(tokens))(*tokens)
            if api.llama_decode(self._context, api.llama_batch_get_one(batch, len(tokens))):
                raise SystemExit("llama_decode failed")
            logits = self._np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), (self._n_vocab,))
            tokens = [int(logits.argmax())]
            if not seen():
                return


def _binding() -> Any:
    """The package's module of C declarations alone: its other half imports much that a start would pay for."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise SystemExit("llama-cpp-python is not installed here")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def _extra_buffer_types() -> dict[str, int]:
    """Addresses of the CPU's buffer types by name, through ggml's public interface."""
    folder = Path(sys.modules["llama_cpp"].__path__[0]) / "lib"
    base, ggml = ctypes.CDLL(str(folder / "libggml-base.so")), ctypes.CDLL(str(folder / "libggml.so"))

    def call(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    device = ctypes.c_void_p(call(ggml, "ggml_backend_dev_by_type", ctypes.c_void_p, 0))
    registry = ctypes.c_void_p(call(base, "ggml_backend_dev_backend_reg", ctypes.c_void_p, device))
    name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
    address = call(base, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, registry, name)
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    found = {}
    for buffer in listed:
        if not buffer:
            return found
        found[call(base, "ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p(buffer)).decode()] = buffer
    return found


def _note(text: bytes, used: set[str]) -> None:
    """Show a line of the log, and remember the buffers that it says hold weights."""
    line = text.decode(errors="replace")
    sys.stderr.write(line)
    if "model buffer size" in line:
        used.add(line.split(":")[-1].strip() if "=" not in line else " ".join(line.split(":")[1].split()))


if __name__ == "__main__":
    run(Llama)
