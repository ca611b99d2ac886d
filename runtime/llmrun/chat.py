"""Messages to a prompt, with the chat template of the checkpoint.

In: messages, `{"role": ..., "content": ...}`. Out: the rendered prompt, or its ids. The template language and
its names are those of transformers' `apply_chat_template`: Jinja with `trim_blocks`, `lstrip_blocks`, loop
controls, `generation` blocks, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
Templates come from artifacts only, never from a request.

A template is a program that came with the model. It cannot reach the host: Jinja's immutable sandbox, a list
of allowed filters, no attributes with an underscore. What it may use up is bounded as far as one process can
do so without helpers:

    bounded      the template's own text, the messages' and the prompt's; time in Python code (loops, recursion,
                 macros), checked at every line; results of `+`, `*`, `**`, `%`, `~`, join, replace, indent and
                 padding
    not bounded  one operation that C code carries out in one go on a large object which the template has
                 built piece by piece, such as printing a list that holds itself many times over

Special tokens that a *message* contains are text: they are marked before rendering and encoded as plain
characters, while the template's own are ids. The idea is that of `mark_control_tokens` in transformers. A
template that takes a marked text apart can at worst turn a special token of its own into text, not the other
way round.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llmrun.errors import UsageError
from llmrun.template_tags import template_extensions

if TYPE_CHECKING:
    from types import FrameType

    from llmrun.tokenizer import Tokenizer

__all__ = ["MAX_CHAT_CHARS", "MAX_RENDER_S", "encode_chat", "extend_chat", "render_chat"]

MAX_CHAT_CHARS = 1 << 20  # of a template, of all messages together, and of the rendered prompt
MAX_RENDER_S = 2.0
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_MAX_INDENT = 100
_MAX_BITS = 4096  # of an integer that a template computes
# Jinja's filters without those that build much from little, reach attributes by name, or have no business in
# a prompt.
_FILTERS = frozenset(
    (
        *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
        *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
        *("reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "truncate"),
        *("unique", "upper"),
    )
)
_PADDING = frozenset(["center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"])
_WIDTH = re.compile(r"\d{4}|\*")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the prompt for messages.

    Args:
        tokenizer: has the template and the texts of the BOS and EOS tokens.
        messages: each with a role (system, user, assistant, tool) and a content, both text, and maybe a name,
            tool_calls (a list of JSON) and tool_call_id; what order they may have is the template's affair.
        add_generation_prompt: end with what comes before an answer.
        tools: JSON schemas of functions, for templates that know tools.
    Raises:
        UsageError: no template, malformed messages, or the template refuses them, fails or does not end (with
        its own text).
    """
    _check_messages(messages)
    return _render(tokenizer, messages, add_generation_prompt, tools)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Return the ids of the prompt for messages; special tokens in messages and tools are plain text.

    The ids are those of transformers' `apply_chat_template(tokenize=True)` unless a message holds the text of
    a special token. No BOS is added: the template writes it where the model wants one.

    Raises:
        UsageError: as `render_chat`.
    """
    _check_messages(messages)
    marks = _unused_characters(tokenizer, [messages, tools])
    prompt = _render_marked(tokenizer, messages, marks, add_generation_prompt, tools)
    if marks[0] not in prompt and marks[1] not in prompt:
        return tokenizer.encode(prompt, add_bos=False, parse_special=True)
    return tokenizer.encode_segments(_segments(tokenizer, prompt, marks))


def extend_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> list[int] | None:
    """Return the ids of the prompt for messages as an extension of the ids that an earlier turn went through.

    So the computed part of a conversation is used again: the text of an answer, encoded anew, may give other tokens
    than those that the model wrote. The answer's own tokens stay, with the white space at their edges.

    Args:
        tokenizer: as `render_chat`.
        messages: of which the last is the new turn, the one before it the answer to those before.
        prompt_ids: of the messages before the answer, from this function or `encode_chat`.
        answer_ids: what the model wrote, without the end token.
    Returns:
        None where the template does not allow it: it renders earlier turns in another way once more follow, or the
        answer is not the text of its ids.
    Raises:
        UsageError: as `render_chat`.
    """
    _check_messages(messages)
    marks = _unused_characters(tokenizer, messages)
    before = _render_marked(tokenizer, messages[:-2], marks, True)
    whole = _render_marked(tokenizer, messages, marks, True)
    written = b"".join(map(tokenizer.token_bytes, answer_ids)).decode("utf-8", "replace")
    answer = tokenizer.mark_special(written.strip(), *marks)
    rest = whole.removeprefix(before).lstrip()
    if not answer or not whole.startswith(before) or not rest.startswith(answer):
        return None
    if messages[-2]["content"].strip() != written.strip():
        return None
    rest = rest.removeprefix(answer).removeprefix(written[len(written.rstrip()) :])
    last = answer_ids[-1]  # what follows it is not the beginning of a text
    return [*prompt_ids, *answer_ids, *tokenizer.encode_segments([last, *_segments(tokenizer, rest, marks)])[1:]]


def _render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    marks: tuple[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render messages with marks around the special tokens that they hold."""

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return tokenizer.mark_special(value, *marks)
        if isinstance(value, Mapping):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    return _render(tokenizer, mark(list(messages)), add_generation_prompt, None if tools is None else mark(list(tools)))


def _segments(tokenizer: Tokenizer, prompt: str, marks: tuple[str, str]) -> list[str | int]:
    """Split a marked prompt into text and the template's special tokens.

    It is alternately what the template wrote and what a message brought; a mark that lost its partner is dropped, but
    cuts.
    """
    opening, closing = marks
    segments: list[str | int] = []
    for i, piece in enumerate(re.split(f"{opening}([^{opening}{closing}]*){closing}|[{opening}{closing}]", prompt)):
        if i % 2 == 1 and piece is not None:
            _append_text(segments, piece)
        elif piece:
            for segment in tokenizer.split_special(piece):
                if isinstance(segment, str):
                    _append_text(segments, segment)
                else:
                    segments.append(segment)
    return segments


def _append_text(segments: list[str | int], text: str) -> None:
    """Join text that was only cut by marks: as plain text it may form common tokens, never a special one."""
    if segments and isinstance(segments[-1], str):
        segments[-1] += text
    elif text:
        segments.append(text)


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _unused_characters(tokenizer: Tokenizer, given: Any) -> tuple[str, str]:
    """Return two private-use characters that neither what is given nor the template holds, so nobody can forge a mark."""
    used = set(tokenizer.chat_template or "").union(*_texts(given))
    unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    try:
        return next(unused), next(unused)
    except StopIteration:
        raise UsageError("chat: the messages use every private-use character of Unicode") from None


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UsageError("chat: expected a list of at least one message")
    size = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= _KEYS:
            names = ", ".join(sorted(_KEYS - {"role", "content"}))
            found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise UsageError(f"chat: message {i} has {found}: expected role and content (and no others than {names})")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise UsageError(f"chat: message {i}: role is {role!r}: expected one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"chat: message {i}: content is {type(content).__name__}: expected text")
        size += sum(map(len, _texts({key: value for key, value in message.items() if key != "role"})))
    if size > MAX_CHAT_CHARS:
        raise UsageError(f"chat: the messages have {size} characters: at most {MAX_CHAT_CHARS} are allowed")


class _LimitExceededError(BaseException):
    """Stops a template; no Exception, so that nothing inside Jinja takes it for an error of its own and goes on."""


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    source = tokenizer.chat_template
    if source is None:
        raise UsageError("chat: this artifact has no chat template: use `llmrun generate`, which takes plain text")
    if len(source) > MAX_CHAT_CHARS:
        raise UsageError(f"chat: the template has {len(source)} characters: at most {MAX_CHAT_CHARS} are allowed")
    variables = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None if tools is None else list(tools),
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
    }
    try:
        return _within_limits(lambda: _bounded_join(_compile(source).generate(variables)))
    except _LimitExceededError as error:
        raise UsageError(f"chat: the template was stopped: {error}") from None
    except Exception as error:
        # jinja2's errors, and whatever Python raises on behalf of a template: TypeError, OverflowError,
        # RecursionError...
        text = str(error) or type(error).__name__
        raise UsageError(f"chat: the template refuses these messages or is wrong: {text[:500]}") from error


def _bounded_join(pieces: Any) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_CHAT_CHARS:
            raise _LimitExceededError(f"its output is longer than {MAX_CHAT_CHARS} characters")
        kept.append(piece)
    return "".join(kept)


def _within_limits(render: Callable[[], str]) -> str:
    """Run render under a trace function, which sees every line and every result of Python code in this thread.

    Time is the thread's own: on a busy machine a harmless template takes seconds.
    """
    deadline = time.thread_time() + MAX_RENDER_S

    def trace(_frame: FrameType, event: str, value: Any) -> Any:
        if time.thread_time() > deadline:
            raise _LimitExceededError(f"it took more than {MAX_RENDER_S:g} s of processor time")
        if event == "return" and isinstance(value, str) and len(value) > MAX_CHAT_CHARS:
            raise _LimitExceededError(f"it built a text longer than {MAX_CHAT_CHARS} characters")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(outer)


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Any:
    return _environment().from_string(source)


@functools.cache
def _environment() -> Any:
    """Make the sandbox; a function, because the import of jinja2 is not needed to load this module."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.filters import do_indent
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def limit(size: int) -> None:
        if size > MAX_CHAT_CHARS:
            raise SecurityError(f"an operation would build {size} characters or items")

    def join(value: Any, d: str = "", attribute: None = None) -> str:
        if attribute is not None:
            raise SecurityError("join(attribute=...) is not available: use map(attribute=...)")
        texts = [str(item) for item in value]
        limit(sum(map(len, texts)) + len(d) * len(texts))
        return d.join(texts)

    def replace(text: Any, old: str, new: str, count: int = -1) -> str:
        text = str(text)
        limit(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        width = width if isinstance(width, str) else min(width, _MAX_INDENT)
        limit(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        return do_indent(text, width, first, blank)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        indent = None if indent is None else min(int(indent), 8)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # the user's own clock, as in transformers

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, str):
                _check_format(left)
            elif operator == "**":
                if not isinstance(right, (int, float)) or abs(right) > 64:
                    raise SecurityError("** with an exponent above 64")
            elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
                limit(len(left) + len(right))
            elif operator == "*":
                for sequence, times in ((left, right), (right, left)):
                    if hasattr(sequence, "__len__") and isinstance(times, int):
                        limit(len(sequence) * max(times, 0))
            for number in (left, right):
                if isinstance(number, int) and number.bit_length() > _MAX_BITS:
                    raise SecurityError(f"a number of more than {_MAX_BITS} bits")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None and ":" in value.__self__:
                raise SecurityError("str.format with a format specification is not available")
            return wrapped

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            text = getattr(obj, "__self__", None)
            if isinstance(text, str) and obj.__name__ == "join":
                obj = functools.partial(join, d=text)
            elif isinstance(text, str) and obj.__name__ == "replace":
                obj = functools.partial(replace, text)
            return super().call(context, obj, *args, **kwargs)

    def _check_format(form: str) -> None:
        if _WIDTH.search(form):
            raise SecurityError("a format with a width above 999")

    # Folding constants would run a template's operations while it is compiled.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=template_extensions(), optimized=False)
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.filters.update(join=join, replace=replace, indent=indent, tojson=tojson)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
