"""A model that speaks harmony: a real server, whole answers and streams, in both of OpenAI's interfaces.

Its weights are random: of what it may write, any seed says what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from harmony_model import SPECIAL, harmony_checkpoint
from unit.tool_forms import TOOLS

ASKED = [{"role": "user", "content": "Is it raining?"}]
WEATHERS = ["dry", "wet, and cold"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("harmony") / "model"
    return folder, harmony_checkpoint(folder)


@pytest.fixture(scope="module")
def served(model: tuple[Path, dict[str, int]], packed: Callable[..., Path]) -> Iterator[Served]:
    with Served(packed(model[0], 1, "f32")) as server:
        yield server


@pytest.fixture(scope="module")
def body(model: tuple[Path, dict[str, int]]) -> dict[str, Any]:
    """Of an answer whose thoughts are soon over."""
    bias = {str(model[1]["<|end|>"]): 5}
    return {"messages": ASKED, "max_tokens": 300, "temperature": 1.0, "logit_bias": bias}


def asked(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """Return the choice of the first seed that has thoughts; streamed it is the same."""
    for seed in range(20):
        status, answer = served.ask("/v1/chat/completions", {**body, "seed": seed})
        assert status == 200, answer
        (choice,) = answer["choices"]
        message = choice["message"]
        num_thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert bool(num_thought) >= ("reasoning_content" in message)
        if not message.get("reasoning_content"):
            continue
        assert not any(name in json.dumps(message) for name in SPECIAL)
        response = served.request("/v1/chat/completions", {**body, "seed": seed, "stream": True})
        chunks = [chunk["choices"][0] for chunk in list(events(response))[:-1]]
        for field in ("content", "reasoning_content"):
            assert "".join(chunk["delta"].get(field) or "" for chunk in chunks) == (message.get(field) or "")
        calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
        assert [call["function"] for call in calls] == [call["function"] for call in message.get("tool_calls", [])]
        assert chunks[-1]["finish_reason"] == choice["finish_reason"]
        return choice
    raise AssertionError("no seed made thoughts")


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ({"structured_outputs": {"choice": WEATHERS}}, str),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": WEATHERS}}}},
            json.loads,
        ),
    ],
)
def test_what_an_answer_must_be_holds_behind_the_thoughts(
    form: dict[str, Any], read: Callable[[str], str], served: Served, body: dict[str, Any]
) -> None:
    choice = asked(served, {**body, **form})
    assert read(choice["message"]["content"]) in WEATHERS
    assert choice["finish_reason"] == "stop"


def test_demanded_calls_come_and_go_back(served: Served, body: dict[str, Any]) -> None:
    choice = asked(served, {**body, "tools": TOOLS, "tool_choice": "required"})
    message = choice["message"]
    (call,) = message["tool_calls"]
    assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert call["function"]["name"] in ("weather", "now")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "no"}
    ids = served.ask("/tokenize", {"messages": [*ASKED, message, result]})[1]["tokens"]
    text = served.ask("/detokenize", {"tokens": ids})[1]["prompt"]
    assert f"analysis{message['reasoning_content']}" in text
    assert f"assistant to=functions.{call['function']['name']}commentary json" in text
    status, answer = served.ask("/v1/chat/completions", {**body, "messages": [*ASKED, message, result], "tools": TOOLS})
    assert status == 200, answer


def test_responses_have_items_of_both(served: Served, body: dict[str, Any]) -> None:
    shared = {name: body[name] for name in ("temperature", "logit_bias")}
    given = {**shared, "input": "Is it raining?", "max_output_tokens": 300, "reasoning": {"effort": "high"}}
    answer: dict[str, Any] = {"output": []}
    for seed in range(20):
        one = {**given, "seed": seed, "structured_outputs": {"choice": WEATHERS}}
        status, answer = served.ask("/v1/responses", one)
        assert status == 200, answer
        if len(answer["output"]) == 2:
            break
    thought, message = answer["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message")
    assert message["content"][0]["text"] in WEATHERS
    assert answer["reasoning"]["effort"] == "high"


def test_effort_is_one_that_the_template_knows(served: Served, body: dict[str, Any]) -> None:
    used = []
    for effort in ("low", "medium", None):
        status, answer = served.ask("/v1/chat/completions", {**body, "max_tokens": 1, "reasoning_effort": effort})
        assert status == 200, answer
        used.append(answer["usage"]["prompt_tokens"])
    assert used[0] < used[1] == used[2]
    status, answer = served.ask("/v1/chat/completions", {**body, "reasoning_effort": "minimal"})
    assert (status, answer["error"]["param"]) == (400, "reasoning_effort")
    assert "low, medium, high" in answer["error"]["message"]


def test_text_without_markup_is_text(served: Served, body: dict[str, Any], model: tuple[Path, dict[str, int]]) -> None:
    """So may a model write that has unlearnt it; this one has never learnt it."""
    banned = {str(token_id): -100 for token_id in model[1].values()}
    status, answer = served.ask("/v1/chat/completions", {**body, "logit_bias": banned, "max_tokens": 40, "seed": 1})
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"]
