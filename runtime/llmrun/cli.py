"""The command line `llmrun`: arguments in, one command's exit code out.

Commands are modules of `llmrun.commands`; only the chosen one imports what it needs, so that `--help` loads neither
numpy nor ONNX Runtime nor MPI.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from llmrun import __version__, console, launcher
from llmrun.errors import LlmpackError, UsageError

COMMANDS = ("generate", "chat", "serve", "perplexity", "bench", "verify", "show", "doctor")
_EPILOG = """\
llmrun ARTIFACT          chat on a terminal; otherwise complete the text of -p, -f or standard input
llmrun ARTIFACT -p TEXT  complete TEXT; `llmrun COMMAND --help` lists a command's options
An artifact of several ranks is started under this environment's mpirun; `mpirun -n N llmrun ...` works as well
(the -n before `llmrun` is mpirun's number of ranks, the -n after it is --max-tokens).

exit codes: 0 ok, 1 internal, 2 usage, 3 integrity, 4 incompatible, 5 resources, 6 peer lost or stuck, 7 numeric,
130/143 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line, on rank 0 only."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. `{self.prog} --help` shows how.")


def build_parser(wanted: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of the whole command line; only the `wanted` commands are imported and know their options."""
    parser = _Parser(
        prog="llmrun",
        description="Run a model that `pack` has packed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmrun {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in wanted:
        module = _module_of(name)
        text = module.__doc__ or ""
        first = text.partition(".\n")[0].removesuffix(".")
        command = commands.add_parser(name, help=first, description=text, allow_abbrev=False)
        module.add_arguments(command)
    return parser


def _module_of(command: str) -> Any:
    return importlib.import_module(f"llmrun.commands.{command}")


def complete_arguments(arguments: Sequence[str]) -> list[str]:
    """Insert the command `generate` where the user typed none: `llmrun ARTIFACT ...`."""
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        return ["generate", *arguments]
    return list(arguments) or ["--help"]


def _parse(complete: Sequence[str], typed: Sequence[str]) -> argparse.Namespace:
    try:
        chosen, rest = build_parser(complete[:1] if complete[0] in COMMANDS else COMMANDS).parse_known_args(complete)
        if rest:
            raise UsageError(f"unrecognized arguments: {' '.join(rest)}. `llmrun {chosen.command} --help` shows how.")
    except UsageError as error:
        if list(complete) == list(typed) or typed[0].startswith("-") or os.path.exists(typed[0]):
            raise
        what = f"{typed[0]}: found neither an artifact nor a command ({', '.join(COMMANDS)})"
        raise UsageError(f"{what}; {error}") from None
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Errors are one line on standard error."""
    if arguments is None:
        # numpy's BLAS starts a thread for each core when it is imported; nothing here multiplies matrices with it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    launcher.forget_lost_launcher()
    is_spokesman = console.environment_rank() == 0
    try:
        folder = _launched_from()
        _connect_streams(folder, is_spokesman=is_spokesman)
        if folder is not None:
            typed = launcher.read_arguments(folder)
        complete = complete_arguments(typed)
        chosen = _parse(complete, typed)
        chosen.typed = typed
        return _module_of(chosen.command).run(chosen)
    except BrokenPipeError:  # `llmrun show X | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = console.as_llmpack_error(error)
        if is_spokesman:
            console.show_traceback(error)
            console.say(console.error_line(error))
        elif launcher.launcher_family() == launcher.OPEN_MPI:
            from llmrun.watchdog import TURN_S

            time.sleep(TURN_S)  # it ends all ranks with the first that fails: the one that speaks goes before
        launcher.note_exit_code(known.exit_code)
        if (launcher.launcher_size() or 1) > 1:
            _take_along_who_waits(known)
        return known.exit_code


def _take_along_who_waits(error: LlmpackError) -> None:
    """If the ranks have not met, end this one so that those of its host, which may be waiting for it, end too."""
    from llmrun import failstop, peers

    if peers.has_joined():
        return
    rank = console.environment_rank()
    if rank != 0 and peers.is_alone_with_it(is_told_alike=isinstance(error, UsageError)):
        console.say(console.error_line(type(error)(f"rank {rank}: {error}", code=error.code)))
    failstop.take_along(peers.siblings)
    failstop.leave(error.exit_code)


def _launched_from() -> str | None:
    """Return the folder of the llmrun that launched this rank, if one did."""
    is_launched = console.is_under_mpirun() or launcher.CHAT_VARIABLE in os.environ
    return os.environ.get(launcher.LAUNCH_VARIABLE) if is_launched else None


def _connect_streams(folder: str | None, *, is_spokesman: bool) -> None:
    """Connect a rank to the llmrun that launched it, if one did; ranks above 0 get neither input nor output."""
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file opened; reading only, so writing fails
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    if folder is not None:
        os.dup2(launcher.open_pipe(folder, "stderr"), 2)
        open(os.path.join(folder, "started"), "w").close()
    if not is_spokesman:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
    elif folder is not None:
        os.dup2(launcher.open_pipe(folder, "stdout"), 1)
