"""Talk with the model, in the form of its chat template.

On a terminal: with editing, history and commands (/help). Otherwise each line of standard input is a turn, and an empty
line or the end leaves. Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from llmrun import console, launcher, stdin
from llmrun.commands import common
from llmrun.errors import UsageError

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals
    from llmrun.requests import Completion

DEFAULT_ANSWER_TOKENS = 1024
Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    add_chat_options(parser)
    common.add_sampling_options(parser, f"{DEFAULT_ANSWER_TOKENS}")
    common.add_engine_options(parser, speculates=True)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a chat."""
    parser.add_argument("--system", type=common.text_of("--system"), metavar="TEXT", help="the system message")
    common.add_template_option(parser)
    parser.add_argument("--no-history", action="store_true", help="neither read nor write the history of your lines")


def set_chat_defaults(parser: argparse.ArgumentParser) -> None:
    """Give a parser without the options of a chat what they are where nobody says otherwise."""
    options = argparse.ArgumentParser(add_help=False)
    add_chat_options(options)
    parser.set_defaults(**vars(options.parse_args([])))


def run(arguments: argparse.Namespace) -> int:
    """Answer turn after turn."""
    if arguments.max_tokens is not None or any(value is not None for value in common.sampling_of(arguments).values()):
        common.check_sampling(arguments)  # imports numpy, 0.1 s of a terminal's start
    command = _Chat(arguments)
    if launcher.CHAT_VARIABLE in os.environ:
        return common.run_on_ranks(arguments, common.RankWork(command.serve_terminal, command.prepare))
    is_person = console.is_terminal("stdin") and (console.is_terminal("stdout") or console.is_terminal("stderr"))
    if is_person and not arguments.json and launcher.launcher_family() is None:
        from llmrun import chat_terminal

        return chat_terminal.run(arguments)
    return common.run_on_ranks(arguments, common.RankWork(command.talk, command.prepare))


class _Chat:
    """Rank 0's part: answers messages, and computes of a conversation only what is new."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._answered: tuple[Messages, list[int], list[int]] | None = None  # messages, their ids, the answer's
        self._is_apart = False  # thoughts come without the markup that tells them from the answer: a text has none

    def prepare(self, engine: Engine) -> None:
        """Refuse an artifact that cannot chat, before the weights are read."""
        if engine.tokenizer is None or engine.tokenizer.chat_template is None:
            missing = "tokenizer" if engine.tokenizer is None else "chat template"
            raise UsageError(f"{self._arguments.artifact}: has no {missing}. Use `llmrun generate`.", code="E205")

    def talk(self, engine: Engine, signals: Signals) -> int:
        """Read a turn from a line of standard input, answer it, and so on."""
        arguments = self._arguments
        messages: Messages = []
        if arguments.system is not None:
            messages.append({"role": "system", "content": arguments.system})
        for line in stdin.read_lines():
            text = stdin.decode_utf8(line, "standard input").strip()
            if not text:
                break
            messages.append({"role": "user", "content": text})
            with signals.answering():
                completion = self._answer(engine, messages, self._write_plainly, signals.stop_answer.is_set)
            if arguments.json:
                common.write_json(completion.as_json())
            else:
                common.write("\n")
            messages.append({"role": "assistant", "content": completion.text or ""})
        return 0

    def serve_terminal(self, engine: Engine, _signals: Signals) -> int:
        """Answer what the terminal's side asks, until it leaves."""
        from llmrun import chat_link

        inbox = chat_link.Inbox()
        chat_link.send_event(common.write, ready={"max_seq_len": engine.max_seq_len, "load_ms": engine.load_ms})
        number = 0
        while (messages := inbox.next_question()) is not None:
            number += 1
            stopped = False

            def should_stop(number: int = number) -> bool:
                nonlocal stopped
                stopped = inbox.has_stopped(number)
                return stopped

            def write(text: str, is_thought: bool) -> None:
                chat_link.send_event(common.write, text=text, **({"is_thought": True} if is_thought else {}))

            try:
                completion = self._answer(engine, messages, write, should_stop)
            except UsageError as error:  # too long, or the template's refusal: the person may go on
                chat_link.send_event(common.write, error=console.error_line(error))
                continue
            chat_link.send_event(
                common.write,
                done={
                    "text": completion.text,
                    "finish_reason": "stopped" if stopped else completion.finish_reason,
                    "context_n": len(completion.prompt_ids) + len(completion.ids),
                    "answer_n": len(completion.ids),
                    **completion.timings,
                },
            )
        return 0

    def _write_plainly(self, text: str, is_thought: bool) -> None:
        if not self._arguments.json and not (is_thought and self._is_apart):
            common.write(text)

    def _answer(
        self, engine: Engine, messages: Messages, write: Callable[[str, bool], None], should_stop: Callable[[], bool]
    ) -> Completion:
        """Answer messages; `write` gets the text as it comes, and whether the model only thinks it.

        Raises:
            UsageError: the messages do not fit the context or the template.
        """
        from llmrun.harmony import MessageStream, begun_message, shown_marks, speaks_harmony
        from llmrun.thoughts import ThoughtStream, begins_thought, may_think, shown_tokens, tags_of

        arguments, tokenizer = self._arguments, engine.tokenizer
        prompt_ids = self._encode(engine, messages)
        thoughts = shown = None
        told: tuple[list[str], list[str]] = [], []  # thoughts, and the rest
        if tokenizer is not None and speaks_harmony(tokenizer):
            thoughts, shown = MessageStream(begun_message(tokenizer, prompt_ids)), shown_marks(tokenizer)
            self._is_apart = True
        elif may_think(tokenizer):
            has_begun = begins_thought(tokenizer, prompt_ids)
            thoughts = ThoughtStream(tags_of(tokenizer), has_begun=has_begun, is_apart=False)
            shown = shown_tokens(tokenizer)

        def tell(thought: str, text: str) -> None:
            if thought:
                write(thought, True)
                told[0].append(thought)
            if text:
                if self._is_apart and told[0] and not told[1]:
                    write("\n\n", True)
                write(text, False)
                told[1].append(text)

        room = engine.max_seq_len - len(prompt_ids)
        request = engine.submit(
            prompt_ids,
            max_tokens=min(arguments.max_tokens or DEFAULT_ANSWER_TOKENS, max(room, 1)),
            stop=arguments.stop,
            ignore_eos=arguments.ignore_eos,
            shown_tokens=shown,
            **common.sampling_of(arguments),
        )
        try:
            while request.finish_reason is None and not should_stop():
                for event in engine.step():
                    tell(*(("", event.text) if thoughts is None else thoughts.push(event.text)))
        finally:
            engine.cancel(request)
        if thoughts is not None:
            tell(*thoughts.finish())
        completion = engine.completion(request)
        if self._is_apart:
            completion = replace(completion, text="".join(told[1]))
        self._answered = ([*messages], prompt_ids, completion.ids)
        return completion

    def _encode(self, engine: Engine, messages: Messages) -> list[int]:
        """Return the prompt's ids: those of the turn before and what is new, where messages go on from it."""
        from llmrun.chat import encode_chat, extend_chat

        assert engine.tokenizer is not None
        kwargs = self._arguments.chat_template_kwargs
        if self._answered is not None:
            before, prompt_ids, answer_ids = self._answered
            if len(messages) == len(before) + 2 and messages[: len(before)] == before:
                ids = extend_chat(engine.tokenizer, messages, prompt_ids, answer_ids, chat_template_kwargs=kwargs)
                if ids is not None:
                    return ids
        return encode_chat(engine.tokenizer, messages, chat_template_kwargs=kwargs)
