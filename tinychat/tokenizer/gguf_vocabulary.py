"""A tokenizer from the keys `tokenizer.ggml.*` of a GGUF file: vocabularies of SentencePiece's kind, and of GPT-2's.

Ids are meant to be llama.cpp's. Normal pieces are merged, control tokens and those of users are never split. How text
is cut before pairs are merged a file says by a name only: the patterns of the names known are here, others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinychat.errors import TokenizerError
from tinychat.tokenizer.chat_template import ChatTemplate
from tinychat.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, bpe_merges
from tinychat.tokenizer.tokenizer import Tokenizer, library_errors

_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = f"{_WORDS}{_REST}"
_CUTS = {  # by tokenizer.ggml.pre: patterns, one after the other; None is GPT-2's own, which comes last
    "gpt-2": (None,),
    "smollm": (r"\p{N}", None),
    "llama-bpe": (f"{_WORDS}{{1,3}}{_REST}",),
    "qwen2": (_QWEN,),
    "deepseek-r1-qwen": (_QWEN,),
}


class Vocabulary:
    """The metadata of a file, each key without `tokenizer.ggml.`."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self._tokens: list[str] = metadata.get("tokens", [])
        self._kinds: list[int] = metadata.get("token_type", [NORMAL] * len(self._tokens))
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        if not self._tokens or len(self._ids) < len(self._tokens) or len(self._kinds) != len(self._tokens):
            raise TokenizerError(
                f"the vocabulary has {len(self._tokens)} tokens, {len(self._ids)} of them different, and "
                f"{len(self._kinds)} of their kinds; expected is one kind for each token, and no token twice"
            )

    def tokenizer(self, template: str | None = None) -> Tokenizer:
        """With the chat template `template`. TokenizerError for what is not read."""
        from tokenizers import AddedToken, processors

        kind = str(self._metadata.get("model"))
        build = {"llama": self._sentencepiece, "gpt2": self._byte_level}.get(kind)
        if build is None:
            raise TokenizerError(f"a tokenizer of GGUF's kind {kind!r} is not read; 'llama' and 'gpt2' are")
        with library_errors("cannot build the tokenizer"):
            core = build()
            unsplit = (CONTROL, UNKNOWN, USER_DEFINED)
            core.add_tokens(
                [
                    AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                    for token, kind in zip(self._tokens, self._kinds, strict=True)
                    if kind in unsplit
                ]
            )
            named = {name: self._tokens[i] for key, name in _NAMED.items() if (i := self._id(key)) is not None}
            by_default = kind == "llama" or self._metadata.get("pre") == "llama-bpe"
            before = [named["bos_token"]] if self._flag("add_bos_token", by_default) and "bos_token" in named else []
            after = [named["eos_token"]] if self._flag("add_eos_token", False) and "eos_token" in named else []
            core.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                special_tokens=[(token, self._ids[token]) for token in dict.fromkeys(before + after)],
            )
        return Tokenizer(core, named, ChatTemplate(template, named) if template is not None else None)

    def _sentencepiece(self) -> Any:
        """Spaces are written "▁", one before each text; of all pairs that join, that of the highest score is first."""
        from tokenizers import Tokenizer as Core
        from tokenizers import decoders, models, normalizers

        scores = dict(zip(self._tokens, self._metadata.get("scores", ()), strict=False))
        if len(scores) != len(self._tokens):
            raise TokenizerError(f"the vocabulary has {len(self._tokens)} tokens and {len(scores)} scores")
        merged = {token: i for token, i in self._ids.items() if self._kinds[i] in (NORMAL, USER_DEFINED)}
        merges = sorted(bpe_merges(merged), key=lambda pair: -scores["".join(pair)])
        core = Core(models.BPE(vocab=self._ids, merges=merges, fuse_unk=True, byte_fallback=True))
        prefix = self._flag("add_space_prefix", True)
        written = normalizers.Replace(" ", "▁")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), written]) if prefix else written
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return core

    def _byte_level(self) -> Any:
        """Text is cut by a pattern, and bytes of the parts are merged by rank."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Core

        pre = self._metadata.get("pre")
        if pre not in _CUTS:
            raise TokenizerError(
                f"tokenizer.ggml.pre is {pre!r}, whose way to cut text is not known; known are {', '.join(_CUTS)}"
            )
        merges = [tuple(merge.split(" ")) for merge in self._metadata.get("merges", [])]
        core = Core(models.BPE(vocab=self._ids, merges=merges, ignore_merges=pre == "llama-bpe"))
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _CUTS[pre] if cut is not None]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_CUTS[pre][-1] is None)
        core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
        core.decoder = decoders.ByteLevel()
        return core

    def _id(self, name: str) -> int | None:
        found = self._metadata.get(f"{name}_token_id")
        if found is not None and not (type(found) is int and 0 <= found < len(self._tokens)):
            raise TokenizerError(f"{name}_token_id is {found!r}, and there are {len(self._tokens)} tokens")
        return found

    def _flag(self, name: str, default: bool) -> bool:
        return bool(self._metadata.get(name, default))
