"""The MPI tests: everything here runs ranks under this environment's mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun import launcher


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("mpi")
            if launcher.library_family() is None:
                item.add_marker(pytest.mark.skip(reason="no MPI library in this environment"))
