"""Turn what train.py saved into a checkpoint that tinychat, transformers and the rest of the field read.

python models/pebble/export.py build/pebble-fp32 --tokenizer build/pebble -o build/pebble-fp16
tinychat quantize build/pebble-fp16 -o models/pebble/checkpoint --method awq+gptq --overwrite
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tinychat import checkpoint
from tinychat import tokenizer as tokenizers


def main() -> None:
    """Convert to fp16, add the tokenizer and the generation defaults, read it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="folder written by train.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    model = LlamaForCausalLM.from_pretrained(args.trained, dtype=torch.float16)
    model.save_pretrained(args.output)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(args.tokenizer / name, args.output / name)
    tokenizer = tokenizers.load(args.output)
    assert tokenizer is not None
    generation = {
        "bos_token_id": model.config.bos_token_id,
        # A model this small sometimes forgets to end its turn; the next speaker's mark ends it too.
        "eos_token_id": [*model.config.eos_token_id, tokenizer.token_id("<|user|>")],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    (args.output / "generation_config.json").write_text(json.dumps(generation, indent=1))

    written = checkpoint.open(args.output)
    for index in range(written.config.n_layers):
        written.layer(index)
    print(f"{args.output}: {written.n_parameters:,} parameters, {written.file_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
