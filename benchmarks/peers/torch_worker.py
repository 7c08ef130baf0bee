"""Hugging Face transformers as a worker: in bf16 or the option `dtype`; of an AWQ checkpoint, with GPTQModel's kernels.

A checkpoint without weights, a folder with config.json alone, gets random ones of that dtype.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import run

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
FILL = 1 << 24  # random numbers made, of which each weight takes stretches of half as many


class Transformers:
    """`forward` with transformers' own growing cache, called token by token."""

    def __init__(self, args: argparse.Namespace):
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        torch.set_grad_enabled(False)
        self._torch, self._cache = torch, transformers.DynamicCache
        quantized = "quantization_config" in json.loads((args.model / "config.json").read_text())
        dtype = getattr(torch, args.options.get("dtype", "bfloat16"))
        if any(args.model.glob("*.safetensors")):
            self._model = transformers.AutoModelForCausalLM.from_pretrained(args.model, device_map="cpu", dtype=dtype)
        else:
            self._model = random_model(torch, transformers, args.model, dtype)
        self._model.eval()
        kernels = Counter(type(module).__name__ for module in self._model.modules() if not list(module.children()))
        embedding = self._model.get_input_embeddings().weight
        stored = [*self._model.parameters(), *self._model.buffers()]
        packages = ("torch", "transformers", *(["gptqmodel"] if quantized else []))
        self.about: dict[str, Any] = {
            "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
            "setting": ", ".join(f"{n} {kernel}" for kernel, n in kernels.most_common() if "Linear" in kernel),
            "bytes_per_token": sum(t.nbytes for t in stored) - embedding.nbytes,
        }

    def generate(self, prompt: list[int], seen: Callable[[], bool]) -> None:
        """See `worker.Peer`."""
        torch, cache = self._torch, self._cache(config=self._model.config)
        tokens = torch.tensor([prompt])
        going = True
        while going:
            with torch.inference_mode():
                out = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.item()
            going = seen()


def random_model(torch: Any, transformers: Any, folder: Path, dtype: Any) -> Any:
    """A model of the configuration in `folder` with random weights, made at once."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    numbers = torch.randn(FILL).to(dtype)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    embedding = model.get_input_embeddings().weight.data_ptr()
    for weight in (parameter.data for parameter in model.parameters()):
        if weight.dim() == 1:
            weight.fill_(1)
            continue
        scale = 1 if weight.data_ptr() == embedding else weight.shape[1] ** -0.5
        flat = weight.view(-1)
        # Each begins elsewhere among the numbers: OpenVINO would keep one copy of equal matrices, and read less.
        first = int(torch.randint(FILL // 2, ()))
        for start in range(0, flat.numel(), FILL // 2):
            part = flat[start : start + FILL // 2]
            torch.mul(numbers[first : first + part.numel()], scale, out=part)
    return model


if __name__ == "__main__":
    run(Transformers)
