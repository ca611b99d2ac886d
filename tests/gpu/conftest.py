"""Where the operator library is; artifacts for stand-in GPUs; the stand-ins, compiled once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # helpers
sys.path.insert(0, str(Path(__file__).parent))

import standin


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in libraries."""
    return standin.build(tmp_path_factory.mktemp("standins"))


@pytest.fixture(scope="session")
def operators() -> Path:
    from llmrun.library import find_library

    return find_library()


@pytest.fixture(scope="session")
def gpu_artifact(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Callable[..., Path]:
    """gpu_artifact(checkpoint, shards, scheme): rank-*/gpu.onnx beside the weights, kernels/*.bin whose code is a name."""
    from gpu_artifacts import add_gpu

    root = tmp_path_factory.mktemp("gpu-artifacts")
    done: dict[tuple, Path] = {}

    def get(checkpoint: Path, shards: int = 1, quant: str = "q4") -> Path:
        key = (checkpoint, shards, quant)
        if key not in done:
            done[key] = add_gpu(packed(checkpoint, shards, quant), root / f"{len(done)}-{quant}-tp{shards}")
        return done[key]

    return get
