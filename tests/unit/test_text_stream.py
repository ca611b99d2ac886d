"""Streamed text: always what decoding everything at once would give."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrun.errors import UsageError
from llmrun.text_stream import MAX_STOP_CHARS, MAX_STOPS, TextStream


class _Tokens:
    """A tokenizer of given byte strings."""

    def __init__(self, *tokens, strips_leading_space=False):
        self.tokens = tokens
        self.strips_leading_space = strips_leading_space

    def token_bytes(self, token_id):
        return self.tokens[token_id]

    def decode(self, ids):
        data = b"".join(self.tokens[i] for i in ids)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")


BYTES = _Tokens(*(bytes([i]) for i in range(256)))
# Every way in which UTF-8 can begin, go on, end and be wrong, spaces, and the letters that the stop strings are made of.
MIXED = [b"", b" ", b"  ", b"a", b"b", b"ab", b"ba", b" a", b"\n", b"\xc3", b"\xa9", b"\xe6\xbc", b"\xa2", b"\xf0\x9f"]
MIXED += [b"\xa6\x99", b"\xff", b"\xed\xa0\x80", "é漢🦙".encode(), b"\x00", b"\xf0", b"\xbd"]


def _cut(text, stops):
    """The text before the stop string that is complete first, character by character; the longest of several."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


def _run(stream, ids):
    return [stream.push(i) for i in ids] + [stream.finish()]


ids_of_mixed = st.lists(st.integers(0, len(MIXED) - 1), max_size=30)


@settings(max_examples=300, deadline=None)
@given(ids=ids_of_mixed, strips=st.booleans())
def test_pieces_together_are_the_whole_decode(ids, strips):
    tokens = _Tokens(*MIXED, strips_leading_space=strips)
    stream = TextStream(tokens)
    pieces = _run(stream, ids)
    assert "".join(pieces) == tokens.decode(ids)


@settings(max_examples=500, deadline=None)
@given(
    ids=ids_of_mixed,
    strips=st.booleans(),
    stops=st.lists(st.text("ab \n漢", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_with_stop_strings_the_pieces_are_the_text_before_the_first(ids, strips, stops):
    tokens = _Tokens(*MIXED, strips_leading_space=strips)
    stream = TextStream(tokens, stops)
    pieces = _run(stream, ids)
    expected, stopped = _cut(tokens.decode(ids), stops)
    assert "".join(pieces) == expected
    assert stream.stopped == stopped


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
@example(text="aaaab", stops=["aaab"])  # begins again within itself, twice over
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    stream, given = TextStream(BYTES, stops), ""
    for i, byte in enumerate(text.encode()):
        given += stream.push(byte)
        if stream.stopped:
            return
        seen = text[: i + 1]
        held = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert given == seen[: len(seen) - held]


def test_a_character_comes_out_with_its_last_byte():
    stream = TextStream(BYTES)
    assert [stream.push(byte) for byte in "a🦙é".encode()] == ["a", "", "", "", "🦙", "", "é"]
    assert stream.finish() == ""


def test_an_unfinished_character_becomes_one_sign_at_the_end():
    stream = TextStream(BYTES)
    assert [stream.push(byte) for byte in b"a\xf0\x9f\xa6"] == ["a", "", "", ""]
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def test_one_leading_space_is_taken_off_once():
    stream = TextStream(_Tokens(b"", b" a", b" b", strips_leading_space=True))
    assert [stream.push(i) for i in (0, 1, 2)] == ["", "a", " b"]


def test_a_continuation_keeps_the_space_that_it_begins_with():
    stream = TextStream(_Tokens(b"", b" a", b" b", strips_leading_space=True), is_continuation=True)
    assert "".join(stream.push(i) for i in (0, 1, 2)) + stream.finish() == " a b"


def test_a_stop_string_over_many_tokens_is_never_seen():
    stream = TextStream(BYTES, ["\nUser:"])
    assert "".join(stream.push(byte) for byte in b"Hi\nUs\nUser: no") == "Hi\nUs"
    assert stream.stopped
    assert stream.push(65) == stream.finish() == ""


def test_held_text_comes_out_at_the_end():
    stream = TextStream(BYTES, ["abc"])
    assert [stream.push(byte) for byte in b"xab"] == ["x", "", ""]
    assert stream.finish() == "ab"
    assert not stream.stopped


def test_of_stop_strings_that_end_together_the_longest_counts():
    stream = TextStream(_Tokens(b"say STOP now"), ["OP", "STOP"])
    assert stream.push(0) == "say "


def test_a_stop_string_may_be_completed_at_the_end():
    stream = TextStream(BYTES, ["\ufffd"])
    assert stream.push(0xF0) + stream.finish() == ""
    assert stream.stopped


@pytest.mark.parametrize(
    "stop", [[""], ["a" * (MAX_STOP_CHARS + 1)], ["a"] * (MAX_STOPS + 1), [1], [None], "abc", [b"a"]]
)
def test_bad_stop_strings_are_refused(stop):
    with pytest.raises(UsageError, match="stop"):
        TextStream(BYTES, stop)


def test_the_limits_themselves_are_allowed():
    TextStream(BYTES, [chr(65 + i) * MAX_STOP_CHARS for i in range(MAX_STOPS)])


def test_shown_tokens_are_text() -> None:
    tokens = _Tokens(b"", b" a", b"", strips_leading_space=True)
    assert "".join(_run(TextStream(tokens, shown={0: "[X]"}), [0, 1, 2, 0])) == "[X] a[X]"
    assert "".join(_run(TextStream(tokens, ["]"], shown={0: "[X]"}), [1, 0, 1])) == "a[X"
    # Half a character before one is none, and what comes behind it is no other half.
    halves = _Tokens(b"", b"\xc3", b"\xa4")
    assert "".join(_run(TextStream(halves, shown={0: "\udc00"}), [1, 2, 1, 0, 2])) == "\xe4\ufffd\udc00\ufffd"
