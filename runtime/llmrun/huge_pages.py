"""Files in the page cache as huge pages, where the system has them.

A whole mapping of a file whose page cache consists of 2 MB folios (Linux: xfs, ext4 from 6.16) has one entry of the page
table for each. A decode step reads every weight once, and waits less for page tables then (LOG.md 2026-11-25: a read loop
gains 8 % in a virtual machine). Pages get their size when they come from the disk, so it is decided by whoever reads the file
first after the machine's start: the verification. Elsewhere these are ordinary mappings and reads. Standard library only.
"""

from __future__ import annotations

import contextlib
import mmap

HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_READ = 22  # Linux 5.14: <linux/mman.h>


def map_read_only(descriptor: int, start: int = 0, length: int = 0) -> mmap.mmap:
    """Map a file, or `length` bytes of it from `start` (a multiple of 2 MB) on.

    Raises:
        OSError: the system refuses.
    """
    mapping = mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class Reader:
    """Brings a stretch of a file into the page cache, in huge pages, before it is read; without it, it is read all the same."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        """`start`: a multiple of 2 MB."""
        self._mapping: mmap.mmap | None = None
        if length >= HUGE_PAGE_BYTES:
            with contextlib.suppress(OSError, ValueError):  # no memory for the mapping; a file that has shrunk
                self._mapping = map_read_only(descriptor, start, length)

    def bring(self, offset: int) -> None:
        """Bring the huge page at `offset`, a multiple of 2 MB; later ones follow by the system's reading ahead."""
        if self._mapping is not None:
            # An older kernel; a file that has shrunk, or a medium that fails: read() tells.
            with contextlib.suppress(OSError):
                length = min(HUGE_PAGE_BYTES, len(self._mapping) - offset)
                self._mapping.madvise(_MADV_POPULATE_READ, offset, length)

    def close(self) -> None:
        """Give the mapping back; the pages stay in the cache."""
        if self._mapping is not None:
            self._mapping.close()
