"""The console script `diffmorpher`, and `python -m diffmorpher`."""

import os

from diffmorpher.cli.signals import stop_at_once
from diffmorpher.cli.streams import secure_streams

#: How often torch's threads look for each other's results before they sleep. Its own 300,000 make a film beside a busy process
#: take 3.3 times as long as alone, this 2.3 times, and alone 1 % longer (benchmarks/neighbour.py).
SPIN = "1500"


def main() -> None:
    """The command line, which can be stopped from its first moment on, before it is imported."""
    stop_at_once()
    if "OMP_WAIT_POLICY" not in os.environ:  # which says the same in other words; both are read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
    secure_streams()
    from diffmorpher.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
