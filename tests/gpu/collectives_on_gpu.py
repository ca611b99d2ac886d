"""One of two ranks of hardware.py: python collectives_on_gpu.py OPERATORS MINI_ORT KERNELS FOLDER RANK SIZE MODEL DRY HIP"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]

import box  # noqa: E402
import collectives_processes  # noqa: E402
import shapes  # noqa: E402
import standin  # noqa: E402
from checks import Checks  # noqa: E402
from device import Device  # noqa: E402
from executor import MiniOrt  # noqa: E402

from llmpack_ops import reference  # noqa: E402


def main(
    operators: str, mini: str, kernels: str, folder: str, rank_text: str, size_text: str, model: str, dry: str, hip: str
) -> None:
    rank, size = int(rank_text), int(size_text)
    processes = collectives_processes.Rank(operators, Path(folder), rank, size)
    library = processes.library
    if int(dry):
        standin.serve_launches(shapes.collectives_of(model, size), is_hip=bool(int(hip)))
    box.open_gpu(library, Path(kernels), vendor=int(hip), max_rows=256)
    if library.llmpack_ops_gpu_share() != 0:
        raise RuntimeError(box.last_error(library))
    library.llmpack_ops_gpu_transport.restype = ctypes.c_char_p
    transport = library.llmpack_ops_gpu_transport(None).decode()
    provider = "ROCMExecutionProvider" if int(hip) else "CUDAExecutionProvider"
    checks = Checks(MiniOrt(Path(mini), Path(operators), provider), Device(is_hip=bool(int(hip))))
    hidden = shapes.MODELS[model][0]
    digest = hashlib.sha256()
    reduce = checks.ort.node("AllReduce", in_features=hidden)
    fused = checks.ort.node("AllReduceAddRMSNorm", in_features=hidden, epsilon=1e-5)
    normed = checks.ort.node("AllReduceRMSNormAddRMSNorm", in_features=hidden, epsilon=1e-5)
    for rows in (1, 1, 2, 31, 32, 33, 100):
        rng = np.random.default_rng(rows)
        parts = [rng.standard_normal((rows, hidden)).astype(np.float16) for _ in range(size)]
        expected = reference.all_reduce(list(parts))
        (y,) = checks.run(reduce, [parts[rank]], [((rows, hidden), np.float16)])
        checks.close_to(y, expected.astype(np.float64), "norm", f"AllReduce of {rows} rows")
        residual, weight = rng.standard_normal((rows, hidden)).astype(np.float32), np.ones(hidden, np.float32)
        outputs = [((rows, hidden), np.float16), ((rows, hidden), np.float32)]
        y, total = checks.run(fused, [parts[rank], residual, weight], outputs, {1: 1})
        checks.close_to(total, expected.astype(np.float64) + residual, "norm", f"AllReduceAddRMSNorm of {rows} rows")
        digest.update(y.tobytes() + total.tobytes())
        x_weight = rng.standard_normal(hidden).astype(np.float32)
        exact = reference.rms_norm_add_rms_norm(expected, x_weight, residual, weight, 1e-5)
        found = checks.run(normed, [parts[rank], x_weight, residual, weight], outputs, {1: 2})
        for own, true in zip(found, exact, strict=True):
            checks.close_to(own, true, "norm", f"AllReduceRMSNormAddRMSNorm of {rows} rows")
            digest.update(own.tobytes())
    microseconds = ctypes.c_double()
    if library.llmpack_ops_gpu_time_all_reduce(1, hidden, 3 if int(dry) else 200, ctypes.byref(microseconds)) != 0:
        raise RuntimeError(box.last_error(library))
    print(json.dumps({"transport": transport, "us": microseconds.value, "sums": digest.hexdigest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
