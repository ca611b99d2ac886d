"""The control groups around this process, which limit what it may use: a container's, a systemd unit's, a batch job's.

Version 2 only (docs.kernel.org/admin-guide/cgroup-v2.html).
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def control_groups() -> list[Path]:
    """Return the folder of this process's group, and those of the groups around it; a container sees its own as the root."""
    try:
        path = next(line[3:] for line in OWN.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = ROOT.joinpath(*[part for part in path.strip().split("/") if part not in ("", "..")])
    return [group for group in (folder, *folder.parents) if group == ROOT or ROOT in group.parents]
