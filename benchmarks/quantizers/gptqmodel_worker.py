"""GPTQModel, in its own environment: its quantizers, and the logits of a checkpoint under its kernels.

    python gptqmodel_worker.py quantize MODEL OUTPUT --sequences IDS.json --method awq|gptq --bits B --group-size G
    python gptqmodel_worker.py logits MODEL OUTPUT.npy --sequences IDS.json

IDS.json is a list of lists of token ids. Logits are float32 [tokens, vocabulary], window after window. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def quantize(args: argparse.Namespace, sequences: list[list[int]]) -> dict[str, Any]:
    """Quantize with GPTQModel's own settings but for bits and group size. Times are from opening to written."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, AWQConfig, GPTQConfig

    common: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size, "device": "cpu"}
    if args.method == "awq":
        config, packing = AWQConfig(**common, method=METHOD.AWQ, format=FORMAT.GEMM), BACKEND.AWQ_TORCH
    else:
        config, packing = GPTQConfig(**common), BACKEND.GPTQ_TORCH
    began, busy = time.monotonic(), time.process_time()
    model = GPTQModel.load(str(args.model), config)
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    model.quantize(examples, batch_size=1, backend=packing)  # what it would choose for AWQ needs CUDA
    model.save(str(args.output))
    times = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - busy}
    return {**times, "version": f"gptqmodel {version('gptqmodel')}"}


def logits(args: argparse.Namespace, sequences: list[list[int]]) -> dict[str, Any]:
    """Every window by itself, in float32, through transformers."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, device_map="cpu", dtype=torch.float32)
    model.eval()
    shape = (sum(map(len, sequences)), model.config.vocab_size)
    found = np.lib.format.open_memmap(args.output, "w+", np.float32, shape)
    start = 0
    with torch.inference_mode():
        for ids in sequences:
            found[start : start + len(ids)] = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            start += len(ids)
    found.flush()
    kernels = Counter(type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__)
    return {
        "version": ", ".join(f"{name} {version(name)}" for name in ("gptqmodel", "transformers", "torch")),
        "kernels": ", ".join(f"{n} {kernel}" for kernel, n in kernels.most_common()),
    }


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("quantize", "logits"))
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sequences", type=Path, required=True)
    parser.add_argument("--method", choices=("awq", "gptq"), default="awq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    sequences = json.loads(args.sequences.read_text())
    print(json.dumps((quantize if args.task == "quantize" else logits)(args, sequences)))


if __name__ == "__main__":
    main()
