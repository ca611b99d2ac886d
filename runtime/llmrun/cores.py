"""Which cores a rank computes on: ranks of one host never share a core if there are enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrun.control_groups import control_groups


@dataclass(frozen=True)
class CoreShare:
    """`num_threads` of a rank, and the cores to pin them to, one each; no cores: leave it to the system."""

    num_threads: int
    cores: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Place:
    """Where a core, as the system counts them, really is; hyperthreads of one core have all but `thread` in common."""

    package: int
    core: int
    thread: int


def places_of(cores: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> dict[int, Place]:
    """Return the places of cores; one of which the system says nothing is a core of its own."""
    found: dict[int, Place] = {}
    for core in cores:
        folder = root / f"cpu{core}" / "topology"
        try:
            package = int((folder / "physical_package_id").read_text())
            bounds = [part.split("-") for part in (folder / "thread_siblings_list").read_text().strip().split(",")]
            threads = [thread for ends in bounds for thread in range(int(ends[0]), int(ends[-1]) + 1)]
            found[core] = Place(package, min(threads), threads.index(core))
        except (OSError, ValueError):
            found[core] = Place(0, core, 0)
    return found


def share_cores(
    affinities: Sequence[Sequence[int]],
    local_rank: int,
    num_threads: int | None = None,
    quota: float | None = None,
    places: Mapping[int, Place] | None = None,
) -> CoreShare:
    """Divide a host's cores among its ranks.

    Args:
        affinities: for each rank on the host, in order, the cores that the system lets it use.
        local_rank: whose share.
        num_threads: threads a rank; None: as many as the share has cores and the quota pays for.
        quota: cores' worth of time that the ranks may use together (`cpu_quota`); None: no limit.
        places: of the rank's cores (`places_of`), for whole ones to each rank, and hyperthreads last; None: no hyperthreads.
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
    >>> pairs = {cpu: Place(0, cpu % 4, cpu // 4) for cpu in range(8)}
    >>> share_cores([range(8)] * 2, 1, 2, places=pairs)
    CoreShare(num_threads=2, cores=(2, 3))
    """
    places = places or {core: Place(0, core, 0) for core in affinities[local_rank]}
    own = sorted(affinities[local_rank], key=places.__getitem__)
    same = [rank for rank, cores in enumerate(affinities) if set(cores) == set(own)]
    others = {core for rank, cores in enumerate(affinities) if rank not in same for core in cores}
    per_rank = len(own) // len(same)
    paid = per_rank if quota is None else int(quota / len(affinities))
    if per_rank == 0 or paid == 0 or others & set(own):
        return CoreShare(num_threads or 1, ())
    first = same.index(local_rank) * per_rank
    wanted = num_threads or min(per_rank, paid)
    if wanted > min(per_rank, paid):
        return CoreShare(wanted, ())
    part = own[first : first + per_rank]
    is_second = [any(places[core].core == places[before].core for before in part[:i]) for i, core in enumerate(part)]
    whole_first = [core for _, core in sorted(zip(is_second, part, strict=True), key=lambda pair: pair[0])]
    return CoreShare(wanted, tuple(sorted(whole_first[:wanted])))


def cpu_quota() -> float | None:
    """Return the cores' worth of time that the control groups around this process allow; None: no limit."""
    return min((quota for group in control_groups("cpu") if (quota := _quota_of(group)) is not None), default=None)


def _quota_of(group: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            return quota / period if quota >= 0 else None
        except (OSError, ValueError):
            continue  # "max", or no limit can be set here
    return None
