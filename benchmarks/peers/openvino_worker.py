"""OpenVINO GenAI as a worker: its LLMPipeline. `--options` are properties of the CPU device, and bytes_per_token.

The pipeline runs on while its tokens are seen, but one is seen as soon as it is known: intervals are latencies.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from typing import Any

from worker import run


class OpenVino:
    """One pipeline; prompts are token ids."""

    def __init__(self, args: argparse.Namespace):
        import numpy as np
        import openvino
        import openvino_genai as genai

        self._np, self._openvino, self._genai = np, openvino, genai
        properties = dict(args.options)
        read = properties.pop("bytes_per_token")
        self._pipeline = genai.LLMPipeline(str(args.model), "CPU", INFERENCE_NUM_THREADS=args.threads, **properties)
        self._context = args.context

        class Streamer(genai.StreamerBase):
            """Passes every token on to `seen`."""

            seen: Callable[[], bool]

            def write(self, _tokens: Any) -> Any:
                """Called with each token, or several."""
                return genai.StreamingStatus.RUNNING if self.seen() else genai.StreamingStatus.STOP

            def end(self) -> None:
                """Nothing was held back."""

        self._streamer = Streamer
        self.about: dict[str, Any] = {
            "version": f"openvino-genai {importlib.metadata.version('openvino-genai')}",
            "setting": ", ".join(f"{name}={value}" for name, value in properties.items()) or "default hints",
            "bytes_per_token": read,
        }

    def generate(self, prompt: list[int], seen: Callable[[], bool]) -> None:
        """See `worker.Peer`."""
        np, tensor = self._np, self._openvino.Tensor
        ids = tensor(np.array([prompt], np.int64))
        config = self._genai.GenerationConfig()
        config.ignore_eos, config.do_sample = True, False
        config.max_new_tokens = self._context - len(prompt)
        streamer = self._streamer()
        streamer.seen = seen
        mask = tensor(np.ones((1, len(prompt)), np.int64))
        self._pipeline.generate(self._genai.TokenizedInputs(ids, mask), config, streamer)


if __name__ == "__main__":
    run(OpenVino)
