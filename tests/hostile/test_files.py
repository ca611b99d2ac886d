"""FORMAT section 1: every way in which files on a disk can be wrong is found before the file is parsed.

Each class has a negative control at the end: with the check taken out, the same damage passes.
"""

import contextlib
import errno
import os
import random
import shutil
import socket
import threading

import pytest

import llmrun.artifact
import llmrun.manifest
from hostile.bad_input import LISTED, MANIFEST, assert_refused, check, list_again, refusal
from llmrun.artifact import Artifact, IntegrityError, ResourceError, UsageError, open_artifact
from mpi.harness import run_alone

pytestmark = pytest.mark.timeout(60)


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_socket(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path holds 107 characters only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_link_inside(path):
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept.name)


def replace_by_link_outside(path):
    outside = path.parents[2] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def replace_by_link_to_nothing(path):
    path.unlink()
    path.symlink_to("nothing")


def replace_by_link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def swap(one, other):
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def test_the_sound_artifact_passes(artifact):
    check(artifact)
    check(artifact, [0])
    check(artifact, [1])
    assert {*LISTED} == {*open_artifact(artifact).manifest.files}


# 1.2: sizes


@pytest.mark.parametrize("name", LISTED)
def test_1_2_missing(artifact, name):
    (artifact / name).unlink()
    error = refusal(lambda: check(artifact))
    assert (type(error), error.code) == (IntegrityError, "E304")
    assert name in str(error)


def test_1_2_missing_manifest(artifact):
    (artifact / MANIFEST).unlink()
    assert isinstance(refusal(lambda: check(artifact)), UsageError)


@pytest.mark.parametrize("name", [*LISTED, MANIFEST])
def test_1_2_truncated(artifact, name):
    path = artifact / name
    data = path.read_bytes()
    size = len(data)
    for length in {0, 1, 7, 8, 63, 64, 4095, 4096, size // 2, size - 4096, size - 64, size - 1}:
        if 0 <= length < size:
            path.write_bytes(data[:length])
            error = refusal(lambda: check(artifact))
            assert isinstance(error, IntegrityError)
            if name != MANIFEST:
                assert f"found {length} bytes, expected {size}" in str(error)


@pytest.mark.parametrize("name", [*LISTED, MANIFEST])
def test_1_2_lengthened(artifact, name):
    path = artifact / name
    data = path.read_bytes()
    for extra in (b"\0", b"\n", b" " * 100, b"x" * 4096):
        path.write_bytes(data + extra)
        assert isinstance(refusal(lambda: check(artifact)), IntegrityError)


# 1.5: contents


@pytest.mark.parametrize("name", LISTED)
def test_1_5_flipped_bit(artifact, name):
    path = artifact / name
    size = path.stat().st_size
    chooser = random.Random(1)
    places = [0, size // 2, size - 1, *(chooser.randrange(size) for _ in range(10))]
    for place in places:
        bit = chooser.randrange(8)
        flip(path, place, bit)
        error = refusal(lambda: check(artifact))
        assert error.code == "E302"
        assert name in str(error)
        assert "chunk 1 (of 1)" in str(error)
        flip(path, place, bit)
    check(artifact)


@pytest.mark.parametrize("chunk_bytes", [4096, 65536])
def test_1_5_flipped_bit_at_a_chunk_boundary(artifact, monkeypatch, chunk_bytes):
    for module in (llmrun.artifact, llmrun.manifest):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    list_again(artifact)
    check(artifact)
    path = artifact / "rank-1/weights.bin"
    size = path.stat().st_size
    count = -(-size // chunk_bytes)
    for place in (chunk_bytes - 1, chunk_bytes, 2 * chunk_bytes - 1, (count - 1) * chunk_bytes, size - 1):
        flip(path, place)
        error = refusal(lambda: check(artifact))
        assert f"chunk {place // chunk_bytes + 1} (of {count})" in str(error)
        flip(path, place)
    check(artifact)
    for length in (chunk_bytes - 1, chunk_bytes, chunk_bytes + 1, (count - 1) * chunk_bytes):
        os.truncate(path, length)
        assert refusal(lambda: check(artifact)).code == "E306"


@pytest.mark.parametrize("name", LISTED)
def test_1_5_zeros_of_the_same_size(artifact, name):
    size = (artifact / name).stat().st_size
    os.truncate(artifact / name, 0)
    os.truncate(artifact / name, size)  # a hole, as after a power failure
    assert refusal(lambda: check(artifact)).code == "E302"


@pytest.mark.parametrize("name", ["cpu.onnx", "weights.bin"])
def test_1_5_files_of_two_ranks_swapped(artifact, name):
    swap(artifact / "rank-0" / name, artifact / "rank-1" / name)
    for ranks in ([0], [1], None):
        assert refusal(lambda ranks=ranks: check(artifact, ranks)).code == "E302"


def test_1_5_a_file_replaced_after_opening_is_noticed(artifact):
    opened = open_artifact(artifact)
    path = artifact / "rank-0/weights.bin"
    spare = path.with_name("spare")
    shutil.copy(path, spare)
    spare.rename(path)
    assert refusal(lambda: opened.verify(["rank-0/weights.bin"])).code == "E303"
    assert refusal(lambda: opened.recheck(["rank-0/weights.bin"])).code == "E303"


def test_1_5_a_link_put_there_after_opening_is_not_followed(artifact):
    opened = open_artifact(artifact)
    replace_by_link_outside(artifact / "rank-0/weights.bin")
    assert refusal(lambda: opened.verify(["rank-0/weights.bin"])).code == "E305"


def test_1_5_a_pipe_put_there_after_opening_is_not_waited_for(artifact):
    opened = open_artifact(artifact)
    path = artifact / "rank-0/weights.bin"
    replace_by_fifo(path)
    waited = threading.Event()

    def release():  # a reader that waits for a writer gets one, so that the test fails and does not hang
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            waited.set()

    timer = threading.Timer(3, release)
    timer.start()
    assert isinstance(refusal(lambda: opened.verify(["rank-0/weights.bin"])), IntegrityError)
    timer.cancel()
    assert not waited.is_set()


# 1.3: nothing but what is listed


@pytest.mark.parametrize(
    "name", ["extra", ".hidden", "rank-0/extra.onnx", "tokenizer/weights.bin", "libllmpack_ops.so", "two\nlines", "a b"]
)
def test_1_3_file_that_is_not_listed(artifact, name):
    (artifact / name).write_text("")
    assert refusal(lambda: check(artifact)).code == "E307"


@pytest.mark.parametrize("name", ["extra", "rank-2", ".git", "rank-0/rank-1", "tokenizer/__pycache__"])
def test_1_3_folder_that_is_not_listed(artifact, name):
    (artifact / name).mkdir()
    error = refusal(lambda: check(artifact))
    assert error.code == "E305"
    assert str(error).endswith("Remove it, or copy the artifact again.")


@pytest.mark.parametrize("name", LISTED)
def test_1_3_renamed_in_case(artifact, name):
    path = artifact / name
    path.rename(path.with_name(path.name.upper()))
    assert refusal(lambda: check(artifact)).code == "E304"


def test_1_3_other_ranks_folder_may_be_absent(artifact):
    shutil.rmtree(artifact / "rank-1")
    check(artifact, [0])
    assert refusal(lambda: check(artifact, [1])).code == "E304"
    assert refusal(lambda: check(artifact)).code == "E304"


def test_1_3_other_ranks_folder_is_whole_if_it_is_there(artifact):
    (artifact / "rank-1/weights.bin").unlink()
    assert refusal(lambda: check(artifact, [0])).code == "E304"
    (artifact / "rank-1/cpu.onnx").unlink()
    (artifact / "rank-1").rmdir()
    (artifact / "rank-1").write_text("a file")
    assert refusal(lambda: check(artifact, [0])).code == "E304"


# 1.4: regular files and folders

REPLACEMENTS = {
    "fifo": replace_by_fifo,
    "socket": replace_by_socket,
    "folder": replace_by_folder,
    "link-inside": replace_by_link_inside,
    "link-outside": replace_by_link_outside,
    "link-to-nothing": replace_by_link_to_nothing,
    "link-to-itself": replace_by_link_to_itself,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("name", [MANIFEST, "rank-0/weights.bin", "tokenizer/tokenizer.model"])
def test_1_4_something_else_in_the_place_of_a_file(artifact, name, kind):
    REPLACEMENTS[kind](artifact / name)
    error = refusal(lambda: check(artifact))
    assert (type(error), error.code) == (IntegrityError, "E305")
    assert name in str(error)


@pytest.mark.parametrize("kind", ["inside", "outside", "loop"])
@pytest.mark.parametrize("folder", ["rank-1", "tokenizer"])
def test_1_4_link_in_the_place_of_a_folder(artifact, folder, kind):
    path = artifact / folder
    if kind == "loop":
        shutil.rmtree(path)
        path.symlink_to(folder)
    else:
        elsewhere = (artifact if kind == "inside" else artifact.parent) / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    assert refusal(lambda: check(artifact)).code == "E305"


def test_1_4_hard_links_are_allowed(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "twin", copy_function=os.link)
    check(tmp_path / "twin")
    os.link(artifact / "rank-0/weights.bin", tmp_path / "secret")
    flip(tmp_path / "secret", 5)  # what binds a hard link's content is the digest
    assert refusal(lambda: check(tmp_path / "twin")).code == "E302"


def test_1_6_the_artifact_itself_may_be_reached_by_a_link(artifact, tmp_path):
    (tmp_path / "current").symlink_to(artifact)
    check(tmp_path / "current")


# What the system refuses


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["", MANIFEST, "rank-0", "rank-0/weights.bin"])
def test_no_permission(artifact, name):
    (artifact / name).chmod(0)
    try:
        assert isinstance(refusal(lambda: check(artifact)), ResourceError)
    finally:
        (artifact / name).chmod(0o700)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, ResourceError), (errno.EMFILE, ResourceError), (errno.EIO, IntegrityError)]
)
def test_what_the_system_says_is_passed_on(artifact, monkeypatch, number, kind):
    def fail(path, _flags):
        raise OSError(number, os.strerror(number), str(path))

    opened = open_artifact(artifact)
    monkeypatch.setattr(llmrun.artifact, "_open_regular", fail)
    for work in (lambda: opened.verify(["selfcheck.json"]), lambda: open_artifact(artifact)):
        error = refusal(work)
        assert isinstance(error, kind)
        assert os.strerror(number) in str(error)


# As a user sees it: one damage of each class, through the whole program

DAMAGES = {
    "missing": (lambda a: (a / "rank-1/weights.bin").unlink(), "rank-1/weights.bin: missing"),
    "truncated": (lambda a: os.truncate(a / "rank-0/weights.bin", 100), "rank-0/weights.bin: found 100 bytes"),
    "lengthened": (lambda a: os.truncate(a / "selfcheck.json", 1 << 20), "selfcheck.json: found 1048576 bytes"),
    "flipped-in-rank-0": (lambda a: flip(a / "rank-0/cpu.onnx", 100), "rank-0/cpu.onnx: sha256 differs"),
    "flipped-in-rank-1": (lambda a: flip(a / "rank-1/weights.bin", 4096), "rank-1/weights.bin: sha256 differs"),
    "flipped-tokenizer": (lambda a: flip(a / "tokenizer/tokenizer.model", 50), "tokenizer.model: sha256 differs"),
    "flipped-template": (lambda a: flip(a / "tokenizer/chat_template.jinja", 5), "template.jinja: sha256 differs"),
    "flipped-manifest": (lambda a: flip(a / MANIFEST, 100), "manifest.json: "),
    "swapped": (lambda a: swap(a / "rank-0/weights.bin", a / "rank-1/weights.bin"), "sha256 differs"),
    "unlisted": (lambda a: (a / "two\nlines").write_text(""), "two\\nlines: not listed"),
    "link": (lambda a: replace_by_link_outside(a / "rank-0/weights.bin"), "rank-0/weights.bin: not a regular file"),
    "fifo": (lambda a: replace_by_fifo(a / "rank-0/weights.bin"), "rank-0/weights.bin: not a regular file"),
    "folder-for-manifest": (lambda a: replace_by_folder(a / MANIFEST), "manifest.json: not a regular file"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("damage", DAMAGES)
def test_llmrun_refuses_with_one_sentence(artifact, damage):
    do, words = DAMAGES[damage]
    do(artifact)
    assert_refused(run_alone(artifact, "-p", "In the evening", "-n", "1", deadline_s=30), 3, words)


@pytest.mark.parametrize("damage", DAMAGES)
def test_llmrun_verify_refuses_with_one_sentence(artifact, damage):
    do, words = DAMAGES[damage]
    do(artifact)
    assert_refused(run_alone("verify", artifact, deadline_s=20), 3, words)


# Negative controls


def test_control_without_digests_damaged_contents_pass(artifact, monkeypatch):
    monkeypatch.setattr(Artifact, "_verify_chunk", lambda self, name, index: 0)
    flip(artifact / "rank-0/weights.bin", 0)
    swap(artifact / "rank-0/cpu.onnx", artifact / "rank-1/cpu.onnx")
    check(artifact)


@pytest.mark.parametrize("name", ["selfcheck.json", "rank-1/weights.bin"])
def test_control_without_the_tree_check_wrong_files_pass(artifact, monkeypatch, name):
    monkeypatch.setattr(llmrun.artifact, "_check_tree", lambda *_: {})
    (artifact / "extra").mkdir()
    os.truncate(artifact / name, 3)
    replace_by_link_inside(artifact / name)
    open_artifact(artifact)


def test_control_without_stamps_a_replaced_file_passes(artifact, monkeypatch):
    monkeypatch.setattr(llmrun.artifact, "_stamp_of", lambda _info: ())
    opened = open_artifact(artifact)
    shutil.copy(artifact / "selfcheck.json", artifact.parent / "spare")
    (artifact.parent / "spare").rename(artifact / "selfcheck.json")
    opened.verify(["selfcheck.json"])
    opened.recheck(["selfcheck.json"])
