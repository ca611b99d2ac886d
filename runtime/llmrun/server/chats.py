"""`/v1/chat/completions`: messages to answers, as one object or as a stream; tools where the model's template knows them."""

from __future__ import annotations

import collections
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from llmrun.logprobs import TokenLogprobs
from llmrun.requests import Event
from llmrun.server import tools as toolbox
from llmrun.server.errors import bad, naming_field
from llmrun.server.prompts import chat_ids
from llmrun.server.replies import DONE, PING, Stream, TokenTexts, frame, usage
from llmrun.server.responses import Json
from llmrun.server.schemas import ChatCall
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice

if TYPE_CHECKING:
    from llmrun.engine_loop import Ticket


class Chats:
    """The route; an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.chat)
        call = service.schemas.chat_call(body)
        service.check_model(call.model)
        form = self._tool_form(call)
        grammar = await service.in_thread(lambda: self._grammar(call, form))
        await service.compile(grammar)
        async with Answer(service, receive, call.sampled.n) as answer:
            prompt = await service.in_thread(lambda: self._prompt(call, form))
            await answer.submit([self._submitter(call, form, prompt, grammar)], call.sampled.n)
            is_thinking = grammar is None and toolbox.begins_thought(service.engine.tokenizer, prompt)
            writer = _Writer(service, call, form, is_thinking=is_thinking)
            if call.sampled.stream:
                await _stream(answer, writer, Stream(send, headers))
            else:
                await Json(await _whole(answer, writer), headers=headers)(scope, receive, send)

    def _tool_form(self, call: ChatCall) -> toolbox.ToolForm | None:
        if call.tool_choice == "none":
            return None
        form = toolbox.tool_form(self._service.engine.tokenizer)
        if form is None:
            raise bad("this model's chat template does not know tools.", "tools", "unsupported_value")
        return form

    def _grammar(self, call: ChatCall, form: toolbox.ToolForm | None) -> tuple[str, Any] | None:
        """Return what the answer must be; takes the longer the larger the tools' schemas are, and they may fill a body."""
        grammar, limits = call.sampled.grammar, self._service.limits
        if form is not None and call.tool_choice != "auto":
            return toolbox.call_grammar(form, call.tools, call.tool_choice, limits)
        if form is not None and grammar is not None and grammar[0] == "json":
            return toolbox.call_grammar(form, call.tools, call.tool_choice, limits, answer=grammar[1])
        return grammar

    def _prompt(self, call: ChatCall, form: toolbox.ToolForm | None) -> list[int]:
        service = self._service
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise bad("this artifact has no tokenizer: use /v1/completions with token ids.", "messages")
        return chat_ids(
            tokenizer,
            call.messages,
            call.tools if form is not None else (),
            max_depth=service.limits.max_json_depth,
            chat_template_kwargs=service.template_kwargs(call.chat_template_kwargs),
        )

    def _submitter(
        self, call: ChatCall, form: toolbox.ToolForm | None, prompt: list[int], grammar: tuple[str, Any] | None
    ) -> Callable[[Callable[[Event], None], int], Ticket]:
        sampled, service = call.sampled, self._service
        room = service.engine.max_seq_len - len(prompt)
        max_tokens = max(room, 1) if sampled.max_tokens is None else sampled.max_tokens

        def submit(on_event: Callable[[Event], None], i: int) -> Ticket:
            with naming_field("messages", service.engine.max_seq_len):
                return service.loop.submit(
                    prompt,
                    on_event=on_event,
                    max_tokens=max_tokens,
                    logprobs=call.top_logprobs,
                    shown_tokens=None if form is None else form.shown_tokens,
                    **sampled.options(service.constraint(grammar), i),
                )

        return submit


class _Writer:
    """Makes the objects of one request."""

    def __init__(
        self, service: Service, call: ChatCall, form: toolbox.ToolForm | None, *, is_thinking: bool = False
    ) -> None:
        self.call, self.may_call = call, form is not None
        self._texts = TokenTexts(service.engine.tokenizer)
        self._parsers: dict[int, toolbox.ToolStream] | None = None
        if form is not None:
            # Any other kind is the client's alone, and may have text before a call.
            has_grammar = call.sampled.grammar is not None and call.sampled.grammar[0] == "json"
            self._parsers = collections.defaultdict(
                lambda: toolbox.ToolStream(form, call.tools, is_thinking=is_thinking, has_grammar=has_grammar)
            )
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def body(self, kind: str, choices: list[dict[str, Any]], numbers: dict[str, Any] | None) -> dict[str, Any]:
        """Return a response, or a chunk of one."""
        return {**self._head, "object": kind, "choices": choices, "usage": numbers}

    def take(self, choice: Choice, event: Event) -> tuple[str, list[dict[str, Any]], list[TokenLogprobs], str | None]:
        """Return what an event adds to a choice: text, calls, log-probabilities, and why it ended."""
        entries = [event.logprobs] if event.logprobs is not None and event.token_id is not None else []
        text, calls, reason = event.text, [], event.finish_reason
        if self._parsers is not None:
            parser = self._parsers[choice.index]
            text = parser.push(text)
            if reason is not None:
                rest, calls = parser.finish()
                text += rest or ""
        if not self.call.may_call_several:
            del calls[1:]
        if calls and reason == "stop" and not self.call.tool_choice.startswith("="):  # a named tool: OpenAI says "stop"
            reason = "tool_calls"
        return text, calls, entries, reason

    def logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        """Return `logprobs` of a choice; None if they are not wanted."""
        return None if self.call.top_logprobs is None else self._texts.chat(entries, self.call.top_logprobs)


async def _whole(answer: Answer, writer: _Writer) -> dict[str, Any]:
    found: dict[int, tuple[list[str], list[dict[str, Any]], list[TokenLogprobs], list[str | None]]] = {}
    while (events := await answer.events()) != []:
        for choice, event in events or ():
            text, calls, entries, reason = writer.take(choice, event)
            texts, all_calls, all_entries, reasons = found.setdefault(choice.index, ([], [], [], []))
            texts.append(text)
            all_calls += calls
            all_entries += entries
            reasons.append(reason)
    choices = []
    for index, (texts, calls, entries, reasons) in sorted(found.items()):
        content = "".join(texts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choices.append(
            {"index": index, "message": message, "logprobs": writer.logprobs(entries), "finish_reason": reasons[-1]}
        )
    return writer.body("chat.completion", choices, usage(answer.choices))


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
        # Where it may be a call, no text has begun: the AI SDK would show an empty one before it.
        role = {"role": "assistant", "content": None if writer.may_call else ""}
        await stream.write(b"".join(chunk(choice.index, role, [], None) for choice in answer.choices))
        while (events := await answer.events()) != []:
            data = PING if events is None else b""
            for choice, event in events or ():
                text, calls, entries, reason = writer.take(choice, event)
                if text or entries:
                    data += chunk(choice.index, {"content": text}, entries, None)
                if calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    data += chunk(choice.index, {"tool_calls": numbered}, [], None)
                if reason is not None:
                    data += chunk(choice.index, {}, [], reason)
            await stream.write(data)
        if has_usage:
            await stream.write(frame(writer.body("chat.completion.chunk", [], usage(answer.choices))))
        await stream.write(DONE)
