"""``--help``: options in groups, each with its help beside or below it, wrapped at words for the width there is.

Typer's own tables give the help of a command with many options a third of 80 columns, and cut long values.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

# The groups of options in their order, and how they are headed. An option's group is declared with it.
GROUPS = {"common": "Common", "data": "Data", "speed": "Speed and memory", "advanced": "Advanced"}
_WIDEST = 100
_LEFT, _LEFT_OF_COMMANDS = 26, 15  # columns of the names, where the help stands beside them
_LEAST = 30  # columns that the help takes to stand beside a name
_KINDS = {int: "N", float: "X", str: "TEXT", Path: "FILE", list[str]: "TEXT,…"}
_FIRST_COLUMN = 2


def page(command: Any, ctx: Any) -> str:
    """The help of a command, or of the program with its commands.

    Args:
        command: Typer's.
        ctx: its context.
    """
    width = max(40, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.get_params(ctx) if param.param_type_name != "argument"]
    commands = getattr(command, "commands", {})
    usage = [ctx.command_path, "[OPTIONS]", *(param.metavar or param.name.upper() for param in arguments),
             *(["COMMAND …"] if commands else [])]
    blocks = [f"{_heading('Usage:')} {' '.join(usage)}", *_paragraphs(command.help or "", width)]
    if commands:
        blocks.append(_block("Commands", [(name, _first_sentence(one)) for name, one in commands.items()
                                          if not one.hidden], width, _LEFT_OF_COMMANDS))
    if arguments:
        blocks.append(_block("Arguments", [(param.metavar or param.name.upper(), _help(param)) for param in arguments],
                             width))
    blocks += [_block(title, [(_names(param), _help(param)) for param in options if _group(param) == group], width)
               for group, title in GROUPS.items()]
    blocks += _paragraphs(command.epilog or "", width)
    return "\n\n".join(filter(None, blocks)) + "\n"


def _group(param: Any) -> str:
    named = getattr(param, "rich_help_panel", None)
    return named if named in GROUPS else "common"


def _names(param: Any) -> str:
    """``-r, --run DIR``, ``--dora / --no-dora``."""
    short, long = ([name for name in param.opts if name.startswith("--") == is_long] for is_long in (False, True))
    names = ", ".join([*short, *long])
    if param.secondary_opts:
        return f"{names} / {', '.join(param.secondary_opts)}"
    if getattr(param, "is_flag", False):
        return names
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", str)
    return f"{names} {param.metavar or _KINDS.get(kind, 'TEXT')}"


def _help(param: Any) -> str:
    text = Text.from_markup(param.help or "").plain
    variable = getattr(param, "envvar", None)
    return f"{text} [variable: {variable}]" if variable else text


def _first_sentence(command: Any) -> str:
    return " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())


def _paragraphs(text: str, width: int) -> Iterator[str]:
    """Each paragraph wrapped anew; one that shows a command stays on one line, to be copied."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        if line.startswith("Example:") or "gemma-tune " in line and ": gemma-tune " in line:
            yield line
        elif line:
            yield _wrapped(line, width)


def _block(title: str, rows: Sequence[tuple[str, str]], width: int, left: int = _LEFT) -> str:
    """Names with their help; below each other where there is no room beside."""
    if not rows:
        return ""
    beside = width - left - _FIRST_COLUMN >= _LEAST
    lines = [_heading(title)]
    for name, text in rows:
        indent = " " * (_FIRST_COLUMN + left if beside else 3 * _FIRST_COLUMN)
        first = " " * _FIRST_COLUMN + name
        if beside and len(name) <= left - 1:
            lines.append(_wrapped(text, width, first.ljust(len(indent)), indent) or first)
        else:
            lines += [first, *filter(None, [_wrapped(text, width, indent, indent)])]
    return "\n".join(lines)


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                         break_on_hyphens=False)


def _heading(text: str) -> str:
    return typer.style(text, bold=True)  # which Typer leaves out where standard output is no terminal
