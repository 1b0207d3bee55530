"""Which files of a dataset of the Hub belong together, by the ``configs`` in the front matter of its README.md.

A dataset may have several configurations, such as one for each language or task, of which ``datasets`` reads one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.base.errors import UserError

NAME = "README.md"


class Configuration(NamedTuple):
    """Files that are read together, each with the name of its split, or its place where that has to tell the split; and
    the names of the configurations that are not read.
    """

    name: str
    splits: dict[Path, str]
    others: list[str]


def configuration(folder: Path, files: Sequence[Path]) -> Configuration | None:
    """The configuration that is read unasked: the only one that has any of these files, or the default; None of a
    directory whose README.md names none.

    Raises:
        UserError: it names several that have some, and none of them as the default.
    """
    there = set(files)
    found: dict[str, dict[Path, str]] = {}
    default = "default"
    for config in _configs(folder):
        name = _text(config.get("config_name"))
        for split, path in _files(folder, config):
            if path in there:
                found.setdefault(name, {}).setdefault(path, split)
        default = name if config.get("default") is True else default
    if not found:
        return None
    name = next(iter(found)) if len(found) == 1 else default
    if name not in found:
        first = {each: os.path.relpath(next(iter(splits)), folder) for each, splits in found.items()}
        raise UserError(f"{folder} has files of several configurations by its {NAME}, and none of them is the default: "
                        f"{', '.join(f'`{each}` with {path}' for each, path in first.items())}",
                        f"name the files of one, such as {next(iter(found[next(iter(found))]))}")
    return Configuration(name, found[name], [other for other in found if other != name])


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The configurations in the front matter; none where it cannot be read, as a README.md may be of anything."""
    if not (folder / NAME).is_file():
        return []
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        configs = (metadata_load(folder / NAME) or {}).get("configs")
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError):  # of values of its tags
        return []
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _files(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Files of a configuration with the names of their splits: patterns, alone, in lists, or by splits, in its
    directory. Where it names but that, or not even that, it has all that is there, and the places name the splits."""
    place, named = config.get("data_dir") or ".", config.get("data_files")
    if named is None:
        yield from ((os.path.relpath(path, folder / place), path) for path in _found(folder, place, "**"))
    for part in named if isinstance(named, list) else [named]:
        split, paths = (_text(part.get("split")), part.get("path")) if isinstance(part, dict) else ("train", part)
        for pattern in paths if isinstance(paths, list) else [paths]:
            yield from ((split, path) for path in _found(folder, place, pattern))


def _found(folder: Path, place: Any, pattern: Any) -> list[Path]:
    """What a pattern finds in a place; nothing outside of the folder."""
    if not all(isinstance(part, str) and not os.path.isabs(part) and ".." not in Path(part).parts
               for part in (place, pattern)):
        return []
    try:
        return sorted((folder / place).glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
    except ValueError:  # it is no pattern
        return []


def _text(value: Any) -> str:
    """A name, which YAML may take for a number; of what is none, nothing, however much that is."""
    return str(value) if isinstance(value, (str, int, float)) else ""
