"""A sound artifact, its manifest, and a copy to spoil."""

import pytest

from hostile import bad_input
from hostile.bad_input import MANIFEST, read_members


@pytest.fixture(scope="module")
def sound(packed_tiny):
    return packed_tiny(2, "q4")


@pytest.fixture(scope="module")
def data(sound):
    return (sound / MANIFEST).read_bytes()


@pytest.fixture
def members(sound):
    return read_members(sound)


@pytest.fixture
def artifact(sound, tmp_path):
    return bad_input.copy(sound, tmp_path / "artifact")


@pytest.fixture
def single(packed_tiny, tmp_path):
    return bad_input.copy(packed_tiny(1, "q4"), tmp_path / "single")
