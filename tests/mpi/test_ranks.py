"""Several ranks: the same answers as one, however they are started."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    Outcome,
    RunningJob,
    llmrun_command,
    mpirun_command,
    run_alone,
    run_ranks,
    run_script,
)

from llmrun import launcher

Packed = Callable[..., Path]
GREEDY = ("-n", 16, "--temperature", 0, "--ignore-eos", "--json")


@pytest.fixture(scope="session")
def golden(packed_tiny: Packed) -> str:
    outcome = run_alone("generate", packed_tiny(1, "f32"), "-p", "The king", *GREEDY)
    assert outcome.code == 0
    return json.loads(outcome.stdout)["text"]


@pytest.mark.parametrize("shards", [2, 4])
def test_ranks_give_the_text_of_one(shards: int, packed_tiny: Packed, golden: str) -> None:
    path = packed_tiny(shards, "f32")
    for outcome in (run_ranks(shards, path, "-p", "The king", *GREEDY), run_alone(path, "-p", "The king", *GREEDY)):
        assert (outcome.code, outcome.errors, outcome.leftovers) == (0, [], [])
        assert json.loads(outcome.stdout)["text"] == golden


@pytest.mark.parametrize("start", [run_alone, lambda *a, **k: run_ranks(2, *a, **k)], ids=["alone", "mpirun"])
def test_standard_input_reaches_rank_0_and_ends(
    start: Callable[..., Outcome], packed_tiny: Packed, golden: str
) -> None:
    outcome = start(packed_tiny(2, "f32"), *GREEDY, stdin="The king\n")
    assert json.loads(outcome.stdout)["text"] == golden


def test_standard_input_from_a_file_ends_too(packed_tiny: Packed, golden: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("The king\n")
    shell = 'exec "$@" < ' + str(tmp_path / "prompt")
    command = [*mpirun_command(2), *llmrun_command(packed_tiny(2, "f32"), *GREEDY)]
    outcome = RunningJob(["sh", "-c", shell, "sh", *command]).finish()
    assert json.loads(outcome.stdout)["text"] == golden


def test_standard_input_is_left_alone_when_nobody_reads_it(packed_tiny: Packed) -> None:
    command = llmrun_command(packed_tiny(2, "f32"), "-p", "a", "-n", 1)
    outcome = RunningJob(["sh", "-c", '"$@" >&2; cat', "sh", *command], stdin="for the next command").finish()
    assert outcome.stdout == "for the next command"


@pytest.mark.parametrize("start", [run_alone, lambda *a, **k: run_ranks(2, *a, **k)], ids=["alone", "mpirun"])
def test_what_mpi_warns_of_is_no_part_of_the_output(
    start: Callable[..., Outcome], packed_tiny: Packed, golden: str
) -> None:
    outcome = start(packed_tiny(2, "f32"), "-p", "The king", *GREEDY, environment={"UCX_TLZ": "1"})  # no such variable
    assert json.loads(outcome.stdout)["text"] == golden
    if launcher.library_family() == launcher.MPICH:
        assert "UCX_TLZ" in outcome.stderr


def test_arguments_reach_the_ranks_whatever_they_hold(packed_tiny: Packed, golden: str, tmp_path: Path) -> None:
    """To mpirun a lone colon is the end of a program's arguments; a file's name may be any bytes."""
    prompt = tmp_path / "prompt\udcff"
    prompt.write_text("The king")
    outcome = run_alone(packed_tiny(2, "f32"), "-f", prompt, "--stop", "never in it", "--stop", ":", *GREEDY)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["text"] == golden.partition(":")[0]


def test_modules_of_the_working_folder_are_not_the_ranks(packed_tiny: Packed, golden: str, tmp_path: Path) -> None:
    here, added = tmp_path / "here", tmp_path / "added"
    here.mkdir()
    added.mkdir()
    for name in ("random", "numpy", "llmrun"):
        (here / f"{name}.py").write_text("raise SystemExit(9)")
    (added / "sitecustomize.py").write_text("import os; open(os.environ['SEEN'], 'a').write('seen ')")  # the user's own
    path = packed_tiny(2, "f32")
    command = [sys.executable, "-P", "-m", "llmrun", str(path), "-p", "The king", *map(str, GREEDY)]
    environment = {"PYTHONPATH": str(added), "SEEN": str(tmp_path / "seen")}
    job = RunningJob(["sh", "-c", f'cd {here}; exec "$@"', "sh", *command], environment=environment)
    outcome = job.finish()
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["text"] == golden
    assert (tmp_path / "seen").read_text() == "seen " * 3


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("file", ["/dev/stdin", "/dev/fd/0", "link", "<(cat)", "/proc/self/fd/0"])
def test_a_prompt_of_a_descriptor_is_that_of_what_was_typed(
    file: str, shards: int, packed_tiny: Packed, golden: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("/dev/stdin")
    command = llmrun_command(packed_tiny(shards, "f32"), *GREEDY)
    script = f'cd {tmp_path}; exec 3<&0; exec "$@" -f {file.replace("cat", "cat <&3")}'
    outcome = RunningJob(["bash", "-c", script, "bash", *command], stdin="The king\n").finish()
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["text"] == golden


def test_a_text_and_keys_of_descriptors_are_those_of_what_was_typed(packed_tiny: Packed) -> None:
    path = packed_tiny(2, "f32")
    outcome = run_alone("perplexity", path, "/dev/stdin", "--json", stdin="To be, or not to be")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["tokens"] > 1
    command = llmrun_command("serve", path, "--port", 0, "--api-key-file")
    outcome = RunningJob(["bash", "-c", '"$@" <(printf "  ")', "bash", *command]).finish()
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "holds no key" in outcome.errors[0]


@pytest.mark.parametrize("shards", [1, 2])
def test_standard_input_that_does_not_block_is_waited_for(shards: int, packed_tiny: Packed, golden: str) -> None:
    """Another program that shares the pipe may have made it so."""
    program = "import os, sys; os.set_blocking(0, False); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", program, *llmrun_command(packed_tiny(shards, "f32"), *GREEDY)]
    job = RunningJob(command, stdin="The king\n")
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(4)
    outcome = job.finish()
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["text"] == golden


@pytest.mark.parametrize("shards", [1, 2])
def test_standard_output_that_does_not_block_is_waited_for(shards: int, packed_tiny: Packed) -> None:
    program = "import os, sys; os.set_blocking(1, False); os.execv(sys.argv[1], sys.argv[1:])"
    command = llmrun_command(packed_tiny(shards, "f32"), "-p", "The king", "-n", 40, "--temperature", 0, "--ignore-eos")
    text = RunningJob(command).finish().stdout
    job = RunningJob([sys.executable, "-c", program, *command])
    assert job.process.stdout is not None
    fcntl.fcntl(job.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    filler = os.open(f"/proc/{os.getpid()}/fd/{job.process.stdout.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    assert os.write(filler, b" " * 4096) == 4096  # no room
    os.close(filler)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(4)
    outcome = job.finish()
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("shards", [1, 2])
def test_standard_input_that_cannot_be_read_is_not_its_end(shards: int, packed_tiny: Packed) -> None:
    command = llmrun_command(packed_tiny(shards, "f32"), *GREEDY)
    outcome = RunningJob(["sh", "-c", 'exec "$@" 0> /dev/null', "sh", *command]).finish()
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "error[E209]: standard input: Bad file descriptor." in outcome.errors[0]


def test_a_signal_ends_a_job_whose_output_nobody_takes(packed_tiny: Packed, tmp_path: Path) -> None:
    job = RunningJob(llmrun_command(packed_tiny(2, "f32"), "-p", "a"), environment={"TMPDIR": str(tmp_path)})
    assert job.process.stdout is not None
    filler = os.open(f"/proc/self/fd/{job.process.stdout.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    while select.select([], [filler], [], 0)[1]:
        os.write(filler, b" " * 4096)
    os.close(filler)
    job.rank_pid(0)
    gone_by = time.monotonic() + 30
    while len(job.processes()) > 1 and time.monotonic() < gone_by:  # until only what was typed is left, with the text
        time.sleep(0.05)
    assert len(job.processes()) == 1
    job.process.terminate()
    assert job.process.wait(15) == 143
    outcome = job.finish()
    assert outcome.stderr == ""
    assert list(tmp_path.glob("llmrun-*")) == []


EARLY = """
import os, signal, sys
from llmrun import launch

start_thread, number = launch._start_thread, getattr(signal, sys.argv[2])

def stop(*arguments):
    launch._start_thread = start_thread
    os.kill(os.getpid(), number)
    return start_thread(*arguments)

launch._start_thread = stop  # its first use is just after mpirun was started
sys.exit(launch.run_job(2, [sys.argv[1], "-p", "The king"]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_whoever_ends_as_soon_as_mpirun_begins_leaves_no_rank(name: str, packed_tiny: Packed) -> None:
    """MPICH's mpirun loses the signal by which the system tells it of that."""
    outcome = RunningJob([sys.executable, "-c", EARLY, str(packed_tiny(2, "q4")), name]).finish()
    number = getattr(signal, name)
    assert outcome.code == (-number if name == "SIGKILL" else 128 + number)
    assert outcome.leftovers == []


def test_a_system_without_a_temporary_folder_is_told_what_to_do(packed_tiny: Packed) -> None:
    """As a container whose file systems are all read-only."""
    program = (
        "import sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/none']\n"
        "from llmrun.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, str(packed_tiny(2, "f32")), "-p", "a"]
    outcome = RunningJob(command).finish()
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (5, "", 1)
    assert "Set TMPDIR" in outcome.errors[0]


@pytest.mark.parametrize("is_gone", [False, True], ids=["forbidden", "deleted"])
def test_a_working_folder_that_mpirun_cannot_enter(is_gone: bool, packed_tiny: Packed, tmp_path: Path) -> None:
    leave = "os.rmdir(sys.argv[1])" if is_gone else "os.chmod(sys.argv[1], 0)"
    program = f"import os, sys; os.chdir(sys.argv[1]); {leave}; os.execvp(sys.argv[2], sys.argv[2:])"
    command = llmrun_command(packed_tiny(2, "f32"), "-p", "a", "-n", 1)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may enter every folder, and there is no setpriv to take that away")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    folder = tmp_path / "folder"
    folder.mkdir()
    outcome = RunningJob([sys.executable, "-c", program, str(folder), *command]).finish()
    if is_gone and launcher.library_family() == launcher.MPICH:
        assert (outcome.code, outcome.errors) == (0, [])
    else:
        assert (outcome.code, len(outcome.errors), outcome.stderr.count("\n")) == (5, 1, 1)
        assert ("was deleted" if is_gone else "may not be entered") in outcome.errors[0]


@pytest.mark.parametrize("size", [1, 3])
def test_a_wrong_number_of_ranks_is_refused_with_the_right_command(size: int, packed_tiny: Packed) -> None:
    outcome = run_ranks(size, packed_tiny(2, "f32"), "-p", "a")
    assert (outcome.code, outcome.stdout, outcome.leftovers) == (4, "", [])
    assert len(outcome.errors) == 1
    assert f"packed for 2 ranks, started with {size}" in outcome.errors[0]
    assert "`mpirun -n 2 llmrun" in outcome.errors[0]


def test_one_shard_under_two_ranks_is_refused(packed_tiny: Packed) -> None:
    outcome = run_ranks(2, packed_tiny(1, "f32"), "-p", "a")
    assert (outcome.code, len(outcome.errors)) == (4, 1)


@pytest.mark.parametrize(
    "variables", [{"PMI_RANK": "0", "PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}]
)
def test_the_other_librarys_launcher_is_refused(variables: dict[str, str], packed_tiny: Packed) -> None:
    if launcher.launcher_family(variables) == launcher.library_family():
        pytest.skip("this is the environment's own launcher")
    outcome = run_alone(packed_tiny(2, "f32"), "-p", "a", environment=variables)
    assert outcome.code == 4
    assert len(outcome.errors) == 1
    assert "bin/mpirun" in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["-p", ""], 2), (["-p", "word " * 400], 2), (["-p", "a", "--bogus"], 2), (["-p", "a", "--max-seq-len", 9999], 2)],
)
def test_bad_input_is_one_line_from_all_ranks_together(
    arguments: list[object], exit_code: int, packed_tiny: Packed
) -> None:
    for outcome in (run_ranks(2, packed_tiny(2, "f32"), *arguments), run_alone(packed_tiny(2, "f32"), *arguments)):
        assert (outcome.code, outcome.stdout, len(outcome.errors)) == (exit_code, "", 1)


def test_another_models_rank_folder_is_found_before_anything_runs(packed_tiny: Packed, tmp_path: Path) -> None:
    """Each rank opens its own path, as on two hosts with different artifacts; both are sound by themselves."""
    script = (
        "import os, sys\n"
        "from llmrun import Engine, errors\n"
        "rank = int(os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK'])\n"
        "try: Engine(sys.argv[1 + rank])\n"
        "except errors.IncompatibleError as error: os.write(1, f'{rank} {error.code} {error}\\n'.encode()); sys.exit(4)\n"
    )
    outcome = run_script(script, tmp_path, packed_tiny(2, "f32"), packed_tiny(2, "q8"))
    assert outcome.code == 4
    lines = sorted(line for line in outcome.stdout.splitlines() if "E413" in line)
    assert [line[:2] for line in lines] == ["0 ", "1 "]
    assert all("rank 1 disagrees with rank 0 about manifest" in line for line in lines)


def test_an_idle_rank_sleeps(packed_tiny: Packed) -> None:
    """Rank 0 waits for a line; the others wait for rank 0: measured in CPU time, at most 2 % of a core."""
    command = [*mpirun_command(2), *llmrun_command("chat", packed_tiny(2, "f32"))]
    job = RunningJob(["sh", "-c", 'sleep 30 | exec "$@"', "sh", *command])
    try:
        pid = job.rank_pid(1)
        time.sleep(4)

        def cpu_s() -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / 100

        before = cpu_s()
        time.sleep(12)  # in 4 s, 0.02 s have been counted as 0.10 on a shared machine
        assert cpu_s() - before <= 0.02 * 12 + 0.01  # one tick of the clock
    finally:
        job.kill()
        job.process.communicate()


MESSAGES = """
import signal, numpy as np
from llmrun import comm

ranks = comm.connect()
sizes = [1, 2, 254, 255, 256, 257, 5000, 1_000_000, 3, 0, 7]
if ranks.rank == 0:
    ranks.agree({})
    for i, size in enumerate(sizes):
        ranks.send((np.arange(size, dtype=np.int32) - i).data)
else:
    # A signal while it waits for the first: rank 0 sends it only after `agree`, and the second call gets it.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        ranks.receive()
        print("no signal")
    except KeyboardInterrupt:
        ranks.agree({})
    for i, size in enumerate(sizes):
        message = ranks.receive()
        assert message.dtype == np.int32 and message.tolist() == list(range(-i, size - i)), (size, message)
    print("all", len(sizes))
"""


def test_messages_of_any_size_arrive_also_after_a_signal(tmp_path: Path) -> None:
    outcome = run_script(MESSAGES, tmp_path)
    assert (outcome.code, outcome.errors, outcome.stdout) == (0, [], "all 11\n")


def test_an_error_before_the_ranks_meet_has_its_line() -> None:
    """Open MPI's mpirun ends all with the first that fails, and half of the time that was not the one that speaks."""
    for _ in range(6):
        outcome = RunningJob([*mpirun_command(2), *llmrun_command("--no-such-option")]).finish(60)
        assert outcome.code != 0
        assert ["E201" in line for line in outcome.errors] == [True]
