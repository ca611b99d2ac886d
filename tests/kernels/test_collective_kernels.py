"""One-shot collectives between processes, over memory that they share, by Triton's interpreter (FORMAT.md 8.5)."""

from __future__ import annotations

import mmap
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
from interpreter import launch

from llmpack import kernel_plan
from llmpack_ops import reference

HIDDEN = 48
FLAG_STRIDE = 32


def specs_for(ranks: int) -> dict[str, kernel_plan.KernelSpec]:
    found = [s for form in (False, True) for s in kernel_plan.collectives(HIDDEN, ranks, has_post_norms=form)]
    return {s.op: s for s in found}


class Meeting:
    """The regions of all ranks in one file, and this rank's own counters. Every operation has its own."""

    def __init__(self, path: Path, ranks: int, rank: int, row_bytes: int, max_rows: int) -> None:
        size = 2 * max_rows * row_bytes + 4 * FLAG_STRIDE * max_rows
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), ranks * size)
        self.bytes = np.frombuffer(self.map, np.uint8)
        base = self.bytes.ctypes.data
        self.arguments = {
            "buffers": np.array([base + r * size for r in range(ranks)], np.int64),
            "flags": np.array([base + r * size + 2 * max_rows * row_bytes for r in range(ranks)], np.int64),
            "epochs": np.zeros(max_rows, np.int32),
            "rank": rank,
        }

    @staticmethod
    def create(path: Path, ranks: int, row_bytes: int, max_rows: int) -> None:
        path.write_bytes(bytes(ranks * (2 * max_rows * row_bytes + 4 * FLAG_STRIDE * max_rows)))


def parts_of(step: int, ranks: int) -> list[np.ndarray]:
    rows = (1, 3, 1, 2)[step % 4]
    return [np.random.default_rng([step, r]).standard_normal((rows, HIDDEN)).astype(np.float16) for r in range(ranks)]


def run_rank(folder: Path, ranks: int, rank: int, steps: int) -> None:
    """Every step of every operation; each rank is late now and then."""
    specs = specs_for(ranks)
    most = kernel_plan.ONE_SHOT_ROWS
    fused = Meeting(folder / "fused", ranks, rank, 2 * HIDDEN, most)
    normed = Meeting(folder / "normed", ranks, rank, 2 * HIDDEN, most)
    plain = Meeting(folder / "plain", ranks, rank, 2 * HIDDEN, most)
    weight, x_weight = np.linspace(0.5, 2, HIDDEN).astype(np.float32), np.linspace(7, -3, HIDDEN).astype(np.float32)
    for step in range(steps):
        if (step + rank) % 3 == 0:
            time.sleep(0.02)
        parts = parts_of(step, ranks)
        exact = reference.all_reduce(parts)
        residual = np.full_like(exact, 0.25)
        y = np.zeros_like(parts[0])
        launch(
            specs["all_reduce_add_rms_norm"], x=parts[rank], residual=residual, weight=weight, y=y, epsilon=1e-5,
            **fused.arguments,
        )  # fmt: skip
        np.testing.assert_array_equal(residual, exact + np.float32(0.25))
        np.testing.assert_allclose(y, reference.rms_norm(residual, weight, 1e-5), rtol=2e-3)
        residual = np.full_like(exact, 0.25)
        total = reference.rms_norm(exact, x_weight, 1e-5) + residual
        launch(
            specs["all_reduce_norm_add_rms_norm"], x=parts[rank], x_weight=x_weight, residual=residual, weight=weight, y=y,
            epsilon=1e-5, **normed.arguments,
        )  # fmt: skip
        np.testing.assert_allclose(residual, total, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(y, reference.rms_norm(residual, weight, 1e-5), rtol=2e-3)
        launch(specs["all_reduce"], x=parts[rank], y=y, **plain.arguments)
        np.testing.assert_array_equal(y, exact.astype(np.float16))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_to_the_bit_whoever_is_late(tmp_path: Path, ranks: int) -> None:
    for name in ("fused", "normed", "plain"):
        Meeting.create(tmp_path / name, ranks, 2 * HIDDEN, kernel_plan.ONE_SHOT_ROWS)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(tmp_path, ranks, rank, 6)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks


def alone(tmp_path: Path, epoch: int) -> tuple[Meeting, np.ndarray, np.ndarray]:
    """Rank 0's meeting after `epoch` steps with rank 1; rank 1's row buffers by half, and its flags."""
    Meeting.create(tmp_path / "m", 2, 2 * HIDDEN, kernel_plan.ONE_SHOT_ROWS)
    meeting = Meeting(tmp_path / "m", 2, 0, 2 * HIDDEN, kernel_plan.ONE_SHOT_ROWS)
    meeting.arguments["epochs"][:] = epoch
    size = len(meeting.bytes) // 2
    other = meeting.bytes[size:]
    halves = other[: 4 * HIDDEN * kernel_plan.ONE_SHOT_ROWS].view(np.float16)
    flags = other[4 * HIDDEN * kernel_plan.ONE_SHOT_ROWS :].view(np.int32)
    return meeting, halves.reshape(2, kernel_plan.ONE_SHOT_ROWS, HIDDEN), flags


@pytest.mark.parametrize("epoch", [0, 1, 6, 2**31 - 2, 2**31 - 1])
@pytest.mark.parametrize("ahead", [0, 1], ids=["in_step", "a_step_ahead"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_rank_a_step_ahead_disturbs_nothing(tmp_path: Path, epoch: int, ahead: int) -> None:
    """Rank 1 has written this step, and perhaps already the next one; counters wrap."""
    meeting, halves, flags = alone(tmp_path, epoch)
    this = epoch + 1
    halves[this % 2, 0] = 3
    halves[(this + 1) % 2, 0] = 5
    flags[0] = np.array(this + ahead).astype(np.uint32).view(np.int32)
    x = np.full((1, HIDDEN), 2, np.float16)
    y = np.zeros_like(x)
    launch(specs_for(2)["all_reduce"], x=x, y=y, **meeting.arguments)
    assert (y == 5).all()
    assert meeting.arguments["epochs"][0] == np.array(this).astype(np.uint32).view(np.int32)
    assert (meeting.arguments["epochs"][1:] == epoch).all(), "rows that took no part have not counted"


def run_alone(folder: Path, behind: int) -> None:
    meeting, _, flags = alone(folder, 5)
    flags[0] = 6 - behind
    x = np.zeros((1, HIDDEN), np.float16)
    launch(specs_for(2)["all_reduce"], x=x, y=np.zeros_like(x), **meeting.arguments)


def test_a_rank_waits_for_the_others(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=run_alone, args=(tmp_path, 1))
    process.start()
    process.join(2)
    assert process.is_alive(), "went on without the other rank's row"
    process.kill()
