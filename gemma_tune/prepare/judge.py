"""Rows become conversations, checks and tokens: the work of ``prepare`` that needs no other row.

It runs block by block, in this process or in several, and its results are compact, as they cross process borders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from gemma_tune.base.files import json_bytes
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.checks import TextChecks
from gemma_tune.data.conversations.formats import Formats, Problem, RowError
from gemma_tune.data.conversations.kept_pictures import Pictures, not_looked_at
from gemma_tune.data.conversations.layouts import with_calls_as_text
from gemma_tune.data.reading.sources import Block, Row
from gemma_tune.encoding.chat_format import FormatError
from gemma_tune.encoding.left_out import kinds_in
from gemma_tune.encoding.sequences import MARK, Encoder, Outcome, PreparedRow, first_learned, marks_of
from gemma_tune.prepare.near import signature, unlike
from gemma_tune.prepare.noticed import TOO_LONG, Judged, Rejected, kind_of
from gemma_tune.prepare.opposites import beside, conversation_hash, is_turned
from gemma_tune.prepare.scripts import script_of
from gemma_tune.prepare.spool import Kept, batch_of
from gemma_tune.run.manifest import PAIRS

SPLIT = " or --on-long split"  # of a row that has parts, where a larger limit is proposed
_as_key = json.JSONEncoder(sort_keys=True).encode


class Judge:
    """Checks and encodes blocks of rows.

    Args:
        chat: tokenizer and template.
        config: settings of ``prepare``.
        pictures: takes those of the rows; None where nothing can be learned from any.
        blind: why that is so, as the end of a sentence.
    """

    def __init__(self, chat: Any, config: PrepareConfig, pictures: Pictures | None = None, blind: str = ""):
        self.config, self.chat, self.pictures, self.blind = config, chat, pictures, blind
        self.formats = Formats(config.format, config.column_names, config.take, config.role_names,
                               config.key_names, config.on_uneven == "mend")
        self.checks = TextChecks(chat.markers, config.allow, config.new_tokens)
        self.encoder = Encoder(chat, config.max_length, config.on_long, config.train_on)

    def __call__(self, block: Block) -> Judged:
        judged = Judged(None, [])
        rows: list[Row] = []
        examples: list[PreparedRow] = []
        for row in block.rows():
            try:
                examples.append(self._example(row, judged))
                rows.append(row)
            except RowError as e:
                judged.rejected.append(Rejected(row, e.problems))
        kept = [k for row, example, outcome in zip(rows, examples, self.encoder.encode(examples))
                if (k := self._kept(row, example, outcome, judged))]
        judged.rejected.sort(key=lambda r: r.row.line)
        judged.kept = batch_of(kept) if kept else None
        return judged

    def texts(self, rows: Sequence[Row]) -> bytes:
        """Parts of texts that have been judged before, as :attr:`Judged.kept` has rows."""
        outcomes = self.encoder.encode([row.value for row in rows])
        return batch_of([self._kept(row, row.value, outcome, Judged(None, []))
                         for row, outcome in zip(rows, outcomes, strict=True)])

    def _example(self, row: Row, judged: Judged) -> PreparedRow:
        example = self.formats.example_of(row)
        judged.noticed.formats[example.format] += 1
        if example.format == "columns":
            judged.noticed.named.update(role for role, name in self.formats.columns.items() if name in row.value)
            judged.noticed.columns = judged.noticed.columns or list(row.value)[:20]
        if example.usual:
            judged.noticed.usual[example.usual] += 1
        if example.unread:
            judged.noticed.unread.count(example.unread)
            if self.pictures is not None:
                judged.noticed.pictures.pass_over(example.unread)
        if problems := self.checks.problems(example):
            raise RowError(problems)
        if example.messages is None:
            return example.as_row()
        if any("pictures" in turn for turn in example.messages):
            if self.pictures is None:
                raise not_looked_at(self.blind)
            example = replace(example, messages=self.pictures.taken(row, example.messages, judged.noticed.pictures))
        judged.noticed.folded += self.chat.folds_system and example.messages[0]["role"] == "system"
        judged.noticed.reasoning += any(
            "reasoning_content" in turn for turn in self.chat.with_thoughts_apart(example.messages))
        judged.noticed.mended.update(example.mended)
        judged.noticed.unthought += self.chat.has_unthought(example.messages, self.config.train_on)
        return example.as_row()

    def _kept(self, row: Row, example: PreparedRow, outcome: Outcome | FormatError, judged: Judged) -> Kept | None:
        if isinstance(outcome, FormatError):
            fix = outcome.fix or "change the conversation so that the chat template takes it"
            if outcome.about_reasoning:
                leave_out = ("leave `reasoning=…` out of --columns" if "reasoning" in self.formats.columns else
                             "remove the reasoning from the turn")
                fix = (f"{leave_out}, write it into its text as <think>…</think> to have it learned as such, or use a "
                       "model whose chat template has reasoning")
            if outcome.about_tools:
                fix = self.chat.tools_advice or "use a model whose chat template has tools, or leave the row out"
                if columns := with_calls_as_text(row.value):
                    fix += f"; --columns {columns} keeps the calls and the functions as the text that they are"
            judged.rejected.append(Rejected(row, (Problem("template", str(outcome), fix),)))
            return None
        if not outcome.full:  # --train-on last, and just that turn is not to be learned
            judged.rejected.append(Rejected(row, (Problem(
                "nothing_to_learn", "the last assistant turn, which alone is to be learned, says that it is not",
                "use --train-on all, or leave the row out"),)))
            return None
        kind = kind_of(example)
        judged.noticed.kinds[kind] += 1
        judged.noticed.markup.look_at(f"{row.file}:{row.line}", example)
        judged.noticed.first_of_kind.setdefault(kind, f"{row.file}:{row.line}")
        judged.noticed.tools += bool(kinds_in(example.get("messages", ()), example.get("tools")))
        if any("tool_calls" in turn and then["role"] == "user" for turn, then in pairwise(example.get("messages", ()))):
            judged.noticed.unanswered += 1
            judged.noticed.first_unanswered = judged.noticed.first_unanswered or f"{row.file}:{row.line}"
        if len(outcome.full) > 1 and kind != PAIRS:
            judged.noticed.rewritten += 1
            judged.noticed.difference = judged.noticed.difference or self._difference(row, example)
        judged.noticed.pictures.unseen += outcome.unseen
        if not outcome.kept:
            judged.rejected.append(Rejected(row, (self._too_long(outcome, kind, example),)))
        text = json_bytes(example)
        written = self._written(row, example, judged)
        same = text if written is example else json_bytes(written)
        turns = [*example.get("messages", ()), *example.get("rejected", ())]
        texts = [example["text"]] if "text" in example else [turn["content"] for turn in turns]
        return Kept(line=row.line, text=text, answers=tuple(marks_of(example)),
                    conversation=conversation_hash(written, same),
                    prompt=self._prompt(example), turns=len(example.get("messages", ())),
                    script=script_of("\n".join(texts)),
                    signature=_signature(example, [*texts, *beside(turns)]) if self.config.near_duplicates else b"",
                    outcome=outcome)

    def _written(self, row: Row, example: PreparedRow, judged: Judged) -> PreparedRow:
        """The row with the white space around its texts that the template writes, which rows are compared with."""
        sides = [name for name in ("messages", "rejected") if name in example]
        if not any(_is_padded(turn) for name in sides for turn in example[name]):
            return example
        written = {name: [_with_pictures(self.chat.written(turn), turn) for turn in example[name]] for name in sides}
        judged.noticed.padded += any(_is_padded(turn) for turns in written.values() for turn in turns)
        if any(written[name] != example[name] for name in sides):
            judged.noticed.trimmed += 1
            judged.noticed.first_trimmed = judged.noticed.first_trimmed or f"{row.file}:{row.line}"
        return {**example, **written}

    def _difference(self, row: Row, example: PreparedRow) -> str:
        train_on = "all" if MARK in example else self.config.train_on  # as it was encoded
        found = self.chat.difference(example["messages"], example.get("tools"), train_on=train_on)
        return f"{row.file}:{row.line}: {found}"

    def _too_long(self, outcome: Outcome, kind: str, example: PreparedRow) -> Problem:
        shorter = f"shorten the {'text' if 'text' in example else 'conversation'}"
        if any("pictures" in turn for turn in example.get("messages", ())):
            shorter += ", or make its pictures smaller or fewer"
        if kind == PAIRS:
            why = {"split": ", and a pair cannot be divided",
                   "truncate": ", and up to there the answers are not two that differ"}.get(self.config.on_long, "")
            return Problem(TOO_LONG, f"the longer of both answers makes {outcome.longest} tokens with its prompt, "
                                      f"more than --max-length {self.config.max_length}{why}",
                           f"use --max-length {outcome.longest}, or {shorter.replace('conversation', 'pair')}")
        several = sum(turn["role"] == "user" for turn in example.get("messages", ())) > 1
        split = SPLIT if self.config.on_long != "split" and (several or "text" in example) else ""
        why = {"split": ", and no single exchange of it fits", "truncate": ", and no answer begins before it"}
        return Problem(TOO_LONG, f"{outcome.longest} tokens are more than --max-length {self.config.max_length}"
                                  f"{why.get(self.config.on_long, '')}",
                       f"use --max-length {outcome.longest}{split}, or {shorter}")

    def _prompt(self, example: PreparedRow) -> int:
        """A hash (64 bits) of the seed and everything but the answers: what decides the side of the split.

        White space around texts does not count: questions that differ in nothing else are the same one; those about
        other pictures are not. Of answers that are compared or judged the answer begins at the first turn that is
        learned, and may hold results of tools.
        """
        turns = example.get("messages", [])
        if marks_of(example) != [0]:
            turns = turns[:first_learned(turns)]
        prompt = example.get("text") or [
            {key: value for key, value in _with_pictures({**m, "content": m["content"].strip()}, m).items()
             if key != "tool_call_id"} for m in turns if m["role"] != "assistant"]
        tools = [example["tools"]] if "tools" in example else []
        content = _as_key([self.config.seed, prompt, *tools]).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _signature(example: PreparedRow, texts: Sequence[str]) -> bytes:
    """What a row's likeness to others is told by. An answer that is bad is like no good one, whatever it says, and a
    pair like none whose answers have changed places."""
    found = signature(texts)
    if names := [ref["file"] for turn in example.get("messages", ()) for ref in turn.get("pictures", ())]:
        found = unlike(found, names)
    return (~found if is_turned(example) else found).tobytes()


def _with_pictures(written: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
    """A turn that lost white space around its text, with its pictures where they were in it."""
    text = written["content"]
    if "pictures" not in turn or text == turn["content"]:
        return written
    lost = len(turn["content"]) - len(turn["content"].lstrip()) - (len(text) - len(text.lstrip()))
    return {**written, "pictures": [{**ref, "at": min(max(0, ref["at"] - lost), len(text))}
                                    for ref in turn["pictures"]]}


def _is_padded(turn: dict[str, Any]) -> bool:
    return any(text != text.strip() for name in ("content", "reasoning_content") if (text := turn.get(name, "")))
