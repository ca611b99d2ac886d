"""`llmrun doctor` with stand-in GPUs: peer access is opened, not asked about."""

from __future__ import annotations

import pytest
import standin

CODE = "import sys; from llmrun.cli import main; sys.exit(main(['doctor']))"


@pytest.mark.parametrize(("peer", "says"), [(0, False), (1, False), (2, True)])
def test_access_that_is_claimed_and_refused_is_no_access(peer, says, standins):
    done = standin.run(standins, CODE, devices=2, peer=peer)
    line = next(line for line in done.stdout.splitlines() if " gpus " in line)
    assert "GPU 0 stand-in 0 (sm_89, libcuda.so.1, CUDA 12.9)" in line
    assert "pinned memory" in line
    assert ("no access (host memory is used)" in line) != says
    assert 'pip install "llmpack[cuda]"' in line


def test_a_gpu_that_cannot_be_used_hides_no_other(standins):
    done = standin.run(standins, CODE, devices=3, taken=1)
    line = next(line for line in done.stdout.splitlines() if " gpus " in line)
    healthy, taken, last = line.split("; ")[:3]
    assert "E421: GPU 0 stand-in 0 (sm_89" in healthy
    assert "copies within" in healthy
    assert "to GPU 1 not measured (using GPU 1: " in healthy
    assert taken.startswith(
        "GPU 1 stand-in 1 (sm_89, libcuda.so.1, CUDA 12.9): not usable: using GPU 1: the driver says"
    )
    assert "GPU 2 stand-in 2" in last
    assert "copies within" in last
    assert done.returncode == 4


def test_a_gpu_that_is_full_is_no_fault(standins):
    done = standin.run(standins, CODE, bytes=100 << 20)
    assert "0.1 GB free, too little to measure its links" in done.stdout
    assert done.returncode == 0


LEFT_OVER = """
import ctypes
from llmrun import device
from llmrun.errors import IncompatibleError
from llmrun.operators import Operators
try:
    device.measure(Operators().functions, "cuda", 0)
except IncompatibleError as error:
    driver = ctypes.CDLL("libcuda.so.1")
    print(error, driver.standin_live_memories(), driver.standin_violations())
"""


def test_a_measurement_that_fails_leaves_nothing(standins):
    """Neither GPU memory nor pages that are pinned still when they are freed."""
    done = standin.run(standins, LEFT_OVER, bytes=100 << 20)
    assert done.stdout.startswith("allocating GPU memory: the driver says")
    assert done.stdout.endswith(" 0 0\n")


def test_a_driver_that_is_too_old_is_a_finding(standins):
    done = standin.run(standins, CODE, version=11040)
    assert "BAD  gpus" in done.stdout
    assert "expected CUDA 12.0 or later" in done.stdout
    assert done.returncode == 4


def test_a_driver_without_a_gpu_is_no_fault(standins):
    """Of an image for many boxes, or of the other vendor's beside it."""
    done = standin.run(standins, CODE, devices=0)
    assert "ok   gpus         none: no NVIDIA and no AMD GPU" in done.stdout
    assert done.returncode == 0
