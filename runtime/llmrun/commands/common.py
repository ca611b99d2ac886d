"""What the commands share: options, output, and running a command's work on every rank of a job."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from llmrun import console, failstop, launcher, stdin
from llmrun.errors import PeerError, ResourceError, UsageError
from llmrun.job_options import ISAS, PROVIDER_CHOICES, VERIFY_MODES, JobOptions
from llmrun.memory import give_large_blocks_back
from llmrun.requests import MAX_DRAFTS

if TYPE_CHECKING:
    from llmrun.engine import Engine

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """Add the artifact's directory, and --json."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory made by `pack`")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_engine_options(
    parser: argparse.ArgumentParser, title: str = "running", *, verifies: bool = True, speculates: bool = False
) -> None:
    """Add what `Engine` takes: how much is verified, and how far it guesses ahead, where the command leaves that open."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--provider",
        choices=PROVIDER_CHOICES,
        default=JobOptions.provider,
        help="where to compute; auto: on GPUs that the artifact has code for and onnxruntime a provider, else on the CPU",
    )
    group.add_argument("--share-gpu", action="store_true", help="let ranks share a GPU where there are too few")
    group.add_argument("--threads", type=int, metavar="N", help="threads a rank (its share of the cores)")
    group.add_argument("--max-seq-len", type=int, metavar="N", help="positions of a sequence (as packed)")
    group.add_argument(
        "--kv-cache-mb", type=int, metavar="MB", help="memory for keys and values, a rank (what is needed)"
    )
    group.add_argument(
        "--isa",
        choices=ISAS,
        help="instruction set of the CPU kernels (default: the best that the machine has)",
    )
    if verifies:
        group.add_argument(
            "--verify",
            choices=VERIFY_MODES,
            default=JobOptions.verify,
            help="auto: hash what has changed since it was last hashed; full: hash every file; size, off: compare sizes alone",
        )
    if speculates:
        group.add_argument(
            "--speculate",
            type=int,
            default=0,
            metavar="K",
            help=f"guess K tokens ahead, at most {MAX_DRAFTS}, from the text so far (0: off)",
        )


def add_sampling_options(parser: argparse.ArgumentParser, most_tokens: str) -> None:
    """Add the length, of which help says what it is by default, the ways to sample, and the stop texts."""
    group = parser.add_argument_group("sampling (the artifact has the defaults)")
    group.add_argument(
        "-n", "--max-tokens", type=int, metavar="N", help=f"tokens to generate at most ({most_tokens}, or what fits)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens of total probability P")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest"
    )
    group.add_argument("--repeat-penalty", type=float, metavar="R", help="divide the logits of tokens seen before by R")
    group.add_argument("--seed", type=int, metavar="S", help="make sampling repeatable")
    group.add_argument(
        "--stop",
        type=text_of("--stop"),
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")


def text_of(option: str) -> Callable[[str], str]:
    """Return what argparse makes an option's text with: UTF-8 whatever the locale, as standard input and files are.

    It raises UsageError where that is no UTF-8.
    """
    return lambda typed: stdin.decode_utf8(os.fsencode(typed), option)


def add_template_option(parser: argparse._ActionsContainer) -> None:
    """Add what a chat template may ask for beside messages."""
    parser.add_argument(
        "--chat-template-kwargs",
        type=_template_kwargs,
        metavar="JSON",
        help="""variables that the chat template asks for: '{"enable_thinking": false}', say""",
    )


def _template_kwargs(typed: str) -> Mapping[str, Any]:
    from llmrun.chat import checked_kwargs

    option = "--chat-template-kwargs"
    try:
        value = json.loads(text_of(option)(typed))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option}: not JSON: {error}. Expected an object.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option}: found a JSON {type(value).__name__}, expected an object.")
    return checked_kwargs(value)


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options that the user gave."""
    return {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}


def check_sampling(arguments: argparse.Namespace) -> None:
    """Refuse bad sampling options before anything is loaded.

    Raises:
        UsageError: a value is out of its range.
    """
    from llmrun.sampler import SamplingParams

    SamplingParams(**{name: value for name, value in sampling_of(arguments).items() if value is not None})
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens {arguments.max_tokens}: expected 1 or more.")


def write(text: str) -> None:
    """Write to standard output at once, in UTF-8 whatever the locale."""
    if sys.stdout is not None:  # the interpreter's name for a closed one
        sys.stdout.flush()
    try:
        console.write_all(1, text.encode("utf-8", "replace"))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"standard output: {error.strerror}.", code="E503") from None


def write_json(value: Any) -> None:
    """Write one JSON document, on one line."""
    write(json.dumps(value, ensure_ascii=False) + "\n")


def parse_ids(text: str, where: str) -> list[int]:
    """Return the token ids of a JSON list.

    Raises:
        UsageError: it is not a list of whole numbers.
    """
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}. Expected a list of token ids.", code="E208") from None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UsageError(f"{where}: expected a JSON list of token ids.", code="E208")
    return ids


@dataclass(frozen=True)
class RankWork:
    """A command's work: what rank 0 prepares before weights are read, what every rank does, what rank 0 does."""

    main: Callable[[Engine, failstop.Signals], int]
    prepare: Callable[[Engine], None] | None = None
    every_rank: Callable[[Engine], None] | None = None
    max_num_seqs: int = 1
    drains: bool = False  # rank 0 ends in order after SIGTERM, and says farewell when another rank is lost


def run_on_ranks(arguments: argparse.Namespace, work: RankWork) -> int:
    """Run a command's work on as many ranks as the artifact has; start them if no launcher did.

    Returns:
        the job's exit code, on every rank.
    """
    if launcher.launcher_family() is None:
        from llmrun.artifact import open_artifact

        shards = open_artifact(arguments.artifact, ranks=[]).manifest.shards
        if shards > 1:
            from llmrun import launch

            return launch.run_job(shards, arguments.typed)
    rank, size = console.environment_rank(), launcher.launcher_size() or 1
    if work.drains and rank == 0 and console.is_under_mpirun():
        failstop.outlive_launcher()
    signals = failstop.Signals()
    signals.install()
    failstop.install_hooks(rank, size, keep_traceback=False)
    if console.is_under_mpirun() and not (work.drains and rank == 0):
        launcher.die_with_parent(signal.SIGKILL)
    give_large_blocks_back()
    engine = _start(arguments, work)
    if work.every_rank is not None:
        work.every_rank(engine)
    if engine.rank != 0:
        if work.drains:
            signals.ignore()
        return _follow(engine)
    return _lead(engine, work, signals)


def _start(arguments: argparse.Namespace, work: RankWork) -> Engine:
    """Load the engine; its errors are the same on every rank, but for a lost peer."""
    from llmrun.engine import Engine

    try:
        return Engine(
            arguments.artifact,
            provider=arguments.provider,
            threads=arguments.threads,
            max_seq_len=arguments.max_seq_len,
            max_num_seqs=getattr(arguments, "max_num_seqs", work.max_num_seqs),
            kv_cache_mb=arguments.kv_cache_mb,
            speculate=getattr(arguments, "speculate", 0),
            verify=arguments.verify,
            isa=arguments.isa,
            share_gpu=arguments.share_gpu,
            prepare=work.prepare,
            is_mirroring=False,
        )
    except PeerError as error:
        _fail(error)


def _follow(engine: Engine) -> int:
    try:
        return engine.follow()
    except BaseException as error:
        _fail(error, f"rank {engine.rank}: ")


def _lead(engine: Engine, work: RankWork, signals: failstop.Signals) -> int:
    """Do rank 0's work and end the job with its exit code, in order if the ranks are between two steps."""
    try:
        code = work.main(engine, signals)
    except BrokenPipeError:  # the reader has seen enough: `llmrun ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except BaseException as error:
        where = "rank 0: " if engine.size > 1 else ""
        known = console.as_llmpack_error(error, where)
        if engine.job.is_broken:
            _fail(error, where)
        console.show_traceback(error)
        console.say(console.error_line(known))
        code = known.exit_code
    engine.close(code)
    return code


def _fail(error: BaseException, where: str = "") -> NoReturn:
    """Report an error after which the ranks cannot leave in order, and end the job."""
    console.show_traceback(error)
    known = console.as_llmpack_error(error, where)
    # A rank that has been left has nothing to add to why, if its launcher is slow to end it.
    if not (isinstance(known, PeerError) and launcher.has_exit_code()):
        console.say(console.error_line(known))
    failstop.leave(known.exit_code)
