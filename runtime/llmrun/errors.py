"""What can go wrong, by exit code. A message says where, what was found, what was expected, what to do.

The `code` (E301) is for people who search for it; its first digit is the exit code. Standard library only.
"""

from __future__ import annotations


class LlmpackError(Exception):
    """A failure that is reported as one line; `exit_code` is the process's exit status."""

    exit_code = 1
    code = "E101"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InternalError(LlmpackError):
    """A bug of ours: nothing that a user or a file can cause."""


class UsageError(LlmpackError):
    """The command line, the prompt or the checkpoint asks for something that does not exist."""

    exit_code = 2
    code = "E201"


class IntegrityError(LlmpackError):
    """Bytes that are not the ones that were packed, or a checkpoint whose bytes cannot be right."""

    exit_code = 3
    code = "E301"


class IncompatibleError(LlmpackError):
    """Sound, but not for this software, this number of ranks, or this machine."""

    exit_code = 4
    code = "E401"


class ResourceError(LlmpackError):
    """Not enough memory or disk, or no permission."""

    exit_code = 5
    code = "E501"


class PeerError(LlmpackError):
    """Another rank is lost or stuck."""

    exit_code = 6
    code = "E601"


class NumericError(LlmpackError):
    """The model computed NaN or infinity."""

    exit_code = 7
    code = "E701"
