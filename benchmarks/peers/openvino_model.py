"""A llama model of random weights as OpenVINO holds it: int4 with zero points, groups of 128; head, embedding int8.

    python openvino_model.py CONFIG.json OUT_FOLDER

Runs where optimum-intel and nncf are. The tokenizer that OpenVINO GenAI insists on is one whose words are numbers:
prompts are token ids. The last line is JSON: the bytes read for one token, which are all but the embedding's.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import openvino
import torch
import transformers
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from tokenizers import Tokenizer, decoders, models
from torch_worker import random_model

os.environ |= {"HF_HUB_OFFLINE": "1"}


def write(config: Path, folder: Path) -> int:
    """The model at `folder`; bytes read for one token."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as plain:
        model = random_model(torch, transformers, config.parent, torch.float16)
        model.save_pretrained(plain)
        del model
        scheme = OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0)
        converted = OVModelForCausalLM.from_pretrained(plain, export=True, compile=False, quantization_config=scheme)
        converted.save_pretrained(folder)
        read = _read_per_token(converted.model)
    if (folder / "openvino_model.bin").stat().st_size < read:
        raise SystemExit("the file holds less than a token would read: equal constants were merged")
    vocab = {str(i): i for i in range(json.loads(config.read_text())["vocab_size"])}
    words = Tokenizer(models.BPE(vocab, [], unk_token="0"))
    words.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", bos_token="1", unk_token="0")
    for name, part in zip(("tokenizer", "detokenizer"), convert_tokenizer(fast, with_detokenizer=True), strict=True):
        openvino.save_model(part, folder / f"openvino_{name}.xml")
    return read


def _read_per_token(model: openvino.Model) -> int:
    """Bytes of all constants but those that lead into the embedding's gather."""
    total, skipped = 0, set()
    for node in model.get_ops():
        if node.get_type_name() == "Gather" and "embed_tokens" in node.get_friendly_name():
            skipped |= _constants(node.input_value(0).get_node())
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() not in skipped:
            total += _nbytes(node)
    return total


def _constants(node: openvino.Node) -> set[str]:
    """Names of the constants that `node` is computed from."""
    if node.get_type_name() == "Constant":
        return {node.get_friendly_name()}
    return set().union(*(_constants(value.get_node()) for value in node.input_values()))


def _nbytes(node: openvino.Node) -> int:
    return math.prod(node.get_output_shape(0)) * node.get_element_type().bitwidth // 8


if __name__ == "__main__":
    print(json.dumps({"bytes_per_token": write(Path(sys.argv[1]), Path(sys.argv[2]))}))
