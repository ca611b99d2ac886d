"""A rank's weights.bin in memory: the file mapped once, whole and read-only, on huge pages where the system has them.

ONNX Runtime would map each initializer by itself: hundreds of mappings, few of which begin where a huge page could.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrun.huge_pages import map_read_only

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
            self._bytes = np.frombuffer(map_read_only(descriptor), np.uint8)
        finally:
            os.close(descriptor)

    def tensor(self, stored: StoredTensor) -> NDArray[Any]:
        """Return the tensor in the mapping, without a copy."""
        data = self._bytes[stored.offset : stored.offset + stored.num_bytes]
        return data.view(stored.dtype).reshape(stored.shape)
