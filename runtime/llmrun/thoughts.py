"""What a model thinks before it answers, between <think> and </think>, told apart from the answer.

Whether a model thinks is read off its chat template, which names the tags (Mistral's begin with [THINK], Seed-OSS's with
<seed:think>). Where the template ends a prompt with <think> (DeepSeek-R1's), the answer begins within the thoughts; elsewhere
(Qwen 3's) the model begins them itself, or does not. Granite 3.3's asks for the answer behind them between <response> and
</response>. Those of gpt-oss are messages (`llmrun.harmony`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.constraint import Constraint
    from llmrun.tokenizer import Tokenizer

REASONING_FORMATS = ("deepseek", "none")  # as reasoning_content, as DeepSeek's API has it; or within the text


class Tags(NamedTuple):
    """What stands before and behind thoughts."""

    opening: str
    closing: str


THINK = Tags("<think>", "</think>")
_KNOWN = (THINK, Tags("[THINK]", "[/THINK]"), Tags("<seed:think>", "</seed:think>"))
_RESPONSE, _RESPONSE_END = "<response>", "</response>"


def may_think(tokenizer: Tokenizer | None) -> bool:
    """Tell whether the model's chat template knows of thoughts."""
    return _named(tokenizer) is not None


def tags_of(tokenizer: Tokenizer | None) -> Tags:
    """Return the tags that the model's chat template names; <think> and </think> if it names none."""
    return _named(tokenizer) or THINK


def _named(tokenizer: Tokenizer | None) -> Tags | None:
    template = (None if tokenizer is None else tokenizer.chat_template) or ""
    return next((tags for tags in _KNOWN if tags.closing in template), None)


def tags_answers(tokenizer: Tokenizer | None) -> bool:
    """Tell whether the model's chat template asks for tags around the answer behind thoughts."""
    return may_think(tokenizer) and tokenizer is not None and _RESPONSE in (tokenizer.chat_template or "")


def begins_thought(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> bool:
    """Tell whether a prompt ends with the beginning of the model's thoughts."""
    return _ends_with(tags_of(tokenizer).opening, tokenizer, prompt)


def ends_thought(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> bool:
    """Tell whether a prompt ends with the end of thoughts: the model is not to think (Qwen 3's `enable_thinking`)."""
    return _ends_with(tags_of(tokenizer).closing, tokenizer, prompt)


def ends_at_thought(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> bool:
    """Tell the same, and that the prompt ends right there (GLM 4.5's): white space behind thoughts is the model's to write."""
    return _ends_with(tags_of(tokenizer).closing, tokenizer, prompt, has_space=False)


def _ends_with(tag: str, tokenizer: Tokenizer | None, prompt: Sequence[int], *, has_space: bool = True) -> bool:
    if tokenizer is None:
        return False
    shown = {token_id: text.encode() for token_id, text in shown_tokens(tokenizer).items()}
    end = b"".join(shown.get(i) or tokenizer.token_bytes(i) for i in prompt[-2 * len(tag) :])
    return (end.rstrip() if has_space else end).endswith(tag.encode())


def shown_tokens(tokenizer: Tokenizer | None) -> dict[int, str]:
    """Return the tags that are special tokens, which have no text otherwise, and their texts."""
    special = {} if tokenizer is None else tokenizer.special_tokens
    return {special[tag]: tag for tag in tags_of(tokenizer) if tag in special}


class ThoughtStream:
    """The text of one answer as it comes, in two: thoughts and the rest; which of them a tag begins is known when it ends."""

    def __init__(
        self,
        tags: Tags = THINK,
        *,
        has_begun: bool = False,
        has_ended: bool = False,
        is_apart: bool = True,
        is_tagged: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            tags: of the thoughts.
            has_begun: the prompt has begun the thoughts.
            has_ended: it ends where it has ended them.
            is_apart: thoughts come without tags, and both without the white space between them; otherwise as written.
            is_tagged: behind thoughts the rest may have tags, too, which it then comes without.
        """
        self._tags, self._has_begun, self._has_ended, self._is_apart = tags, has_begun, has_ended, is_apart
        self._held = ""
        self._is_decided = False  # whether there are thoughts
        self._is_bare = is_apart  # nothing of the thoughts, or behind them, has been told yet
        self._is_tagged = is_apart and is_tagged
        self._in_tags: bool | None = False  # whether the rest is between its tags; None: it has yet to begin
        self.is_thinking = has_begun  # so far

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return what is certain of the thoughts, and of the rest."""
        self._held += text
        if not self._is_decided and not self._decide():
            return "", ""
        if not self.is_thinking:
            return "", self._rest()
        end = self._held.find(self._tags.closing)
        if end < 0:
            end = last_place(self._held, [self._tags.closing])
            return self._told(len(self._held[:end].rstrip()) if self._is_apart else end), ""
        self.is_thinking = False
        if not self._is_apart:
            return self._told(end + len(self._tags.closing)), self._told(len(self._held))
        thought = self._told(len(self._held[:end].rstrip()))
        self._held = self._held.lstrip().removeprefix(self._tags.closing)
        self._is_bare = True
        self._in_tags = None if self._is_tagged else False
        return thought, self._rest()

    def finish(self) -> tuple[str, str]:
        """Return the rest of both."""
        if not self._is_decided:
            self._is_bare &= self._has_begun or self._has_ended
        if self.is_thinking:
            return self._told(len(self._held.rstrip()) if self._is_apart else len(self._held)), ""
        return "", self._told(len(self._held))

    def _rest(self) -> str:
        if self._in_tags is None:
            start = self._held.lstrip()
            if start.startswith(_RESPONSE):
                self._held, self._in_tags = start.removeprefix(_RESPONSE), True
            elif _RESPONSE.startswith(start):
                return ""
            else:
                self._in_tags = False
        if not self._in_tags:
            return self._told(len(self._held))
        end = self._held.find(_RESPONSE_END)
        if end < 0:
            # White space before the end may belong to the tag.
            return self._told(len(self._held[: last_place(self._held, [_RESPONSE_END])].rstrip()))
        piece = self._told(len(self._held[:end].rstrip()))
        self._held, self._in_tags = self._held.lstrip().removeprefix(_RESPONSE_END), False
        return piece + self._told(len(self._held))

    def _decide(self) -> bool:
        start = self._held.lstrip()
        if start.startswith(self._tags.opening):
            self._has_begun = True  # a second time, as some models do
            if self._is_apart:
                self._held = start.removeprefix(self._tags.opening)
        elif self._tags.opening.startswith(start):
            return False
        self._is_decided, self.is_thinking = True, self._has_begun
        self._is_bare &= self._has_begun or self._has_ended
        return True

    def _told(self, end: int) -> str:
        piece, self._held = self._held[:end], self._held[end:]
        if self._is_bare:
            piece = piece.lstrip()
            self._is_bare = not piece
        return piece


class ThoughtConstraint:
    """A grammar that holds from the end of the thoughts on (`llmrun.constraint.Constraint`).

    Thoughts are free but for the tokens that end an answer. The grammar's text begins with the token after the one that
    completes </think>. A model that has not begun to think may begin, if <think> is one token of its own, unless the
    prompt has ended the thoughts or the grammar itself allows that.
    """

    def __init__(
        self,
        grammar: Constraint,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        *,
        has_begun: bool = False,
        has_ended: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            grammar: of the answer; with bits of 32 as its mask.
            tokenizer: whose ids come.
            end_ids: the tokens that end an answer.
            has_begun: the prompt has begun the thoughts.
            has_ended: it has ended them, too.
        """
        import numpy as np  # not above: the command line reads REASONING_FORMATS before anything may import numpy

        self._grammar, self._tokenizer, self._is_thinking = grammar, tokenizer, has_begun
        self._opening = None if has_begun or has_ended else _opening_id(tokenizer)
        self._shown, self._closing = shown_tokens(tokenizer), tags_of(tokenizer).closing.encode()
        self._end = b""  # of the thoughts, as far as they may be the beginning of </think>
        allowed = np.zeros(-(-tokenizer.vocab_size // 32) * 32, np.uint8)
        allowed[: tokenizer.vocab_size] = 1
        allowed[[i for i in end_ids if i < len(allowed)]] = 0
        self._free = np.packbits(allowed, bitorder="little").view("<i4")

    def mask(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Return the tokens that may follow, as bits."""
        if self._is_thinking:
            return self._free
        bits = self._grammar.mask(tokens)
        if self._opening is not None:
            word, bit = divmod(self._opening, 32)
            if int(bits[word]) >> bit & 1:
                self._opening = None  # it is the grammar's own
            else:
                bits = bits.copy()
                bits.view("u4")[word] |= 1 << bit
        return bits

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled."""
        if self._is_thinking:
            text = self._shown.get(token_id, "").encode() or self._tokenizer.token_bytes(token_id)
            self._end += text
            self._is_thinking = self._closing not in self._end
            self._end = self._end[1 - len(self._closing) :]
        elif token_id == self._opening:
            self._is_thinking, self._opening = True, None
        else:
            self._opening = None
            self._grammar.accept(token_id)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        return not self._is_thinking and self._grammar.is_done


def _opening_id(tokenizer: Tokenizer) -> int | None:
    special, opening = tokenizer.special_tokens, tags_of(tokenizer).opening
    if opening in special:
        return special[opening]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(special.values()), None)
    ids = tokenizer.encode_segments([opening] if first is None else [first, opening])
    ids = ids if first is None else ids[1:]
    return ids[0] if len(ids) == 1 else None


def last_place(text: str, tags: Iterable[str]) -> int:
    """Return where the end of a text begins that may be the beginning of a tag: the text's end if there is none."""
    places = (i for tag in tags for i in range(max(0, len(text) - len(tag) + 1), len(text)) if tag.startswith(text[i:]))
    return min(places, default=len(text))
