"""`tinychat info`: what a model is, how precise, the memory it needs, and the backend that it would run on.

`gather` makes plain data of the configuration and of the headers of the weight files; it reads no weight. `table` puts
that into words. `families` is about no model: it says which there are.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Collection
from typing import Any

from tinychat import architectures, backends, checkpoint, engine, memory
from tinychat.checkpoint import gguf
from tinychat.checkpoint.inventory import segments
from tinychat.errors import TemplateError, TokenizerError
from tinychat.weights import linears

TESTED = (
    "Each is tested on tiny random models of awkward sizes: logits within 1e-4 of Hugging Face transformers' (a prompt "
    "whole and in chunks, single tokens, past every window; on the reference and the lowered decoder), the same after "
    "AWQ's scales are folded in; quantized, written, loaded, generating; and read as AWQ as it is published."
)
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def gather(
    model: str,
    *,
    device: str = "auto",
    ctx_size: int | None = None,
    kv_dtype: str = "fp16",
    head: int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    ignore_config: Collection[str] = (),
) -> dict[str, Any]:
    """The facts about `model` under names that `tinychat info --json` prints; bytes and counts are plain numbers.

    The options are those of `engine.load`.
    """
    path = checkpoint.locate(model, revision=revision, offline=offline)
    source = checkpoint.open(path, ignore_config=ignore_config)
    c = source.config
    size = engine.context_size(c, ctx_size)
    module, why = backends.choose(device)
    shards = source.shards
    return {
        "model": model,
        "path": str(path),
        "architecture": c.model_type,
        "n_parameters": source.n_parameters,
        **{name: getattr(c, name) for name in ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim")},
        **{name: getattr(c, name) for name in ("intermediate_size", "vocab_size", "max_positions", "tied_head")},
        "weights": _weights(source),
        "file_bytes": shards.nbytes,
        "n_files": len(shards.files),
        "ctx_size": size,
        "kv_dtype": kv_dtype,
        "memory": {
            **memory.needed(
                source, module.FOOTPRINT, size, head=engine.head_bits(head, source.n_quantized), kv_dtype=kv_dtype
            ),
            "available": backends.free_bytes(module),
        },
        **_text(source),
        "backend": backends.name_of(module),
        "backend_description": module.describe(threads),
        "backend_reason": why,
    }


def families() -> str:
    """The table of model families, each with the checkpoints it is known by, how they are tested, and those that are
    read from GGUF files."""
    lines = []
    for family in architectures.described():
        name = " or ".join((family.model_type, *family.also))
        lines += [f"{name}: {family.checkpoints}", f"    {family.special}"]
    return "\n".join([*lines, "", *textwrap.wrap(TESTED, 100), "", f"Of GGUF files: {', '.join(gguf.FAMILIES)}."])


def _weights(source: checkpoint.Checkpoint) -> dict[str, Any]:
    """How many weights are quantized and how, how many are plain in which dtype, which linears the quantizer left."""
    c, names, quantization, shards = source.config, source.names, source.quantization, source.shards
    modules = source.quantized
    left = []
    plain = Counter({_DTYPES[shards.info(f"{names.embed}.weight").dtype]: c.vocab_size * c.table_width})
    places = [(linear, layer) for layer in range(c.n_layers) for linear in linears(c, layer)]
    for linear, layer in places if c.tied_head else [*places, ("head", 0)]:
        for segment in segments(c, names, linear, layer):
            if segment.module not in modules:
                plain[_DTYPES[shards.info(f"{segment.module}.weight").dtype]] += math.prod(segment.shape)
                left.append(segment.module)
    facts: dict[str, Any] = {"plain": dict(plain), "quantized": source.n_quantized}
    if quantization is not None:
        facts |= {name: getattr(quantization, name) for name in ("method", "bits", "group_size")}
        facts |= {"linears": len(modules), "left_plain": left}
    return facts


def _text(source: checkpoint.Checkpoint) -> dict[str, Any]:
    """Whether there is a tokenizer and a chat template; what is wrong with them where they cannot be read."""
    try:
        found = source.tokenizer()
    except (TokenizerError, TemplateError) as error:
        return {"tokenizer": False, "chat_template": False, "tokenizer_error": str(error)}
    return {"tokenizer": found is not None, "chat_template": found is not None and found.chat_template is not None}


def table(facts: dict[str, Any]) -> str:
    """`facts` in words, a line for each matter."""
    f, need = facts, facts["memory"]
    kv_heads = "" if f["n_kv_heads"] == f["n_heads"] else f", {f['n_kv_heads']} for keys and values"
    head = "tied to the embedding" if f["tied_head"] else "of its own"
    left = need["available"]
    rows = [
        ("model", f["model"] if f["model"] == f["path"] else f"{f['model']} in {f['path']}"),
        ("architecture", f"{f['architecture']}: {f['n_layers']} layers of width {f['hidden_size']}"),
        ("", f"{f['n_heads']} heads of {f['head_dim']}{kv_heads}; MLP {f['intermediate_size']}"),
        ("", f"vocabulary {f['vocab_size']}, output head {head}"),
        ("parameters", _count(f["n_parameters"])),
        *_precision_rows(f["weights"]),
        ("files", f"{memory.megabytes(f['file_bytes'])} in {f['n_files']} file{'s' if f['n_files'] > 1 else ''}"),
        ("context", f"{f['ctx_size']} of at most {f['max_positions']} tokens (-c)"),
        ("memory", f"about {memory.megabytes(need['total'])}, " + _of(left)),
        ("", f"{memory.megabytes(need['weights'])} weights"),
        ("", f"{memory.megabytes(need['kv_cache'])} KV cache: {f['kv_dtype']}, {_per_token(f)} a token"),
        *(
            [("", f"{memory.megabytes(need['working'])} at times: a part being packed or unpacked")]
            if need["working"]
            else []
        ),
        ("", f"{memory.megabytes(need['overhead'])} program and buffers"),
        ("tokenizer", f.get("tokenizer_error") or ("yes" if f["tokenizer"] else "none: takes token ids only")),
        ("template", _template(f)),
        ("backend", f"{f['backend_description']} ({f['backend_reason']})"),
    ]
    return "\n".join(f"{left:<14}{right}" for left, right in rows)


def _template(facts: dict[str, Any]) -> str:
    if facts["chat_template"]:
        return "yes"
    if not facts["tokenizer"]:
        return "not read without a tokenizer: neither 'tinychat generate' nor 'tinychat chat' works"
    return "none: 'tinychat generate' works, 'tinychat chat' does not"


def _precision_rows(weights: dict[str, Any]) -> list[tuple[str, str]]:
    plain = ", ".join(f"{_count(count)} in {dtype}" for dtype, count in weights["plain"].items())
    if not weights["quantized"]:
        return [("weights", plain)]
    how, bits, group, left = (weights[name] for name in ("method", "bits", "group_size", "left_plain"))
    each = (
        "a group a row"
        if group == -1
        else f"groups of {group}: {bits + (16 + bits) / group:.2f} bits each, scales included"
    )
    shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return [
        ("weights", f"{_count(weights['quantized'])} in {bits} bits, in {weights['linears']} linears ({how}, {each})"),
        ("", f"{plain}: the embedding" + (f", {shown}" if left else "")),
    ]


def _of(available: int | None) -> str:
    return "what is available is unknown" if available is None else f"{memory.megabytes(available)} available"


def _per_token(facts: dict[str, Any]) -> str:
    return f"{facts['memory']['kv_cache'] / facts['ctx_size'] / 1024:.3g} KiB"


def _count(number: int) -> str:
    """1234567 as '1.2 M'."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
