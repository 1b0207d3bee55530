"""Prompts from prepared rows: what ``eval`` asks and ``merge`` checks with, and a turn as people read it."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError

Read = TypeVar("Read")
LOOKED_AT = 100  # rows of each file that are looked at for prompts
_OF_NAME = 8  # characters of a picture's name
TEXT_TOKENS = 32  # of a plain text, as the beginning that a model continues


@dataclass(frozen=True)
class Prompt:
    """What comes before an answer: turns and the tools on offer, or the beginning of a plain text."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None

    @property
    def pictures(self) -> tuple[str, ...]:
        """Names of the files of its pictures, in order."""
        from gemma_tune.encoding.eye import pictures_of  # which loads numpy

        return tuple(pictures_of(self.messages))

    def ids(self, chat: Any) -> list[int]:
        """Token ids, after which the answer begins. Of a plain text the first half, at most ``TEXT_TOKENS``.

        Args:
            chat: the :class:`gemma_tune.encoding.chat_format.ChatFormat`.

        Raises:
            FormatError: the chat template refuses the turns.
        """
        if self.text is None:
            return chat.prompt_ids(self.messages, tools=self.tools)
        ids = [int(n) for n in chat.encode_text(self.text).ids]
        return ids[:max(1, min(TEXT_TOKENS, len(ids) // 2))]

    def fitted(self, chat: Any, limit: int) -> Prompt | None:
        """The prompt, or the system message and the last exchanges of it, as many as ``limit`` tokens hold.

        Conversations of any length are trained in parts (``prepare --on-long split``). None if no exchange fits.

        Raises:
            FormatError: the chat template refuses the turns.
        """
        if self.text is not None:
            return self
        system = [turn for turn in self.messages[:1] if turn["role"] == "system"]
        # The whole conversation first: it nearly always fits.
        begins = [n for n, turn in enumerate(self.messages) if turn["role"] == "user"]
        shorter = [replace(self, messages=[*system, *self.messages[n:]]) for n in begins]
        if shorter and len(shorter[0].ids(chat)) <= limit:
            return shorter[0]
        first = bisect.bisect_left(shorter, True, key=lambda prompt: len(prompt.ids(chat)) <= limit)
        return shorter[first] if first < len(shorter) else None


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a line of train.jsonl or valid.jsonl: everything before the last answer that is learned."""
    if "text" in row:
        return Prompt([], text=row["text"])
    found = next(prompts_of(row), None)
    if found is None:
        raise ValueError("no answer of it is learned")
    return found


def prompts_of(row: Mapping[str, Any]) -> Iterator[Prompt]:
    """Those of a conversation before each answer that is learned, the last one first."""
    messages = row["messages"]
    # Which turns are learned does not matter to a model that answers.
    plain = [{k: v for k, v in turn.items() if k != "train"} for turn in messages]
    for n in reversed(range(len(messages))):
        if messages[n]["role"] == "assistant" and messages[n].get("train") is not False:
            yield Prompt(plain[:n], row.get("tools"))


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts of a file of prepared rows, one after the other.

    Raises:
        UserError: see :func:`prepared_rows`.
    """
    return prepared_rows(path, prompt_of)


def prepared_rows(path: Path, read: Callable[[Mapping[str, Any]], Read]) -> Iterator[Read]:
    """What ``read`` makes of each line of a run's train.jsonl or valid.jsonl: such a file can be larger than memory.

    Raises:
        UserError: a line that ``prepare`` did not write so.
    """
    with open(path, "rb") as lines:
        for n, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found = read(json.loads(line.decode()))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{path}:{n} was changed: it is no row as `prepare` writes them",
                                f"prepare the data again: gemma-tune prepare --run {shell.quote(str(path.parents[1]))} "
                                "--force") from e
            yield found


def first_fitting(files: Iterable[Path], chat: Any, limit: int, count: int, most: int | None = None,
                  seen: Collection[str] = ()) -> list[Prompt]:
    """The first prompts of prepared rows that fit, shortened to that where they have to be.

    Args:
        files: of prepared rows, those first that training has not seen; one that is missing has none.
        chat: the :class:`gemma_tune.encoding.chat_format.ChatFormat`.
        limit: tokens that a prompt may have.
        count: at most so many. Only ``LOOKED_AT`` rows of each file are looked at.
        most: tokens of one without pictures, if fewer.
        seen: names of the pictures that can be shown; prompts with others are left out.
    """
    from gemma_tune.encoding.chat_format import FormatError

    shorter = limit if most is None else min(limit, most)
    found: list[Prompt] = []
    for path in files:
        for prompt in itertools.islice(read_prompts(path), LOOKED_AT) if path.exists() else ():
            if len(found) == count:
                return found
            pictures = prompt.pictures
            if not all(name in seen for name in pictures):
                continue
            with contextlib.suppress(FormatError):  # the data was prepared again, for another template
                if fitted := prompt.fitted(chat, limit if pictures else shorter):
                    found.append(fitted)
    return found


def shown(turn: Mapping[str, Any]) -> str:
    """A turn's text for people, with the tools that it calls."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    lines = [f"calls {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join([turn["content"], *lines] if turn["content"] else lines)


def headline(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first line of the last thing that the user said; where that is pictures alone, the name of the first."""
    from gemma_tune.encoding.eye import pictures_of  # which loads numpy

    asked = next((turn for turn in reversed(messages) if turn["role"] == "user"), {"content": ""})
    lines = (line.strip() for line in [*asked["content"].splitlines(), *pictures_of([asked])])
    return next(filter(None, lines), "")


def named_shortly(pictures: Sequence[str]) -> str:
    """Pictures for people, by as much of their files' names, each a sha256, as tells them apart."""
    return ", ".join(f"{name[:_OF_NAME]}…{Path(name).suffix}" for name in pictures)


def tool_names(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Names of the tools on offer."""
    return [tool["function"]["name"] for tool in tools or ()]
