"""From a row to the token sequences that training gets, none of them longer than the limit.

A conversation is usually one sequence. It becomes several where the chat template writes earlier turns differently
once later ones are there (reasoning that is dropped), or where ``--on-long split`` divides it between turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_tune.encoding.chat_format import ChatFormat, Encoded, FormatError
from gemma_tune.encoding.eye import PICTURES

# A line of train.jsonl: {"messages": […], "tools": […]} or {"text": "…"}; a pair of answers also has "rejected", the
# turns in place of those that are learned in its messages, and a judged answer "kto_tag". A turn's "pictures" are
# [{"at": character of its content before which it stands, "file": "pictures/…" beside train.jsonl}, …].
PreparedRow = dict[str, Any]
MARK = "kto_tag"


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Args:
        full: its sequences without any limit.
        kept: those that training gets, each at most ``max_length`` tokens; empty if the row is too long.
        unseen: how many of these a division has parted from pictures that stand before them.
    """

    full: Sequence[Encoded]
    kept: Sequence[Encoded]
    unseen: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence without the limit."""
        return max((len(s.ids) for s in self.full), default=0)


class Encoder:
    """Encodes rows as ``prepare`` was told to.

    Args:
        chat: tokenizer and template.
        max_length: longest sequence in tokens.
        on_long: ``drop`` and ``fail`` keep nothing of a longer row, ``truncate`` cuts its sequences, ``split`` divides
            it between turns (a plain text between tokens).
        train_on: ``all`` or ``last``, the assistant turns that are learned.
    """

    def __init__(self, chat: ChatFormat, max_length: int, on_long: str = "drop", train_on: str = "all"):
        self.chat, self.max_length, self.on_long, self.train_on = chat, max_length, on_long, train_on

    def encode(self, examples: Sequence[PreparedRow]) -> list[Outcome | FormatError]:
        """One result for each row; a :class:`FormatError` where the template cannot render or label it."""
        results: list[Any] = [None] * len(examples)
        chats = [n for n, example in enumerate(examples) if "messages" in example]
        encoded = self._encoded_chats([examples[n] for n in chats])
        for n, result in zip(chats, encoded):
            try:
                results[n] = result if isinstance(result, FormatError) else self._limited_chat(examples[n], result)
            except FormatError as e:  # a part of a conversation may be refused where the whole is not
                results[n] = e
        self._add_rejected(examples, results)
        texts = [n for n, example in enumerate(examples) if "text" in example]
        for n, result in zip(texts, self.chat.encode_texts([examples[n]["text"] for n in texts])):
            results[n] = self._limited_text(result)
        return results

    def _encoded_chats(self, examples: Sequence[PreparedRow]) -> list[Any]:
        """Which turns of a pair are learned is marked in it; of other conversations --train-on says so."""
        found: list[Any] = [None] * len(examples)
        for compared in (False, True):
            those = [n for n, example in enumerate(examples) if (marks_of(example) != [0]) == compared]
            encoded = self.chat.encode_many([(examples[n]["messages"], examples[n].get("tools")) for n in those],
                                            train_on="all" if compared else self.train_on)
            for n, result in zip(those, encoded):
                found[n] = result
        return found

    def _add_rejected(self, examples: Sequence[PreparedRow], results: list[Any]) -> None:
        """Let the outcome of each pair have both its answers, the chosen one first, or neither."""
        pairs = [n for n, example in enumerate(examples) if "rejected" in example]
        others = self.chat.encode_many([(with_rejected(examples[n]), examples[n].get("tools")) for n in pairs])
        for n, other in zip(pairs, others):
            if isinstance(results[n], FormatError):
                continue
            try:
                results[n] = other if isinstance(other, FormatError) else self._pair(results[n], other)
            except FormatError as e:
                results[n] = e

    def _pair(self, chosen: Outcome, rejected: Sequence[Encoded]) -> Outcome:
        full = [*chosen.full, *rejected]
        if len(full) != 2:
            raise FormatError("the chat template writes an answer of this pair in several sequences, so that they "
                              "cannot be compared")
        (one, other), starts = full, [int(s.spans[0, 0]) for s in full]
        if starts[0] != starts[1] or not np.array_equal(one.ids[:starts[0]], other.ids[:starts[0]]):
            raise FormatError("the chat template writes the prompt differently before each of both answers")
        if self._fits(full):
            return Outcome(full, full)
        kept = self._cut(full)
        # What was cut off may be all that differs.
        whole = len(kept) == 2 and not np.array_equal(kept[0].ids, kept[1].ids)
        return Outcome(full, kept if whole else [])

    def _fits(self, sequences: Sequence[Encoded]) -> bool:
        return all(len(s.ids) <= self.max_length for s in sequences)

    def _limited_chat(self, example: PreparedRow, full: Sequence[Encoded]) -> Outcome:
        if self._fits(full):
            return Outcome(full, full)
        if self.on_long == "split" and "rejected" not in example:
            messages = _only_last(example["messages"]) if self.train_on == "last" else example["messages"]
            return Outcome(full, *self._pieces(messages, example.get("tools")))
        return Outcome(full, self._cut(full))

    def _limited_text(self, full: Encoded) -> Outcome:
        if self._fits([full]):
            return Outcome([full], [full])
        if self.on_long == "split":
            # Each part begins with the last token of the one before, which predicts its first new one.
            starts = range(0, len(full.ids) - 1, self.max_length - 1)
            return Outcome([full], [p for n in starts if (p := part(full, n, n + self.max_length)) is not None])
        return Outcome([full], self._cut([full]))

    def _cut(self, sequences: Sequence[Encoded]) -> list[Encoded]:
        if self.on_long != "truncate":
            return []
        return [p for s in sequences if (p := part(s, 0, self.max_length)) is not None]

    def _pieces(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[list[Encoded], int]:
        """Runs of whole exchanges, each as long as fits and after the system prompt; what fits nowhere is left out.

        Exchanges of which nothing is learned stand before the next learned one, as many as fit.

        Returns:
            The runs, and how many of them stand behind pictures that are not in them.
        """
        system = [m for m in messages[:1] if m["role"] == "system"]
        starts = [n for n, m in enumerate(messages) if m["role"] == "user"]
        exchanges = [messages[a:b] for a, b in zip(starts, [*starts[1:], len(messages)])]
        learned = [n for n, exchange in enumerate(exchanges)
                   if any(m["role"] == "assistant" and m.get("train") is not False for m in exchange)]

        def encoded(first: int, end: int) -> list[Encoded] | None:
            turns = [m for exchange in exchanges[first:end] for m in exchange]
            sequences = self.chat.encode([*system, *turns], tools)
            return sequences if self._fits(sequences) else None

        kept: list[Encoded] = []
        done = unseen = 0
        for n in learned:
            if n < done:
                continue
            size = _last_that(lambda size, end=n + 1: encoded(end - size, end) is not None, 0, n + 1 - done)
            first, done = n + 1 - size, n + 1
            if size:
                end = _last_that(lambda end, first=first: encoded(first, end) is not None, done, len(exchanges))
                done = max(m for m in learned if m < end) + 1
                piece = encoded(first, done) or []
                kept += piece
                unseen += len(piece) if any(PICTURES in m for exchange in exchanges[:first] for m in exchange) else 0
        return kept, unseen


def with_rejected(example: PreparedRow) -> list[dict[str, Any]]:
    """The conversation of a pair with the rejected answer in place of the chosen one."""
    messages = example["messages"]
    return [*messages[:first_learned(messages)], *example["rejected"]]


def first_learned(messages: Sequence[dict[str, Any]]) -> int:
    """Where the answer of a pair or a judged answer begins: at the first turn that is learned."""
    return next(n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False)


def marks_of(example: PreparedRow) -> list[int]:
    """The marks of a row's sequences, see ``encoding.tokens``: of a pair two, else one for all of them."""
    if "rejected" in example:
        return [1, -1]
    return [0] if MARK not in example else [1 if example[MARK] else -1]


def liked_of(example: PreparedRow, sequences: Sequence[Encoded]) -> list[Encoded]:
    """Those of a row's sequences that a model is to answer like: not the rejected answer of a pair, nor a bad one."""
    marks = marks_of(example)
    if len(marks) == 1:
        return list(sequences) if marks[0] >= 0 else []
    return [sequence for sequence, mark in zip(sequences, marks) if mark >= 0]


def part(sequence: Encoded, start: int, end: int) -> Encoded | None:
    """Tokens ``start`` to ``end`` of a sequence, up to the last learned one; None if nothing in it is learned."""
    spans = np.clip(sequence.spans, start, end) - start
    spans[:, 0] = np.maximum(spans[:, 0], 1)  # nothing stands before the first token that could predict it
    spans = spans[spans[:, 0] < spans[:, 1]]
    if not len(spans):
        return None
    ends = int(spans[-1, 1])
    seen = tuple((name, at - start) for name, at in sequence.pictures if start < at <= start + ends)
    return Encoded(sequence.ids[start:start + ends], spans, seen)


def _last_that(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number above ``low`` and up to ``high`` for which a monotone condition holds; ``low`` if none."""
    step = 1  # in growing steps at first: what is asked about far beyond the answer takes long
    while low < high and holds(min(low + step, high)):
        low, step = min(low + step, high), 2 * step
    high = min(low + step - 1, high)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _only_last(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``--train-on last`` written into the turns: a piece's last answer is not the conversation's."""
    last = max(n for n, m in enumerate(messages) if m["role"] == "assistant")
    return [{**m, "train": False} if m["role"] == "assistant" and n != last else m for n, m in enumerate(messages)]
