"""The pieces of a chat's answers without a server, of an answer that comes character by character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llmrun.requests import Event
from llmrun.server.chat_work import Piece, Pieces
from llmrun.server.limits import Limits
from llmrun.server.schemas import Schemas
from llmrun.server.tasks import Choice
from llmrun.server.tools import ToolForm
from llmrun.thoughts import THINK


def the_pieces(
    body: dict[str, Any], form: ToolForm | None = None, *, tells_thoughts: bool = False, is_thinking: bool = False
) -> Pieces:
    service: Any = SimpleNamespace(tells_thoughts=tells_thoughts, thought_tags=THINK, tags_answers=False)
    return Pieces(service, Schemas(Limits()).chat_call(body), form, is_thinking=is_thinking)


def pieces_of(pieces: Pieces, text: str) -> list[Piece]:
    request: Any = None
    found = [pieces.take(Choice(0, 0), Event(request, 1, character, None, None)) for character in text]
    return [*found, pieces.take(Choice(0, 0), Event(request, None, "", None, "stop"))]
