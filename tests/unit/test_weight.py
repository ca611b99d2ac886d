"""What an installation weighs: the distributions that each extra brings, as pip has installed them here, without llmpack."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import llmpack
import llmpack_kernels
import llmpack_ops
import llmrun

MB = 1 << 20
SOURCES_AND_BYTECODE = 2.5  # measured: bytecode is a little more than the source


def distributions(*extras: str) -> dict[str, importlib.metadata.Distribution]:
    """Return everything that llmpack with these extras requires, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}

    def add(name: str, wanted: frozenset[str]) -> None:
        distribution = importlib.metadata.distribution(name)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found and not wanted:
            return
        found[key] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                add(requirement.name, frozenset(requirement.extras))

    add("llmpack", frozenset(extras))
    del found["llmpack"]
    return found


def weight(distribution: importlib.metadata.Distribution) -> int:
    """Return the blocks on disk of a distribution's files, in bytes; pip lists the bytecode that it makes."""
    paths = {Path(str(file.locate())) for file in distribution.files or ()}
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def own_weight() -> float:
    folders = [Path(str(module.__file__)).parent for module in (llmrun, llmpack, llmpack_ops, llmpack_kernels)]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    sources = sum(-(-file.stat().st_size // 4096) * 4096 for file in files if file.suffix != ".so")
    library = importlib.metadata.distribution("llmpack").files or ()
    binaries = sum(Path(str(file.locate())).stat().st_size for file in library if file.suffix == ".so")
    assert binaries > MB
    return sources * SOURCES_AND_BYTECODE + binaries


@pytest.fixture(scope="module")
def box() -> dict[str, importlib.metadata.Distribution]:
    try:
        return distributions("cpu", "mpich")
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"not installed here: {error.name}")


def test_a_box_needs_less_than_260_mb(box: dict[str, importlib.metadata.Distribution]) -> None:
    weights = {name: weight(distribution) for name, distribution in box.items()}
    assert {"numpy", "onnxruntime", "mpich", "tokenizers"} <= set(weights)
    assert "torch" not in weights
    total = sum(weights.values()) + own_weight()
    heaviest = sorted(weights.items(), key=lambda item: -item[1])[:8]
    assert total < 260 * MB, f"{total / MB:.0f} MB: {heaviest}"


def test_the_server_adds_less_than_20_mb(box: dict[str, importlib.metadata.Distribution]) -> None:
    more = {name: weight(it) for name, it in distributions("cpu", "mpich", "serve").items() if name not in box}
    assert "llguidance" in more
    assert sum(more.values()) < 20 * MB, more
