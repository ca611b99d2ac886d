"""Requests to `/v1/responses`: their fields, and the chat that they mean.

The server keeps no conversation: each request brings all of it. So what refers to earlier ones is refused, and `store` has no
effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrun.server.errors import ApiError, bad
from llmrun.server.fields import AnyObject, Anything, Either, Flag, ListOf, Only, Record, Text
from llmrun.server.limits import Limits

# Fields of a chat that a request has as well.
_SHARED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *(
        "logit_bias",
        "seed",
        "stop",
        "ignore_eos",
        "stream",
        "structured_outputs",
        "top_logprobs",
        "parallel_tool_calls",
    ),
    *("chat_template_kwargs", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
)
_RENAMED = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
_LOGPROBS = "message.output_text.logprobs"
_NOTHING = Anything()


def responses_record(limits: Limits, chat: Record) -> Record:
    """Return the table of a request's fields, of which some are those of a chat."""
    text, name = Text(limits.max_body_bytes), Text(64, 1)
    effort = chat.fields.get("reasoning_effort")  # where the model's template has a place for it
    function: Any = chat.fields["tools"]
    of_function = {"type": Text(choices=("function",))}
    tool = _Tool(Record({**of_function, **function.item.fields["function"].fields}, required=("type", "name")))
    named = _Typed(Record({**of_function, "name": name}, required=("type", "name")))
    form = Record(
        {
            "type": Text(choices=("text", "json_object", "json_schema")),
            "name": Text(64),
            "description": Text(4096),
            "schema": AnyObject(),
            "strict": Flag(),
        },
        required=("type",),
    )
    return Record(
        {
            **{field: chat.fields[field] for field in _SHARED},
            "input": Either(((str, text), (list, ListOf(_Item(limits), limits.max_messages, 1)))),
            "instructions": text,
            "max_output_tokens": chat.fields["max_tokens"],
            "tools": ListOf(tool, limits.max_tools),
            "tool_choice": Either(((str, Text(choices=("none", "auto", "required"))), (dict, named))),
            "text": Record({"format": form, "verbosity": _NOTHING}),
            "stream_options": Record({"include_obfuscation": Flag()}),
            "include": ListOf(Text(64), 16),
            "reasoning": _NOTHING if effort is None else Record({"effort": effort, "summary": _NOTHING}),
            "prompt_cache_retention": _NOTHING,
            "max_tool_calls": _NOTHING,
            "truncation": Only(("disabled",)),
            "background": Only((False,)),
            "previous_response_id": Only(()),
            "conversation": Only(()),
            "prompt": Only(()),
        },
        required=("input",),
    )


class _Typed:
    """A record of a type that must be known before the rest means anything."""

    def __init__(self, record: Record) -> None:
        self._type, self._record = Record({"type": record.fields["type"]}, required=("type",)), record

    def check(self, value: Any, where: str) -> dict[str, Any]:
        """See `Kind`."""
        return self._type.check(value, where) | self._record.check(value, where)

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return self._record.schema()


class _Tool(_Typed):
    """A function; agents offer tools that OpenAI's servers run, or groups of them, as long as nobody switches these off."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        """See `Kind`."""
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise bad(
                f"{where} is of type {kind[:40]!r}, and this server only knows functions: switch it off in the client.",
                f"{where}.type",
                "unsupported_value",
            )
        return super().check(value, where)


class _Item:
    """One item of the input, by its type; without one it is a message."""

    def __init__(self, limits: Limits) -> None:
        text, name = Text(limits.max_body_bytes), Text(64, 1)
        part = Record({"type": Text(64), "text": text, "refusal": text}, required=("type",))
        content = Either(((str, text), (list, ListOf(part, 256))))
        # What an answer's items have besides, and what comes back with them.
        extra = {"id": Text(256), "status": Text(64), "type": Text(64)}
        role = Text(choices=("user", "system", "developer", "assistant"))
        call_id = Text(256, 1)
        self._kinds = {
            "message": Record(
                {**extra, "role": role, "content": content, "phase": _NOTHING}, required=("role", "content")
            ),
            "function_call": Record(
                {**extra, "call_id": call_id, "name": name, "arguments": text},
                required=("call_id", "name", "arguments"),
            ),
            "function_call_output": Record(
                {**extra, "call_id": call_id, "output": content}, required=("call_id", "output")
            ),
            "reasoning": Record(
                {**extra, "content": ListOf(part, 256), "summary": ListOf(part, 256), "encrypted_content": _NOTHING}
            ),
        }

    def check(self, value: Any, where: str) -> dict[str, Any]:
        """See `Kind`."""
        kind = value.get("type") or "message" if isinstance(value, dict) else "message"
        if kind == "item_reference":
            raise bad(
                f"{where} refers to an item of an earlier answer, and this server keeps none: send the item itself, as "
                "clients do that are told store: false (the AI SDK: in providerOptions.openai).",
                f"{where}.type",
                "unsupported_value",
            )
        if not isinstance(kind, str) or kind not in self._kinds:
            known = ", ".join(self._kinds)
            raise bad(
                f"{where}.type is {str(kind)[:40]!r}: this server knows {known}.", f"{where}.type", "unsupported_value"
            )
        return {**self._kinds[kind].check(value, where), "type": kind}

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"anyOf": [kind.schema() for kind in self._kinds.values()]}


def chat_body(body: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a chat that means what a request does.

    Args:
        body: the request as it came, because a chat's fields will be checked as such.
        given: the same, checked.
    Raises:
        ApiError: 400: an item holds something else than text.
    """
    chat = {name: body[name] for name in _SHARED if name in given}
    chat["messages"] = _messages(given)
    if "max_output_tokens" in given:
        chat["max_tokens"] = given["max_output_tokens"]
    if _LOGPROBS in given.get("include", ()) or "top_logprobs" in given:
        chat["logprobs"] = True
    if tools := given.get("tools"):
        chat["tools"] = [
            {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}} for tool in tools
        ]
    choice = given.get("tool_choice")
    if choice is not None and (choice != "auto" or tools):  # OpenAI's default here, tools or not
        chat["tool_choice"] = (
            choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice["name"]}}
        )
    if isinstance(reasoning := given.get("reasoning"), Mapping) and "effort" in reasoning:
        chat["reasoning_effort"] = reasoning["effort"]
    if (form := given.get("text", {}).get("format")) is not None:
        chat["response_format"] = _response_format(form)
    return chat


def renamed(error: ApiError) -> ApiError:
    """Return an error of the chat as one of the request, which has other names for some fields."""
    if (name := error.param) in _RENAMED:
        error.param = _RENAMED[name]
        if error.message.startswith(name):
            error.message = error.param + error.message.removeprefix(name)
    elif name is not None and name.startswith("messages["):  # calls of one turn, say, which are too many together
        error.param, error.message = "input", f"input means a chat that is refused: {error.message}"
    return error


def _response_format(form: Mapping[str, Any]) -> dict[str, Any]:
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    if "schema" not in form:
        raise bad("text.format.schema is missing.", "text.format.schema", "missing_required_parameter")
    return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a chat: thoughts, text and calls that follow each other are one of the assistant."""
    messages: list[dict[str, Any]] = []
    if "instructions" in given:
        messages.append({"role": "system", "content": given["instructions"]})
    items = given["input"]
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    turn: dict[str, Any] | None = None  # the assistant's, while it goes on
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if item["type"] == "function_call_output":
            turn = None
            content = _text(item["output"], f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
            continue
        if item["type"] == "message" and item["role"] != "assistant":
            turn = None
            messages.append({"role": item["role"], "content": _text(item["content"], f"{where}.content")})
            continue
        # What cannot follow what the turn has begins another one.
        is_text, is_thought = item["type"] == "message", item["type"] == "reasoning"
        if turn is None or (is_thought and len(turn) > 1) or (is_text and ("content" in turn or "tool_calls" in turn)):
            turn = {"role": "assistant"}
            messages.append(turn)
        if is_text:
            turn["content"] = _text(item["content"], f"{where}.content")
        elif is_thought:
            turn["reasoning_content"] = _text(item.get("content", []), f"{where}.content")
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": call})
    # Thoughts without anything behind them: an answer that was cut off.
    messages = [message for message in messages if message.keys() - {"role", "reasoning_content"}]
    if not messages:
        raise bad("input has no message, only thoughts: expected at least one.", "input")
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        text = part.get("text", part.get("refusal"))
        if text is None and part["type"].endswith("text"):
            raise bad(f"{where}[{i}].text is missing.", f"{where}[{i}].text", "missing_required_parameter")
        if text is None:
            raise bad(f"{where}[{i}] is of type {part['type'][:40]!r}: this model only reads text.", where)
        texts.append(text)
    return "".join(texts)
