"""Launchers: recognised by their environment, refused when they are another library's, started with the right options."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmrun import comm, console, launch, launcher
from llmrun.errors import IncompatibleError, PeerError
from llmrun.launcher import MPICH, OPEN_MPI

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALNRANKS": "2"}
PRTE = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "family", "size"),
    [({}, None, None), (HYDRA, MPICH, 2), (PRTE, OPEN_MPI, 4), ({"PMIX_RANK": "0"}, OPEN_MPI, None)],
)
def test_launchers_are_known_by_their_environment(
    environment: dict[str, str], family: str | None, size: int | None
) -> None:
    assert launcher.launcher_family(environment) == family
    assert launcher.launcher_size(environment) == size


def test_a_launcher_whose_descriptor_is_closed_is_forgotten(tmp_path: Path) -> None:
    others = {"PATH": "/bin", "UCX_TLS": "all"}
    with open(tmp_path / "descriptor", "w") as file:
        number = str(file.fileno())
        for environment in (HYDRA | others | {"PMI_FD": number}, PRTE | others, {"PMI_RANK": "0", "PMI_SIZE": "2"}):
            kept = dict(environment)
            launcher.forget_lost_launcher(kept)
            assert kept == environment
    lost = HYDRA | others | {"PMI_FD": number}
    launcher.forget_lost_launcher(lost)
    assert lost == others


@pytest.mark.parametrize(
    ("environment", "is_on_one"),
    [(HYDRA, True), ({**HYDRA, "PMI_SIZE": "4"}, False), ({"PMI_SIZE": "2", "PMI_RANK": "0"}, False), (PRTE, False)],
)
def test_only_ranks_of_one_host_do_without_a_network(environment: dict[str, str], is_on_one: bool) -> None:
    assert launcher.is_on_one_host(environment) == is_on_one
    given = {**environment, "UCX_TLS": "the user's"}
    comm._set_up_transport(given)
    assert given.pop("UCX_TLS") == "the user's"
    assert given.pop("UCX_LOG_FILE") == "stderr"
    assert given == {**environment, **({"UCX_MEM_EVENTS": "no"} if is_on_one else {})}


@pytest.mark.parametrize(("environment", "library"), [(HYDRA, OPEN_MPI), (PRTE, MPICH)])
def test_another_librarys_launcher_is_refused(
    environment: dict[str, str], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "library_family", lambda: library)
    with pytest.raises(IncompatibleError, match=r"mpirun, but this environment's MPI library is .*bin/mpirun"):
        launcher.check_launcher()


@pytest.mark.parametrize("library", [MPICH, None])
def test_the_right_launcher_passes(library: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HYDRA.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "library_family", lambda: library)
    launcher.check_launcher()


def test_open_mpi_lets_root_start_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert launcher.mpirun_options(OPEN_MPI, 4)[:3] == ["--allow-run-as-root", "-n", "4"]
    assert ":OVERSUBSCRIBE" in launcher.mpirun_options(OPEN_MPI, 4)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "--allow-run-as-root" not in launcher.mpirun_options(OPEN_MPI, 4)
    assert launcher.mpirun_options(MPICH, 4) == ["-n", "4"]


def test_a_wrong_size_is_answered_with_the_right_command() -> None:
    assert "`mpirun -n 4 llmrun a/b`" in launcher.wrong_size_message(Path("a/b"), 4, 2)
    assert "mpirun" not in launcher.wrong_size_message(Path("a/b"), 1, 2)
    assert "`mpirun -n 4 python tell.py`" in launcher.wrong_size_message(Path("a/b"), 4, 1, "tell.py")
    assert "`python tell.py`" in launcher.wrong_size_message(Path("a/b"), 1, 2, "tell.py")


@pytest.mark.parametrize(
    ("mpirun_code", "noted", "code"),
    [(0, "0", 0), (7, "7", 7), (9, "6", 6), (9, None, 6), (137, None, 6), (-9, None, 6), (0, None, 6), (213, None, 6)],
)
def test_the_jobs_own_exit_code_wins(
    mpirun_code: int, noted: str | None, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if noted is not None:
        launcher.note_exit_code(int(noted), {launcher.LAUNCH_VARIABLE: str(tmp_path)})
        launcher.note_exit_code(5, {launcher.LAUNCH_VARIABLE: str(tmp_path)})  # the first is believed
    if mpirun_code != 213:
        (tmp_path / "started").touch()
    (tmp_path / "mpirun.log").write_text("unrecognized option\n")
    assert launch.job_exit_code(mpirun_code, tmp_path / "exit-code", tmp_path / "mpirun.log") == code
    err = capfd.readouterr().err
    assert ("error[E602]" in err) == (noted is None)
    assert ("unrecognized option" in err) == (mpirun_code == 213)  # mpirun's own words, if nobody explains the end


@pytest.mark.parametrize(
    ("mpirun_code", "words"),
    [
        (137, "SIGKILL (out of memory, or somebody's kill);"),
        (-15, "SIGTERM (out of memory, or somebody's kill);"),
        (139, "killed by SIGSEGV;"),
        (134, "killed by SIGABRT;"),
    ],
)
def test_only_a_kill_is_somebodys(
    mpirun_code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch.job_exit_code(mpirun_code, tmp_path / "exit-code", tmp_path / "mpirun.log") == 6
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(("leaves_after_s", "log"), [("60", ""), ("0.5; echo left in time", "left in time\n")])
def test_an_mpirun_that_does_not_see_the_end_is_killed(
    leaves_after_s: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Open MPI's does, seldom, when several ranks leave at once: the job's exit code is known by then."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f'#!/bin/sh\nprintf 6 > "$LLMRUN_LAUNCH/exit-code"\nsleep {leaves_after_s}\n')
    mpirun.chmod(0o700)
    monkeypatch.setattr(launch, "find_mpirun", lambda: (str(mpirun), MPICH))
    monkeypatch.setattr(launch, "ENDS_WITHIN_S", 1.5)
    folder = tmp_path / "job"
    folder.mkdir()
    child = launch.start_ranks(launch.rank_command(2), ["artifact"], str(folder))
    child.wait(20)
    assert (folder / "mpirun.log").read_text() == log
    assert launch.job_exit_code(child.returncode, folder / "exit-code", folder / "mpirun.log") == 6


def test_arguments_are_on_no_command_line_and_nobody_elses_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "find_mpirun", lambda: ("true", MPICH))
    arguments = ["serve", ":", "--api-key", "secret", "a\udcff\n"]
    child = launch.start_ranks(launch.rank_command(2), arguments, str(tmp_path))
    child.wait(20)
    assert isinstance(child.args, list)
    assert not set(arguments) & set(child.args)
    assert (tmp_path / "arguments").stat().st_mode & 0o777 == 0o600
    assert launcher.read_arguments(str(tmp_path)) == arguments


@pytest.mark.parametrize("home", [None, "/somewhere"])
def test_an_mpirun_that_needs_a_home_gets_one(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        '#!/bin/sh\n[ -n "$HOME" ] || { echo "Error: no home" >&2; exit 1; }\necho "mpirun (Open MPI) 5.0.8"\n'
    )
    mpirun.chmod(0o755)
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(launcher.sys, "prefix", str(tmp_path))
    (tmp_path / "bin").symlink_to(tmp_path)
    monkeypatch.setattr(launcher, "library_family", lambda: OPEN_MPI)
    assert launcher.find_mpirun() == (str(tmp_path / "bin" / "mpirun"), OPEN_MPI)
    assert launcher.mpirun_environment()["HOME"] == (home or "/")


def test_what_an_mpirun_complains_about_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho ---- >&2\necho '  no such luck' >&2\nexit 1\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(launcher.sys, "prefix", str(tmp_path))
    (tmp_path / "bin").symlink_to(tmp_path)
    with pytest.raises(IncompatibleError, match=r"an unknown MPI \(no such luck\), but"):
        launcher.find_mpirun()


def test_a_rank_does_not_wait_for_an_llmrun_that_has_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stderr")
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    try:
        os.symlink(f"/proc/{ended}/fd", tmp_path / "descriptors")  # and nobody has asked for its exit code yet
        with pytest.raises(PeerError, match="has ended"):
            launcher.open_pipe(str(tmp_path), "stderr")
    finally:
        os.waitpid(ended, 0)


def test_a_rank_waits_for_an_llmrun_that_is_about_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stderr")
    os.symlink(f"/proc/{os.getpid()}/fd", tmp_path / "descriptors")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(lambda: (time.sleep(0.2), os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK))[1])
        pipe = launcher.open_pipe(str(tmp_path), "stderr")
    assert os.get_blocking(pipe)
    os.close(pipe)
    os.close(reader.result())


def test_this_environments_mpirun_belongs_to_its_library() -> None:
    path, family = launcher.find_mpirun()
    assert Path(path).exists()
    assert launcher.library_family() in (family, None)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"PMI_RANK": "3"}, 3),
        ({"PMIX_RANK": "1"}, 1),  # srun --mpi=pmix
        ({"PMIX_RANK": "0", "PMI_RANK": "1"}, 1),  # MPICH's mpirun in a shell of srun's
        ({"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "1"}, 1),  # Open MPI's there
    ],
)
def test_a_rank_is_its_own_launchers(environment: dict[str, str], rank: int | None) -> None:
    assert console.launched_rank(environment) == rank
