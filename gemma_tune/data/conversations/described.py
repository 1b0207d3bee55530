"""Rows that an entry of LLaMA-Factory's ``dataset_info.json`` describes, as rows of the formats that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.data.conversations.names import Names
from gemma_tune.data.conversations.pictures import MEDIA, holds
from gemma_tune.data.conversations.problems import Problem, RowError, kind
from gemma_tune.data.conversations.shaped import Shaped
from gemma_tune.data.reading.rows import Description

_KNOWN_AS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGGED = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "observation",
           "function_tag": "function_call", "system_tag": "system"}


def is_text(description: Description) -> bool:
    """Whether the prompt alone is learned, as in a pre-training."""
    return description.formatting == "alpaca" and not {"response", "chosen"} & dict(description.columns).keys()


def as_described(row: Any, description: Description) -> Shaped:
    """The row under names that are known. Columns that the entry does not name keep a name by which nobody reads them,
    so that they are reported.

    Raises:
        RowError: it is no object, or lacks a column that the entry names.
    """
    if not isinstance(row, dict):
        raise RowError([Problem("not_an_object", f"a row is a JSON object, this one is {kind(row)}",
                                f"correct the file, or the entry `{description.name}` of {description.file}")])
    columns = dict(description.columns)
    if missing := [key for key in _needed(columns) if columns[key] not in row]:
        raise RowError([_missing(row, key, description) for key in missing])
    own = {_KNOWN_AS.get(key, key): column for key, column in columns.items()}
    known = {name: row[column] for name, column in own.items() if column in row}
    if is_text(description):
        own, known = {"text": columns["prompt"]}, {"text": _question(known, "\n")}
    elif description.formatting == "alpaca" and known.get("tools"):  # for which rows of single columns have no place
        own |= {"prompt": own["instruction"], "completion": own.get("output", "")}
        answer = {"completion": known["output"]} if "output" in known else {}
        rest = {name: value for name, value in known.items() if name not in ("instruction", "input", "output")}
        known = {"prompt": _question(known, "\n\n")} | answer | rest
    elif description.formatting == "sharegpt":
        known = _tagged(known, dict(description.tags))
    if media := [key for key in row if key in MEDIA and key not in columns.values() and holds(row[key])]:
        raise RowError([_unnamed(media[0], description)])
    others = {f"{key} (not in {description.file.name})": value
              for key, value in row.items() if key not in columns.values()}
    return Shaped(known | others, own)


def _needed(columns: Mapping[str, str]) -> list[str]:
    return [key for key in ("prompt", "response", "messages", "chosen", "rejected", "kto_tag") if key in columns]


def _missing(row: Mapping[str, Any], key: str, description: Description) -> Problem:
    there = ", ".join(f"`{name}`" for name in list(row)[:8])
    column = dict(description.columns)[key]
    return Problem("missing_column", f"the column `{column}` is missing, which is the `{key}` by the entry "
                                     f"`{description.name}` of {description.file}; the row has {there}",
                   "correct the entry, or leave the row out")


def _unnamed(column: str, description: Description) -> Problem:
    return Problem("picture", f"the row has `{column}`, which the entry `{description.name}` of {description.file} "
                              "does not name, and what is said may be about that",
                   'name pictures in `columns` of the entry, as "images"; or leave the row out')


def _question(known: Mapping[str, Any], between: str) -> Any:
    """The prompt, with the query below it; as it is where it is no text, to be refused as such."""
    texts = [known[name] for name in ("instruction", "input") if known.get(name)]
    return between.join(texts) if texts and all(isinstance(text, str) for text in texts) else known["instruction"]


def _tagged(known: dict[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    """With the turns' own keys and roles as those that are known."""
    for name in ("chosen", "rejected"):
        if isinstance(known.get(name), dict):
            known[name] = [known[name]]
    names = Names({tags[tag]: role for tag, role in _TAGGED.items()},
                  {"role": tags["role_tag"], "content": tags["content_tag"]})
    named = dict(names.applied(known))
    turns = named["conversations"]
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if first.get("role") == "system" and named.get("system"):  # which goes before the column, as they have it
        named["system (beside a system turn)"] = named.pop("system")
    return named
