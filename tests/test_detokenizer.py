# ruff: noqa: RUF001  # the texts mean the characters that they hold
"""Text made token by token equals text decoded at once, and never breaks a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import LLAMA, PIECES, TEXTS, byte_level_core, load, make_directory, sentencepiece_model, stream
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Core

from tinychat import tokenizer
from tinychat.errors import TokenizerError
from tinychat.tokenizer.detokenizer import Scheme
from tinychat.tokenizer.sentencepiece_model import BYTE


def test_pebble_streams_every_split_of_unicode(data_dir):
    ours = load(data_dir / "pebble-11m")
    for text in TEXTS:
        ids = ours.encode(text)
        decoder = ours.decoder()
        for cut in range(len(ids) + 1):
            begun = "".join(map(decoder.step, ids[:cut]))
            rest = "".join(map(decoder.step, ids[cut:])) + decoder.flush()
            assert begun + rest == ours.decode(ids)
            assert "\ufffd" not in begun or "\ufffd" in text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    directory = make_directory(tmp_path_factory.mktemp("byte"), {"tokenizer_class": "PreTrainedTokenizerFast"})
    core = byte_level_core()
    core.add_tokens([AddedToken("<|special|>", special=True), AddedToken("zwei Wörter")])
    core.save(str(directory / "tokenizer.json"))
    return load(directory)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    directory = make_directory(tmp_path_factory.mktemp("spm"), LLAMA, sentencepiece_model(PIECES))
    return load(directory)


def whole_characters(data: bytes) -> bytes:
    """Without an incomplete character at the end."""
    for n in (1, 2, 3):
        try:
            data[-n:].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0 and len(data) >= n:
                return data[:-n]
    return data


@settings(max_examples=100, deadline=None)
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode(errors="replace"))))
def test_byte_level_stream_equals_decoding_at_once(byte_level, data):
    ids = [byte_level.token_id(byte_level_character(byte)) for byte in data]
    assert b"".join(byte_level.token_bytes(i) for i in ids) == data
    assert byte_level.decode(ids) == data.decode(errors="replace")
    assert stream(byte_level.decoder(), ids) == whole_characters(data).decode(errors="replace")


def byte_level_character(byte: int) -> str:
    from tinychat.tokenizer.detokenizer import _BYTE_OF_CHARACTER

    return next(character for character, value in _BYTE_OF_CHARACTER.items() if value == byte)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, len(PIECES) + 3), max_size=30), skip=st.booleans())
def test_byte_fallback_stream_equals_decoding_at_once(byte_fallback, ids, skip):
    whole = byte_fallback.decode(ids, skip_special=skip)
    pieces = stream(byte_fallback.decoder(skip_special=skip), ids)
    # Decoding at once spoils a whole run of bytes for one bad one, and shows what an incomplete end would have been.
    if "\ufffd" not in whole:
        assert pieces == whole
    good = [i for i in ids if PIECES[min(i, len(PIECES) - 1)][1] != BYTE]
    assert stream(byte_fallback.decoder(skip_special=skip), good) == byte_fallback.decode(good, skip_special=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_that_are_never_valid_come_out_within_three(request, kind):
    ours = request.getfixturevalue(kind)
    for bad in (b"\xff", b"\x80", b"\xf0\x9f", b"\xe4\xbd", b"\xf0\x9f\xa6\xff"):
        spelled = [byte_level_character(b) if kind == "byte_level" else f"<0x{b:02X}>" for b in bad]
        ids = [ours.token_id(token) for token in spelled] * 2000
        decoder, shown = ours.decoder(), 0
        for n, token_id in enumerate(ids, 1):
            shown += len(bad) * decoder.step(token_id).count("\ufffd")
            assert shown >= n - 3 - len(bad)
        last = ours.token_id("a")
        assert decoder.step(last).endswith("a")


def test_an_incomplete_character_at_the_end_is_dropped(byte_level, byte_fallback):
    for ours, token in ((byte_level, byte_level_character), (byte_fallback, "<0x{:02X}>".format)):
        ids = [ours.token_id(token(byte)) for byte in b"ok" * (ours is byte_level) + "é🦙".encode()[:-1]]
        assert stream(ours.decoder(), ids) == ("oké" if ours is byte_level else "é")


def test_the_decoder_is_as_new_after_flush(byte_fallback):
    ids = byte_fallback.encode("the")
    decoder = byte_fallback.decoder()
    assert [stream(decoder, ids), stream(decoder, ids)] == ["the", "the"]


def test_special_tokens_in_a_stream(byte_level):
    special, plain = byte_level.token_id("<|special|>"), byte_level.token_id("zwei Wörter")
    assert byte_level.special_ids == {special}
    assert stream(byte_level.decoder(), [special, plain, 9999]) == "zwei Wörter"
    assert stream(byte_level.decoder(skip_special=False), [special, plain]) == "<|special|>zwei Wörter"


def test_other_decoders_of_the_library():
    for decoder, vocab in (
        (None, ["a", "b", "▁c"]),
        (decoders.Metaspace(), ["▁a", "▁b▁", "c"]),
        (decoders.Metaspace(prepend_scheme="never"), ["▁a", "▁b▁", "c"]),
    ):
        core = Core(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="a"))
        core.decoder = decoder
        ours = tokenizer.Tokenizer(core, {})
        for ids in ([], [0], [0, 1, 2], [1, 0], [2, 2, 1]):
            assert stream(ours.decoder(), ids) == core.decode(ids)
    core.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="CTC"):
        tokenizer.Tokenizer(core, {})


def test_scheme_writes_special_tokens_as_they_are():
    assert Scheme(byte_level=True).token_bytes("Ġthe") == b" the"
    assert Scheme(byte_level=True).token_bytes("<｜end of sentence｜>") == "<｜end of sentence｜>".encode()
    assert Scheme(byte_fallback=True).token_bytes("<0xZZ>") == b"<0xZZ>"
