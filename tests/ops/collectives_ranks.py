"""What every rank of `test_collectives.py` runs: mpirun -n N python collectives_ranks.py LIBRARY WHAT

WHAT: "bits", each size by each transport, by the operator and by the exported functions; or "sequence", 10,000 calls of
random sizes, one rank delayed at random. Each rank knows what the others hold (seeded by rank), so each checks its own
result bit by bit; then all compare digests.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *[str(HERE.parents[1] / folder) for folder in ("custom_ops", "runtime")]]

import helpers  # noqa: E402

from llmpack_ops import reference  # noqa: E402
from llmrun.mpi_functions import communicator_struct  # noqa: E402
from llmrun.operators import load_library  # noqa: E402

# Elements around every size at which a transport changes its way: 32 KiB (sums in parts through shared memory, for more
# than two ranks), 64 KiB (the same by MPI), 128 KiB (a slot), and numbers that no rank count divides; up to 3 MB.
ELEMENTS = [
    *(1, 2, 3, 5, 7, 15, 16, 17, 63, 1000),
    *(n + k for n in (8192, 16384, 32768, 65536) for k in (-1, 0, 1, 3)),
    *(40001, 98304, 262144, 786431),
]
PRODUCTS = ("f32", "f16", "q8", "q4")
GATHERS = [(1, 1, 1), (1, 5, 3), (3, 7, 4), (9, 4000, 4000), (7, 16001, 16000), (1, 32769, 32769), (0, 5, 5)]


def values(rank: int, shape: tuple[int, int]) -> np.ndarray:
    """Numbers of very different sizes: another order of addition gives other bits."""
    rng = np.random.default_rng([rank, *shape])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 5, shape)).astype(np.float32)


class Library:
    """The exported functions on numpy arrays."""

    def __init__(self, path: str, comm: MPI.Intracomm) -> None:
        self.functions = load_library(path)
        self._given = communicator_struct(comm)

    def use(self, transport: str) -> None:
        assert self.functions.llmpack_ops_set_communicator(ctypes.byref(self._given)) == 0
        assert self.functions.llmpack_ops_transport() == b"mpi"
        if transport == "shared-memory":
            assert self.functions.llmpack_ops_share_memory() == 0, self.functions.llmpack_ops_last_error()
        assert self.functions.llmpack_ops_transport() == transport.encode()

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        y = np.full_like(x, np.nan)
        assert self.functions.llmpack_ops_all_reduce(x.ctypes.data, y.ctypes.data, x.size) == 0
        return y

    def all_gather(self, x: np.ndarray, out_features: int) -> np.ndarray:
        y = np.full((len(x), out_features), np.nan, np.float32)
        code = self.functions.llmpack_ops_all_gather(x.ctypes.data, y.ctypes.data, *x.shape, out_features)
        assert code == 0, self.functions.llmpack_ops_last_error()
        return y


def check_bits(library: Library, comm: MPI.Intracomm) -> None:
    rank, size = comm.Get_rank(), comm.Get_size()
    x, residual, weight = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
    reduce = helpers.session(helpers.Node("AllReduce", {"x": x}).model(any_shape=True))
    inputs, names = {"x": x, "residual": residual, "weight": weight}, ("y", "sum")
    norm, reduce_norm = (
        helpers.session(helpers.Node(op, inputs, names, attributes={"epsilon": 1e-5}).model(any_shape=True))
        for op in ("AddRMSNorm", "AllReduceAddRMSNorm")
    )
    digests = set()
    order_matters = False
    for transport in ("shared-memory", "mpi"):
        library.use(transport)
        before = collective_counts(library)
        digest = hashlib.sha256()
        for n in ELEMENTS:
            parts = [values(r, (1, n)) for r in range(size)]
            expected = reference.all_reduce(parts)
            (y,) = reduce.run(None, {"x": parts[rank]})
            np.testing.assert_array_equal(y, expected, err_msg=f"AllReduce of {n} elements by {transport}")
            np.testing.assert_array_equal(library.all_reduce(parts[rank]), expected)
            order_matters |= bool((y != reference.all_reduce(parts[::-1])).any())
            digest.update(y.tobytes())
            others = {"residual": values(size, (1, n)), "weight": values(size + 1, (1, n))[0]}
            together = reduce_norm.run(None, {"x": parts[rank], **others})
            for got, wanted in zip(together, norm.run(None, {"x": expected, **others}), strict=True):
                np.testing.assert_array_equal(
                    got, wanted, err_msg=f"AllReduceAddRMSNorm of {n} elements by {transport}"
                )
        for rows, columns, kept in GATHERS:
            out_features = columns * (size - 1) + kept
            parts = [values(r, (rows, columns)) for r in range(size)]
            expected = reference.all_gather(parts, out_features)
            node = helpers.Node("AllGather", {"x": parts[rank]}, attributes={"out_features": out_features})
            np.testing.assert_array_equal(node.run()[0], expected)
            y = library.all_gather(parts[rank], out_features)
            np.testing.assert_array_equal(y, expected)
            digest.update(y.tobytes())
        for scheme in PRODUCTS:
            check_product(scheme, comm)
        parts = [values(r, (2, 3)) for r in range(size)]
        np.testing.assert_array_equal(library.all_gather(parts[rank], 1), reference.all_gather(parts, 1))
        digests.add(digest.hexdigest())
        begun, ended = collective_counts(library)
        assert begun == ended == before[0] + 3 * len(ELEMENTS) + 2 * len(GATHERS) + 2 * len(PRODUCTS) + 1
    assert order_matters or size <= 2, "the data cannot show the order of addition"
    assert len(set(comm.allgather(digests.pop()))) == 1
    assert not digests, "the transports give different bits"


def check_product(scheme: str, comm: MPI.Intracomm) -> None:
    """A product, the sum of all ranks', maybe RMSNorm, and AddRMSNorm give the bits of the operator that is all of them."""
    rank, size = comm.Get_rank(), comm.Get_size()
    nodes = [helpers.random_projection(scheme, 40, 64, seed=r).node(values(r, (3, 64))) for r in range(size)]
    x = reference.all_reduce([node.run()[0] for node in nodes])
    epsilon, outputs, node = {"epsilon": 1e-5}, ("y", "sum"), nodes[rank]
    residual, weight, x_weight = values(size, (3, 40)), values(size + 1, (1, 40))[0], values(size + 2, (1, 40))[0]
    attributes = {**(node.attributes or {}), **epsilon}
    for norms in ({}, {"x_weight": x_weight}):
        if norms:
            (x,) = helpers.Node("RMSNorm", {"x": x, "weight": x_weight}, attributes=epsilon).run()
        expected = helpers.Node(
            "AddRMSNorm", {"x": x, "residual": residual, "weight": weight}, outputs, attributes=epsilon
        ).run()
        inputs = {**node.inputs, **norms, "residual": residual, "norm_weight": weight}
        op = f"{node.op}AllReduce{'RMSNorm' * bool(norms)}AddRMSNorm"
        joined = helpers.Node(op, inputs, outputs, node.initializers, attributes)
        for got, wanted in zip(joined.run(), expected, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=op)


def collective_counts(library: Library) -> tuple[int, int]:
    begun, ended = ctypes.c_uint64(), ctypes.c_uint64()
    library.functions.llmpack_ops_collective_state(begun, ended)
    return begun.value, ended.value


def check_sequence(library: Library, comm: MPI.Intracomm, calls: int = 10_000) -> None:
    rank, size = comm.Get_rank(), comm.Get_size()
    library.use("shared-memory")
    rng = np.random.default_rng(5)  # the same on every rank
    pattern = rng.integers(-1000, 1000, 400_000).astype(np.float32)  # integers: their sums are exact
    for call in range(calls):
        n = int(rng.integers(1, 400_000) if call % 100 == 0 else 2 ** rng.uniform(0, 12))
        starts = rng.integers(0, len(pattern) - n, size) if n < len(pattern) else np.zeros(size, np.int64)
        late, delay_s = int(rng.integers(50 * size)), float(rng.uniform(0, 0.003))
        if late == rank:
            time.sleep(delay_s)
        parts = [pattern[start : start + n] for start in starts]
        y = library.all_reduce(np.ascontiguousarray(parts[rank]))
        np.testing.assert_array_equal(y, sum(parts[1:], parts[0].copy()), err_msg=f"call {call}")


def main(path: str, what: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    helpers.LIBRARY_PATH = Path(path)
    library = Library(path, comm)
    {"bits": check_bits, "sequence": check_sequence}[what](library, comm)
    library.functions.llmpack_ops_set_communicator(None)
    assert library.functions.llmpack_ops_transport() == b"none"
    comm.Free()
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(f"{MPI.COMM_WORLD.Get_size()} ranks agree")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
