"""The console script `diffmorpher`, and `python -m diffmorpher`."""

from diffmorpher.cli.signals import stop_at_once
from diffmorpher.cli.streams import secure_streams


def main() -> None:
    """The command line, which can be stopped from its first moment on, before it is imported."""
    stop_at_once()
    secure_streams()
    from diffmorpher.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
