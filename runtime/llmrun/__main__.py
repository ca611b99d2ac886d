"""The command `llmrun`, and `python -m llmrun`."""

from __future__ import annotations

import importlib
import sys


def main() -> int:
    """Run the command line; until a command handles Ctrl-C it ends the process, without a traceback while modules come in."""
    signals = importlib.import_module("_signal")  # there from the start; `signal` would import others
    # Not where it is ignored, as in `llmrun ... &` of a script.
    if signals.getsignal(signals.SIGINT) is signals.default_int_handler:
        signals.signal(signals.SIGINT, signals.SIG_DFL)
    from llmrun.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
