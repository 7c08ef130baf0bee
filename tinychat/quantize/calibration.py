"""Calibration sequences, as token ids: from a file, or sampled from the model itself.

Sampling needs no download, no licence and no guess at the language a model speaks: what it writes is what it computes
on. Sequences stay apart; none sees another.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinychat import backends
from tinychat import tokenizer as tokenizers
from tinychat.cache import Rows
from tinychat.checkpoint import Checkpoint
from tinychat.checkpoint.quoting import listing
from tinychat.errors import TinychatError, TokenizerError, UsageError
from tinychat.progress import Loading
from tinychat.quantize.rounded import Rounded
from tinychat.weights import WeightSource

HUB = "hf:"  # begins the name of a dataset
PIECE_CHARACTERS = 8  # per token: more than any common tokenizer's average, so that a piece fills a sequence
ENOUGH_TOKENS = 2048  # below which a set is warned of
CACHE_BYTES = 1 << 29  # of the KV cache that sampling takes
SAMPLED_LINES = 64  # that tell how long the lines of a file are
RECORDS = 100_000  # of a hub's dataset looked at, at most


def load(
    calibration: str | Path | None,
    source: Checkpoint,
    *,
    n_sequences: int,
    length: int,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    progress: bool = False,
) -> tuple[list[list[int]], str]:
    """(sequences, what they are in words) from what a user names as `calibration`.

    A file for `from_file`; 'hf:org/name...' for `from_hub`; None: sampled from the model itself. Warns of a set too
    small to be relied on. Raises UsageError, TokenizerError.
    """
    for name, value, least in (("sequences", n_sequences, 1), ("tokens in a sequence", length, 2)):
        if value < least:
            raise UsageError(f"{value} {name} are too few to calibrate on; give at least {least}")
    if calibration is None:
        starts = start_tokens(source.generation_config, source.hf_config)
        sequences = self_generated(
            source,
            starts=starts,
            n_sequences=n_sequences,
            length=length,
            seed=seed,
            device=device,
            threads=threads,
            progress=progress,
        )
        origin = "text sampled from the model itself"
    elif str(calibration).startswith(HUB):
        origin = str(calibration)
        if offline:
            raise UsageError(f"{origin} is on the hub; without --offline it can be fetched, or give a file")
        sequences = from_hub(origin, source.path, n_sequences=n_sequences, length=length)
    else:
        origin = str(calibration)
        sequences = from_file(calibration, source.path, n_sequences=n_sequences, length=length, seed=seed)
    check_ids(sequences, source.config.vocab_size)
    described = describe(sequences, origin)
    if (n_tokens := sum(map(len, sequences))) < min(ENOUGH_TOKENS, n_sequences * length):
        warnings.warn(
            f"{described}: {n_tokens:,} tokens are few to calibrate on; give more text (at least {ENOUGH_TOKENS:,} "
            f"tokens), or none, to have it sampled from the model itself",
            stacklevel=3,
        )
    return sequences, described


def check_ids(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """TokenizerError where a token has no row in the embedding."""
    if (largest := max((max(sequence) for sequence in sequences if len(sequence)), default=0)) >= vocab_size:
        raise TokenizerError(
            f"the calibration text has token id {largest} and the model ids 0 to {vocab_size - 1}: the tokenizer, or "
            f"its chat template, is not this model's; give no text, to have it sampled from the model itself"
        )


def describe(sequences: Sequence[Sequence[int]], origin: str) -> str:
    """Where a calibration set comes from and how large it is, for the report."""
    lengths = [len(sequence) for sequence in sequences]
    span = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{max(lengths)}"
    return f"{origin}, {len(sequences)} sequences of {span}, {sum(lengths):,} tokens"


def from_file(path: str | Path, model: Path, *, n_sequences: int, length: int, seed: int = 0) -> list[list[int]]:
    """Sequences of at most `length` tokens from a text file, or from JSON lines (*.jsonl).

    A line is {"text": ...}, or {"messages": [...]}, rendered with the chat template of the checkpoint in `model`; where
    there are more lines than sequences, short ones are joined. What is taken lies evenly over the file: where stretches
    of equal length begin, or, with a `seed` other than 0, as far into each as that says. Each sequence begins with the
    tokenizer's beginning token, where it has one; shorter ones are taken where full ones are too few. Raises UsageError
    for a file that is not such text, TokenizerError where the checkpoint has no tokenizer.
    """
    loaded = _tokenizer(model)
    shift = np.random.default_rng(seed).random() if seed else 0.0
    texts = _texts(Path(path), loaded, n_sequences, PIECE_CHARACTERS * length, shift)
    return _sequences(texts, loaded, n_sequences, length, str(path))


def from_hub(name: str, model: Path, *, n_sequences: int, length: int) -> list[list[int]]:
    """The same from the first records of a dataset on the Hugging Face hub, streamed.

    name  hf:org/name[/configuration][:split[:column]]; the split is train where none is named, the column the first of
          `messages`, `text` and `content` that there is

    Records shorter than a sequence are joined; no seed chooses among them. Needs the package `datasets`, and a network.
    Raises as `from_file`.
    """
    loaded = _tokenizer(model)
    path, _, rest = name.removeprefix(HUB).partition(":")
    split, _, column = rest.partition(":")
    owner_and_name, configuration = path.split("/")[:2], path.split("/")[2:]
    if len(owner_and_name) < 2 or len(configuration) > 1:
        raise UsageError(f"{name!r} names no dataset; expected is hf:org/name[/configuration][:split[:column]]")
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{name} needs a package that is not installed: pip install datasets") from None
    try:
        records = datasets.load_dataset(
            "/".join(owner_and_name), *configuration, split=split or "train", streaming=True
        )
        texts = list(_joined(_hub_texts(records, column, name, loaded), n_sequences, PIECE_CHARACTERS * length))
    except TinychatError:
        raise
    except Exception as error:  # no network, no such dataset, configuration or split: it has no one class for them
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(f"{name} cannot be read: {first}; check its name and the network, or give a file") from None
    return _sequences(texts, loaded, n_sequences, length, name)


def self_generated(
    source: WeightSource,
    *,
    starts: Sequence[int],
    n_sequences: int = 128,
    length: int = 128,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """`n_sequences` of `length` tokens each that the model samples from itself, at temperature 1.

    starts  tokens to begin with, one drawn for each sequence; empty: any token of the vocabulary
    device  of the backend that samples; what another writes is text as good, but not the same

    The token after it is drawn evenly from the likeliest quarter of the vocabulary: many short texts that begin
    differently cover more of what a model can say than its few favourite openings do.

    An end token does not end a sequence: a chat model goes on with the next turn, another with the next document, as
    in the text they were trained on. The model that samples is rounded to 4 bits while it is read (`Rounded`), and as
    many sequences are sampled at once as `CACHE_BYTES` hold: the float model need not fit in memory.
    """
    generator = np.random.default_rng(seed)
    length = min(length, source.config.max_positions)
    at_once = max(1, min(n_sequences, CACHE_BYTES // source.config.kv_bytes(length, 2)))
    with Loading("the model in 4 bits", "reading") if progress else nullcontext() as reading:
        runner = backends.choose(device)[0].build(
            Rounded(source),
            ctx_size=length,
            n_slots=at_once,
            kv_dtype="fp16",
            head=8,
            threads=threads,
            progress=reading,
        )
    first = np.asarray(starts if len(starts) else np.arange(source.config.vocab_size))
    ids = np.empty((n_sequences, length), np.int32)
    ids[:, 0] = generator.choice(first, n_sequences)
    n_steps = -(-n_sequences // at_once) * (length - 1)
    with tqdm(total=n_steps, desc="sampling calibration text", unit="token", disable=not progress) as bar:
        for start in range(0, n_sequences, at_once):
            batch = ids[start : start + at_once]
            slots = np.arange(len(batch), dtype=np.int32)
            for slot in slots.tolist():
                runner.cache.truncate(slot, 0)
            for at in range(1, length):
                rows = Rows(batch[:, at - 1].copy(), np.full(len(batch), at - 1, np.int32), slots, slots)
                logits = runner.step(rows)
                batch[:, at] = _draw(logits, generator) if at > 1 else _draw_evenly(logits, generator)
                bar.update()
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


def _draw_evenly(logits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One token of each row of logits [R, vocab_size]: any of its likeliest quarter."""
    quarter = -(-logits.shape[1] // 4)
    likeliest = np.argpartition(-logits, quarter - 1, axis=-1)[:, :quarter]  # [R, quarter]
    drawn = generator.integers(quarter, size=(len(logits), 1))
    return np.take_along_axis(likeliest, drawn, axis=-1)[:, 0]


def _tokenizer(model: Path) -> tokenizers.Tokenizer:
    loaded = tokenizers.load(model)
    if loaded is None:
        raise TokenizerError(
            f"{model} has no tokenizer, which calibration text needs; leave the text out to calibrate "
            f"on tokens sampled from the model itself"
        )
    return loaded


def _sequences(
    texts: Iterable[str], loaded: tokenizers.Tokenizer, n_sequences: int, length: int, where: str
) -> list[list[int]]:
    """Sequences of at most `length` tokens, each of one text, the beginning token first."""
    begin = [] if loaded.bos_id is None else [loaded.bos_id]
    width = max(1, length - len(begin))
    sequences: list[list[int]] = []
    for text in texts:
        ids = loaded.encode(text, add_bos=False)
        if begin and ids[:1] == begin:  # a template writes its own
            ids = ids[1:]
        sequences += [begin + ids[start : start + width] for start in range(0, len(ids), width)]
    if not sequences:
        raise UsageError(f"{where} holds no text to calibrate on")
    full = [sequence for sequence in sequences if len(sequence) == len(begin) + width]
    return _evenly(full if len(full) >= n_sequences else sequences, n_sequences)


def _texts(path: Path, loaded: tokenizers.Tokenizer, count: int, characters: int, shift: float) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"calibration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration file {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        # not splitlines(): JSON may hold other characters that end lines for it
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]

        def rendered(n: int) -> Iterator[str]:
            return (_record(line, f"{path}, line {number}", loaded) for number, line in _evenly(lines, n, shift))

        if len(lines) <= count:
            yield from rendered(count)
        else:
            sizes = list(map(len, rendered(min(count, SAMPLED_LINES))))
            wanted = -(-count * characters * len(sizes) // max(1, sum(sizes)))
            yield from _joined(rendered(wanted), count, characters)
        return
    if not content.strip():
        return
    n_pieces = min(count, -(-len(content) // characters))
    for i in range(n_pieces):
        start, end = i * len(content) // n_pieces, (i + 1) * len(content) // n_pieces
        start += int(shift * max(0, end - start - characters))
        if start:  # begin at a word
            start = next((j for j in range(start, min(start + 100, len(content))) if content[j].isspace()), start)
        yield content[start : min(start + characters, end)]


def _record(line: str, where: str, loaded: tokenizers.Tokenizer) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    return _text(record, where, loaded)


def _text(record: Any, where: str, loaded: tokenizers.Tokenizer) -> str:
    """What a record says: its text, or its messages through the template."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if loaded.chat_template is None:
            raise UsageError(f'{where} holds messages, and the checkpoint has no chat template; give {{"text": ...}}')
        return loaded.chat_template.render(record["messages"], add_generation_prompt=False)
    raise UsageError(f'{where} is neither {{"text": "..."}} nor {{"messages": [...]}}')


def _hub_texts(records: Iterable[Any], column: str, name: str, loaded: tokenizers.Tokenizer) -> Iterator[str]:
    for record in islice(records, RECORDS):
        found = column or next((c for c in ("messages", "text", "content") if c in record), "")
        if found not in record:
            raise UsageError(
                f"{name} has no column {found or 'messages, text or content'!r}, but {listing(list(record))}"
            )
        value = record[found]
        key = "text" if isinstance(value, str) else "messages"
        if text := _text({key: value}, f"{name}, column {found!r}", loaded):
            yield text


def _joined(texts: Iterable[str], count: int, characters: int) -> Iterator[str]:
    """`count` texts of at least that many characters, as far as there are: short ones joined by a blank line."""
    pieces: list[str] = []
    for text in texts:
        pieces.append(text)
        if sum(map(len, pieces)) >= characters:
            yield "\n\n".join(pieces)
            pieces, count = [], count - 1
            if not count:
                return
    if pieces:
        yield "\n\n".join(pieces)


def _evenly(items: Sequence[Any], count: int, shift: float = 0.0) -> list[Any]:
    """At most `count` of the items, spread over all of them: those `shift` of the way to the next, 0 to less than 1."""
    if len(items) <= count:
        return list(items)
    return [items[(i * len(items) + int(shift * len(items))) // count] for i in range(count)]
