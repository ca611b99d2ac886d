"""Turn token ids into text as they come, up to a stop string.

In: one token id at a time. Out: the pieces of text that are certain: whole characters, and nothing that might
still turn out to be the beginning of a stop string. The pieces put together are exactly what
`Tokenizer.decode` gives for all the ids (with `is_continuation`: and the space that they begin with).

Tokens are bytes (see `llmrun.tokenizer`), so streaming is an incremental UTF-8 decoder, O(1) for each token;
there is no second decoding of a window of tokens, as programs do that see the tokenizer only as ids -> str.
Stop strings are found by Knuth, Morris and Pratt's automaton, one for each stop string, so the result does
not depend on where tokens end. Nothing here knows of end-of-sequence ids: the caller does not push them, and
they would decode to nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from llmrun.errors import UsageError

__all__ = ["MAX_STOPS", "MAX_STOP_CHARS", "TextStream"]

MAX_STOPS = 16
MAX_STOP_CHARS = 256


class ByteTokens(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def strips_leading_space(self) -> bool:
        """Whether one space at the beginning of all text belongs to the encoding, not to the text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token."""
        ...


class TextStream:
    """The text of one sequence.

    Generation stops at the stop string that is complete first; of several that end at the same character, the
    longest counts. Neither the stop string nor anything after it is emitted.

    Args:
        tokenizer: whose ids are pushed.
        stop: at most MAX_STOPS strings of 1 to MAX_STOP_CHARS characters.
        is_continuation: the ids go on after other text, so a space at their beginning is text: prompt + text reads well.
        shown: tokens with another text than the tokenizer's: special ones, of which it has none.
    Raises:
        UsageError: a stop string is empty, too long or not a string, or there are too many.
    """

    def __init__(
        self,
        tokenizer: ByteTokens,
        stop: Sequence[str] = (),
        *,
        is_continuation: bool = False,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        _check_stops(stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._shown = dict(shown or {})
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_leading_space and not is_continuation
        self._matchers = [_Matcher(text) for text in dict.fromkeys(stop)]
        self._held = ""
        self._finished = False

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that became certain; nothing once stopped.

        Raises:
            UsageError: the id is not one of the tokenizer's.
        """
        if self._finished:
            raise RuntimeError("TextStream.push after finish")
        if self.stopped:
            return ""
        if text := self._shown.get(token_id):
            self._at_start = False
            return self._emit(self._decoder.decode(b"", final=True) + text)
        data = self._tokenizer.token_bytes(token_id)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._emit(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back; bytes of an unfinished character become U+FFFD. The second call returns nothing."""
        if self._finished:
            return ""
        piece = "" if self.stopped else self._emit(self._decoder.decode(b"", final=True))
        self._finished = True
        rest, self._held = self._held, ""
        return piece + rest

    def _emit(self, new: str) -> str:
        if not self._matchers:
            return new
        text = self._held + new
        matched = 0
        for index, char in enumerate(new, start=len(self._held)):
            for matcher in self._matchers:
                if matcher.step(char):
                    matched = max(matched, len(matcher.text))
            if matched:
                self.stopped = True
                keep = index + 1 - matched
                break
        else:
            keep = len(text) - max(matcher.state for matcher in self._matchers)
        piece, self._held = text[:keep], "" if self.stopped else text[keep:]
        return piece


class _Matcher:
    """How many characters of one stop string the text so far ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallback = [0] * len(text)  # [i]: longest proper prefix of text that ends text[: i + 1]
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def step(self, char: str) -> bool:
        """Take one character; true if it completes the stop string."""
        while self.state and self.text[self.state] != char:
            self.state = self._fallback[self.state - 1]
        self.state += self.text[self.state] == char
        return self.state == len(self.text)


def _check_stops(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise UsageError("stop: expected a list of strings, not one string")
    if len(stop) > MAX_STOPS:
        raise UsageError(f"stop: {len(stop)} stop strings: at most {MAX_STOPS} are allowed")
    for text in stop:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            found = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise UsageError(f"stop: a stop string is {found}: expected text of 1 to {MAX_STOP_CHARS} characters")
