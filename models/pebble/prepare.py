"""Prepare the text that pebble is trained on: conversations and stories to a tokenizer and files of token ids.

    python models/pebble/prepare.py --dialogues DIR_OR_JSONL --stories FILE [--roleplay FILE] [--books FILE] -o DIR

--dialogues  the Schema-Guided Dialogue folder (train/ and dev/ with dialogues_*.json), or a .jsonl(.xz) file whose
             lines are {"messages": [{"role", "content"}, ...]}
--stories    a TinyStories text file; stories end with a line <|endoftext|>
--roleplay   GPTeacher's role-play file: a JSON list of {"instruction", "input", "response"}
--books      running text, kept apart from the rest

Where to find them, and their licences: README.md beside this file. The output folder receives tokenizer.model,
tokenizer_config.json, counts.json and files of uint16 ids: train.bin and val.bin (conversations, and stories as they
are or as answers), persona.bin, stories.bin (all stories as they are) and, with --books, books.bin, to be mixed by
train.py.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from tinychat import tokenizer as tokenizers

HERE = Path(__file__).parent
MARKS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "<|end|>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "model_max_length": 1024,
    "chat_template": TEMPLATE,
}
STORY_REQUESTS = [
    "Tell me a story about {}.",
    "Can you tell me a story about {}?",
    "I would like to hear a story about {}.",
    "Please write a short story about {}.",
]
COMMON_WORDS = {
    "once",
    "upon",
    "time",
    "there",
    "that",
    "with",
    "they",
    "them",
    "their",
    "were",
    "very",
    "when",
    "then",
}

Messages = list[dict[str, str]]


def open_text(path: Path) -> Iterator[str]:
    """Lines of a plain or xz-compressed text file."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        yield from file


def read_dialogues(path: Path) -> Iterator[Messages]:
    """Conversations of the Schema-Guided Dialogue folder, or of a file of messages."""
    if path.is_dir():
        roles = {"USER": "user", "SYSTEM": "assistant"}
        for file in sorted([*path.glob("train/dialogues_*.json"), *path.glob("dev/dialogues_*.json")]):
            for dialogue in json.loads(file.read_text(encoding="utf-8")):
                yield [{"role": roles[turn["speaker"]], "content": turn["utterance"]} for turn in dialogue["turns"]]
    else:
        for line in open_text(path):
            yield json.loads(line)["messages"]


def read_stories(path: Path) -> Iterator[str]:
    """Whole stories; the last one of a cut file is left out."""
    lines: list[str] = []
    for line in open_text(path):
        if line.strip() == "<|endoftext|>":
            if lines:
                yield "".join(lines).strip()
            lines = []
        else:
            lines.append(line)


def read_passages(path: Path | None, length: int = 8000) -> list[str]:
    """Running text in passages of at least `length` characters that end where a line does."""
    passages: list[str] = []
    lines: list[str] = []
    size = 0
    for line in open_text(path) if path else ():
        lines.append(line)
        size += len(line)
        if size >= length:
            passages.append("".join(lines))
            lines, size = [], 0
    return [*passages, "".join(lines)] if lines else passages


def read_roleplay(path: Path | None) -> Iterator[Messages]:
    """Single-turn conversations."""
    for entry in json.loads(path.read_text(encoding="utf-8")) if path else []:
        request = "\n".join(part for part in (entry["instruction"], entry.get("input", "")) if part)
        yield [{"role": "user", "content": request}, {"role": "assistant", "content": entry["response"]}]


def topic(story: str, rng: random.Random) -> str | None:
    """Something that the story is about: a word that it uses more than once."""
    words = re.findall(r"[a-z]{4,}", story.lower())
    repeated = sorted({word for word in words if words.count(word) > 1} - COMMON_WORDS)
    return rng.choice(repeated) if repeated else None


def train_tokenizer(texts: Iterable[str], output: Path, vocab_size: int) -> None:
    """SentencePiece BPE with byte fallback; digits split; the text itself is left as it is."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(output / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        max_sentence_length=20000,
        user_defined_symbols=MARKS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (output / "tokenizer.vocab").unlink()
    (output / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1))


def main() -> None:
    """Read, split, tokenize, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--roleplay", type=Path)
    parser.add_argument("--books", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--validation", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    documents: list[Messages | str] = [*read_dialogues(args.dialogues), *read_roleplay(args.roleplay)]
    stories = list(read_stories(args.stories))
    books = read_passages(args.books)
    for story in stories:
        about = topic(story, rng) if rng.random() < 0.5 else None
        request = rng.choice(STORY_REQUESTS).format(about)
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": story}]
        documents.append(messages if about else story)
    rng.shuffle(documents)
    persona = [json.loads(line)["messages"] for line in open_text(HERE / "persona.jsonl")]

    def plain(document: Messages | str) -> str:
        return document if isinstance(document, str) else "\n".join(m["content"] for m in document)

    train_tokenizer(
        (line for d in [*documents, *books[::8], *persona] for line in plain(d).splitlines()),
        args.output,
        args.vocab_size,
    )
    tokenizer = tokenizers.load(args.output)
    assert tokenizer is not None

    def encode(document: Messages | str) -> list[int]:
        if isinstance(document, str):
            return [*tokenizer.encode(document), tokenizer.eos_id]
        text = "".join(f"<|{m['role']}|>{m['content'].strip()}<|end|>" for m in document)
        return [tokenizer.bos_id, *tokenizer.encode(text, add_bos=False)]

    held_out = max(1, int(len(documents) * args.validation))
    counts = {}
    parts = {"val": documents[:held_out], "train": documents[held_out:], "persona": persona, "stories": stories}
    for name, part in {**parts, **({"books": books} if books else {})}.items():
        ids = [token for document in tqdm(part, desc=name) for token in encode(document)]
        np.array(ids, np.uint16).tofile(args.output / f"{name}.bin")
        counts[name] = {"documents": len(part), "tokens": len(ids)}
    (args.output / "counts.json").write_text(json.dumps(counts, indent=1))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
