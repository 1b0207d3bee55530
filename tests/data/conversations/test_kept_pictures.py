"""How pictures are taken over, beside what whole commands show of it."""

from __future__ import annotations

import base64
import traceback
from pathlib import Path

import pytest

from gemma_tune.data.conversations import kept_pictures as module
from gemma_tune.data.conversations.kept_pictures import NoticedPictures, Pictures, likely_folder
from gemma_tune.data.conversations.picture_files import MISSING, Place
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.reading.rows import Row
from support.picture_files import as_bytes, drawn, moving, name_of, save

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
