"""Talk with the model, in the form of its chat template.

Turns come from the terminal, or line by line from standard input. Ctrl-C stops an answer; an empty line or the end of
the input leaves.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from llmrun import console, stdin
from llmrun.commands import common
from llmrun.errors import UsageError

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals

DEFAULT_ANSWER_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    common.add_sampling_options(parser)
    common.add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer turn after turn."""
    common.check_sampling(arguments)
    command = _Chat(arguments)
    return common.run_on_ranks(arguments, common.RankWork(command.talk, command.prepare))


class _Chat:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._messages: list[dict[str, str]] = []
        if arguments.system is not None:
            text = stdin.decode_utf8(os.fsencode(arguments.system), "--system")
            self._messages.append({"role": "system", "content": text})

    def prepare(self, engine: Engine) -> None:
        """Refuse an artifact that cannot chat, before the weights are read."""
        if engine.tokenizer is None or engine.tokenizer.chat_template is None:
            missing = "tokenizer" if engine.tokenizer is None else "chat template"
            raise UsageError(f"{self._arguments.artifact}: has no {missing}. Use `llmrun generate`.", code="E205")

    def talk(self, engine: Engine, signals: Signals) -> int:
        """Read a turn, answer it, and so on."""
        is_interactive = console.is_terminal("stdin") and console.is_terminal("stderr")
        self._invite(is_interactive)
        for line in stdin.read_lines():
            text = stdin.decode_utf8(line, "standard input").strip()
            if not text:
                break
            self._messages.append({"role": "user", "content": text})
            try:
                self._answer(engine, signals)
            except UsageError as error:
                if not is_interactive:
                    raise
                self._messages.pop()
                console.say(console.error_line(error))
            self._invite(is_interactive)
        return 0

    def _invite(self, is_interactive: bool) -> None:
        if is_interactive:
            os.write(2, b"> ")

    def _answer(self, engine: Engine, signals: Signals) -> None:
        from llmrun.chat import encode_chat

        arguments = self._arguments
        assert engine.tokenizer is not None
        prompt_ids = encode_chat(engine.tokenizer, self._messages)
        room = engine.max_seq_len - len(prompt_ids)
        request = engine.submit(
            prompt_ids,
            max_tokens=min(arguments.max_tokens or DEFAULT_ANSWER_TOKENS, max(room, 1)),
            stop=arguments.stop,
            ignore_eos=arguments.ignore_eos,
            **common.sampling_of(arguments),
        )
        try:
            with signals.answering():
                while request.finish_reason is None and not signals.stop_answer.is_set():
                    for event in engine.step():
                        if not arguments.json:
                            common.write(event.text)
        finally:
            engine.cancel(request)
        if arguments.json:
            common.write_json(engine.completion(request).as_json())
        else:
            common.write("\n")
        self._messages.append({"role": "assistant", "content": request.text.strip()})
