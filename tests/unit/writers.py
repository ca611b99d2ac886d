"""The writer of a chat's answers without a server, and answers that come character by character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llmrun.requests import Event
from llmrun.server.chats import _Piece as Piece
from llmrun.server.chats import _Writer as ChatWriter
from llmrun.server.limits import Limits
from llmrun.server.schemas import Schemas
from llmrun.server.tasks import Choice
from llmrun.server.tools import ToolForm


def a_writer(
    body: dict[str, Any], form: ToolForm | None = None, *, tells_thoughts: bool = False, is_thinking: bool = False
) -> ChatWriter:
    engine = SimpleNamespace(tokenizer=None)
    service: Any = SimpleNamespace(engine=engine, model_name="m", fingerprint="f", tells_thoughts=tells_thoughts)
    return ChatWriter(service, Schemas(Limits()).chat_call(body), form, is_thinking=is_thinking)


def written_by(writer: ChatWriter, text: str) -> list[Piece]:
    request: Any = None
    pieces = [writer.take(Choice(0, 0), Event(request, 1, character, None, None)) for character in text]
    return [*pieces, writer.take(Choice(0, 0), Event(request, None, "", None, "stop"))]
