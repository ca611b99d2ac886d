"""A file of a Hugging Face model directory -> its bytes, its JSON, its members; what is wrong with it is said with its path.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from llmrun.artifact import IntegrityError, UsageError

EXPECTED = "expected a Hugging Face model directory, as `hf download NAME --local-dir DIR` leaves it"


def open_regular(path: Path) -> int:
    """Open a checkpoint's file for reading; return the descriptor.

    Raises:
        UsageError: it is not there, may not be read, or is something else than a file (a pipe would be waited for).
        IntegrityError: a link to nothing, as an interrupted download leaves it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise IntegrityError(f"{path}: a link to a file that is missing. Fetch it again.", code="E311") from None
        raise UsageError(f"{path}: no such file; {EXPECTED}.", code="E202") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.", code="E202") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path}: cannot be read: not a regular file.", code="E202")
    return descriptor


def read_file(path: Path) -> bytes:
    """Read a small file of a checkpoint; errors as those of `open_regular`, and a Git LFS pointer is explained."""
    with open(open_regular(path), "rb") as file:
        data = file.read()
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that begins as those do that Git leaves in place of large ones."""
    if start.startswith(b"version https://git-lfs"):
        raise IntegrityError(
            f"{path}: a Git LFS pointer, not the file itself: fetch it with `git lfs pull`.", code="E310"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is an error that names it."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not JSON: {error}.", code="E310") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: found a JSON {type(value).__name__}, expected an object.", code="E310")
    return value


class Reader:
    """Typed look-ups in a JSON object, where null is as good as absent; errors name file, key and value.

    Each raises IntegrityError for another value, and without a `default` for none.
    """

    def __init__(self, raw: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.raw, self.path, self.prefix = raw, path, prefix

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None and default is None:
            raise IntegrityError(f"{self.path}: {self.prefix}{key} is missing.", code="E310")
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a count, of at least 1."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise IntegrityError(
                f"{self.path}: {self.prefix}{key} is {value!r}; expected an integer of at least 1.", code="E310"
            )
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise IntegrityError(
                f"{self.path}: {self.prefix}{key} is {value!r}; expected a positive number.", code="E310"
            )
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise IntegrityError(f"{self.path}: {self.prefix}{key} is {value!r}; expected true or false.", code="E310")
        return value
