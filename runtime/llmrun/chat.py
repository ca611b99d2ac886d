"""Messages to a prompt, with the chat template of the checkpoint.

In: messages, `{"role": ..., "content": ...}`. Out: the rendered prompt, or its ids. Templates come from
artifacts only, never from a request, and run in `template_sandbox`.

Special tokens that a *message* contains are text: they are marked before rendering and encoded as plain
characters, while the template's own are ids. The idea is that of `mark_control_tokens` in transformers. A
template that takes a marked text apart can at worst turn a special token of its own into text, not the other
way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrun import template_sandbox
from llmrun.errors import UsageError
from llmrun.harmony import speaks_harmony
from llmrun.harmony_prompt import template_messages, template_tools

if TYPE_CHECKING:
    from llmrun.tokenizer import Tokenizer

__all__ = ["checked_kwargs", "encode_chat", "extend_chat", "render_chat"]

_MAX_CHARS = template_sandbox.MAX_CHARS  # of all messages together
_MAX_DEPTH = 64  # of variables: every level costs a few frames of recursion
_ROLES = ("system", "user", "assistant", "tool", "tool_response")
_TAKEN = {"messages", "add_generation_prompt", "tools", "bos_token", "eos_token"}
_KEYS = {"role", "content", "name", "tools", "tool_calls", "tool_call_id", "reasoning_content"}
_WrittenCalls = Callable[[Sequence[Mapping[str, Any]]], Iterable[tuple[str, bool]]]


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt for messages.

    Args:
        tokenizer: has the template and the texts of the BOS and EOS tokens.
        messages: each with a role (system, user, assistant, tool, or Granite 3.0's tool_response) and a content, both text,
            and maybe a name, tools (for Phi 4 mini: JSON in a text), tool_calls (a list of JSON) and tool_call_id; what
            order they may have is the template's affair.
        add_generation_prompt: end with what comes before an answer.
        tools: JSON schemas of functions, for templates that know tools.
        chat_template_kwargs: what else the template may ask for, by name: `{"enable_thinking": False}` of Qwen 3, say.
    Raises:
        UsageError: no template, malformed messages, a name that is not free, or the template refuses them, fails or does not
        end (with its own text).
    """
    _check_messages(messages)
    return _render(tokenizer, messages, add_generation_prompt, tools, checked_kwargs(chat_template_kwargs))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    written_calls: _WrittenCalls | None = None,
) -> list[int]:
    """Return the ids of the prompt for messages; special tokens in what is given are plain text.

    The ids are those of transformers' `apply_chat_template(tokenize=True)` unless a message holds the text of
    a special token. No BOS is added: the template writes it where the model wants one.

    `written_calls` is for a template that has no place for `tool_calls`: of a message's it returns what ends the content
    instead, texts, and whether special tokens in each are tokens.

    Raises:
        UsageError: as `render_chat`.
    """
    _check_messages(messages)
    kwargs = checked_kwargs(chat_template_kwargs)
    marks = _unused_characters(tokenizer, [messages, tools, kwargs])
    prompt = _render_marked(tokenizer, messages, marks, add_generation_prompt, tools, kwargs, written_calls)
    if marks[0] not in prompt and marks[1] not in prompt:
        return tokenizer.encode(prompt, add_bos=False, parse_special=True)
    return tokenizer.encode_segments(_segments(tokenizer, prompt, marks))


def extend_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int] | None:
    """Return the ids of the prompt for messages as an extension of the ids that an earlier turn went through.

    So the computed part of a conversation is used again: the text of an answer, encoded anew, may give other tokens
    than those that the model wrote. The answer's own tokens stay, with the white space at their edges.

    Args:
        tokenizer: as `render_chat`.
        messages: of which the last is the new turn, the one before it the answer to those before.
        prompt_ids: of the messages before the answer, from this function or `encode_chat`.
        answer_ids: what the model wrote, without the end token.
        chat_template_kwargs: as before the answer.
    Returns:
        None where the template does not allow it: it renders earlier turns in another way once more follow, or the
        answer is not the text of its ids.
    Raises:
        UsageError: as `render_chat`.
    """
    _check_messages(messages)
    kwargs = checked_kwargs(chat_template_kwargs)
    marks = _unused_characters(tokenizer, [messages, kwargs])
    before = _render_marked(tokenizer, messages[:-2], marks, True, None, kwargs)
    whole = _render_marked(tokenizer, messages, marks, True, None, kwargs)
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
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
    written_calls: _WrittenCalls | None = None,
) -> str:
    """Render messages with marks around the special tokens that they, and what is given beside them, hold."""

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return tokenizer.mark_special(value, *marks)
        if isinstance(value, Mapping):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    marked = None if tools is None else mark(list(tools))
    variables = {name: mark(value) for name, value in kwargs.items()}
    turns = mark(list(messages))
    if written_calls is not None:
        for message, turn in zip(messages, turns, strict=True):
            pieces = written_calls(message.get("tool_calls") or ())
            # All of what a call holds is marked, lest its end be a special token with what comes next.
            turn["content"] += "".join(text if is_own else f"{marks[0]}{text}{marks[1]}" for text, is_own in pieces)
    return _render(tokenizer, turns, add_generation_prompt, marked, variables)


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


def _items(value: Any) -> Iterable[Any]:
    """Return what lies directly in a value of JSON."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


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
    if size > _MAX_CHARS:
        raise UsageError(f"chat: the messages have {size} characters: at most {_MAX_CHARS} are allowed")


def checked_kwargs(kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the variables that a template gets beside messages and tools.

    Raises:
        UsageError: not text to values, a name that stands for something else, nested too deep, or too many characters.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UsageError(f"chat_template_kwargs: found {type(kwargs).__name__}, expected names and values")
    if taken := sorted(_TAKEN & set(kwargs)):
        raise UsageError(f"chat_template_kwargs: {taken[0]} is not free: it stands for what the chat itself says")
    level: list[Any] = [kwargs]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
    if level:
        raise UsageError(f"chat_template_kwargs: nested more than {_MAX_DEPTH} deep")
    if (size := sum(map(len, _texts(kwargs)))) > _MAX_CHARS:
        raise UsageError(f"chat_template_kwargs: found {size} characters, expected at most {_MAX_CHARS}")
    return kwargs


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> str:
    source = tokenizer.chat_template
    if source is None:
        raise UsageError("chat: this artifact has no chat template: use `llmrun generate`, which takes plain text")
    if speaks_harmony(tokenizer):
        messages, tools = template_messages(messages), tools and template_tools(tools)
    variables = {
        "documents": None,  # defined, as in transformers: templates ask `is not none`
        **kwargs,
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None if tools is None else list(tools),
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
    }
    return template_sandbox.render(source, variables)
