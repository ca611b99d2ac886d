"""What a rank tells the others of itself in a status (`Communicator.agree`), which is short: its cores, or its error."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

from llmrun.errors import IntegrityError, LlmpackError

_MESSAGE_BYTES = 3600  # of a status that carries an error; the rest of it is short


def own_cores() -> str:
    """Return the cores that the system lets this process use, for a status: a mask in base 16, as long lists do not fit.

    Linux knows 8192 cores at most: half a status.
    """
    return f"{sum(1 << core for core in os.sched_getaffinity(0)):x}"


def read_cores(mask: str) -> list[int]:
    """Return the cores, in order, that a rank's `own_cores` says."""
    bits = int(mask, 16)
    return [core for core in range(bits.bit_length()) if bits >> core & 1]


def fit(text: str) -> str:
    """Cut a message to what a status has room for, however many bytes JSON makes of each character."""
    sizes = itertools.accumulate(len(json.dumps(character)) - 2 for character in text[:_MESSAGE_BYTES])
    return text[: sum(size <= _MESSAGE_BYTES for size in sizes)]


def status_of(error: LlmpackError) -> dict[str, Any]:
    """Return an error as a status."""
    return {"exit_code": error.exit_code, "code": error.code, "message": fit(str(error))}


def error_of(status: dict[str, Any], rank: int, size: int) -> LlmpackError:
    """Rebuild another rank's error; a file's path shows whose it is, unless the ranks are on several hosts."""
    classes = {kind.exit_code: kind for kind in LlmpackError.__subclasses__()}
    message: str = status["message"]
    is_obvious = f"rank {rank}" in message or f"rank-{rank}" in message or size == 1 or rank == 0
    prefix = "" if is_obvious else f"rank {rank}: "
    return classes.get(status["exit_code"], IntegrityError)(prefix + message, code=status["code"])
