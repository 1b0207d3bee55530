"""Pictures that are shown in a conversation: typed, dragged, taken back, kept as they were, saved with their paths."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gemma_tune.answers.generation import Answer
from gemma_tune.base.errors import UserError
from gemma_tune.chat.conversation import Conversation
from gemma_tune.chat.pictures import Shown, are_pictures, as_png, as_row, paths_in
from gemma_tune.chat.saves import Saves
from gemma_tune.chat.transcript import export
from gemma_tune.cli.chat.commands import obey
from gemma_tune.config.stages import ChatConfig
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.run.directory import RunDir
from support.seers import write_pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "my pictures"
    place.mkdir()
    return write_pictures(place)


class Sees:
    """One who answers, and takes down what it was asked."""

    name = which = "sees"
    context = 100

    def __init__(self):
        self.asked, self.blind = [], False

    def require_sight(self):
        if self.blind:
            raise UserError("no picture can be shown")

    def ask(self, messages, config, tools=None):
        self.asked.append([dict(turn) for turn in messages])

    def close(self):
        pass


class Talk:
    """What commands work on, without a terminal."""

    def __init__(self, conversation):
        self.conversation, self.markdown, self.left = conversation, False, False

    def somebody_answers(self):
        pass

    def exchange(self, question):
        self.conversation.ask(question)
        return self.conversation.keep(question, Answer(f"a{len(self.conversation.voice.asked)}", 1, True))


@pytest.fixture
def talk(tmp_path):
    conversation = Conversation(Sees(), ChatConfig(), Saves(RunDir(tmp_path, "m"), {}), shown=Shown(copied=True))
    yield Talk(conversation)
    conversation.close()


def shown(turn: dict) -> list[str]:
    return [Path(picture["path"]).name for picture in turn.get("pictures", ())]


@pytest.mark.skipif(os.name != "posix", reason="a shell's quotes")
def test_paths_as_they_are_typed_and_dragged(folder, monkeypatch):
    first, second = folder / "0.png", folder / "1.png"
    quoted = f"'{first}'"
    escaped = str(second).replace(" ", "\\ ")
    assert paths_in(f" {first} ") == paths_in(quoted) == paths_in(f'"{first}"') == [first]
    assert paths_in(f"{quoted} {escaped}") == [first, second]
    assert paths_in("file://" + str(first).replace(" ", "%20")) == [first]
    monkeypatch.setenv("HOME", str(folder))
    assert paths_in("~/0.png") == [first]
    assert paths_in("no such file.png") == [Path("no such file.png")] and paths_in("it's.png") == [Path("it's.png")]
    (folder / "it's.png").write_bytes(first.read_bytes())
    assert paths_in(f"{folder}/it's.png") == [folder / "it's.png"]
    assert are_pictures(quoted) and are_pictures(f"{quoted} {escaped} ") and are_pictures(str(first))
    assert not any(map(are_pictures, (f"what is {first}", "/etc/hosts", f"{folder}/none.png", f"{first}\nwhat?", "0.png")))


def test_pictures_go_with_the_next_question_alone(talk, folder, capsys):
    conversation = talk.conversation
    obey(talk, f"/image {folder / '0.png'}")
    obey(talk, f"/image '{folder / '1.png'}' '{folder / '2.png'}'")
    assert capsys.readouterr().err.count("shown with the next question") == 3
    talk.exchange("What?")
    talk.exchange("And?")
    first, _, second = conversation.voice.asked[1]
    assert shown(first) == ["0.png", "1.png", "2.png"] and [one["at"] for one in first["pictures"]] == [0, 0, 0]
    assert conversation.voice.asked[0] == [first] and second == {"role": "user", "content": "And?"}
    obey(talk, "/history")
    assert str(folder / "2.png") in capsys.readouterr().err


def test_they_can_be_taken_back_and_wait_for_a_question_that_is_answered(talk, folder):
    conversation = talk.conversation
    obey(talk, f"/image {folder / '0.png'}")
    conversation.ask("What?")
    assert not conversation.keep("What?", Answer(" ", 0, True)) and len(conversation.waiting) == 1
    obey(talk, "/image")
    assert not conversation.waiting
    with pytest.raises(UserError, match="needs a path"):
        obey(talk, "/image")
    obey(talk, f"/image {folder / '0.png'}")
    obey(talk, "/reset")
    assert not conversation.waiting


def test_the_same_question_is_asked_again_with_its_pictures(talk, folder):
    conversation = talk.conversation
    obey(talk, f"/image {folder / '0.png'}")
    talk.exchange("What?")
    obey(talk, f"/image {folder / '1.png'}")
    obey(talk, "/retry")
    assert shown(conversation.voice.asked[-1][0]) == shown(conversation.turns[0]) == ["0.png"]
    assert [Path(one["path"]).name for one in conversation.waiting] == ["1.png"], "waits for the next question"
    talk.exchange("And this?")
    assert shown(conversation.turns[2]) == ["1.png"]
    obey(talk, "/undo")
    assert len(conversation.turns) == 2 and not conversation.waiting


def test_a_picture_stays_as_it_was_when_it_was_shown(talk, folder):
    path = folder / "0.png"
    obey(talk, f"/image {path}")
    before = Path(talk.conversation.waiting[0]["lies_at"]).read_bytes()
    Image.new("RGB", (7, 9)).save(path)
    obey(talk, f"/image {path}")
    path.unlink()
    one, other = talk.conversation.waiting
    assert one["file"] != other["file"] and one["path"] == other["path"] == str(path)
    assert Path(one["lies_at"]).read_bytes() == before and Image.open(one["lies_at"]).size == (60, 44)
    assert as_png(other).startswith(b"\x89PNG") and as_png(other) is as_png(other) and Image.open(other["lies_at"]).size == (7, 9)
    talk.conversation.close()
    assert not Path(one["lies_at"]).exists(), "and nothing is left of it"


@pytest.mark.parametrize("name", ["none.png", ".", "broken.png"])
def test_what_is_no_picture_is_told_and_waits_for_nothing(talk, folder, name):
    (folder / "broken.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="no picture|is a directory"):
        obey(talk, f"/image {folder / name}")
    assert not talk.conversation.waiting


def test_a_model_that_takes_text_alone_is_shown_nothing(talk, folder):
    talk.conversation.voice.blind = True
    with pytest.raises(UserError, match="no picture can be shown"):
        obey(talk, f"/image {folder / '0.png'}")
    assert not talk.conversation.waiting


def test_what_is_saved_and_written_names_the_paths(talk, folder, tmp_path):
    conversation = talk.conversation
    obey(talk, f"/image {folder / '0.png'}")
    talk.exchange("What?")
    path, _ = conversation.save()
    row = json.loads(path.read_text())
    assert row == {"messages": [
        {"role": "user", "content": [{"type": "image", "path": str(folder / "0.png")}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a1"}]}
    talk.exchange("And?")
    conversation.save()
    assert len(path.read_text().splitlines()) == 1, "a later state of the same conversation"
    assert json.loads(export(conversation.messages, "m", tmp_path, str(tmp_path / "a.json")).read_text())["messages"][0] == row["messages"][0]
    text = export(conversation.messages, "m", tmp_path, str(tmp_path / "a.md")).read_text()
    assert f"## You\n\n![0.png](<{folder / '0.png'}>)\n\nWhat?\n" in text


def test_pairs_of_answers_about_pictures_are_kept_as_prepare_reads_them(talk, folder, capsys):
    obey(talk, f"/image {folder / '0.png'}")
    talk.exchange("What?")
    obey(talk, "/fix A cat.")
    obey(talk, f"/image {folder / '1.png'}")
    talk.exchange("And this?")
    obey(talk, "/retry")
    obey(talk, "/better 2")
    assert capsys.readouterr().err.count("1 pair of this question in") == 2
    first, second = ([json.loads(line) for line in talk.conversation.saves.pairs.path.read_text().splitlines()])
    example = Formats().example(second)
    assert [[(one["at"], one["path"]) for one in turn.get("pictures", ())] for turn in example.messages] == [
        [(0, str(folder / "0.png"))], [], [(0, str(folder / "1.png"))], []]
    assert [turn["content"] for turn in example.messages] == ["What?", "A cat.", "And this?", "a3"]
    assert [turn["content"] for turn in example.rejected] == ["a2"]
    assert Formats().example(first).rejected == [{"role": "assistant", "content": "a1"}]


def test_pictures_of_rows(folder, tmp_path):
    """As readers give them, by path or in base64, wherever in the text they stand."""
    import base64

    text = base64.encodebytes((folder / "1.png").read_bytes()).decode()  # in lines, as mails have it
    turn = {"role": "user", "content": "ab", "pictures": [{"at": 1, "path": "0.png"}, {"at": 2, "base64": text}]}
    album = Shown()
    found = album.resolved(turn, folder)["pictures"]
    assert [one["at"] for one in found] == [1, 2]
    assert [Path(one["lies_at"]).read_bytes() for one in found] == [(folder / f"{n}.png").read_bytes() for n in (0, 1)]
    assert as_row(turn | {"pictures": found})["content"] == [
        {"type": "text", "text": "a"}, {"type": "image", "path": found[0]["path"]}, {"type": "text", "text": "b"},
        {"type": "image", "path": found[1]["path"]}]
    again = album.resolved(turn, folder)["pictures"]
    for pictures, there in ((found, True), (again, False)):
        album.forget([turn | {"pictures": pictures}])
        assert Path(found[1]["lies_at"]).exists() == there and (folder / "0.png").exists(), "as long as a row shows it"
    with pytest.raises(UserError, match="is no picture"):
        album.resolved({**turn, "pictures": [{"at": 0, "base64": "AAAA"}]}, folder)
    assert not [*Path(found[1]["lies_at"]).parent.iterdir()]
    with pytest.raises(UserError, match="a picture is not Base64: "):
        album.resolved({**turn, "pictures": [{"at": 0, "base64": "%"}]}, folder)
    assert album.resolved({"role": "user", "content": "x"}, folder) == {"role": "user", "content": "x"}
    album.close()
    shutil.rmtree(folder)
