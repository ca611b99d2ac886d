"""`/v1/chat/completions`: messages to answers, as one object or as a stream; tools where the model's template knows them.

What a model thinks before it answers is `reasoning_content`, beside `content`, unless the server is told to leave it there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from llmrun.logprobs import TokenLogprobs
from llmrun.server.chat_work import Piece, Pieces, answering
from llmrun.server.replies import DONE, PING, Stream, TokenTexts, frame, usage
from llmrun.server.responses import Json
from llmrun.server.schemas import ChatCall
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice


class Chats:
    """The route; an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.chat)
        call = service.schemas.chat_call(body)
        async with answering(service, call, receive) as (answer, pieces):
            writer = _Writer(service, call, pieces)
            if call.sampled.stream:
                await _stream(answer, writer, Stream(send, headers))
            else:
                await Json(await _whole(answer, writer), headers=headers)(scope, receive, send)


class _Writer:
    """Makes the objects of one request."""

    def __init__(self, service: Service, call: ChatCall, pieces: Pieces) -> None:
        self.call, self.pieces = call, pieces
        self._texts = TokenTexts(service.engine.tokenizer)
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def body(self, kind: str, choices: list[dict[str, Any]], numbers: dict[str, Any] | None) -> dict[str, Any]:
        """Return a response, or a chunk of one."""
        return {**self._head, "object": kind, "choices": choices, "usage": numbers}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the tokens of the request."""
        return usage(choices, num_thought=self.pieces.num_thought)

    def logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        """Return `logprobs` of a choice; None if they are not wanted."""
        return None if self.call.top_logprobs is None else self._texts.chat(entries, self.call.top_logprobs)


async def _whole(answer: Answer, writer: _Writer) -> dict[str, Any]:
    found: dict[int, list[Piece]] = {}
    while (events := await answer.events()) != []:
        for choice, event in events or ():
            found.setdefault(choice.index, []).append(writer.pieces.take(choice, event))
    choices = []
    for index, pieces in sorted(found.items()):
        content, thought = "".join(piece.text for piece in pieces), "".join(piece.thought for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        logprobs = writer.logprobs([entry for piece in pieces for entry in piece.entries])
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": pieces[-1].reason})
    return writer.body("chat.completion", choices, writer.usage(answer.choices))


async def _stream(answer: Answer, writer: _Writer, stream: Stream) -> None:
    has_usage = writer.call.sampled.include_usage

    def chunk(index: int, delta: dict[str, Any], entries: list[TokenLogprobs], reason: str | None) -> bytes:
        logprobs = writer.logprobs(entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        value = writer.body("chat.completion.chunk", [choice], None)
        if not has_usage:
            del value["usage"]
        return frame(value)

    async with stream:
        # Where something else may come first, no text has begun: the AI SDK would show an empty one before it.
        role = {"role": "assistant", "content": None if writer.pieces.is_late else ""}
        await stream.write(b"".join(chunk(choice.index, role, [], None) for choice in answer.choices))
        while (events := await answer.events()) != []:
            data = PING if events is None else b""
            for choice, event in events or ():
                piece = writer.pieces.take(choice, event)
                if piece.thought:
                    entries = [] if piece.text else piece.entries
                    data += chunk(choice.index, {"reasoning_content": piece.thought}, entries, None)
                if piece.text or (piece.entries and not piece.thought):
                    data += chunk(choice.index, {"content": piece.text}, piece.entries, None)
                if piece.calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(piece.calls)]
                    data += chunk(choice.index, {"tool_calls": numbered}, [], None)
                if piece.reason is not None:
                    data += chunk(choice.index, {}, [], piece.reason)
            await stream.write(data)
        if has_usage:
            await stream.write(frame(writer.body("chat.completion.chunk", [], writer.usage(answer.choices))))
        await stream.write(DONE)
