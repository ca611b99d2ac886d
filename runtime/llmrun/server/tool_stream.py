"""The text of an answer as it comes, from which calls of tools are held back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrun.server.tools import ToolForm, find_calls, first_tag
from llmrun.thoughts import last_place


def may_be_call(form: ToolForm, text: str) -> bool:
    """Tell whether an answer that begins with `text` may still turn out to be a call."""
    start = text.lstrip()
    return not start or start.startswith("{") or any(tag.startswith(start[: len(tag)]) for tag in form.tags)


class ToolStream:
    """The text of one answer, behind its thoughts, as it comes, with calls held back until the end; see `find_calls`."""

    def __init__(
        self,
        form: ToolForm,
        tools: Sequence[Mapping[str, Any]],
        *,
        has_grammar: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            form: how the model calls tools.
            tools: the request's.
            has_grammar: a call begins with the form's tag and has nothing beside it, and what begins otherwise has none.
        """
        self._form, self._tools, self._has_grammar = form, tools, has_grammar and bool(form.tag)
        self._held = ""
        self._is_text = False  # the answer did not begin as a call

    def push(self, text: str) -> str:
        """Take more text; return what is certainly not part of a call."""
        self._held += text
        if self._has_grammar:
            self._is_text |= not self._form.tag.startswith(self._held[: len(self._form.tag)])
            return self._release(len(self._held) if self._is_text else 0)
        if not self._is_text and may_be_call(self._form, self._held):
            return ""
        self._is_text = True
        found = first_tag(self._form, self._held, 0)
        return self._release(last_place(self._held, self._form.tags) if found is None else found[0])

    def finish(self) -> tuple[str | None, list[dict[str, Any]]]:
        """Return the rest of the text and the calls."""
        return find_calls(self._form, self._tools, self._release(len(self._held)))

    def _release(self, end: int) -> str:
        piece, self._held = self._held[:end], self._held[end:]
        return piece
