"""`python -m llmrun`."""

import sys

from llmrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
