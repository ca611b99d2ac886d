"""The output appears whole or not at all; the same input gives the same bytes."""

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmpack import native, selfcheck, store, write
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
    monkeypatch.setattr(store, "_ELEMENTS_AT_ONCE", 8192)
    monkeypatch.setattr(selfcheck, "_ELEMENTS_AT_ONCE", 8192)
    assert library.llmpack_ops_set_isa(b"portable") == 0
    try:
        pack(tiny_checkpoint, tmp_path / "b", options)
    finally:
        library.llmpack_ops_set_isa(best)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_existing_artifact_needs_force_and_is_then_swapped(tmp_path, tiny_checkpoint):
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options(scheme="q4"))
    before = tree(out)
    with pytest.raises(UsageError, match="--force"):
        pack(tiny_checkpoint, out, Options(scheme="q8"))
    assert tree(out) == before
    pack(tiny_checkpoint, out, Options(scheme="q8", force=True))
    assert open_artifact(out).manifest.quantization["scheme"] == "q8"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_force_does_not_wipe_what_is_not_an_artifact(tmp_path, tiny_checkpoint):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact"):
        pack(tiny_checkpoint, tmp_path / "a", Options(force=True))
    assert (tmp_path / "a" / "thesis.txt").exists()


@pytest.mark.parametrize("kind", ["file", "link", "root", "cwd"])
def test_strange_targets_are_refused(tmp_path, tiny_checkpoint, monkeypatch, kind):
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("x")
    elif kind == "link":
        (tmp_path / "b").mkdir()
        target.symlink_to(tmp_path / "b")
    elif kind == "root":
        target = type(tmp_path)("/")
    else:
        target.mkdir()
        monkeypatch.chdir(target)
    with pytest.raises(UsageError):
        pack(tiny_checkpoint, target, Options(force=True))


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


def test_interrupted_as_soon_as_the_directory_is_there_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupt)
    with pytest.raises(KeyboardInterrupt), write.Staging(tmp_path / "a", force=False):
        pass
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("open_blocks", [1, 3, 1000])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_pieces_in_any_order_with_gaps_give_the_file_they_describe(tmp_path, monkeypatch, open_blocks, order):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(write, "_MAX_OPEN_BLOCKS", open_blocks)
    rng = np.random.default_rng(5)
    expected = rng.integers(1, 256, 5000, np.uint8)
    bounds = [0, *sorted(rng.choice(np.arange(1, 5000), 60, replace=False)), 5000]
    pieces = [(a, b) for a, b in itertools.pairwise(bounds)]
    for a, b in pieces[::9]:
        expected[a:b] = 0
    written = [piece for i, piece in enumerate(pieces) if i % 9]
    if order == "shuffled":
        rng.shuffle(written)
    with write.Staging(tmp_path / "out", force=False) as staging:
        with staging.create("file", 5000) as put, ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda piece: put(piece[0], expected[piece[0] : piece[1]]), written))
        assert (staging.partial / "file").read_bytes() == expected.tobytes()


def test_a_whole_block_is_one_write(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 256)
    calls, pwrite = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append((at, len(data))) or pwrite(fd, data, at))
    with write.Staging(tmp_path / "out", force=False) as staging:
        with staging.create("file", 1000) as put:
            for at in range(0, 1000, 100):
                put(at, np.ones(100, np.uint8))
    assert calls == [(0, 256), (256, 256), (512, 256), (768, 232)]


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
    real = selfcheck.packed_product

    def lie(*arguments):
        y = real(*arguments)
        y[-1] *= 1 + 1e-6
        return y

    monkeypatch.setattr(selfcheck, "packed_product", lie)
    with pytest.raises(InternalError, match="numpy read tile"):
        pack(tiny_checkpoint, tmp_path / "a", Options(scheme="q4"))
    assert list(tmp_path.iterdir()) == []
