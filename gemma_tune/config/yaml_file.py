"""A YAML file as plain values, read so that what is wrong with it has its line. No heavy import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.special import read_bounded
from gemma_tune.base.words import full_width

_MOST_BYTES = 1 << 20
_MOST_VALUES = 10_000  # with each alias counted as all that it stands for; there are some dozens of settings
ESCAPES = "in double quotes a backslash begins an escape; put the text into single quotes, or write / in a path"


def read_yaml(path: Path) -> Any:
    """The value of a file; None if it holds none.

    Raises:
        UserError: unreadable file, broken YAML, or a key that is there twice, with the line.
    """
    import yaml

    try:
        text = read_bounded(path, _MOST_BYTES).decode()
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_endless(node, path)
        if node is not None and (twice := list(_twice(node, path))):
            raise UserError(twice[0] if len(twice) == 1 else f"{path}: {len(twice)} settings are there twice",
                            "leave one of them out", twice if len(twice) > 1 else ())
        return None if node is None else loader.construct_document(node)
    except OSError as e:
        raise UserError(f"cannot read the configuration {path}: {e.strerror}",
                        "check the path given to --config") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})", "save the file as UTF-8") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(e, "problem", None) or e).splitlines()[0]
        before = text.split("\n")[max(0, mark.line - 1):mark.line + 1] if mark else []  # a name without its colon
        other = full_width("：") if any("：" in line and ":" not in line for line in before) else ""
        raise UserError(f"{where}: not valid YAML: {problem}{other}", _fix(problem)) from e
    except (ValueError, RecursionError) as e:  # a date that does not exist, a number or brackets without end
        raise UserError(f"{path}: it holds a value that cannot be read: {e}", "put text into quotes") from e


def _fix(problem: str) -> str:
    """What to do about a message of YAML's reader."""
    for part, fix in (("escape", ESCAPES), ("'\\t'", "indent with spaces in place of the tab"),
                      ("',' or ']'", "close the list with ]"), ("',' or '}'", "close the braces with }"),
                      ("end of stream", "a text in quotes has no closing quote")):
        if part in problem:
            return fix
    return "check the indentation there"


def _refuse_endless(root: Any, path: Path) -> None:
    """Refuse aliases that stand for others many times over, or for what they are in.

    Raises:
        UserError: with the line.
    """
    sizes: dict[int, int] = {}

    def size(node: Any, around: frozenset[int] = frozenset()) -> int:
        if id(node) in around:
            raise _endless(path, node, "an alias stands for what it is in")
        if id(node) not in sizes:
            inner = around | {id(node)}
            parts = node.value if isinstance(node.value, list) else []
            sizes[id(node)] = 1 + sum(size(part, inner) for pair in parts
                                      for part in (pair if isinstance(pair, tuple) else (pair,)))
        if sizes[id(node)] > _MOST_VALUES:
            raise _endless(path, node, f"this stands for more than {_MOST_VALUES:,} values")
        return sizes[id(node)]

    if root is not None:
        size(root)


def _endless(path: Path, node: Any, problem: str) -> UserError:
    return UserError(f"{path}:{node.start_mark.line + 1}: {problem}",
                     "write the settings out, without aliases (`*name`)")


def _twice(root: Any, path: Path) -> Iterator[str]:
    """Keys that their mapping has already, of which YAML's reader would take the last in silence."""
    import yaml

    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:
            continue
        seen.add(id(node))  # an alias is the same node again
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        first: dict[tuple[str, Any], int] = {}
        for key, value in node.value:
            waiting.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                yield f"{path}:{line}: `{key.value}` is there twice, first in line {first[key.tag, key.value]}"
            first.setdefault((key.tag, key.value), line)
