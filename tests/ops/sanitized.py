"""C++ programs of the tests, built with a sanitizer of the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "custom_ops"


def run_sanitized(program: Path, sanitizer: str, sources: Sequence[Path]) -> str:
    """Build a C++ program of `sources` with -fsanitize=`sanitizer`, run it, and return what it printed."""
    compiler = os.environ.get("CXX", "c++")
    build = [compiler, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", f"-I{OPS}"]
    made = subprocess.run([*build, *sources, "-o", program], capture_output=True, text=True, check=False)
    if "cannot find" in made.stderr:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr
    # ThreadSanitizer of older compilers cannot live with much randomness of addresses.
    without_randomness = ["setarch", "-R"] if shutil.which("setarch") else []
    command, own = [*without_randomness, program], {**os.environ, "LD_PRELOAD": ""}  # of `make test-asan`
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
