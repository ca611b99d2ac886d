"""Prints requirements for pip: the lowest versions that pyproject.toml allows of what packs, runs on a CPU, and serves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("cpu", "serve", "packager", "mpich")


def lowest(requirement: str) -> str:
    """Return `name==bound` for `name>=bound`; of a bound like 1.22 the last of its patches."""
    name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", requirement).groups()  # type: ignore[union-attr]
    patches = ".*" if bound.count(".") == 1 else ""
    wheels = "; python_version < '3.13'" if name == "numpy" else ""  # there is none of 1.26 for a newer one
    return f"{name}=={bound}{patches}{wheels}"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    print(*map(lowest, [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]), sep="\n")
