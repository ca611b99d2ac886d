"""One server for all tests that do not harm it: the demo model at full precision, two ranks, small limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Served

SMALL_LIMITS = (
    *("--header-timeout", 1.5, "--body-timeout", 1.5, "--write-timeout", 2, "--max-body-bytes", 200_000),
    *("--max-queue", 120, "--max-num-seqs", 16, "--max-connections", 256),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `make test-openmpi` run these too."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("mpi")


@pytest.fixture(scope="session")
def served(packed_demo: Callable[..., Path]) -> Iterator[Served]:
    server = Served(packed_demo(2, "f32"), *SMALL_LIMITS)
    with server:
        yield server
        try:
            assert server.health() == 200
        except OSError:
            pytest.fail(f"a test has harmed the server: {server.wait()}")
    assert server.outcome is not None
    assert (server.outcome.code, server.outcome.errors, server.outcome.leftovers) == (0, [], [])
