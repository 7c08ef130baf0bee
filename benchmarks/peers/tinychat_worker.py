"""tinychat as a worker: its own engine through its public interface."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from worker import run


class Tinychat:
    """`Engine.stream`, greedy. Its prefix cache finds nothing to reuse where prompts differ."""

    def __init__(self, args: argparse.Namespace):
        import tinychat

        self._llm = tinychat.load(args.model, device="cpu", ctx_size=args.context, threads=args.threads, **args.options)
        self.about: dict[str, Any] = {
            "version": tinychat.__version__,
            "setting": self._llm.description,
        }

    def generate(self, prompt: list[int], seen: Callable[[], bool]) -> None:
        """See `worker.Peer`."""
        room = self._llm.ctx_size - len(prompt)
        for _ in self._llm.stream(prompt, temperature=0, ignore_eos=True, max_tokens=room):
            if not seen():
                return


if __name__ == "__main__":
    run(Tinychat)
