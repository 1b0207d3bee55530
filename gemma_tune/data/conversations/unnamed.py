"""Rows whose columns have names that nobody can be sure of: what they seem to hold, and what to do about it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from gemma_tune.base import shell
from gemma_tune.data.conversations import layouts
from gemma_tune.data.conversations.marks import seeming_mark
from gemma_tune.data.conversations.names import spoken_by, suggested_turns
from gemma_tune.data.conversations.pictures import COLUMNS, holds, seems_one, unasked
from gemma_tune.data.conversations.problems import Problem, kind, quoted
from gemma_tune.data.conversations.rendered import is_rendered
from gemma_tune.data.conversations.thoughts import REASONING
from gemma_tune.data.conversations.turns import role_of

Fields = Mapping[str, Any]

_REFERENCE = "reference_answer"  # what graders of OpenAI's reinforcement fine-tuning compare answers with
# Columns that hold questions and answers, and have to be named.
_QUESTIONS = ("question", "query", "problem", "prompt", "instruction", "user", "human", "input", "q", "text",
              "document", "inputs", "input_text", "text_input", "article", "dialogue", "ask", "inputs_pretokenized",
              "问题", "提问", "指令", "问", "用户")
_ANSWERS = ("answer", "response", "completion", "output", "solution", "reply", "assistant", "target", "summary",
            "chosen", "a", "targets", "output_text", "targets_pretokenized", _REFERENCE,
            "答案", "回答", "输出", "回复", "答", "助手")
# Parts of names that people give to both, such as 客户问题 and 标准回复.
_PARTS = (("question", "query", "prompt", "问题", "提问", "咨询"),
          ("answer", "reply", "response", "completion", "答案", "回答", "回复", "答复"))
_CONTEXTS = ("context", "passage", "输入", "背景")
_THOUGHTS = (*REASONING, "complex_cot", "cot", "chain_of_thought", "rationale", "思考", "思维链")
_CAPTIONS = ("caption", "description", "label", "text_label", "ocr", "latex", "标题", "描述")  # of pictures
_CONVERSATIONS = ("messages", "conversations", "conversation", "chat")
# Beside one of these, `text` is not what there is to learn.
_LABELS = ("label", "labels", "label_text", "class", "sentiment", "emotion", "intent", "translation", "highlights")
# Who says it: the row is one turn of a conversation whose others stand in rows of their own.
_SPEAKERS = ("role", "speaker", "sender", "from", "talker", "is_sender", "发言人", "发送者", "昵称")
_SAYINGS = ("content", "text", "value", "utterance", "message", "msg", "内容", "消息")
_SLACK = {"user", "text", "ts"}  # each message as Slack exports it
_NOT_BESIDE_TEXT = frozenset((*_QUESTIONS[:5], "input", *_ANSWERS, *_LABELS, *_CONVERSATIONS, *layouts.SYSTEMS,
                              *_SPEAKERS))


def is_beside_text(keys: Collection[str]) -> bool:
    """Whether one of these columns holds something that may be the answer to a text, or its prompt."""
    return any(isinstance(key, str) and key.lower() in _NOT_BESIDE_TEXT for key in keys) or {*keys} >= _SLACK


def found_columns(row: Fields) -> str:
    """The first names of columns, as the end of a message."""
    return f"it has {', '.join(quoted(key) for key in list(row)[:6]) or 'nothing'}"


def unnamed(row: Fields, detected: Callable[[Fields], bool]) -> Problem:
    """Why a row of no known format cannot be read, with the options or the change that would help.

    Args:
        detected: whether a row has a known format: there can be such rows inside this one.
    """
    reason = f"neither `messages` nor `instruction` and `output`, nor another known format; {found_columns(row)}"
    if (beside := _beside_text(row)) is not None:
        return beside
    if _holds_rows(row):
        return Problem("unknown_format", f"{reason}; each holds an object with the same names, so they seem to be rows",
                       f"put them into a file: {_by_jq('[]')}")
    if len(row) >= _ENTRIES and all(isinstance(value, str) for value in row.values()) and all(map(_is_sentence, row)):
        return Problem("unknown_format", f"its {len(row)} names are sentences, each with a text: they seem to be "
                                         "questions with their answers",
                       "write them as rows: " + shell.of_posix(
                           "jq -c 'to_entries[] | {prompt: .key, completion: .value}' FILE.json > rows.jsonl"))
    if turns := suggested_turns(row):
        return _about_turns(row, turns, reason, detected)
    if pair := _pair_of_names(row):
        return Problem("unknown_format", reason, f"use --columns {shell.quote(pair)}")
    if (two := _two_answers(row)) is not None:
        return two
    answers = (*_ANSWERS, "highlights") if _column(row, _SPEAKERS) else (*_ANSWERS, "highlights", "content")
    question, answer, system, context, thought = (_column(row, names) for names in (
        _QUESTIONS, answers, layouts.SYSTEMS, _CONTEXTS, _THOUGHTS))
    if not question and not answer:
        question, answer = (_column_like(row, parts) for parts in _PARTS)
    shown = next((key for key in row if key in COLUMNS and holds(row[key]) or seems_one(row[key])), None)
    if question and answer:
        named = f"user={question},assistant={answer}" + (f",system={system}" if system else "") + (
            f",context={context}" if context and context != question else "") + (
            f",reasoning={thought}" if thought else "") + (f",images={shown}" if shown not in (None, *COLUMNS) else "")
        if mark := seeming_mark(row, (question, answer, system, context, thought)):
            return Problem("unknown_format", f"{reason}; `{mark}` may say which answers are good",
                           "to learn that, call the columns `prompt`, `completion` and `label`, with true and false; "
                           f"--columns {shell.quote(named)} learns every answer, whatever its `{mark}`")
        return Problem("unknown_format", reason, f"use --columns {shell.quote(named)}")
    if shown and question is None:
        return unasked(shown, answer or _column(row, _CAPTIONS))
    if (turn := _one_turn(row, reason)) is not None:
        return turn
    if where := _nested(row, detected):
        return Problem("unknown_format", f"{reason}; there are rows further inside, in `{where}`",
                       f"if they are what is to be learned, put them into a file: {_by_jq('.' + where)}")
    if any(map(_is_sentence, row)):
        return Problem("unknown_format", reason, "if these names are the first row of the data, put a line with names "
                                                 "above it, such as question,answer")
    return Problem("unknown_format", reason, "rename the columns to `messages`, or to `instruction`, `input`, "
                                             "`output`, or name them with --columns user=…,assistant=…")


def no_object(value: Any) -> Problem:
    """What to do about a row that is neither an object nor a list of turns."""
    reason = "a row is a JSON object, this one is "
    if isinstance(value, list) and value and len(value) % 2 == 0 and all(isinstance(said, str) for said in value):
        seems = "a question and its answer" if len(value) == 2 else "questions with their answers"
        return Problem("not_an_object", f"{reason}a list of {len(value)} texts",
                       f"if they are {seems}, write them as turns: " + shell.of_posix(
                           "jq -c 'if all(.[]; type == \"array\") then .[] else . end | {conversations: .}' FILE.json "
                           "> rows.jsonl"))
    return Problem("not_an_object", reason + ("null" if value is None else kind(value)),
                   'write {"messages": […]} on the line, or the list of turns alone')


def with_reference(problems: list[Problem], row: Fields) -> list[Problem]:
    """The problems, of which that of no answer says what stands in place of one in data for OpenAI's reinforcement
    fine-tuning."""
    reference = row.get(_REFERENCE)
    if reference is None:
        return problems
    if isinstance(reference, str):
        fix = "to learn it as the answer, put it behind the turns: " + _by_jq(
            f" | .messages += [{{role: \"assistant\", content: .{_REFERENCE}}}]")
    else:
        fix = f"it is {kind(reference)}: write the answer that says so behind the turns, or leave the row out"
    return [replace(problem, reason=f"{problem.reason}: `{_REFERENCE}` is what a grader compares answers with, as "
                                    "OpenAI's reinforcement fine-tuning has it", fix=fix)
            if problem.code == "no_answer" else problem for problem in problems]


_ENTRIES = 4  # texts under sentences; fewer may be the first row of a table
_WORDS_OF_A_NAME = 3  # more of them make a sentence
_SENTENCE = re.compile(r"\s.*\.\Z|[?!。？！]\Z", re.DOTALL)  # a point may also end a short word, such as No.
_IDENTIFIER = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def _is_sentence(name: str) -> bool:
    """Whether what should be a column's name is a text, as in a table whose first row names nothing."""
    return len(name.split()) > _WORDS_OF_A_NAME or bool(_SENTENCE.search(name.strip()))


def _by_jq(what: str, name: str = "rows") -> str:
    """The command that takes something of each row of an array, or of JSON Lines."""
    return shell.of_posix(f"jq -c '(arrays[], objects){what}' FILE.json > {name}.jsonl")


def _nested(row: Fields, detected: Callable[[Fields], bool]) -> str | None:
    """The column that holds a row, or a list of rows inside, as jq names them: ``record`` or ``data.train[]``."""
    for key, value in row.items():
        if not isinstance(value, dict) or not _IDENTIFIER.fullmatch(key):
            continue
        if detected(value):
            return key
        for name, rows in value.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict) and _IDENTIFIER.fullmatch(name) and (
                    not layouts.is_conversation(rows)):
                return f"{key}.{name}[]"
    return None


def _holds_rows(row: Fields) -> bool:
    """Whether all columns are objects with the same names, such as rows by their ids."""
    first, *others = row.values() or (None,)
    return bool(others) and all(isinstance(value, dict) and value.keys() == first.keys() for value in (first, *others))


def _about_turns(row: Fields, turns: str, reason: str, detected: Callable[[Fields], bool]) -> Problem:
    """What to do about a column that looks like a list of turns."""
    if keys := spoken_by(row[turns][0]):
        system = _column(row, layouts.SYSTEMS)
        columns = shell.quote(f"turns={turns}" + (f",system={system}" if system else ""))
        return Problem("unknown_format", reason, f"use --columns {columns} --turn-keys {shell.quote(keys)}, and "
                                                 "--roles for roles of other names")
    if all("label" in part and "text" in part for part in row[turns]):
        return Problem("unknown_format", f"`{turns}` holds parts of a text, each learned or not, without roles; that "
                                         "is not known here",
                       'write them as turns: {"messages": [{"role": "user", "content": "…"}, …]}, where "train": false '
                       "keeps one from being learned")
    if (ranked := _ranked(row, turns)) is not None:
        return ranked
    if detected(row[turns][0]):
        inside = f".{turns}" if _IDENTIFIER.fullmatch(turns) else f'["{turns}"]'
        return Problem("unknown_format", f"{reason}; `{turns}` holds rows, not turns",
                       f"put each list of rows into a file of its own: {_by_jq(inside + '[]', turns)}")
    if role_of(row[turns][-1]) == "user":
        return _about_prompt(row, turns)
    return Problem("unknown_format", reason, f"if `{turns}` holds the turns, use --columns turns={turns}")


# By their names, the ranks or scores of several answers, and whether the lowest is the best.
_RANKS = {"rank": True, "score": False, "overall_score": False, "pm_score": False, "rating": False}


def _ranked(row: Fields, answers: str) -> Problem | None:
    """What to do about several answers with a rank or a score each."""
    question = _column(row, _QUESTIONS)
    first = row[answers][0]
    rank = next((name for name in _RANKS if all(isinstance(one.get(name), (int, float)) for one in row[answers])), None)
    said = _column(first, ("text", "content", *_ANSWERS))
    if not question or not rank or not said or not all(map(_IDENTIFIER.fullmatch, (question, answers, said))):
        return None
    best, worst = ("min_by", "max_by") if _RANKS[rank] else ("max_by", "min_by")
    return Problem("unknown_format", f"`{answers}` holds several answers to `{question}`, with a `{rank}` each",
                   "to learn which is better, write the best and the worst of them as a pair: " + _by_jq(
                       f" | {{prompt: .{question}, chosen: (.{answers} | {best}(.{rank}).{said}), rejected: "
                       f"(.{answers} | {worst}(.{rank}).{said})}}", "pairs"))


def _about_prompt(row: Fields, turns: str) -> Problem:
    """What to do about a column of turns of which the last is the user's, so that the answer stands elsewhere."""
    asked = f"`{turns}` holds turns that end with the user's"
    answer = _column(row, _ANSWERS)
    if answer is None or not (_IDENTIFIER.fullmatch(answer) and _IDENTIFIER.fullmatch(turns)):
        return Problem("unknown_format", f"{asked}, and which column has the answer is not known; {found_columns(row)}",
                       "call the turns `prompt` and the answer `completion`, or put the answer behind the turns")
    return Problem("unknown_format", f"{asked}, and `{answer}` seems to be the answer to them",
                   "if so, write them as a prompt and its answer: "
                   + _by_jq(f" | {{prompt: .{turns}, completion: .{answer}}}"))


# Parts of names that a better and a worse answer have elsewhere.
_BETTER = ("chosen", "preferred", "better", "winner", "good", "accepted", "positive", "好")
_WORSE = ("rejected", "dispreferred", "worse", "loser", "bad", "negative", "坏", "差")


def _pair_of_names(row: Fields) -> str | None:
    """What ``--columns`` would be for a better and a worse answer under other names."""
    question = _column(row, _QUESTIONS)
    texts = [key for key, value in row.items() if isinstance(key, str) and isinstance(value, (str, list))
             and key != question]
    worse = next((key for key in texts if any(part in key.lower() for part in _WORSE)), None)
    better = next((key for key in texts if key != worse and any(part in key.lower() for part in _BETTER)), None)
    return f"user={question},chosen={better},rejected={worse}" if question and better and worse else None


_NUMBERED = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))  # the ends of names of two answers


def _two_answers(row: Fields) -> Problem | None:
    """What to do about two answers to one question, of which some column, or none, says which is better."""
    question = _column(row, _QUESTIONS)
    names = {name for name in row if isinstance(name, str) and _IDENTIFIER.fullmatch(name)}
    found = next(((name, name[:-1] + second) for name in sorted(names) for first, second in _NUMBERED
                  if name.endswith(first) and name[:-1] + second in names and name[:-1].rstrip("_").lower() in _ANSWERS
                  and all(isinstance(row[both], str) for both in (name, name[:-1] + second))), None)
    if found is None or question not in names:
        return None
    one, other = found
    return Problem("unknown_format", f"`{one}` and `{other}` seem to be two answers to `{question}`, and which of them "
                                     f"is better has to be said; {found_columns(row)}",
                   _by_jq(f" | (if .WHICH == 1 then [.{one}, .{other}] else [.{other}, .{one}] end) as "
                          f"[$better, $worse] | {{prompt: .{question}, chosen: $better, rejected: $worse}}", "pairs")
                   + f", where .WHICH == 1 stands for what is true if `{one}` is the better one")


def _beside_text(row: Fields) -> Problem | None:
    """The question that a text raises beside which there is something that may be its answer, or its prompt."""
    text, label = _column(row, ("text",)), _column(row, (*_ANSWERS, *_LABELS), any_value=True)
    system = _column(row, layouts.SYSTEMS)
    if text is None or label is None and system is None or _column(row, _QUESTIONS) not in (None, text):
        return None
    if label is None:
        return Problem("unknown_format", f"`{text}` stands beside `{system}`, and there is no answer",
                       "name the columns with --columns user=…,assistant=…, or use --format text to learn the text "
                       "alone")
    named = f"user={text},assistant={label}" + (f",system={system}" if system else "")
    return Problem("unknown_format", f"`{text}` stands beside `{label}`: either `{label}` is the answer to learn, or "
                                     "the text alone is learned",
                   f"use --columns {shell.quote(named)}, or --format text to learn the text alone"
                   + (", or --format rendered for the turns in it" if is_rendered(row[text]) else ""))


def _one_turn(row: Fields, reason: str) -> Problem | None:
    """What to do about a row that is a single turn, as tables and trees of conversations have them."""
    speaker, said = _column(row, (*_SPEAKERS, *(("user",) if row.keys() >= _SLACK else ()))), _column(row, _SAYINGS)
    if speaker is None or said is None:
        return None
    alone = "; or use --format text to learn each text by itself" if said == "text" else ""
    return Problem("unknown_format", f"{reason}; with `{speaker}` and `{said}` it seems to be one turn of a "
                                     "conversation",
                   'put all turns of a conversation into one row: {"messages": [{"role": "user", "content": "…"}, …]}'
                   f"{alone}")


def _column_like(row: Fields, parts: Collection[str]) -> str | None:
    """The only column of texts whose name has one of these parts."""
    found = [key for key, value in row.items() if isinstance(key, str) and isinstance(value, str)
             and any(part in _plain(key) for part in parts)]
    return found[0] if len(found) == 1 else None


_REMARK = re.compile(r"\([^()]*\)\Z")  # behind a name, such as (required)


def _plain(name: str) -> str:
    """A column's name as it is compared: without case, width of letters, white space around it, or a remark."""
    return _REMARK.sub("", unicodedata.normalize("NFKC", name).strip().lower()).strip()


def _column(row: Fields, names: Collection[str], *, any_value: bool = False) -> str | None:
    """The first column with one of the names, in any case, that holds text or a whole number, or anything at all."""
    by_name = {_plain(key): key for key, value in row.items() if isinstance(key, str) and (
        value is not None if any_value else isinstance(value, (str, int)) and not isinstance(value, bool))}
    return next((by_name[name] for name in names if name in by_name), None)
