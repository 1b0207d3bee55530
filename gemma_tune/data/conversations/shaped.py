"""A row of a data set's own shape, under names that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Fields = Mapping[str, Any]


class Shaped(NamedTuple):
    """A row under names that are known.

    Args:
        row: with all that it had, but for what became part of a known column.
        own: what known columns are called in the file, for messages: ``{"output": "target"}``.
        usual: whether these are but usual names of a question and an answer, for which they are taken as nothing else
            is there; people are told then.
    """

    row: Fields
    own: Mapping[str, str]
    usual: bool = False


def without(row: Fields, *names: str) -> dict[str, Any]:
    """The row without some of its columns."""
    return {key: value for key, value in row.items() if key not in names}
