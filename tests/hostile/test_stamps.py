"""The stamp that spares a start the hashing: whoever changes a file or a stamp only makes llmrun hash again."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from hostile.bad_input import assert_refused, copy
from llmrun import verified
from llmrun.artifact import Artifact, open_artifact
from mpi.harness import run_alone

WEIGHTS = "rank-0/weights.bin"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of our own, and files that may be stamped: on a trusted file system, and an hour old by the clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_file_system", lambda _: "ext4")
    now = time.time_ns
    monkeypatch.setattr(verified.time, "time_ns", lambda: now() + 3600 * 10**9)
    return tmp_path / "cache" / "llmrun"


@pytest.fixture
def artifact(tmp_path, packed_tiny):
    return copy(packed_tiny(1, "f32"), tmp_path / "artifact")


def remember(path: Path) -> bool:
    opened = open_artifact(path)
    return verified.stamp(opened.digest, opened.times_of(opened.files_of_rank(0)), path)


def is_remembered(path: Path) -> bool:
    opened = open_artifact(path)
    return verified.is_stamped(opened.digest, opened.times_of(opened.files_of_rank(0)))


def the_stamp(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def test_what_was_stamped_is_known_and_nothing_else(cache, artifact):
    assert not is_remembered(artifact)
    assert remember(artifact)
    assert is_remembered(artifact)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert the_stamp(cache).stat().st_mode & 0o777 == 0o600
    opened = open_artifact(artifact)
    assert not verified.is_stamped("0" * 64, opened.times_of(opened.files_of_rank(0)))
    assert not verified.is_stamped(opened.digest, opened.times_of(["selfcheck.json"]))
    for absent in (["absent"], [WEIGHTS, "absent"], []):
        assert not verified.stamp(opened.digest, opened.times_of(absent), artifact)


@pytest.mark.parametrize("field", range(5), ids=["device", "inode", "size", "mtime", "ctime"])
def test_every_field_counts(cache, artifact, field):
    opened = open_artifact(artifact)
    times = opened.times_of(opened.files_of_rank(0))
    assert verified.stamp(opened.digest, times, artifact)
    changed = list(times[WEIGHTS])
    changed[field] += 1
    assert not verified.is_stamped(opened.digest, {**times, WEIGHTS: tuple(changed)})


def test_a_flipped_bit_is_found_although_the_old_mtime_was_set_back(cache, artifact):
    assert remember(artifact)
    file = artifact / WEIGHTS
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert not is_remembered(artifact)
    environment = {"XDG_CACHE_HOME": str(cache.parent)}
    command = (artifact, "-p", "x", "-n", "1")
    assert_refused(run_alone(*command, environment=environment), 3, WEIGHTS, "chunk 1")


def test_a_stamp_is_believed_and_full_and_verify_hash_all_the_same(cache, artifact):
    """A stamp for a damaged file stands for a medium that rots: nothing that the file system reports has changed."""
    flip(artifact / WEIGHTS)
    assert remember(artifact)
    environment = {"XDG_CACHE_HOME": str(cache.parent)}
    command = (artifact, "-p", "x", "-n", "1")
    assert run_alone(*command, environment=environment).code == 0
    assert_refused(run_alone(*command, "--verify", "full", environment=environment), 3, WEIGHTS)
    assert_refused(run_alone("verify", artifact, environment=environment), 3, WEIGHTS)


def _make_link(stamp: Path) -> None:
    stamp.rename(stamp.with_name("elsewhere"))
    stamp.symlink_to(stamp.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda stamp: stamp.write_bytes(os.urandom(500)),
        lambda stamp: stamp.write_bytes(b""),
        lambda stamp: stamp.write_bytes(stamp.read_bytes()[:-1]),
        lambda stamp: stamp.write_bytes(stamp.read_bytes() + b"\n"),
        lambda stamp: stamp.write_bytes(stamp.read_bytes().replace(b"manifest", b"Manifest")),
        lambda stamp: stamp.chmod(0o640),
        lambda stamp: (stamp.unlink(), stamp.mkdir()),
        lambda stamp: (stamp.unlink(), os.mkfifo(stamp, 0o600)),
        _make_link,
        lambda stamp: stamp.parent.chmod(0o777),
        lambda stamp: (stamp.parent.rename(stamp.parent.with_name("x")), stamp.parent.symlink_to("x")),
    ],
    ids=["garbage", "empty", "short", "long", "edited", "readable", "folder", "pipe", "link", "open-folder", "linked-folder"],
)  # fmt: skip
def test_a_damaged_stamp_is_ignored(cache, artifact, damage):
    assert remember(artifact)
    damage(the_stamp(cache))
    assert not is_remembered(artifact)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("whose", ["stamp", "folder"])
def test_somebody_elses_stamp_is_ignored(cache, artifact, whose):
    assert remember(artifact)
    os.chown(the_stamp(cache) if whose == "stamp" else cache, 12345, -1)
    assert not is_remembered(artifact)


def test_young_files_are_not_stamped(cache, artifact, monkeypatch):
    """As git's racy index entries: a write within the same tick of the clock would leave no trace."""
    youngest = max(time_ns for entry in open_artifact(artifact)._stamps.values() for time_ns in entry[3:])
    for age in (-1, 0, verified.SETTLED_NS - 1):
        monkeypatch.setattr(verified.time, "time_ns", lambda age=age: youngest + age)
        assert not remember(artifact)
    monkeypatch.setattr(verified.time, "time_ns", lambda: youngest + verified.SETTLED_NS)
    assert remember(artifact)


def test_a_restart_of_the_machine_forgets(cache, artifact, monkeypatch):
    assert remember(artifact)
    monkeypatch.setattr(verified.Path, "read_text", lambda *_: "another boot")
    assert not is_remembered(artifact)


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "squashfs", "9p", "tmpfs", ""])
def test_a_file_system_that_may_lie_about_times_is_not_trusted(cache, artifact, monkeypatch, kind):
    monkeypatch.setattr(verified, "_file_system", lambda _: kind)
    assert not remember(artifact)


@pytest.mark.parametrize("elsewhere", ["rank-0", "rank-0/weights.bin"])
def test_every_file_lies_on_a_file_system_that_is_trusted(cache, artifact, monkeypatch, elsewhere):
    """A rank's folder, or a file, may be mounted into the artifact."""
    monkeypatch.setattr(
        verified, "_file_system", lambda p: "nfs4" if p.is_relative_to(artifact / elsewhere) else "ext4"
    )
    assert not remember(artifact)


@pytest.mark.parametrize("name", ["disk", "my disk", "\u0414\u0438\u0441\u043a 1", "a\\b", "a\x0cb\u2028c", b"\xff 1"])
def test_the_file_system_is_that_of_the_mount_whatever_its_name(monkeypatch, name):
    point = b"/media/" + os.fsencode(name)
    escaped = point.replace(b"\\", b"\\134").replace(b" ", b"\\040")  # as the kernel writes it
    lines = [
        b"27 1 254:0 / / rw - ext4 /dev/vda rw",
        b"39 27 254:1 / " + escaped + b" rw - ext4 /dev/vdb rw",
        b"40 27 0:44 / " + escaped + b" rw - nfs4 server:/x rw",  # over it
        b"",
    ]
    monkeypatch.setattr(verified.Path, "read_bytes", lambda _: b"\n".join(lines))
    assert verified._file_system(Path(os.fsdecode(point)) / "artifact") == "nfs4"
    assert verified._file_system(Path(os.fsdecode(point) + "x") / "artifact") == "ext4"


def test_without_a_place_for_stamps_files_are_hashed(artifact, tmp_path):
    (tmp_path / "file").write_text("")
    for environment in ({"XDG_CACHE_HOME": str(tmp_path / "file")}, {"XDG_CACHE_HOME": "/proc/nowhere"},
                        {"XDG_CACHE_HOME": "", "HOME": "/nonexistent/home"}):  # fmt: skip
        outcome = run_alone(artifact, "-p", "x", "-n", "1", environment=environment)
        assert (outcome.code, outcome.stderr) == (0, "")


@pytest.mark.parametrize(("home", "is_kept"), [("home", False), ("{}/home", True)])
def test_a_cache_folder_is_named_from_the_root_on(cache, artifact, monkeypatch, tmp_path, home, is_kept):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # its specification says: to be ignored
    monkeypatch.setenv("HOME", home.format(tmp_path))
    assert remember(artifact) == is_remembered(artifact) == is_kept
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".cache"] * is_kept
    assert not (tmp_path / "relative").exists()


def test_stamps_do_not_pile_up(cache, artifact):
    for number in range(verified.MAX_STAMPS + 5):
        assert verified.stamp(f"{number:064}", {"file": (1, 2, 3, 4, 5)}, artifact)
    assert len(list(cache.iterdir())) == verified.MAX_STAMPS
    assert verified.is_stamped(f"{verified.MAX_STAMPS + 4:064}", {"file": (1, 2, 3, 4, 5)})


def test_a_stamp_that_cannot_be_finished_leaves_nothing(cache, artifact, monkeypatch):
    def rename(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verified.os, "rename", rename)
    assert not remember(artifact)
    assert not list(cache.iterdir())


def test_a_file_changed_while_it_was_hashed_is_not_stamped(artifact, cache, monkeypatch):
    from llmrun.engine import Engine
    from llmrun.errors import IntegrityError

    hash_chunk = Artifact._verify_chunk

    def then_touch(self, name, index):
        result = hash_chunk(self, name, index)
        if name == WEIGHTS:
            os.utime(self.path / name)
        return result

    monkeypatch.setattr(Artifact, "_verify_chunk", then_touch)
    with pytest.raises(IntegrityError, match="changed while"):
        Engine(artifact)
    assert not cache.exists()


@pytest.mark.parametrize("mode", ["size", "off"])
def test_what_is_not_to_be_hashed_is_neither_hashed_nor_stamped(artifact, cache, monkeypatch, mode):
    from llmrun.engine import Engine

    def hash_chunk(*_):
        raise AssertionError("hashed")

    monkeypatch.setattr(Artifact, "_verify_chunk", hash_chunk)
    with Engine(artifact, verify=mode) as engine:
        assert len(list(engine.generate_ids([1, 2, 3], max_tokens=2, ignore_eos=True))) == 2
    assert not is_remembered(artifact)


def test_the_first_start_stamps_and_the_second_does_not_read_the_weights(artifact, cache, monkeypatch):
    from llmrun.engine import Engine

    hashed: list[str] = []
    hash_chunk = Artifact._verify_chunk
    monkeypatch.setattr(Artifact, "_verify_chunk", lambda s, n, i: (hashed.append(n), hash_chunk(s, n, i))[1])
    for expected in (True, False):
        hashed.clear()
        with Engine(artifact) as engine:
            assert len(list(engine.generate_ids([1, 2, 3], max_tokens=2, ignore_eos=True))) == 2
        assert (WEIGHTS in hashed) == expected
        assert len(set(hashed)) == len(hashed)
