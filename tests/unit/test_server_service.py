"""The server's numbers, limits and health, and the order of an answer's events, without a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import threading
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmrun.errors import UsageError
from llmrun.logprobs import TokenLogprobs
from llmrun.requests import Event
from llmrun.server import replies, responses_api
from llmrun.server import tools as toolbox
from llmrun.server.chats import Chats
from llmrun.server.errors import ApiError
from llmrun.server.limits import Limits, add_options, from_arguments
from llmrun.server.metrics import Metrics
from llmrun.server.replies import TokenTexts, usage
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice
from llmrun.stats import Stats
from llmrun.text_stream import MAX_STOPS
from llmrun.tokenizer import Tokenizer


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics('a"b\\c\nd', "vllm")
    for seconds in (0.0005, 0.02, 700.0):
        metrics.observe("time_to_first_token_seconds", seconds)
    metrics.finished("stop")
    metrics.responded(200)
    text = metrics.text({"num_requests_running": (2, "x")}, {"prompt_tokens_total": (7, "y")})
    line = re.compile(r'[a-zA-Z_:][\w:]*(\{([a-z_]+="(\\.|[^"\\\n])*",?)*\})? [-+\d.e]+')
    families: set[str] = set()
    for row in text.splitlines():
        if row.startswith("# TYPE "):
            name = row.split()[2]
            assert name not in families
            families.add(name)
        elif not row.startswith("# HELP "):
            assert line.fullmatch(row), row
    label = 'model_name="a\\"b\\\\c\\nd"'
    assert f"vllm:num_requests_running{{{label}}} 2" in text
    assert f'vllm:time_to_first_token_seconds_bucket{{le="0.02",{label}}} 2' in text
    assert f'vllm:time_to_first_token_seconds_bucket{{le="+Inf",{label}}} 3' in text
    assert f'vllm:request_success_total{{finished_reason="stop",{label}}} 1' in text
    assert 'llmrun:http_responses_total{status="200"} 1' in text


def test_limits_bound_something() -> None:
    for name, value in (
        ("max_queue", 0),
        ("body_timeout", -1.0),
        ("max_stops", MAX_STOPS + 1),
        ("max_body_bytes", 1 << 41),
    ):
        with pytest.raises(UsageError):
            Limits(**{name: value})


def test_seconds_of_a_limit_may_be_fractions_and_counts_may_not() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    limits = from_arguments(parser.parse_args(["--header-timeout", "0.5", "--max-queue", "7"]))
    assert limits == Limits(header_timeout=0.5, max_queue=7)
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--max-queue", "0.5"])


class FakeLoop:
    """An engine's loop of which only the numbers matter."""

    def __init__(self) -> None:
        self.numbers = Stats()

    def stats(self) -> Stats:
        return self.numbers


def test_health_is_stuck_when_there_is_work_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("llmrun.server.service.time.monotonic", lambda: now[0])
    service = Service(Limits(health_timeout=5), ["m"], "vllm", 8)
    assert service.health() == "loading"
    service.loop = loop = FakeLoop()  # type: ignore[assignment]
    service.state = "ready"

    def after(seconds: float, **numbers: int) -> str:
        now[0] += seconds
        loop.numbers = Stats(**numbers)
        service.watch()
        return service.health()

    assert after(60) == "ok"  # idle
    assert after(4, running=1, steps=1) == "ok"
    assert after(4, running=1, steps=2) == "ok"
    assert after(4, running=1, steps=2) == "ok"
    assert after(2, running=1, steps=2) == "stuck"
    assert after(1, running=1, steps=3) == "ok"
    assert after(6, waiting=1, steps=3) == "stuck"
    assert after(1, steps=3) == "ok"


def test_what_came_before_an_error_is_given_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Limits(), ["m"], "vllm", 8)
    monkeypatch.setattr(service, "admit", lambda _: None)
    monkeypatch.setattr(service, "release", lambda _: None)

    async def forever() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def outcome() -> list[str]:
        async with Answer(service, forever, 1) as answer:
            choice = Choice(0, 0)
            on_event = answer._callback(choice)
            answer.choices.append(choice)
            for text in ("last", "words"):
                on_event(Event(cast("Any", None), None, text))
            await asyncio.sleep(0)
            answer.fail(ApiError(503, "a rank is lost"))
            seen = [event.text for _, event in await answer.events() or []]
            with pytest.raises(ApiError, match="a rank is lost"):
                await answer.events()
            return seen

    assert asyncio.run(outcome()) == ["last", "words"]


def test_usage_counts_a_prompt_once_and_what_was_cached_before_it() -> None:
    def choice(prompt: int, num_prompt: int, num_generated: int, cached: int | None) -> Choice:
        ticket = None if cached is None else SimpleNamespace(request=SimpleNamespace(num_cached_prompt=cached))
        numbers = {"prompt_index": prompt, "num_prompt": num_prompt, "num_generated": num_generated, "ticket": ticket}
        return cast(Choice, SimpleNamespace(**numbers))

    # The second answer to a prompt finds what the first has computed; the last choice was never run.
    assert usage([choice(0, 20, 3, 4), choice(0, 20, 4, 16), choice(1, 5, 0, None)]) == {
        "prompt_tokens": 25,
        "completion_tokens": 7,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_log_probabilities_name_every_id_and_hold_what_json_can(tokenizer: Tokenizer) -> None:
    texts, size = TokenTexts(tokenizer), tokenizer.vocab_size
    assert texts.data(size - 1) == tokenizer.token_bytes(size - 1)
    assert texts.text(size) == f"token_id:{size}"  # of a padded embedding
    ids: dict[str, list[int]] = {}
    for i in range(size):
        ids.setdefault(texts.text(i), []).append(i)
    name, (likelier, other, *_) = next((name, found) for name, found in ids.items() if len(found) > 1)
    entry = TokenLogprobs(size, -math.inf, ((likelier, -1.0), (other, -2.0)))
    shown = texts.completion([None, entry], [other, size], texts.offsets(is_continuation=True))
    assert shown["token_logprobs"] == [None, -9999.0]
    assert shown["top_logprobs"] == [None, {name: -1.0, f"token_id:{size}": -9999.0}]
    assert shown["text_offset"] == [0, len(name)]
    assert texts.chat([entry], 1)["content"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("field", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}])
def test_schemas_of_tools_are_read_beside_the_thread_that_serves_all(
    field: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may fill a body of 2 MB, which takes most of a second."""
    threads: list[threading.Thread] = []

    def call_grammar(*_arguments: Any, **_more: Any) -> tuple[str, Any]:
        threads.append(threading.current_thread())
        raise ApiError(400, "enough is known")

    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, **field}
    service = Service(Limits(), ["m"], "vllm", 1)

    async def read(*_arguments: Any) -> tuple[Any, dict[str, str]]:
        return body, {}

    monkeypatch.setattr(toolbox, "call_grammar", call_grammar)
    monkeypatch.setattr(service, "read", read)
    tokenizer = SimpleNamespace(chat_template="{{ tools }}", special_tokens={})
    service.engine = cast(Any, SimpleNamespace(tokenizer=tokenizer))
    unused: Any = None
    with pytest.raises(ApiError, match="enough"):
        asyncio.run(Chats(service)({}, unused, unused))
    assert threads != [threading.current_thread()]
    assert len(threads) == 1


def test_an_event_is_one_line_for_clients_that_split_at_unicodes_line_ends() -> None:
    value = {"type": "x", "delta": "a\x85b\u2028c\u2029d\x0b\x1ce\r\n\u00e9"}
    for data, num_lines in ((replies.frame(value), 1), (responses_api.frame(value), 2)):
        lines = data.decode().splitlines()  # as httpx does
        assert len(lines) == num_lines + 1
        assert json.loads(lines[-2].removeprefix("data: ")) == value
        assert "\u00e9" in lines[-2]
