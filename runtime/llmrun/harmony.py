"""Answers in harmony, gpt-oss's form: one message after the other, each with a channel, told apart.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>

Thoughts are on the channel `analysis`; what is on `final`, or on `commentary` without a recipient, is for the user. A message
to a tool is a call: `to=functions.NAME` stands in its header, before the channel or behind it, and maybe <|constrain|> and the
type of what follows. What the model makes up of the user or of a tool is thought, too.

The markup is special tokens, which have no text. In an answer's text they are lone surrogates here: no bytes decode to those,
so nothing that a model writes, or is told to write, can pass for markup.

The format: https://github.com/openai/harmony, docs/format.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from llmrun.text_stream import TextStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.constraint import Constraint
    from llmrun.tokenizer import Tokenizer

START, END, MESSAGE, CHANNEL, CONSTRAIN = "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"
_ENDS = (END, "<|return|>", "<|call|>")
_NAMES = (START, MESSAGE, CHANNEL, CONSTRAIN, *_ENDS)
_MARKS = {name: chr(0xDC00 + i) for i, name in enumerate(_NAMES)}
_NAMES_OF = {mark: name for name, mark in _MARKS.items()}
_MARK = re.compile("([" + "".join(_NAMES_OF) + "])")
_CHANNEL = re.compile(_MARKS[CHANNEL] + r"\s*(\w+)")
_RECIPIENT = re.compile(r"(?:\b|assistant)to=([^" + "".join(_NAMES_OF) + "]+)")
_OTHERS = re.compile(_MARKS[START] + r"\s*(?!assistant|to=)\w")  # a message that the model makes up for somebody else
_FUNCTIONS = "functions."  # the namespace of a request's tools
ANALYSIS, FINAL, COMMENTARY = "analysis", "final", "commentary"
_ROLE = "assistant"
_BETWEEN = "\n\n"  # messages that become one text
EFFORTS = ("low", "medium", "high")  # of `reasoning_effort`


def speaks_harmony(tokenizer: Tokenizer | None) -> bool:
    """Tell whether the model's chat template and its tokenizer have harmony's tokens."""
    template = (None if tokenizer is None else tokenizer.chat_template) or ""
    needed = (START, END, MESSAGE, CHANNEL)
    return tokenizer is not None and all(name in template and name in tokenizer.special_tokens for name in needed)


def shown_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens of the markup, and what stands for them in the text that a `MessageStream` takes."""
    special = tokenizer.special_tokens
    return {special[name]: mark for name, mark in _MARKS.items() if name in special}


def begun_message(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Return what a prompt has of the message that the answer goes on with, mostly <|start|>assistant, with marks."""
    shown, start = shown_marks(tokenizer), tokenizer.special_tokens[START]
    first = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == start), len(prompt))
    stream = TextStream(tokenizer, is_continuation=True, shown=shown)
    text = "".join(map(stream.push, prompt[first:])) + stream.finish()
    return "" if any(_MARKS[name] in text for name in _ENDS) else text


class Spelling(TypedDict):
    """What stands behind a message's <|channel|>: in a call before the tool's name, and behind it; before an answer."""

    opening: str
    middle: str
    answer: str


def call_spelling(tokenizer: Tokenizer) -> Spelling:
    """Return how the model writes a call, or an answer that is none."""
    kind = f" {CONSTRAIN}json" if CONSTRAIN in tokenizer.special_tokens else " json"
    return {"opening": f"{COMMENTARY} to={_FUNCTIONS}", "middle": f"{kind}{MESSAGE}", "answer": f"{FINAL}{MESSAGE}"}


class MessageStream:
    """The text of one answer as it comes, in two: thoughts and what is for the user; calls of tools are in neither.

    Attributes:
        calls: of the messages that have ended: names and arguments (JSON).
        is_thinking: the message that is open is one of thoughts.
        is_open: a message's text has begun, and not ended.
        is_markup: what came last was none of a message's text.
    """

    def __init__(self, begun: str = "", tools: Iterable[str] = (), *, is_apart: bool = True) -> None:
        """Begin an answer.

        Args:
            begun: what the prompt has of its first message, from `begun_message`.
            tools: names of those that a message may call.
            is_apart: thoughts and text come without the markup; otherwise as written, but for calls.
        """
        self.calls: list[tuple[str, str]] = []
        self.is_thinking = self.is_open = self.is_markup = False
        self._tools = sorted(tools, key=len, reverse=True)  # of names that begin alike, the whole one
        self._is_apart = is_apart
        self._header = ""
        self._written = ""  # markup, as written, since the last text
        self._call: str | None = None  # the tool that the open message calls
        self._arguments = ""
        self._is_new = False  # nothing of the open message has been told
        self._has_told = [False, False]  # whether there were thoughts, and text
        self._told = ["", ""]
        self.push(begun)
        self._written = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return what it adds to the thoughts, and to the rest."""
        for piece in _MARK.split(text):
            if piece in _NAMES_OF:
                self._take_mark(piece)
            elif piece and self.is_open:
                self._take_text(piece)
            elif piece:
                self._take_header(piece)
        self.is_markup = not self.is_open or _MARK.search(text) is not None
        return self._taken()

    def finish(self) -> tuple[str, str]:
        """Return the rest of both; a call that is not whole is text."""
        self._end()
        if not self._is_apart:
            self._told[1] += self._written
        return self._taken()

    def _taken(self) -> tuple[str, str]:
        thought, rest = self._told
        self._told = ["", ""]
        return thought, rest

    def _take_mark(self, mark: str) -> None:
        name = _NAMES_OF[mark]
        if not self.is_open and name in (MESSAGE, CHANNEL, CONSTRAIN):
            self._written += name
            self._header += mark
            if name == MESSAGE:
                self._begin()
        elif name in (START, CHANNEL):  # also behind a message that has no end
            self._end()
            self._written += name
            self._header = mark
        elif name not in (MESSAGE, CONSTRAIN):
            if self.is_open and self._call is None and not self._is_apart:
                self._take_text(name)
            self._end()

    def _take_header(self, text: str) -> None:
        self._written += text
        self._header += text
        header = self._header.removeprefix(_MARKS[START])
        if _may_be_header(header) or _OTHERS.match(self._header):
            return
        # A model that was trained on may have unlearnt the markup: what has no channel is for the user.
        text = header.removeprefix(_ROLE)
        self._written = self._written[: max(0, len(self._written) - len(text))]
        self._header = ""
        self._begin()
        self._take_text(text)

    def _begin(self) -> None:
        """Begin a message's text."""
        channel = _CHANNEL.search(self._header)
        self.is_open = self._is_new = True
        is_analysis = channel is not None and channel[1] == ANALYSIS
        self.is_thinking = is_analysis or _OTHERS.match(self._header) is not None
        self._call, self._arguments = self._called(), ""
        if not self._is_apart and self._call is None:
            self._take_text("")

    def _called(self) -> str | None:
        """Return the tool that the header names; None: it names none, or one that was not offered."""
        if (found := _RECIPIENT.search(self._header)) is None:
            return None
        recipient = found[1].strip()
        for name in self._tools:
            for text in (recipient, recipient.removeprefix(_FUNCTIONS)):
                if text == name or text.startswith(f"{name} "):
                    return name
        return None

    def _take_text(self, text: str) -> None:
        if self._call is not None:
            self._arguments += text
            return
        kind = 0 if self.is_thinking else 1
        if self._is_new:
            self._told[kind] += (_BETWEEN * self._has_told[kind]) if self._is_apart else self._written
            self._written, self._is_new, self._has_told[kind] = "", False, True
        self._told[kind] += text

    def _end(self) -> None:
        """End the message that is open, if one is."""
        if self._call is not None:
            name, self._call = self._call, None
            if _is_object(self._arguments):
                self.calls.append((name, self._arguments))
                self._written = ""
            else:
                self._take_text(self._arguments)
        self.is_open = self.is_thinking = False
        self._header = ""


class AnswerText(TextStream):
    """The text of an answer that is for the user, for whom nobody else tells messages apart."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Begin the answer to a prompt; otherwise as `TextStream`."""
        super().__init__(tokenizer, stop, is_continuation=True, shown=shown_marks(tokenizer))
        self._messages = MessageStream(begun_message(tokenizer, prompt))

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that became certain."""
        return self._messages.push(super().push(token_id))[1]

    def finish(self) -> str:
        """Return what was held back; the second call returns nothing."""
        text = self._messages.push(super().finish())[1]
        return text + self._messages.finish()[1]


def answer_text(
    tokenizer: Tokenizer,
    prompt: Any,
    prompt_ids: Sequence[int],
    stop: Sequence[str],
    is_continuation: bool,
    shown: Mapping[int, str] | None,
) -> TextStream:
    """Return the text of the answer to a prompt: of a chat in harmony, without `shown` ones, what is for the user."""
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if is_chat and shown is None and speaks_harmony(tokenizer):
        return AnswerText(tokenizer, prompt_ids, stop)
    return TextStream(tokenizer, stop, is_continuation=is_continuation, shown=shown)


class HarmonyConstraint:
    """A grammar of what the user gets (`llmrun.constraint.Constraint`): before it the model may think.

    Headers are spelled as the tokenizer does, and as training had them; thoughts are free but for the tokens that end an
    answer, and for other markup than their end.
    """

    def __init__(
        self,
        grammar: Constraint,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        begun: str,
        *,
        has_channel: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            grammar: with bits of 32 as its mask, of a message on the channel `final`.
            tokenizer: whose ids come.
            end_ids: the tokens that end an answer.
            begun: what the prompt has of its first message, from `begun_message`.
            has_channel: the grammar begins with a channel's name instead, which is not `analysis`.
        """
        special = tokenizer.special_tokens
        start, channel, message = special[START], special[CHANNEL], special[MESSAGE]

        def ids(*segments: str | int) -> list[int]:
            return tokenizer.encode_segments([start, *segments])[1:]

        self._grammar, self._end = grammar, special[END]
        self._thought = ids(channel, ANALYSIS, message)
        self._answer = [channel] if has_channel else ids(channel, FINAL, message)
        self._between = [start, *ids(_ROLE)]
        allowed = np.zeros(-(-tokenizer.vocab_size // 32) * 32, np.uint8)
        allowed[: tokenizer.vocab_size] = 1
        allowed[[i for i in {*end_ids, *shown_marks(tokenizer)} - {self._end} if i < len(allowed)]] = 0
        self._free = np.packbits(allowed, bitorder="little").view("<u4")
        # What may follow: the headers' tokens, and whether they lead to thoughts; none: the grammar holds.
        self._ways: list[tuple[list[int], bool]] = []
        self._is_thinking = False
        open_message = MessageStream(begun)
        if open_message.is_thinking:
            self._is_thinking = True
        elif has_channel or not open_message.is_open:
            self._offer([] if begun == _MARKS[START] + _ROLE else self._between)

    def mask(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Return the tokens that may follow, as bits."""
        if self._is_thinking:
            return self._free
        if not self._ways:
            return self._grammar.mask(tokens)
        is_reached = any(not way for way, _ in self._ways)
        bits = self._grammar.mask(tokens).view("u4").copy() if is_reached else self._free * 0
        for way, _ in self._ways:
            if way:
                bits[way[0] // 32] |= 1 << way[0] % 32
        return bits

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled."""
        if self._is_thinking:
            if token_id == self._end:
                self._is_thinking = False
                self._offer(self._between)
            return
        ways = [(way[1:], is_thought) for way, is_thought in self._ways if way[:1] == [token_id]]
        if not ways:
            self._ways = []
            self._grammar.accept(token_id)
        elif ways == [([], True)]:
            self._ways, self._is_thinking = [], True
        else:
            self._ways = [] if ways == [([], False)] else ways

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        return not self._is_thinking and not self._ways and self._grammar.is_done

    def _offer(self, before: Sequence[int]) -> None:
        self._ways = [([*before, *self._thought], True), ([*before, *self._answer], False)]


def _may_be_header(text: str) -> bool:
    """Tell whether a text may be a header's beginning, between <|start|> and the next mark, or go on behind one."""
    if _MARK.search(text) is not None:
        return True
    rest = text.lstrip()
    if _ROLE.startswith(rest):
        return True
    return "to=".startswith(rest.removeprefix(_ROLE).lstrip()[:3])


def _is_object(arguments: str) -> bool:
    try:
        found = json.loads(arguments)
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):  # NaN and 1e999 are Python's only, and nothing that a client can read
        return False
    return isinstance(found, dict)
