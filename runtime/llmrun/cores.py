"""Which cores a rank computes on: ranks of one host never share a core if there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CoreShare:
    """`num_threads` of a rank, and the cores to pin them to, one each; no cores: leave it to the system."""

    num_threads: int
    cores: tuple[int, ...]


def share_cores(affinities: Sequence[Sequence[int]], local_rank: int, num_threads: int | None = None) -> CoreShare:
    """Divide a host's cores among its ranks.

    Args:
        affinities: for each rank on the host, in order, the cores that the system lets it use.
        local_rank: whose share.
        num_threads: threads a rank; None: as many as the share has cores.
    Returns:
        the share; without cores if ranks must share some, or if the threads are more than the cores.

    >>> share_cores([range(8)] * 2, 1)
    CoreShare(num_threads=4, cores=(4, 5, 6, 7))
    >>> share_cores([range(1)] * 2, 1)
    CoreShare(num_threads=1, cores=())
    """
    own = sorted(affinities[local_rank])
    same = [rank for rank, cores in enumerate(affinities) if sorted(cores) == own]
    others = {core for rank, cores in enumerate(affinities) if rank not in same for core in cores}
    per_rank = len(own) // len(same)
    if per_rank == 0 or others & set(own):
        return CoreShare(num_threads or 1, ())
    first = same.index(local_rank) * per_rank
    share = tuple(own[first : first + per_rank])
    wanted = num_threads or per_rank
    return CoreShare(wanted, share[:wanted] if wanted <= per_rank else ())
