"""``python -m gemma_tune``."""

from gemma_tune.cli.commands import app

if __name__ == "__main__":
    app(prog_name="gemma-tune")
