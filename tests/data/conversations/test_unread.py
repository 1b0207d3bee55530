"""What a row has beside what is read of it."""

from __future__ import annotations

import pytest

from gemma_tune.data.conversations.formats import Formats
from support.rows import ALPACA, GLAIVE, OPENAI_TOOLS, SHAREGPT, answer, user

QA = {"user": "question", "assistant": "answer"}
TALK = [user("a"), answer("b")]


def unread(row, name=None, **how):
    return [(item.where, item.name) for item in Formats(name, **how).example(row).unread]


@pytest.mark.parametrize("row, names", [
    ({"messages": TALK, "id": 1, "context": "x", "history": [["a", "b"]]}, ["id", "context", "history"]),
    (OPENAI_TOOLS, ["parallel_tool_calls"]), (ALPACA, ["text"]), (SHAREGPT, ["id"]),
    ({"instruction": "a", "output": "b", "response": "c"}, ["response"]),
    ({"instruction": "a", "output": "b", "response": "b"}, []),
    ({"instruction": "a", "output": "b", "tools": "hammer"}, ["tools"]),
    ({"prompt": "a", "completion": "b", "topic": "sky"}, ["topic"]),
    ({"text": "a", "title": "b", "meta": {"c": 1}}, ["title", "meta"]),
    ({"messages": TALK, "empty": None, "none": "", "nothing": [], "at all": {}, "zero": 0}, ["zero"]),
    ({"messages": TALK, "conversations": TALK}, ["conversations"]),
    ({"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
      "generationConfig": {"temperature": 1}}, ["generationConfig"]),
])
def test_columns(row, names):
    assert unread(row) == [("column", name) for name in names]


def test_named_columns():
    row = {"question": "a", "answer": "b", "context": "c", "passage": "d", "history": "medieval", "tools": "hammer"}
    assert [name for _, name in unread(row, columns=QA)] == ["context", "passage", "history", "tools"]
    assert [name for _, name in unread(row, columns=QA | {"context": "passage"})] == ["context", "history", "tools"]
    assert unread({"question": "a", "answer": "b", "history": [["c", "d"]], "system_prompt": "e"}, columns=QA) == []


def test_keys_of_turns():
    turns = [user("a", name="Bob", tool_call_id="1"), answer("b", name="Ann", weight=1, reasoning="c", score=0.5, empty=None)]
    assert unread({"messages": turns}) == [("key", name) for name in ("name", "tool_call_id", "name", "score")]
    assert unread({"messages": [user("a", value="other"), answer("b", value="b")]}) == [("key", "value")]
    assert unread({"messages": [user("a"), answer("b", additional_kwargs={"refusal": None})]}) == []
    for kwargs in ({"refusal": "no"}, "text"):
        assert unread({"messages": [user("a"), answer("b", additional_kwargs=kwargs)]}) == [("key", "additional_kwargs")]
    assert unread({"messages": TALK} | {"tools": None}) == unread(GLAIVE | {"chat": "USER: a\n\nASSISTANT: b"}) == []


def test_the_standard_key_in_whose_place_another_was_named():
    row = {"messages": [{"speaker": "user", "role": "Anna", "content": "a"},
                        {"speaker": "assistant", "role": "assistant", "content": "b", "text": "B"}]}
    keys = {"role": "speaker", "content": "text"}
    assert unread(row, turn_keys=keys) == [("key", "role (beside speaker)"), ("key", "content (beside text)")]
    assert Formats(None, turn_keys=keys).example(row).messages == [user("a"), answer("B")]
