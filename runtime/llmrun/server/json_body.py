"""Bytes of a request to a JSON value, more strictly than `json`: no duplicate key, NaN, lone surrogate or endless number."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any, NoReturn

from llmrun.server.errors import ApiError, bad

MAX_NUMBER_CHARS = 64  # an int of 2 MB of digits takes seconds to parse


def parse_json(data: bytes, *, max_depth: int) -> Any:
    """Return the value of a JSON document.

    Raises:
        ApiError: 400, with what is wrong with it.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8: byte {error.start}.", code="invalid_json") from None
    return _decoded(lambda decoder: decoder.decode(text), max_depth)


def json_at(text: str, start: int, *, max_depth: int) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and where it ends.

    Raises:
        ApiError: 400, with what is wrong with it.
    """
    value, end = _decoded(lambda decoder: list(decoder.raw_decode(text, start)), max_depth + 1)
    return value, end


def _decoded(decode: Callable[[json.JSONDecoder], Any], max_depth: int) -> Any:
    decoder = json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=lambda digits: int(_number(digits)),
        parse_float=_float,
        parse_constant=_constant,
    )
    try:
        value = decode(decoder)
    except RecursionError:
        raise bad("the body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise bad(f"the body is not JSON: {error}.", code="invalid_json") from None
    _check(value, max_depth)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise bad(f"the key {twice[:100]!r} occurs twice.", code="invalid_json")
    return value


def _number(digits: str) -> str:
    if len(digits) > MAX_NUMBER_CHARS:
        raise bad(f"a number of {len(digits)} characters.", code="invalid_json")
    return digits


def _float(digits: str) -> float:
    value = float(_number(digits))
    if value - value != 0:
        raise bad(f"the number {digits} is out of range.", code="invalid_json")
    return value


def _constant(name: str) -> NoReturn:
    raise bad(f"{name} is not JSON.", code="invalid_json")


def _check(value: Any, max_depth: int) -> None:
    """Look at every string and the depth, without recursion."""
    level = [value]
    depth = 0
    while level:
        depth += 1
        if depth > max_depth and any(isinstance(item, (dict, list)) for item in level):
            raise bad(f"the body is nested more than {max_depth} deep.", code="invalid_json")
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for name in item:
                    _check_text(name)
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        level = deeper


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "a string holds half of a surrogate pair: not valid Unicode.", code="invalid_json"
        ) from None
