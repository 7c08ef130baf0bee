"""Text leaves whole, is cut exactly before a stop string, and does not depend on where tokens divide it."""

import itertools

import pytest
from fakes import ByteDecoder
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.text_stream import StopStrings, TextStream

small_text = st.text(alphabet="ab<é", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), max_size=4)


def first_cut(text, stops):
    """By definition: the first end of a stop string, of several ending there the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return None


def longest_prefix(text, stops):
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(small_text, stop_lists, st.lists(st.integers(0, 24)))
def test_stream_equals_whole(text, stops, cuts):
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    filter_, shown, seen = StopStrings(stops), "", ""
    for a, b in itertools.pairwise(edges):
        shown += filter_.push(text[a:b])
        seen += text[a:b]
        if filter_.matched is None:
            assert len(seen) - len(shown) == longest_prefix(seen, stops)  # held back: that and no more
    shown += filter_.flush()
    cut = first_cut(text, stops)
    assert (filter_.matched is not None) == (cut is not None)
    assert shown == (text if cut is None else cut)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(small_text, stop_lists)
def test_bytes_one_by_one_equal_whole(text, stops):
    stream, shown = TextStream(ByteDecoder(), stops), ""
    for byte in text.encode():
        shown += stream.push(byte)
        assert "\ufffd" not in shown
    shown += stream.flush()
    cut = first_cut(text, stops)
    assert shown == (text if cut is None else cut)


@pytest.mark.parametrize(
    ("stops", "pushes", "shown"),
    [
        (["</s>"], ["one <", "/", "s", ">two"], ["one ", "", "", ""]),
        (["stop"], ["x st", "ay sto", "p!"], ["x ", "stay ", ""]),
        (["aab"], ["aa", "a", "b"], ["", "a", ""]),  # the match begins inside what was held
        (["👩‍💻"], ["hi 👩", "‍", "💻 there"], ["hi ", "", ""]),
        (["cd", "abcdef"], ["abcd", "ef"], ["ab", ""]),  # completed first, although the other begins earlier
        ([], ["any", "thing"], ["any", "thing"]),
    ],
)
def test_examples(stops, pushes, shown):
    filter_ = StopStrings(stops)
    assert [filter_.push(text) for text in pushes] == shown
    assert filter_.flush() == ""


def test_held_text_is_released_at_the_end():
    filter_ = StopStrings(["</s>"])
    assert filter_.push("a </s") == "a "
    assert filter_.flush() == "</s"


def test_flush_shows_an_unfinished_character_once():
    stream = TextStream(ByteDecoder())
    assert [stream.push(b) for b in "é".encode() + b"\xe2\x82"] == ["", "é", "", ""]
    assert stream.flush() == "\ufffd"


def test_a_stop_string_does_not_reach_into_the_prompt():
    stream = TextStream(ByteDecoder(), ["ab"])
    stream.prime(b"xa")
    assert stream.push(ord("b")) + stream.flush() == "b"
    assert not stream.stopped


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None)
    stream.prime([1])
    assert stream.push(65) + stream.flush() == ""
