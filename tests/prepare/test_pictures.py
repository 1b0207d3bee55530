"""How pictures are taken over, beside what whole commands show of it."""

from __future__ import annotations

import base64
import json
import traceback
from pathlib import Path

import numpy as np
import pytest

from gemma_tune.data.conversations.picture_files import MISSING, Place
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.reading.rows import Row
from gemma_tune.prepare import pictures as module
from gemma_tune.prepare.near import signature, similarity, unlike
from gemma_tune.prepare.pictures import NoticedPictures, Pictures, UsedPictures, likely_folder
from support.picture_files import as_bytes, drawn, moving, name_of, prepared_row, save

ROW = Row("rows.jsonl", 3, {})


class Eye:
    """What a model makes of a picture; of narrow ones nothing, as Qwen's processor."""

    def written(self, size: tuple[int, int]) -> str:
        if max(size) > 200 * min(size):
            raise ValueError(f"absolute aspect ratio must be smaller than 200, got {max(size) / min(size)}")
        return "<soft>"


def taking(place: Place = Place((Path(),))) -> Pictures:
    return Pictures(Path("kept"), {"rows.jsonl": place}, Eye())


def turns(*refs: dict) -> list[dict]:
    return [{"role": "system", "content": "S"}, {"role": "user", "content": "Look", "pictures": list(refs)},
            {"role": "assistant", "content": "A"}]


def test_each_keeps_its_place_in_the_text():
    content, noticed = save("a.png"), NoticedPictures()
    given = turns({"at": 0, "path": "a.png"}, {"at": 4, "base64": base64.b64encode(content).decode()})
    taken = taking().taken(ROW, given, noticed)
    assert taken[1]["pictures"] == [{"at": at, "file": f"kept/{name_of(content)}"} for at in (0, 4)]
    assert [taken[0], taken[2]] == [given[0], given[2]] and given[1]["pictures"][0] == {"at": 0, "path": "a.png"}
    assert (noticed.found, noticed.missing, noticed.moving) == (1, 0, 0)


def test_a_row_has_every_problem_of_its_pictures():
    save("cut.png", as_bytes(drawn())[:60])
    noticed = NoticedPictures()
    with pytest.raises(RowError) as raised:
        taking().taken(ROW, turns({"at": 0, "path": "gone.png"}, {"at": 0, "path": "cut.png"}, {"at": 0, "base64": "*"}), noticed)
    assert [problem.code for problem in raised.value.problems] == [MISSING, "picture", "picture"]
    assert all("of turn 2" in problem.reason for problem in raised.value.problems)
    assert (noticed.found, noticed.missing, noticed.first_missing[0]) == (1, 1, "gone.png")


def test_what_the_model_is_not_shown_is_told():
    save("a.png", as_bytes(drawn(1, (401, 2))))
    save("b.png", as_bytes(drawn(1, (400, 2))))
    with pytest.raises(RowError) as raised:
        taking().taken(ROW, turns({"at": 0, "path": "b.png"}, {"at": 0, "path": "a.png"}), NoticedPictures())
    [problem] = raised.value.problems
    assert problem.code == "picture" and problem.reason == (
        "the picture 'a.png' of turn 2 is none that the model is shown: absolute aspect ratio must be smaller than 200, got 200.5")


def test_a_file_that_changed_is_read_again():
    take, noticed = taking(), NoticedPictures()
    for number in range(2):
        content = save("a.png", as_bytes(drawn(number, (30 + number, 20))))
        [_, user, _] = take.taken(ROW, turns({"at": 0, "path": "a.png"}), noticed)
        assert user["pictures"][0]["file"] == f"kept/{name_of(content)}"


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    take = taking()
    for number in range(20):
        save(f"{number}.png", as_bytes(drawn(number)))
        take.taken(ROW, turns({"at": 0, "path": f"{number}.png"}), NoticedPictures())
        assert len(take._known) <= 4


def test_a_fault_that_is_remembered_does_not_grow():
    save("a.png", b"none")
    take, depths = taking(), []
    for _ in range(3):
        with pytest.raises(RowError) as raised:
            take.taken(ROW, turns({"at": 0, "path": "a.png"}), NoticedPictures())
        [fault] = {id(fault): fault for fault in take._known.values()}.values()
        depths.append(len(traceback.extract_tb(fault.__traceback__)))
        assert raised.value.code == "picture"
    assert depths[1] == depths[2]


def test_what_was_noticed_is_put_together():
    save("a.gif", moving())
    one, other = NoticedPictures(), NoticedPictures()
    taking().taken(Row("rows.jsonl", 7, {}), turns({"at": 0, "path": "a.gif"}), other)
    with pytest.raises(RowError):
        taking().taken(ROW, turns({"at": 0, "path": "b.gif"}), other)
    one.add(other)
    one.add(NoticedPictures(moving=2, first_moving="later"))
    assert (one.moving, one.first_moving, one.found, one.missing, one.first_missing[0]) == (3, "rows.jsonl:7", 1, 1, "b.gif")


def test_where_pictures_may_lie_instead():
    save("img/a.png")
    save("deep/x/b.png")
    Path("deep/data/train").mkdir(parents=True)
    place = Place((Path("deep/data/train"),))
    assert likely_folder("img/a.png", place) == Path()
    assert likely_folder("x/b.png", place) == Path("deep")
    assert likely_folder("x/c.png", place) is None and likely_folder("n" * 300, place) is None and likely_folder("a\0", place) is None
    assert likely_folder("img/a.png", Place((Path("deep"),), own=False)) is None, "others are not told what lies here"


def test_the_figures_are_those_of_rows_that_are_used():
    names = {n: name_of(save(f"kept/{name_of(as_bytes(drawn(n)))}", as_bytes(drawn(n)))) for n in range(4)}
    used = UsedPictures(Path("kept"), 7)
    def line(*numbers: int, **more: str) -> bytes:
        return (json.dumps(prepared_row(*(names[n] for n in numbers), **more), ensure_ascii=False) + "\n").encode()

    ids = [(np.array([1, 7, 7, 7, 2], np.int32), None, ""), (np.array([7], np.int32), None, "")]
    used.add("train", line(0, 1), ids)
    used.add("valid", line(1), ids[1:])
    used.add("train", (json.dumps({"messages": [{"role": "user", "content": 'Is "pictures": [ a word and 7?'}]}) + "\n").encode(), ids)
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"pictures": [7]}}}]}
    used.add("train", (json.dumps({"messages": [calling]}) + "\n").encode(), ids)
    assert used.settled() == {"picture_rows": 2, "pictures": 2, "picture_tokens": 5, "pictures_on_both_sides": 1,
                              "picture_bytes": sum(len(as_bytes(drawn(n))) for n in (0, 1))}
    assert {path.name for path in Path("kept").iterdir()} == {names[0], names[1]}


def test_where_no_row_is_used_nothing_stays():
    save("kept/a.png")
    assert UsedPictures(Path("kept"), None).settled() == {} and not Path("kept").exists()
    assert UsedPictures(Path("nowhere"), None).settled() == {}


def test_rows_about_other_pictures_are_not_near():
    words = signature(["what is shown in this picture here"])
    one, two, both = unlike(words, ["a"]), unlike(words, ["b"]), unlike(words, ["a", "b"])
    assert similarity(one, two) < 0.1 and similarity(one, both) < 0.1 and similarity(one, words) < 0.1
    assert similarity(unlike(words, ["a"]), one) == 1
