"""Commands that are shown to be pasted: their words as the shell of this system takes them for one each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable

_PLAIN = re.compile(r"[\w./:\\+=-]+")  # to cmd.exe and PowerShell; a comma makes two words in the second one

# The end of a message about words that nobody expected: of a value with commas PowerShell makes several.
COMMAS = "; in PowerShell a value with a comma stands in quotes" if os.name == "nt" else ""


def quote(word: str) -> str:
    """A word, in quotes where it needs them: on Windows those that cmd.exe knows as well as PowerShell.

    Single quotes keep what PowerShell would replace in double ones; cmd.exe has no way to do that.
    """
    if os.name != "nt":
        return shlex.quote(word)
    if re.search(r'["$`]', word):
        return "'" + word.replace("'", "''") + "'"
    return word if _PLAIN.fullmatch(word) else f'"{word}"'


def of_posix(command: str) -> str:
    """A command that only a POSIX shell takes as it stands, with jq's filter in quotes; on Windows Git Bash is one."""
    return f"{command} (in Git Bash)" if os.name == "nt" else command


def join(words: Iterable[str]) -> str:
    """A command of these words."""
    return " ".join(map(quote, words))
