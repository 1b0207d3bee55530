"""The project's own exceptions: one message, one hint, an exit code, and never a traceback for the user."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.base.secrets import redact

WORK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class UserError(Exception):
    """Wrong usage or bad input: the command line prints it and leaves with exit code 2.

    Whatever it quotes, no access token and no password in a link is in it.

    Args:
        message: what is wrong, naming the path, or the file and line.
        hint: what to do about it, preferably the next command to type.
        problems: single findings, when several are reported together; each names its own file and line.
    """

    exit_code = BAD_INPUT
    kind = "bad_input"  # for programs

    def __init__(self, message: str, hint: str | None = None, problems: Sequence[str] = ()):
        super().__init__()
        self.problems = tuple(map(redact, problems))
        self.reword(message, hint)

    def reword(self, message: str, hint: str | None) -> None:
        """Say it in other words, where a caller knows more; what kind of error it is stays."""
        self.message, self.hint = redact(message), hint and redact(hint)
        self.args = (self.message,)
        self.__notes__ = [*(f"- {problem}" for problem in self.problems), *([f"Hint: {self.hint}"] if self.hint else [])
                          ]  # for the traceback of whoever calls from Python


class WorkFailed(UserError):
    """The input was fine and the work itself failed (disk full, non-finite loss, a server's error): exit code 1."""

    exit_code = WORK_FAILED
    kind = "work_failed"


class InUse(UserError):
    """Another command works on the run: the same one can succeed later."""

    kind = "in_use"


class Interrupted(UserError):
    """The user stopped the work; what is saved can be resumed: exit code 130."""

    exit_code = INTERRUPTED
    kind = "interrupted"
