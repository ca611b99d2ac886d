"""A model whose calls begin with a special token, as Mistral's: a real server, whole answers and streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from models import DEMO, make_checkpoint
from unit.tool_forms import WEATHER

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ \', \' if not loop.last }}{% endfor %}]{{ eos_token }}'
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
ASKED = [{"role": "user", "content": "Is it raining?"}]
TOOL_CALLS_ID = 3072  # behind the demo's own tokens
CALLS = ' [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "arguments": {"city": "Oslo"}}]'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Iterator[Served]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tokens") / "model", vocab_size=3136, max_position_embeddings=1024)
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    added = {str(TOOL_CALLS_ID): {"content": "[TOOL_CALLS]", "special": True}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "added_tokens_decoder": added, "chat_template": TEMPLATE})
    )
    with Served(packed(folder, 1, "f32")) as server:
        yield server


@pytest.mark.parametrize(
    ("field", "num_calls"),
    [
        ({"tool_choice": "required"}, 1),
        # What a trained model would write.
        ({"structured_outputs": {"grammar": f"start: <[{TOOL_CALLS_ID}]> {json.dumps(CALLS)}"}}, 2),
    ],
)
def test_calls_behind_a_special_token_come_and_go_back(served: Served, field: Any, num_calls: int) -> None:
    tools = [WEATHER]
    body = {"messages": ASKED, "tools": tools, "max_tokens": 300, **field}
    status, answer = served.ask("/v1/chat/completions", body)
    assert status == 200, answer
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    assert (message["content"], reason, len(message["tool_calls"])) == (None, "tool_calls", num_calls)
    for call in message["tool_calls"]:
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")

    chunks = list(events(served.request("/v1/chat/completions", {**body, "stream": True})))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert not any(delta.get("content") for delta in deltas)
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert [call["index"] for call in calls] == list(range(num_calls))

    results = [{"role": "tool", "tool_call_id": call["id"], "content": "no"} for call in message["tool_calls"]]
    body = {"messages": [*ASKED, message, *results], "tools": tools, "max_tokens": 2}
    status, answer = served.ask("/v1/chat/completions", body)
    assert status == 200, answer
