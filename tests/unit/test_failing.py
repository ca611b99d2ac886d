"""What a rank says when the job ends around it: one line for the user, whoever is first."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun import failstop, launcher
from llmrun.commands import common
from llmrun.errors import NumericError, PeerError


class Left(Exception):
    """In place of the end of the process."""


def leave(code: int) -> None:
    raise Left(code)


@pytest.mark.parametrize("error", [PeerError("rank 1 has ended"), NumericError("the model computed NaN")])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_rank_that_was_left_is_silent_once_another_has_said_why(
    error: Exception, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failstop, "leave", leave)
    monkeypatch.setenv(launcher.LAUNCH_VARIABLE, str(tmp_path))
    if is_told:
        launcher.note_exit_code(1)
    with pytest.raises(Left):
        common._fail(error)
    is_silent = is_told and isinstance(error, PeerError)
    assert (str(error) in capfd.readouterr().err) == (not is_silent)
