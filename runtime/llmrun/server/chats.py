"""`/v1/chat/completions`: messages to answers, as one object or as a stream; tools where the model's template knows them.

What a model thinks before it answers is `reasoning_content`, beside `content`, unless the server is told to leave it there.
"""

from __future__ import annotations

import collections
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from llmrun.server.thoughts import ThoughtConstraint, ThoughtStream, begins_thought, shown_tokens

if TYPE_CHECKING:
    from llmrun.constraint import Constraint
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
            writer = _Writer(service, call, form, is_thinking=self._begins_thought(prompt, grammar))
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

    def _begins_thought(self, prompt: Sequence[int], grammar: tuple[str, Any] | None) -> bool:
        service = self._service
        return (grammar is None or service.tells_thoughts) and begins_thought(service.engine.tokenizer, prompt)

    def _constraint(self, prompt: Sequence[int], grammar: tuple[str, Any] | None) -> Constraint | None:
        """Return what the answer is held to: behind the thoughts, where these are told apart."""
        service = self._service
        engine, constraint = service.engine, service.constraint(grammar)
        if constraint is None or engine.tokenizer is None or not service.tells_thoughts:
            return constraint
        has_begun = begins_thought(engine.tokenizer, prompt)
        return ThoughtConstraint(constraint, engine.tokenizer, engine.manifest.eos_token_ids, has_begun=has_begun)

    def _submitter(
        self, call: ChatCall, form: toolbox.ToolForm | None, prompt: list[int], grammar: tuple[str, Any] | None
    ) -> Callable[[Callable[[Event], None], int], Ticket]:
        sampled, service = call.sampled, self._service
        room = service.engine.max_seq_len - len(prompt)
        max_tokens = max(room, 1) if sampled.max_tokens is None else sampled.max_tokens
        shown = {} if form is None else form.shown_tokens
        if form is not None or service.tells_thoughts:
            shown = {**shown, **shown_tokens(service.engine.tokenizer)}

        def submit(on_event: Callable[[Event], None], i: int) -> Ticket:
            with naming_field("messages", service.engine.max_seq_len):
                return service.loop.submit(
                    prompt,
                    on_event=on_event,
                    max_tokens=max_tokens,
                    logprobs=call.top_logprobs,
                    shown_tokens=shown,
                    **sampled.options(self._constraint(prompt, grammar), i),
                )

        return submit


@dataclass(frozen=True)
class _Piece:
    """What an event adds to a choice; `reason`: why it ended."""

    thought: str
    text: str
    calls: list[dict[str, Any]]
    entries: list[TokenLogprobs]
    reason: str | None


class _Writer:
    """Makes the objects of one request."""

    def __init__(
        self, service: Service, call: ChatCall, form: toolbox.ToolForm | None, *, is_thinking: bool = False
    ) -> None:
        self.call = call
        self.is_late = form is not None or service.tells_thoughts  # other things may come before the text, or instead
        self.num_thought: int | None = 0 if service.tells_thoughts else None  # tokens
        self._texts = TokenTexts(service.engine.tokenizer)
        self._thoughts: dict[int, ThoughtStream] | None = None
        if self.is_late:
            self._thoughts = collections.defaultdict(
                lambda: ThoughtStream(has_begun=is_thinking, is_apart=service.tells_thoughts)
            )
        self._parsers: dict[int, toolbox.ToolStream] | None = None
        if form is not None:
            # Any other kind is the client's alone, and may have text before a call.
            has_grammar = call.sampled.grammar is not None and call.sampled.grammar[0] == "json"
            self._parsers = collections.defaultdict(
                lambda: toolbox.ToolStream(form, call.tools, has_grammar=has_grammar)
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

    def take(self, choice: Choice, event: Event) -> _Piece:
        """Return what an event adds to a choice."""
        entries = [event.logprobs] if event.logprobs is not None and event.token_id is not None else []
        reason, calls = event.finish_reason, []
        thought, text = self._split(choice, event)
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
        if self.num_thought is None:  # thoughts are text
            thought, text = "", thought + text
        return _Piece(thought, text, calls, entries, reason)

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the tokens of the request."""
        return usage(choices, num_thought=self.num_thought)

    def _split(self, choice: Choice, event: Event) -> tuple[str, str]:
        """Return what an event adds to the thoughts, and to the rest of a choice."""
        if self._thoughts is None:
            return "", event.text
        stream = self._thoughts[choice.index]
        was_thinking = stream.is_thinking
        thought, text = stream.push(event.text)
        if self.num_thought is not None and event.token_id is not None:
            self.num_thought += was_thinking or stream.is_thinking
        if event.finish_reason is not None:
            last_thought, last_text = stream.finish()
            thought, text = thought + last_thought, text + last_text
        return thought, text

    def logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        """Return `logprobs` of a choice; None if they are not wanted."""
        return None if self.call.top_logprobs is None else self._texts.chat(entries, self.call.top_logprobs)


async def _whole(answer: Answer, writer: _Writer) -> dict[str, Any]:
    found: dict[int, list[_Piece]] = {}
    while (events := await answer.events()) != []:
        for choice, event in events or ():
            found.setdefault(choice.index, []).append(writer.take(choice, event))
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
        role = {"role": "assistant", "content": None if writer.is_late else ""}
        await stream.write(b"".join(chunk(choice.index, role, [], None) for choice in answer.choices))
        while (events := await answer.events()) != []:
            data = PING if events is None else b""
            for choice, event in events or ():
                piece = writer.take(choice, event)
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
