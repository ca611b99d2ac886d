"""The MPI tests: everything here runs ranks under this environment's mpirun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_at_terminal import Chat

from llmrun import launcher


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("mpi")
            if launcher.library_family() is None:
                item.add_marker(pytest.mark.skip(reason="no MPI library in this environment"))


@pytest.fixture(params=[1, 2], ids=["1-rank", "2-ranks"])
def artifact(request: pytest.FixtureRequest, packed_demo: Callable[..., Path]) -> Path:
    """The demo model, packed for one rank and for two."""
    return packed_demo(request.param, "q4")


@pytest.fixture
def chat(tmp_path: Path, artifact: Path) -> Iterator[Chat]:
    """A chat that waits for its first message."""
    with Chat(tmp_path, artifact, "-n", "8") as chat:
        chat.wait("/help shows")
        yield chat
