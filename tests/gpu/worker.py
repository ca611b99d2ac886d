"""A rank with a stand-in GPU: python worker.py SCENARIO ARTIFACT OPERATORS MINI_ORT FOLDER RANK SIZE

Prints what it saw, as JSON. Ranks are plain processes that exchange files in FOLDER in place of MPI (tests/ops).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]

import box  # noqa: E402
import standin  # noqa: E402
from device import Device  # noqa: E402
from executor import GpuModel, MiniOrt  # noqa: E402
from gpu_artifacts import specs_of, waiting  # noqa: E402


class Rank:
    def __init__(
        self, artifact: str, operators: str, mini: str, folder: str, rank: str, size: str, *, is_hip: bool
    ) -> None:
        self.artifact, self.rank, self.size = Path(artifact), int(rank), int(size)
        if self.size > 1:
            import collectives_processes

            self.processes = collectives_processes.Rank(operators, Path(folder), self.rank, self.size)
            self.operators = self.processes.library
        else:
            self.operators = box.load_operators(Path(operators))
        specs, chip = specs_of(self.artifact), os.environ.get("STANDIN_CHIP", "gfx1100" if is_hip else "sm_89")
        self.driver = standin.serve_launches(specs, is_hip=is_hip, waiting=waiting(chip, specs))
        kernels = self.artifact / "kernels" / f"{'hip' if is_hip else 'cuda'}-{chip}.bin"
        device = self.rank % max(1, int(os.environ.get("STANDIN_DEVICES", "1")))
        box.open_gpu(self.operators, kernels, vendor=int(is_hip), device=device)
        self.transport, self.can_be_captured = "", 1
        if self.size > 1:
            if self.operators.llmpack_ops_gpu_share() != 0:
                raise RuntimeError(box.last_error(self.operators))
            self.operators.llmpack_ops_gpu_transport.restype = ctypes.c_char_p
            flag = ctypes.c_int()
            self.transport = self.operators.llmpack_ops_gpu_transport(ctypes.byref(flag)).decode()
            self.can_be_captured = flag.value
        provider = "ROCMExecutionProvider" if is_hip else "CUDAExecutionProvider"
        self.ort = MiniOrt(Path(mini), Path(operators), provider)
        self.device = Device(is_hip=is_hip)
        self.model = GpuModel(self.artifact / f"rank-{self.rank}" / "gpu.onnx", self.ort, self.device, num_blocks=64)
        self.selfcheck = json.loads((self.artifact / "selfcheck.json").read_text())

    def facts(self, **more: object) -> dict[str, object]:
        return {
            "transport": self.transport,
            "violations": self.driver.standin_violations(),
            "report": self.driver.standin_report().decode(),
            "loads": self.driver.standin_count(2),
            "launches": self.driver.standin_count(1),
            "early": self.driver.standin_count(7),
            **more,
        }


def logits(rank: Rank) -> dict[str, object]:
    """The artifact's own example, in chunks of 5 tokens and then one; once more in one piece."""
    ids, expected = rank.selfcheck["ids"], np.array(rank.selfcheck["logits"])
    by_one = box.logits_of(rank.model, ids, 1)
    by_five = box.logits_of(rank.model, ids, 5)
    whole = box.logits_of(rank.model, ids, len(ids))
    scale = float(np.abs(expected).max())
    own = slice(rank.model.first_id, rank.model.first_id + whole.shape[1])
    parts = [found[-1][: len(expected[own])] for found in (by_one, by_five, whole)]
    errors = [float(np.abs(part - expected[own]).max()) / scale for part in parts]
    return rank.facts(errors=errors)


def long_prompt(rank: Rank) -> dict[str, object]:
    """More rows than the one-shot collectives take, then a row at a time: the same last logits."""
    ids = [int(i) for i in np.random.default_rng(3).integers(3, rank.model.vocab_size, 45)]
    whole, by_three = box.logits_of(rank.model, ids, 45), box.logits_of(rank.model, ids, 3)
    error = np.abs(whole - by_three).max() / np.abs(whole).max()
    return rank.facts(error=float(error))


def steps(rank: Rank) -> dict[str, object]:
    """Decode steps of two sequences, eager and as a captured graph; nothing allocates, loads or waits in one."""
    model, device = rank.model, rank.device
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    step = model.step(box.feeds(prompts, [3, 5], 2))
    step.run()
    device.synchronize()

    def decode_feeds(n: int) -> dict[str, np.ndarray]:
        return box.feeds([[20 + n], [30 + n]], [4 + n, 6 + n], 2)

    step = model.step(decode_feeds(0))
    eager = []
    for n in range(3):
        step.feed(decode_feeds(n))
        rank.driver.standin_forbid(1)
        step.run()
        rank.driver.standin_forbid(0)
        eager.append(step.output("logits"))
    replay = device.capture(step.run)
    for n in range(3):  # the same positions again: the cache is written anew
        step.feed(decode_feeds(n))
        rank.driver.standin_forbid(1)
        replay()
        rank.driver.standin_forbid(0)
        replayed = step.output("logits")
        assert np.isfinite(replayed).all()
        assert (replayed == eager[n]).all(), np.abs(replayed - eager[n]).max()
    return rank.facts()


def timed(rank: Rank) -> dict[str, object]:
    microseconds = ctypes.c_double()
    function = rank.operators.llmpack_ops_gpu_time_all_reduce
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_double)]
    width = json.loads((rank.artifact / "manifest.json").read_text())["model"]["hidden_size"]
    code = function(1, width, 3, ctypes.byref(microseconds))
    return rank.facts(code=code, microseconds=microseconds.value)


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    is_hip = scenario.endswith("-hip")
    work = {"logits": logits, "steps": steps, "long": long_prompt, "timed": timed}[scenario.removesuffix("-hip")]
    print(json.dumps(work(Rank(*arguments, is_hip=is_hip))))
