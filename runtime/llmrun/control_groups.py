"""The control groups around this process, which limit what it may use: a container's, a systemd unit's, a batch job's.

Of version 2 (docs.kernel.org/admin-guide/cgroup-v2.html), and of version 1, where each controller has groups of its own
(docs.kernel.org/admin-guide/cgroup-v1), at the places where systemd and Docker mount them.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def control_groups(controller: str) -> list[Path]:
    """Return the folder of this process's group, and those of the groups around it; a container sees its own as the root.

    Args:
        controller: "cpu" or "memory": where version 1 has it, its groups too. Not every folder need exist.
    """
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return []
    found: list[Path] = []
    for _, controllers, path in lines:  # "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1
        if controllers and controller not in controllers.split(","):
            continue
        root = ROOT / controller if controllers else ROOT
        folder = root.joinpath(*[part for part in path.strip().split("/") if part not in ("", "..")])
        found += [group for group in (folder, *folder.parents) if group == root or root in group.parents]
    return found
