"""Rows of well-known data sets that have shapes of their own, as rows of the formats that are known.

Each shape is told by columns that nothing else has together, so that nobody has to be asked what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.base.shell import of_posix
from gemma_tune.data.conversations import exports, indexed, logs
from gemma_tune.data.conversations.layouts import is_conversation, turn_list
from gemma_tune.data.conversations.pictures import MEDIA
from gemma_tune.data.conversations.problems import Problem, RowError, several
from gemma_tune.data.conversations.shaped import Fields, Shaped, without


def shaped(row: Fields) -> Shaped:
    """The row in a known format where it has one of the shapes, else as it is.

    Raises:
        RowError: it has such a shape, and cannot be learned from.
    """
    if not _BY_COLUMN.keys().isdisjoint(row):
        for number in sorted(number for name in row for number in _BY_COLUMN.get(name, ())):
            columns, shape = _SHAPES[number]
            if row.keys() >= columns and (found := shape(row)) is not None:
                return found
    return Shaped(row, {})


def called(error: RowError, own: Mapping[str, str]) -> RowError:
    """The same problems, with the names that columns have in the file."""
    return RowError(Problem(p.code, _named(p.reason, own), _named(p.fix, own)) for p in error.problems)


def _named(text: str, own: Mapping[str, str]) -> str:
    return re.sub("`([^`]*)`", lambda found: f"`{own.get(found[1], found[1])}`", text)


def _renamed(row: Fields, names: Mapping[str, str]) -> Shaped | None:
    """With columns that hold texts under other names, unless one of those is taken."""
    if not names.keys().isdisjoint(name for name in row if row[name] is not None and name not in names.values()):
        return None
    if not all(isinstance(row[own], (str, int, type(None))) for own in names.values() if own in row):
        return None
    there = {own: name for name, own in names.items()}
    return Shaped({there.get(key, key): value for key, value in row.items() if key in there or key not in names},
                  names)


_BY_ROWS = ("python -c \"import json; t = json.load(open('FILE.json', encoding='utf-8')); "
            "json.dump([{each}], open('rows.json', 'w'))\"")


def by_columns(row: Fields) -> Problem | None:
    """The problem of a whole table in place of a row, as pandas' ``to_json()`` and ``Dataset.to_dict()`` leave it."""
    columns = list(row.values())
    if len(columns) < 2 or not columns[0] or not isinstance(columns[0], (dict, list)):
        return None
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        if not all(isinstance(name, str) and name.isdecimal() for name in columns[0]):
            return None
        what = "objects with a number for each row"
        each = "{n: c[i] for n, c in t.items()} for i in next(iter(t.values()))"
    elif all(isinstance(column, list) and len(column) == len(columns[0]) > 1 and
             all(isinstance(text, str) for text in column) for column in columns):
        what, each = "lists with a text for each row", "dict(zip(t, r)) for r in zip(*t.values())"
    else:
        return None
    return Problem("unknown_format", f"its columns are {what}: this is a table written by its columns",
                   f"write it by its rows: {_BY_ROWS.format(each=each)}")


def _split(row: Fields) -> None:
    """The same as pandas' ``to_json(orient="split")`` leaves it: names once, and a list for each row."""
    names, rows = row["columns"], row["data"]
    if isinstance(names, list) and isinstance(rows, list) and rows and all(
            isinstance(values, list) and len(values) == len(names) for values in rows):
        raise RowError([Problem("unknown_format", "`columns` has the names and `data` the values of rows: this is a "
                                                  "whole table",
                                f"write it by its rows: {_BY_ROWS.format(each=_EACH_OF_DATA)}")])


_EACH_OF_DATA = "dict(zip(t['columns'], r)) for r in t['data']"


def _firefly(row: Fields) -> Shaped | None:
    """``kind``, ``input``, ``target``: the kind of task is no part of it."""
    return _renamed(row, {"instruction": "input", "output": "target"})


def _swift(row: Fields) -> Shaped | None:
    """ms-swift's ``query`` and ``response``, perhaps with ``system`` and ``history``."""
    if any(row.get(name) is not None for name in ("prompt", "input", "question", "context", "passage", "chosen",
                                                  "rejected", "rejected_response", "messages", "conversations")):
        return None
    return _renamed(row, {"instruction": "query", "output": "response"})


# Names for a question and its answer that mean nothing else, and are read as these without asking by others as well;
# and what may stand beside them, as it neither belongs to the question nor could be the answer.
_USUAL = (("question", "answer"), ("Question", "Answer"), ("q", "a"), ("Q", "A"), ("prompt", "response"),
          ("Prompt", "Response"), ("问题", "答案"), ("问题", "回答"))
_BESIDE = frozenset(("id", "_id", "idx", "index", "uuid", "source", "system", "system_prompt", "system_message",
                     *MEDIA))


def _usual(row: Fields) -> Shaped | None:
    """A question and an answer, both of them texts or missing, and nothing else to be learned or read; lists of turns
    as text are read as of ``prompt`` and ``completion``."""
    there = {key for key, value in row.items() if value is not None} - _BESIDE
    for pair in _USUAL:
        if row.keys() >= {*pair} >= there and all(isinstance(row[name], (str, type(None))) for name in pair):
            found = _renamed(row, dict(zip(("prompt", "completion"), pair, strict=True)))
            return found and found._replace(usual=True)
    return None


def _chinese(row: Fields) -> Shaped | None:
    """Alpaca's columns in Chinese."""
    return _renamed(row, {"instruction": "指令", "input": "输入", "output": "输出"})


def _squad(row: Fields) -> Shaped | None:
    """SQuAD, CMRC and DRCD: a question about a text, and the passages of it that answer the question."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) and "answer_start" in answers else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or "instruction" in row:
        return None
    if not texts:
        raise RowError([Problem("empty_turn", "`answers` is empty: this question cannot be answered from its text",
                                "leave the row out, or write into `answers` what the model is to say then")])
    distinct = list(dict.fromkeys(texts))
    if problem := several("`answers`", distinct):
        raise RowError([problem])
    return Shaped(without(row, "question", "answers") | {"instruction": row["question"], "output": distinct[0]},
                  {"instruction": "question", "output": "answers"})


def _xlam(row: Fields) -> Shaped | None:
    """xLAM's function calls: a query, the tools there are, and the calls that answer it."""
    calls = strict_json.list_in(row["answers"])
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": "", "tool_calls": calls}]
    return Shaped(without(row, "query", "answers") | {"messages": turns}, {"messages": "answers"})


_FLAT = ("jq -c '.data[].paragraphs[] | .context as $c | .qas[] | {question, context: $c, answers: {text: "
         "[.answers[].text], answer_start: [.answers[].answer_start]}}' FILE.json > rows.jsonl")


def _squad_file(row: Fields) -> Shaped | None:
    """SQuAD as its own files have it: all questions about an article in one row."""
    parts = row["paragraphs"]
    if isinstance(parts, list) and parts and isinstance(parts[0], dict) and {"context", "qas"} <= parts[0].keys():
        raise RowError([Problem("unknown_format", "`paragraphs` holds texts with many questions about each, as SQuAD's "
                                                  "files have them",
                                f"make a row of each question: {of_posix(_FLAT)}")])
    return None


_ASKED = (("问：", "问:"), ("答：", "答:"))  # all as long as each other


def _ultrachat(row: Fields) -> Shaped | None:
    """Texts of user and assistant in turn, the user's first; HuatuoGPT's say so at the beginning of each."""
    texts = strict_json.list_in(row["data"])
    if not row.keys() <= {"id", "data"} or not isinstance(texts, list) or len(texts) < 2 or not all(
            isinstance(text, str) for text in texts):
        return None
    if all(text.startswith(_ASKED[n % 2]) for n, text in enumerate(texts)):
        texts = [text[len(_ASKED[0][0]):] for text in texts]
    return Shaped({"messages": texts, **without(row, "data")}, {"messages": "data"})


def _logged(row: Fields) -> Shaped | None:
    """Turns that were sent and what was answered, as logs of interfaces and Nemotron's data have them."""
    if not is_conversation(turn_list(row["input"])):
        return None
    output = turn_list(row["output"])
    alone = all(row.get(name) is None for name in ("instruction", "prompt", "completion", "context", "passage"))
    if not alone or not isinstance(output, (str, list, dict)):
        return None
    said = [output] if isinstance(output, dict) else output
    return Shaped(without(row, "input", "output") | {"prompt": row["input"], "completion": said},
                  {"prompt": "input", "completion": "output"})


_BELLE = re.compile(r"(?:\A\s*|\n\s*)(Human|Assistant)[:：]")


def _belle(row: Fields) -> Shaped | None:
    """BELLE's conversations: all turns but the last answer in one text, which ends with ``Assistant:``."""
    text = row["instruction"]
    if not isinstance(text, str) or not text.lstrip().startswith(("Human:", "Human：")) or row.get("input"):
        return None
    _, *pieces = _BELLE.split(text)
    names, said = pieces[::2], pieces[1::2]
    if names != ["Human", "Assistant"] * (len(names) // 2) or said[-1].strip():
        return None
    turns = [{"role": "user" if name == "Human" else "assistant", "content": words.strip()}
             for name, words in zip(names, [*said[:-1], ""], strict=True)]
    turns[-1]["content"] = row["output"]
    return Shaped(without(row, "instruction", "input", "output") | {"messages": turns}, {"messages": "instruction"})


_MOSS = re.compile(r"\A\s*<\|[^|]*\|>:? ?|\s*<eo[a-z]>\s*\Z")
_PLUGINS = ("Inner Thoughts", "Commands", "Tool Responses")


_BEST_PATH = ("jq -c '{messages: [.prompt | recurse(.replies | min_by(.rank // 99) // empty) | "
              "{role, content: .text}]}' FILE.jsonl > rows.jsonl")


def _oasst(row: Fields) -> Shaped | None:
    """OpenAssistant's trees of messages, in which each has several replies."""
    root = row["prompt"]
    if not isinstance(root, dict) or "replies" not in root:
        return None
    raise RowError([Problem("unknown_format", "`prompt` is the root of a tree of messages, as OpenAssistant has them",
                            f"take the path of the best replies, with {of_posix(_BEST_PATH)}, and prepare that with "
                            "--roles prompter=user --on-uneven mend")])


def _moss(row: Fields) -> Shaped | None:
    """MOSS: ``turn_1``, ``turn_2``, … with ``Human`` and ``MOSS``, in the marks of its own template."""
    chat = row["chat"]
    exchanges = [chat.get(f"turn_{n}") for n in range(1, len(chat) + 1)] if isinstance(chat, dict) else []
    if not exchanges or not all(isinstance(one, dict) and isinstance(one.get("Human"), str)
                                and isinstance(one.get("MOSS"), str) for one in exchanges):
        return None
    if used := next(_used(exchanges), None):
        raise RowError([Problem("tool_order", f"{used} uses a plugin of MOSS, which is written in a way of its own",
                                "leave the row out, or write the calls as `messages` with `tool_calls` and turns of "
                                "the role `tool`")])
    turns = [{"role": role, "content": _MOSS.sub("", one[name])} for one in exchanges
             for role, name in (("user", "Human"), ("assistant", "MOSS"))]
    if isinstance(told := row.get("meta_instruction"), str) and told.strip():
        turns.insert(0, {"role": "system", "content": told.strip()})
    return Shaped(without(row, "chat", "meta_instruction") | {"messages": turns}, {"messages": "chat"})


def _used(exchanges: list[dict[str, Any]]) -> Iterator[str]:
    for number, one in enumerate(exchanges, start=1):
        for name in _PLUGINS:
            if _MOSS.sub("", str(one.get(name) or "None")).strip() not in ("", "None"):
                yield f"`{name}` of `turn_{number}`"


_SHAPES: tuple[tuple[frozenset[str], Callable[[Fields], Shaped | None]], ...] = (
    (frozenset(("kind", "input", "target")), _firefly),
    (frozenset(("query", "response")), _swift),
    (frozenset(("指令", "输出")), _chinese),
    (frozenset(("question", "context", "answers")), _squad),
    (frozenset(("query", "answers", "tools")), _xlam),
    (frozenset(("paragraphs",)), _squad_file),
    (frozenset(("data",)), _ultrachat),
    (frozenset(("instruction", "output")), _belle),
    *((frozenset(pair), logs.logged) for pair in (("messages", "response"), ("request", "response"),
                                                  ("body", "response"), ("input", "output"), ("inputs", "outputs"))),
    (frozenset(("inputs", "outputs")), logs.texts),
    (frozenset(("custom_id",)), logs.half_of_batch),
    (frozenset(("input", "output")), _logged),
    (frozenset(("chat",)), _moss),
    (frozenset(("message_tree_id", "prompt")), _oasst),
    (frozenset(("mapping", "current_node")), exports.chatgpt),
    (frozenset(("chat_messages",)), exports.claude),
    (frozenset(("chunkedPrompt",)), exports.ai_studio),
    (frozenset(("title", "products", "safeHtmlItem")), exports.takeout),
    (frozenset(("columns", "data")), _split),
    (frozenset(("context", "response1", "response2", "overall_preference")), indexed.helpsteer),
    (frozenset(("history", "human_ref_A", "human_ref_B", "labels")), indexed.shp),
    (frozenset(("prompt", "response_0", "response_1")), indexed.safe_rlhf),
    (frozenset(("conversation_a", "conversation_b", "winner")), indexed.arena),
    (frozenset(("contents", "completions")), indexed.vertex),
    (frozenset(("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")),
     indexed.arena_votes),
    *((frozenset(pair), _usual) for pair in _USUAL),
)
# By one column of each, as rows have few: the places of those that have it.
_BY_COLUMN = {name: [number for number, (columns, _) in enumerate(_SHAPES) if min(columns) == name]
              for name in {min(columns) for columns, _ in _SHAPES}}
