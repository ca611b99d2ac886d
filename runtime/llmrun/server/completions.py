"""`/v1/completions`: texts or token ids to continuations, with log-probabilities of both."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from llmrun.requests import Event
from llmrun.server.errors import naming_field
from llmrun.server.replies import DONE, PING, Stream, TextOffsets, TokenTexts, frame, usage
from llmrun.server.responses import Json
from llmrun.server.schemas import CompletionCall
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice

if TYPE_CHECKING:
    from llmrun.engine_loop import Ticket
    from llmrun.tokenizer import Tokenizer


class Completions:
    """The route; an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.completion)
        call = service.schemas.completion_call(body)
        service.check_model(call.model)
        await service.compile(call.sampled.grammar)
        num_sequences = len(call.prompts) * call.sampled.n
        async with Answer(service, receive, num_sequences) as answer:
            writer = _Writer(service, call)
            await answer.submit([self._submitter(call, prompt) for prompt in call.prompts], call.sampled.n)
            if call.sampled.stream:
                await _stream(answer, writer, Stream(send, headers))
            else:
                await Json(await _whole(answer, writer), headers=headers)(scope, receive, send)

    def _submitter(
        self, call: CompletionCall, prompt: str | list[int]
    ) -> Callable[[Callable[[Event], None], int], Ticket]:
        sampled, loop, service = call.sampled, self._service.loop, self._service
        is_continuation = _is_continuation(call, prompt, service.engine.tokenizer)
        if not prompt:
            prompt = service.empty_prompt()
        prompt_logprobs = call.logprobs if call.echo else None
        if sampled.max_tokens == 0:
            prompt_logprobs = call.logprobs or 0

        def submit(on_event: Callable[[Event], None], i: int) -> Ticket:
            with naming_field("prompt", service.engine.max_seq_len):
                return loop.submit(
                    prompt,
                    on_event=on_event,
                    max_tokens=sampled.max_tokens,
                    logprobs=call.logprobs,
                    prompt_logprobs=prompt_logprobs,
                    is_continuation=is_continuation,
                    **sampled.options(service.constraint(sampled.grammar), i),
                )

        return submit


def _is_continuation(call: CompletionCall, prompt: str | list[int], tokenizer: Tokenizer | None) -> bool:
    """Tell whether a space at the beginning of the answer is text: it goes on after text, or a grammar has counted it."""
    if call.sampled.grammar is not None:
        return True
    if isinstance(prompt, str) or tokenizer is None:
        return bool(prompt)
    return not set(prompt) <= {*tokenizer.special_tokens.values()}


class _Writer:
    """Makes the objects of one request."""

    def __init__(self, service: Service, call: CompletionCall) -> None:
        self.call = call
        self._service, self._texts = service, TokenTexts(service.engine.tokenizer)
        self._offsets: dict[int, TextOffsets] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def body(self, choices: list[dict[str, Any]], numbers: dict[str, Any] | None) -> dict[str, Any]:
        """Return a response, or a chunk of one."""
        return {**self._head, "choices": choices, "usage": numbers}

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """Return the echo of the prompt, if it is wanted; to be called at a choice's first event."""
        if choice.index in self._offsets:
            return None
        call, prompt, tokenizer = self.call, self.call.prompts[choice.prompt_index], self._service.engine.tokenizer
        has_echo = call.echo and choice.ticket is not None
        offsets = self._texts.offsets(is_continuation=not has_echo and _is_continuation(call, prompt, tokenizer))
        self._offsets[choice.index] = offsets
        if not has_echo or choice.ticket is None:
            return None
        request = choice.ticket.request
        text = prompt if isinstance(prompt, str) else "" if tokenizer is None else tokenizer.decode(request.prompt_ids)
        logprobs = None
        if call.logprobs is not None and request.prompt_logprobs is not None:
            logprobs = self._texts.completion(request.prompt_logprobs, request.prompt_ids, offsets)
        offsets.offset = len(text)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def piece(self, choice: Choice, event: Event) -> dict[str, Any]:
        """Return what an event adds to a choice."""
        logprobs = None
        if self.call.logprobs is not None:
            has_token = event.token_id is not None and event.logprobs is not None
            entries, ids = ([event.logprobs], [event.token_id]) if has_token else ([], [])
            logprobs = self._texts.completion(entries, ids, self._offsets[choice.index])  # type: ignore[arg-type]
        return {"index": choice.index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish_reason}


async def _whole(answer: Answer, writer: _Writer) -> dict[str, Any]:
    results: dict[int, dict[str, Any]] = {}
    while (events := await answer.events()) != []:
        for choice, event in events or ():
            for piece in (writer.first(choice), writer.piece(choice, event)):
                if piece is not None:
                    _add(results.setdefault(choice.index, {"index": choice.index, "text": "", "logprobs": None}), piece)
    choices = [results[index] for index in sorted(results)]
    return writer.body(choices, usage(answer.choices))


def _add(result: dict[str, Any], piece: dict[str, Any]) -> None:
    result["text"] += piece["text"]
    result["finish_reason"] = piece["finish_reason"]
    if piece["logprobs"] is not None:
        if result["logprobs"] is None:
            result["logprobs"] = {name: [] for name in piece["logprobs"]}
        for name, values in piece["logprobs"].items():
            result["logprobs"][name] += values


async def _stream(answer: Answer, writer: _Writer, stream: Stream) -> None:
    has_usage = writer.call.sampled.include_usage
    async with stream:
        while (events := await answer.events()) != []:
            data = PING if events is None else b""
            for choice, event in events or ():
                for piece in (writer.first(choice), writer.piece(choice, event)):
                    if piece is None or not (piece["text"] or piece["finish_reason"] or _has_tokens(piece)):
                        continue
                    chunk = writer.body([piece], None)
                    if not has_usage:
                        del chunk["usage"]
                    data += frame(chunk)
            await stream.write(data)
        if has_usage:
            await stream.write(frame(writer.body([], usage(answer.choices))))
        await stream.write(DONE)


def _has_tokens(piece: dict[str, Any]) -> bool:
    return piece["logprobs"] is not None and bool(piece["logprobs"]["tokens"])
