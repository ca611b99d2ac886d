"""What a model thinks before it answers: told apart in answers, free of the grammar that the answer is held to."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answer_pieces import pieces_of, the_pieces
from hypothesis import given
from hypothesis import strategies as st
from tool_forms import HERMES, TOOLS

from llmrun.constraint import allowed_tokens
from llmrun.server.grammar import Grammars
from llmrun.thoughts import (
    THINK,
    ThoughtConstraint,
    ThoughtStream,
    begins_thought,
    ends_at_thought,
    ends_thought,
    may_think,
    shown_tokens,
    tags_answers,
    tags_of,
)
from llmrun.tokenizer import Tokenizer

CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
MESSAGES = [{"role": "user", "content": "x"}]

# text, whether the prompt has begun the thoughts, thoughts and answer as written, the same told apart
CASES: list[tuple[str, bool, tuple[str, str], tuple[str, str]]] = [
    ("It rains.", False, ("", "It rains."), ("", "It rains.")),
    (" \n It rains.\n", False, ("", " \n It rains.\n"), ("", " \n It rains.\n")),
    ("<think>\nA b.\n</think>\n\nYes. \n", False, ("<think>\nA b.\n</think>", "\n\nYes. \n"), ("A b.", "Yes. \n")),
    ("\n<think>a</think>b", False, ("\n<think>a</think>", "b"), ("a", "b")),
    ("a\n\n b </think> c", True, ("a\n\n b </think>", " c"), ("a\n\n b", "c")),
    ("<think>\na</think>c", True, ("<think>\na</think>", "c"), ("a", "c")),
    ("<think>\n\n</think>\n\nc", False, ("<think>\n\n</think>", "\n\nc"), ("", "c")),
    (
        "<think>a</think>b <think>c</think>d",
        False,
        ("<think>a</think>", "b <think>c</think>d"),
        ("a", "b <think>c</think>d"),
    ),
    ("<think>a < b </thin k>\n", False, ("<think>a < b </thin k>\n", ""), ("a < b </thin k>", "")),
    ("never ends </thi", True, ("never ends </thi", ""), ("never ends </thi", "")),
    ("<thi", False, ("", "<thi"), ("", "<thi")),
    ("<thi", True, ("<thi", ""), ("<thi", "")),
    ("<thinking", False, ("", "<thinking"), ("", "<thinking")),
    ("", True, ("", ""), ("", "")),
    (" ", False, ("", " "), ("", " ")),
]


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(st.sampled_from(CASES), st.booleans(), st.lists(st.integers(0, 40), max_size=12))
def test_thoughts_are_told_apart(
    case: tuple[str, bool, tuple[str, str], tuple[str, str]], is_apart: bool, cuts: list[int]
) -> None:
    text, has_begun, written, apart = case
    stream = ThoughtStream(has_begun=has_begun, is_apart=is_apart)
    pieces = [*map(stream.push, in_pieces(text, cuts)), stream.finish()]
    assert tuple(map("".join, zip(*pieces, strict=True))) == (apart if is_apart else written)
    order = [index for piece in pieces for index in (0, 1) if piece[index]]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("text", "apart"),
    [("\nYes. \n", ("", "Yes. \n")), ("\n", ("", "")), ("Yes", ("", "Yes")), ("\n<think>a</think>\nb", ("a", "b"))],
)
def test_white_space_behind_thoughts_that_the_prompt_has_ended_is_none_of_the_answer(
    text: str, apart: tuple[str, str]
) -> None:
    """So GLM 4.5 begins where it is not to think."""
    for is_apart in (True, False):
        stream = ThoughtStream(has_ended=True, is_apart=is_apart)
        told = zip(*map(stream.push, text), stream.finish(), strict=True)
        assert tuple(map("".join, told)) == apart if is_apart else "".join(map("".join, told)) == text


@pytest.mark.parametrize(("text", "shown"), [("<think>\n ab</think>\ncd", "ab|cd"), ("abcd", "|abcd"), (" <thin", "|")])
def test_they_come_as_they_are_written(text: str, shown: str) -> None:
    stream = ThoughtStream()
    pieces = [stream.push(character) for character in text]
    # Nothing is left for the end but what may be a tag.
    assert "|".join(map("".join, zip(*pieces, strict=True))) == shown


@given(st.text(alphabet="<think>/ \nab", max_size=60), st.booleans(), st.lists(st.integers(0, 60), max_size=12))
def test_no_text_is_lost(text: str, has_begun: bool, cuts: list[int]) -> None:
    stream = ThoughtStream(has_begun=has_begun, is_apart=False)
    pieces = [*map(stream.push, in_pieces(text, cuts)), stream.finish()]
    assert "".join(thought for thought, _ in pieces) + "".join(rest for _, rest in pieces) == text


TAGGED = [
    ("<think>a</think>\n\n<response>\nb < c\n</response>\n", "b < c"),
    ("<think>a</think><response>b</response>", "b"),
    ("<think>a</think><response>b </respons", "b </respons"),
    ("<think>a</think><response></response>c", "c"),
    ("<think>a</think><resp", "<resp"),
    ("<think>a</think>b <response>c</response>", "b <response>c</response>"),
    ("<response>b</response>", "<response>b</response>"),
]


@given(st.sampled_from(TAGGED), st.lists(st.integers(0, 50), max_size=12))
def test_an_answer_behind_thoughts_may_have_tags_of_its_own(case: tuple[str, str], cuts: list[int]) -> None:
    text, answer = case
    stream = ThoughtStream(is_tagged=True)
    pieces = [*map(stream.push, in_pieces(text, cuts)), stream.finish()]
    assert "".join(rest for _, rest in pieces).strip() == answer
    assert "".join(thought for thought, _ in pieces) == ("a" if "think" in text else "")


def test_answers_come_without_tags_as_they_are_written() -> None:
    stream = ThoughtStream(is_tagged=True)
    text = "<think>a</think><response>bc d</response>"
    assert [piece for piece in (stream.push(character)[1] for character in text) if piece] == ["b", "c", " d"]


def test_tags_are_those_that_the_template_asks_for(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tags_answers(None)
    for template, expected in (
        ("between <think></think> and your response between <response></response>", True),
        ("{{ content.split('</think>')[-1] }}", False),
        ("<response>", False),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        assert tags_answers(tokenizer) is expected


def test_what_the_template_and_the_prompt_say(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("assistant:\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)):
        assert begins_thought(tokenizer, tokenizer.encode(text)) is expected
    for text, expected in (("a\n<think>\n\n</think>\n\n", True), ("</think>x", False), ("<think>", False), ("", False)):
        assert ends_thought(tokenizer, tokenizer.encode(text)) is expected
        assert not ends_at_thought(tokenizer, tokenizer.encode(text))
    assert ends_at_thought(tokenizer, tokenizer.encode("a\n<think></think>"))
    assert not may_think(None)
    assert not may_think(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ content.split('</think>')[-1] }}")
    assert may_think(tokenizer)
    monkeypatch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, "<think>": 5, "</think>": 6})
    assert shown_tokens(tokenizer) == {5: "<think>", 6: "</think>"}
    assert begins_thought(tokenizer, [1, 5, *tokenizer.encode("\n")])
    assert not begins_thought(tokenizer, [5, 6])


@pytest.mark.parametrize("tags", [("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")])
def test_tags_of_other_families(
    tags: tuple[str, str], grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, closing = tags
    assert tags_of(tokenizer) == tags_of(None) == THINK
    monkeypatch.setattr(tokenizer, "chat_template", f"{{{{ '{opening}' + thought + '{closing}' }}}}")
    monkeypatch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, opening: 4, closing: 63})
    assert may_think(tokenizer)
    assert shown_tokens(tokenizer) == {4: opening, 63: closing}
    assert begins_thought(tokenizer, [1, 4])
    assert ends_thought(tokenizer, [1, 4, 63])
    stream, thought = ThoughtStream(tags_of(tokenizer)), f"a <think>{closing[:-2]} b"
    pieces = [stream.push(character) for character in f"{opening}{thought}{closing}c"] + [stream.finish()]
    assert tuple(map("".join, zip(*pieces, strict=True))) == (thought, "c")
    constraint = ThoughtConstraint(grammars.constraint("regex", "yes|no"), tokenizer, tokenizer.eos_token_ids)
    assert taken(constraint, tokenizer, [4, *tokenizer.encode("Oh", add_bos=False), 63]) == []
    mask = allowed_tokens(constraint.mask([]), tokenizer.vocab_size)
    assert {tokenizer.token_bytes(int(i))[:1] for i in np.flatnonzero(mask)} <= {b"y", b"n"}


def test_an_answer_has_its_thoughts_beside_it() -> None:
    answer = the_pieces({"messages": MESSAGES}, tells_thoughts=True)
    pieces = pieces_of(answer, "<think>\nOh\n</think>\n\nYes")
    assert "".join(piece.thought for piece in pieces) == "Oh"
    assert "".join(piece.text for piece in pieces) == "Yes"
    assert pieces[-1].reason == "stop"
    assert answer.num_thought == 13  # from ">", when it is decided
    answer = the_pieces({"messages": MESSAGES})  # a model of which nothing is known
    assert "".join(piece.text for piece in pieces_of(answer, "<think>a</think> b")) == "<think>a</think> b"
    assert answer.num_thought is None


@pytest.mark.parametrize(("tells", "begins"), [(True, False), (True, True), (False, False), (False, True)])
def test_calls_in_thoughts_are_none(tells: bool, begins: bool) -> None:
    thought = f"A <tool_call>{CALL}</tool_call>, or not."
    written = ("" if begins else "<think>") + f"{thought}</think>\n\n<tool_call>\n{CALL}\n</tool_call>"
    body = {"messages": MESSAGES, "tools": TOOLS}
    pieces = pieces_of(the_pieces(body, HERMES, tells_thoughts=tells, is_thinking=begins), written)
    assert [call["function"]["name"] for call in pieces[-1].calls] == ["weather"]
    assert pieces[-1].reason == "tool_calls"
    told = "".join(piece.thought for piece in pieces), "".join(piece.text for piece in pieces).rstrip()
    assert told == ((thought, "") if tells else ("", ("" if begins else "<think>") + thought + "</think>"))
    cut = pieces_of(
        the_pieces(body, HERMES, tells_thoughts=tells, is_thinking=begins), written.partition("</think>")[0]
    )
    assert (cut[-1].calls, cut[-1].reason) == ([], "stop")


def taken(constraint: ThoughtConstraint, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Let a constraint take tokens; return those that it would have refused."""
    refused = []
    for token_id in ids:
        if not allowed_tokens(constraint.mask([]), tokenizer.vocab_size)[token_id]:
            refused.append(token_id)
        constraint.accept(token_id)
    return refused


def test_a_grammar_holds_from_the_end_of_the_thoughts_on(grammars: Grammars, tokenizer: Tokenizer) -> None:
    end_ids = sorted(tokenizer.eos_token_ids)
    constraint = ThoughtConstraint(grammars.constraint("regex", "yes|no"), tokenizer, end_ids, has_begun=True)
    mask = allowed_tokens(constraint.mask([]), tokenizer.vocab_size + 40)
    assert set(np.flatnonzero(~mask)) == {*end_ids, *range(tokenizer.vocab_size, len(mask))}
    thought = tokenizer.encode("A </thin or < or <</think", add_bos=False)
    assert taken(constraint, tokenizer, thought) == []
    assert not constraint.is_done
    closing = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b">")
    assert taken(constraint, tokenizer, [closing]) == []
    written = b""
    while not constraint.is_done:
        token_id = int(np.flatnonzero(allowed_tokens(constraint.mask([]), tokenizer.vocab_size))[0])
        assert taken(constraint, tokenizer, [token_id]) == []
        written += tokenizer.token_bytes(token_id)
    assert written in (b"yes", b"no")


def test_a_model_may_begin_to_think(grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def constraint(source: str = "yes|no") -> ThoughtConstraint:
        return ThoughtConstraint(grammars.constraint("regex", source), tokenizer, tokenizer.eos_token_ids)

    without = allowed_tokens(constraint().mask([]), tokenizer.vocab_size).copy()  # <think> is several tokens here
    monkeypatch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, "<think>": 4, "</think>": 63})
    begun = constraint()
    mask = allowed_tokens(begun.mask([]), tokenizer.vocab_size)
    assert set(np.flatnonzero(mask != without)) == {4}
    assert taken(begun, tokenizer, [4, *tokenizer.encode("Oh", add_bos=False), 63]) == []
    assert (allowed_tokens(begun.mask([]), tokenizer.vocab_size) == without).all()  # and not a second time
    ended = ThoughtConstraint(
        grammars.constraint("regex", "yes|no"), tokenizer, tokenizer.eos_token_ids, has_ended=True
    )
    assert (allowed_tokens(ended.mask([]), tokenizer.vocab_size) == without).all()
    at_once = constraint()
    first = int(np.flatnonzero(without)[0])
    assert taken(at_once, tokenizer, [first]) == []
    assert not allowed_tokens(at_once.mask([]), tokenizer.vocab_size)[4]


def test_a_grammar_that_has_the_tag_keeps_it(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, "<think>": 4, "</think>": 63})
    seen: list[int] = []
    bits = np.full(-(-tokenizer.vocab_size // 32), -1, np.int32)
    own: Any = SimpleNamespace(mask=lambda _tokens: bits, accept=seen.append, is_done=False)
    constraint = ThoughtConstraint(own, tokenizer, tokenizer.eos_token_ids)
    assert taken(constraint, tokenizer, [4, 7, 63]) == []
    assert seen == [4, 7, 63]
    assert json.dumps(bits.tolist()) == json.dumps([-1] * len(bits))
