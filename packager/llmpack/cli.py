"""`pack`: arguments -> pack(); prints; exit codes.

stdout carries the result (text, or one JSON object with --json); progress and errors go to stderr. Exit codes are those of
`llmrun`: 0 ok, 1 internal, 2 usage, 3 integrity, 4 incompatible, 5 resources; 130 and 143 after a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn, TextIO

from llmpack import __version__
from llmpack.options import Options
from llmrun.artifact import IncompatibleError, LlmpackError, ResourceError, UsageError

_EXAMPLES = """examples:
  pack models/Llama-2-7b-hf -o artifacts/llama-q4-tp2 --shards 2 --quant q4
  pack models/Llama-2-7b-hf --shards 2 --dry-run
  pack models/Llama-2-7b-hf -o artifacts/llama-q4 --targets sm_89,gfx1100

exit codes: 0 ok, 1 internal, 2 usage, 3 damaged input, 4 not supported, 5 disk or memory, 130/143 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pack",
        description="Turn a Hugging Face checkpoint of the Llama family into an artifact, which `llmrun` runs on its ranks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", type=Path, help="directory with config.json and *.safetensors"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="artifact to create (--dry-run needs none)")
    parser.add_argument(
        "--shards", metavar="N", type=int, default=Options.shards, help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--quant", metavar="SCHEME", default=Options.scheme, help="q4, q8, f16 or f32 (default: %(default)s)"
    )
    parser.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="weights per scale: 32, 64, 128 (default: 64, or 32 if 64 does not divide)",
    )
    parser.add_argument(
        "--kv-dtype", metavar="TYPE", help="keys and values in f16 or f32 (default: f32 with --quant f32, else f16)"
    )
    parser.add_argument(
        "--targets",
        metavar="LIST",
        default=",".join(Options.targets),
        help="comma-separated: cpu (always), sm_80 sm_86 sm_89 sm_90 sm_100 sm_120, gfx90a gfx942 gfx1100 gfx1201, or the names"
        " cuda, rocm, all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seq-len",
        metavar="N",
        type=int,
        help="longest sequence (default: max_position_embeddings, or what YaRN's factor makes of it)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print bytes and memory of each rank, and pack nothing")
    parser.add_argument(
        "--force", action="store_true", help="replace an artifact that exists, once the new one is complete"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--version", action="version", version=f"pack (llmpack) {__version__}")
    return parser


class _Progress:
    """A bar on a terminal, a line for every tenth elsewhere; silent with --json."""

    def __init__(self, stream: TextIO, enabled: bool) -> None:
        self.stream, self.enabled = stream, enabled
        self.is_bar = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.step, self.tenth, self.start = "", -1, time.monotonic()

    def __call__(self, step: str, done: int, total: int) -> None:
        if not self.enabled:
            return
        share = done / total if total else 1.0
        if self.is_bar:
            filled = int(30 * share)
            seconds = time.monotonic() - self.start
            self._write(f"\r\x1b[K{step:<11} [{'#' * filled}{'.' * (30 - filled)}] {share:4.0%} {seconds:6.1f} s")
        elif step != self.step or int(10 * share) != self.tenth:
            self._write(f"pack: {step} {share:.0%}\n")
        self.step, self.tenth = step, int(10 * share)

    def end(self) -> None:
        if self.enabled and self.is_bar and self.step:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # nobody sees it: `pack ... 2>&1 | head -1`, a full disk; the artifact does not need it
            self.enabled = False
            _discard(2)


class _Terminated(BaseException):
    """A signal asked us to stop; unwinding removes the partial directory."""


class _SignalsWait:
    """A context that ends before a signal comes: the exception of one would break an extension module in its own start."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def _terminate(number: int, _frame: object) -> NoReturn:
    raise _Terminated(number)


def main(arguments: list[str] | None = None) -> int:
    """Run `pack`; return the exit code."""
    parser = _parser()
    _open_closed_streams()
    args = parser.parse_args(arguments)
    if args.output is None and not args.dry_run:
        parser.error("-o DIR is needed (or --dry-run)")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    progress = _Progress(sys.stderr, enabled=not args.json)
    before = _identity(args.output)

    def outcome() -> str:
        if _identity(args.output) == before:
            return "nothing was written"
        return f"{args.output} is complete"  # it came after the last rename

    try:
        return _run(args, progress)
    except LlmpackError as error:
        progress.end()
        _report(error)
        return error.exit_code
    except MemoryError:
        progress.end()
        _report(ResourceError("not enough memory."))
        return ResourceError.exit_code
    except KeyboardInterrupt:
        progress.end()
        _say(f"interrupted; {outcome()}.")
        return 128 + signal.SIGINT
    except _Terminated as stop:
        progress.end()
        _say(f"terminated; {outcome()}.")
        return 128 + stop.args[0]
    except BrokenPipeError:  # the reader of stdout left, which is its right
        _discard(1)
        return 0
    except OSError as error:
        progress.end()
        where = f"{error.filename}: " if error.filename else ""
        _report(ResourceError(f"{where}{error.strerror or error}.", code="E502"))
        return ResourceError.exit_code
    except Exception as error:  # the last resort: one line for the user, the traceback on request
        progress.end()
        if os.environ.get("LLMPACK_DEBUG"):
            traceback.print_exc()
        _say(f"error[E101]: internal: {type(error).__name__}: {error} (LLMPACK_DEBUG=1 shows where)")
        return 1


def _open_closed_streams() -> None:
    """Occupy the numbers of closed standard streams, or the next file opened would be one."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)  # writing fails, as it should
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Return what tells a directory from the one that replaced it; None: there is none."""
    try:
        info = os.stat(path or "")
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _report(error: LlmpackError) -> None:
    """Print one line, whatever bytes the names in it hold."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(error))
    _say(f"error[{error.code}]: {text}")


def _say(text: str) -> None:
    """Print one line to standard error, if that can be written to; the exit code does not depend on it."""
    try:
        print(f"pack: {text}", file=sys.stderr)
    except OSError:
        _discard(2)


def _discard(descriptor: int) -> None:
    """Give what could not be written, and the interpreter would try again at exit (and end with 120), to nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _run(args: argparse.Namespace, progress: _Progress) -> int:
    # Imported here so that --help and usage errors need neither onnx nor numpy.
    try:
        with _SignalsWait():
            from llmpack import report
            from llmpack.pack import pack
    except ModuleNotFoundError as error:
        raise IncompatibleError(
            f"the module {error.name} is missing: this environment is a box's, without the packager."
            " `pip install 'llmpack[packager]'` adds it."
        ) from None

    for path in (args.model_dir, args.output):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{path}: the path is not UTF-8, and ONNX Runtime opens no other.") from None
    options = Options(
        shards=args.shards,
        scheme=args.quant,
        group_size=args.group_size,
        targets=tuple(args.targets.split(",")),
        max_seq_len=args.max_seq_len,
        force=args.force,
        kv_dtype=args.kv_dtype,
    )
    summary = pack(args.model_dir, None if args.dry_run else args.output, options, progress)
    progress.end()
    if args.json:
        text = json.dumps({**summary, "output": None if args.dry_run else str(args.output)}, indent=1)
    else:
        text = "\n".join([*report.lines(summary), *([] if args.dry_run else [f"packed {args.output}"])])
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(1)
        raise ResourceError(f"standard output: {error.strerror}.", code="E503") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
