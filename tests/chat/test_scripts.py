"""Prompts and conversations of scripts: how they are read, sorted into batches, and answered in order."""

from __future__ import annotations

import io
import json
import queue
import threading
from pathlib import Path

import pytest

from gemma_tune.answers.lengths import by_length
from gemma_tune.base.errors import UserError
from gemma_tune.chat import scripts
from gemma_tune.chat.scripts import Asked, open_input, read, windows
from gemma_tune.data.conversations.formats import Formats


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_lines_are_prompts_or_objects():
    lines = ["What is {x}?\n", '{"prompt": "one", "id": 7}\n', "\n", '{"messages": [{"role": "user", "content": "two"}]}\n',
             '{"other": 1}\n', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n']
    found = list(read([*lines, "{x} is no JSON\n"], "in"))
    assert [one.where for one in found] == ["in:1", "in:2", "in:4", "in:5", "in:6", "in:7"]
    assert [one.echo for one in found[:3]] == [{"prompt": "What is {x}?"}, {"id": 7, "prompt": "one"},
                                               {"messages": [user("two")]}]
    assert "neither messages nor a prompt" in found[3].problem.message, "a misspelt name is no prompt"
    assert "end with an answer" in found[4].problem.message
    assert found[5].echo == {"prompt": "{x} is no JSON"}


def test_the_mark_that_windows_begins_a_text_with_is_none_of_it():
    row, text = read(['\ufeff{"prompt": "one"}\n', "two\n"], "in")
    assert (row.prompt, text.prompt) == ("one", "two")
    assert [one.prompt for one in read(["\ufeff\n", "\ufeffone\n"], "in")] == ["\ufeffone"]


def test_a_row_that_was_cut_off_is_no_prompt():
    cut, text = read(['{"id": 3, "prompt": "cut o\n', '{"a"} is a set\n'], "in")
    assert "in:1: not JSON" in cut.problem.message and text.prompt == '{"a"} is a set'


@pytest.mark.parametrize(("line", "said"), [
    ("text", "not JSON"), ("{", "not JSON"), ("[1]", "no object"), ('{"a": 1}', "neither messages nor"), ('{"prompt": ""}', "is empty"),
    ('{"prompt": "a", "messages": []}', "both messages and a prompt"), ('{"prompt": "a", "tools": [{}], "system": "b"}',
     "system and tools beside a prompt would not be asked"), ("a\0b", "NUL"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "`tools` is a number"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": ["a"]}', "tool 1 is text that is not JSON"),
    ('{"messages": [{"role": "user", "content": 0}]}', "turn 1 is a number, not text"), ('{"messages": [{"role": "user"}]}', "turn 1 is"),
    ('{"messages": [{"role": "assistant", "tool_calls": 3}, {"role": "user", "content": "a"}]}', "turn 1"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "turn 2 is `user` where `assistant` is expected"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]}',
     "turn 2 (assistant) is empty"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}, '
     '{"role": "user", "content": "d"}]}', "turn 3 is a system message; it can only be the first"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}', "'image_url', a picture that the row does not have"),
    ('{"messages": [{"role": "user", "content": "a"}], "images": ["http://a/b.png"]}', "is at an address, and nothing is downloaded"),
    ('{"messages": [{"role": "user", "content": "<image> <image>"}], "image": "a.png"}', "2 places"),
    ('{"prompt": "<image> or <image>?", "images": ["a.png"]}', "2 places"), ('{"prompt": "a", "video": "a.mp4"}', "only text and pictures"),
    ('{"messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, {"role": "user", "content": "a"}]}', "turn 1"),
    ('{"messages": [{"role": "system", "content": "a"}]}', "end with the system's turn"),
    ('{"prompt": 3}', "no text"), ('{"prompt": [], "messages": []}', "both messages and a prompt"), ('{"messages": []}', "an empty list"), ('{"messages": [{"role": "x"}]}', "the role 'x'"),
    ('{"messages": "hello"}', "is text, not a list of turns"), ('{"prompt": "a \\ud800 b"}', "the prompt contains damaged characters"),
    ('{"messages": [{"role": "system", "content": "\\udc00"}, {"role": "user", "content": "a"}]}', "turn 1 contains damaged")])
def test_a_row_that_cannot_be_asked_is_named_with_its_line(line, said):
    good, bad = read(['{"prompt": "a"}', line], "rows.jsonl", rows_only=True)
    assert good.problem is None
    assert bad.problem.message.startswith("rows.jsonl:2: ") and said in bad.problem.message and bad.problem.hint


def test_a_row_is_read_as_those_that_are_learned():
    """Roles and parts as other programs write them, arguments as text, an empty system turn; echoed as they stand."""
    given = [{"role": "developer", "content": ""}, {"from": "human", "value": "a"},
             {"role": "assistant", "content": None, "train": True,
              "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}]},
             {"role": "tool", "tool_call_id": "1", "content": "b"}]
    [one] = read([json.dumps({"messages": given, "tools": '[{"name": "look"}]'})], "rows.jsonl", rows_only=True)
    assert one.problem is None and one.echo == {"messages": given}
    assert one.tools == [{"type": "function", "function": {"name": "look"}}]
    assert one.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]},
        {"role": "tool", "content": "b", "tool_call_id": "1", "name": "look"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [one] = read([json.dumps({"messages": [{"role": "user", "content": parts}]})], "rows.jsonl", rows_only=True)
    assert one.messages == [{"role": "user", "content": "a\nb"}]


def asked(**row) -> Asked:
    [one] = read([json.dumps(row)], "rows.jsonl", rows_only=True)
    return one


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_text_beside_the_messages_is_in_front_of_them_as_prepare_has_it(name):
    learned = Formats().example({name: "In French.", "messages": [user("a"), {"role": "assistant", "content": "b"}]})
    one = asked(**{name: "In French.", "messages": [user("a")]})
    assert one.messages == learned.messages[:-1] == [{"role": "system", "content": "In French."}, user("a")]
    assert one.unread == () and one.echo == {"messages": [user("a")]}
    assert asked(**{name: " ", "messages": [user("a")]}).messages == [user("a")]
    differ = asked(**{name: "In French.", "messages": [{"role": "system", "content": "In German."}, user("a")]})
    assert f"`{name}` of the row and the system message of its turns differ" in differ.problem.message
    assert f"`{name}` is an object, not text" in asked(**{name: {}, "messages": [user("a")]}).problem.message
    assert f"{name} beside a prompt would not be asked" in asked(**{name: "In French.", "prompt": "a"}).problem.message
    [cut] = read([f'{{"{name}": "In French.", "messages": [{{"role": '], "prompts.txt")
    assert "not JSON" in cut.problem.message, "it is no prompt"


def test_tools_under_the_other_name_are_offered():
    one = asked(functions=[{"name": "look"}], messages=[user("a")])
    assert one.tools == [{"type": "function", "function": {"name": "look"}}] and one.unread == ()


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"train": "no"}, {"train": False}, {"loss_mask": "1"}, {"masked": 1},
                                  {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}])
def test_what_is_learned_of_an_answer_is_no_matter_where_it_is_asked(mark):
    turns = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    one = asked(messages=[turns[0], turns[1] | mark, turns[2]])
    assert one.problem is None and one.messages == turns


def test_an_input_that_cannot_be_read(tmp_path):
    for name in ("missing.txt", "."):
        with pytest.raises(UserError, match="cannot be read|is a directory"):
            open_input(name)
    Path("rows.JSONL").write_bytes(b'\xef\xbb\xbf{"prompt": "\xe4\xbb\x8a"}\r\n')
    file, called, rows_only = open_input("rows.JSONL")
    with file:
        [one] = read(file, called, rows_only)
    assert (one.prompt, rows_only) == ("今", True)


def test_a_whole_file_is_answered_in_full_windows(monkeypatch):
    monkeypatch.setattr(scripts, "WINDOW", 4)
    asked = [Asked(str(n)) for n in range(10)]
    assert [len(group) for group in windows(asked, whole=True)] == [4, 4, 2]


def test_a_pipe_is_answered_as_it_comes(monkeypatch):
    """A program may wait for an answer before it asks the next question."""
    monkeypatch.setattr(scripts, "WINDOW", 3)
    pipe: queue.Queue = queue.Queue()
    groups = windows(iter(pipe.get, None), whole=False)
    for n in range(3):
        pipe.put(Asked(str(n)))
        assert [one.where for one in next(groups)] == [str(n)]
    for n in range(7):
        pipe.put(Asked(f"again {n}"))
    pipe.put(None)
    rest = list(groups)
    assert [one.where for group in rest for one in group] == [f"again {n}" for n in range(7)]
    assert max(map(len, rest)) <= 3


def test_a_pipe_that_breaks_gives_what_came_before_it():
    def broken():
        yield Asked("1")
        raise UserError("gone")

    found = []
    with pytest.raises(UserError, match="gone"):
        for group in windows(broken(), whole=False):
            found += group
    assert [one.where for one in found] == ["1"]
    assert threading.active_count() < 50


def test_batches_are_of_like_lengths_and_leave_everyone_their_room():
    lengths = {0: 500, 1: 10, 2: 12, 3: 480, 4: 11, 5: 900, 6: 950}
    groups = by_length(lengths, limit=100, context=1000, most=lambda width: 2 if width < 200 else 8)
    assert sorted(n for group in groups for n in group) == sorted(lengths)
    assert groups == [[1, 4], [2], [3, 0], [5], [6]], "950 + 100 is more than the context, so 900 is not beside it"


def test_a_directory_on_stdin_is_an_error():
    class Broken(io.StringIO):
        def __next__(self):
            raise IsADirectoryError(21, "Is a directory")

    with pytest.raises(UserError, match="standard input cannot be read"):
        list(read(Broken(), "standard input"))


def test_json_lines_on_standard_input_in_a_command(cli, fluent):
    rows = [{"id": "b", "messages": [user("Say number 3.")]}, {"id": 7, "messages": [{"role": "user", "content": 3}]},
            {"prompt": "Say number 7.", "max_tokens": 5, "topic": "numbers"}]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for args, stdin in ((("--input", "asked.jsonl"), None), ((), Path("asked.jsonl").read_text())):
        result = cli("chat", "--json", "--dtype", "fp32", *args, stdin=stdin)
        assert result.code == 1
        found = [json.loads(line) for line in result.out.splitlines()]
        assert [f.get("answer") for f in found] == ["The number is 3, no more.", None, "The number is 7, no more."]
        assert (found[0]["id"], found[0]["messages"]) == ("b", rows[0]["messages"])
        assert "turn 1 is a number, not text" in found[1]["error"]["message"] and found[1]["id"] == 7 and found[1]["error"]["kind"] == "bad_input"
        assert [f["where"].rpartition(":")[2] for f in found] == ["1", "2", "3"]
        assert "1 of 3 prompts could not be answered; the others were" in result.err
        assert ("! not read of the rows: max_tokens (1 row), topic (1 row); for all of them together there is --max-new-tokens"
                in result.err)
    Path("turns.jsonl").write_text(json.dumps({"prompt": [user("Say number 7.")]}) + '\n{"prompt": " "}\n')
    found = [json.loads(line) for line in cli("chat", "--json", "--dtype", "fp32", "--input", "turns.jsonl").out.splitlines()]
    assert found[0]["answer"] == "The number is 7, no more." and "the prompt is empty" in found[1]["error"]["message"]
    assert cli("chat", "--input", "missing.txt").code == 2
    assert "exclude each other" in cli("chat", "--input", "asked.jsonl", "-p", "a").err


def test_compare_answers_with_both_in_one_object(cli, fluent):
    result = cli("chat", "--compare", "--prompt", "Say number 3.", "--json", "--dtype", "fp32", "-n", 30)
    assert result.code == 0, result.err
    base = cli("chat", "--base", "--prompt", "Say number 3.", "--json", "--dtype", "fp32", "-n", 30).json
    assert result.json["answer"] == "The number is 3, no more."
    assert result.json["base"] == {key: base[key] for key in ("answer", "tokens", "ended", "model")}
    both = cli("chat", "--compare", "--prompt", "Say number 3.", "--dtype", "fp32", "-n", 30)
    assert both.out.startswith("[talkative, the base model]\n") and both.out.endswith("The number is 3, no more.\n")
    assert "exclude each other" in cli("chat", "--compare", "--merged", "-p", "a", "--json").json["error"]["problems"][0]


@pytest.mark.parametrize("row", [
    {"messages": [user("See <image>?")], "images": ["a.png"]}, {"messages": [user("See <image>?")], "image": "a.png"},
    {"prompt": "See <image>?", "images": ["a.png"]}, {"prompt": "See <image>?", "image": {"path": "a.png"}},
    {"messages": [user([{"type": "text", "text": "See "}, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}])]}])
def test_pictures_stand_where_prepare_reads_them(row, tmp_path):
    """Beside a prompt or a conversation as well as in its parts; and a program finds its question again."""
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    given = row if "messages" in row else {"messages": [user(row["prompt"])]} | {key: row[key] for key in row if key != "prompt"}
    [learned] = Formats().example(given | {"messages": [*given["messages"], {"role": "assistant", "content": "b"}]}).messages[:-1]
    [one] = read([json.dumps(row)], "rows.jsonl", rows_only=True, folder=tmp_path)
    assert one.problem is None and one.echo == row and not one.unread
    [turn] = one.messages
    assert turn["content"] == learned["content"] and [p["at"] for p in turn["pictures"]] == [p["at"] for p in learned["pictures"]] == [4]
    assert turn["pictures"][0]["lies_at"] == str(tmp_path / "a.png")
