"""Rows of well-known data sets in shapes of their own: read as what they say, or refused with what to do."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from gemma_tune.data.conversations import formats, marks
from gemma_tune.data.conversations import turns as conversation_turns
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user

TURNS = [user("Sky?"), answer("Blue.")]
FOUR = [user("Hi"), answer("Hello"), *TURNS]


def moss(said, **others):
    return {"Human": f"<|Human|>: {said[0]}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": f"<|MOSS|>: {said[1]}<eom>\n", **others}


MOSS = {"conversation_id": 7, "chat": {"turn_1": moss(("Hi", "Hello")), "turn_2": moss(("Sky?", "Blue."))}}
SQUAD = {"id": "5", "context": "The sky is blue.", "question": "Sky?", "answers": {"text": ["blue"], "answer_start": [11]}}

XLAM = {"id": 0, "query": "Sky?", "answers": json.dumps([{"name": "look", "arguments": {"up": 9}}]), "tools": json.dumps([
    {"name": "look", "description": "Look.", "parameters": {
        "up": {"description": "Degrees.", "type": "int"}, "at": {"description": "Points.", "type": "List[float], optional"},
        "type": {"description": "Of look.", "type": "str", "default": "short"}, "of": {"description": "?", "type": "Look"}}}])}

READ = {
    "firefly": ({"kind": "QA", "input": "Sky?", "target": "Blue."}, TURNS, ["kind"]),
    "firefly-conversation": ({"conversation_id": 1, "conversation": [
        {"human": "Hi", "assistant": "Hello"}, {"human": "Sky?", "assistant": "Blue."}]}, FOUR, ["conversation_id"]),
    "ms-swift-sharegpt": ({"system": "Be brief.", "conversation": [{"human": "Sky?", "assistant": "Blue."}]},
                          [{"role": "system", "content": "Be brief."}, *TURNS], []),
    "in-messages": ({"messages": [{"user": "Sky?", "assistant": "Blue."}]}, TURNS, []),
    "in-a-table": ({"conversations": json.dumps([{"human": "Sky?", "assistant": "Blue."}])}, TURNS, []),
    "xtuner": ({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello"},
                                 {"input": "Sky?", "output": "Blue."}]},
               [{"role": "system", "content": "Be brief."}, *FOUR], []),
    "marked": ({"conversation": [{"human": "Hi", "assistant": "Hello", "loss": False},
                                 {"human": "Sky?", "assistant": "Blue.", "source": "x"}]},
               [user("Hi"), answer("Hello", train=False), *TURNS], ["source"]),
    "question-answer": ({"id": 3, "question": "Sky?", "answer": "Blue.", "context": None}, TURNS, ["id"]),
    "q-a": ({"Q": "Sky?", "A": "Blue."}, TURNS, []),
    "prompt-response": ({"system": "Be brief.", "prompt": "Sky?", "response": "Blue."},
                        [{"role": "system", "content": "Be brief."}, *TURNS], []),
    "in-chinese": ({"问题": "Sky?", "答案": "Blue."}, TURNS, []),
    "prompt-of-turns": ({"prompt": json.dumps([user("Hi"), answer("Hello"), user("Sky?")]), "response": "Blue."},
                        [user("Hi"), answer("Hello", train=False), *TURNS], []),
    "ultrachat": ({"id": "0", "data": ["Hi", "Hello", "Sky?", "Blue."]}, FOUR, ["id"]),
    "ms-swift": ({"query": "Sky?", "response": "Blue.", "history": [["Hi", "Hello"]]}, FOUR, []),
    "ms-swift-system": ({"system": "Be brief.", "query": "Sky?", "response": "Blue.", "source": "x"},
                        [{"role": "system", "content": "Be brief."}, *TURNS], ["source"]),
    "belle": ({"instruction": "Human:Hi\nAssistant:Hello\nHuman:Sky?\nAssistant:", "input": "", "output": "Blue."},
              FOUR, []),
    "moss": (MOSS | {"meta_instruction": "Be brief.\n"}, [{"role": "system", "content": "Be brief."}, *FOUR],
             ["conversation_id"]),
    "squad": (SQUAD, [user("Sky?\n\nThe sky is blue."), answer("blue")], ["id"]),
    "squad-agreed": (SQUAD | {"answers": {"text": ["blue", "blue"], "answer_start": [11, 11]}},
                     [user("Sky?\n\nThe sky is blue."), answer("blue")], ["id"]),
    "lima": ({"conversations": ["Hi", "Hello", "Sky?", "Blue."], "source": "x"}, FOUR, ["source"]),
    "huatuo": ({"data": ["问：Hi", "答：Hello", "问：Sky?", "答：Blue."]}, FOUR, []),
    "huatuo-in-part": ({"data": ["问：Hi", "Hello"]}, [user("问：Hi"), answer("Hello")], []),
    "nemotron": ({"input": [user("Hi"), answer("Hello"), user("Sky?")], "output": "Blue.", "system_prompt": "Be brief.",
                  "category": "chat"},
                 [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Hello", train=False), *TURNS], ["category"]),
    "logged": ({"input": json.dumps([user("Sky?")]), "output": answer("Blue.")}, TURNS, []),
    "responses": ({"input": [user("Sky?")], "output": [{"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "Blue."}]}]}, TURNS, ["type"]),
    "xlam": (XLAM, [user("Sky?"), answer(tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"up": 9}}}])],
             ["id"]),
    "chinese": ({"指令": "Who?", "输入": "Ann sings.", "输出": "Ann."}, [user("Who?\n\nAnn sings."), answer("Ann.")], []),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_and_what_is_left_is_named(name):
    row, messages, unread = READ[name]
    example = Formats().example(row)
    assert example.messages == messages and [one.name for one in example.unread] == unread


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_a_tree_of_messages_is_told_with_a_command_that_works(tmp_path):
    def said(role, text, *replies, **more):
        return {"text": text, "role": role, "replies": list(replies), **more}

    tree = {"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": said(
        "prompter", "Hi", said("assistant", "What?", rank=1), said("assistant", "Hello", said(
            "prompter", "Sky?", said("assistant", "Blue.", said("prompter", "Thanks"))), rank=0))}
    (tmp_path / "FILE.jsonl").write_text(json.dumps(tree) + "\n", encoding="utf-8")
    with pytest.raises(RowError, match="tree of messages") as caught:
        Formats().example(tree)
    command, _, options = caught.value.fix.partition("with ")[2].partition(", and prepare that with ")
    assert options == "--roles prompter=user --on-uneven mend"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert Formats(roles={"prompter": "user"}, mends=True).example(row).messages == FOUR


HIDDEN = "thoughts, tools and what else is not shown"


def chatgpt(name, parent, role=None, *parts, kind="text", **more):
    said = role and {"author": {"role": role}, "content": {"content_type": kind, "parts": list(parts)}, "recipient": "all"} | more
    return {name: {"id": name, "message": said, "parent": parent, "children": []}}


def test_of_what_chatgpt_exports_the_path_that_it_shows_is_read():
    begins = chatgpt("root", None) | chatgpt("s", "root", "system", "") | chatgpt("q", "s", "user", "Hi")
    shown = begins | chatgpt("a", "q", "assistant", "Hel", "lo") | chatgpt("q2", "a", "user", "Sky?")
    shown |= chatgpt("old", "q2", "assistant", "Red.") | chatgpt("t", "q2", "assistant", kind="thoughts")
    shown |= chatgpt("made", "t", "assistant", "{}", recipient="dalle.text2im") | chatgpt("tool", "made", "tool", "1")
    shown |= chatgpt("told", "tool", "user", "I am Ann.", metadata={"is_visually_hidden_from_conversation": True})
    shown |= chatgpt("b", "told", "assistant", "Blue.", recipient=None)
    example = Formats().example({"title": "x", "create_time": 1.5, "mapping": shown, "current_node": "b"})
    assert example.messages == FOUR
    assert [(item.name, item.value) for item in example.unread] == [
        ("title", "x"), ("create_time", 1.5), (f"mapping ({HIDDEN})", 3), ("mapping (other versions)", 1)]
    twice = shown | chatgpt("c", "b", "assistant", "So blue.")
    with pytest.raises(RowError) as caught:
        Formats().example({"mapping": twice, "current_node": "c"})
    assert caught.value.fix.endswith("--on-uneven mend does so")
    assert Formats(mends=True).example({"mapping": twice, "current_node": "c"}).messages[-1]["content"] == "Blue.\n\nSo blue."


@pytest.mark.parametrize(("node", "reason"), [
    (chatgpt("c", "a", "user", {"asset_pointer": "x"}, "What?", kind="multimodal_text"), "the content of turn 3 is a list whose part 1"),
    (chatgpt("c", "a", "user", "Sum it up.", metadata={"attachments": [{"name": "a.pdf"}]}), "a message has a file ('a.pdf')"),
    (chatgpt("c", None), "`mapping` shows no message"), (chatgpt("c", "c"), "`mapping` shows no message")])
def test_what_chatgpt_read_beside_a_text_rejects_the_row(node, reason):
    nodes = chatgpt("q", None, "user", "Hi") | chatgpt("a", "q", "assistant", "Hello") | node | chatgpt("d", "c", "assistant", "It.")
    with pytest.raises(RowError) as caught:
        Formats().example({"mapping": nodes, "current_node": "d" if node["c"]["message"] else "c"})
    assert reason in str(caught.value)


def claude(sender, *parts, **more):
    return {"uuid": "u", "sender": sender, "text": "This block is not supported on your current device yet.", "content": list(parts)} | more


def test_what_claude_exports_is_read_as_it_is_shown():
    def text(said):
        return {"type": "text", "text": said, "citations": []}

    used = [text("Bl"), text("ue"), {"type": "tool_use", "name": "look"}, {"type": "tool_result"}, text("So it is.")]
    messages = [claude("human", text("Hi")), claude("assistant", {"type": "thinking", "thinking": "Hm."}, text("Hello"), attachments=[]),
                claude("human", text="Sky?"), claude("assistant", *used, files=[])]
    example = Formats().example({"uuid": "x", "name": "n", "chat_messages": messages})
    assert [turn["content"] for turn in example.messages] == ["Hi", "Hello", "Sky?", "Blue\n\nSo it is."]
    assert [turn["role"] for turn in example.messages] == ["user", "assistant"] * 2
    assert [(item.name, item.value) for item in example.unread] == [("uuid", "x"), ("name", "n"), (f"chat_messages ({HIDDEN})", 3)]
    for files in ({"attachments": [{"file_name": "a.csv", "extracted_content": "1"}]}, {"files": [{"file_name": "a.csv"}]}):
        with pytest.raises(RowError, match=r"a message has a file \('a.csv'\)"):
            Formats().example({"chat_messages": [claude("human", text("Hi"), **files), messages[1]]})
    with pytest.raises(RowError, match="`chat_messages` shows no message"):
        Formats().example({"chat_messages": []})
    with pytest.raises(RowError, match="is a list whose part 2 is 'image'"):
        Formats().example({"chat_messages": [claude("human", text("What?"), {"type": "image"}), messages[1]]})
    for odd in (1, "a.csv", {"file_name": "a.csv"}, [None]):
        with pytest.raises(RowError, match="a message has a file"):
            Formats().example({"chat_messages": [claude("human", text("Hi"), attachments=odd), messages[1]]})


def test_of_what_claude_exports_the_version_that_it_shows_is_read():
    """Questions that were asked in other words and answers that were given again all stand in one list."""
    def message(name, parent, said):
        sender = "human" if name.startswith("q") else "assistant"
        return {"uuid": name, "parent_message_uuid": parent, "sender": sender, "text": said, "content": []}

    messages = [message("q1", "0000", "Hi"), message("a1", "q1", "Hey"), message("a2", "q1", "Hello"), message("q2", "a1", "So?"),
                message("a3", "q2", "So."), message("q3", "a2", "Sky?"), message("a4", "q3", "Blue.")]
    example = Formats().example({"chat_messages": messages})
    assert example.messages == FOUR and [(item.name, item.value) for item in example.unread] == [("chat_messages (other versions)", 3)]
    other = Formats().example({"chat_messages": messages, "current_leaf_message_uuid": "a3"})
    assert [turn["content"] for turn in other.messages] == ["Hi", "Hey", "So?", "So."]
    first, *_, last = Formats().example({"chat_messages": [one | {"uuid": None} for one in (messages[0], messages[2])]}).messages
    assert (first, last) == (FOUR[0], FOUR[1]), "without names there is one version"


def test_what_ai_studio_saves_is_read_without_thoughts():
    said = [("user", "Hi"), ("model", "Hello"), ("user", "Sky?"), ("model", "Hm."), ("model", "Blue.")]
    chunks = [{"role": role, "text": text, "tokenCount": 1} for role, text in said]
    chunks[3]["isThought"] = True
    saved = {"runSettings": {"temperature": 1}, "systemInstruction": {"text": "Be brief."}, "chunkedPrompt": {"chunks": chunks}}
    example = Formats().example(saved)
    assert example.messages == [{"role": "system", "content": "Be brief."}, *FOUR]
    assert [(item.name, item.value) for item in example.unread][1:] == [(f"chunkedPrompt ({HIDDEN})", 1)]
    parts = {"systemInstruction": {"parts": [{"text": "Be"}, {"text": "brief."}]}}
    assert Formats().example(saved | parts).messages[0]["content"] == "Be\nbrief."
    with pytest.raises(RowError, match="whose part 1 is an object, not text"):
        Formats().example(saved | {"systemInstruction": {"parts": [{"inlineData": {}}]}})
    with pytest.raises(RowError, match="the content of turn 4 is missing, not text"):
        Formats().example(saved | {"chunkedPrompt": {"chunks": [*chunks[:2], {"role": "user", "driveImage": {"id": "x"}}, *chunks[3:]]}})


def test_parameters_that_are_listed_by_name_become_a_schema():
    [tool] = Formats().example(XLAM).tools
    assert tool["function"]["parameters"] == {"type": "object", "properties": {
        "up": {"description": "Degrees.", "type": "integer"}, "at": {"description": "Points.", "type": "array", "items": {"type": "number"}},
        "type": {"description": "Of look.", "type": "string", "default": "short"}, "of": {"description": "?", "type": "Look"}},
        "required": ["up", "of"]}


@pytest.mark.parametrize("one, schema, required", [
    ({"type": "List[List[int]]"}, {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, True),
    ({"type": "list", "items": {"type": "str"}}, {"type": "array", "items": {"type": "string"}}, True),
    ({"type": "List[" * 9999 + "]" * 9999}, {"type": "List[" * 9999 + "]" * 9999}, True),
    ({"type": "Dict[str, int]"}, {"type": "object"}, True), ({"type": "set[Look], optional"}, {"type": "array", "items": {"type": "Look"}}, False),
    ({"type": "String, optional"}, {"type": "string"}, False), ({"type": "NUMBER"}, {"type": "number"}, True),
    ({"type": "string", "required": False}, {"type": "string", "required": False}, False),
    ({"type": "string", "required": True}, {"type": "string", "required": True}, True),
    ({"type": "str", "optional": True}, {"type": "string", "optional": True}, False)])
def test_a_parameter_that_is_listed_by_its_name_says_what_it_takes(one, schema, required):
    tools = [{"name": "look", "parameters": {"up": one}}]
    expected = {"type": "object", "properties": {"up": schema}} | ({"required": ["up"]} if required else {})
    assert Formats().example({"messages": TURNS, "tools": tools}).tools[0]["function"]["parameters"] == expected


REFUSED = {
    "no-answer": (SQUAD | {"answers": {"text": [], "answer_start": []}}, "`answers` is empty"),
    "several": (SQUAD | {"answers": {"text": ["blue", "is blue"], "answer_start": [11, 8]}}, "`answers` is a list of 2"),
    "squad-file": ({"title": "Sky", "paragraphs": [{"context": "The sky is blue.", "qas": [{"id": "5", "question": "Sky?"}]}]},
                   "as SQuAD's files have them"),
    "plugin": ({"chat": {"turn_1": moss(("Hi", "Hello"), Commands='<|Commands|>: Search("sky")<eoc>\n')}},
               "`Commands` of `turn_1` uses a plugin"),
    "empty-target": ({"kind": "QA", "input": "Sky?", "target": " "}, "turn 2 (assistant) is empty"),
    "history": ({"query": "Sky?", "response": "Blue.", "history": ["Hi"]}, "`history` is not a list of pairs"),
    "own-name": ({"query": "Sky?", "response": 4, "history": [["Hi", 4.5]]}, "an answer in `history`"),
    "no-answer-to-a-question": ({"id": 3, "question": "Sky?", "answer": None}, "turn 2 (assistant) is empty"),
    "takeout": ({"header": "Gemini Apps", "title": "Prompted Sky?", "products": ["Gemini Apps"], "safeHtmlItem": [{"html": "<p>Blue.</p>"}]},
                "with its answer as HTML"),
    "odd": ({"id": "0", "data": ["Hi", "Hello", "Sky?"]}, "there is no answer to learn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_its_own_names(name):
    row, reason = REFUSED[name]
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert reason in caught.value.problems[0].reason


@pytest.mark.parametrize("columns, rows", [
    ({"conversations": {"0": TURNS, "1": FOUR}, "id": {"0": "a", "1": "b"}}, [TURNS, FOUR]),
    ({"instruction": {"0": "Hi", "7": "Sky?"}, "output": {"7": "Blue.", "0": "Hello"}}, [FOUR[:2], TURNS]),
    ({"instruction": ["Hi", "Sky?"], "output": ["Hello", "Blue."]}, [FOUR[:2], TURNS]),
    ({"columns": ["instruction", "output"], "index": [0, 7], "data": [["Hi", "Hello"], ["Sky?", "Blue."]]}, [FOUR[:2], TURNS])],
    ids=["pandas", "of-texts", "datasets", "pandas-split"])
def test_a_table_in_one_object_is_told_with_a_command_that_works(tmp_path, columns, rows):
    (tmp_path / "FILE.json").write_text(json.dumps(columns), encoding="utf-8")
    with pytest.raises(RowError, match="table") as caught:
        Formats().example(columns)
    subprocess.run(["sh", "-c", caught.value.fix.partition(": ")[2]], cwd=tmp_path, check=True)
    read = [Formats().example(row).messages for row in json.loads((tmp_path / "rows.json").read_text())]
    assert read == rows


@pytest.mark.parametrize("row", [{"messages": TURNS, "tools": [{"name": "f"}, {"name": "g"}]}, {"messages": TURNS},
                                 {"instruction": "Sky?", "output": "Blue.", "numbers": {"0": 1}}])
def test_a_row_is_no_table(row):
    assert Formats().example(row).messages == TURNS


def test_a_row_whose_turns_are_named_is_no_table():
    row = {"talk": ["Sky?", "Blue."], "names": ["Ann", "Ben"]}
    assert Formats(columns={"turns": "talk"}).example(row).messages == TURNS
    with pytest.raises(RowError, match="written by its columns"):
        Formats().example(row)


def test_a_problem_has_the_columns_own_name():
    with pytest.raises(RowError) as caught:
        Formats().example({"指令": "Sky?", "输出": "Blue.", "输入": "[{'role': 'user'}]"})
    assert "`输入`" in caught.value.problems[0].reason and "`input`" not in caught.value.problems[0].reason


@pytest.mark.parametrize("row", [
    {"kind": "QA", "input": "Sky?", "target": "Blue.", "output": "Red."},
    {"query": "Sky?", "response": "Blue.", "context": "A text."}, {"query": "Sky?", "response": "Blue.", "input": "x"},
    {"data": ["Hi", "Hello"], "label": 1}, {"columns": ["a"], "data": [["b", "c"]]}, {"data": ["one"]}, {"question": "q", "context": "c", "answers": ["a", "b"]},
    {"chat": {"turn_1": {"Human": "Hi"}}}, {"question": "Sky?", "answer": "Blue.", "context": "A text."},
    {"question": "Sky?", "answer": "B", "choices": ["Red.", "Blue."]}, {"question": "Sky?", "answer": 1},
    {"question": "Sky?", "answer": "Blue.", "q": "Sea?", "a": "Green."}, {"prompt": "Sky?", "response": ["Blue."]},
    {"input": [user("Sky?")], "output": "Blue.", "context": "A text."}, {"input": [user("Sky?")], "output": "Blue.", "prompt": "x"},
    {"input": [user("Sky?")], "output": 4.5}, {"input": [[0, 1]], "output": [[1, 0]]}, {"input": ["Sky?", "Sea?"], "output": "Blue."},
    {"prompt": "Sky?", "response": "Blue.", "topic": "sky"}, {"问题": "Sky?", "答案": "Blue.", "解析": "Air."}])
def test_what_only_looks_like_it_is_still_asked_about(row):
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert caught.value.code == "unknown_format"


def test_a_text_that_speaks_of_assistants_is_no_conversation():
    row = {"instruction": "Human: the word, in Latin?\nAssistant: is it a noun?", "output": "homo"}
    assert Formats().example(row).messages == [user(row["instruction"]), answer("homo")]


BELLE = {"instruction": "Human:Sky?\nAssistant:", "output": "Blue."}


@pytest.mark.parametrize(("row", "format", "unread"), [
    (MOSS | {"messages": TURNS}, "messages", ["conversation_id", "chat"]),
    (MOSS | {"conversations": TURNS}, "sharegpt", ["conversation_id", "chat"]),
    (BELLE | {"messages": TURNS}, "messages", ["instruction", "output"]),
    ({"conversation": TURNS, "query": "q", "response": "r"}, "sharegpt", ["query", "response"]),
    ({"prompt": "Sky?", "completion": "Blue.", "kind": "QA", "input": "i", "target": "t"}, "prompt-completion",
     ["kind", "input", "target"])])
def test_a_row_of_a_known_format_is_none_of_them(row, format, unread):
    example = Formats().example(row)
    assert (example.format, example.messages, [one.name for one in example.unread]) == (format, TURNS, unread)


@pytest.mark.parametrize("row", [BELLE, {"query": "Sky?", "response": "Blue."}, MOSS, SQUAD])
def test_columns_of_other_rows_that_are_empty_in_a_table_do_not_matter(row):
    others = ("messages", "conversations", "prompt", "completion", "output")
    example = Formats().example({**dict.fromkeys(others), **row})
    assert example.messages == Formats().example(row).messages


def test_a_row_of_a_known_format_that_has_the_columns_of_one_that_is_refused():
    """What SQuAD's own files are refused for is no matter beside turns."""
    row = {"messages": TURNS, "paragraphs": [{"context": "c", "qas": []}]}
    assert Formats().example(row).messages == TURNS
    with pytest.raises(RowError, match="as SQuAD's files have them"):
        Formats().example({"paragraphs": row["paragraphs"]})


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"instruction": "Sky?", "input": "", "output": "Blue."},
                                 {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]}])
def test_the_format_of_most_rows_is_looked_for_once(row, monkeypatch):
    looked, among = [], formats._among
    monkeypatch.setattr(formats, "_among", lambda *args: looked.append(args) or among(*args))
    assert Formats().example(row).messages == TURNS and len(looked) == 1


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"instruction": "Sky?", "input": "", "output": "Blue."},
                                 {"prompt": "Sky?", "completion": "Blue."}])
def test_marks_and_calls_are_not_looked_for_where_there_are_none(row, monkeypatch):
    """Most rows have none, and recognising them took a fifth longer."""
    for module, name in ((marks, "_truth"), (conversation_turns, "_calls_at_once")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("nothing in the row is about this"))
    assert Formats().example(row).messages == TURNS


def test_what_is_named_goes_before_what_is_known():
    row = {"kind": "Translate.", "input": "Sky?", "target": "Himmel?"}
    named = Formats(columns={"user": "input", "assistant": "target", "system": "kind"})
    assert named.example(row).messages == [{"role": "system", "content": "Translate."}, user("Sky?"), answer("Himmel?")]
