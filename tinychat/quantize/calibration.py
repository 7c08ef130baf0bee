"""Calibration sequences, as token ids: from a file, or sampled from the model itself.

Sampling needs no download, no licence and no guess at the language a model speaks: what it writes is what it computes
on. Sequences stay apart; none sees another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinychat import tokenizer as tokenizers
from tinychat.backends import reference
from tinychat.cache import Rows
from tinychat.errors import TokenizerError, UsageError
from tinychat.weights import WeightSource

PIECE_CHARACTERS = 8  # per token: more than any common tokenizer's average, so that a piece fills a sequence


def from_file(path: str | Path, model: Path, *, n_sequences: int, length: int) -> list[list[int]]:
    """Sequences of at most `length` tokens from a text file, or from JSON lines (*.jsonl).

    A line is {"text": ...}, or {"messages": [...]}, rendered with the chat template of the checkpoint in `model`. What
    is taken lies evenly over the file. Each sequence begins with the tokenizer's beginning token, where it has one.
    Raises UsageError for a file that is not such text, TokenizerError where the checkpoint has no tokenizer.
    """
    loaded = tokenizers.load(model)
    if loaded is None:
        raise TokenizerError(
            f"{model} has no tokenizer, which calibration text needs; leave the text out to calibrate "
            f"on tokens sampled from the model itself"
        )
    begin = [] if loaded.bos_id is None else [loaded.bos_id]
    width = length - len(begin)
    sequences = []
    for text in _texts(Path(path), loaded, n_sequences, PIECE_CHARACTERS * length):
        ids = loaded.encode(text, add_bos=False)
        if begin and ids[:1] == begin:  # a template writes its own
            ids = ids[1:]
        sequences += [begin + ids[start : start + width] for start in range(0, len(ids), width)]
    if not sequences:
        raise UsageError(f"{path} holds no text to calibrate on")
    return [list(s) for s in _evenly(sequences, n_sequences)]


def self_generated(
    source: WeightSource,
    *,
    starts: Sequence[int],
    n_sequences: int = 32,
    length: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """`n_sequences` of `length` tokens each that the model samples from itself, at temperature 1.

    starts  tokens to begin with, one drawn for each sequence; empty: any token of the vocabulary

    An end token does not end a sequence: a chat model goes on with the next turn, another with the next document, as
    in the text they were trained on. The whole model is in memory meanwhile, in the precision it is stored in.
    """
    generator = np.random.default_rng(seed)
    length = min(length, source.config.max_positions)
    runner = reference.build(source, ctx_size=length, n_slots=n_sequences)
    first = np.asarray(starts if len(starts) else np.arange(source.config.vocab_size))
    ids = np.empty((n_sequences, length), np.int32)
    ids[:, 0] = generator.choice(first, n_sequences)
    slots = np.arange(n_sequences, dtype=np.int32)
    for at in tqdm(range(1, length), desc="sampling calibration text", unit="token", disable=not progress):
        rows = Rows(ids[:, at - 1].copy(), np.full(n_sequences, at - 1, np.int32), slots, slots)
        ids[:, at] = _draw(runner.step(rows), generator)
    return [sequence.tolist() for sequence in ids]


def start_tokens(*configs: Mapping[str, Any]) -> list[int]:
    """The first beginning token that these configs name, else the end token (it separates documents), else none."""
    for key in ("bos_token_id", "eos_token_id"):
        for config in configs:
            if found := _ids(config.get(key)):
                return found[:1]
    return []


def _ids(value: Any) -> list[int]:
    return [value] if type(value) is int else [i for i in value if type(i) is int] if isinstance(value, list) else []


def _draw(logits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One token of each row of logits [R, vocab_size], by their probabilities: the Gumbel-max trick."""
    return np.argmax(logits + generator.gumbel(size=logits.shape), axis=-1)


def _texts(path: Path, loaded: tokenizers.Tokenizer, count: int, characters: int) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"calibration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration file {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        for number, line in _evenly(lines, count):
            yield _record(line, f"{path}, line {number}", loaded)
        return
    if not content.strip():
        return
    n_pieces = min(count, -(-len(content) // characters))
    for i in range(n_pieces):
        start = i * len(content) // n_pieces
        if i:  # begin at a word
            start = next((j for j in range(start, min(start + 100, len(content))) if content[j].isspace()), start)
        end = (i + 1) * len(content) // n_pieces
        yield content[start : min(start + characters, end)]


def _record(line: str, where: str, loaded: tokenizers.Tokenizer) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if loaded.chat_template is None:
            raise UsageError(f'{where} holds messages, and the checkpoint has no chat template; give {{"text": ...}}')
        return loaded.chat_template.render(record["messages"], add_generation_prompt=False)
    raise UsageError(f'{where} is neither {{"text": "..."}} nor {{"messages": [...]}}')


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, spread over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
