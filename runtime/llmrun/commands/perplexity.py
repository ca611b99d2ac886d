"""Measure how well the model predicts a text.

The text is cut into windows that do not overlap, each begun with the BOS token if the model has one; given ids are
taken as they are.
"""

from __future__ import annotations

import argparse
import errno
import os
from typing import TYPE_CHECKING, Any

from llmrun import stdin
from llmrun.commands import common
from llmrun.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals

DEFAULT_WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    parser.add_argument("file", metavar="FILE", help="the text, in UTF-8")
    parser.add_argument("--ids", action="store_true", help="FILE is a JSON list of token ids")
    parser.add_argument("--window", type=int, metavar="N", help=f"tokens in a window ({DEFAULT_WINDOW}, or what fits)")
    parser.add_argument("--logits-out", metavar="F.npy", help="write the logits, float32 [tokens, vocab_size]")
    common.add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print tokens predicted, mean negative log likelihood and perplexity."""
    command = _Perplexity(arguments)
    return common.run_on_ranks(arguments, common.RankWork(command.measure, command.prepare))


def _expect_writable(path: str) -> None:
    """Refuse, before anything is computed, a file that cannot be written; makes none."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        number = errno.EISDIR
    elif not path or not os.path.isdir(folder):
        number = errno.ENOENT
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        number = errno.EACCES
    else:
        return
    raise UsageError(f"--logits-out {path}: {os.strerror(number)}.", code="E209")


class _Perplexity:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._windows: list[list[int]] = []

    def prepare(self, engine: Engine) -> None:
        """Read the text and cut it into windows, on rank 0 before the weights are read."""
        arguments = self._arguments
        window = min(DEFAULT_WINDOW, engine.max_seq_len) if arguments.window is None else arguments.window
        if not 2 <= window <= engine.max_seq_len:
            raise UsageError(f"--window {window}: expected 2 to {engine.max_seq_len}, the context.")
        text = stdin.decode_utf8(stdin.read_file(arguments.file), arguments.file)
        first: list[int] = []
        if arguments.ids:
            ids = common.parse_ids(text, arguments.file)
        else:
            if engine.tokenizer is None:
                raise UsageError("the artifact has no tokenizer: give token ids with --ids.", code="E205")
            ids = engine.tokenizer.encode(text, add_bos=False)
            first = engine.tokenizer.prefix
        if window <= len(first):
            raise UsageError(f"--window {window}: expected more than the {len(first)} tokens that begin each.")
        step = window - len(first)
        self._windows = [first + ids[start : start + step] for start in range(0, len(ids), step)]
        if not any(len(window_ids) > 1 for window_ids in self._windows):
            raise UsageError(f"{arguments.file}: too short, there is no token to predict.", code="E203")
        if arguments.logits_out is not None:
            _expect_writable(arguments.logits_out)

    def measure(self, engine: Engine, _signals: Signals) -> int:
        """Run window after window."""
        import numpy as np

        total, count = 0.0, 0
        kept: list[Any] = []
        for ids in self._windows:
            logits = engine.logits(ids)
            if self._arguments.logits_out is not None:
                kept.append(logits)
            rows = logits[:-1].astype(np.float64)
            highest = rows.max(axis=1)
            log_sum = highest + np.log(np.exp(rows - highest[:, None]).sum(axis=1))
            total += float((log_sum - rows[np.arange(len(rows)), ids[1:]]).sum())
            count += len(rows)
        if self._arguments.logits_out is not None:
            try:
                with open(self._arguments.logits_out, "wb") as file:
                    np.save(file, np.concatenate(kept))
            except OSError as error:
                raise ResourceError(f"{self._arguments.logits_out}: {error.strerror}.") from None
        nll = total / count
        if self._arguments.json:
            common.write_json({"tokens": count, "nll": nll, "perplexity": float(np.exp(nll))})
        else:
            common.write(f"tokens {count}   nll {nll:.6f}   perplexity {np.exp(nll):.4f}\n")
        return 0
