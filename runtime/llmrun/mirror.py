"""One call made by a user's script on every rank: rank 0 does it, the others see the same results.

Only for scripts that run under mpirun; the command line's other ranks follow without results.
"""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmrun import errors
from llmrun.errors import InternalError, LlmpackError, PeerError
from llmrun.step_plan import MessageKind

if TYPE_CHECKING:
    from llmrun.job import Job

Item = TypeVar("Item")


class Mirror:
    """Sends the items of rank 0's calls, or receives them; off, it only passes them through."""

    def __init__(self, job: Job, *, is_on: bool) -> None:
        """`is_on`: the other ranks make rank 0's calls."""
        self._job = job
        self.is_on = is_on
        self.is_over = False  # rank 0 has ended the job

    def iterate(self, make: Callable[[], Iterator[Item]]) -> Generator[Item, None, None]:
        """Iterate over `make()` on rank 0; on another rank over what rank 0 yields, with its error at the end."""
        if not self.is_on:
            yield from make()
        elif self._job.rank == 0:
            yield from self._lead(make)
        else:
            yield from self._follow()

    def result(self, make: Callable[[], Iterator[Item]]) -> Item:
        """Return the one item of `make()` on every rank."""
        results = list(self.iterate(make))
        if not results:
            raise PeerError("rank 0 left before its result was there.")
        return results[0]

    def _lead(self, make: Callable[[], Iterator[Item]]) -> Iterator[Item]:
        ending: tuple[str, Any] = ("end", None)
        try:
            for item in make():
                self._send(("item", item))
                yield item
        except LlmpackError as error:
            ending = ("error", (type(error).__name__, str(error), error.code))
            raise
        except GeneratorExit:
            raise
        except BaseException as error:
            ending = ("error", (type(error).__name__, str(error), None))
            raise
        finally:
            if not (self._job.is_broken or self._job.is_closed):  # a generator may outlive its engine
                self._send(ending)

    def _follow(self) -> Iterator[Any]:
        tag = "item"
        try:
            while True:
                tag, value = self._receive()
                if tag == "end":
                    return
                if tag == "error":
                    raise _error_of(*value)
                yield value
        finally:  # the caller has stopped early, rank 0 has not
            while tag == "item" and not self._job.is_closed:
                tag, _ = self._receive()

    def _receive(self) -> tuple[str, Any]:
        kind, body = self._job.follow()
        if kind is MessageKind.SHUTDOWN:
            self.is_over = True
            self._job.close(int(body[0]))
            return "end", None
        return pickle.loads(body[1:].tobytes()[: int(body[0])])  # written by our own rank 0

    def _send(self, value: tuple[str, Any]) -> None:
        data = pickle.dumps(value)
        padded = np.frombuffer(data.ljust(-(-len(data) // 4) * 4, b"\0"), np.int32)
        header = np.array([MessageKind.MIRROR, len(data)], np.int32)
        self._job.comm.send(np.concatenate([header, padded]).data)


def _error_of(name: str, message: str, code: str | None) -> BaseException:
    """Return rank 0's error: one of ours, or one of Python's, of the same type if that takes a text."""
    if code is not None:
        return getattr(errors, name)(message, code=code)
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (Exception, KeyboardInterrupt)):
        try:
            return kind(message)
        except TypeError:  # it takes more than a text
            pass
    return InternalError(f"{name}: {message}")
