"""A model that calls tools and thinks as GLM 4.5 does: a real server, whole answers and streams, in both interfaces.

Some of its tags are special tokens of the tokenizer, the others added ones that are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from models import make_checkpoint
from unit.tokenizer_makers import train_byte_level
from unit.tool_forms import tool

SPECIAL = [
    *("[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<think>", "<tool_call>", "<arg_key>", "</arg_value>"),
]
ADDED = ["</think>", "</tool_call>", "</arg_key>", "<arg_value>"]
TEMPLATE = """\
[gMASK]<sop>{% if tools %}<|system|>
{{ tools | tojson }} {% endif %}
{%- for m in messages %}
    {%- if m.role == "tool" %}
        {{- "" if loop.previtem.role == "tool" else "<|observation|>" }}{{ "\\n<tool_response>" + m.content }}
    {%- else %}
        {{- "<|" + m.role + "|>\\n" }}
        {%- if m.role == "assistant" %}{{ "<think>" + (m.reasoning_content or "") + "</think>\\n" }}{% endif %}
        {{- m.content | trim }}
        {%- for c in m.tool_calls or [] %}
            {{- "\\n<tool_call>" + c.function.name }}
            {%- for key, value in c.function.arguments.items() %}
                {{- "\\n<arg_key>" + key + "</arg_key>\\n<arg_value>" }}
                {{- (value if value is string else value | tojson) + "</arg_value>" }}
            {%- endfor %}
            {{- "\\n</tool_call>" }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>" + ("\\n<think></think>" if enable_thinking is defined and not enable_thinking else "") }}
{%- endif %}
"""
ASKED = [{"role": "user", "content": "Is it raining?"}]
TOOLS = [tool("weather", {"properties": {"city": {"enum": ["Rome", "3"]}, "days": {"type": "integer"}}})]
SPELLED = (
    "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>3</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>weather\n</tool_call>"
)
WRITTEN = f"<think>Hm.</think>\nSo:{SPELLED}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("glm") / "model"
    folder.mkdir()
    library = train_byte_level(folder, SPECIAL)
    library.add_tokens(ADDED)
    library.save(str(folder / "tokenizer.json"))
    make_checkpoint(folder, vocab_size=512, max_position_embeddings=1024)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder, {text: library.token_to_id(text) for text in SPECIAL + ADDED}


@pytest.fixture(scope="module")
def served(model: tuple[Path, dict[str, int]], packed: Callable[..., Path]) -> Iterator[Served]:
    with Served(packed(model[0], 1, "f32")) as server:
        yield server


@pytest.fixture(scope="module")
def writes(model: tuple[Path, dict[str, int]]) -> dict[str, Any]:
    """Have the model write what a trained one would, the tags being tokens."""
    pieces = filter(None, re.split(f"({'|'.join(map(re.escape, model[1]))})", WRITTEN))
    rule = " ".join(f"<[{model[1][piece]}]>" if piece in model[1] else json.dumps(piece) for piece in pieces)
    return {"structured_outputs": {"grammar": f"start: {rule}"}}


def test_thoughts_and_calls_come_and_go_back(
    served: Served, writes: dict[str, Any], model: tuple[Path, dict[str, int]]
) -> None:
    body = {"messages": ASKED, "tools": TOOLS, "max_tokens": 300, **writes}
    status, answer = served.ask("/v1/chat/completions", body)
    assert status == 200, answer
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "So:\n", "tool_calls")
    calls = [call["function"] for call in message["tool_calls"]]
    assert [call["name"] for call in calls] == ["weather", "weather"]
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "3", "days": 3}, {}]

    chunks = list(events(served.request("/v1/chat/completions", {**body, "stream": True})))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == message[field]
    (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert [call["function"] for call in streamed] == calls

    results = [{"role": "tool", "tool_call_id": call["id"], "content": "no"} for call in message["tool_calls"]]
    told = {"messages": [*ASKED, message, *results]}
    ids = served.ask("/tokenize", told)[1]["tokens"]
    written = WRITTEN
    for name in SPECIAL:
        assert ids.count(model[1][name]) >= WRITTEN.count(name)
        written = written.replace(name, "")
    assert written in served.ask("/detokenize", {"tokens": ids})[1]["prompt"]

    given = {"input": "Is it raining?", "tools": [{"type": "function", **TOOLS[0]["function"]}], **writes}
    status, response = served.ask("/v1/responses", given)
    assert status == 200, response
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["arguments"] for item in response["output"][2:]] == [call["arguments"] for call in calls]
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "no"} for item in response["output"][2:]
    ]
    items = [*ASKED, *response["output"], *outputs]
    status, response = served.ask("/v1/responses", {"input": items, "max_output_tokens": 1})
    assert (status, response["usage"]["input_tokens"]) == (200, len(ids)), response


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_one(served: Served, choice: Any) -> None:
    body = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    status, answer = served.ask("/v1/chat/completions", {**body, "chat_template_kwargs": {"enable_thinking": False}})
    assert status == 200, answer
    message = answer["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert (message["content"], call["function"]["name"]) == (None, "weather")
    assert json.loads(call["function"]["arguments"]).keys() <= {"city", "days"}


@pytest.mark.parametrize("arguments", ['{"city": "Ro', "[3]"])
def test_arguments_that_the_template_cannot_write_are_named(served: Served, arguments: str) -> None:
    """It writes them one by one, and so no text that a model broke off."""
    good, broken = (
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": a}} for a in ("{}", arguments)
    )
    answers = [{"role": "assistant", "content": None, "tool_calls": calls} for calls in ([good], [good, broken])]
    status, answer = served.ask("/v1/chat/completions", {"messages": [*ASKED, *answers], "max_tokens": 1})
    assert (status, answer["error"]["param"]) == (400, "messages[2].tool_calls[1].function.arguments")
    assert "is not the text of a JSON object" in answer["error"]["message"]
