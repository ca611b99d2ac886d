"""A rank's weights.bin in memory: the file mapped once, whole and read-only, on huge pages where the system has them.

ONNX Runtime would map each initializer by itself: hundreds of mappings, few of which begin where a huge page could. A whole
mapping of a file whose page cache consists of 2 MB folios (Linux: xfs, ext4 from 6.16, tmpfs by option) has one entry of the
page table for each, and a decode step, which reads every weight once, waits less for the page tables (LOG.md 2026-11-25:
a read loop gains 8 % in a virtual machine). Elsewhere it is an ordinary mapping.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.graph_check import StoredTensor


class MappedWeights:
    """The mapping. Arrays that `tensor` has returned are valid as long as this object is."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            OSError: the system refuses.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self._map = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def tensor(self, stored: StoredTensor) -> NDArray[Any]:
        """Return the tensor in the mapping, without a copy."""
        data = self._bytes[stored.offset : stored.offset + stored.num_bytes]
        return data.view(stored.dtype).reshape(stored.shape)
