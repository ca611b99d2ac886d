"""Kernels run in Triton's interpreter here: it is chosen before Triton is imported. Compilers run in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # helpers: layouts, written from FORMAT.md


@pytest.fixture(params=["cuda", "hip"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
