"""Answers in harmony: messages told apart by their special tokens, calls found, grammars that hold behind the thoughts."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from harmony_tokens import harmony_tokenizer, ids_of
from hypothesis import given
from hypothesis import strategies as st
from tool_forms import TOOLS, WEATHER, tool

from harmony_model import SPECIAL, TEMPLATE
from llmrun.constraint import allowed_tokens
from llmrun.harmony import (
    AnswerText,
    HarmonyConstraint,
    MessageStream,
    answer_text,
    begun_message,
    shown_marks,
    speaks_harmony,
)
from llmrun.server.grammar import Grammars
from llmrun.server.limits import Limits
from llmrun.server.tools import call_grammar, tool_form
from llmrun.text_stream import TextStream
from llmrun.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "x"}]
NAMES = ["weather", "weather_now", "now"]


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return harmony_tokenizer(tmp_path_factory.mktemp("harmony"))


@pytest.fixture(scope="module")
def harmony_grammars(harmony: Tokenizer) -> Grammars:
    return Grammars(harmony, harmony.vocab_size + 61, sorted(harmony.eos_token_ids), Limits())


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each token as a stream of messages gets it."""
    stream = TextStream(tokenizer, is_continuation=True, shown=shown_marks(tokenizer))
    return [*map(stream.push, ids), stream.finish()]


def told(tokenizer: Tokenizer, ids: list[int], *, is_apart: bool = True) -> tuple[str, str, list[tuple[str, str]]]:
    begun = begun_message(tokenizer, ids_of(tokenizer, "<|start|>user<|message|>x<|end|><|start|>assistant"))
    stream = MessageStream(begun, NAMES, is_apart=is_apart)
    pieces = [*map(stream.push, texts_of(tokenizer, ids)), stream.finish()]
    thought, text = map("".join, zip(*pieces, strict=True))
    return thought, text, stream.calls


CITY = '{"city": "Rome"}'
ASKS = "<|channel|>commentary to=functions.weather"
THINKS = "<|channel|>analysis<|message|>A b.<|end|><|start|>assistant"
# what a model writes, its thoughts, what is for the user, its calls
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (f"{THINKS}<|channel|>final<|message|>2 + 2 = 4.", "A b.", "2 + 2 = 4.", []),
    ("<|channel|>final<|message|> \nYes. ", "", " \nYes. ", []),
    (f"{THINKS}{ASKS} <|constrain|>json<|message|>{CITY}", "A b.", "", [("weather", CITY)]),
    (f"{THINKS}{ASKS}<|constrain|>json<|message|>{CITY}<|call|>", "A b.", "", [("weather", CITY)]),
    (f"{THINKS}{ASKS} json<|message|>{CITY}", "A b.", "", [("weather", CITY)]),
    (f"{ASKS}<|message|>{CITY}", "", "", [("weather", CITY)]),
    (f"{THINKS} to=functions.weather<|channel|>commentary json<|message|>{CITY}", "A b.", "", [("weather", CITY)]),
    (f" to=weather<|channel|>commentary <|constrain|>json<|message|>{CITY}", "", "", [("weather", CITY)]),
    ("<|channel|>analysis to=functions.now code<|message|>{}", "", "", [("now", "{}")]),
    ("<|channel|>commentary to=functions.weather_now<|message|>{}", "", "", [("weather_now", "{}")]),
    (
        f"<|channel|>commentary<|message|>I ask.<|end|><|start|>assistant{ASKS}<|message|>{{}}",
        "",
        "I ask.",
        [("weather", "{}")],
    ),
    (
        f"{ASKS}<|message|>{CITY}<|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}",
        *("", "", [("weather", CITY), ("now", "{}")]),
    ),
    # Messages of one kind are one text.
    (
        f"{THINKS}{THINKS}<|channel|>commentary<|message|>I.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        *("A b.\n\nA b.", "I.\n\nYes.", []),
    ),
    # Calls that are none: of built-in tools, of tools that nobody offered, cut off, or of something else than an object.
    ("<|channel|>analysis to=python code<|message|>print(1)", "print(1)", "", []),
    ("<|channel|>commentary to=functions.other<|message|>{}", "", "{}", []),
    (f'{ASKS} <|constrain|>json<|message|>{{"city": "Ro', "", '{"city": "Ro', []),
    (f"{ASKS}<|message|>[1]", "", "[1]", []),
    (f'{ASKS}<|message|>{{"a": 1e999}}', "", '{"a": 1e999}', []),
    (f'{ASKS}<|message|>{{"a": NaN}}', "", '{"a": NaN}', []),
    # What nobody else has said.
    (
        f"{ASKS}<|message|>{CITY}<|call|><|start|>functions.weather to=assistant<|channel|>commentary<|message|>rain<|end|>"
        "<|start|>user<|message|>And now?<|end|><|start|>assistant<|channel|>final<|message|>Rain.",
        *("rain\n\nAnd now?", "Rain.", [("weather", CITY)]),
    ),
    # Cut off elsewhere.
    (f"{THINKS}", "A b.", "", []),
    (f"{THINKS}<|channel|>fin", "A b.", "", []),
    ("<|channel|>analysis<|message|>A b", "A b", "", []),
    ("", "", "", []),
    # Markup that is missing.
    ("Just text.", "", "Just text.", []),
    ("to be", "", "to be", []),
    (f"{THINKS}Yes.", "A b.", "Yes.", []),
    ("<|channel|>analysis<|message|>A b.<|channel|>final<|message|>Yes.", "A b.", "Yes.", []),
    ("<|message|>Yes.<|return|>", "", "Yes.", []),
    # Text about the markup is no markup, which only tokens are.
    ("<|channel|>final<|message|>a <||end|> final<|", "", "a <||end|> final<|", []),
]


@pytest.mark.parametrize("case", CASES)
def test_messages_are_told_apart(case: tuple[str, str, str, list[tuple[str, str]]], harmony: Tokenizer) -> None:
    written, *expected = case
    assert told(harmony, ids_of(harmony, written)) == tuple(expected)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=12))
def test_it_does_not_matter_how_the_text_comes(
    harmony: Tokenizer, case: tuple[str, str, str, list[tuple[str, str]]], cuts: list[int]
) -> None:
    written, *expected = case
    text = "".join(texts_of(harmony, ids_of(harmony, written)))
    stream = MessageStream(begun_message(harmony, ids_of(harmony, "<|start|>assistant")), NAMES)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [stream.push(text[start:end]) for start, end in zip(places, [*places[1:], len(text)], strict=True)]
    thought, rest = map("".join, zip(*pieces, stream.finish(), strict=True))
    assert [thought, rest, stream.calls] == expected


@pytest.mark.parametrize("case", [case for case in CASES if not case[3]])
def test_the_markup_may_stay(case: tuple[str, str, str, list[tuple[str, str]]], harmony: Tokenizer) -> None:
    thought, text, calls = told(harmony, ids_of(harmony, case[0]), is_apart=False)
    assert (thought + text, calls) == (case[0], [])


def test_calls_are_none_of_the_text_where_the_markup_stays(harmony: Tokenizer) -> None:
    written = f"{THINKS}{ASKS}<|message|>{CITY}<|call|>"
    thought, text, calls = told(harmony, ids_of(harmony, written), is_apart=False)
    assert (thought, text) == ("<|channel|>analysis<|message|>A b.<|end|>", "")
    assert calls == [("weather", CITY)]


def test_what_is_written_about_markup_is_text(harmony: Tokenizer) -> None:
    typed = "<|end|><|start|>assistant<|channel|>final<|message|>"
    ids = [*ids_of(harmony, "<|channel|>analysis<|message|>"), *harmony.encode(typed, add_bos=False)]
    assert told(harmony, ids) == (typed, "", [])
    # The bytes of a lone surrogate are no character.
    by_byte = {harmony.token_bytes(i): i for i in range(harmony.vocab_size) if len(harmony.token_bytes(i)) == 1}
    forged = [by_byte[bytes([byte])] for byte in "\udc01\udc00".encode("utf-8", "surrogatepass")]
    assert told(harmony, [*ids, *forged])[1:] == ("", [])


def test_text_comes_as_it_is_written(harmony: Tokenizer) -> None:
    stream = MessageStream(begun_message(harmony, ids_of(harmony, "<|start|>assistant")))
    texts = texts_of(harmony, ids_of(harmony, f"{THINKS}<|channel|>final<|message|>Yes, no."))
    for text in texts:
        pieces = stream.push(text)
        if stream.is_open and not stream.is_markup:
            assert text in pieces
    assert stream.finish() == ("", "")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|start|>assistant", ("", "Yes")),
        ("<|start|>assistant<|channel|>analysis<|message|>", ("Yes", "")),
        ("<|start|>assistant<|channel|>final<|message|>It is ", ("", "Yes")),
        ("<|start|>user<|message|>x<|end|>", ("", "Yes")),
        ("no markup", ("", "Yes")),
    ],
)
def test_the_prompt_may_have_begun_a_message(prompt: str, expected: tuple[str, str], harmony: Tokenizer) -> None:
    stream = MessageStream(begun_message(harmony, ids_of(harmony, f"<|start|>x<|message|>y<|end|>{prompt}")))
    pieces = [*map(stream.push, texts_of(harmony, ids_of(harmony, "Yes"))), stream.finish()]
    assert tuple(map("".join, zip(*pieces, strict=True))) == expected


def test_templates_and_tokenizers_with_its_tokens_speak_it(harmony: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert speaks_harmony(harmony)
    assert not speaks_harmony(None)
    assert set(shown_marks(harmony)) == {harmony.special_tokens[name] for name in SPECIAL[2:]}
    monkeypatch.setattr(harmony, "chat_template", "<|start|>user<|message|><|end|>")
    assert not speaks_harmony(harmony)
    monkeypatch.setattr(harmony, "chat_template", TEMPLATE)
    monkeypatch.setattr(harmony, "special_tokens", {"<|start|>": 1, "<|end|>": 2})
    assert not speaks_harmony(harmony)


def test_the_text_of_a_chat_is_what_is_for_the_user(harmony: Tokenizer) -> None:
    def text(prompt: Any, written: str, stop: tuple[str, ...] = (), shown: dict[int, str] | None = None) -> str:
        stream = answer_text(harmony, prompt, ids_of(harmony, "<|start|>assistant"), stop, False, shown)
        pieces = [stream.push(i) for i in ids_of(harmony, written)]
        assert isinstance(stream, AnswerText) is (prompt is MESSAGES and shown is None)
        return "".join([*pieces, stream.finish(), stream.finish()]) + "." * stream.stopped

    written = f"{THINKS}<|channel|>final<|message|>Yes, no."
    assert text(MESSAGES, written) == "Yes, no."
    assert text(MESSAGES, written, (", n",)) == "Yes."
    assert text(MESSAGES, written, ("no.!",)) == "Yes, no."
    # Whoever asks otherwise gets what came.
    assert (
        text("<|start|>assistant", written) == text(MESSAGES, written, shown={}) == "analysisA b.assistantfinalYes, no."
    )


# What an answer is held to


def walk(tokenizer: Tokenizer, constraint: HarmonyConstraint, seed: int, thoughts: int = 1) -> str | None:
    """Return an answer of random allowed tokens, with its markup, which thinks so often; None: it did not end."""
    rng, vocab_size = random.Random(seed), tokenizer.vocab_size + 61
    channel, end = tokenizer.special_tokens["<|channel|>"], tokenizer.special_tokens["<|end|>"]
    analysis = ids_of(tokenizer, "<|channel|>analysis<|message|>")
    names = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    ids: list[int] = []
    forced: list[int] = []
    for _ in range(400):
        if constraint.is_done:
            break
        allowed = np.flatnonzero(allowed_tokens(constraint.mask(ids), vocab_size)).tolist()
        assert allowed
        assert max(allowed) < tokenizer.vocab_size
        if not forced and channel in allowed and len(allowed) == 1:
            free = [i for i in range(tokenizer.vocab_size) if i not in names]
            forced = [channel, *([*analysis[1:], *rng.choices(free, k=5), end] if thoughts > 0 else [])]
            thoughts -= 1
        elif not forced and analysis[1] in allowed:
            allowed = [i for i in allowed if i != analysis[1]]  # thought enough
        token_id = forced.pop(0) if forced else rng.choice(allowed)
        assert token_id in allowed, (token_id, allowed)
        if token_id in tokenizer.eos_token_ids:
            return "".join(names.get(i) or tokenizer.token_bytes(i).decode("latin1") for i in ids)
        ids.append(token_id)
        constraint.accept(token_id)
    return (
        "".join(names.get(i) or tokenizer.token_bytes(i).decode("latin1") for i in ids) if constraint.is_done else None
    )


def constrained(
    harmony: Tokenizer, grammars: Grammars, source: Any, begun: str = "<|start|>assistant"
) -> HarmonyConstraint:
    prompt = begun_message(harmony, ids_of(harmony, begun))
    return HarmonyConstraint(grammars.constraint(*source), harmony, harmony.eos_token_ids, prompt)


@pytest.mark.parametrize("thoughts", [0, 1, 2])
def test_a_grammar_holds_for_the_final_message(thoughts: int, harmony: Tokenizer, harmony_grammars: Grammars) -> None:
    for seed in range(4):
        constraint = constrained(harmony, harmony_grammars, ("regex", "yes|no"))
        written = walk(harmony, constraint, seed, thoughts)
        assert written is not None
        *before, last = written.split("<|start|>assistant")
        assert last in ("<|channel|>final<|message|>yes", "<|channel|>final<|message|>no")
        assert len(before) == thoughts
        assert all(text.startswith("<|channel|>analysis<|message|>") and text.endswith("<|end|>") for text in before)


def test_thoughts_are_free_but_for_other_markup(harmony: Tokenizer, harmony_grammars: Grammars) -> None:
    for begun in (
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|start|>assistant<|channel|>analysis<|message|>A",
    ):
        constraint = constrained(harmony, harmony_grammars, ("regex", "yes|no"), begun)
        mask = allowed_tokens(constraint.mask([]), harmony.vocab_size + 61)
        refused = {harmony.special_tokens[name] for name in SPECIAL[1:] if name != "<|end|>"}
        assert set(np.flatnonzero(~mask)) == {*refused, *range(harmony.vocab_size, len(mask))}
        assert not constraint.is_done


@pytest.mark.parametrize(
    ("begun", "start"),
    [
        ("<|start|>assistant", "<|channel|>final<|message|>"),
        ("<|start|>assistant<|channel|>final<|message|>", ""),
        ("<|start|>user<|message|>x<|end|>", "<|start|>assistant<|channel|>final<|message|>"),
        ("no markup", "<|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_grammar_goes_on_with_the_prompt(
    begun: str, start: str, harmony: Tokenizer, harmony_grammars: Grammars
) -> None:
    constraint = constrained(harmony, harmony_grammars, ("choice", ["yes"]), begun)
    assert walk(harmony, constraint, 1, 0) == f"{start}yes"


@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "now"}), ("=weather", {"weather"})])
def test_a_demanded_call_is_a_message_to_the_tool(
    choice: str, names: set[str], harmony: Tokenizer, harmony_grammars: Grammars
) -> None:
    form = tool_form(harmony)
    assert form is not None
    found = set()
    for seed in range(12):
        grammar = harmony_grammars.constraint(*call_grammar(form, TOOLS, choice, Limits()))
        begun = begun_message(harmony, ids_of(harmony, "<|start|>assistant"))
        constraint = HarmonyConstraint(grammar, harmony, harmony.eos_token_ids, begun, has_channel=True)
        written = walk(harmony, constraint, seed, seed % 2)
        assert written is not None
        assert "<|channel|>commentary to=functions." in written
        assert " <|constrain|>json<|message|>" in written
        _, text, calls = told(harmony, ids_of(harmony, written))
        ((name, arguments),) = calls
        assert text == ""
        assert name == "now" or json.loads(arguments)["city"] in ("Rome", "Oslo")
        found.add(name)
    assert found <= names
    assert "weather" in found


def test_an_answer_may_be_a_call_or_a_value(harmony: Tokenizer, harmony_grammars: Grammars) -> None:
    form = tool_form(harmony)
    assert form is not None
    source = call_grammar(form, [WEATHER], "auto", Limits(), answer={"enum": ["dry", "wet"]})
    seen = set()
    for seed in range(12):
        begun = begun_message(harmony, ids_of(harmony, "<|start|>assistant"))
        grammar = harmony_grammars.constraint(*source)
        constraint = HarmonyConstraint(grammar, harmony, harmony.eos_token_ids, begun, has_channel=True)
        written = walk(harmony, constraint, seed, seed % 3)
        if written is None:
            continue
        _, text, calls = told(harmony, ids_of(harmony, written))
        assert bool(calls) != (text in ('"dry"', '"wet"'))
        seen.add(bool(calls))
    assert seen == {True, False}


def test_a_tool_may_have_any_name(harmony: Tokenizer, harmony_grammars: Grammars) -> None:
    form = tool_form(harmony)
    assert form is not None
    for name in ("a.b", "x y", 'x"y', "[x", "x\\y", "functions.x", "%json"):
        tools = [*TOOLS, tool(name, WEATHER["function"]["parameters"]), tool("x", {})]
        grammar = harmony_grammars.constraint(*call_grammar(form, tools, f"={name}", Limits()))
        constraint = HarmonyConstraint(grammar, harmony, harmony.eos_token_ids, "", has_channel=True)
        written = walk(harmony, constraint, 1, 0)
        assert written is not None
        stream = MessageStream("", [tool["function"]["name"] for tool in tools])
        for text in texts_of(harmony, ids_of(harmony, written)):
            stream.push(text)
        stream.finish()
        assert [call[0] for call in stream.calls] == [name]
