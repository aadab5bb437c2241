"""Run the command line: `python -m glasslm` is the same as `glasslm`."""

import sys

from glasslm.cli import main

if __name__ == "__main__":
    sys.exit(main())
