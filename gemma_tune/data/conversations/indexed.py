"""Rows of two answers and a column that says which of them is better, as rows of ``chosen`` and ``rejected``.

NVIDIA's HelpSteer3, Stanford's SHP, PKU's SafeRLHF, votes of the Chatbot Arena, and Vertex AI's preferences, whose
answers have scores. A tie is no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.base.shell import of_posix
from gemma_tune.data.conversations.gemini import gemini, is_gemini
from gemma_tune.data.conversations.problems import Problem, RowError, quoted
from gemma_tune.data.conversations.shaped import Fields, Shaped, without


def helpsteer(row: Fields) -> Shaped:
    """HelpSteer3: from -3, where the first response is much better, to 3, where the second one is."""
    says = "overall_preference"
    found = _whole(row[says], range(-3, 4))
    if found is None:
        raise _unclear(row, says, "a number from -3 (`response1` is much better) to 3 (`response2` is)")
    if found == 0:
        raise _tie(row, says)
    return _pair(row, "context", ("response1", "response2"), int(found > 0), says)


def shp(row: Fields) -> Shaped:
    """SHP: 1 where the first answer is the better one, else 0."""
    found = _whole(row["labels"], range(2))
    if found is None:
        raise _unclear(row, "labels", "1 where `human_ref_A` is better, 0 where `human_ref_B` is")
    return _pair(row, "history", ("human_ref_A", "human_ref_B"), 1 - found, "labels")


_CHOOSE = ("jq -c '(arrays[], objects) | (.{0} | tonumber | floor) as $n | {{prompt, chosen: .[\"response_\\($n)\"], "
           "rejected: .[\"response_\\(1 - $n)\"]}}' FILE.jsonl > pairs.jsonl")


def safe_rlhf(row: Fields) -> Shaped | None:
    """PKU's SafeRLHF: the number of the better response, and that of the safer one, which have to be the same."""
    says = [name for name in ("better_response_id", "safer_response_id") if row.get(name) is not None]
    if not says:
        return None
    found = {name: _whole(row[name], range(2)) for name in says}
    for name, number in found.items():
        if number is None:
            raise _unclear(row, name, "0 or 1, the number of the response")
    if len({*found.values()}) > 1:
        raise RowError([Problem("preference", "`better_response_id` and `safer_response_id` name different responses, "
                                              "and one of them has to be meant",
                                f"choose one for all rows: {of_posix(_CHOOSE.format('safer_response_id'))}, or with "
                                "better_response_id in its place")])
    return _pair(row, "prompt", ("response_0", "response_1"), found[says[0]], *says)


_WINNERS = {"model_a": 0, "model_b": 1}
_TIES = ("tie", "tie (bothbad)", "bothbad", "both_bad")


def arena(row: Fields) -> Shaped:
    """Chatbot Arena: two whole conversations, and which model won."""
    winner = row["winner"]
    if winner in _TIES:
        raise _tie(row, "winner")
    if not isinstance(winner, str) or winner not in _WINNERS:
        raise _unclear(row, "winner", "`model_a`, `model_b`, or a tie, which is no pair")
    return _pair(row, None, ("conversation_a", "conversation_b"), _WINNERS[winner], "winner")


_VOTES = ("winner_model_a", "winner_model_b", "winner_tie")


def arena_votes(row: Fields) -> Shaped | None:
    """The same in Kaggle's competition: questions and answers as lists in text, and a column for each possible vote."""
    votes = [_whole(row[name], range(2)) for name in _VOTES]
    asked, *answers = (strict_json.list_in(row[name]) for name in ("prompt", "response_a", "response_b"))
    if None in votes or sum(votes) != 1 or not all(isinstance(said, list) and len(said) == len(asked)
                                                   for said in (asked, *answers)):
        return None
    if votes[2]:
        raise _tie(row, "winner_tie")
    turns = [[{"role": role, "content": text} for both in zip(asked, said, strict=True)
              for role, text in zip(("user", "assistant"), both, strict=True)] for said in answers]
    told = without(row, "prompt") | dict(zip(("response_a", "response_b"), turns, strict=True))
    return _pair(told, None, ("response_a", "response_b"), votes.index(1), *_VOTES)


def is_vertex(row: Fields) -> bool:
    """Whether a row has Gemini's ``contents``, and two ``completions`` of it."""
    both = row.get("completions")
    return isinstance(both, list) and len(both) == 2 and is_gemini(row) and all(
        isinstance(one, dict) and isinstance(one.get("completion"), dict) for one in both)


def vertex(row: Fields) -> Shaped | None:
    """Vertex AI: Gemini's ``contents``, and two ``completions``, each with its ``score``."""
    if not is_vertex(row):
        return None
    both = row["completions"]
    scores = [one.get("score") for one in both]
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) and score == score for score in scores):
        raise _unclear({"score": scores}, "score", "a number for each of `completions`, the higher one for the better")
    if scores[0] == scores[1]:
        raise _tie({"score": scores}, "score")
    problems: list[Problem] = []
    read = [gemini({**row, "contents": [*row["contents"], one["completion"]]}, problems)
            for one in sorted(both, key=lambda one: one["score"], reverse=True)]
    if problems:
        raise RowError(dict.fromkeys(problems))
    return Shaped(without(row, "contents", "completions", "systemInstruction", "system_instruction", "tools")
                  | {"chosen": read[0].messages, "rejected": read[1].messages, "tools": read[0].tools},
                  {"chosen": "completions", "rejected": "completions"})


def _whole(value: Any, among: Sequence[int]) -> int | None:
    """One of some whole numbers, also in text, and with the .0 that tables with gaps write."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number in among else None


def _pair(row: Fields, prompt: str | None, answers: tuple[str, str], better: int, *says: str) -> Shaped:
    """The row as a pair, of which the answer with the number ``better`` (0 or 1) is the chosen one."""
    own = {"chosen": answers[better], "rejected": answers[1 - better]} | ({"prompt": prompt} if prompt else {})
    return Shaped(without(row, *own.values(), *says) | {name: row[key] for name, key in own.items()}, own)


def _unclear(row: Fields, says: str, means: str) -> RowError:
    return RowError([Problem("preference", f"`{says}` is {quoted(row[says])}, which names neither answer as the better "
                                           "one", f"write {means}; or leave the row out")])


def _tie(row: Fields, says: str) -> RowError:
    return RowError([Problem("preference", f"`{says}` is {quoted(row[says])}: neither answer is the better one",
                             "leave the row out")])
