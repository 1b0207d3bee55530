"""What a turn says as a list of parts becomes one text, and the pictures that stand in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from gemma_tune.data.conversations.pictures import TYPES, Picture, has_both, is_part, is_place, reference
from gemma_tune.data.conversations.places import Supply, apart
from gemma_tune.data.conversations.problems import Problem, kind, quoted, several

NO_TEXT = (*TYPES, "audio", "input_audio", "audio_url", "video", "video_url", "file", "input_file", "document")
THOUGHTS = ("thinking", "reasoning")  # Anthropic's parts, and LLaMA-Factory's
_TEXTS = ("text", "input_text", "output_text")
_OF_TOOLS = ("tool_use", "tool_result", "server_tool_use", "tool_call")  # likewise


class Said(NamedTuple):
    """What a turn says: its text, and its pictures, each with ``at``, the character before which it stands."""

    text: str
    pictures: list[Picture]


class _Writing:
    """A text that grows by pieces, and the pictures in it."""

    def __init__(self, between: str, supply: Supply | None):
        self._between, self._supply = between, supply
        self._run: list[str] = []  # texts with no picture between them
        self._pieces: list[str] = []
        self._length = 0
        self.pictures: list[Picture] = []

    def text(self, text: str) -> None:
        self._run.append(text)

    def picture(self, picture: Picture | None, at: int | None = None) -> None:
        if picture is not None:
            self.pictures.append({"at": self._length if at is None else at, **picture})

    def end_run(self) -> str:
        """Write the texts that wait; the whole text."""
        text, places = self._between.join(self._run), ()
        if self._supply:
            text, places = apart(text)
        for at in places:
            self.picture(self._supply.next(), self._length + at)
        self._pieces.append(text)
        self._length += len(text)
        self._run = []
        return "".join(self._pieces)


def joined(number: int, parts: list[Any], role: str, supply: Supply | None, problems: list[Problem]) -> Said | None:
    """What a list of parts says; None where it is no text, which ``problems`` has then.

    An answer's parts are pieces of one text that a model has written, as where Anthropic's citations divide it, and
    templates that read parts (Gemma 3's and 4's, Qwen 3.5's, LFM2.5's) write them with nothing between. They do so with
    what is asked, too, but where a run ends no such template gets parts: llama.cpp writes them one below the other for
    every template that takes a text (`common_chat_msgs_to_json_oaicompat`), as vLLM does for one that takes nothing
    else (`_get_full_multimodal_text_prompt`), and Ollama makes turns of them, which its templates get with an empty
    line between (`collate`). They are paragraphs there, so a line break stands between, but none beside a picture.

    Args:
        supply: of a user's turn, the pictures that the places in it take.
    """
    if problem := several(f"the content of turn {number}", parts):
        problems.append(problem)
        return None
    writing = _Writing("" if role == "assistant" else "\n", supply)
    for picture in supply.in_front(number) if supply else ():
        writing.picture(picture)
    for position, part in enumerate(parts, start=1):
        if has_both(part):
            problems.append(Problem("not_text", f"the content of turn {number} is a list whose part {position} is a "
                                                "text and a picture", "write a part for each of them, in their order"))
            return None
        if is_part(part) and role == "user":
            writing.end_run()
            where = f"the content of turn {number} is a list whose part {position}"
            writing.picture(_shown(where, part, supply, problems))
            continue
        is_text = isinstance(part, dict) and part.get("type", "text") in _TEXTS
        text = part.get("text", part.get("value")) if is_text else None  # LLaMA-Factory says `value`
        if not isinstance(text, str):
            problems.append(_no_text(number, position, part, role))
            return None
        writing.text(text)
    return Said(writing.end_run(), writing.pictures)


def _shown(where: str, part: dict[str, Any], supply: Supply | None, problems: list[Problem]) -> Picture | None:
    """The picture of a part, its own or the next of the column."""
    if is_place(part):
        if supply is None:
            problems.append(Problem("picture", f"{where} is {quoted(part.get('type'))}, a picture that the row does "
                                               "not have", "name its file in the part, or give the row `images`"))
        return supply and supply.next(part.get("index"))
    read = reference(f"{where} is a picture, which", part)
    if isinstance(read, dict):
        return read
    problems.append(read)
    return None


def _no_text(number: int, position: int, part: Any, role: str) -> Problem:
    sort = part.get("type") if isinstance(part, dict) else None
    what = kind(part) if sort is None else quoted(sort)
    if is_part(part):
        return Problem("picture", f"the content of turn {number} is a list whose part {position} is a picture, and the "
                                  f"turn is the {role}'s", "pictures are learned in turns of the user alone: move it "
                                                           "there, or leave the row out")
    return Problem("not_text", f"the content of turn {number} is a list whose part {position} is "
                               f"{'a bare text' if isinstance(part, str) else f'{what}, not text'}", _fix(sort))


def _fix(sort: Any) -> str:
    """What to do about a part of that type, which is no text."""
    if sort in NO_TEXT:
        return "text and pictures alone are learned: leave the part out, or the row"
    if sort in _OF_TOOLS:
        return "write a call as `tool_calls` of the assistant's turn, and its result as a turn of the role `tool`"
    if sort in THOUGHTS:
        return "write a thought as `reasoning_content` of the assistant's turn, which is a text"
    return 'write each part as {"type": "text", "text": "…"}, or the content as one text'
