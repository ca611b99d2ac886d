"""What these tests share: damage to a copy of an artifact, lies that agree with each other, one way to be refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrun.artifact import LlmpackError, digest_file, manifest_bytes, open_artifact
from mpi.harness import Outcome

LINE = re.compile(r"llmrun: error\[E(\d)\d\d\]: \S.*\S")
MANIFEST = "manifest.json"
# One file of each kind that a packed two-rank model with a tokenizer holds.
LISTED = (
    "rank-0/cpu.onnx", "rank-0/weights.bin", "rank-1/cpu.onnx", "rank-1/weights.bin", "selfcheck.json",
    "tokenizer/tokenizer.model", "tokenizer/chat_template.jinja", "tokenizer/golden.json",
)  # fmt: skip


def copy(artifact: Path, target: Path) -> Path:
    return Path(shutil.copytree(artifact, target))


def read_members(artifact: Path) -> dict[str, Any]:
    """The manifest's members without its digest."""
    members = json.loads((artifact / MANIFEST).read_text())
    del members["manifest_sha256"]
    return members


def write_members(artifact: Path, members: dict[str, Any]) -> None:
    """Write a manifest whose own digest is right, whatever it says."""
    (artifact / MANIFEST).write_bytes(manifest_bytes(members))


def list_again(artifact: Path) -> None:
    """Make the manifest true of the files that are there: sizes, digests, chunks."""
    members = read_members(artifact)
    for name in members["files"]:
        entry = digest_file(artifact / name)
        members["files"][name] = {"size": entry.size, "chunks": list(entry.chunks)}
    write_members(artifact, members)


def check(artifact: Path, ranks: list[int] | None = None) -> None:
    """Do what every start does before it parses a file: open, then compare digests."""
    opened = open_artifact(artifact, ranks)
    names = opened.manifest.files if ranks is None else opened.files_of_rank(ranks[0])
    opened.verify(names)


def refusal(work: Callable[[], object]) -> LlmpackError:
    """The error that `work` must raise: one line, with a code of its class."""
    with pytest.raises(LlmpackError) as caught:
        work()
    error = caught.value
    assert error.code[1] == str(error.exit_code), error.code
    assert len(str(error)) < 2000
    return error


def assert_refused(outcome: Outcome, exit_code: int, *words: str) -> None:
    """Right exit code, one sentence that says `words`, nothing else on standard error, nothing on standard output."""
    assert outcome.code == exit_code, outcome
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    match = LINE.fullmatch(lines[0])
    assert match, lines
    assert match[1] == str(exit_code), lines
    assert outcome.stdout == ""
    assert outcome.leftovers == []
    for word in words:
        assert word in lines[0]
