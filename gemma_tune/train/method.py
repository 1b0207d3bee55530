"""``--method``: what is learned from the prepared data, and the settings that go with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.config.families import family_defaults, full_defaults, preference_defaults
from gemma_tune.config.preference import OF_METHODS
from gemma_tune.config.settings import in_words
from gemma_tune.config.stages import AUTO, TrainConfig
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import CONVERSATIONS, JUDGED, PAIRS
from gemma_tune.run.session import Session

_BY_KIND = {CONVERSATIONS: "sft", PAIRS: "dpo", JUDGED: "kto"}
_NEEDS = {"sft": (CONVERSATIONS, PAIRS, JUDGED), "dpo": (PAIRS,), "orpo": (PAIRS,), "kto": (PAIRS, JUDGED),
          "grpo": (CONVERSATIONS,)}
_ARE = {CONVERSATIONS: "conversations", PAIRS: "pairs of a better and a worse answer",
        JUDGED: "answers that are good or bad"}
_WANT = {"dpo": "two answers to each prompt, a better and a worse one", "orpo": "two answers to each prompt, a better "
         "and a worse one", "kto": "answers that are good or bad, or pairs of both",
         "grpo": "the prompts of conversations"}
_SUCH = {"grpo": "CONVERSATIONS.jsonl"}  # files of such data, of all others pairs
_REWARDS = ("add --reward number for answers that end in a number, exact, contains, chrf, json, ended, regex:PATTERN, "
            "or command:PROGRAM for one of your own; several with commas between")


def row_name(config: TrainConfig) -> str:
    """What a method's rows are called, each by itself."""
    return {"dpo": "pair", "orpo": "pair", "kto": "answer", "grpo": "prompt"}.get(config.method, "sequence")


def piece_name(config: TrainConfig) -> str:
    """What goes through the model, one by one: of GRPO a prompt's answers."""
    return "answer" if config.method == "grpo" else row_name(config)


def learns_from(method: str, kind: str) -> bool:
    """Whether a method, or the one that the data calls for, can learn from data of this kind."""
    return method == AUTO or kind in _NEEDS.get(method, ())


def with_method(session: Session) -> Session:
    """The session with the method that the data calls for where none was named, and the method's own defaults.

    Raises:
        UserError: the method that was named learns from other data, or from rewards of which none is named.
    """
    kind, asked = session.manifest.kind, session.config.method
    method = _BY_KIND[kind] if asked == AUTO else asked
    if kind not in _NEEDS[method]:
        fitting = " or ".join(f"--method {name}" for name in sorted(
            (name for name, kinds in _NEEDS.items() if kind in kinds), key=lambda name: name != _BY_KIND[kind]))
        such = _SUCH.get(method, "PAIRS.jsonl")
        raise UserError(f"--method {method} learns from {_WANT[method]}, and the prepared rows are {_ARE[kind]}",
                        f"prepare such data: {command('prepare', session.run.root, such)}; or train with {fitting}")
    if method == "grpo" and not session.config.reward:
        raise UserError("--method grpo learns from rewards, and no --reward says what answers are worth", _REWARDS)
    values = {} if asked != AUTO else {"method": method} | _not_of(session, method)
    reasons = [f"method {method}: the data are {_ARE[kind]}"] if asked == AUTO and kind != CONVERSATIONS else []
    if method != "sft":
        usual, why = preference_defaults(method, session.config.full)
        free = {name: value for name, value in usual.items() if name not in session.resolved.given}
        values |= free
        reasons += [f"{in_words(free)}: {why}"] if free else []
    _tell_of_kept_rate(session, method)
    if not values:
        return session
    for reason in reasons:
        session.listener.note(reason)
    origins = {"method": "data", **dict.fromkeys(OF_METHODS, "default")}
    return replace(session, resolved=session.resolved.but(
        values, {name: {"from": origins.get(name, "method")} for name in values}))


def _not_of(session: Session, method: str) -> dict[str, Any]:
    """Settings of before that the method does not have, with their defaults: nobody asks for them now."""
    others = {name: usual for name, usual in session.config.not_of(method).items() if name not in session.given}
    if others:
        kept = {name: getattr(session.config, name) for name in others}
        session.listener.note(f"{in_words(kept)}: of the training before, and left out, as {method} has no such thing")
    return others


def usual_rate(session: Session, method: str) -> float:
    """The learning rate that a method has by default with this model."""
    full, base = session.config.full, session.model.config
    if method != "sft":
        usual = preference_defaults(method, full)
    else:
        usual = full_defaults(base) if full else family_defaults(base, "train")
    return usual[0]["learning_rate"]


def _tell_of_kept_rate(session: Session, method: str) -> None:
    """Warn of a learning rate that was given for learning answers and is now kept for preferences, or the other way
    round, as one is many times the other."""
    before = session.manifest.stages.get("train", {"config": {}})["config"].get("method", {"value": method})["value"]
    given = session.resolved.given - set(session.given)
    if "learning_rate" not in given or (before == "sft") == (method == "sft"):
        return
    rate, default = session.config.learning_rate, usual_rate(session, method)
    if rate != default:
        session.listener.warn(f"the learning rate {rate:g} was given for {before}, and {method} goes on with it; by "
                              f"default {method} has {default:g} here: `train --learning-rate {default:g}`")
