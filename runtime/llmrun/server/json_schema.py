"""What a client's JSON schema must keep before the grammar library gets it.

The library (llguidance 1.9) reads numbers as floats and bounds of integers as 64 bits, and has no limit for what
`multipleOf` costs. Beyond that it ends the process (integers from -1e19 to -1e19: a recursion without an end), takes all
memory, or lets through what the schema does not. So such schemas are refused; only bounds that no value comes near are
replaced by the farthest that it keeps. Objects are closed where the schema leaves that open.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, TypeGuard

from llmrun.server.errors import bad
from llmrun.server.limits import Limits

# What JSON Schema calls these holds schemas by name, or values that are no schemas.
MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
VALUES = frozenset(("const", "enum", "default", "examples"))
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "$comment"))
_BOUNDS = (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1))  # inclusive, exclusive, inwards
# Those that the library makes a pattern of; any other is an annotation, as JSON Schema has it.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
# Each says something of its own of a value. Two of them may describe one object, each some of its properties.
_PARTS = (
    "properties",
    "patternProperties",
    "$ref",
    "anyOf",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "dependencies",
    "not",
)
_OTHER_PROPERTIES = ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties")
_LOOKS_AROUND = re.compile(r"\(\?(<?[=!]|>)|\\[1-9bBZ<>]|\\k<")  # \b, too, looks at what stands on either side
_EXACT = 2**53  # up to here a float is any integer
_FARTHEST = 2**63 - 1024  # the last float below 2^63
# The library's work: a prime of five digits takes 0.7 s and 75 MB, of eight all memory; zeros at the end cost nothing.
_MOST_REMAINDERS = 10_000
_MOST_COPIED_CHARS = 1 << 16


def checked_schema(schema: Any, limits: Limits, param: str = "response_format") -> Any:
    """Return a JSON schema with bounds that the library keeps, without formats and names that it does not know, and closed.

    Args:
        schema: whatever JSON holds.
        limits: the server's.
        param: the request's field that it came in.
    Raises:
        ApiError: 400: it is too large or too deep, has too many enum values, points outside of itself, or holds a number
            that the library does not keep, or not at a bearable price.
    """
    check_size(schema, limits, param)
    factors: set[Decimal] = set()
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > limits.max_schema_depth:
            raise bad(f"the schema is nested more than {limits.max_schema_depth} deep.", param)
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                values = item.get("enum")
                if isinstance(values, list) and len(values) > limits.max_enum:
                    raise bad(f"an enum of {len(values)}: at most {limits.max_enum} are allowed.", param)
                target = item.get("$ref")
                if isinstance(target, str) and not target.startswith("#"):
                    raise bad(f"$ref {target[:100]!r}: only references within the schema are allowed.", param)
                if _is_number(factor := item.get("multipleOf")) and factor:
                    factors.add(Decimal(repr(factor)))
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        level = deeper
    _check_factors(factors, param)
    kept = _kept(schema, param)
    options = kept.get("x-guidance") if isinstance(kept, dict) else None
    if isinstance(options, dict) and options.get("lenient"):
        kept = changed_schema(kept, _leave_out_odd_patterns)
    return closed_schema(changed_schema(kept, _PropertyNames(kept)))


def check_size(schema: Any, limits: Limits, param: str) -> None:
    """Refuse what is too large to be looked at.

    Raises:
        ApiError: 400.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > limits.max_schema_bytes:
        raise bad(f"the schema has {size} bytes: at most {limits.max_schema_bytes} are allowed.", param)


def closed_schema(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those that it lists, where it does not say that they may.

    They may, says JSON Schema; but few mean it, and a weak model goes on with properties of its own until the end of its
    tokens. A schema of which two parts may describe the same object stays as it is: closed, they would exclude each other.
    """
    return schema if _has_joined_parts(schema) else changed_schema(schema, _close)


def _has_joined_parts(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    together = schema.get("allOf", [])
    num_parts = sum(name in schema for name in _PARTS) + (len(together) if isinstance(together, list) else 1)
    # One value may match two open alternatives, which oneOf forbids, and one closed one; a discriminator tells them apart.
    num_parts += 0 if "oneOf" not in schema else 1 if "discriminator" in schema else 2
    return num_parts > 1 or any(map(_has_joined_parts, _inner_schemas(schema)))


def _inner_schemas(schema: dict[str, Any]) -> Iterator[Any]:
    for name, value in schema.items():
        if name in MAPS_OF_SCHEMAS and isinstance(value, dict):
            yield from value.values()
        elif name not in VALUES:
            yield from value if isinstance(value, list) else (value,)


def changed_schema(schema: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """Return a copy of a schema in which each one within it, and then itself, has been changed in place."""
    if isinstance(schema, list):
        return [changed_schema(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for name, value in schema.items():
        if name in MAPS_OF_SCHEMAS and isinstance(value, dict):
            copy[name] = {key: changed_schema(item, change) for key, item in value.items()}
        else:
            copy[name] = value if name in VALUES else changed_schema(value, change)
    change(copy)
    return copy


def _close(schema: dict[str, Any]) -> None:
    listed, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(listed, dict)
        and not any(name in schema for name in _OTHER_PROPERTIES)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in listed for name in required)
    ):
        schema["additionalProperties"] = False


def _leave_out_odd_patterns(schema: dict[str, Any]) -> None:
    """Leave out patterns that look around or back, which no automaton can follow.

    Where one of them names properties, others than those that are listed may be any.
    """
    if _is_odd(schema.get("pattern")):
        del schema["pattern"]
    named = schema.get("patternProperties")
    if isinstance(named, dict) and any(map(_is_odd, named)):
        schema["patternProperties"] = {name: value for name, value in named.items() if not _is_odd(name)}
        schema["additionalProperties"] = True


def _is_odd(pattern: Any) -> bool:
    return isinstance(pattern, str) and _LOOKS_AROUND.search(pattern.replace("\\\\", "")) is not None


class _PropertyNames:
    """Says in the library's words what names an object's properties have, where `propertyNames` is all that says it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._room = _MOST_COPIED_CHARS  # of all objects of a schema together

    def __call__(self, schema: dict[str, Any]) -> None:
        """Change a schema in place."""
        names = schema.get("propertyNames")
        if isinstance(names, dict) and isinstance(names.get("$ref"), str):
            names = _at(self._root, names["$ref"])
        said = {} if names is True else names
        if not isinstance(said, dict):
            return
        said = {name: value for name, value in said.items() if name not in _ANNOTATIONS}
        if said.get("type") == "string":  # any name is one
            del said["type"]
        if not said:
            schema.pop("propertyNames", None)
        elif len(said) == 1 and not schema.keys() & {"properties", "patternProperties"}:
            ((kind, value),) = said.items()
            each = schema.get("additionalProperties", True)
            if kind == "pattern" and isinstance(value, str):
                schema["patternProperties"] = {value: each}
            # Not as a pattern: the library fails where all that one matches is required.
            elif kind == "enum" and isinstance(value, list) and self._has_room(value, each):
                schema["properties"] = {name: each for name in value if isinstance(name, str)}
            else:
                return
            del schema["propertyNames"]
            schema["additionalProperties"] = False

    def _has_room(self, names: list[Any], each: Any) -> bool:
        self._room -= len(json.dumps(names)) + len(json.dumps(each)) * len(names)
        return self._room >= 0


def _at(root: Any, target: str) -> Any:
    """Return what a reference means; None: nothing there, or no plain path of names."""
    place, *names = target.split("/")
    found = root if place == "#" else None
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_factors(factors: set[Decimal], param: str) -> None:
    """Bound the remainders that the library keeps apart, by the least common multiple: one number may have several factors."""
    places = max((-int(factor.as_tuple().exponent) for factor in factors), default=0)
    common = 1
    for factor in factors:
        common = math.lcm(common, int(factor.scaleb(places)))
        if int(str(common).rstrip("0")) > _MOST_REMAINDERS:
            raise bad(
                f"multipleOf has too many digits: at most {_MOST_REMAINDERS} as a whole number without zeros at its end,"
                " and so the least common multiple of all in a schema.",
                param,
            )


def _kept(schema: Any, param: str, *, is_value: bool = False) -> Any:
    """Return a schema, or what stands in its place, as `checked_schema` does; in a value formats stay."""
    if isinstance(schema, list):
        return [_kept(item, param, is_value=is_value) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in MAPS_OF_SCHEMAS and isinstance(value, dict):
            if not all(isinstance(item, (dict, bool)) for item in value.values()):
                raise bad(f"{name} in the schema holds something else than schemas.", param)
            kept[name] = {key: _kept(item, param, is_value=is_value) for key, item in value.items()}
        elif name in VALUES:
            if name in ("const", "enum"):
                _check_values(value, param)
            if _kept(value, param, is_value=True) != value:  # a reference may point here, too
                raise bad(f"{name} in the schema holds a schema with a number that this server cannot keep.", param)
            kept[name] = value
        elif is_value or name != "format" or not isinstance(value, str) or value in _FORMATS:
            kept[name] = _kept(value, param, is_value=is_value)
    _narrow(kept, param)
    return kept


def _check_values(value: Any, param: str) -> None:
    """Refuse a number that the library would write with other digits, or take for the end of 64 bits."""
    if isinstance(value, list):
        for item in value:
            _check_values(item, param)
    elif isinstance(value, dict):
        for item in value.values():
            _check_values(item, param)
    elif _is_number(value) and (
        abs(value) > _FARTHEST or (abs(value) > _EXACT and isinstance(value, int) and _as_written(value) != value)
    ):
        raise _inexact(value, param)


def _as_written(number: int) -> Decimal:
    """Return what the library writes: the fewest digits that tell the float from its neighbours."""
    return Decimal(repr(float(number)))


def _narrow(schema: dict[str, Any], param: str) -> None:
    """Replace bounds that are too far away to matter, in place; refuse others that the library does not keep."""
    for inclusive, exclusive, sign in _BOUNDS:
        for name in (inclusive, exclusive):
            bound = schema.get(name)
            if not _is_number(bound):
                continue
            if sign * bound < -_FARTHEST:
                del schema[name]
                schema.setdefault(inclusive, -sign * _FARTHEST)
            elif (
                sign * bound > _FARTHEST
                or (abs(bound) > _EXACT and bound != float(bound))
                or (name == exclusive and abs(bound) >= _EXACT)  # it would be rounded after one has been added
            ):
                raise _inexact(bound, param)
    if schema.get("type") == "integer":
        return
    for (inclusive, exclusive, sign), opposite in zip(_BOUNDS, reversed(_BOUNDS), strict=True):
        bound = schema.get(exclusive)
        others = [sign * schema[name] for name in opposite[:2] if _is_number(schema.get(name))]
        # Between 0 and 0.5, say: the library takes the 0.
        if (
            _is_number(bound)
            and others
            and bound == int(bound)
            and sign * bound >= 0
            and min(others) < sign * bound + 1
        ):
            raise bad(
                f"the schema's {exclusive} {bound} with another bound less than 1 away:"
                f" this server cannot keep {bound} itself out. Use {inclusive}.",
                param,
            )


def _inexact(number: float, param: str) -> Exception:
    return bad(f"the schema holds {str(number)[:70]}, a number that this server cannot keep exactly.", param)
