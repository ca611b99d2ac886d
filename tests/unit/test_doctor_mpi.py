"""`llmrun doctor` without an MPI library, without an artifact, and with an operator library that does not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrun import library
from mpi.harness import run_alone

Packed = Callable[..., Path]
NO_LIBRARY = {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}


@pytest.mark.parametrize(("shards", "code"), [(1, 0), (2, 4)])
def test_a_box_without_mpi_is_fit_for_one_rank(shards: int, code: int, packed_tiny: Packed) -> None:
    outcome = run_alone("doctor", packed_tiny(shards, "q8"), "--json", environment=NO_LIBRARY)
    assert outcome.code == code
    checks = {entry["check"]: entry for entry in json.loads(outcome.stdout)["checks"]}
    assert checks["mpi"]["ok"]
    assert checks["mpi"]["found"].startswith("none: models of one rank only (MPI cannot be loaded")
    assert checks["artifact"]["ok"] is (shards == 1)
    assert ("1 rank," if shards == 1 else "E411: MPI cannot be loaded") in checks["artifact"]["found"]


def test_a_library_for_a_newer_system_says_where_to_build_it() -> None:
    old = OSError("/lib/libc.so.6: version `GLIBC_2.36' not found (required by libllmpack_ops.so)")
    assert "on an older one" in str(library.cannot_load(Path("x.so"), old))
    assert "older" not in str(library.cannot_load(Path("x.so"), OSError("file too short")))


def test_no_artifact_is_said_once(tmp_path: Path) -> None:
    outcome = run_alone("doctor", tmp_path / "none", "--json")
    assert outcome.code == 2
    assert [entry["check"] for entry in json.loads(outcome.stdout)["checks"] if not entry["ok"]] == ["artifact"]
