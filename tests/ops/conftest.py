"""Where the operator library is, and a parameter for each instruction set of this machine."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
if importlib.util.find_spec("llmpack_ops") is None:
    sys.path.insert(0, str(ROOT / "custom_ops"))
if importlib.util.find_spec("llmrun") is None:
    sys.path.insert(0, str(ROOT / "runtime"))

import helpers  # noqa: E402  (beside this file)

from llmrun.job_options import ISAS  # noqa: E402

helpers.LIBRARY_PATH = helpers.find_library()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops-library", help="operator library to test, in place of the installed one")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--ops-library", default=None)
    if given:
        helpers.LIBRARY_PATH = Path(given).resolve()


@pytest.fixture(scope="session")
def library_path() -> Path:
    return helpers.LIBRARY_PATH


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    from llmrun.operators import load_library

    return load_library(library_path)


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of probe.cpp."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the probe with")
    path = tmp_path_factory.mktemp("probe") / "libprobe.so"
    own = [ROOT / "custom_ops" / name for name in ("ort/kernel.cpp", "cpu/threads.cpp", "cpu/waiting.cpp")]
    sources = [ROOT / "tests/ops/probe.cpp", *own]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", f"-I{ROOT / 'custom_ops'}"]
    subprocess.run([compiler, *flags, *sources, "-o", path], check=True, timeout=120)
    return path


EMULATED = "aarch64:"


@pytest.fixture(params=[*ISAS, EMULATED + "portable", EMULATED + "neon"])
def isa(request: pytest.FixtureRequest):
    """Runs the test once on each instruction set that this machine has, and on those of an emulated aarch64."""
    if request.param.startswith(EMULATED):
        helpers.EMULATOR = request.getfixturevalue("emulator")
        helpers.EMULATOR.set_isa(request.param.removeprefix(EMULATED))
        yield request.param
        helpers.EMULATOR = None
        return
    library: ctypes.CDLL = request.getfixturevalue("library")
    before = library.llmpack_ops_isa()
    if library.llmpack_ops_set_isa(request.param.encode()) != 0:
        pytest.skip(library.llmpack_ops_last_error().decode())
    yield request.param
    library.llmpack_ops_set_isa(before)


@pytest.fixture
def weight_fetches(library: ctypes.CDLL) -> Iterator[Iterator[bytes]]:
    """Switches to each way of asking for weights, keys and values in turn."""

    def each() -> Iterator[bytes]:
        for name in (b"through-caches", b"past-caches"):
            assert library.llmpack_ops_set_weight_fetch(name) == 0
            yield name

    before = library.llmpack_ops_weight_fetch()
    yield each()
    assert library.llmpack_ops_set_weight_fetch(before) == 0
