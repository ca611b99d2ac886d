"""What a chat template may ask for beside messages: from the server's command line, and from a request, which counts more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served

from models import demo_with_template

TEMPLATE = "{{ mood }}, {{ way.of[0] }}{% for m in messages %} {{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Who is the prince?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Iterator[Served]:
    folder = demo_with_template(tmp_path_factory.mktemp("variables") / "model", TEMPLATE)
    given = json.dumps({"mood": "Gay", "way": {"of": ["life"]}})
    with Served(packed(folder, 1, "q8"), "--chat-template-kwargs", given) as served:
        yield served


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "Gay, life Who is the prince?"),
        ({"chat_template_kwargs": {}}, "Gay, life Who is the prince?"),
        ({"chat_template_kwargs": {"mood": "Sad"}}, "Sad, life Who is the prince?"),
        ({"chat_template_kwargs": {"mood": True, "way": {"of": "x"}, "other": None}}, "True, x Who is the prince?"),
    ],
)
def test_a_template_gets_what_the_request_says_else_what_the_server_says(
    given: dict[str, Any], text: str, served: Served
) -> None:
    ids = served.ask("/tokenize", {"messages": MESSAGES, **given})[1]["tokens"]
    assert served.ask("/detokenize", {"tokens": ids})[1]["prompt"].strip() == text
    status, answer = served.ask("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, **given})[:2]
    assert (status, answer["usage"]["prompt_tokens"]) == (200, len(ids))


@pytest.mark.parametrize(
    ("given", "says"),
    [({"tools": []}, "tools is not free"), ({"mood": "x" * 1_050_000}, "expected at most"), ([], "expected an object")],
    ids=["taken", "long", "list"],
)
def test_what_no_template_gets_is_refused(given: Any, says: str, served: Served) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": given}
    for path in ("/tokenize", "/v1/chat/completions"):
        status, answer = served.ask(path, body)[:2]
        assert status == 400
        assert says in answer["error"]["message"]
