"""Complete a text.

The prompt comes from -p, -f or standard input. On a terminal without any of them `llmrun ARTIFACT` is a chat.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llmrun import console, stdin
from llmrun.commands import chat, common
from llmrun.errors import UsageError
from llmrun.requests import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    parser.add_argument("-p", "--prompt", type=common.text_of("-p"), metavar="TEXT", help="the text to complete")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the prompt from FILE")
    parser.add_argument("--ids", action="store_true", help="the prompt is a JSON list of token ids")
    chat.set_chat_defaults(parser)
    common.add_sampling_options(parser, f"{DEFAULT_MAX_TOKENS}, in a chat {chat.DEFAULT_ANSWER_TOKENS}")
    common.add_engine_options(parser, speculates=True)


def run(arguments: argparse.Namespace) -> int:
    """Generate, or chat if there is no prompt but a terminal."""
    if arguments.prompt is not None and arguments.file is not None:
        raise UsageError("-p and -f: give one of them.")
    if arguments.prompt is None and arguments.file is None and console.is_terminal("stdin"):
        if arguments.ids:
            raise UsageError("--ids: give the list with -p, -f or on standard input; a chat has none.")
        return chat.run(arguments)
    common.check_sampling(arguments)
    command = _Generate(arguments)
    return common.run_on_ranks(arguments, common.RankWork(command.generate, command.prepare))


class _Generate:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._prompt: str | list[int] = []

    def prepare(self, engine: Engine) -> None:
        """Read and check the prompt, on rank 0 before the weights are read."""
        text, where = self._read()
        if not text:
            raise UsageError(
                f"{where}: the prompt is empty. Give a text with -p, -f or on standard input.", code="E203"
            )
        if engine.tokenizer is None and not self._arguments.ids:
            raise UsageError("the artifact has no tokenizer: give token ids with --ids.", code="E205")
        self._prompt = common.parse_ids(text, where) if self._arguments.ids else text
        engine.check_prompt(self._prompt, self._arguments.max_tokens)

    def generate(self, engine: Engine, _signals: Signals) -> int:
        """Print the completion as it comes, or all of it as JSON."""
        arguments = self._arguments
        request = engine.submit(
            self._prompt,
            max_tokens=arguments.max_tokens,
            stop=arguments.stop,
            ignore_eos=arguments.ignore_eos,
            **common.sampling_of(arguments),
        )
        has_text = request.stream is not None
        shown = console.harmless if console.is_terminal("stdout") else str
        while request.finish_reason is None:
            for event in engine.step():
                if arguments.json:
                    continue
                if has_text:
                    common.write(shown(event.text))
                elif event.token_id is not None:
                    common.write(f"{event.token_id} ")
        if arguments.json:
            common.write_json(engine.completion(request).as_json())
        else:
            common.write("\n")
        return 0

    def _read(self) -> tuple[str, str]:
        """Return the prompt, and where it came from; the newline that ends a file is not part of it."""
        if self._arguments.prompt is not None:
            return self._arguments.prompt, "-p"
        if self._arguments.file is None:
            data, where = b"".join(stdin.read_chunks()), "standard input"
        else:
            where = self._arguments.file
            data = stdin.read_file(where)
        return stdin.decode_utf8(data, where).removesuffix("\n"), where
