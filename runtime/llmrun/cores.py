"""Which cores a rank computes on: ranks of one host never share a core if there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CoreShare:
    """`num_threads` of a rank, and the cores to pin them to, one each; no cores: leave it to the system."""

    num_threads: int
    cores: tuple[int, ...]


def share_cores(
    affinities: Sequence[Sequence[int]], local_rank: int, num_threads: int | None = None, quota: float | None = None
) -> CoreShare:
    """Divide a host's cores among its ranks.

    Args:
        affinities: for each rank on the host, in order, the cores that the system lets it use.
        local_rank: whose share.
        num_threads: threads a rank; None: as many as the share has cores and the quota pays for.
        quota: cores' worth of time that the ranks may use together (`cpu_quota`); None: no limit.
    Returns:
        the share; without cores if ranks must share some, if the threads are more than the cores, or if the quota
        pays for less than a core a rank: then waiting must not burn what the other rank needs.

    >>> share_cores([range(8)] * 2, 1)
    CoreShare(num_threads=4, cores=(4, 5, 6, 7))
    >>> share_cores([range(8)] * 2, 1, quota=4.5)
    CoreShare(num_threads=2, cores=(4, 5))
    >>> share_cores([range(1)] * 2, 1)
    CoreShare(num_threads=1, cores=())
    >>> share_cores([range(2)] * 2, 1, quota=1.0)
    CoreShare(num_threads=1, cores=())
    """
    own = sorted(affinities[local_rank])
    same = [rank for rank, cores in enumerate(affinities) if sorted(cores) == own]
    others = {core for rank, cores in enumerate(affinities) if rank not in same for core in cores}
    per_rank = len(own) // len(same)
    paid = per_rank if quota is None else int(quota / len(affinities))
    if per_rank == 0 or paid == 0 or others & set(own):
        return CoreShare(num_threads or 1, ())
    first = same.index(local_rank) * per_rank
    wanted = num_threads or min(per_rank, paid)
    return CoreShare(wanted, tuple(own[first : first + wanted]) if wanted <= min(per_rank, paid) else ())


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the cores' worth of time that the control groups around this process allow (cpu.max); None: no limit.

    Control groups version 2 only (docs.kernel.org/admin-guide/cgroup-v2.html); a container sees its own group as the root.
    """
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = root.joinpath(*[part for part in path.strip().split("/") if part not in ("", "..")])
    quotas: list[float] = []
    for group in (folder, *folder.parents):
        if root != group and root not in group.parents:
            break
        try:
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # "max", or no limit can be set here
    return min(quotas, default=None)
