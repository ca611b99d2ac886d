"""Requests that nobody would write by hand: none may be answered with a server's error, or end the server."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Served

from llmrun.server.limits import Limits
from llmrun.server.openapi import document
from llmrun.server.schemas import Schemas

IS_LONG = os.environ.get("LLMPACK_HYPOTHESIS") == "fuzz"
SCHEMAS = Schemas(Limits())
schema = schemathesis.openapi.from_dict(document(SCHEMAS))
TAKEN = frozenset((200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 431))
quick = settings(
    max_examples=300 if IS_LONG else 7,
    suppress_health_check=list(HealthCheck),
)


LENGTH = {"/v1/completions": "max_tokens", "/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}


def shorten(path: str, body: Any) -> Any:
    """Let a request that is accepted not run for long: without a length it goes on to the end of the context."""
    if isinstance(body, dict) and path in LENGTH:
        if body.get(LENGTH[path]) is None:
            body[LENGTH[path]] = 2
        for name in ("n", "max_completion_tokens", LENGTH[path]):
            if isinstance(body.get(name), (int, float)):
                body[name] = min(body[name], 2)
    return body


@schema.parametrize()
@quick
def test_whatever_the_document_allows_or_not(case: Any, served: Served) -> None:
    body = case.body if isinstance(case.body, (dict, list, str, int, float, bool)) else None
    body = shorten(case.path, body)
    data = None if body is None else json.dumps(body).encode("utf-8", "surrogatepass")
    if case.method.upper() == "POST" and data is None:
        data = b""
    status = served.request(case.path, data, method=case.method.upper()).status
    assert status in TAKEN


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [0, 1, -1, 1e-9, 1e308, 2**31, 2**63, "json_object", "auto", "required", "user", "\ud800", "\x00"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "role", "json", "0", "name"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_known_fields_with_any_values(path: str, served: Served) -> None:
    record = {
        "/v1/completions": SCHEMAS.completion,
        "/v1/chat/completions": SCHEMAS.chat,
        "/v1/responses": SCHEMAS.responses,
        "/tokenize": SCHEMAS.tokenize,
        "/detokenize": SCHEMAS.detokenize,
    }[path]
    base = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/v1/responses": {"input": "a", "max_output_tokens": 2},
    }

    @settings(max_examples=500 if IS_LONG else 15, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(record.fields)), values, max_size=4))
    def run(fields: dict[str, Any]) -> None:
        body = shorten(path, {**base.get(path, {}), **fields})
        data = json.dumps(body).encode("utf-8", "surrogatepass")
        assert served.request(path, data).status in TAKEN

    run()
    assert served.health() == 200


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-9},
        {"temperature": 100, "top_p": 1e-9},
        {"temperature": 100, "top_k": 2**31},
        {"temperature": 1, "min_p": 0.999999, "top_p": 0},
        {"repetition_penalty": 10, "presence_penalty": 2, "frequency_penalty": 2},
        {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": -2},
        {"logit_bias": {str(i): -100 for i in range(1000)}},
        {"logit_bias": {"3071": 100}},
        {"logit_bias": {"999999": 1}},
        {"stop": ["a", "aa", "ab" * 128, "\n", "é", "\U0001f600"]},
        {"n": 8, "seed": 2**64 - 1},
        {"structured_outputs": {"regex": "(a|b)*c{0,50}"}, "logit_bias": {"3": 100}, "temperature": 5},
        {"structured_outputs": {"json": {"$ref": "#"}}},
        {"structured_outputs": {"json": {"type": "string", "pattern": "(a+)+$"}}},
        {"structured_outputs": {"grammar": 'start: start start | "a"'}},
    ],
    ids=range(15),
)
def test_extreme_sampling_hurts_only_itself(sampling: dict[str, Any], served: Served) -> None:
    for logprobs in (None, 20):
        body = {"prompt": "The king", "max_tokens": 6, "ignore_eos": True, "logprobs": logprobs, **sampling}
        assert served.request("/v1/completions", body).status in TAKEN
    status, reply = served.ask("/v1/completions", {"prompt": "The king", "max_tokens": 3, "ignore_eos": True})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 3)
