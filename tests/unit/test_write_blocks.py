"""A large file on its way to the disk: pieces become blocks, and its hashing ends with the run that wanted it."""

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmpack import write


@pytest.mark.parametrize("open_blocks", [1, 3, 1000])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_pieces_in_any_order_with_gaps_give_the_file_they_describe(tmp_path, monkeypatch, open_blocks, order):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(write, "_MAX_OPEN_BLOCKS", open_blocks)
    rng = np.random.default_rng(5)
    expected = rng.integers(1, 256, 5000, np.uint8)
    bounds = [0, *sorted(rng.choice(np.arange(1, 5000), 60, replace=False)), 5000]
    pieces = [(a, b) for a, b in itertools.pairwise(bounds)]
    for a, b in pieces[::9]:
        expected[a:b] = 0
    written = [piece for i, piece in enumerate(pieces) if i % 9]
    if order == "shuffled":
        rng.shuffle(written)
    with write.Staging(tmp_path / "out", force=False) as staging:
        with staging.create("file", 5000) as put, ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda piece: put(piece[0], expected[piece[0] : piece[1]]), written))
        assert (staging.partial / "file").read_bytes() == expected.tobytes()


def test_a_whole_block_is_one_write(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 256)
    calls, pwrite = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append((at, len(data))) or pwrite(fd, data, at))
    with write.Staging(tmp_path / "out", force=False) as staging:
        with staging.create("file", 1000) as put:
            for at in range(0, 1000, 100):
                put(at, np.ones(100, np.uint8))
    assert calls == [(0, 256), (256, 256), (512, 256), (768, 232)]


def test_an_error_does_not_wait_for_the_hashing_of_what_is_written(tmp_path, monkeypatch):
    begun, interrupted = threading.Event(), []

    def hash_for_long(_path, go_on):
        begun.set()
        until = time.monotonic() + 20
        try:
            while time.monotonic() < until:
                go_on(1)
                time.sleep(0.01)
        except InterruptedError:
            interrupted.append(True)
            raise

    def fail():
        with write.Staging(tmp_path / "a", force=False) as staging:
            with staging.create("weights.bin", 10):
                pass
            assert begun.wait(20)
            raise ZeroDivisionError

    monkeypatch.setattr(write, "digest_file", hash_for_long)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert interrupted == [True]
