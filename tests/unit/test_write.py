"""The output appears whole or not at all; the same input gives the same bytes."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmpack import native, packed_rank, store, write
from llmpack.pack import Options, pack
from llmrun.artifact import IntegrityError, InternalError, ResourceError, UsageError, open_artifact

PACK = [sys.executable, "-m", "llmpack.cli"]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_runs_give_the_same_bytes_whatever_the_environment(tmp_path, tiny_text_checkpoint):
    for name, environment in (
        ("a", {"PYTHONHASHSEED": "1", "TZ": "UTC"}),
        (
            "b",
            {
                "PYTHONHASHSEED": "2",
                "TZ": "Asia/Tokyo",
                "LC_ALL": "C",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        ),
    ):
        cwd = tmp_path / f"cwd-{name}"
        cwd.mkdir()
        command = [*PACK, str(tiny_text_checkpoint), "-o", str(tmp_path / name), "--shards", "2", "--quant", "q4"]
        subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, check=True, capture_output=True, timeout=120
        )
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("quant", ["q4", "q8", "f16"])
def test_the_bytes_do_not_depend_on_cores_or_instruction_set(tmp_path, tiny_checkpoint, monkeypatch, quant):
    library = native.library()
    library.llmpack_ops_isa.restype = ctypes.c_char_p
    best = library.llmpack_ops_isa()
    options = Options(scheme=quant, shards=2)
    pack(tiny_checkpoint, tmp_path / "a", options)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setattr(store, "_ELEMENTS_AT_ONCE", 9000)  # some rows more than whole tiles
    monkeypatch.setattr(packed_rank, "_ELEMENTS_AT_ONCE", 8192)
    assert library.llmpack_ops_set_isa(b"portable") == 0
    try:
        pack(tiny_checkpoint, tmp_path / "b", options)
    finally:
        library.llmpack_ops_set_isa(best)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_full_disk_is_noticed_before_work_starts(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(ResourceError, match="the disk has 5 free"):
        pack(tiny_checkpoint, tmp_path / "a", Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [4096, 100_000, 1_000_000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, tiny_checkpoint, limit):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from llmpack.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), "-o", str(tmp_path / "a"), "--quant", "f32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 5, result.stderr
    assert "Traceback" not in result.stderr
    assert "error[E502]" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_fsync_is_not_success(tmp_path, tiny_checkpoint, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(write.os, "fsync", fail)
    with pytest.raises(ResourceError, match="Input/output error"):
        pack(tiny_checkpoint, tmp_path / "a", Options())
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_one_sentence(tiny_checkpoint):
    result = subprocess.run(
        [*PACK, str(tiny_checkpoint), "-o", "/proc/no/such/a"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 5
    assert result.stderr.count("\n") == 1
    assert "/proc/no" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("delay", [0.3, 0.9, 1.2, 1.5])
def test_interrupted_at_any_time_leaves_old_or_nothing(tmp_path, tiny_checkpoint, number, code, delay):
    process = subprocess.Popen(
        [*PACK, str(tiny_checkpoint), "-o", str(tmp_path / "a"), "--quant", "f32", "--shards", "8"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    left = [p.name for p in tmp_path.iterdir()]
    assert left in ([], ["a"])
    if left:  # it was published; what an interpreter that is leaving makes of a signal is not ours
        artifact = open_artifact(tmp_path / "a")
        artifact.verify(artifact.manifest.files)
    elif delay > 0.6:  # before that the interpreter is still starting and has no handler
        assert process.returncode == code, errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_interrupted_while_an_extension_module_starts(tiny_checkpoint, name, code):
    """An exception in the midst of numpy's own start would be numpy's failure, and of protobuf's a crash."""
    program = (
        "import signal, sys; from llmpack import cli\n"
        "class Interrupting:\n"
        "    def find_spec(self, module, *_):\n"
        "        if module == 'datetime' and 'numpy' in sys.modules:\n"  # as numpy's extension module asks for it
        f"            signal.raise_signal(signal.SIG{name})\n"
        "sys.meta_path.insert(0, Interrupting()); sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", program, str(tiny_checkpoint), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert "nothing was written" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path, tiny_checkpoint, name):
    """As `nohup pack` has it."""
    code = (
        "import signal, sys; from llmpack import cli, write; real = write.Staging.publish\n"
        "def publish(*arguments):\n"
        f"    signal.raise_signal(signal.SIG{name}); real(*arguments)\n"
        "write.Staging.publish = publish; sys.exit(cli.main())"
    )
    pack_it = [sys.executable, "-c", code, str(tiny_checkpoint), "-o", str(tmp_path / "a"), "--json"]
    command = ["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh", *pack_it]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    open_artifact(tmp_path / "a")


def test_interrupted_as_soon_as_the_directory_is_there_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupt)
    with pytest.raises(KeyboardInterrupt), write.Staging(tmp_path / "a", force=False):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [(os, "open"), (fcntl, "flock")], ids=["open", "flock"])
def test_another_run_that_cleans_up_before_the_lock_is_taken_does_no_harm(tmp_path, monkeypatch, call):
    other = write.Staging(tmp_path / "a", force=False)
    real, calls = getattr(*call), []

    def clean_up_first(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 1:
            other._remove_abandoned()
        return real(*arguments, **keywords)

    monkeypatch.setattr(*call, clean_up_first)
    with write.Staging(tmp_path / "a", force=False) as staging:
        assert calls
        staging.add("file", b"x")
        other._remove_abandoned()
        assert (staging.partial / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_a_pattern_is_cleaned_up_too(tmp_path):
    (tmp_path / ".a[1].partial-5").mkdir()
    with write.Staging(tmp_path / "a[1]", force=False):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system that cannot exchange two names: the kernel refuses what it does not know in the same way."""
    monkeypatch.setattr(write, "_RENAME_EXCHANGE", 1 << 10)


@pytest.mark.parametrize("ends_by", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), None])
@pytest.mark.parametrize("after", [False, True])
def test_without_exchange_the_old_artifact_stays_until_the_new_is_there(
    tmp_path, tiny_checkpoint, monkeypatch, no_exchange, ends_by, after
):
    """What ends it comes between the two renames, or right after them; another run cleans up at that moment."""
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options(scheme="q8"))
    real, other = os.rename, write.Staging(out, force=True)

    def rename(source, target):
        is_last = target == out and "partial" in source.name and not source.name.endswith("-old")
        if is_last and after:
            real(source, target)
        if is_last:
            other._remove_abandoned()
            if ends_by is not None:
                raise ends_by
        if not (is_last and after):
            real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((ResourceError, KeyboardInterrupt)) if ends_by else contextlib.nullcontext():
        pack(tiny_checkpoint, out, Options(scheme="q4", force=True))
    artifact = open_artifact(out)
    artifact.verify(artifact.manifest.files)
    assert artifact.manifest.quantization["scheme"] == ("q4" if after or ends_by is None else "q8")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_killed_between_two_renames_the_next_run_puts_the_old_artifact_back(tmp_path, tiny_checkpoint):
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options(scheme="q8"))
    before = tree(out)
    code = (
        "import os, sys; from llmpack import cli, write; write._RENAME_EXCHANGE = 1 << 10; real = os.rename\n"
        "def rename(source, target):\n"
        f"    if str(target) == {str(out)!r}: os.kill(os.getpid(), 9)\n"
        "    real(source, target)\n"
        "os.rename = rename; cli.main()"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), "-o", str(out), "--force"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2
    worked = []
    with pytest.raises(UsageError, match="--force"):  # it is there again, so it is not replaced unasked
        pack(tiny_checkpoint, out, Options(), lambda *step: worked.append(step))
    assert worked == []
    assert tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_partial_directory_of_a_namesake_stays(tmp_path):
    """Two containers that share a directory may have processes of the same number."""
    theirs = tmp_path / f".a.partial-{os.getpid()}"
    theirs.mkdir()
    (theirs / "file").touch()
    lock = os.open(theirs, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ResourceError, match="exists"), write.Staging(tmp_path / "a", force=False):
        pass
    os.close(lock)
    assert (theirs / "file").exists()


def opens_of_the_artifact(command):
    """Return which of the main thread's calls of openat are of what `pack` writes: the first, the middle and the last."""
    traced = subprocess.run(
        ["strace", "-f", "-e", "trace=openat", "-o", "/dev/stdout", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in traced.stdout.splitlines() if " openat(" in line]
    main = [line for line in lines if line.split()[0] == lines[0].split()[0]]
    found = [number for number, line in enumerate(main, start=1) if ".partial-" in line]
    return found[0], found[len(found) // 2], found[-1]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian package strace)")
@pytest.mark.parametrize(
    ("replaces", "call", "occurrences"),
    [
        (False, "openat", None),
        (False, "mkdir", (1, 2, 5)),
        (False, "pwrite64", (1,)),
        (False, "fsync", (1, 2)),
        (False, "rename", (1,)),
        (True, "openat", None),
        (True, "mkdir", (1, 2, 5)),
        (True, "pwrite64", (1,)),
        (True, "fsync", (1, 2)),
        (True, "renameat2", (1,)),
        (True, "unlinkat", (1, 2, 5)),
    ],
)
def test_killed_at_any_system_call_leaves_absent_old_or_new(tmp_path, tiny_checkpoint, replaces, call, occurrences):
    """SIGKILL at occurrences (in one thread) of each call that changes the file system; what is left is whole."""
    before = tmp_path / "before"
    if replaces:
        pack(tiny_checkpoint, before, Options(scheme="q8"))

    def command_into(name):
        out = tmp_path / name / "a"
        out.parent.mkdir()
        if replaces:
            shutil.copytree(before, out)
        return [*PACK, str(tiny_checkpoint), "-o", str(out), "--quant", "q4", "--force"], out

    def kill_at(occurrence):
        command, out = command_into(str(occurrence))
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={occurrence}"]
        killed = subprocess.run(
            ["strace", "-f", "-o", "/dev/null", *inject, *command], capture_output=True, timeout=120
        )
        assert killed.returncode != 0
        if out.exists():
            artifact = open_artifact(out)
            artifact.verify(artifact.manifest.files)
        else:
            assert not replaces
        # The next run cleans up and works.
        if occurrence == occurrences[0]:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            assert [p.name for p in out.parent.iterdir()] == ["a"]
            artifact = open_artifact(out)
            artifact.verify(artifact.manifest.files)

    if occurrences is None:
        occurrences = opens_of_the_artifact(command_into("traced")[0])
    with ThreadPoolExecutor(2) as two:
        list(two.map(kill_at, occurrences))


def test_what_cannot_be_read_back_is_not_published(tmp_path, tiny_checkpoint, monkeypatch):
    """Negative control: a writer that loses a byte must not publish."""
    real = write.digest_file

    def lie(path, *rest):
        entry = real(path, *rest)
        return type(entry)(entry.size + 1, entry.chunks)

    monkeypatch.setattr(write, "digest_file", lie)
    with pytest.raises(IntegrityError):
        pack(tiny_checkpoint, tmp_path / "a", Options())
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_multiplies_wrongly_is_found_while_packing(tmp_path, tiny_checkpoint, monkeypatch):
    """Negative control of the self-check's comparison with numpy."""
    real = packed_rank.packed_product

    def lie(*arguments):
        y = real(*arguments)
        y[-1] *= 1 + 1e-6
        return y

    monkeypatch.setattr(packed_rank, "packed_product", lie)
    with pytest.raises(InternalError, match="numpy read tile"):
        pack(tiny_checkpoint, tmp_path / "a", Options(scheme="q4"))
    assert list(tmp_path.iterdir()) == []
