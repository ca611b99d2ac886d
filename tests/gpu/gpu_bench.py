"""What all parts of `make test-gpu` share: the machine, the time left, the results and their table."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Bench:
    """One run of the program."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry, self.chip, self.minutes, self.path = arguments.dry, arguments.chip, arguments.minutes, arguments.json
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.rows: list[tuple[str, str, str]] = []
        self.results: dict[str, Any] = {"dry": self.dry}
        self.failed = 0
        self.build = Path(tempfile.mkdtemp(prefix="llmpack-gpu-"))
        self.models = ("dry", "dry-moe") if self.dry else arguments.models
        self.parts = ("bandwidth", *arguments.parts)  # what follows is a share of it
        self.copy_bytes_per_s = 0.0
        self.is_hip = False
        self._is_over = threading.Lock()

    def stop_in_time(self) -> None:
        """Print what there is and leave at the deadline, whatever the device waits for."""

        def leave() -> None:
            self.row("the rest", "not run", f"{self.minutes:g} minutes are over")
            self.failed += 1
            os._exit(self.finish(self.path))

        timer = threading.Timer(self.deadline - time.monotonic(), leave)
        timer.daemon = True
        timer.start()

    @property
    def provider(self) -> str:
        return "ROCMExecutionProvider" if self.is_hip else "CUDAExecutionProvider"

    def part(self, name: str, work: Callable[[], None], needs_s: float = 0, of: str = "") -> None:
        """Run a part, if it was asked for; an error is a row of the table and makes the exit code 1."""
        if name not in self.parts:
            return
        name, started = f"{name} {of}".strip(), time.monotonic()
        if self.deadline - started < needs_s:
            self.row(name, "not run", f"less than {needs_s:.0f} s are left")
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            self.row(name, "FAILED", f"{type(error).__name__}: {error}"[:150])
        print(f"-- {name}: {time.monotonic() - started:.1f} s", flush=True)

    def row(self, what: str, value: str, note: str = "") -> None:
        self.rows.append((what, value, note))
        print(f"   {what:<44} {value:>14}  {note}", flush=True)

    def finish(self, path: Path) -> int:
        self._is_over.acquire()  # once: the deadline's thread may come at the same moment
        self.results |= {"rows": self.rows, "failed": self.failed}
        path.write_text(json.dumps(self.results, indent=1))
        print(f"\n{'':=<100}")
        for what, value, note in self.rows:
            print(f"{what:<44} {value:>14}  {note}")
        print(f"{'':=<100}\n{path}; {self.failed} parts failed")
        return 1 if self.failed else 0
