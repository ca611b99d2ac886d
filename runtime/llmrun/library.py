"""Where the operator library is. Finds a path; loads nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from llmrun.errors import IncompatibleError

LIBRARY_NAME = "libllmpack_ops.so"


def search_places() -> list[Path]:
    """Return the folders that may hold the library: the installed package, then a source tree's build folder."""
    # Not `import llmrun`: its lazy names would make all of the runtime a dependency of this module, which the packager uses.
    places = [Path(entry) for entry in sys.modules["llmrun"].__path__]
    source_tree = Path(__file__).resolve().parents[2]
    return [*places, source_tree / ".build" / "ops"]


def find_library() -> Path:
    """Return the operator library's path.

    Raises:
        IncompatibleError: it is in none of the places, which the message lists.
    """
    places = search_places()
    for place in places:
        if (place / LIBRARY_NAME).is_file():
            return place / LIBRARY_NAME
    tried = ", ".join(str(place) for place in places)
    raise IncompatibleError(
        f"{LIBRARY_NAME} not found in {tried}. Install llmpack from its wheel, or build it with `pip install .`.",
        code="E416",
    )


def cannot_load(place: Path, error: OSError) -> IncompatibleError:
    """Return the error for a library that is there and cannot be loaded."""
    is_old_system = "GLIBC" in str(error)
    advice = " Build llmpack's wheel on this system, or on an older one (`pip wheel .`)." * is_old_system
    return IncompatibleError(f"{place}: cannot be loaded: {error}.{advice}", code="E416")
