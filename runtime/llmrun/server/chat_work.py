"""From a checked chat request to the pieces of its answers: prompt, grammar, submission, thoughts and calls found in the text.

What objects tell of it is the routes' (`chats`, `responses_api`).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Receive

from llmrun.harmony import HarmonyConstraint, MessageStream, begun_message, shown_marks
from llmrun.logprobs import TokenLogprobs
from llmrun.requests import Event
from llmrun.server import tools as toolbox
from llmrun.server.errors import bad, naming_field
from llmrun.server.prompts import chat_ids
from llmrun.server.schemas import ChatCall
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice
from llmrun.server.tool_stream import ToolStream
from llmrun.thoughts import (
    ThoughtConstraint,
    ThoughtStream,
    begins_thought,
    ends_at_thought,
    ends_thought,
    shown_tokens,
)

if TYPE_CHECKING:
    from llmrun.constraint import Constraint
    from llmrun.engine_loop import Ticket

_Grammar = tuple[str, Any] | None


@contextlib.asynccontextmanager
async def answering(service: Service, call: ChatCall, receive: Receive) -> AsyncIterator[tuple[Answer, Pieces]]:
    """Submit a request; yield its answers, which end with the context, and what their events add.

    Raises:
        ApiError: the request cannot be carried out.
    """
    service.check_model(call.model)
    work = _Work(service, call)
    grammar = await service.in_thread(work.grammar)
    await service.compile(grammar)
    async with Answer(service, receive, call.sampled.n) as answer:
        prompt = await service.in_thread(work.prompt)
        await answer.submit([work.submitter(prompt, grammar)], call.sampled.n)
        begun, is_thinking = work.begun(prompt), work.begins_thought(prompt, grammar)
        has_thought = ends_at_thought(service.engine.tokenizer, prompt)
        yield answer, Pieces(service, call, work.form, is_thinking=is_thinking, has_thought=has_thought, begun=begun)


class _Work:
    """One request's; `form`: how the model calls tools, None: it is not to."""

    def __init__(self, service: Service, call: ChatCall) -> None:
        self._service, self._call = service, call
        self.form: toolbox.ToolForm | None = None
        self._may_be_call = False  # by its grammar
        if call.tool_choice != "none":
            self.form = toolbox.tool_form(service.engine.tokenizer)
            if self.form is None:
                raise bad("this model's chat template does not know tools.", "tools", "unsupported_value")

    def grammar(self) -> _Grammar:
        """Return what the answer must be; takes the longer the larger the tools' schemas are, and they may fill a body."""
        call, form, limits = self._call, self.form, self._service.limits
        grammar = call.sampled.grammar
        self._may_be_call = True
        if form is not None and call.tool_choice != "auto":
            return toolbox.call_grammar(form, call.tools, call.tool_choice, limits)
        if form is not None and grammar is not None and grammar[0] == "json":
            return toolbox.call_grammar(form, call.tools, call.tool_choice, limits, answer=grammar[1])
        self._may_be_call = False
        return grammar

    def prompt(self) -> list[int]:
        service, call = self._service, self._call
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise bad("this artifact has no tokenizer: use /v1/completions with token ids.", "messages")
        return chat_ids(
            tokenizer,
            call.messages,
            call.tools if self.form is not None else (),
            max_depth=service.limits.max_json_depth,
            chat_template_kwargs=service.template_kwargs(call.chat_template_kwargs),
        )

    def begun(self, prompt: Sequence[int]) -> str | None:
        """Return what the prompt has of the answer's first message; None: this model's answers are no messages."""
        tokenizer = self._service.engine.tokenizer
        return begun_message(tokenizer, prompt) if tokenizer is not None and self._service.speaks_harmony else None

    def begins_thought(self, prompt: Sequence[int], grammar: _Grammar) -> bool:
        service = self._service
        return (grammar is None or service.tells_thoughts) and begins_thought(service.engine.tokenizer, prompt)

    def submitter(self, prompt: list[int], grammar: _Grammar) -> Callable[[Callable[[Event], None], int], Ticket]:
        call, form, service = self._call, self.form, self._service
        sampled = call.sampled
        room = service.engine.max_seq_len - len(prompt)
        max_tokens = max(room, 1) if sampled.max_tokens is None else sampled.max_tokens
        shown = {} if form is None else form.shown_tokens
        if form is not None or service.tells_thoughts:
            shown = {**shown, **shown_tokens(service.engine.tokenizer)}
        if service.speaks_harmony and service.engine.tokenizer is not None:
            shown = shown_marks(service.engine.tokenizer)

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

    def _constraint(self, prompt: Sequence[int], grammar: _Grammar) -> Constraint | None:
        """Return what the answer is held to: behind the thoughts, where these are told apart."""
        service = self._service
        engine, constraint = service.engine, service.constraint(grammar)
        if constraint is not None and engine.tokenizer is not None and (begun := self.begun(prompt)) is not None:
            end_ids = engine.manifest.eos_token_ids
            return HarmonyConstraint(constraint, engine.tokenizer, end_ids, begun, has_channel=self._may_be_call)
        if constraint is None or engine.tokenizer is None or not service.tells_thoughts:
            return constraint
        return ThoughtConstraint(
            constraint,
            engine.tokenizer,
            engine.manifest.eos_token_ids,
            has_begun=begins_thought(engine.tokenizer, prompt),
            has_ended=ends_thought(engine.tokenizer, prompt),
        )


@dataclass(frozen=True)
class Piece:
    """What an event adds to a choice: thoughts, then text, then calls as OpenAI's chats have them.

    Attributes:
        entries: of the event's token, whose text may be held back for a later piece.
        is_thought: that token is one of thoughts, which are told apart.
        reason: why the choice ended.
    """

    thought: str
    text: str
    calls: list[dict[str, Any]]
    entries: list[TokenLogprobs]
    is_thought: bool
    reason: str | None


class Pieces:
    """What events add to the answers of one request.

    Attributes:
        is_late: other things may come before the text, or instead.
        num_thought: tokens of thoughts so far; None: these are text here.
    """

    def __init__(
        self,
        service: Service,
        call: ChatCall,
        form: toolbox.ToolForm | None,
        *,
        is_thinking: bool = False,
        has_thought: bool = False,
        begun: str | None = None,
    ) -> None:
        """Begin the answers.

        Args:
            service: which tells thoughts, or leaves them in the text.
            call: the request.
            form: how the model calls tools; None: it is not to.
            is_thinking: the prompt has begun the thoughts.
            has_thought: it ends where it has ended them.
            begun: what it has of a message, if answers are messages.
        """
        self.is_late = form is not None or service.tells_thoughts
        self.num_thought: int | None = 0 if service.tells_thoughts else None
        self._call, self._form = call, form
        self._messages: dict[int, MessageStream] | None = None
        self._thoughts: dict[int, ThoughtStream] | None = None
        self._parsers: dict[int, ToolStream] | None = None
        if begun is not None:
            names = [] if form is None else [tool["function"]["name"] for tool in call.tools]
            self._messages = collections.defaultdict(
                lambda: MessageStream(begun, names, is_apart=service.tells_thoughts)
            )
            return
        if self.is_late:
            self._thoughts = collections.defaultdict(
                lambda: ThoughtStream(
                    service.thought_tags,
                    has_begun=is_thinking,
                    has_ended=has_thought,
                    is_apart=service.tells_thoughts,
                    is_tagged=service.tags_answers,
                )
            )
        if form is not None:
            # Any other kind is the client's alone, and may have text before a call.
            has_grammar = call.sampled.grammar is not None and call.sampled.grammar[0] == "json"
            self._parsers = collections.defaultdict(lambda: ToolStream(form, call.tools, has_grammar=has_grammar))

    def take(self, choice: Choice, event: Event) -> Piece:
        """Return what an event adds to a choice."""
        entries = [event.logprobs] if event.logprobs is not None and event.token_id is not None else []
        reason, calls = event.finish_reason, []
        thought, text, is_thought = self._split(choice, event)
        if self._messages is not None:
            stream = self._messages[choice.index]
            if stream.is_markup and self.num_thought is not None:
                entries = []
            if reason is not None and self._form is not None:
                calls = [self._form.call(*call) for call in stream.calls[: toolbox.MAX_CALLS]]
        if self._parsers is not None:
            parser = self._parsers[choice.index]
            text = parser.push(text)
            if reason is not None:
                rest, calls = parser.finish()
                text += rest or ""
        if not self._call.may_call_several:
            del calls[1:]
        if calls and reason == "stop" and not self._call.tool_choice.startswith("="):  # a named tool: OpenAI: "stop"
            reason = "tool_calls"
        if self.num_thought is None:
            thought, text = "", thought + text
        elif is_thought and event.token_id is not None:
            self.num_thought += 1
        return Piece(thought, text, calls, entries, is_thought and self.num_thought is not None, reason)

    def _split(self, choice: Choice, event: Event) -> tuple[str, str, bool]:
        """Return what an event adds to the thoughts, and to the rest of a choice, and whether its token is a thought's."""
        streams = self._thoughts if self._messages is None else self._messages
        if streams is None:
            return "", event.text, False
        stream = streams[choice.index]
        was_thinking = stream.is_thinking
        thought, text = stream.push(event.text)
        is_thought = was_thinking or stream.is_thinking
        if event.finish_reason is not None:
            last_thought, last_text = stream.finish()
            thought, text = thought + last_thought, text + last_text
        return thought, text, is_thought
