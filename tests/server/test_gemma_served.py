"""A model of Gemma 3's kind: its turns, its end token, and what clients see that ask for more than its template knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from models import GEMMA, make_checkpoint
from unit.tokenizer_makers import train_gemma
from unit.tool_forms import TOOLS

VOCAB_SIZE = 700
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the house?"}
ANSWER = {"role": "assistant", "content": "In the street."}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "model"
    make_checkpoint(folder, **{**GEMMA, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512})
    config = (folder / "config.json").read_text()
    train_gemma(folder, VOCAB_SIZE)
    (folder / "config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, packed: Callable[..., Path]) -> Iterator[Served]:
    with Served(packed(checkpoint, 1, "q8")) as server:
        yield server


@pytest.fixture(scope="module")
def end(checkpoint: Path) -> int:
    return json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"][1]


@pytest.mark.parametrize(
    "system", [[], [SYSTEM], [{**SYSTEM, "role": "developer"}]], ids=["none", "system", "developer"]
)
def test_prompts_are_those_of_transformers(system: Any, checkpoint: Path, served: Served) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(checkpoint)
    told = [{**message, "role": "system"} for message in system]
    expected = theirs.apply_chat_template([*told, USER, ANSWER, USER], add_generation_prompt=True, return_dict=False)
    for user in (USER, {**USER, "content": [{"type": "text", "text": USER["content"]}]}):
        messages = [*system, user, ANSWER, USER]
        assert served.ask("/tokenize", {"messages": messages})[1]["tokens"] == expected
        status, answer = served.ask(CHAT, {"messages": messages, "max_tokens": 1})
        assert (status, answer["usage"]["prompt_tokens"]) == (200, len(expected))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, USER], "Conversation roles must alternate"),
        ([SYSTEM, ANSWER, USER], "Conversation roles must alternate"),
        (
            [USER, ANSWER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            "only reads text",
        ),
    ],
    ids=["users-in-a-row", "answer-first", "image"],
)
def test_what_the_model_cannot_be_told_is_an_error_that_says_so(messages: Any, words: str, served: Served) -> None:
    status, answer = served.ask(CHAT, {"messages": messages, "max_tokens": 1})
    assert (status, words in answer["error"]["message"]) == (400, True), answer
    for message in messages:
        if isinstance(message["content"], list):
            message = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}
            messages = [*messages[:-1], message]
    status, answer = served.ask(RESPONSES, {"input": messages})
    assert (status, words in answer["error"]["message"]) == (400, True), answer


def test_tools_are_refused_unless_none_may_be_called(served: Served) -> None:
    body = {"messages": [USER], "tools": TOOLS, "max_tokens": 1}
    for choice in ("auto", "required"):
        status, answer = served.ask(CHAT, {**body, "tool_choice": choice})
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert "template does not know tools" in answer["error"]["message"]
    assert served.ask(CHAT, {**body, "tool_choice": "none"})[0] == 200


def test_answers_end_at_the_end_of_a_turn_which_is_not_shown(end: int, served: Served) -> None:
    body = {"messages": [USER], "logit_bias": {str(end): 100}, "max_tokens": 5}
    choice = served.ask(CHAT, body)[1]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    *chunks, done = events(served.request(CHAT, {**body, "stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == ""
    assert (chunks[-1]["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


def test_an_answer_by_schema_ends_there(end: int, served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    body = {"messages": [SYSTEM, USER], "response_format": form, "logit_bias": {str(end): 100}, "max_tokens": 100}
    choice = served.ask(CHAT, body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["a"] in ("x", "y")


def test_the_next_turn_finds_the_last_one_computed(served: Served) -> None:
    long = {"role": "user", "content": "Where is the house? " * 8}
    first = served.ask(CHAT, {"messages": [SYSTEM, long], "max_tokens": 4})[1]["usage"]
    second = served.ask(CHAT, {"messages": [SYSTEM, long, ANSWER, USER], "max_tokens": 4})[1]["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] // 16 * 16 - 16
