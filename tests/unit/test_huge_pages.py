"""Where the system can, what was brought by the reader is mapped as huge pages; everywhere it is read without harm."""

import mmap
import os
from pathlib import Path

import pytest

from llmrun import huge_pages
from llmrun.huge_pages import HUGE_PAGE_BYTES, Reader, map_read_only

SIZE = 8 * HUGE_PAGE_BYTES


def huge_bytes(path) -> int:
    """Bytes that the kernel says it maps as huge pages, once every page was touched."""
    with open(path, "rb") as file:
        mapping = map_read_only(file.fileno())
    assert sum(mapping[:: mmap.PAGESIZE]) > 0
    own = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            own = rest[-1] == str(path)
        elif own and name == "FilePmdMapped:":
            return int(rest[0]) * 1024
    raise AssertionError("no such mapping in smaps")


def write(path, piece_bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(SIZE // piece_bytes):
            file.write(b"\1" * piece_bytes)
        os.fsync(file.fileno())


@pytest.fixture
def small_pages(tmp_path):
    """A file of the page cache in small pieces."""
    control = tmp_path / "control"
    write(control, HUGE_PAGE_BYTES)
    if huge_bytes(control) == 0:
        pytest.skip("this system keeps no file in huge pages")
    path = tmp_path / "file"
    write(path, 1 << 16)
    assert huge_bytes(path) == 0
    return path


def test_what_comes_from_the_disk_comes_in_huge_pages(small_pages):
    descriptor = os.open(small_pages, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    reader = Reader(descriptor, 0, SIZE)
    for offset in range(0, SIZE, HUGE_PAGE_BYTES):
        reader.bring(offset)
        for piece in range(offset, offset + HUGE_PAGE_BYTES, 1 << 18):
            os.pread(descriptor, 1 << 18, piece)
    reader.close()
    os.close(descriptor)
    assert huge_bytes(small_pages) >= SIZE // 4  # the system's own reading ahead may come between


def test_a_file_that_shrinks_is_no_reason_to_die(tmp_path):
    path = tmp_path / "file"
    write(path, HUGE_PAGE_BYTES)
    with open(path, "r+b") as file:
        reader = Reader(file.fileno(), 0, SIZE)
        assert reader._mapping is not None
        file.truncate(HUGE_PAGE_BYTES)
        for offset in range(0, SIZE, HUGE_PAGE_BYTES):
            reader.bring(offset)
        reader.close()
        Reader(file.fileno(), 0, SIZE).bring(0)  # longer than the file
        assert len(file.read()) == HUGE_PAGE_BYTES


def test_an_old_kernel_only_reads(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, HUGE_PAGE_BYTES)
    monkeypatch.setattr(huge_pages, "_MADV_POPULATE_READ", 9999)
    with open(path, "rb") as file:
        reader = Reader(file.fileno(), 0, SIZE)
        reader.bring(0)
        assert reader._mapping is not None
        assert reader._mapping[:1] == b"\1"
        reader.close()
