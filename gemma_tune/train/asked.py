"""What a training from rewards asks: of each conversation everything before its last learned answer. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_tune.answers.prompts import Prompt, prompts_of
from gemma_tune.base.checkpoint import context_length
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.encoding.tokens import lengths_of, pictured, those
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session


def starts_of(sequences: Any) -> np.ndarray:
    """Tokens before the last learned range of each sequence (int64), without reading them."""
    chunks = [np.zeros(0, np.int64)]
    for column in sequences.data.column("spans").chunks:
        ends = np.cumsum(column.value_lengths().to_numpy())
        chunks.append(column.flatten().to_numpy().astype(np.int64)[ends - 2])
    return np.concatenate(chunks)


def rows_of(sequences: Any) -> np.ndarray:
    """The line of its file, from 0, that each sequence is of (int64)."""
    chunks = [np.zeros(0, np.int64), *(chunk.to_numpy() for chunk in sequences.data.column("row").chunks)]
    return np.concatenate(chunks).astype(np.int64)


def is_divided(session: Session) -> bool:
    """Whether sequences of these rows can be a part of their conversation, being longer than the limit."""
    return session.settings_of("prepare").get("on_long") in ("split", "truncate")


def prompt_before(row: Mapping[str, Any], chat: Any, ids: Sequence[int]) -> Prompt | None:
    """The turns that prompt ids were made of, which need not be all before the row's last learned answer; None where
    they are no part of it.

    Args:
        row: a line of train.jsonl or valid.jsonl.
        chat: the :class:`gemma_tune.encoding.chat_format.ChatFormat`.
    """
    ids = [*ids]
    for whole in prompts_of(row):
        for found in (whole, whole.fitted(chat, len(ids))):
            if found is not None and found.ids(chat) == ids:
                return found
    return None


def prompts_in(sequences: tuple[Any, Any], session: Session, stops: Callable[[], Sequence[int]],
               listener: Listener | None = None) -> tuple[Any, Any]:
    """The last sequence of each row, as datasets of the same kind: its last answer is what is sampled anew, so those
    that were cut within it are left out.

    Args:
        sequences: the training's, and the validation's.
        stops: ids that end an answer, if they have to be known.
        listener: hears what is left out; None where it was told.

    Raises:
        UserError: rows with pictures, or of plain text; or none is left to learn from.
    """
    found = [_last_of_rows(side, session) for side in sequences]
    cut = [_cut(side, session, stops) for side in found]
    if cut[0].all() and len(cut[0]):
        raise UserError(f"--method grpo scores answers against those of the rows, and of all {len(cut[0]):,} "
                        "`prepare --on-long truncate` has cut the end off", _longer(session))
    if (number := int(sum(map(sum, cut)))) and listener:
        listener.warn(f"{counted(number, 'row')} of {sum(map(len, cut)):,} {'are' if number > 1 else 'is'} left out: "
                      "`prepare --on-long truncate` has cut off the end of the answer that others are scored against; "
                      f"{_longer(session)}")
    return those(found[0], ~cut[0]), those(found[1], ~cut[1])


def left_for_answers(session: Session, longest: int) -> int | None:
    """Tokens that the model's context leaves for an answer behind the longest prompt, of so many tokens; None where
    ``max_new_tokens`` fit.

    Raises:
        UserError: none.
    """
    most, context = session.config.max_new_tokens, context_length(session.model.config)
    if not context or context - longest >= most:
        return None
    if longest >= context:
        again = command("prepare", session.run.root, "--max-length", str(max(16, context - most)))
        raise UserError(f"the longest prompt has {longest:,} tokens, and the model's context ends at {context:,}: "
                        "nothing is left for an answer", f"prepare shorter rows: {again}")
    return context - longest


def tell_of_short_answers(session: Session, left: int) -> None:
    """Warn of prompts that leave less room than asked for."""
    session.listener.warn(f"the model's context leaves {left:,} tokens for an answer to the longest prompt, and not "
                          f"--max-new-tokens {session.config.max_new_tokens:,}: answers to such prompts end earlier; "
                          f"with --max-new-tokens {left} all have the same room")


def _longer(session: Session) -> str:
    most = session.settings_of("prepare")["max_length"]
    return f"with more tokens they are whole: {command('prepare', session.run.root, '--max-length', str(2 * most))}"


def _cut(sequences: Any, session: Session, stops: Callable[[], Sequence[int]]) -> np.ndarray:
    """Whether each sequence ends within an answer (bool)."""
    settings = session.settings_of("prepare")
    if settings.get("on_long") != "truncate":
        return np.zeros(len(sequences), bool)
    cut = lengths_of(sequences) >= settings["max_length"]
    if cut.any():
        ends = {*stops()}
        for number in np.flatnonzero(cut):
            cut[number] = int(sequences[int(number)]["input_ids"][-1]) not in ends
    return cut


def _last_of_rows(sequences: Any, session: Session) -> Any:
    rows = rows_of(sequences)
    again = command("prepare", session.run.root, "OTHER.jsonl")
    if shown := len(np.unique(rows[pictured(sequences)])):
        raise UserError(f"--method grpo learns from text alone, and {counted(shown, 'row has', 'rows have')} pictures",
                        f"prepare rows without any: {again}; or train with --method sft")
    if texts := len(np.unique(rows[starts_of(sequences) <= 1])):
        raise UserError(f"--method grpo asks the model, and {counted(texts, 'row is', 'rows are')} plain text without "
                        "a prompt", f"prepare conversations: {again}; or train with --method sft")
    return those(sequences, np.append(rows[1:] != rows[:-1], True)[:len(rows)])


def refuse_divided_tokens(session: Session) -> None:
    """Rows of new tokens are learned where each process has the whole embedding.

    Raises:
        UserError: the model is to be divided among them.
    """
    if session.config.shards > 1 and session.settings_of("prepare").get("new_tokens"):
        raise UserError("new tokens (--new-tokens) cannot be learned with --strategy fsdp, where no process has the "
                        "whole embedding", "leave --strategy out, with --qlora where the model does not fit so")
