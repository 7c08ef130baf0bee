# ruff: noqa: RUF001  # the texts mean the characters that they hold
"""Small tokenizers and awkward texts, made for the tests of several modules."""

import json
import shutil
import struct
from pathlib import Path

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from tinychat import tokenizer
from tinychat.tokenizer.detokenizer import IncrementalDecoder
from tinychat.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

LLAMA = {"tokenizer_class": "LlamaTokenizer"}
SEPARATOR = "\n__ggml_vocab_test__\n"
TEXTS = [
    *("", " ", "  ", "\n", "\t", "\n\n a", " Hello", "   Hello", "Hello  world \n\n", "a\u00a0b", "\x00\x01", "<0x0A>"),
    *("<s>", "</s>x<s> y", "<|user|> hi <|end|>\n<|assistant|>", "a<|user|>   b", "<|endoftext|> <unk> ▁a ▁", "\ufffd"),
    *("👨‍👩‍👧‍👦 🇩🇪 🦙", "नमस्ते दुनिया", "ภาษาไทยไม่มีช่องว่าง", "中文字符，没有空格。", "e\u0301 é ﬁ Å", "1234567 3.14 0x1F"),
    *("def f(x):\n\treturn x  # y\n", "I'll don't we've", "Ⅷ ½ ² 𝒳", "plain token xyzzyxyzzy", "<image>[PAD]"),
]


def varint(number: int) -> bytes:
    out = bytearray()
    number %= 1 << 64
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(
    pieces: list[tuple[str, int]],
    kind: int = 2,
    byte_fallback: bool = True,
    normalizer: dict[int, int] | None = None,
    **trainer: int,
) -> bytes:
    """A tokenizer.model, written field by field; `normalizer` and `trainer` ("f41") by their numbers."""
    body = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -i) + field(3, piece_kind))
        for i, (text, piece_kind) in enumerate(pieces)
    )
    spec = field(3, kind) + field(35, int(byte_fallback)) + b"".join(field(int(k[1:]), v) for k, v in trainer.items())
    rules = b"".join(field(number, value) for number, value in (normalizer or {}).items())
    return body + field(2, spec) + field(3, field(1, b"identity") + rules)


PIECES = [
    *(("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<|user|>", USER_DEFINED), ("<|end|>", CONTROL)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *(
        (text, NORMAL)
        for text in ("▁t", "he", "▁the", "in", "▁a", "er", "ing", "▁▁", "▁H", "ell", "▁Hell", "▁Hello", "é")
    ),
    *((text, NORMAL) for text in ("▁", *"etaoinshrdlucmfwypvbgkqjxzHW.,")),
]


def make_directory(
    path: Path, tokenizer_config: dict | None = None, model: bytes | Path | None = None, **files: dict
) -> Path:
    """A checkpoint directory with a tokenizer.model and JSON files by name."""
    path.mkdir(exist_ok=True)
    if isinstance(model, Path):
        shutil.copy(model, path / "tokenizer.model")
    elif model is not None:
        (path / "tokenizer.model").write_bytes(model)
    for name, content in {"config": {"model_type": "llama"}, "tokenizer_config": tokenizer_config, **files}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def byte_level_core(vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> Core:
    if vocab is None:
        vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Core(models.BPE(vocab=vocab, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def load(directory: Path) -> tokenizer.Tokenizer:
    loaded = tokenizer.load(directory)
    assert loaded is not None
    return loaded


def stream(decoder: IncrementalDecoder, ids: list[int]) -> str:
    return "".join(map(decoder.step, ids)) + decoder.flush()
