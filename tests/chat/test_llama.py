"""What llama.cpp is sent of pictures, and what becomes of a conversation where it cannot be shown any."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat import llama
from gemma_tune.chat.pictures import Shown, as_png
from gemma_tune.config.stages import ChatConfig
from support.seers import write_pictures


class Talks:
    """In the place of llama.cpp."""

    made: list[Talks]

    def __init__(self, gguf, context, *, talking, projector=None):
        if projector and projector.name == "damaged":
            raise WorkFailed("llama.cpp cannot load it")
        self.projector, self.closed, self.asked = projector, False, []
        Talks.made.append(self)

    def __exit__(self, *_):
        self.closed = True

    def talk(self, messages, pictures, count, **sampling):
        self.asked.append((messages, pictures))
        yield "so", 1, True, 9


@pytest.fixture
def voice(monkeypatch):
    Talks.made = []
    monkeypatch.setattr(llama, "Engine", Talks)

    def of(projector: str) -> llama.LlamaVoice:
        return llama.LlamaVoice("it", 100, Talks(Path("a"), 100, talking=True), None, {}, gguf=Path("a"), projector=Path(projector))

    return of


@pytest.fixture
def turns(tmp_path):
    write_pictures(tmp_path)
    found = [{**Shown().picture(tmp_path / f"{n}.png"), "at": at} for n, at in ((0, 4), (1, 8))]
    return [{"role": "system", "content": "s"}, {"role": "user", "content": "See and ", "pictures": found},
            {"role": "assistant", "content": "a", "train": False}, {"role": "user", "content": "", "pictures": found[1:]}]


def test_pictures_are_sent_in_their_places(voice, turns):
    voice = voice("mmproj")
    assert voice.ask(turns, ChatConfig()).finish().text == "so"
    first, second = Talks.made
    assert first.closed and not second.closed and second.projector == Path("mmproj")
    [(messages, pictures)] = second.asked
    image = {"type": "image"}
    assert messages == [{"role": "system", "content": "s"}, {"role": "user", "content": [
        {"type": "text", "text": "See "}, image, {"type": "text", "text": "and "}, image]}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": [image]}]
    one, other = map(as_png, turns[1]["pictures"])
    assert pictures == [one, other, other]


def test_where_what_sees_cannot_be_loaded_text_is_still_answered(voice, turns):
    voice = voice("damaged")
    with pytest.raises(WorkFailed, match="cannot load"):
        voice.ask(turns, ChatConfig())
    assert [engine.closed for engine in Talks.made] == [True, False] and voice.engine is Talks.made[1]


def test_what_llama_cpp_is_not_asked_beside_a_picture(voice, turns):
    voice = voice("mmproj")
    called = {"role": "assistant", "content": "", "tool_calls": [{}]}
    for asked, tools in ((turns, [{}]), ([*turns[:2], called, {"role": "tool", "content": "5"}], None)):
        with pytest.raises(UserError, match="tools beside a picture"):
            voice.ask(asked, ChatConfig(), tools)
