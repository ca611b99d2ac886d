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
