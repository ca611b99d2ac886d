"""A model that thinks before it answers: a real server, whole answers and streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from models import demo_with_template

TEMPLATE = (
    "{% for m in messages %}{% if m.reasoning_content %}({{ m.reasoning_content }}) {% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% endfor %}{% if begins %}<think>\n{% endif %}"
    "{% if ends %}<think></think>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Who is the prince?"}]
WRITTEN = "<think>\nA name.\n</think>\n\nVasili."  # what a trained model would write
BODY = {"messages": MESSAGES, "max_tokens": 100, "structured_outputs": {"choice": [WRITTEN]}}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Path:
    return packed(demo_with_template(tmp_path_factory.mktemp("thoughts") / "model", TEMPLATE), 1, "q8")


def joined(served: Served, field: str, **given: Any) -> str:
    chunks = list(events(served.request("/v1/chat/completions", {**BODY, **given, "stream": True})))[:-1]
    return "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in chunks if chunk["choices"])


def test_thoughts_are_a_field_of_their_own(artifact: Path) -> None:
    with Served(artifact) as served:
        status, answer = served.ask("/v1/chat/completions", BODY)
        assert status == 200, answer
        message = answer["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Vasili.", "A name.")
        num_thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert 0 < num_thought < answer["usage"]["completion_tokens"]
        assert (joined(served, "content"), joined(served, "reasoning_content")) == ("Vasili.", "A name.")

        ended = {"chat_template_kwargs": {"ends": True}, "structured_outputs": {"choice": ["\nVasili.\n"]}}
        assert (
            served.ask("/v1/chat/completions", {**BODY, **ended})[1]["choices"][0]["message"]["content"] == "Vasili.\n"
        )
        assert (joined(served, "content", **ended), joined(served, "reasoning_content", **ended)) == ("Vasili.\n", "")

        # The message as it came goes back, and so does one of a client that has null for nothing.
        for thought, shown in ((message["reasoning_content"], "(A name.) "), (None, "")):
            messages = [*MESSAGES, {**message, "reasoning_content": thought}]
            ids = served.ask("/tokenize", {"messages": messages, "add_generation_prompt": False})[1]["tokens"]
            text = served.ask("/detokenize", {"tokens": ids})[1]["prompt"]
            assert text == f"Who is the prince?{shown}Vasili."


def test_thoughts_that_the_prompt_begins_are_free_of_the_grammar(artifact: Path) -> None:
    with Served(artifact) as served:
        body = {**BODY, "max_tokens": 12, "chat_template_kwargs": {"begins": True}}
        answer = served.ask("/v1/chat/completions", body)[1]
        message, usage = answer["choices"][0]["message"], answer["usage"]
        assert message["content"] == ""
        assert len(message["reasoning_content"]) > 12  # this model has never learnt to end them
        assert answer["choices"][0]["finish_reason"] == "length"
        assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] == 12


def test_the_server_may_leave_them_in_the_text(artifact: Path) -> None:
    with Served(artifact, "--reasoning-format", "none") as served:
        answer = served.ask("/v1/chat/completions", BODY)[1]
        assert answer["choices"][0]["message"]["content"] == WRITTEN
        assert "reasoning_content" not in answer["choices"][0]["message"]
        assert (joined(served, "content"), joined(served, "reasoning_content")) == (WRITTEN, "")
