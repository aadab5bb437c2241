"""A process that marks files: a job in each line of its input, its record in a line of its output.

`python -m glasslm.course.grading.marking_process`. It ends when its input closes, so it never
outlives the program that started it.
"""

from __future__ import annotations

import json
import signal
import sys

from glasslm.course.grading.marking import mark
from glasslm.course.isolation.learner_process import HAS_FORK_SERVER, ForkServer


def main() -> int:
    """Mark the jobs of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    server = ForkServer() if HAS_FORK_SERVER else None
    for line in sys.stdin:
        print(json.dumps(mark(json.loads(line), server)), flush=True)
    if server:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
