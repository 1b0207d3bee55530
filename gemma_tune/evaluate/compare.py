"""Base and tuned model on the same rows: their losses, their answers, and how sure the differences are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gemma_tune import samples
from gemma_tune.answers.generation import Answer, greedy_continuations, prompt_ids
from gemma_tune.answers.sight import Sights, beside
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.evaluate.rows import Chosen, Question
from gemma_tune.evaluate.scores import per_answer
from gemma_tune.measure.general import measuring_rows_of
from gemma_tune.measure.intervals import compare
from gemma_tune.measure.likelihood import Wanted, negative_log_likelihoods, wanted_of

SIDES = ("base", "tuned")
BATCH = 16  # answers made together
MEASURING, ANSWERING = "measuring the loss", "answering prompts"
# How much worse general text may be predicted before it is a warning, in nats per token: a tenth more perplexity.
MOST_LOST = float(np.log(1.1))


def on_both(model: Any, work: Callable[[str], Any]) -> dict[str, Any]:
    """What ``work`` finds out of the base, the adapter being switched off, and of the tuned model."""
    with model.disable_adapter():
        base = work("base")
    return {"base": base, "tuned": work("tuned")}


def losses(model: Any, chat: ChatFormat, chosen: Chosen, seed: int, listener: Listener,
           seen: Sights | None = None) -> dict[str, Any]:
    """Loss and perplexity on the rows' learned tokens and on general text, and of better and worse answers which are
    likelier: measures by name.

    Args:
        seen: features of the rows' pictures by name, where they have any.
    """
    general = wanted_of(measuring_rows_of(chat))
    preferences = chosen.preferences
    different, places = _each_once([*chosen.sequences, *general, *(preferences.sequences if preferences else [])])
    total = 2 * sum(wanted.ids.shape[1] for wanted in different)

    def one(side: str) -> np.ndarray:
        before = total // 2 if side == "tuned" else 0
        nats = negative_log_likelihoods(model, different,
                                        lambda done: listener.progress(MEASURING, before + done, total),
                                        partial(beside, seen, chat.eye))
        return nats[places]

    listener.progress(MEASURING, 0, total)
    nats = on_both(model, one)
    listener.progress(MEASURING, total, total)
    split, end = len(chosen.sequences), len(chosen.sequences) + len(general)
    found = {}
    if split:
        found = _loss_pair("", *(nats[side][:split] for side in SIDES), chosen.sequences, chosen.row_of, seed)
    if preferences:
        found |= preferences.measures(*(nats[side][end:] for side in SIDES), seed)
    passages = np.arange(len(general))
    return found | _loss_pair("general_", *(nats[side][split:end] for side in SIDES), general, passages, seed)


def _each_once(sequences: Sequence[Wanted]) -> tuple[list[Wanted], list[int]]:
    """The sequences without repetitions, and where each of the given ones is among these: a better answer is measured
    as a row, and against the worse one."""
    different: dict[tuple[Any, ...], Wanted] = {}
    keys = [tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(wanted).values())
            for wanted in sequences]
    for key, wanted in zip(keys, sequences):
        different.setdefault(key, wanted)
    numbers = {key: n for n, key in enumerate(different)}
    return [*different.values()], [numbers[key] for key in keys]


def _loss_pair(prefix: str, base: np.ndarray, tuned: np.ndarray, sequences: Sequence[Wanted], row_of: np.ndarray,
               seed: int) -> dict[str, Any]:
    """Loss and perplexity from sums of sequences, put together by row."""
    rows = np.unique(row_of, return_inverse=True)[1]

    def by_row(values: Any) -> np.ndarray:
        return np.bincount(rows, weights=np.asarray(values, np.float64))

    tokens = by_row([len(wanted.labels) for wanted in sequences])
    parts = by_row(base), by_row(tuned), tokens, seed
    more = {"tokens": int(tokens.sum())}
    return {f"{prefix}loss": compare(*parts).as_json() | more,
            f"{prefix}perplexity": compare(*parts, change=np.exp).as_json() | more}


def answers(model: Any, chat: ChatFormat, questions: Sequence[Question], most: int, listener: Listener,
            seen: Sights | None = None) -> dict[str, list[Answer]]:
    """Greedy answers of both models, in the questions' order; prompts of similar length go together.

    Args:
        most: tokens of an answer.
        seen: features of the questions' pictures by name, where they have any.
    """
    encoded = [prompt_ids(chat, q.prompt.messages, q.prompt.tools) for q in questions]
    order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]))
    batches = [order[n:n + BATCH] for n in range(0, len(order), BATCH)]
    found: dict[str, list[Any]] = {side: [None] * len(questions) for side in SIDES}
    done = 0
    for batch in batches:
        def one(side: str, batch: list[int] = batch) -> None:
            nonlocal done
            listener.progress(ANSWERING, done, 2 * len(questions))
            made = greedy_continuations(model, chat, [encoded[n] for n in batch], most,
                                        pictures=[questions[n].prompt.pictures for n in batch], seen=seen)
            for n, answer in zip(batch, made, strict=True):
                found[side][n] = answer
            done += len(batch)

        on_both(model, one)
    listener.progress(ANSWERING, 2 * len(questions), 2 * len(questions))
    return found


def measured_answers(given: dict[str, list[Answer]], questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """Measures of the answers by name, as :func:`gemma_tune.measure.intervals.compare` gives them."""
    base, tuned = (per_answer(given[side], questions, samples.in_form) for side in SIDES)
    return {name: compare(base[name], tuned[name], seed=seed).as_json() for name in base}


def worse_at_general_text(measures: dict[str, Any]) -> str | None:
    """What to tell of a model that lost what it knew before, by more than chance explains; None if it did not."""
    loss, perplexity = measures["general_loss"], measures["general_perplexity"]
    change, low, _ = loss["difference"]
    if change < MOST_LOST or low is None or low <= 0:
        return None
    return (f"the tuned model predicts general text worse than the base: perplexity {perplexity['base'][0]:.1f} -> "
            f"{perplexity['tuned'][0]:.1f} ({np.exp(change) - 1:+.0%}) on {loss['tokens']:,} tokens; fewer --epochs, a "
            "lower --learning-rate, or general conversations among the rows keep more of what it knew")


def worse_at_the_rows(measures: dict[str, Any]) -> str | None:
    """The same of the rows that are measured on: of pairs, of the better answers, which a training of preferences may
    well make less likely while it learns which are better. Whoever earns higher rewards need not say what they say."""
    found = measures.get("loss")
    if found is None or not _rose(found) or "reward" in measures and _rose(measures["reward"]):
        return None
    why = ("it prefers the better answers by more, as the worse ones fell further; a lower --learning-rate holds them, "
           "and so does a larger --beta" if "margin" in measures and _rose(measures["margin"]) else
           "it has not learned what they hold, or was trained on something else")
    return (f"the tuned model predicts these rows worse than the base: loss {found['base'][0]:.3f} -> "
            f"{found['tuned'][0]:.3f}; {why}")


def worse_by_rewards(measures: dict[str, Any]) -> str | None:
    """The same of the rewards of answers."""
    found = measures.get("reward")
    if found is None or (high := found["difference"][2]) is None or high >= 0:
        return None
    return (f"the tuned model's answers earn less than the base's: reward {found['base'][0]:.3f} -> "
            f"{found['tuned'][0]:.3f}; a lower --learning-rate or more --answers make a training from rewards steadier")


def _rose(measure: dict[str, Any]) -> bool:
    """Whether a figure is higher than that of the base, by more than chance explains."""
    low = measure["difference"][1]
    return low is not None and low > 0
