"""Kinds of values in a request: each checks a value and describes itself in JSON Schema, so that a bound is written once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmrun.server.errors import bad


class Kind(Protocol):
    """A set of JSON values."""

    def check(self, value: Any, where: str) -> Any:
        """Return the value as the server uses it.

        Raises:
            ApiError: it is not one of the kind; names `where` it was found.
        """
        ...

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of what `check` takes."""
        ...


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool = False

    def check(self, value: Any, where: str) -> Any:
        """See `Kind`."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and self.whole and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if not is_number or (self.whole and not isinstance(value, int)) or not self.low <= value <= self.high:
            kind = "a whole number" if self.whole else "a number"
            raise bad(f"{where} is {_shown(value)}: expected {kind} from {self.low} to {self.high}.", where)
        return value if self.whole else float(value)

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "integer" if self.whole else "number", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, value: Any, where: str) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise bad(f"{where} is {_shown(value)}: expected true or false.", where)
        return value

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A string of `least` to `most` characters; `choices`: one of these only."""

    most: int = 1 << 20
    least: int = 0
    choices: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or not self.least <= len(value) <= self.most:
            raise bad(f"{where} is {_shown(value)}: expected text of {self.least} to {self.most} characters.", where)
        if self.choices and value not in self.choices:
            raise bad(f"{where} is {_shown(value)}: expected one of {', '.join(self.choices)}.", where)
        return value

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        if self.choices:
            return {"type": "string", "enum": list(self.choices)}
        return {"type": "string", "minLength": self.least, "maxLength": self.most}


@dataclass(frozen=True)
class ListOf:
    """A list of `least` to `most` items of one kind."""

    item: Kind
    most: int
    least: int = 0

    def check(self, value: Any, where: str) -> list[Any]:
        """See `Kind`."""
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            found = f"a list of {len(value)}" if isinstance(value, list) else _shown(value)
            raise bad(f"{where} is {found}: expected a list of {self.least} to {self.most}.", where)
        return [self.item.check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "array", "items": self.item.schema(), "minItems": self.least, "maxItems": self.most}


@dataclass(frozen=True)
class MapOf:
    """An object whose keys are whole numbers as text, as OpenAI's `logit_bias` has them."""

    item: Kind
    most: int

    def check(self, value: Any, where: str) -> dict[int, Any]:
        """See `Kind`."""
        if not isinstance(value, dict) or len(value) > self.most:
            raise bad(f"{where} is {_shown(value)}: expected an object of at most {self.most} token ids.", where)
        result = {}
        for name, item in value.items():
            if not (name.isascii() and name.isdigit() and len(name) < 10):
                raise bad(f"{where} has the key {_shown(name)}: expected a token id.", where)
            result[int(name)] = self.item.check(item, f"{where}.{name}")
        return result

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        names = {"pattern": "^[0-9]{1,9}$"}
        values = self.item.schema()
        return {"type": "object", "additionalProperties": values, "propertyNames": names, "maxProperties": self.most}


@dataclass(frozen=True)
class AnyObject:
    """Any JSON object: what it means is decided elsewhere."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        """See `Kind`."""
        if not isinstance(value, dict):
            raise bad(f"{where} is {_shown(value)}: expected an object.", where)
        return value

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "object"}


@dataclass(frozen=True)
class Either:
    """One of several kinds, told apart by the JSON type of the value; what is of no one's type is for the last to refuse."""

    kinds: Sequence[tuple[type, Kind]]

    def check(self, value: Any, where: str) -> Any:
        """See `Kind`."""
        for type_, kind in self.kinds:
            if isinstance(value, type_):
                return kind.check(value, where)
        return self.kinds[-1][1].check(value, where)

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"anyOf": [kind.schema() for _, kind in self.kinds]}


@dataclass(frozen=True)
class Only:
    """A field that exists for compatibility and does nothing: only the values that mean "off" are taken."""

    values: tuple[Any, ...]

    def check(self, value: Any, where: str) -> Any:
        """See `Kind`."""
        if not any(value == known and type(value) is type(known) for known in self.values):
            raise bad(f"{where} is {_shown(value)}: this server does not support it.", where, "unsupported_value")
        return value

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class Anything:
    """A field that is accepted and has no effect."""

    def check(self, value: Any, where: str) -> Any:
        """See `Kind`."""
        return value

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {}


@dataclass(frozen=True)
class Record:
    """An object of known fields. A field that is null is not given; unknown ones are left out, or errors if `closed`."""

    fields: Mapping[str, Kind]
    required: tuple[str, ...] = ()
    closed: bool = False

    def check(self, value: Any, where: str) -> dict[str, Any]:
        """See `Kind`."""
        if not isinstance(value, dict):
            raise bad(f"{where or 'the body'} is {_shown(value)}: expected an object.", where or None)
        prefix = f"{where}." if where else ""
        for name in self.required:
            if value.get(name) is None:
                raise bad(f"{prefix}{name} is missing.", prefix + name, "missing_required_parameter")
        if self.closed and (unknown := [name for name in value if name not in self.fields]):
            raise bad(f"{prefix}{_shown(unknown[0])} is not a field that this server knows.", where or None)
        return {
            name: kind.check(value[name], prefix + name)
            for name, kind in self.fields.items()
            if value.get(name) is not None
        }

    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        properties = {
            name: kind.schema() if name in self.required else {"anyOf": [kind.schema(), {"type": "null"}]}
            for name, kind in self.fields.items()
        }
        result: dict[str, Any] = {"type": "object", "properties": properties, "required": list(self.required)}
        return {**result, "additionalProperties": False} if self.closed else result


def unknown_fields(kind: Kind, value: Any) -> Iterator[str]:
    """Yield the fields of a value that its kind does not know, those within others as `outer.inner`; none that is null."""
    if isinstance(kind, Record) and isinstance(value, dict):
        for name, item in value.items():
            if item is not None and name not in kind.fields:
                yield name
            elif name in kind.fields:
                yield from (f"{name}.{inner}" for inner in unknown_fields(kind.fields[name], item))
    elif isinstance(kind, ListOf) and isinstance(value, list):
        for item in value:
            yield from unknown_fields(kind.item, item)
    elif isinstance(kind, Either):
        for type_, inner in kind.kinds:
            if isinstance(value, type_):
                yield from unknown_fields(inner, value)


def _shown(value: Any) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
