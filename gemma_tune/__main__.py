"""``python -m gemma_tune``, and what the installed ``gemma-tune`` calls."""

import sys

from gemma_tune.base.machine import settle_threads


def main() -> None:
    """The command line. Ctrl-C while it is still being imported ends it as one that comes later does."""
    settle_threads()
    try:
        from gemma_tune.cli.commands import app
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="gemma-tune")


if __name__ == "__main__":
    main()
