"""The command `ecodiff`, which is `python -m ecodiff` too."""

import sys

from ecodiff.runtime.forkserver import ask


def main() -> None:
    """Runs the command, in a process that is ready for it where there is one."""
    status = ask(sys.argv[1:])
    if status is not None:
        raise SystemExit(status)
    from ecodiff.cli import main as run

    run()


if __name__ == "__main__":
    main()
