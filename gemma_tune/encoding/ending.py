"""How a chat template begins and ends an answer, read from what it writes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from gemma_tune.encoding.labels import FormatError
from gemma_tune.encoding.left_out import CALL, QUESTION, RESULT, TOOLS, Messages, Tools
from gemma_tune.encoding.thinking import answer_after
from gemma_tune.encoding.unusable import Refusals

_ANSWER = {"role": "assistant", "content": "gemma"}


@dataclass(frozen=True)
class Ending:
    """What stands around an answer.

    Attributes:
        terminator_id: the first special token after an answer, or that the next turn begins with.
        calls_end_id: the special token that ends a turn with tool calls, as far as the template has these. It is the
            terminator in most templates; Gemma 4 goes on with the results, and its calls end where they begin.
        in_next: whether the mark that ends an answer is what the next turn begins with.
        lead: white space that an answer begins with, and that is no part of its text (GLM's line break).
        channel: the marks in front of what people are to read (GPT-OSS's final channel).
    """

    terminator_id: int
    calls_end_id: int | None
    in_next: bool
    lead: str
    channel: str


@dataclass(frozen=True)
class Reader:
    """Reads the :class:`Ending` of a template.

    Args:
        tokenizer: a fast transformers tokenizer.
        ids: text → token ids.
        render: messages, tools and whether to end where the assistant begins → text.
        other_stop_ids: ids that end an answer by the model's generation settings.
        takes_thoughts_out: see :func:`gemma_tune.encoding.thinking.takes_thoughts_out`.
        refusals: for a template that cannot be used.
    """

    tokenizer: Any
    ids: Callable[[str], list[int]]
    render: Callable[[Messages, Tools, bool], str]
    other_stop_ids: Collection[int]
    takes_thoughts_out: bool
    refusals: Refusals

    def read(self) -> Ending:
        """What it is.

        Raises:
            UserError: the template cannot be rendered, does not end an answer, or is made for another model.
        """
        prompt, answer = self._answer()
        head, _, tail = answer.partition("gemma")
        last = self._special_ids(head)[-1:]
        shown = self.tokenizer.decode(self.ids(head), skip_special_tokens=True).strip()
        special, in_next = self._special_ids(tail), False
        if not special:
            following = None if tail.strip() else self._beginning_of(QUESTION, [QUESTION, _ANSWER])
            if following is None or following not in self.other_stop_ids:
                mark = next(iter(tail.split()), "")
                raise self.refusals.endless(mark, len(self.ids(mark)), following)
            special, in_next = [following], True
        if self.refusals.named is not None:
            behind = tail.partition(self.tokenizer.decode(special[:1]))[0]
            self.refusals.refuse_misfit(head, behind, prompt != self._asked())
        return Ending(special[0], self._calls_end(special[0], in_next), in_next, head if head.isspace() else "",
                      head if shown and last and head.endswith(self.tokenizer.decode(last)) else "")

    def _answer(self) -> tuple[str, str]:
        """A prompt, and what is to be written after it."""
        try:
            prompt, full = self.render([QUESTION], None, True), self.render([QUESTION, _ANSWER], None, False)
        except FormatError as e:
            raise self.refusals.unusable(e.__cause__ or e) from e
        try:
            return prompt, answer_after(prompt, full, self.takes_thoughts_out)
        except FormatError as e:
            raise self.refusals.unusable(e) from e

    def _asked(self) -> str | None:
        """A conversation that ends with a question, which some templates refuse."""
        try:
            return self.render([QUESTION], None, False)
        except FormatError:
            return None

    def _calls_end(self, terminator: int, in_next: bool) -> int | None:
        if in_next:
            found = self._beginning_of(RESULT, [QUESTION, CALL], TOOLS)
            return found if found in self.other_stop_ids else None
        try:
            prompt, full = self.render([QUESTION], TOOLS, True), self.render([QUESTION, CALL], TOOLS, False)
            answer = answer_after(prompt, full, self.takes_thoughts_out).rstrip()
        except FormatError:
            return None
        special = self._special_ids(answer)
        if not special or terminator in special:
            return terminator if special else None
        return special[-1] if answer.endswith(self.tokenizer.convert_ids_to_tokens(special[-1])) else None

    def _beginning_of(self, turn: dict[str, Any], turns: Messages, tools: Tools = None) -> int | None:
        """The special token with which a turn begins behind others."""
        try:
            shorter, longer = self.render(turns, tools, False), self.render([*turns, turn], tools, False)
        except FormatError:
            return None
        special = self._special_ids(longer.removeprefix(shorter))
        begins = special and longer.startswith(shorter + self.tokenizer.convert_ids_to_tokens(special[0]))
        return special[0] if begins else None

    def _special_ids(self, text: str) -> list[int]:
        """The special tokens in a text, less those that stand for white space."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return [i for i in self.ids(text) if i in special and self.tokenizer.decode([i]).strip()]
