"""What a process gives back to the system: asked of the C library itself, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from llmrun.memory import give_large_blocks_back

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

class Info(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc.mallinfo2.restype = Info
if sys.argv[1] == "asked":
    give_large_blocks_back()
libc.free(libc.malloc(8 << 20))  # after which glibc by itself keeps blocks of up to 8 MB
before = libc.mallinfo2().hblks
block = libc.malloc(2 << 20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.parametrize(
    ("asked", "threshold", "own"), [("asked", "", 1), ("not asked", "", 0), ("asked", "9000000", 0)]
)
def test_large_blocks_go_back_where_asked_for(asked: str, threshold: str, own: int) -> None:
    """Blocks that the C library maps from the system one by one, and unmaps when they are freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if threshold:
        environment["MALLOC_MMAP_THRESHOLD_"] = threshold
    command = [sys.executable, "-c", PROGRAM, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if "mallinfo2" in done.stderr:
        pytest.skip("not glibc 2.33 or later")
    assert (done.stdout.strip(), done.stderr) == (str(own), "")
