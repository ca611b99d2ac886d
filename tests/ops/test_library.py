"""The library itself: what it exports and what it is made of."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
from helpers import Node

from llmpack_ops import VERSION

HERE = Path(__file__).parent


def test_version_is_that_of_the_reference(library: ctypes.CDLL) -> None:
    assert library.llmpack_ops_version() == VERSION


def test_unknown_instruction_set_is_refused(library: ctypes.CDLL) -> None:
    before = library.llmpack_ops_isa()
    assert library.llmpack_ops_set_isa(b"sse9") == -1
    assert b"sse9 is not an instruction set of this machine, expected one of: " in library.llmpack_ops_last_error()
    assert b"portable" in library.llmpack_ops_last_error()
    assert library.llmpack_ops_set_isa(None) == -1
    assert library.llmpack_ops_isa() == before


def test_unknown_way_of_asking_for_weights_is_refused(library: ctypes.CDLL) -> None:
    before = library.llmpack_ops_weight_fetch()
    assert library.llmpack_ops_set_weight_fetch(b"around-caches") == -1
    assert b"around-caches is no way of asking for weights, expected " in library.llmpack_ops_last_error()
    assert library.llmpack_ops_set_weight_fetch(None) == -1
    assert library.llmpack_ops_weight_fetch() == before


def test_only_documented_names_are_exported(library_path: Path) -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", library_path], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in shown.splitlines()}
    headers = [HERE.parents[1] / "custom_ops" / name for name in ("llmpack_ops.h", "pack/pack.h")]
    header = "".join(path.read_text() for path in headers)
    exported = {n for n in names if not n.startswith(("__asan", "__ubsan", "__odr_asan", "_ZTI", "_ZTS"))}
    assert exported == {"RegisterCustomOps"} | {n for n in exported if f"{n}(" in header}


def test_kernels_use_no_framework_header() -> None:
    """cpu/ is plain pointers and sizes: of this project it includes itself and the exported header only."""
    for path in (HERE.parents[1] / "custom_ops/cpu").iterdir():
        included = [line.split()[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
        assert all(name.strip('"').startswith(("cpu/", "llmpack_ops.h")) for name in included), path


def read_profile(library: ctypes.CDLL) -> dict[str, tuple[int, int]]:
    name, calls, nanoseconds = ctypes.c_char_p(), ctypes.c_uint64(), ctypes.c_uint64()
    counts = {}
    pointers = [ctypes.byref(v) for v in (name, calls, nanoseconds)]
    while library.llmpack_ops_profile_read(len(counts), *pointers) == 0:
        counts[name.value.decode()] = calls.value, nanoseconds.value
    return counts


def test_the_profile_tells_places_apart_and_layers_not(library: ctypes.CDLL) -> None:
    x = np.ones((2, 64), np.float32)
    names = {f"/model/layers.{i}/mlp/act_fn" for i in (0, 17)} | {"/model/other"}
    sessions = [Node("SwiGLU", {"gate_up": x}, name=name) for name in names]
    for node in sessions:
        node.run()
    assert library.llmpack_ops_profile(1) == 0
    for node in sessions:
        node.run()
    assert library.llmpack_ops_profile(0) == 0
    counts = {name: calls for name, (calls, _) in read_profile(library).items() if calls}  # other tests' places count 0
    assert counts == {"SwiGLU /model/layers.*/mlp/act_fn": 2, "SwiGLU /model/other": 1}


def test_the_profile_counts_calls_and_time_while_it_is_on(library: ctypes.CDLL) -> None:
    node = Node("SwiGLU", {"gate_up": np.ones((50, 200), np.float32)})
    node.run()
    assert library.llmpack_ops_profile(1) == 0
    assert set(read_profile(library).values()) == {(0, 0)}
    for _ in range(3):
        node.run()
    assert library.llmpack_ops_profile(0) == 0
    node.run()
    calls, nanoseconds = read_profile(library)["SwiGLU the_node"]
    assert calls == 3
    assert 0 < nanoseconds < 60e9
    assert library.llmpack_ops_profile_read(99, None, None, None) == -1
    assert b"no operator has index 99" in library.llmpack_ops_last_error()
