"""`/v1/responses` as OpenAI's own client sees it: whole and streamed; text, schemas, thoughts, calls, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, Field
from serving import Served

from models import demo_with_template
from unit.tool_forms import WEATHER

TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.id }} "
    "{{ c.function.arguments.city }}]{% endfor %}{% if m.tool_call_id %} of {{ m.tool_call_id }}{% endif %}{% endfor %}"
)
TOOL: Any = {"type": "function", "strict": False, **WEATHER["function"]}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
ASKED: list[Any] = [{"role": "user", "content": "Is it raining?"}]


class Person(BaseModel):
    name: Literal["Anna", "Bernd"]
    age: Annotated[int, Field(ge=1, le=99)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Path:
    return packed(demo_with_template(tmp_path_factory.mktemp("responses") / "model", TEMPLATE), 1, "q8")


@pytest.fixture(scope="module")
def served(artifact: Path) -> Iterator[Served]:
    with Served(artifact) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def writes(text: str) -> dict[str, Any]:
    """Have the model write what a trained one would."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}, "max_output_tokens": 200}


def streamed(client: openai.OpenAI, **given: Any) -> tuple[list[Any], Response]:
    """Return the events of a stream, and the object that its last one has; checks what every stream must be."""
    events: list[Any] = list(client.responses.create(stream=True, **given))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress"
    final = events[-1].response
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in final.output]
    assert done == final.output
    for event in events:
        if event.type == "response.content_part.added":  # what it will hold comes by the events behind
            assert (event.part.text, getattr(event.part, "logprobs", None) or []) == ("", [])
    for kind, whole in (("output_text", "text"), ("reasoning_text", "text"), ("function_call_arguments", "arguments")):
        pieces: dict[str, str] = {}
        for event in events:
            if event.type == f"response.{kind}.delta":
                pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
            elif event.type == f"response.{kind}.done":
                assert pieces.get(event.item_id, "") == getattr(event, whole)
    return events, final


def num_tokens(served: Served, text: str) -> int:
    return served.ask("/tokenize", {"prompt": text, "add_special_tokens": False})[1]["count"]


def same(response: Response) -> list[dict[str, Any]]:
    """Return the items without what differs from answer to answer."""
    items: list[dict[str, Any]] = [item.model_dump(exclude_none=True) for item in response.output]
    return [{name: item[name] for name in item if name not in ("id", "call_id")} for item in items]


def test_a_text(client: openai.OpenAI, served: Served) -> None:
    given: Any = {"model": served.model, "input": "Who is the prince?", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**given)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    chat = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": given["input"]}], max_tokens=12, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert chat.usage is not None
    counts = (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens)
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == counts
    assert whole.usage.input_tokens_details.cached_tokens == 0
    events, final = streamed(client, **given)
    assert events[-1].type == "response.incomplete"
    assert same(final) == same(whole)
    assert final.output_text == whole.output_text
    assert sum(event.type == "response.output_text.delta" for event in events) > 3  # as it is written


def test_sampling_is_that_of_a_chat(served: Served) -> None:
    sampling = {
        **{"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3, "stop": ["e"]},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"300": 9}},
    }
    answer = served.ask("/v1/responses", {"input": "Who?", "max_output_tokens": 30, **sampling})[1]
    messages = [{"role": "user", "content": "Who?"}]
    chat = served.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 30, **sampling})[1]
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    del sampling["logit_bias"]
    chat = served.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 30, **sampling})[1]
    assert answer["output"][0]["content"][0]["text"] != chat["choices"][0]["message"]["content"]


def test_a_choice_of_no_tools(client: openai.OpenAI, served: Served) -> None:
    given: Any = {"model": served.model, "input": "Who?", "max_output_tokens": 2, "tool_choice": "auto"}
    for tools in ([], openai.omit):
        answer = client.responses.create(**given, tools=tools)
        assert (answer.status, answer.tool_choice, answer.tools) == ("incomplete", "auto", [])


def test_log_probabilities(client: openai.OpenAI, served: Served) -> None:
    given: Any = {"model": served.model, "input": "Who?", "max_output_tokens": 4, "temperature": 0, "top_logprobs": 2}
    given["include"] = ["message.output_text.logprobs"]
    whole, (events, final) = client.responses.create(**given), streamed(client, **given)
    for response in (whole, final):
        (part,) = response.output[0].content  # type: ignore[union-attr]
        assert len(part.logprobs) == 4  # type: ignore[union-attr]
        assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)  # type: ignore[union-attr]
    told = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert len(told) == 4


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<think>\nA name.\n</think>Vasili <3 us.", ["reasoning", "message"]),
        ("<think>A name.", ["reasoning"]),
        (f"Let me see.<tool_call>{CALL}</tool_call>", ["message", "function_call"]),
        (f"<tool_call>{CALL}</tool_call>", ["function_call"]),
        ("<tool_call>none", ["message"]),
    ],
)
def test_log_probabilities_are_those_of_the_text(
    client: openai.OpenAI, served: Served, text: str, kinds: list[str]
) -> None:
    given: Any = {"model": served.model, "input": ASKED, "tools": [TOOL], **writes(text), "top_logprobs": 1}
    whole, (_, final) = client.responses.create(**given), streamed(client, **given)
    assert same(whole) == same(final)
    assert [item.type for item in whole.output] == kinds
    for item in whole.output:
        if item.type == "message":
            (part,) = item.content
            assert part.type == "output_text"
            assert "".join(entry.token for entry in part.logprobs or ()).strip() == part.text


def test_a_schema(client: openai.OpenAI, served: Served) -> None:
    parsed = client.responses.parse(model=served.model, input="A person.", text_format=Person, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)
    form: Any = {"format": {"type": "json_object"}}
    answer = client.responses.create(model=served.model, input="A person.", text=form, max_output_tokens=300)
    assert answer.status == "incomplete" or isinstance(json.loads(answer.output_text), dict)
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_object"


WRITTEN = [
    ("<think>\nA name.\n</think>\n\nVasili.", ["reasoning", "message"]),
    (f"<tool_call>{CALL}</tool_call>", ["function_call"]),
    (f"<think>So.</think>Let me see.<tool_call>{CALL}</tool_call>", ["reasoning", "message", "function_call"]),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ["function_call", "function_call"]),
]


@pytest.mark.parametrize(("text", "kinds"), WRITTEN)
def test_thoughts_text_and_calls_are_items(client: openai.OpenAI, served: Served, text: str, kinds: list[str]) -> None:
    given: Any = {"model": served.model, "input": ASKED, "tools": [TOOL], **writes(text)}
    whole, (events, final) = client.responses.create(**given), streamed(client, **given)
    assert whole.status == final.status == "completed"
    assert events[-1].type == "response.completed"
    assert [item.type for item in whole.output] == kinds
    assert same(whole) == same(final)
    for item in whole.output:
        if item.type == "function_call":
            assert (item.name, json.loads(item.arguments), item.status) == ("weather", {"city": "Rome"}, "completed")
    assert whole.usage is not None
    assert (whole.usage.output_tokens_details.reasoning_tokens > 0) == ("reasoning" in kinds)

    # All of it goes back, with what the tools have said, and the template sees one turn.
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "no"}
        for item in whole.output
        if item.type == "function_call"
    ]
    items = [*ASKED, *(item.model_dump(exclude_none=True) for item in whole.output), *results]
    more = client.responses.create(model=served.model, input=items, tools=[TOOL], max_output_tokens=1)
    thought = {"reasoning": f"({text.partition('</think>')[0].removeprefix('<think>').strip()})"}.get(kinds[0], "")
    said = whole.output_text
    calls = "".join(f"[weather {item.call_id} Rome]" for item in whole.output if item.type == "function_call")
    shown = "[weather]<tool_call><user>Is it raining?<assistant>" + thought + said + calls
    shown += "".join(f"<tool>no of {result['call_id']}" for result in results)
    assert more.usage is not None
    assert more.usage.input_tokens == num_tokens(served, shown)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_demanded_call(client: openai.OpenAI, served: Served, choice: Any) -> None:
    given: Any = {"model": served.model, "input": ASKED, "tools": [TOOL], "tool_choice": choice}
    answer = client.responses.create(**given, max_output_tokens=300)
    assert answer.status == "completed"
    assert [item.type for item in answer.output] == ["function_call"]
    assert (answer.tools[0].type, answer.tool_choice if isinstance(choice, str) else answer.tool_choice.name) == (  # type: ignore[union-attr]
        "function",
        choice if isinstance(choice, str) else "weather",
    )


def test_instructions_and_all_kinds_of_content(client: openai.OpenAI, served: Served) -> None:
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be "}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "d"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": "e"},
    ]
    answer = client.responses.create(
        model=served.model, instructions="Short.", input=items, max_output_tokens=1, reasoning={"effort": "low"}
    )
    shown = "<system>Short.<system>Be <user>ab<assistant>c<assistant>d<user>e"
    assert answer.usage is not None
    assert answer.usage.input_tokens == num_tokens(served, shown)
    assert answer.instructions == "Short."


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "a list of 1 to"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "does not support"),
        ({"input": "x", "background": True}, "background", "does not support"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "told store: false"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "knows message, function_call"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "no message"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": None}]}]},
            *("input[0].content[0].text", "is missing"),
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "only reads text"),
        ({"input": "x", "tools": [TOOL, {"type": "web_search"}]}, "tools[1].type", "'web_search', and this server"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "a"}, "tools": [TOOL]}, "tool_choice", "'a'"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "missing"),
        (
            {"input": "x", "text": {"format": {"type": "json_object"}}, "structured_outputs": {"choice": ["a"]}},
            *("text.format", "text.format, structured_outputs"),
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"}] * 129},
            *("input", "input means a chat"),
        ),
        (
            {"instructions": "x", "input": [{"role": "user", "content": "x"}] * 1024},
            *("input", "input is a list of 1025"),
        ),
        ({"input": "x " * 5000}, "input", "maximum context length"),
        ({"input": "x", "max_output_tokens": 1_000_000}, "max_output_tokens", "maximum context length"),
        ({"input": "x", "model": "other"}, "model", "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused(served: Served, given: dict[str, Any], param: str, says: str) -> None:
    for stream in (False, True):
        status, answer = served.ask("/v1/responses", {**given, "stream": stream})[:2]
        assert status in (400, 404)
        assert answer["error"]["param"] == param
        assert says in answer["error"]["message"]


def test_an_error_ends_a_stream(artifact: Path) -> None:
    with Served(artifact, "--request-timeout", 0.2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.APIError, match=r"longer than 0\.2 s"):
            list(client.responses.create(model=served.model, input="x", stream=True, extra_body={"ignore_eos": True}))
        body = {"input": "x", "stream": True, "ignore_eos": True}
        frames = served.request("/v1/responses", body).read().decode().split("\n\n")
        kind, data = frames[-2].split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (kind, event["type"], event["code"]) == ("event: error", "error", "request_timeout")
        assert event["sequence_number"] == sum(frame.startswith("event:") for frame in frames) - 1
