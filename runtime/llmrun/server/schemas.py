"""The table of fields of every request, and the parameters that a checked request gives.

A field that is known and whose value cannot be honoured is an error; a field that is unknown is ignored, and named in
the header `x-llmrun-ignored`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrun.server.errors import bad
from llmrun.server.fields import (
    AnyObject,
    Anything,
    Either,
    Flag,
    Kind,
    ListOf,
    MapOf,
    Number,
    Only,
    Record,
    Text,
    unknown_fields,
)
from llmrun.server.grammar import lenient
from llmrun.server.limits import Limits
from llmrun.server.responses_input import responses_record
from llmrun.text_stream import MAX_STOP_CHARS

if TYPE_CHECKING:
    from llmrun.constraint import Constraint

MAX_TOKENS = 1 << 31
_NOTHING = Anything()


@dataclass(frozen=True)
class Sampled:
    """What both kinds of completion have in common, ready for the engine; None: the artifact's default."""

    max_tokens: int | None
    n: int
    stop: list[str]
    ignore_eos: bool
    sampling: dict[str, Any]
    logit_bias: dict[int, float]
    seed: int | None
    stream: bool
    include_usage: bool
    grammar: tuple[str, Any] | None  # a kind that `llmrun.server.grammar` knows, and its source

    def options(self, constraint: Constraint | None, i: int) -> dict[str, Any]:
        """Return what the engine is asked of the i-th answer, but for its length and log-probabilities."""
        return {
            "stop": self.stop,
            "ignore_eos": self.ignore_eos and constraint is None,
            "logit_bias": self.logit_bias or None,
            "constraint": constraint,
            "seed": None if self.seed is None else (self.seed + i) % 2**63,
            **self.sampling,
        }


@dataclass(frozen=True)
class CompletionCall:
    """A request to /v1/completions."""

    model: str | None
    prompts: list[str | list[int]]
    echo: bool
    logprobs: int | None
    sampled: Sampled


@dataclass(frozen=True)
class ChatCall:
    """A request to /v1/chat/completions; `tool_choice` is none, auto, required, or a function's name after "="."""

    model: str | None
    messages: list[dict[str, Any]]
    top_logprobs: int | None
    tools: list[dict[str, Any]]
    tool_choice: str
    may_call_several: bool
    chat_template_kwargs: dict[str, Any]
    sampled: Sampled


class Schemas:
    """Checks requests against one server's limits."""

    def __init__(self, limits: Limits, efforts: tuple[str, ...] = ()) -> None:
        """Build the tables; `efforts`: what the model's template knows as `reasoning_effort`."""
        text = Text(limits.max_body_bytes)
        ids = ListOf(Number(0, MAX_TOKENS, whole=True), limits.max_body_bytes)
        common = _common(limits)
        part = Record({"type": Text(64), "text": text}, required=("type",))
        function = Record({"name": Text(64, 1), "arguments": text}, required=("name", "arguments"))
        call = Record(
            {"id": Text(256), "type": Text(choices=("function",)), "function": function}, required=("function",)
        )
        message = Record(
            {
                "role": Text(choices=("system", "developer", "user", "assistant", "tool")),
                "content": Either(((str, text), (list, ListOf(part, 256)))),
                "name": Text(64, 1),
                "tool_calls": ListOf(call, limits.max_tools),
                "tool_call_id": Text(256),
                "reasoning_content": text,
            },
            required=("role",),
        )
        tool = Record(
            {
                "type": Text(choices=("function",)),
                "function": Record(
                    {"name": Text(64, 1), "description": text, "parameters": AnyObject(), "strict": Flag()},
                    required=("name",),
                ),
            },
            required=("type", "function"),
        )
        named = Record(
            {"type": Text(choices=("function",)), "function": Record({"name": Text(64, 1)}, required=("name",))},
            required=("type", "function"),
        )
        self.completion = Record(
            {
                **common,
                "prompt": Either(((str, text), (list, _Prompts(text, ids, limits.max_prompts)))),
                "max_tokens": Number(0, MAX_TOKENS, whole=True),
                "echo": Flag(),
                "logprobs": Number(0, limits.max_top_logprobs, whole=True),
                "best_of": Number(1, limits.max_choices, whole=True),
                "suffix": Only(("",)),
            },
            required=("prompt",),
        )
        self.chat = Record(
            {
                **common,
                "messages": ListOf(message, limits.max_messages, 1),
                "max_tokens": Number(1, MAX_TOKENS, whole=True),
                "max_completion_tokens": Number(1, MAX_TOKENS, whole=True),
                "logprobs": Flag(),
                "top_logprobs": Number(0, limits.max_top_logprobs, whole=True),
                "tools": ListOf(tool, limits.max_tools),
                "tool_choice": Either(((str, Text(choices=("none", "auto", "required"))), (dict, named))),
                "parallel_tool_calls": Flag(),
                "chat_template_kwargs": AnyObject(),
                **({"reasoning_effort": Text(choices=efforts)} if efforts else {}),
                "modalities": Only((["text"],)),
                "audio": Only(()),
                "functions": Only(([],)),
                "function_call": Only(("none",)),
            },
            required=("messages",),
        )
        self.responses = responses_record(limits, self.chat)
        self.tokenize = Record(
            {"model": Text(256), "prompt": text, "messages": ListOf(message, limits.max_messages, 1)}
            | {name: Flag() for name in ("add_special_tokens", "add_generation_prompt", "return_token_strs")}
            | {"chat_template_kwargs": AnyObject()}
        )
        self.detokenize = Record({"model": Text(256), "tokens": ids}, required=("tokens",))

    def completion_call(self, body: Any) -> CompletionCall:
        """Check a request to /v1/completions.

        Raises:
            ApiError: 400.
        """
        given = self.completion.check(body, "")
        prompt = given["prompt"]
        prompts: list[str | list[int]] = (
            [prompt] if isinstance(prompt, str) or not isinstance(prompt[0], (str, list)) else prompt
        )
        sampled = self._sampled(given, given.get("max_tokens", 16))
        if given.get("best_of", sampled.n) != sampled.n:
            raise bad(f"best_of is {given['best_of']}: this server only supports the value of n.", "best_of")
        echo = given.get("echo", False)
        if sampled.max_tokens == 0 and not echo:
            raise bad("max_tokens is 0: expected 1 or more, or echo.", "max_tokens")
        return CompletionCall(given.get("model"), prompts, echo, given.get("logprobs"), sampled)

    def chat_call(self, body: Any) -> ChatCall:
        """Check a request to /v1/chat/completions.

        Raises:
            ApiError: 400.
        """
        given = self.chat.check(body, "")
        tools = given.get("tools", [])
        choice = given.get("tool_choice", "auto" if tools else "none")
        names = [tool["function"]["name"] for tool in tools]
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            if name not in names:
                raise bad(f"tool_choice names {name!r}, which is not one of the tools.", "tool_choice")
            choice = f"={name}"
        if choice in ("auto", "required") and not tools:
            raise bad(f"tool_choice is {choice}, but there are no tools.", "tool_choice")
        if len(set(names)) != len(names):
            raise bad("two tools have the same name.", "tools")
        top = given.get("top_logprobs")
        if top is not None and not given.get("logprobs"):
            raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
        max_tokens = given.get("max_completion_tokens", given.get("max_tokens"))
        sampled = self._sampled(given, max_tokens)
        # A response_format is of an answer's text, and agents send it with each turn, also where a call is demanded.
        others = [name for name in given if name == "structured_outputs" or name.startswith("guided_")]
        if sampled.grammar is not None and others and choice not in ("none", "auto"):
            raise bad(f"tool_choice already decides the form of the answer: leave {others[0]} out.", others[0])
        return ChatCall(
            given.get("model"),
            given["messages"],
            (top or 0) if given.get("logprobs") else None,
            tools,
            choice,
            given.get("parallel_tool_calls", True),
            {name: given[name] for name in ("reasoning_effort",) if name in given}
            | given.get("chat_template_kwargs", {}),
            sampled,
        )

    def ignored(self, record: Record, body: Any) -> list[str]:
        """Return the names of a body's fields that have no effect, each once."""
        return list(dict.fromkeys(unknown_fields(record, body)))

    def _sampled(self, given: Mapping[str, Any], max_tokens: int | None) -> Sampled:
        stop = given.get("stop", [])
        options = given.get("stream_options", {})
        if options and not given.get("stream"):
            raise bad("stream_options needs stream: true.", "stream_options")
        names = {"temperature": "temperature", "min_p": "min_p", "presence_penalty": "presence_penalty"}
        names |= {"frequency_penalty": "frequency_penalty", "repetition_penalty": "repeat_penalty"}
        sampling = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
        if "top_p" in given:
            sampling["top_p"] = max(given["top_p"], 1e-6)  # OpenAI's 0 means the likeliest token
        if "top_k" in given:
            sampling["top_k"] = max(given["top_k"], 0)  # vLLM's "all" is -1
        seed = given.get("seed")
        return Sampled(
            max_tokens=max_tokens,
            n=given.get("n", 1),
            stop=[stop] if isinstance(stop, str) else stop,
            ignore_eos=given.get("ignore_eos", False),
            sampling=sampling,
            logit_bias=given.get("logit_bias", {}),
            seed=None if seed is None else seed % 2**63,
            stream=given.get("stream", False),
            include_usage=options.get("include_usage", False),
            grammar=_grammar(given),
        )


@dataclass(frozen=True)
class _Prompts:
    """`[str]`, `[int]` or `[[int]]`, told apart by the first item."""

    text: Text
    ids: ListOf
    most: int

    def check(self, value: Any, where: str) -> list[Any]:
        """See `Kind`."""
        if not isinstance(value, list) or not value:
            raise bad(f"{where} is an empty list: expected at least one prompt.", where)
        if isinstance(value[0], str):
            return ListOf(self.text, self.most, 1).check(value, where)
        if isinstance(value[0], list):
            return ListOf(ListOf(self.ids.item, self.ids.most, 1), self.most, 1).check(value, where)
        return self.ids.check(value, where)

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        one = {**self.ids.schema(), "minItems": 1}
        many = {"type": "array", "items": one, "minItems": 1, "maxItems": self.most}
        return {"anyOf": [ListOf(self.text, self.most, 1).schema(), one, many]}


def _common(limits: Limits) -> dict[str, Kind]:
    source = Text(limits.max_schema_bytes, 1)
    schema = Either(((dict, AnyObject()), (str, source)))
    choices = ListOf(Text(limits.max_schema_bytes, 1), limits.max_enum, 1)
    structured = {"json": schema, "regex": source, "choice": choices, "grammar": source, "json_object": Flag()}
    stop = Text(MAX_STOP_CHARS, 1)
    return {
        "model": Text(256),
        "temperature": Number(0, 100),
        "top_p": Number(0, 1),
        "top_k": Number(-1, MAX_TOKENS, whole=True),
        "min_p": Number(0, 0.999999),
        "presence_penalty": Number(-2, 2),
        "frequency_penalty": Number(-2, 2),
        "repetition_penalty": Number(0.01, 10),
        "logit_bias": MapOf(Number(-100, 100), limits.max_logit_bias),
        "seed": Number(-(2**63), 2**64 - 1, whole=True),
        "n": Number(1, limits.max_choices, whole=True),
        "stop": Either(((str, stop), (list, ListOf(stop, limits.max_stops)))),
        "ignore_eos": Flag(),
        "stream": Flag(),
        "stream_options": Record({"include_usage": Flag(), "include_obfuscation": Flag()}),
        "response_format": Record(
            {
                "type": Text(choices=("text", "json_object", "json_schema")),
                "schema": AnyObject(),  # llama.cpp's, for json_object
                "json_schema": Record(
                    {"name": Text(64), "description": Text(4096), "schema": AnyObject(), "strict": Flag()},
                    required=("schema",),
                ),
            },
            required=("type",),
        ),
        "structured_outputs": Record(structured, closed=True),
        **{f"guided_{name}": kind for name, kind in structured.items() if name != "json_object"},
        "min_tokens": Only((0,)),
        "stop_token_ids": Only(([],)),
        "use_beam_search": Only((False,)),
        # Accepted without effect: they say who asks, or where the answer is to be kept.
        **dict.fromkeys(
            ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), _NOTHING
        ),
    }


def _grammar(given: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the one form that the request demands of the answer."""
    found: list[tuple[str, Any]] = []
    form = given.get("response_format", {"type": "text"})
    if form["type"] == "json_object":
        found.append(("json", form.get("schema", {"type": "object"})))
    elif "schema" in form:
        raise bad("response_format.schema is for json_object: others have json_schema.schema.", "response_format")
    elif form["type"] == "json_schema":
        if "json_schema" not in form:
            raise bad("response_format.json_schema is missing.", "response_format")
        schema = form["json_schema"]["schema"]
        # Whoever says that it need not be strict looks at the answer himself.
        found.append(("json", lenient(schema) if form["json_schema"].get("strict") is False else schema))
    for kind, source in given.get("structured_outputs", {}).items():
        if kind == "json_object":
            found += [("json", {"type": "object"})] if source else []
        else:
            found.append((kind, source))
    found += [(name.removeprefix("guided_"), source) for name, source in given.items() if name.startswith("guided_")]
    if any(one != found[0] for one in found):  # equal ones come from clients that speak to old and new servers at once
        raise bad("response_format, structured_outputs and guided_*: give one of them.", "response_format")
    return found[0] if found else None
