"""Rows become conversations, checks and tokens: the work of ``prepare`` that needs no other row.

It runs block by block, in this process or in several, and its results are compact, as they cross process borders.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.files import json_bytes
from gemma_tune.base.machine import ending_signals, held
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.checks import TextChecks
from gemma_tune.data.conversations.formats import Formats, Problem, RowError
from gemma_tune.data.conversations.kept_pictures import NoticedPictures, Pictures, not_looked_at
from gemma_tune.data.conversations.layouts import with_calls_as_text
from gemma_tune.data.conversations.problems import in_words
from gemma_tune.data.reading.sources import Block, Row
from gemma_tune.encoding.chat_format import FormatError
from gemma_tune.encoding.left_out import kinds_in
from gemma_tune.encoding.sequences import MARK, Encoder, Outcome, PreparedRow, first_learned, marks_of
from gemma_tune.prepare.markup import NoticedMarkup
from gemma_tune.prepare.near import signature, unlike
from gemma_tune.prepare.opposites import beside, conversation_hash, is_turned
from gemma_tune.prepare.scripts import script_of
from gemma_tune.prepare.spool import Kept, batch_of
from gemma_tune.prepare.unread import UnreadCounts
from gemma_tune.run.manifest import CONVERSATIONS, JUDGED, PAIRS

_TOO_LONG = "too_long"
SPLIT = " or --on-long split"  # of a row that has parts, where a larger limit is proposed
T = TypeVar("T")
_as_key = json.JSONEncoder(sort_keys=True).encode
_AHEAD = 2  # blocks for each process that wait or are being worked on


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and every problem it has."""

    row: Row
    problems: tuple[Problem, ...]

    @property
    def code(self) -> str:
        """The first problem's code."""
        return self.problems[0].code

    @property
    def is_too_long(self) -> bool:
        """Whether nothing is wrong with the row but its length."""
        return self.code == _TOO_LONG

    @property
    def place(self) -> str:
        return f"{self.row.file}:{self.row.line}"

    def __str__(self) -> str:
        return f"{self.place}: {in_words(self.problems)}"

    def record(self) -> dict[str, Any]:
        """As it is kept in rejected.jsonl: nothing of the row is lost."""
        first, *others = self.problems
        more = {"others": [vars(p) for p in others]} if others else {}
        return {"file": self.row.file, "line": self.row.line, **vars(first), **more, "row": self.row.value}


@dataclass
class Noticed:
    """What is said about rows beside what is wrong with some.

    Args:
        formats: number of rows by format.
        folded: rows whose system message had to go into the first user turn.
        reasoning: rows with reasoning in them.
        mended: rows whose turns were made to alternate, by what was done.
        unthought: rows with an answer that has none where the prompt begins some.
        tools: rows with tools, calls of them or their results, which the template has a place for.
        unanswered: rows with a call behind which the user goes on, without a result; ``first_unanswered`` is where the
            first of them is.
        rewritten: rows of several sequences, as the template writes their earlier turns in another way later.
        difference: what that way is, in the first of them.
        padded: rows with white space around a text that the template writes.
        trimmed: rows with white space around a text that the template leaves out, or a part of it.
        first_trimmed: where the first of these is.
        named: rows that have the column which ``--columns`` names for a role that a row may lack, by role.
        columns: what the first row of that format has.
        unread: columns and keys of the rows that nobody reads.
        usual: rows by the columns that are taken for question and answer by their names.
        kinds: rows by what is learned from them, see :func:`kind_of`, and where the first of each stands.
        pictures: those that rows name or hold.
        markup: what is left of web pages in texts.
    """

    formats: Counter[str] = field(default_factory=Counter)
    folded: int = 0
    reasoning: int = 0
    unthought: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    unanswered: int = 0
    first_unanswered: str = ""
    rewritten: int = 0
    difference: str = ""
    padded: int = 0
    trimmed: int = 0
    first_trimmed: str = ""
    named: Counter[str] = field(default_factory=Counter)
    columns: list[str] = field(default_factory=list)
    unread: UnreadCounts = field(default_factory=UnreadCounts)
    usual: Counter[tuple[str, ...]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    first_of_kind: dict[str, str] = field(default_factory=dict)
    pictures: NoticedPictures = field(default_factory=NoticedPictures)
    markup: NoticedMarkup = field(default_factory=NoticedMarkup)

    def add(self, later: Noticed) -> None:
        """Put together with what was noticed about later rows."""
        self.formats.update(later.formats)
        self.folded += later.folded
        self.reasoning += later.reasoning
        self.unthought += later.unthought
        self.mended.update(later.mended)
        self.tools += later.tools
        self.unanswered += later.unanswered
        self.first_unanswered = self.first_unanswered or later.first_unanswered
        self.rewritten += later.rewritten
        self.difference = self.difference or later.difference
        self.padded += later.padded
        self.trimmed += later.trimmed
        self.first_trimmed = self.first_trimmed or later.first_trimmed
        self.named.update(later.named)
        self.columns = self.columns or later.columns
        self.unread.add(later.unread)
        self.usual.update(later.usual)
        self.kinds.update(later.kinds)
        self.first_of_kind = later.first_of_kind | self.first_of_kind
        self.pictures.add(later.pictures)
        self.markup.add(later.markup)


@dataclass
class Judged:
    """The results of one block.

    Args:
        kept: usable rows and those that are too long, as bytes of an Arrow batch (see ``spool``); None if there are
            none.
        rejected: all others, and the too long ones.
    """

    kept: bytes | None
    rejected: list[Rejected]
    noticed: Noticed = field(default_factory=Noticed)


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
        self.checks = TextChecks(chat.markers, config.allow)
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
            return Problem(_TOO_LONG, f"the longer of both answers makes {outcome.longest} tokens with its prompt, "
                                      f"more than --max-length {self.config.max_length}{why}",
                           f"use --max-length {outcome.longest}, or {shorter.replace('conversation', 'pair')}")
        several = sum(turn["role"] == "user" for turn in example.get("messages", ())) > 1
        split = SPLIT if self.config.on_long != "split" and (several or "text" in example) else ""
        why = {"split": ", and no single exchange of it fits", "truncate": ", and no answer begins before it"}
        return Problem(_TOO_LONG, f"{outcome.longest} tokens are more than --max-length {self.config.max_length}"
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


def kind_of(example: PreparedRow) -> str:
    """What is learned from a row: an answer, which of two is better, or whether one is good."""
    return PAIRS if "rejected" in example else JUDGED if MARK in example else CONVERSATIONS


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


# --- several processes

_judge: Judge | None = None  # of this process; children that are forked inherit it, with the tokenizer in its memory


def judged_blocks(blocks: Iterable[tuple[T, Block]], judge: Judge, processes: int) -> Iterator[tuple[T, Block, Judged]]:
    """Every block, with what it came with and its results, in order. Reading stays at most a few blocks ahead.

    Raises:
        WorkFailed: a process was killed, which is what happens when memory runs out.
    """
    if processes < 2:
        for origin, block in blocks:
            yield origin, block, judge(block)
        return
    global _judge
    _judge = judge
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    gc.collect()
    gc.freeze()  # or the children's garbage collectors would write to, and so copy, all memory that they share
    try:
        with _one_interrupt(), _pool(processes, judge) as pool:
            waiting: deque[tuple[T, Block, Any]] = deque()
            for origin, block in blocks:
                with held(ending_signals()):  # Python ignores what a handler raises while it forks
                    future = pool.submit(_work, block)
                waiting.append((origin, block, future))
                if len(waiting) >= processes * _AHEAD:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
    except BrokenProcessPool as e:
        raise WorkFailed("a process that prepares rows was killed, perhaps because memory ran out",
                         "close other programs and run the same command again") from e
    finally:
        gc.unfreeze()
        _judge = None


@contextlib.contextmanager
def _pool(processes: int, judge: Judge) -> Iterator[ProcessPoolExecutor]:
    """Child processes, which end at once when their work is for nobody any more."""
    pool = ProcessPoolExecutor(processes, mp_context=_context(), initializer=_begin, initargs=_arguments(judge))
    try:
        yield pool
    except BaseException:  # Ctrl-C, or whoever takes the results has stopped
        for child in multiprocessing.active_children():
            child.kill()
        # One that is killed while it sends its rows leaves the pool's thread waiting for the rest, as long as anybody
        # could still write there: this process itself.
        with contextlib.suppress(AttributeError, OSError):
            pool._result_queue._writer.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first Ctrl-C ends the work; a second one would leave the pool waiting for its children for ever."""
    pressed = False

    def receive(number: int, frame: Any) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            raise KeyboardInterrupt

    # Python gives signals to the main thread only; whoever has a way of their own to deal with them keeps it.
    if threading.current_thread() is not threading.main_thread() or (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _next(waiting: deque[tuple[T, Block, Any]]) -> tuple[T, Block, Judged]:
    origin, block, future = waiting.popleft()
    return origin, block, future.result()


def _context() -> Any:
    return multiprocessing.get_context("fork" if may_fork() else "spawn")


def _arguments(judge: Judge) -> tuple[Any, ...]:
    return (None,) if may_fork() else (judge,)


def may_fork() -> bool:
    """Whether children can share the loaded tokenizer instead of loading it again.

    Forking copies no threads, but what they had locked: a process that has met others for a training has some. On macOS
    and Windows it is unsafe or unknown.
    """
    distributed = sys.modules.get("torch.distributed")  # `prepare` itself does not import it
    met = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return sys.platform == "linux" and not met


def _begin(judge: Judge | None) -> None:
    """Start of a child process. Ctrl-C is for the parent, which ends its children."""
    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = ending_signals()
    for number in set(ending) - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # which they were forked with, see `held`
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if judge is not None:
        _judge = judge


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(block: Block) -> Judged:
    assert _judge is not None
    return _judge(block)
