"""Check an artifact: every file's digest, and with --deep that this machine computes what the packager did.

Without --deep one process reads the files and nothing is run. --deep loads the model on all its ranks, encodes the
tokenizer's golden texts and compares logits with the packager's.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmrun import console
from llmrun.commands import common
from llmrun.errors import IntegrityError, UsageError
from llmrun.job_options import JobOptions

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    parser.add_argument("--deep", action="store_true", help="also run the model on the packager's examples")
    parser.add_argument(
        "--ranks", type=_ranks, metavar="N,N", help="of a host that holds only these ranks' folders; default: all"
    )
    common.add_engine_options(parser, "running, with --deep", verifies=False)


def run(arguments: argparse.Namespace) -> int:
    """Verify; print what was verified."""
    if arguments.deep:
        if arguments.ranks is not None:
            raise UsageError("--ranks with --deep: the model runs on all its ranks. Start them with mpirun instead.")
        arguments.verify = "full"
        return common.run_on_ranks(arguments, common.RankWork(lambda engine, _: _verify_deep(arguments, engine, _)))
    for name, default in vars(JobOptions()).items():
        if getattr(arguments, name, default) != default:
            raise UsageError(f"--{name.replace('_', '-')} is for --deep: without it nothing is run.")
    if console.environment_rank() != 0:
        return 0
    from llmrun.artifact import open_artifact

    artifact = open_artifact(arguments.artifact, arguments.ranks)
    entries = artifact.manifest.files
    files = [name for name, times in artifact.times_of(entries).items() if times]  # those of other hosts are absent
    artifact.verify(files, console.Progress("verifying", is_quiet=False))
    total = sum(entries[name].size for name in files)
    _report(arguments, {"files": len(files), "bytes": total, "manifest_sha256": artifact.digest})
    return 0


def _ranks(text: str) -> list[int]:
    try:
        return [int(rank) for rank in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers and commas, as in 0,1") from None


def _verify_deep(arguments: argparse.Namespace, engine: Engine, _signals: Signals) -> int:
    difference, tolerance = engine.selfcheck()
    if not difference <= tolerance:
        raise IntegrityError(
            f"{arguments.artifact}: logits differ from the packager's by {difference:.4g}, expected at most {tolerance:.4g}."
            " The files are sound, so this machine or its software computes wrongly: try --isa portable.",
            code="E315",
        )
    facts = {
        "manifest_sha256": engine.job.artifact.digest,
        "max_logit_difference": difference,
        "tolerance": tolerance,
        "golden_texts": _check_golden_texts(arguments.artifact, engine),
    }
    _report(arguments, facts)
    return 0


def _check_golden_texts(where: str, engine: Engine) -> int:
    """Encode the golden texts; return how many there are."""
    if engine.tokenizer is None:
        return 0
    golden = engine.job.artifact.read_golden_texts()
    for text, expected in golden:
        ids = engine.tokenizer.encode(text, add_bos=False)
        if ids != expected:
            raise IntegrityError(
                f"{where}: the tokenizer library gives {ids[:20]} for {text[:40]!r}, the packager's gave"
                f" {expected[:20]}. Install the release of it that llmpack names.",
                code="E316",
            )
    return len(golden)


def _report(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    if arguments.json:
        common.write_json({"ok": True, **facts})
    else:
        common.write(f"{arguments.artifact}: ok" + "".join(f", {k} {v}" for k, v in facts.items()) + "\n")
