"""A manifest that `pack` could not have written, as a user sees it."""

import subprocess
import sys

import pytest

from hostile.bad_input import MANIFEST, assert_refused, read_members, write_members
from mpi.harness import run_alone

pytestmark = pytest.mark.timeout(120)

LIES = {
    "newer-format": (lambda m: m.update(format_version=[2, 0]), 4, "format 2.0"),
    "other-operators": (lambda m: m["ops"].update(version=99), 4, "99"),
    "path-outside": (lambda m: m["files"].update({"../x": m["files"]["selfcheck.json"]}), 3, "../x"),
    "missing-member": (lambda m: m.pop("ranks"), 3, "ranks"),
    "wrong-type": (lambda m: m.update(shards="2"), 3, "shards"),
    "two-lines": (lambda m: m.update(selfcheck="a\nllmrun: b"), 3, "a\\nllmrun: b"),
    "too-many-ranks": (lambda m: m.update(shards=1 << 40), 3, "2 ranks for"),
    "negative-size": (lambda m: m["kv_cache"].update(head_dim=-1), 3, "kv_cache.head_dim is -1"),
}
RAW = {
    "not-json": (b"[" * 100_000, 3, "not the JSON"),
    "five-mib": (b" " * (5 << 20), 3, "longer than"),
    "binary": (bytes(range(256)), 3, "not the JSON"),
    "empty": (b"", 3, "not the JSON"),
}


def spoil(artifact, case):
    if case in RAW:
        (artifact / MANIFEST).write_bytes(RAW[case][0])
        return RAW[case][1:]
    change, *expected = LIES[case]
    members = read_members(artifact)
    change(members)
    write_members(artifact, members)
    return expected


@pytest.mark.parametrize("case", [*LIES, *RAW])
def test_llmrun_refuses_with_one_sentence(artifact, case):
    code, words = spoil(artifact, case)
    assert_refused(run_alone(artifact, "-p", "x", deadline_s=20), code, words)


@pytest.mark.parametrize("case", ["newer-format", "path-outside", "wrong-type", "not-json"])
def test_optimized_python_refuses_as_well(artifact, case):
    code, words = spoil(artifact, case)
    command = [sys.executable, "-O", "-m", "llmrun", "show", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
