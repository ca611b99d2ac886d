"""`/v1/responses`: what `/v1/chat/completions` does, in the items and events of OpenAI's newer interface.

An answer is a list of items: what the model thought, its text, its calls, each where there is one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from llmrun.logprobs import TokenLogprobs
from llmrun.server.chat_work import Piece, Pieces, answering
from llmrun.server.errors import ApiError
from llmrun.server.replies import PING, Stream, TokenTexts, one_line, usage
from llmrun.server.responses import Json
from llmrun.server.responses_input import chat_body, renamed
from llmrun.server.schemas import ChatCall
from llmrun.server.service import Service
from llmrun.server.tasks import Answer

_Event = dict[str, Any]


class Responses:
    """The route; an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.responses)
        given = service.schemas.responses.check(body, "")
        try:
            call = service.schemas.chat_call(chat_body(body, given))
            async with answering(service, call, receive) as (answer, pieces):
                response = _Response(service, call, given, pieces)
                if call.sampled.stream:
                    await _stream(answer, response, Stream(send, headers, response.failure))
                else:
                    await Json(await _whole(answer, response), headers=headers)(scope, receive, send)
        except ApiError as error:
            raise renamed(error) from None


class _Response:
    """The object of one request as it grows, and the events that tell of it."""

    def __init__(self, service: Service, call: ChatCall, given: Mapping[str, Any], pieces: Pieces) -> None:
        self._call, self.pieces = call, pieces
        self._texts = TokenTexts(service.engine.tokenizer)
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # the last item, a message or thoughts
        self._entries: list[TokenLogprobs] = []  # of tokens whose text, if they are text's, is still to come
        self._number = 0  # of the next event
        sampling = service.engine.sampling_params(**call.sampled.sampling)
        tool_choice = given.get("tool_choice", "auto")
        effort = given.get("reasoning", {}).get("effort") if service.speaks_harmony else None
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
            "background": False,
            "error": None,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "metadata": given.get("metadata") or {},
            "parallel_tool_calls": call.may_call_several,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": tool_choice,
            "tools": given.get("tools", []),
            "top_logprobs": call.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": given.get("user"),
        }

    def body(self, status: str, answer: Answer | None = None) -> dict[str, Any]:
        """Return the object; `answer`: of which it tells the tokens."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        numbers = None
        if answer is not None:
            chat = usage(answer.choices, num_thought=self.pieces.num_thought or 0)
            numbers = {
                "input_tokens": chat["prompt_tokens"],
                "input_tokens_details": {**chat["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": chat["completion_tokens"],
                "output_tokens_details": chat["completion_tokens_details"],
                "total_tokens": chat["total_tokens"],
            }
        facts = {"status": status, "incomplete_details": reason, "output": self._items, "usage": numbers}
        return {**self._head, **facts}

    def begin(self) -> list[_Event]:
        """Return the events before the answer."""
        return [
            self._event(f"response.{kind}", response=self.body("in_progress")) for kind in ("created", "in_progress")
        ]

    def end(self, reason: str, answer: Answer) -> list[_Event]:
        """Return the events behind the answer's last piece; the last one has the object as it stays."""
        status = "incomplete" if reason == "length" else "completed"
        events = [] if self._items else self._open("message")  # an answer without text has an empty one
        events += self._close(status)
        return [*events, self._event(f"response.{status}", response=self.body(status, answer))]

    def failure(self, error: ApiError) -> bytes:
        """Return the event of an error, as OpenAI's clients know it, and as it is elsewhere here."""
        told = error.body()["error"]
        event = self._event("error", code=told["code"], message=told["message"], param=told["param"], error=told)
        return frame(event)

    def take(self, piece: Piece) -> list[_Event]:
        """Take a piece of the answer; return the events that tell of it."""
        events: list[_Event] = []
        if piece.thought:
            events += self._write("reasoning", piece.thought, [])
        if piece.is_thought:
            self._entries = []  # so were those before it
        self._entries += piece.entries
        if piece.text:
            events += self._write("message", piece.text, self._logprobs())
        if piece.is_thought or piece.calls:
            self._entries = []
        for call in piece.calls:
            events += self._close("completed")
            function = call["function"]
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            item |= {"name": function["name"], "arguments": "", "status": "in_progress"}
            events.append(self._add(item))
            where = {"item_id": item["id"], "output_index": len(self._items) - 1}
            item |= {"arguments": function["arguments"], "status": "completed"}
            events.append(self._event("response.function_call_arguments.delta", **where, delta=item["arguments"]))
            done = {**where, "name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **done))
            events.append(self._event("response.output_item.done", output_index=where["output_index"], item={**item}))
        return events

    def _event(self, kind: str, **members: Any) -> _Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    def _add(self, item: dict[str, Any]) -> _Event:
        self._items.append(item)
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=_now(item))

    def _open(self, kind: str) -> list[_Event]:
        """Begin an item of text, or of thoughts."""
        item: dict[str, Any]
        if kind == "message":
            item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": [], "status": "in_progress"}
            part = {"type": "reasoning_text", "text": ""}
        item["content"] = []
        added = self._add(item)
        item["content"].append(part)
        self._is_open = True
        return [added, self._event("response.content_part.added", **self._place(), part=_now(part))]

    def _write(self, kind: str, text: str, entries: list[dict[str, Any]]) -> list[_Event]:
        events: list[_Event] = []
        if not self._is_open or self._items[-1]["type"] != kind:
            events = [*self._close("completed"), *self._open(kind)]
        part = self._items[-1]["content"][0]
        part["text"] += text
        if kind == "reasoning":
            return [*events, self._event("response.reasoning_text.delta", **self._place(), delta=text)]
        part["logprobs"] += entries
        return [*events, self._event("response.output_text.delta", **self._place(), delta=text, logprobs=entries)]

    def _close(self, status: str) -> list[_Event]:
        """End the item that is open, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        item, place = self._items[-1], self._place()
        item["status"] = status
        part = item["content"][0]
        if item["type"] == "reasoning":
            done = self._event("response.reasoning_text.done", **place, text=part["text"])
        else:
            done = self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        return [
            done,
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _logprobs(self) -> list[dict[str, Any]]:
        """Return the log-probabilities of the text that is about to be written."""
        entries, self._entries = self._entries, []
        top = self._call.top_logprobs
        return [] if top is None else self._texts.chat(entries, top)["content"]


def _now(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item or a part as it is now: it grows before its event is written."""
    return {name: [*inner] if isinstance(inner, list) else inner for name, inner in value.items()}


async def _whole(answer: Answer, response: _Response) -> dict[str, Any]:
    reason = ""
    while (events := await answer.events()) != []:
        for choice, event in events or ():
            piece = response.pieces.take(choice, event)
            response.take(piece)
            reason = piece.reason or reason
    return response.end(reason, answer)[-1]["response"]


async def _stream(answer: Answer, response: _Response, stream: Stream) -> None:
    reason = ""
    async with stream:
        await stream.write(b"".join(map(frame, response.begin())))
        while (events := await answer.events()) != []:
            data = PING if events is None else b""
            for choice, event in events or ():
                piece = response.pieces.take(choice, event)
                data += b"".join(map(frame, response.take(piece)))
                reason = piece.reason or reason
            await stream.write(data)
        await stream.write(b"".join(map(frame, response.end(reason, answer))))


def frame(event: _Event) -> bytes:
    """Return one event of a stream, which has its type outside as well."""
    return b"event: " + event["type"].encode() + b"\ndata: " + one_line(event) + b"\n\n"
