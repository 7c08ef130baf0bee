"""A tokenizer by a SentencePiece model's own rules, for checkpoints that name no class with rules of its own.

Token ids equal those of transformers (5.24), which are SentencePiece's but for pieces that no two others join to.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tinychat.tokenizer.sentencepiece_model import NORMAL, USER_DEFINED, SentencePieceModel, bpe_merges

if TYPE_CHECKING:
    import tokenizers


def by_own_rules(source: SentencePieceModel, legacy: bool) -> tokenizers.Tokenizer:
    """A tokenizer that encodes as SentencePiece does by the model's own rules.

    legacy  a space is put before every piece of text between added tokens, not only before the first
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Core

    ids = {piece.text: token_id for token_id, piece in enumerate(source.pieces)}
    scores = {piece.text: piece.score for piece in source.pieces if piece.kind == NORMAL}
    whole = [piece.text for piece in source.pieces if piece.kind == USER_DEFINED]
    core = Core(
        models.BPE(
            vocab=ids,
            merges=sorted(bpe_merges(scores), key=lambda pair: -scores["".join(pair)]),
            unk_token=source.unk_piece,
            fuse_unk=True,
            byte_fallback=source.byte_fallback,
            ignore_merges=bool(whole),
        )
    )
    steps: list[Any] = [normalizers.Precompiled(source.character_map)] if source.character_map else []
    if source.single_spaces:  # other white space stays
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if source.escapes_spaces:
        steps.append(normalizers.Replace(" ", "▁"))
    parts: list[Any] = []
    if source.prefix_space:
        if legacy:  # Metaspace puts none before a text that has one, SentencePiece does
            steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
        scheme = "always" if legacy else "first"
        parts.append(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False))
    if whole:
        longest_first = sorted(whole, key=len, reverse=True)
        parts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated"))
    core.normalizer = normalizers.Sequence(steps)
    if parts:
        core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    joined: list[Any] = [decoders.ByteFallback()] if source.byte_fallback else []
    if source.prefix_space:
        joined += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    elif source.byte_fallback:
        joined.append(decoders.Fuse())
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), *joined])
    return core
