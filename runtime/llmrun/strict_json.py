"""JSON as an artifact may hold it (FORMAT 2.1): the same value to every reader, or an error.

Standard library only.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_MAX_DEPTH = 16  # of nested objects and arrays; format 1.0 needs 4
_MAX_INT = (1 << 53) - 1  # what every JSON reader holds exactly


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 as FORMAT 2.1 demands.

    Raises:
        ValueError: it is not JSON, a key occurs twice, a number is none or too large, or it is nested too deeply.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant
        )
        _check_depth(value, _MAX_DEPTH)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _integer(digits: str) -> int:
    number = int(digits)
    if abs(number) > _MAX_INT:
        raise ValueError(f"an integer beyond {_MAX_INT}")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError("nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)
