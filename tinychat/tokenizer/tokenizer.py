"""Text to token ids and back: what a checkpoint's tokenizer files say, as transformers reads them.

`load` builds one `tokenizers.Tokenizer` from `tokenizer.json` or from a SentencePiece `tokenizer.model`; token ids
equal those of transformers' AutoTokenizer (5.24) on the same directory. Decoding one token after another, where a
character may be spread over several, is in `detokenizer`; chat templates in `chat_template`. It knows nothing of
models.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.errors import TokenizerError
from tinychat.tokenizer.chat_template import ChatTemplate, find_template
from tinychat.tokenizer.detokenizer import IncrementalDecoder, Scheme, read_scheme
from tinychat.tokenizer.sentencepiece_model import CONTROL, USER_DEFINED, SentencePieceModel, bpe_merges, read_model
from tinychat.tokenizer.sentencepiece_rules import by_own_rules

if TYPE_CHECKING:
    import tokenizers

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer files in use have about 40 MB; a file beyond this is refused before it is parsed."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"
_CLASS_DEFAULTS = {  # the named tokens that transformers' tokenizer classes take where no file names any
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
_OTHER_FILES = ("vocab.json", "merges.txt", "tekken.json", "tiktoken.model", "tokenizer_config.json")


def load(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None where it has no tokenizer files at all.

    Reads `tokenizer.json`, else `tokenizer.model`; with either `tokenizer_config.json`, `special_tokens_map.json`,
    `added_tokens.json`, and the chat template. Raises TokenizerError for damaged files and for formats not read here.
    """
    directory = Path(directory)
    json_path, model_path = directory / "tokenizer.json", directory / "tokenizer.model"
    if not json_path.is_file() and not model_path.is_file():
        others = [name for name in _OTHER_FILES if (directory / name).is_file()]
        if not others:
            return None
        raise TokenizerError(
            f"{directory} has {', '.join(others)} but neither tokenizer.json nor tokenizer.model; "
            f"write tokenizer.json there with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if json_path.is_file():
        core, settings = _from_json(json_path)
    else:
        core, settings = _from_sentencepiece(model_path)
    core.no_truncation()
    core.no_padding()
    template = find_template(directory, settings.config)
    named = {name: _content(token) for name, token in settings.named_tokens.items()}
    return Tokenizer(core, named, ChatTemplate(template, named) if template is not None else None)


class Tokenizer:
    """Encodes and decodes; made by `load`. Safe to use from several threads."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None = None,
    ):
        """`named_tokens`: "bos_token" and the like to their text."""
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens)
        self._core = core
        self._scheme: Scheme = read_scheme(core.decoder)
        # Of decoders, by skip_special: see `IncrementalDecoder.known`.
        self._known: dict[bool, dict[int, tuple[bytes, str | None]]] = {True: {}, False: {}}
        vocabulary = core.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError("the tokenizer has an empty vocabulary")
        used = set(vocabulary.values())
        if len(used) < len(vocabulary):
            raise TokenizerError(
                f"the tokenizer's vocabulary is damaged: {len(vocabulary) - len(used)} token ids are used twice or more"
            )
        self.vocab_size: int = max(used) + 1
        """One more than the highest token id; a model may have more rows than that, never fewer."""

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, or None."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a text, or None. A model's generation config may name more of them."""
        return self._named_id("eos_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `decode` leaves out: control tokens such as the beginning of the text."""
        return frozenset(i for i, token in self._core.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of a text; text that spells a special token becomes that token.

        `add_bos` adds what the tokenizer's files say belongs around a text: a beginning token in most, nothing in some.
        Raises TokenizerError for text that is not valid Unicode.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: a lone surrogate {text[error.start]!a} at character {error.start}"
            ) from None
        with library_errors("cannot encode the text"):
            return self._core.encode(text, add_special_tokens=add_bos).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids, bytes that are no UTF-8 as U+FFFD. Ids beyond the vocabulary stand for no text."""
        checked = [_token_id(token_id) for token_id in ids]
        with library_errors("cannot decode the token ids"):
            return self._core.decode(checked, skip_special_tokens=skip_special)

    def decoder(self, *, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder that takes one token at a time."""
        skipped = self.special_ids if skip_special else frozenset()
        known = self._known[skip_special]
        return IncrementalDecoder(self._scheme, lambda i: None if i in skipped else self.token(i), known)

    def token(self, token_id: int) -> str | None:
        """A token as it is written in the vocabulary ("▁the", "Ġthe", "<0x0A>"), or None beyond it."""
        return self._core.id_to_token(_token_id(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps a part of a character, that a token stands for within a text."""
        token = self.token(token_id)
        return b"" if token is None else self._scheme.token_bytes(token)

    def token_id(self, token: str) -> int | None:
        """The id of a token as it is written in the vocabulary, or None."""
        return self._core.token_to_id(token)

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self.token_id(token)


def _token_id(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TokenizerError(f"a token id must be an integer, got {value!r:.60}") from None
    if not 0 <= number < 1 << 32:
        raise TokenizerError(f"token id {number} is out of range")
    return number


class _Settings:
    """What the small JSON files beside the vocabulary say, in the order of precedence that transformers follows."""

    def __init__(self, directory: Path, *, is_byte_level: bool):
        config = self.config = _read_object(directory / "tokenizer_config.json")
        self.class_name = _class_name(config, _read_object(directory / "config.json"), is_byte_level)
        named: dict[str, Any] = dict(_CLASS_DEFAULTS.get(self.class_name, {}))
        named.update({name: config[name] for name in _NAMED_TOKENS if name in config})
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        if isinstance(extra, dict):  # such as {"image_token": "<image>"}: named by the checkpoint, not by the format
            named.update(extra)
            extra = None
        named.update({k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)})
        self.extra_tokens = _token_list(extra)
        self.older_extra_tokens: list[Any] = []
        self.declared: dict[int, Any] = {}
        if "added_tokens_decoder" in config:
            for key, token in _object(config["added_tokens_decoder"], "added_tokens_decoder").items():
                if not key.isdecimal():
                    raise TokenizerError(f"tokenizer_config.json: {key!r} in added_tokens_decoder is no token id")
                self.declared[int(key)] = _object(token, f"added_tokens_decoder[{key}]")
        else:  # older checkpoints spread the same over two more files
            special = _read_object(directory / "special_tokens_map.json")
            named.update({name: special[name] for name in _NAMED_TOKENS if name in special})
            self.extra_tokens += _token_list(special.get("extra_special_tokens"))
            self.older_extra_tokens = _token_list(special.get("additional_special_tokens"))
            control = {_content(token) for token in [*named.values(), *self.extra_tokens] if token is not None}
            for text, token_id in _read_object(directory / "added_tokens.json").items():
                token = {"content": text, "special": text in control, "normalized": text not in control}
                self.declared[_token_id(token_id)] = token
        by_text = {_content(token): token for token in self.declared.values()}
        self.named_tokens = {
            name: by_text.get(_content(token), token) for name, token in named.items() if token is not None
        }

    def set_default(self, name: str, token: str | None) -> None:
        """Name a token that no file names; a file that says null has spoken."""
        if token is not None and name not in self.config:
            self.named_tokens.setdefault(name, token)

    def renamed(self, source: SentencePieceModel) -> SentencePieceModel:
        """The model with the texts that `added_tokens_decoder` gives its pieces, but for those that others have."""
        names = {i: _content(token) for i, token in self.declared.items()}
        kept = {piece.text for i, piece in enumerate(source.pieces) if i not in names}
        pieces = [
            replace(piece, text=names[i]) if i in names and names[i] not in kept else piece
            for i, piece in enumerate(source.pieces)
        ]
        return replace(source, pieces=pieces)

    def match_declared_as_written(self) -> None:
        """Look for declared tokens in the text itself, before spaces become part of its pieces."""
        self.declared = {i: {**token, "normalized": False} for i, token in self.declared.items()}

    def added_around(self, name: str) -> list[str]:
        """The token to put before ("bos_token") or after ("eos_token") a text: one or none."""
        wanted = self.config.get(f"add_{name}") and name in self.named_tokens
        return [_content(self.named_tokens[name])] if wanted else []

    def add_tokens(self, core: tokenizers.Tokenizer, extra_tokens: Iterable[Any]) -> None:
        """Tell `core` of all tokens that are never split, as transformers does after loading a vocabulary."""
        added = core.get_added_tokens_decoder()
        again = {token_id: _added_token(token) for token_id, token in self.declared.items()}
        if "added_tokens_decoder" not in self.config:
            again.update(added)
        tokens = [token for _, token in sorted(again.items())]
        known = {token.content for token in [*added.values(), *tokens]}
        named = {_content(token) for token in self.named_tokens.values()}
        # A token both named and extra is told twice: of two spellings the latter, the extra one, holds.
        others = [*self.named_tokens.values(), *extra_tokens]
        tokens += [_added_token(token) for token in others if _content(token) not in known]
        for token in tokens:
            token.special = token.special or token.content in named
        if tokens:
            core.add_tokens(tokens)
        for token_id, token in self.declared.items():
            if core.token_to_id(_content(token)) != token_id:
                raise TokenizerError(
                    f"the tokenizer's files contradict each other: {_content(token)!r} is declared with id {token_id} "
                    f"and has id {core.token_to_id(_content(token))} in the vocabulary"
                )


def _class_name(config: Mapping[str, Any], model_config: Mapping[str, Any], is_byte_level: bool) -> str:
    """The tokenizer class that transformers takes, of those that do more than read their file; else ""."""
    declared = str(config.get("tokenizer_class") or model_config.get("tokenizer_class") or "").removesuffix("Fast")
    model_type = model_config.get("model_type")
    if model_type == "qwen2":
        return "Qwen2Tokenizer"
    if declared == "LlamaTokenizer" and is_byte_level:
        return ""
    if model_type == "qwen3":
        return declared or "Qwen2Tokenizer"
    return declared if model_type in (None, "llama") else ""


def _from_json(path: Path) -> tuple[tokenizers.Tokenizer, _Settings]:
    from tokenizers import Tokenizer as Core

    _check_size(path)
    with library_errors(f"{path} is not a tokenizer, or is damaged"):
        core = Core.from_file(str(path))
        settings = _Settings(path.parent, is_byte_level=_is_byte_level(core))
        if settings.class_name == "LlamaTokenizer":
            # Older files prefix every segment with a space; the class has its own rule since transformers 5.
            core.model.unk_token = None
            _set_llama_pipeline(core, settings.config)
        settings.add_tokens(core, settings.extra_tokens or settings.older_extra_tokens)
    return core, settings


def _from_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, _Settings]:
    from tokenizers import Tokenizer as Core
    from tokenizers import models, processors

    _check_size(path)
    source = read_model(path)
    settings = _Settings(path.parent, is_byte_level=False)
    unsplit = [
        {"content": piece.text, "normalized": False, "special": piece.kind == CONTROL}
        for piece in source.pieces
        if piece.kind in (CONTROL, USER_DEFINED)
    ]
    with library_errors(f"cannot build a tokenizer from {path}"):
        if settings.class_name == "LlamaTokenizer":
            ids = {piece.text: token_id for token_id, piece in enumerate(source.pieces)}
            core = Core(models.BPE(vocab=ids, merges=bpe_merges(ids), fuse_unk=True, byte_fallback=True))
            _set_llama_pipeline(core, settings.config)
        else:
            settings.set_default("unk_token", source.unk_piece)
            settings.set_default("bos_token", source.bos_piece)
            settings.set_default("eos_token", source.eos_piece)
            source = settings.renamed(source)
            core = by_own_rules(source, legacy=bool(settings.config.get("legacy", True)))
            unsplit = [token for token in unsplit if token["special"]]
            if source.prefix_space:
                settings.match_declared_as_written()
        settings.add_tokens(core, settings.extra_tokens or unsplit)
        before, after = settings.added_around("bos_token"), settings.added_around("eos_token")
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, core.token_to_id(token)) for token in dict.fromkeys(before + after)],
        )
    return core, settings


def _set_llama_pipeline(core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Spaces as "▁", one put before the text, and back: what transformers' LlamaTokenizer does."""
    from tokenizers import decoders, pre_tokenizers

    prefix_space = config.get("add_prefix_space")
    prefix_space = True if prefix_space is None else bool(prefix_space)
    scheme = "never" if not prefix_space else "always" if config.get("legacy") else "first"
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)


def _is_byte_level(core: tokenizers.Tokenizer) -> bool:
    return any(
        part is not None and b'"ByteLevel"' in part.__getstate__() for part in (core.pre_tokenizer, core.decoder)
    )


def _content(token: Any) -> str:
    """The text of a token spelled as text or as an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TokenizerError(f'a special token must be text or have a text "content", got {token!r:.80}')
    return text


def _token_list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TokenizerError(f"the additional special tokens must be a list, got {value!r:.80}")
    return list(value)


def _added_token(token: Any) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {k: bool(token[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
    return AddedToken(_content(token), **flags)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file."""
    if not path.is_file():
        return {}
    _check_size(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None
    return _object(value, path.name)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {path.stat().st_size:,} bytes; a tokenizer file of more than {MAX_FILE_BYTES:,} is refused"
        )


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises, its panics (which are no Exception) included, as TokenizerError."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}") from None
