"""``python -m gemma_tune``, and what the installed ``gemma-tune`` calls."""

import signal
import sys


def main() -> None:
    """The command line. Ctrl-C before a command has begun ends it as one that comes later does."""
    try:
        from gemma_tune.base.machine import settle_threads

        settle_threads()
        from gemma_tune.cli.commands import app

        app(prog_name="gemma-tune")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:  # all is said and saved: another Ctrl-C ends what libraries do at their end, without their tracebacks
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not what a script's background ignores
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
