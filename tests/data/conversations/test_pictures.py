"""Rows with pictures, in the shapes in which data sets are published: where each picture stands, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.base.errors import UserError
from gemma_tune.base.pictures import RED, as_text, square
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.pictures import pictures_in, reference
from gemma_tune.data.conversations.places import apart
from gemma_tune.data.conversations.problems import MOST_PROBLEMS, RowError
from gemma_tune.data.reading.dataset_info import entry_of
from gemma_tune.data.reading.rows import Description, Row
from support.rows import answer, user

PNG = as_text(square(RED))  # base64
A, B = {"path": "a.png"}, {"path": "b.png"}
CAT = answer("A cat.")
MUTATIONS = 150  # of each shape


def at(n, ref):
    return {"at": n, **ref}


def seen(text, *pictures):
    """A user's turn with pictures: their places and references in turn."""
    return user(text, pictures=[at(n, ref) for n, ref in zip(pictures[::2], pictures[1::2], strict=True)])


def read(row, name=None, **how):
    before = copy.deepcopy(row)
    example = Formats(name, **how).example(row)
    assert row == before
    json.dumps(example.messages, ensure_ascii=False, allow_nan=False).encode()
    return example


def messages(row, *args, **how):
    example = read(row, *args, **how)
    assert example.unread == (), "pictures are read"
    return example.messages


def problem(row, *args, **how):
    with pytest.raises(RowError) as caught:
        read(row, *args, **how)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


def text(said):
    return {"type": "text", "text": said}


def asked(*parts):
    return {"messages": [user(list(parts)), CAT]}


# --- parts of what is said

@pytest.mark.parametrize(("part", "ref"), [
    # OpenAI
    ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}}, {"base64": PNG}),
    ({"type": "image_url", "image_url": f"data:image/jpeg;charset=x;base64,{PNG}"}, {"base64": PNG}),
    ({"type": "image_url", "image_url": {"url": "img/a.png"}}, {"path": "img/a.png"}),
    ({"type": "image_url", "image_url": {"url": "img\\a.png"}}, {"path": "img/a.png"}),
    ({"type": "image_url", "image_url": {"url": "file:///tmp/a%20b.png"}}, {"path": "/tmp/a b.png"}),
    ({"type": "image_url", "image_url": {"url": "file://localhost/tmp/a.png"}}, {"path": "/tmp/a.png"}),
    ({"type": "image_url", "image_url": {"url": "file://img/a.png"}}, {"path": "img/a.png"}),
    ({"type": "image_url", "image_url": {"url": "file:///C:/img/a.png"}}, {"path": "C:/img/a.png"}),
    ({"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "auto", "file_id": None}, {"base64": PNG}),
    # TRL and transformers
    ({"type": "image", "image": "a.png"}, A), ({"type": "image", "url": "a.png"}, A), ({"type": "image", "path": "a.png", "text": None}, A),
    ({"type": "image", "base64": PNG}, {"base64": PNG}), ({"type": "image", "base64": f"{PNG[:70]}\n{PNG[70:]}\n"}, {"base64": PNG}),
    ({"type": "image", "image": PNG}, {"base64": PNG}), ({"type": "image", "base64": f"data:image/png;base64,{PNG}"}, {"base64": PNG}),
    ({"type": "image", "image": {"bytes": PNG, "path": "a.png"}}, {"base64": PNG}), ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, A),
    # Anthropic
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}, "cache_control": {}}, {"base64": PNG}),
    # Qwen
    ({"type": "image", "image": "file:///img/a.png", "max_pixels": 50176}, {"path": "/img/a.png"}), ({"image": "a.png"}, A),
    # Bedrock
    ({"image": {"format": "png", "source": {"bytes": PNG}}}, {"base64": PNG}),
])
def test_parts_of_every_kind(part, ref):
    assert messages(asked(part, text("What?"))) == [seen("What?", 0, ref), CAT]
    said = messages(asked(text("What?"), part))
    assert said == [seen("What?", 5, ref), CAT] and pictures_in(said) == [at(5, ref)]


def test_a_line_break_stands_between_texts_and_none_beside_a_picture():
    """As llama.cpp joins the parts of a content."""
    parts = [text("One"), text("Two "), {"image": "a.png"}, {"image": "b.png"}, {"text": " three"}, text("four")]
    assert messages(asked(*parts)) == [seen("One\nTwo  three\nfour", 8, A, 8, B), CAT]


def test_a_picture_may_be_all_that_is_asked():
    assert messages(asked({"image": "a.png"})) == [seen("", 0, A), CAT]
    assert messages(asked({"image": "a.png"}, text(" "))) == [seen(" ", 0, A), CAT]
    assert problem(asked(text(""))).code == "empty_turn"


def test_geminis_parts():
    contents = [{"role": "user", "parts": [{"text": "Is "}, {"inlineData": {"mimeType": "image/png", "data": PNG}}, {"text": "a "},
                                           {"inline_data": {"mime_type": "image/png", "data": PNG}}, {"fileData": {"fileUri": "a.png"}}]},
                {"role": "model", "parts": [{"text": "A cat."}]}]
    assert messages({"contents": contents}) == [seen("Is a ", 3, {"base64": PNG}, 5, {"base64": PNG}, 5, A), CAT]
    contents[0]["parts"] = contents[0]["parts"][1:2]
    assert messages({"contents": contents}) == [seen("", 0, {"base64": PNG}), CAT]
    contents[1]["parts"].append({"inlineData": {"mimeType": "image/png", "data": PNG}})
    assert problem({"contents": contents}).reason == "`pictures` of turn 2 has pictures, and the turn is the assistant's"
    del contents[1]["parts"][-1]
    called = {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}
    result = {"functionResponse": {"name": "f", "response": {}}}
    with pytest.raises(RowError, match="turn 4 is `user` where `assistant` is expected"):
        read({"contents": [contents[0], called, {"role": "user", "parts": [result, *contents[0]["parts"]]}, contents[1]]})
    row = {"contents": contents, "systemInstruction": {"parts": [{"inlineData": {"data": PNG}}]}}
    assert problem(row).reason == "`systemInstruction` has a picture"


@pytest.mark.parametrize(("part", "reason", "fix"), [
    ({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, "is at an address, and nothing is downloaded: 'https://x.org/a.png'",
     "download the picture"),
    ({"type": "image", "source": {"type": "url", "url": "http://x.org/a.png"}}, "is at an address", "download the picture"),
    ({"type": "image", "image": "s3://bucket/a.png"}, "is at an address", "download the picture"),
    ({"type": "input_image", "file_id": "file-1"}, "names no file and holds none: it has 'type', 'file_id'", "write the path"),
    ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "names no file and holds none", "write the path"),
    ({"type": "image", "text": "a cat"}, "names no file and holds none", "write the path"),
    ({"type": "image", "image": 5}, "is a number, not a picture", "write the path"), ({"type": "image", "image": [1]}, "is a list, not", "write the path"),
    ({"type": "image", "image": " "}, "is empty", "write the path"), ({"type": "image", "base64": "a.png"}, "is text that is not base64: 'a.png'", "write"),
    ({"type": "image", "image": "data:image/svg+xml,<svg/>"}, "is an address of data that is not base64", "write the path"),
    ({"type": "image", "image": f"data:audio/wav;base64,{PNG}"}, "is 'audio/wav', and beside text pictures alone", "leave the row out"),
    ({"type": "image", "source": {"media_type": "application/pdf", "data": PNG}}, "is 'application/pdf', and", "leave the row out"),
    ({"type": "image", "image": "clip.MP4"}, "is 'clip.MP4', and beside text pictures alone", "leave the row out"),
    ({"type": "image", "image": "a\0.png"}, "is a text that is no path", "write the path"), ({"type": "image", "image": "\ud800"}, "is no path", "write"),
    ({"type": "image", "image": "a" * 5000 + "."}, "is a text that is no path", "write the path"),
    ({"type": "image", "image": {"image": {"image": {"image": {"image": "a.png"}}}}}, "is an object, not a picture", "write the path"),
    ({"type": "image"}, "is 'image', a picture that the row does not have", "give the row `images`"),
    ({"type": "image", "image": {"bytes": None, "path": None}}, "is 'image', a picture that the row does not have", "give the row"),
    ({"type": "image", "image": "a.png", "text": "What?"}, "is a text and a picture", "write a part for each"),
    ({"type": "text", "text": "What?", "image_url": {"url": "a.png"}}, "is a text and a picture", "write a part for each"),
    ({"text": "What?", "image": "a.png"}, "is a text and a picture", "write a part for each"),
    ({"type": "video", "video": "a.mp4"}, "is 'video', not text", "text and pictures alone are learned"),
    ({"type": "input_audio", "input_audio": {"data": "AA=="}}, "is 'input_audio', not text", "text and pictures alone are learned"),
])
def test_parts_that_cannot_be_had_are_refused_by_name(part, reason, fix):
    found = problem(asked(text("What?"), part))
    assert found.reason.startswith("the content of turn 1 is a list whose part 2") and reason in found.reason and fix in found.fix


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_pictures_of_other_turns_are_refused_by_name(role):
    turns = {"system": [{"role": "system", "content": [{"image": "a.png"}]}, user("q"), CAT],
             "assistant": [user("q"), answer([{"type": "image", "image": "a.png"}])],
             "tool": [user("q"), answer("", tool_calls=[{"name": "f", "arguments": {}}]), {"role": "tool", "content": [{"type": "image"}]}, CAT]}[role]
    with pytest.raises(RowError) as caught:
        read({"messages": turns})
    assert f"part 1 is a picture, and the turn is the {role}'s" in caught.value.problems[0].reason
    for key, value in (("images", ["a.png"]), ("pictures", [at(0, A)])):
        told = [turn | ({"content": "s", key: value} if turn["role"] == role else {}) for turn in turns]
        assert problem({"messages": told}).reason == f"`{key}` of turn {1 if role == 'system' else len(told) - (role == 'tool')} " \
                                                     f"has pictures, and the turn is the {role}'s"


# --- places in texts

@pytest.mark.parametrize(("said", "left", "places"), [
    ("<image>\nWhat?", "What?", [0]), ("What?\n<image>", "What?", [5]), ("<image>Who?", "Who?", [0]), ("<image>", "", [0]),
    ("<image><image>\nWhat?", "What?", [0, 0]), ("<image>\n<image>\nWhat?", "What?", [0, 0]), ("What?\n<image>\n<image>", "What?", [5, 5]),
    ("What?\n <image> <image> \n", "What?\n", [6, 6]), ("One\n<image>\nTwo", "One\nTwo", [4]), ("One\r\n<image>\r\nTwo", "One\r\nTwo", [5]),
    ("What?\r\n<image>", "What?", [5]), ("Is <image> like <image>?", "Is  like ?", [3, 9]), ("a<image>\n<image>b", "a\nb", [1, 2]),
    ("\n\n<image>", "\n", [1]), ("nothing < image >", "nothing < image >", []), ("", "", []),
    ("é<image>\n\n<image>\nü", "é\n\nü", [1, 3])])
def test_places_are_taken_out_with_the_line_that_they_fill(said, left, places):
    assert apart(said) == (left, places)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["<image>", "<image", ">", "\n", "\r\n", " ", "a", "é"]), max_size=12))
def test_nothing_but_places_and_the_white_space_beside_them_is_lost(pieces):
    said = "".join(pieces)
    left, places = apart(said)
    assert left.split() == said.replace("<image>", " ").split() or "".join(left.split()) == "".join(said.replace("<image>", "").split())
    assert len(places) == said.count("<image>") and places == sorted(places) and all(0 <= place <= len(left) for place in places)
    for place in {*places}:  # what stood before the first picture of a place stands before it still
        before = said.split("<image>")[places.index(place)] if places.index(place) == 0 else None
        assert before is None or left[:place].split() == before.split()


LLAVA = {"id": "000000033471", "image": "coco/a.png", "conversations": [
    {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It has whiskers."}]}
FACTORY = {"messages": [user("<image>Who is it?"), CAT, user("And <image>this?"), answer("A dog.")], "images": ["a.png", "b.png"]}
SWIFT = {"query": "<image>What?", "response": "A cat.", "images": ["a.png"], "history": [["<image>Who?", "A dog."]]}
TRL = {"prompt": [user([{"type": "image"}, text("What?")])], "completion": [CAT], "images": [{"bytes": PNG, "path": None}]}
VSFT = {"messages": [user([{"index": None, "text": "What?\n", "type": "text"}, {"index": 1, "text": None, "type": "image"},
                           {"index": 0, "text": None, "type": "image"}]), answer([{"index": None, "text": "A cat.", "type": "text"}])],
        "images": ["a.png", "b.png"]}
SMOL = {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "s"}]}  # the Cauldron


def test_rows_with_a_column_of_pictures():
    assert read(LLAVA).messages == [seen("What is this?", 0, {"path": "coco/a.png"}), CAT, user("Why?"), answer("It has whiskers.")]
    assert [item.name for item in read(LLAVA).unread] == ["id"]
    assert messages(FACTORY) == [seen("Who is it?", 0, A), CAT, seen("And this?", 4, B), answer("A dog.")]
    assert messages(SWIFT | {"images": ["b.png", "a.png"]}) == [seen("Who?", 0, B), answer("A dog."), seen("What?", 0, A), CAT]
    assert messages(TRL) == [seen("What?", 0, {"base64": PNG}), CAT]
    assert messages(VSFT) == [seen("What?\n", 6, B, 6, A), CAT]
    assert read(SMOL, columns={"turns": "texts"}).messages == [seen("What?", 0, A), CAT]


@pytest.mark.parametrize(("row", "said"), [
    ({"messages": [user("What?"), CAT]}, "What?"), ({"conversations": [user("What?"), CAT]}, "What?"),
    ({"instruction": "What?", "input": "", "output": "A cat."}, "What?"), ({"instruction": "What?", "input": "Look.", "output": "A cat."}, "What?\n\nLook."),
    ({"prompt": "What?", "completion": "A cat."}, "What?"), ({"prompt": [user("What?")], "completion": [CAT]}, "What?"),
    ({"question": "What?", "answer": "A cat."}, "What?"), ({"query": "What?", "response": "A cat."}, "What?"),
    ({"text": "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>"}, "What?"),
    ({"prompt": "", "completion": "A cat."}, ""), ({"instruction": "", "output": "A cat."}, ""), ({"messages": [user(""), CAT]}, "")])
def test_without_a_place_pictures_stand_in_front_of_the_first_question(row, said):
    for shown in ({"images": ["a.png", "b.png"]}, {"images": '["a.png", "b.png"]'}, {"image": ["a.png", {"path": "b.png"}]},
                  {"image": "", "images": [A, B]}, {"image": ["a.png", "b.png"], "images": [A, B]}):
        assert messages(row | shown) == [seen(said, 0, A, 0, B), CAT]
    assert messages(row | {"image": "a.png"}) == [seen(said, 0, A), CAT]
    later = {"messages": [{"role": "system", "content": "s"}, user("Hi"), answer("Hello"), user("What?"), CAT], "image": "a.png"}
    assert [turn.get("pictures") for turn in messages(later)] == [None, [at(0, A)], None, None, None]


@pytest.mark.parametrize("none", [None, "", [], {}, {"bytes": None, "path": None}, "[]"])
def test_an_empty_column_is_as_if_it_was_not_there(none):
    for name in ("image", "images", "videos", "audio"):
        assert read({"messages": [user("<image>"), answer("b")], name: none}).messages == [user("<image>"), answer("b")]


@pytest.mark.parametrize(("value", "ref"), [
    ("a.png", A), ({"bytes": PNG, "path": "a.png"}, {"base64": PNG}), ({"path": "a.png"}, A), ({"bytes": PNG}, {"base64": PNG}),
    ({"url": "a.png"}, A), ('{"path": "a.png"}', A), (["a.png"], A), ([{"bytes": PNG}], {"base64": PNG}), ("[1] a.png", {"path": "[1] a.png"}),
    (f"data:image/png;base64,{PNG}", {"base64": PNG}), (PNG, {"base64": PNG}), ("A" * 2000, {"base64": "A" * 2000})])
def test_references_in_a_column(value, ref):
    assert messages({"question": "What?", "answer": "A cat.", "image": value}) == [seen("What?", 0, ref), CAT]


@pytest.mark.parametrize(("more", "reason"), [
    ({"image": "http://x/a.png"}, "`image` is at an address, and nothing is downloaded: 'http://x/a.png'"),
    ({"images": ["a.png", "https://x/a.png"]}, "picture 2 in `images` is at an address"), ({"images": ["a.png", None]}, "picture 2 in `images` is missing"),
    ({"image": 5}, "`image` is a number, not a picture"), ({"images": [["a.png"]]}, "picture 1 in `images` is a list, not a picture"),
    ({"image": {"not text": "4 bytes of binary data"}}, "`image` is 4 bytes of binary data, and none of a picture's"),
    ({"image": {"<image_00>": "a.png"}}, "`image` names no file and holds none: it has '<image_00>'"),
    ({"image": "{'bytes': b'x', 'path': None}"}, "`image` is text as Python shows a list"), ({"images": "['a.png']"}, "`images` is text as Python shows a list"),
    ({"image": "a.png", "images": ["b.png"]}, "the row has other pictures in `images` than in `image`"),
    ({"video": "a.mp4"}, "the row has `video`; only text and pictures can be learned"), ({"audios": ["a.wav"], "image": "a.png"}, "the row has `audios`;")])
def test_columns_that_cannot_be_had_are_refused_by_name(more, reason):
    assert reason in problem({"question": "What?", "answer": "A cat.", **more}).reason


@pytest.mark.parametrize(("turns", "pictures", "reason"), [
    ([user("<image><image>What?"), CAT], ["a.png"], "`images` has 1 picture, and what the user says has 2 places for one (<image>)"),
    ([user("<image>What?"), CAT], ["a.png", "b.png"], "`images` has 2 pictures, and what the user says has 1 place for one (<image>)"),
    ([user("<image>What?"), answer("<image>")], ["a.png", "b.png"], "has 1 place for one (<image>); turn 2 has one, and is not the user's"),
    ([user([{"type": "image"}, {"type": "image"}]), CAT], ["a.png"], "has 2 places"), ([user([{"type": "image", "index": 1}]), CAT], ["a.png"], "has 1 place"),
    ([user([{"type": "image", "index": 0}, {"type": "image", "index": 0}]), CAT], ["a.png", "b.png"], "has 2 places"),
    ([user([{"type": "image", "index": 0}, {"type": "image", "index": 0}]), CAT], ["a.png"], "has 2 places"),
    ([user([{"type": "image"}, text("<image>")]), CAT], ["a.png"], "has 2 places")])
def test_pictures_and_places_have_to_be_as_many(turns, pictures, reason):
    found = problem({"messages": turns, "images": pictures})
    assert reason in found.reason and "give each picture its place" in found.fix


def test_pictures_of_turns_beside_a_column_that_repeats_them():
    row = asked({"type": "image", "image": "a.png"}, text("What?")) | {"images": ["a.png"]}
    assert messages(row) == [seen("What?", 0, A), CAT]
    assert problem(row | {"images": ["b.png"]}).reason == "`images` has other pictures than the turns"


def test_pictures_under_a_key_of_a_turn():
    """As Ollama and some scripts have them."""
    turns = [user("What?", images=[PNG]), CAT, user("Is <image> one?", image="a.png"), answer("No.")]
    assert messages({"messages": turns}) == [seen("What?", 0, {"base64": PNG}), CAT, seen("Is  one?", 3, A), answer("No.")]
    assert messages({"messages": turns[2:], "images": ["a.png"]}) == [seen("Is  one?", 3, A), answer("No.")]
    assert "`image` of turn 3 has 1 picture" in problem({"messages": [*turns[:2], user("<image><image>", image="a.png"), CAT]}).reason
    assert problem({"messages": [user("What?", videos=["a.mp4"]), CAT]}).reason == "turn 1 has `videos`; only text and pictures can be learned"
    assert messages({"messages": [user("What?", images=None), CAT]}) == [user("What?"), CAT]


def test_what_was_prepared_is_read_again():
    turns = [seen("One two", 0, {"file": "pictures/a.png"}, 4, {"file": "pictures/b.png"}), CAT]
    assert messages({"messages": turns}) == [seen("One two", 0, {"path": "pictures/a.png"}, 4, {"path": "pictures/b.png"}), CAT]
    both = user([text("One"), {"image": "b.png"}, text(" two")], pictures=[at(0, A), at(7, A)])
    assert messages({"messages": [both, CAT]}) == [seen("One two", 0, A, 3, B, 7, A), CAT]
    again = messages({"messages": [seen("", 0, {"base64": PNG}), CAT]})
    assert again == [seen("", 0, {"base64": PNG}), CAT] and messages({"messages": again}) == again


@pytest.mark.parametrize(("own", "reason"), [
    ([at(8, A)], "picture 1 of turn 1 has no place in what is said: its `at` is 8"), ([A], "its `at` is None"), ([at(True, A)], "its `at` is True"),
    ([at(3, A), at(1, B)], "picture 2 of turn 1 has no place in what is said: its `at` is 1"), ("a.png", "its `at` is None"), ([at(-1, A)], "is -1"),
    ([at(0, {})], "picture 1 of turn 1 names no file"), ([at(0, {"file": "http://x/a.png"})], "picture 1 of turn 1 is at an address")])
def test_pictures_with_a_place_that_is_none(own, reason):
    assert reason in problem({"messages": [user("One two", pictures=own), CAT]}).reason


# --- what is done to turns

def test_turns_that_become_one_keep_their_pictures_where_they_were():
    turns = [user([{"image": "a.png"}]), user([text("Is it?"), {"image": "b.png"}]), user([text(" "), {"image": "a.png"}]),
             user([text("So"), {"image": "a.png"}, text("?")]), CAT]
    assert messages({"messages": turns}, mends=True) == [seen("Is it?\n\nSo?", 0, A, 6, B, 6, A, 10, A), CAT]
    assert messages({"messages": [turns[0], turns[2], CAT]}, mends=True) == [seen("", 0, A, 0, A), CAT]
    assert messages({"messages": [user("Hm"), turns[0], CAT]}, mends=True) == [seen("Hm", 2, A), CAT]


def test_pictures_behind_a_system_prompt_and_results_of_tools():
    row = {"system": "Look.", "image": "a.png", "messages": [user("What?"), CAT]}
    assert messages(row) == [{"role": "system", "content": "Look."}, seen("What?", 0, A), CAT]
    calls = answer([{"type": "tool_use", "id": "1", "name": "f", "input": {}}])
    turns = [user("q"), calls, user([{"type": "tool_result", "tool_use_id": "1", "content": "r"}, {"image": "a.png"}]), CAT]
    with pytest.raises(RowError, match="turn 4 is `user`"):
        read({"messages": turns})
    turns[2] = user([{"type": "tool_result", "tool_use_id": "1", "content": "r"}], images=["a.png"])
    with pytest.raises(RowError, match="turn 4 is `user`"):
        read({"messages": turns})


# --- columns, folders, descriptions

def test_named_columns():
    row = {"q": "What?", "a": "A cat.", "picture": {"bytes": PNG}}
    named = {"user": "q", "assistant": "a"}
    assert messages(row, columns=named | {"images": "picture"}) == [seen("What?", 0, {"base64": PNG}), CAT]
    assert messages({"q": "", "a": "A cat.", "image": "a.png"}, columns=named) == [seen("", 0, A), CAT]
    assert [item.name for item in read(row | {"image": "a.png"}, columns=named | {"images": "picture"}).unread] == ["image"]
    assert messages({"talk": [user("What?"), CAT], "p": ["a.png"]}, columns={"turns": "talk", "images": "p"}) == [seen("What?", 0, A), CAT]
    assert problem(row, columns=named | {"images": "pictur"}).reason == "the column `pictur` is missing, and `picture` has a picture"
    assert messages({"q": "Hm?", "a": "Hm."}, columns=named | {"images": "picture"}) == [user("Hm?"), answer("Hm.")]
    assert messages({"messages": [user("What?"), CAT], "image": "a.png"}, columns=named | {"images": "p"}) == [seen("What?", 0, A), CAT]
    assert PrepareConfig(columns=("user=q", "assistant=a", "images=p")).column_names == named | {"images": "p"}
    with pytest.raises(UserError, match="no others but `system=…`"):
        PrepareConfig(columns=("user=q", "chosen=a", "rejected=b", "images=p"))


def test_columns_that_have_to_be_named_are_suggested():
    row = {"query": "What?", "label": "A cat.", "output": "A cat.", "chart": {"bytes": PNG}}
    assert problem(row).fix == "use --columns user=query,assistant=output,images=chart"
    assert problem(row | {"chart": {"base64": PNG}}).fix.endswith(",images=chart"), "as a column of nothing but bytes is read"
    assert problem({"query": "What?", "output": "A cat.", "image": "a.png", "x": 1}).fix == "use --columns user=query,assistant=output"


@pytest.mark.parametrize(("row", "reason"), [
    ({"image": "a.png", "text": "A cat."}, "`text` stands beside a picture (`image`), and no column asks a question about it"),
    ({"image": {"bytes": PNG}, "caption": "A cat.", "cui": ["1"]}, "`caption` stands beside a picture (`image`)"),
    ({"photo": "a.png", "caption": "A cat."}, "`caption` stands beside a picture (`photo`)"), ({"image": "a.png", "label": 7}, "`label` stands beside"),
    ({"image": "a.png"}, "there is a picture (`image`), and no column")])
def test_a_picture_without_a_question_says_what_to_do(row, reason):
    found = problem(row)
    assert reason in found.reason and found.fix.startswith("add a column with the question") and "--columns" in found.fix


def test_a_caption_with_a_question_in_a_column_of_its_own_is_learned():
    row = {"image": "a.png", "text": "A cat.", "question": "What does the picture show?"}
    assert messages(row, columns={"user": "question", "assistant": "text", "images": "image"}) == [
        seen("What does the picture show?", 0, A), CAT]
    alone = read({"image": "a.png", "text": "A cat."}, "text")
    assert alone.text == "A cat." and [item.name for item in alone.unread] == ["image"], "--format text learns it alone"


@pytest.mark.parametrize("name", ["folder/metadata.jsonl", "metadata.csv", "metadata.jsonl.gz"])
def test_metadata_of_a_folder_of_pictures(name):
    row = {"file_name": "train/a.png", "question": "What?", "answer": "A cat."}
    example = Formats().example_of(Row(name, 1, row))
    assert example.messages == [seen("What?", 0, {"path": "train/a.png"}), CAT] and example.unread == ()
    several = {"images_file_names": ["a.png", "b.png"], "messages": [user("What?"), CAT]}
    assert Formats().example_of(Row(name, 1, several)).messages == [seen("What?", 0, A, 0, B), CAT]
    with pytest.raises(RowError, match="`file_name` is at an address"):
        Formats().example_of(Row(name, 1, row | {"file_name": "http://x/a.png"}))
    named = Formats(columns={"user": "question", "assistant": "answer", "images": "file_name"})
    assert named.example_of(Row(name, 1, row)).messages == example.messages
    elsewhere = Formats().example_of(Row("rows.jsonl", 1, {"file_name": "a.png", "messages": [user("a"), answer("b")]}))
    assert elsewhere.messages == [user("a"), answer("b")] and [item.name for item in elsewhere.unread] == ["file_name"]


def factory(formatting="sharegpt", **columns):
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
            "function_tag": "function_call", "system_tag": "system"}
    return Description("mllm", Path("data/dataset_info.json"), formatting, tuple(columns.items()), tuple(tags.items()))


def test_rows_that_an_entry_of_llama_factory_describes():
    turns = [{"from": "human", "value": "<image>Who is it?"}, {"from": "gpt", "value": "A cat."}]

    def described(description, **row):
        return Formats().example_of(Row("mllm.json", 1, row, described=description))

    example = described(factory(messages="talk", images="pics"), talk=turns, pics=["a.png"])
    assert example.messages == [seen("Who is it?", 0, A), CAT] and example.unread == ()
    alpaca = {"prompt": "q", "response": "a", "images": "pics"}
    assert described(factory("alpaca", **alpaca), q="Who?", a="A cat.", pics=["a.png"]).messages == [seen("Who?", 0, A), CAT]
    with pytest.raises(RowError, match="`pics` has 2 pictures, and what the user says has 1 place"):
        described(factory(messages="talk", images="pics"), talk=turns, pics=["a.png", "b.png"])
    with pytest.raises(RowError, match="the row has `images`, which the entry `mllm` of data/dataset_info.json does not name"):
        described(factory(messages="talk"), talk=turns, images=["a.png"])
    assert described(factory(messages="talk"), talk=[turns[0] | {"value": "Who?"}, turns[1]], images=[]).messages == [user("Who?"), CAT]


def test_an_entry_of_llama_factory_names_pictures():
    info = Path("dataset_info.json")
    info.write_text(json.dumps({"mllm": {"file_name": "mllm.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"}}}))
    description = entry_of(info, "mllm").description
    row = {"talk": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "A cat."}], "pics": ["a.png"]}
    assert Formats().example_of(Row("mllm.json", 1, row, described=description)).messages == [seen("Who?", 0, A), CAT]


# --- preferences

def test_pairs_and_judged_answers_are_to_the_pictures_of_their_question():
    pair = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"}
    inside = {"prompt": [user([{"image": "a.png"}, text("What?")])], "chosen": [CAT], "rejected": [answer("A dog.")]}
    trl = {"prompt": [user([{"type": "image"}, text("What?")])], "chosen": [CAT], "rejected": [answer("A dog.")], "images": ["a.png"]}
    for row in (pair, inside, trl):
        found = read(row)
        assert (found.messages, found.rejected, found.unread) == ([seen("What?", 0, A), CAT], [answer("A dog.")], ())
        assert messages(row, take="chosen") == [seen("What?", 0, A), CAT]
    judged = read({"prompt": "What?", "completion": "A cat.", "label": True, "images": ["a.png"]})
    assert (judged.messages, judged.good, judged.unread) == ([seen("What?", 0, A), CAT], True, ())
    assert problem(pair | {"image": None, "images": ["a.png", "b.png"], "prompt": "<image>What?"}).code == "picture"
    assert read(pair | {"image": None}).messages == [user("What?"), CAT]


def test_pictures_inside_what_is_compared_are_refused_by_name():
    later = [CAT, seen("And?", 0, A), CAT]
    for chosen, rejected in ((later, [answer("A dog.")]), ([answer("A dog.")], later)):
        found = problem({"prompt": [user("Hello")], "chosen": chosen, "rejected": rejected})
        assert found.reason == "a picture stands inside the answer that is compared or judged"


# --- anything at all

NAMES = ("type image image_url url path bytes base64 data source file media_type mimeType text value at index role content pictures images "
        "video question answer messages conversations prompt completion instruction output contents parts inlineData")
KEYS = NAMES.split()
texts = st.sampled_from(["", " ", "a.png", "http://x/a.png", "file:///a.png", f"data:image/png;base64,{PNG}", "data:", "data:,", PNG, "<image>",
                         "<image>\nWhat?", "a<image>b", "\ud800", "a\0", "[", "{", '["a.png"]', "image", "image_url", "text", "image/png"]) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=10)
parts = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["image", "image_url", "text", "input_image", None, 3]), "image": values, "text": scalars,
                                            "image_url": values, "index": scalars, "source": values})
own = st.lists(st.fixed_dictionaries({"at": st.integers(0, 3) | scalars}, optional={"path": texts, "base64": texts, "file": values}), max_size=2) | values
asks = st.fixed_dictionaries({"role": st.just("user"), "content": texts | st.lists(parts, max_size=3)}, optional={"images": values, "pictures": own, "image": texts})
talks = st.lists(st.tuples(asks, st.just(CAT) | asks), min_size=1, max_size=2).map(lambda pairs: [turn for pair in pairs for turn in pair])
shown = st.fixed_dictionaries({}, optional={"images": st.lists(texts | parts | values, max_size=3) | values, "image": values, "video": values})
rows = st.builds(lambda talk, more: {"messages": talk, **more}, talks, shown) | st.builds(
    lambda row, more: row | more, st.dictionaries(st.sampled_from(KEYS), values | talks, max_size=5), shown) | st.builds(
    lambda q, a, more: {"question": q, "answer": a, **more}, texts, texts, shown) | st.builds(
    lambda inner, more: {"contents": [{"role": "user", "parts": inner}, {"role": "model", "parts": [{"text": "A cat."}]}], **more},
    st.lists(st.dictionaries(st.sampled_from(["text", "inlineData", "fileData"]), values, max_size=2), max_size=3), shown)
ways = st.builds(Formats, st.just(None), st.sampled_from([{}, {"user": "question", "assistant": "answer", "images": "image"}]), st.none(),
                 mends=st.booleans())


def check(row, formats):
    """Whether a row, whatever it is, becomes an example with pictures; every other one has its problems."""
    as_it_was = repr(row)
    try:
        example = formats.example_of(Row("metadata.jsonl", 1, row))
    except RowError as e:
        assert 1 <= len(e.problems) <= MOST_PROBLEMS and all(len(p.reason) < 500 and "\n" not in p.reason for p in e.problems)
        return False
    finally:
        assert repr(row) == as_it_was
    written = json.dumps(example.as_row(), ensure_ascii=False, allow_nan=False)
    written.encode()
    for turn in example.messages or ():
        pictures = turn.get("pictures", [])
        assert not pictures or turn["role"] == "user"
        places = [picture["at"] for picture in pictures]
        assert places == sorted(places) and all(0 <= place <= len(turn["content"]) for place in places)
        assert all(picture.keys() in ({"at", "path"}, {"at", "base64"}) for picture in pictures)
        assert turn["content"].strip() or pictures or turn["role"] != "user"
    if example.messages:
        assert Formats().example(json.loads(written)).messages == example.messages, "what was read is read again as it is"
    return bool(pictures_in(example.messages or ()))


@settings(derandomize=True, database=None, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(row=rows, formats=ways)
def test_any_row_with_pictures_is_an_example_or_an_error(row, formats):
    check(row, formats)


SHAPES = [LLAVA, FACTORY, SWIFT, TRL, VSFT, asked({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}, text("What?")),
          asked(text("What?"), {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}, {"image": "a.png"}),
          {"question": "What?", "answer": "A cat.", "image": {"bytes": PNG, "path": None}}, {"file_name": "a.png", "prompt": "What?", "completion": "A cat."},
          {"messages": [seen("One two", 0, A, 4, B), CAT]}, {"messages": [user("What?", images=[PNG]), CAT, user("<image>Why?", image="a.png"), CAT]},
          {"contents": [{"role": "user", "parts": [{"text": "Is "}, {"inlineData": {"mimeType": "image/png", "data": PNG}}]},
                        {"role": "model", "parts": [{"text": "A cat."}]}]}]
ODD = [None, "", " ", 0, -1, 1, True, 0.5, float("nan"), [], {}, [None], "a.png", "<image>", "x\n<image>\n", PNG, "http://x/a", "\ud800", "\0", "user",
       "assistant", "tool", "system", {"image": "a.png"}, {"type": "image"}, {"type": "text", "text": "<image>"}, [{"at": 0, "path": "a.png"}], ["a.png"]]


def mutated(value, random):
    """A value with one of the values in it left out, or another in its place, or twice."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.8:
        value = copy.copy(value)
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        how = random.random()
        if how < 0.15:
            del value[key]
        elif how < 0.25 and isinstance(value, list):
            value.insert(key, value[key])
        elif how < 0.35 and isinstance(value, dict):
            value[random.choice(KEYS)] = value[key]
        else:
            value[key] = mutated(value[key], random)
        return value
    return random.choice(ODD)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_rows_of_every_shape_with_something_wrong_in_them(number):
    random, shape = Random(number), SHAPES[number]
    with_pictures = 0
    for _ in range(MUTATIONS):
        row = shape
        for _ in range(random.randint(1, 3)):
            row = mutated(row, random)
        with_pictures += check(row, random.choice([Formats(), Formats(mends=True), Formats(columns={"user": "question", "assistant": "answer"})]))
    assert MUTATIONS // 20 < with_pictures < MUTATIONS, "some are still right, and some are not"


def test_a_reference_is_told_without_reading_files():
    assert reference("it", "no/such/file.png") == {"path": "no/such/file.png"}
