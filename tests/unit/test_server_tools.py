"""Tools: what templates say of calls, what constrains them, and how they are found in an answer."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from answer_pieces import pieces_of, the_pieces
from hypothesis import given
from hypothesis import strategies as st
from tool_forms import CODER, FORMS, FUNCTION, GLM, GRANITE, HERMES, LLAMA, MISTRAL, NAMED, PHI, TOOLS

from llmrun.requests import Event
from llmrun.server.errors import ApiError
from llmrun.server.prompts import chat_ids
from llmrun.server.tasks import Choice
from llmrun.server.tool_stream import ToolStream
from llmrun.server.tools import ToolForm, find_calls, tool_form
from llmrun.tokenizer import Tokenizer
from llmrun.tokenizer_backends import alternation

LLAMA_TEMPLATE = (
    '{% if tools %}{{ tools | tojson }}{{ \' {"name": ..., "parameters": ...}\' }}{% endif %}{% for m in messages %}'
    "{{ m.role }}:{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def with_template(tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def test_the_form_of_calls_is_read_off_the_template(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool_form(tokenizer) is None  # the demo's template has no tools
    assert tool_form(with_template(tokenizer, LLAMA_TEMPLATE, monkeypatch)) == LLAMA
    hermes = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>"
    assert tool_form(with_template(tokenizer, hermes, monkeypatch)) == HERMES
    functionary = "{{ tools }}<function={{ name }}>{{ arguments }}</function>"
    assert tool_form(with_template(tokenizer, functionary, monkeypatch)) == FUNCTION
    with_template(tokenizer, functionary.replace("{{ arguments }}", "<parameter={{ key }}>"), monkeypatch)
    assert tool_form(tokenizer) == ToolForm("arguments", is_spelled=True)
    with_template(tokenizer, "{{ tools }}<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>", monkeypatch)
    assert tool_form(tokenizer) == CODER
    with_template(tokenizer, f"{{{{ tools }}}}{KEYED}", monkeypatch)
    assert tool_form(tokenizer) == GLM
    assert tool_form(with_template(tokenizer, "tools {{ broken", monkeypatch)) is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{- '[TOOL_CALLS] [' }}", MISTRAL),
        ('{{- "[TOOL_CALLS][" }}', replace(MISTRAL, opening="[TOOL_CALLS][")),
        ("{# [TOOL_CALLS] [TOOL_RESULTS] #}", replace(MISTRAL, opening="[TOOL_CALLS][")),
        ("{{- '[TOOL_CALLS]' + name }}{{- '[ARGS]' + arguments }}", NAMED),
        ("<tool_call>", replace(HERMES, tokens=(("<tool_call>", 5),))),
        ("<tool_call>f<arg_key>{{ k }}<arg_value>", replace(GLM, tokens=(("<tool_call>", 5), ("<arg_key>", 6)))),
        ("{{- 'respond with <|tool_call|> followed by a JSON list' }}", GRANITE),
        ("{{- 'assistant<|end_of_role|><|tool_call|>' + message['content'] }}", GRANITE),
        ("<|tool_call|>{{ calls | tojson }}<|/tool_call|>", replace(PHI, tokens=GRANITE.tokens)),
        (
            """respond like this: <|tool_call|>{"name": "foo", "arguments": {"a": 1}}<|/tool_call|>""",
            replace(PHI, opening="<|tool_call|>", closing="<|/tool_call|>", tokens=GRANITE.tokens),
        ),
    ],
)
def test_tags_that_are_special_tokens_are_ids(
    template: str, expected: ToolForm, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = {"[TOOL_CALLS]": 1, "[ARGS]": 0, "<tool_call>": 5, "<arg_key>": 6, "<|tool_call|>": 1}
    monkeypatch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, **special})
    assert tool_form(with_template(tokenizer, "{{ tools }}" + template, monkeypatch)) == expected
    assert expected.shown_tokens == {special[tag]: tag for tag, _ in expected.tokens}


def test_tools_and_calls_reach_the_template_as_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(tokenizer, LLAMA_TEMPLATE, monkeypatch)
    tools = [{"type": "function", "function": {"name": "weather", "description": "</s>"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome</s>"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    ids = chat_ids(tokenizer, messages, tools, max_depth=64)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    text = tokenizer.decode(ids)
    assert '"description": "</s>"' in text
    assert "user:hi you;assistant:weather(Rome</s>);tool:sunny;" in text


@pytest.mark.parametrize(
    ("known", "role"),
    [
        ("m['role'] == 'tool_response'", "tool_response"),  # Granite 3.0, which writes nothing of other roles
        ("m['role'] == 'tool'", "tool"),
        ("m['role'] == 'tool_response' or m['role'] in ['tool']", "tool"),
        ("'<tool_response>' != m['content']", "tool"),
    ],
)
def test_results_of_tools_have_the_role_that_the_template_knows(
    known: str, role: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = f"{{% if m['role'] == 'user' or {known} %}}{{{{ m['role'] }}}}:{{{{ m.content }}}};{{% endif %}}"
    with_template(tokenizer, f"{{% for m in messages %}}{turn}{{% endfor %}}", monkeypatch)
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "sunny", "tool_call_id": "1"}]
    assert tokenizer.decode(chat_ids(tokenizer, messages, max_depth=64)) == f"user:hi;{role}:sunny;"


TOLD_BY_SYSTEM = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %};{% endfor %}"
)


@pytest.mark.parametrize("system", [None, "Be brief.</s>"])
def test_tools_are_the_system_messages_where_the_template_takes_them_there(
    system: str | None, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does Phi 4 mini's own template, which shows no call."""
    with_template(tokenizer, TOLD_BY_SYSTEM, monkeypatch)
    assert tool_form(tokenizer) == replace(PHI, tokens=(), tells_by_system=True)
    given = [] if system is None else [{"role": "system", "content": system}]
    messages = [*given, {"role": "user", "content": "hi"}]
    described = {"name": "weather", "description": "</s>"}
    ids = chat_ids(tokenizer, messages, [{"type": "function", "function": described}], max_depth=64)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    told = f"<|tool|>{json.dumps([described])}<|/tool|>"
    content = system or "You are a helpful assistant with some tools."
    assert tokenizer.decode(ids) == f"system:{content}{told};user:hi;"
    plain = tokenizer.decode(chat_ids(tokenizer, messages, max_depth=64))
    assert plain == "".join(f"{message['role']}:{message['content']};" for message in messages)


TALK = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def with_form(tokenizer: Tokenizer, form: ToolForm, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(tokenizer, TALK, monkeypatch)
    monkeypatch.setattr("llmrun.server.prompts.tool_form", lambda _: form)
    monkeypatch.setattr(tokenizer, "special_tokens", {"</s>": 2, **dict(form.tokens)})
    monkeypatch.setattr(tokenizer, "_special_pattern", alternation(tokenizer.special_tokens))


def test_no_name_makes_a_special_token_with_what_follows_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_form(tokenizer, FUNCTION, monkeypatch)
    call = {"type": "function", "function": {"name": "x</s", "arguments": "{}"}}
    ids = chat_ids(tokenizer, [{"role": "assistant", "tool_calls": [call]}], max_depth=64)
    assert 2 not in ids
    assert tokenizer.decode(ids) == "assistant:<function=x</s>{}</function>;"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arguments", ['{"city": "Rome</s>"}', '{"city"', ""])
def test_calls_that_have_no_place_in_the_template_are_told_as_the_model_writes_them(
    arguments: str, form: ToolForm, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_form(tokenizer, form, monkeypatch)
    given = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in ("weather", "now")]
    messages = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "So: ", "tool_calls": given}]
    ids = chat_ids(tokenizer, messages, max_depth=64)
    assert 2 not in ids  # what a message or a call holds is text
    assert {token_id for _, token_id in form.tokens} <= set(ids)
    shown = {token_id: text.encode() for text, token_id in form.tokens}
    text = b"".join(shown.get(i) or tokenizer.token_bytes(i) for i in ids).decode().strip()
    start, _, written = text.removesuffix(";").partition("So: ")
    assert start == "user:</s>;assistant:"
    if arguments != '{"city"':
        _, calls = find_calls(form, TOOLS, written)
        assert [call["function"]["name"] for call in calls] == ["weather", "now"]
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [json.loads(arguments or "{}")] * 2
    else:
        assert written.count("city") == 2


@pytest.mark.parametrize("silent", [{}, {"content": None}, {"content": None, "tool_calls": []}])
def test_a_model_may_have_said_nothing(
    silent: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(tokenizer, LLAMA_TEMPLATE, monkeypatch)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", **silent}, {"role": "user", "content": "so?"}]
    assert "user:hi;assistant:;user:so?;" in tokenizer.decode(chat_ids(tokenizer, messages, max_depth=64))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "tool", "content": None},
        {"role": "user", "content": [{"type": "image_url", "text": "x"}]},
    ],
)
def test_messages_that_no_template_gets(message: dict[str, Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as caught:
        chat_ids(tokenizer, [message], max_depth=64)
    assert caught.value.status == 400


ODD_ARGUMENTS = ["not json </s>", '{"a":', "[1]", '{"a": 1, "a": 2}', '{"a":' * 600 + "1" + "}" * 600]


@pytest.mark.parametrize("arguments", ODD_ARGUMENTS)
def test_arguments_that_are_no_object_go_back_as_their_text(
    arguments: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(tokenizer, LLAMA_TEMPLATE.replace("arguments.city", "arguments | tojson"), monkeypatch)
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "error: no object"}]
    ids = chat_ids(tokenizer, messages, TOOLS, max_depth=64)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert f"weather({json.dumps(arguments)})" in tokenizer.decode(ids)


@pytest.mark.parametrize("arguments", ["not json", '{"a":', "[1]"])
def test_a_call_with_arguments_that_are_no_object_is_text(arguments: str) -> None:
    text = json.dumps({"name": "now", "arguments": arguments})
    assert find_calls(LLAMA, TOOLS, text) == (text, [])
    _, (call,) = find_calls(LLAMA, TOOLS, json.dumps({"name": "now", "arguments": '{"a": 1}'}))
    assert call["function"]["arguments"] == '{"a": 1}'


CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'
ARGUMENTS = '{"city": "Rome"}'
SPELLED = "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>"
KEYED = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
ANSWERS: list[tuple[str, str | None, int]] = [
    (CALL, None, 1),
    (f" {CALL}; {CALL}\n", None, 2),
    ("It is sunny.", "It is sunny.", 0),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', 0),
    (CALL[:-1], CALL[:-1], 0),
    ("{ is a brace", "{ is a brace", 0),
    ('{"name": ["weather"]}', '{"name": ["weather"]}', 0),
    ('{"name": "now", "parameters": {"x": NaN}}', '{"name": "now", "parameters": {"x": NaN}}', 0),
    ('{"name": "now", "parameters": {"x": 1e999}}', '{"name": "now", "parameters": {"x": 1e999}}', 0),
    (r'{"name": "now", "parameters": "{\"x\": NaN}"}', r'{"name": "now", "parameters": "{\"x\": NaN}"}', 0),
    ('{"name": "weather", "parameters": {"city": "Rome"}, "x": "<tool_call>"}', None, 1),
    (f"<tool_call>\n{CALL}\n</tool_call>", None, 1),
    (f"Let me see. <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", "Let me see. ", 2),
    (f"<tool_call>{CALL}", None, 1),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}, "x": "</tool_call>"}</tool_call>', None, 1),
    (f"<tool_call>{CALL} and more</tool_call>", f"<tool_call>{CALL} and more</tool_call>", 0),
    (f"<tool_call>{CALL}</tool_call> more", "more", 1),
    ("a < b <tool", "a < b <tool", 0),
    ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", 0),
]


@pytest.mark.parametrize(("text", "expected", "num_calls"), ANSWERS)
def test_calls_are_found(text: str, expected: str | None, num_calls: int) -> None:
    """Each, where the examples drawn below may leave one out."""
    check_found(ToolStream(LLAMA, TOOLS), text, [], expected, num_calls)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 120), max_size=12))
def test_calls_are_found_however_the_text_is_cut(case: tuple[str, str | None, int], cuts: list[int]) -> None:
    text, expected, num_calls = case
    check_found(ToolStream(LLAMA, TOOLS), text, cuts, expected, num_calls)


def check_found(stream: ToolStream, text: str, cuts: list[int], expected: str | None, num_calls: int) -> None:
    places = [0, *sorted(cuts), len(text)]
    said = "".join(stream.push(text[a:b]) for a, b in itertools.pairwise(places))
    rest, calls = stream.finish()
    assert said + (rest or "") == (expected or "")
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rome"}] * num_calls


@given(
    st.sampled_from(
        [
            (MISTRAL, f"[TOOL_CALLS] [{CALL}]", None, 1),
            (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", None, 2),
            (MISTRAL, f"Let me see.[TOOL_CALLS] [{CALL}] ", "Let me see.", 1),
            (MISTRAL, f"[TOOL_CALLS]{CALL}", None, 1),
            (MISTRAL, f"[TOOL_CALLS] [{CALL[:-1]}", f"[TOOL_CALLS] [{CALL[:-1]}", 0),
            (MISTRAL, "[1, 2] is a list", "[1, 2] is a list", 0),
            (MISTRAL, f"<tool_call>{CALL}</tool_call>", None, 1),
            (NAMED, f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", None, 1),
            (NAMED, f"[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS] {ARGUMENTS}", None, 1),
            (NAMED, f"So:[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]weather{ARGUMENTS}", "So:", 2),
            (NAMED, "[TOOL_CALLS]unknown[ARGS]{}", "[TOOL_CALLS]unknown[ARGS]{}", 0),
            (NAMED, "[TOOL_CALLS]weather[ARGS]", "[TOOL_CALLS]weather[ARGS]", 0),
            (FUNCTION, f"<function=weather>{ARGUMENTS}</function>\n", None, 1),
            (FUNCTION, f"<function=weather>{ARGUMENTS}</function><function=weather>{ARGUMENTS}", None, 2),
            (FUNCTION, "<function=weather>Rome</function>", "<function=weather>Rome</function>", 0),
            (LLAMA, f"<function=weather>{ARGUMENTS}</function>", f"<function=weather>{ARGUMENTS}</function>", 0),
            (CODER, f"<tool_call>\n{SPELLED}\n</tool_call>", None, 1),
            (CODER, f"So: <tool_call>{SPELLED}</tool_call>\n<tool_call>\n{SPELLED}\n</tool_call>", "So: ", 2),
            (CODER, f"So:\n{SPELLED}\n</tool_call>", "So:\n", 1),
            (CODER, f"{SPELLED}\n</tool_call>\n<tool_call>\n{SPELLED}\n</tool_call>", None, 2),
            (CODER, f"{SPELLED}{SPELLED} Done.", "Done.", 2),
            (CODER, f"<tool_call>{CALL}</tool_call>", None, 1),
            (CODER, "<tool_call>\n" + SPELLED[:-1], "<tool_call>\n" + SPELLED[:-1], 0),
            (CODER, "<function=weather>\n</parameter>\n", "<function=weather>\n</parameter>\n", 0),
            (CODER, "a <function=unknown>\n</function>", "a <function=unknown>\n</function>", 0),
            (HERMES, f"<tool_call>\n{SPELLED}\n</tool_call>", None, 1),
            (HERMES, SPELLED, SPELLED, 0),
            (HERMES, KEYED, KEYED, 0),
            (GLM, f"\n{KEYED}", None, 1),
            (GLM, f"\nSo:\n{KEYED}\n{KEYED}", "\nSo:\n", 2),
            (GLM, KEYED.replace("\n", "") * 2 + " Done.", "Done.", 2),
            (GLM, f"<tool_call>\n{CALL}\n</tool_call>", None, 1),
            (GLM, f"{KEYED[:-1]}", KEYED[:-1], 0),
            (GLM, KEYED.replace("weather", "unknown"), KEYED.replace("weather", "unknown"), 0),
            (GRANITE, f"<|tool_call|>[{CALL}, {CALL}]", None, 2),
            (GRANITE, f"<|tool_call|> [\n {CALL},\n {CALL}\n]\n", None, 2),
            (GRANITE, f"Let me see.<|tool_call|>[{CALL}] and more", "Let me see.and more", 1),
            (GRANITE, f"<|tool_call|>{CALL}", None, 1),
            (GRANITE, f"<tool_call>[{CALL}, {CALL}]", None, 2),
            (GRANITE, f"<|tool_call|><tool_call>[{CALL}]", None, 1),
            (GRANITE, f"<tool_call>{CALL}</tool_call>", None, 1),
            (GRANITE, "<|tool_call|>[]", "<|tool_call|>[]", 0),
            (GRANITE, "a <|tool_calls", "a <|tool_calls", 0),
            (GRANITE, '<|tool_call|>[{"name": "unknown"}]', '<|tool_call|>[{"name": "unknown"}]', 0),
            (PHI, f"<|tool_call|>[{CALL}, {CALL}]<|/tool_call|>", None, 2),
            (PHI, f"<|tool_call|>{CALL}<|/tool_call|><|tool_call|>{CALL}<|/tool_call|>", None, 2),
            (PHI, f"So: <|tool_call|>[{CALL}]", "So: ", 1),
        ]
    ),
    st.lists(st.integers(0, 100), max_size=12),
)
def test_calls_of_other_forms_are_found(case: tuple[ToolForm, str, str | None, int], cuts: list[int]) -> None:
    form, text, expected, num_calls = case
    check_found(ToolStream(form, TOOLS), text, cuts, expected, num_calls)


def test_ids_of_calls_are_those_that_the_template_takes() -> None:
    for form, length in ((LLAMA, 29), (MISTRAL, 9), (NAMED, 9)):
        ids = {form.new_id() for _ in range(50)}
        assert len(ids) == 50
        assert all(len(name) == length and name.replace("_", "").isalnum() for name in ids)


@pytest.mark.parametrize(("field", "expected"), [({}, 2), ({"parallel_tool_calls": False}, 1)])
def test_one_call_where_several_are_not_wanted(field: dict[str, bool], expected: int) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **field}
    request: Any = None
    piece = the_pieces(body, LLAMA).take(Choice(0, 0), Event(request, None, f"{CALL};{CALL}", None, "stop"))
    assert (len(piece.calls), piece.reason) == (expected, "tool_calls")


def test_an_answer_by_a_schema_streams_beside_tools() -> None:
    answer = '{"city": "<tool_call>", "now": 1}'
    for form, expected in (
        *((form, [*answer, ""]) for form in FORMS if form.tag),
        (LLAMA, [*[""] * len(answer), answer]),
    ):  # LLAMA's calls begin alike
        form_of_answers = {"response_format": {"type": "json_object"}}
        body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **form_of_answers}
        pieces = pieces_of(the_pieces(body, form), answer)
        assert [piece.text for piece in pieces] == expected
        assert (pieces[-1].calls, pieces[-1].reason) == ([], "stop")


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
def test_calls_are_found_behind_text_where_the_grammar_is_the_clients_own(form: ToolForm) -> None:
    written = f"So: {form.opening}{CALL}{form.closing}"
    source = {"grammar": f"start: {json.dumps(written)}"}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "structured_outputs": source}
    pieces = pieces_of(the_pieces(body, form), written)
    assert "".join(piece.text for piece in pieces) == "So: "
    assert [len(pieces[-1].calls), pieces[-1].reason] == [1, "tool_calls"]


@given(st.text(alphabet='{}[]"<tol_ca>/;: \nTOLCASRG|', max_size=60), st.sampled_from(FORMS))
def test_no_text_is_lost_or_breaks_the_parser(text: str, form: ToolForm) -> None:
    stream = ToolStream(form, TOOLS)
    said = "".join(map(stream.push, text))
    rest, calls = stream.finish()
    assert calls == []
    assert said + (rest or "") == text
