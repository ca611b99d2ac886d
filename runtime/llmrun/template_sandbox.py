"""Run a chat template: a program that came with the model, which may neither reach the host nor use it up.

In: the template's text and its variables. Out: what it writes. It cannot reach the host: Jinja's immutable sandbox, a
list of allowed filters, no attributes with an underscore. What it may use up is bounded as far as one process can do so
without helpers:

    bounded      the template's own text and the prompt's; time in Python code (loops, recursion, macros), checked at
                 every line; results of `+`, `*`, `**`, `%`, `~`, join, replace, indent and padding
    not bounded  one operation that C code carries out in one go on a large object which the template has
                 built piece by piece, such as printing a list that holds itself many times over

The language and its names are those of transformers' `apply_chat_template`: Jinja with `trim_blocks`, `lstrip_blocks`,
loop controls, `generation` blocks, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrun.errors import UsageError
from llmrun.template_tags import FILTERS, template_extensions

__all__ = ["MAX_CHARS", "MAX_RENDER_S", "render"]

MAX_CHARS = 1 << 20  # of a template, of anything that it builds, and of what it writes
MAX_RENDER_S = 2.0
_MAX_INDENT = 100
_MAX_BITS = 4096  # of an integer that a template computes
_PADDING = frozenset(["center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"])
_WIDTH = re.compile(r"\d{4}|\*")


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Return what the template writes.

    Raises:
        UsageError: it is too long, refuses the variables, fails or does not end (with its own text).
    """
    if len(source) > MAX_CHARS:
        raise UsageError(f"chat: the template has {len(source)} characters: at most {MAX_CHARS} are allowed")
    try:
        return _within_limits(lambda: _bounded_join(_compile(source).generate(variables)))
    except _LimitExceededError as error:
        raise UsageError(f"chat: the template was stopped: {error}") from None
    except Exception as error:
        # jinja2's errors, and whatever Python raises on behalf of a template: TypeError, OverflowError,
        # RecursionError...
        text = str(error) or type(error).__name__
        raise UsageError(f"chat: the template refuses these messages or is wrong: {text[:500]}") from error


class _LimitExceededError(BaseException):
    """Stops a template; no Exception, so that nothing inside Jinja takes it for an error of its own and goes on."""


def _bounded_join(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_CHARS:
            raise _LimitExceededError(f"its output is longer than {MAX_CHARS} characters")
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
        if event == "return" and isinstance(value, str) and len(value) > MAX_CHARS:
            raise _LimitExceededError(f"it built a text longer than {MAX_CHARS} characters")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(outer)


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> _Environment:
    # Folding constants would run a template's operations while it is compiled.
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=template_extensions(), optimized=False)
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    environment.filters.update(join=_join, replace=_replace, indent=_indent, tojson=_tojson)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _limit(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"an operation would build {size} characters or items")


def _join(value: Any, d: str = "", attribute: None = None) -> str:
    if attribute is not None:
        raise SecurityError("join(attribute=...) is not available: use map(attribute=...)")
    texts = [str(item) for item in value]
    _limit(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    _limit(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    width = width if isinstance(width, str) else min(width, _MAX_INDENT)
    _limit(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    indent = None if indent is None else min(int(indent), 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the user's own clock, as in transformers


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "**":
            if not isinstance(right, (int, float)) or abs(right) > 64:
                raise SecurityError("** with an exponent above 64")
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _limit(len(left) + len(right))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(times, int):
                    _limit(len(sequence) * max(times, 0))
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
            obj = functools.partial(_join, d=text)
        elif isinstance(text, str) and obj.__name__ == "replace":
            obj = functools.partial(_replace, text)
        return super().call(context, obj, *args, **kwargs)


def _check_format(form: str) -> None:
    if _WIDTH.search(form):
        raise SecurityError("a format with a width above 999")
