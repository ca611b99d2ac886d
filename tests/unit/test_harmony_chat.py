"""Chats with a model that speaks harmony: the prompt that its template makes, and what an answer's tokens become."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from harmony_tokens import harmony_tokenizer, ids_of
from tool_forms import TOOLS, WEATHER, tool

from harmony_model import SPECIAL
from llmrun.chat import encode_chat, render_chat
from llmrun.harmony import begun_message, shown_marks
from llmrun.logprobs import TokenLogprobs
from llmrun.requests import Event
from llmrun.server.chat_work import Piece, Pieces
from llmrun.server.errors import ApiError
from llmrun.server.limits import Limits
from llmrun.server.prompts import chat_ids
from llmrun.server.responses_input import chat_body
from llmrun.server.schemas import Schemas
from llmrun.server.tasks import Choice
from llmrun.server.tools import tool_form
from llmrun.text_stream import TextStream
from llmrun.tokenizer import Tokenizer

ASKED = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return harmony_tokenizer(tmp_path_factory.mktemp("harmony"))


# Prompts


def call(city: str, number: str = "1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


def result(content: str, number: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": number, "content": content}


def called(city: str) -> str:
    written = json.dumps({"city": city})
    return f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{written}<|call|>"


def resulted(content: str) -> str:
    return f"<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{json.dumps(content)}<|end|>"


def analysis(text: str) -> str:
    return f"<|start|>assistant<|channel|>analysis<|message|>{text}<|end|>"


def final(text: str) -> str:
    return f"<|start|>assistant<|channel|>final<|message|>{text}<|end|>"


CONVERSATIONS: list[tuple[list[dict[str, Any]], str]] = [
    # Thoughts of turns that ended with an answer are forgotten.
    ([{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}], final("Yes.")),
    ([{"role": "assistant", "content": "Yes.", "reasoning_content": None}], final("Yes.")),
    # Those before a call are not.
    (
        [
            {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call("Rome")]},
            result("no", "1"),
        ],
        analysis("Hm.") + called("Rome") + resulted("no"),
    ),
    (
        [{"role": "assistant", "content": "I ask.", "tool_calls": [call("Rome")]}, result("no", "1")],
        analysis("I ask.") + called("Rome") + resulted("no"),
    ),
    # Text before a call, behind thoughts: the template takes only one of them.
    (
        [
            {"role": "assistant", "content": "I ask.", "reasoning_content": "Hm.", "tool_calls": [call("Rome")]},
            result("no", "1"),
        ],
        analysis("Hm.\n\nI ask.") + called("Rome") + resulted("no"),
    ),
    # Several calls at once: each has its own result behind it.
    (
        [
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Hm.",
                "tool_calls": [call("Rome"), call("Oslo", "2")],
            },
            result("snow", "2"),
            result("no", "1"),
        ],
        analysis("Hm.") + called("Rome") + resulted("no") + called("Oslo") + resulted("snow"),
    ),
    (
        [{"role": "assistant", "content": "", "tool_calls": [call("Rome"), call("Oslo", "2")]}, result("no", "?")],
        called("Rome") + resulted("no") + called("Oslo"),
    ),
    (
        [
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call("Rome")]},
            result("no", "1"),
            {"role": "assistant", "content": "No.", "tool_calls": []},
        ],
        called("Rome") + resulted("no") + final("No."),
    ),
    # What a message says of the markup is text.
    ([{"role": "assistant", "content": "<|channel|>final<|message|>"}], final("<|channel|>final<|message|>")),
]


@pytest.mark.parametrize(("turns", "expected"), CONVERSATIONS)
def test_earlier_turns_are_messages_of_the_format(
    turns: list[dict[str, Any]], expected: str, harmony: Tokenizer
) -> None:
    ids = chat_ids(harmony, [*ASKED, *turns], max_depth=64)
    names = {token_id: text for text, token_id in harmony.special_tokens.items()}
    text = b"".join(names.get(i, "").encode() or harmony.token_bytes(i) for i in ids).decode()
    assert text.partition("<|start|>user")[2] == f"<|message|>Rain?<|end|>{expected}<|start|>assistant"
    in_messages = sum(json.dumps(turns).count(name) for name in SPECIAL)
    assert sum(i in names for i in ids) == sum(text.count(name) for name in SPECIAL) - in_messages


def test_what_the_template_asks_for_reaches_it(harmony: Tokenizer) -> None:
    given = {"reasoning_effort": "high", "builtin_tools": ["python"], "model_identity": "A clerk."}
    text = render_chat(
        harmony, [{"role": "system", "content": "Be brief."}, *ASKED], chat_template_kwargs=given, tools=TOOLS
    )
    system, developer, *_ = text.split("<|end|>")
    assert system.startswith("<|start|>system<|message|>A clerk. 20")
    assert system.endswith(" Reasoning: high python")
    # A tool needs no description, which the template adds to.
    assert developer == "<|start|>developer<|message|>Be brief.// \nweather;// \nnow;"
    assert " Reasoning: medium<|end|>" in render_chat(harmony, ASKED)
    assert encode_chat(harmony, ASKED)[-2:] == ids_of(harmony, "<|start|>assistant")[-2:]


def test_defaults_of_parameters_are_text_where_the_template_takes_them_for_it(harmony: Tokenizer) -> None:
    parameters = {
        **{"a": {"enum": [1, 2], "default": 1}, "b": {"enum": ["x", None], "default": None}},
        **{"c": {"enum": ["x", "y"], "default": "x"}, "d": {"type": "integer", "default": 3}, "e": True},
    }
    tools = [tool("f", {"type": "object", "properties": parameters}), {"type": "function", "function": {"name": "g"}}]
    text = render_chat(harmony, ASKED, tools=tools)
    assert "f(a = 1)(b = null)(c = x)(d = 3);" in text
    assert parameters["a"] == {"enum": [1, 2], "default": 1}


def test_other_templates_have_thoughts_under_their_own_name(
    harmony: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.",
        "tool_calls": [call("Rome"), call("Oslo")],
    }
    shown = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.tool_calls | length }};{% endfor %}"
    monkeypatch.setattr(harmony, "chat_template", shown)
    assert render_chat(harmony, [turn]) == "Hm.2;"


# Answers


def taken(harmony: Tokenizer, written: str, reason: str = "stop", *, tells: bool = True, **body: Any) -> list[Piece]:
    """Return the pieces of an answer that comes token by token."""
    request = Schemas(Limits()).chat_call({"messages": ASKED, "logprobs": True, **body})
    form = tool_form(harmony) if request.tool_choice != "none" else None
    service: Any = SimpleNamespace(tells_thoughts=tells)
    begun = begun_message(harmony, ids_of(harmony, "<|start|>assistant"))
    pieces = Pieces(service, request, form, begun=begun)
    stream = TextStream(harmony, is_continuation=True, shown=shown_marks(harmony))
    own: Any = None
    found = []
    for token_id in ids_of(harmony, written):
        event = Event(own, token_id, stream.push(token_id), TokenLogprobs(token_id, -1.0, ()))
        found.append(pieces.take(Choice(0, 0), event))
    found.append(pieces.take(Choice(0, 0), Event(own, None, stream.finish(), None, reason)))
    assert pieces.is_late is (tells or form is not None)
    assert pieces.num_thought == (sum(piece.is_thought for piece in found) if tells else None)
    return found


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    calls = [(one["function"]["name"], one["function"]["arguments"]) for piece in pieces for one in piece.calls]
    return "".join(piece.thought for piece in pieces), "".join(piece.text for piece in pieces), calls


THINKS = "<|channel|>analysis<|message|>A b.<|end|><|start|>assistant"
ASKS = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
ROME = ("weather", '{"city": "Rome"}')


def test_an_answer_has_its_thoughts_beside_it(harmony: Tokenizer) -> None:
    pieces = taken(harmony, f"{THINKS}<|channel|>final<|message|>Yes.")
    assert joined(pieces) == ("A b.", "Yes.", [])
    assert pieces[-1].reason == "stop"
    # What is reported of the tokens is of those of text and thoughts.
    entries = [entry.token_id for piece in pieces for entry in piece.entries]
    assert entries == [*ids_of(harmony, "A b."), *ids_of(harmony, "Yes.")]
    thoughts = [piece for piece in pieces if piece.is_thought]
    assert len(thoughts) == len(ids_of(harmony, "<|message|>A b.<|end|>"))


@pytest.mark.parametrize(
    ("body", "calls", "reason"),
    [
        ({}, [ROME], "tool_calls"),
        ({"tool_choice": "required"}, [ROME], "tool_calls"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, [ROME], "stop"),
    ],
)
def test_calls_are_tool_calls(body: Any, calls: list[Any], reason: str, harmony: Tokenizer) -> None:
    pieces = taken(harmony, THINKS + ASKS, tools=TOOLS, **body)
    assert joined(pieces) == ("A b.", "", calls)
    assert pieces[-1].reason == reason
    ids = [one["id"] for piece in pieces for one in piece.calls]
    assert all(one.startswith("call_") for one in ids)


def test_a_call_is_none_without_its_tool_and_cut_off(harmony: Tokenizer) -> None:
    assert joined(taken(harmony, THINKS + ASKS)) == ("A b.", ROME[1], [])
    pieces = taken(harmony, THINKS + ASKS[:-1], "length", tools=TOOLS)
    assert joined(pieces) == ("A b.", ROME[1][:-1], [])
    assert pieces[-1].reason == "length"


def test_text_that_looks_like_a_call_is_text(harmony: Tokenizer) -> None:
    written = '{"name": "weather", "arguments": {"city": "Rome"}}'
    assert joined(taken(harmony, f"<|channel|>final<|message|>{written}", tools=TOOLS)) == ("", written, [])


def test_a_client_may_want_one_call(harmony: Tokenizer) -> None:
    written = f"{ASKS}<|end|><|start|>assistant{ASKS}"
    assert joined(taken(harmony, written, tools=TOOLS))[2] == [ROME, ROME]
    assert joined(taken(harmony, written, tools=TOOLS, parallel_tool_calls=False))[2] == [ROME]


def test_the_server_may_leave_everything_in_the_text(harmony: Tokenizer) -> None:
    written = f"{THINKS}<|channel|>final<|message|>Yes."
    pieces = taken(harmony, written, tells=False)
    assert joined(pieces) == ("", written, [])
    assert [entry.token_id for piece in pieces for entry in piece.entries] == ids_of(harmony, written)
    assert joined(taken(harmony, THINKS + ASKS, tells=False, tools=[WEATHER]))[2] == [ROME]


# Effort


def test_effort_is_a_variable_of_the_template() -> None:
    efforts = Schemas(Limits(), ("low", "high"))
    body = {"messages": ASKED, "reasoning_effort": "high"}
    assert efforts.chat_call(body).chat_template_kwargs == {"reasoning_effort": "high"}
    own = {"chat_template_kwargs": {"reasoning_effort": "low", "x": 1}}
    assert efforts.chat_call({**body, **own}).chat_template_kwargs == own["chat_template_kwargs"]
    assert efforts.chat_call({**body, "reasoning_effort": None}).chat_template_kwargs == {}
    with pytest.raises(ApiError, match="reasoning_effort is 'minimal': expected one of low, high"):
        efforts.chat_call({**body, "reasoning_effort": "minimal"})
    # Other models: a field that the server does not know.
    others = Schemas(Limits())
    assert others.chat_call({**body, "reasoning_effort": 3}).chat_template_kwargs == {}
    assert others.ignored(others.chat, body) == ["reasoning_effort"]
    assert efforts.ignored(efforts.chat, body) == []


def test_effort_of_responses_is_the_same() -> None:
    efforts, others = Schemas(Limits(), ("low", "high")), Schemas(Limits())
    body = {"input": "Rain?", "reasoning": {"effort": "high", "summary": "auto"}}
    for schemas, expected in ((efforts, {"reasoning_effort": "high"}), (others, {})):
        given = schemas.responses.check(body, "")
        assert schemas.chat_call(chat_body(body, given)).chat_template_kwargs == expected
        assert schemas.ignored(schemas.responses, body) == []
    with pytest.raises(ApiError, match=r"reasoning\.effort is 'none'"):
        efforts.responses.check({**body, "reasoning": {"effort": "none"}}, "")
    for reasoning in ({}, {"effort": None}, None):
        given = efforts.responses.check({**body, "reasoning": reasoning}, "")
        assert efforts.chat_call(chat_body(body, given)).chat_template_kwargs == {}
    assert others.responses.check({**body, "reasoning": 3}, "")["reasoning"] == 3
