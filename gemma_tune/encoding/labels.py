"""From rendered text, in which some stretches are to be learned, to token ids and the ranges of tokens that are.

The model is asked with a prompt that was tokenised by itself, so the tokens of the prompt must be the first ones of the
sequence, whatever the answer begins with. Each text is tokenised once, as a whole; that its tokens respect the borders
is then read off the special tokens: a tokenizer cuts a text at them, so what stands between two of them has the same
tokens everywhere. Only where a token would reach over a border, the parts are tokenised one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

IGNORE_INDEX = -100  # as in torch and in gemma_tune.train.loss, which is not imported here as it loads torch
# Ends of prompts that are remembered. They are as short as "<start_of_turn>model\n", and there are few.
_LONGEST_TAIL, _MOST_TAILS = 200, 16


class FormatError(Exception):
    """This conversation cannot be rendered or labelled faithfully; the text says why. The row is rejected.

    Attributes:
        about_tools: the template has no place for the tools, calls or results of the conversation, or not for all of
            them. The text cannot tell: it may quote the conversation.
        about_reasoning: it has no place for reasoning under a key of its own.
        fix: what to do about it, where these do not say it.
    """

    def __init__(self, reason: str, *, about_tools: bool = False, about_reasoning: bool = False, fix: str = ""):
        super().__init__(reason)
        self.about_tools, self.about_reasoning, self.fix = about_tools, about_reasoning, fix


@dataclass(frozen=True, eq=False)
class Encoded:
    """A sequence for training.

    Args:
        ids: token ids, int32.
        spans: int32 of shape (k, 2): the ranges of tokens that are learned, half open and ascending.
        pictures: files of its pictures in order, each with the index behind its last token.
    """

    ids: np.ndarray
    spans: np.ndarray
    pictures: tuple[tuple[str, int], ...] = ()

    @property
    def labels(self) -> list[int]:
        """As long as ``ids``: the id itself, or -100 where nothing is learned."""
        return labels_of(self.ids, self.spans).tolist()

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def labels_of(ids: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Labels (int64): the id inside the spans, -100 elsewhere.

    Args:
        spans: starts and ends of ranges, as pairs or one after the other.
    """
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    for start, end in np.asarray(spans).reshape(-1, 2):
        labels[start:end] = ids[start:end]
    return labels


@dataclass(frozen=True)
class Draft:
    """The text of a sequence, which ends with the last thing that is learned.

    Args:
        text: prompts and answers, with all special tokens.
        learned: (start, end, mark): character ranges, half open and ascending, each ending with the special token
            ``mark``; the text up to ``start`` is the prompt as it is when the model is asked.
        pictures: files of the pictures in it, in order.
    """

    text: str
    learned: tuple[tuple[int, int, str], ...]
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tail:
    """The end of a prompt from a special token on; its ids do not depend on what stands before it."""

    text: str
    mark: str
    ids: list[int]


class Labeller:
    """Tokenises drafts.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tails: list[_Tail] = []

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text. The template writes the BOS, so the tokenizer must not add a second one."""
        [ids] = self._tokenise([text])
        return ids

    def encode(self, drafts: Sequence[Draft]) -> list[Encoded | FormatError]:
        """One result for each draft, from one call of the tokenizer for all of them."""
        return [self._encoded(draft, ids) for draft, ids in zip(drafts, self._tokenise([d.text for d in drafts]))]

    def encode_texts(self, texts: Sequence[str], bos: bool = False) -> list[Encoded]:
        """Plain texts between what the tokenizer puts before one by itself (a BOS, or nothing) and the end of text.

        Args:
            bos: the chat template writes a BOS; then a text begins with one, too, whatever the tokenizer does.
        """
        before, after = self._around
        if bos and not before:
            before = [self._tokenizer.bos_token_id]
        results = []
        for ids in self._tokenise(texts):
            whole = np.array([*before, *ids, *after], np.int32)
            first = max(1, len(before))  # nothing stands before the first token that could predict it
            results.append(Encoded(whole, np.array([[first, max(first, len(whole))]], np.int32)))
        return results

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        bare = self.ids("a")
        added = self._tokenizer("a").input_ids
        before = next((added[:n] for n in range(len(added)) if added[n:n + len(bare)] == bare), [])
        eos = self._tokenizer.eos_token_id
        return before, [] if eos is None else [eos]

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        # tokenizer.json may ask for both, and any call of the tokenizer with padding leaves it switched on.
        self._backend.no_padding()
        self._backend.no_truncation()
        # The fast one does without the tokens' places in the text.
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encoded(self, draft: Draft, ids: list[int]) -> Encoded | FormatError:
        whole = np.array(ids, np.int32)
        if (spans := self._spans(draft, ids, whole)) is not None:
            return Encoded(whole, np.array(spans, np.int32).reshape(-1, 2))
        try:
            ids, spans = self.piecewise(draft)
        except FormatError as e:
            return e
        return Encoded(np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2))

    def _spans(self, draft: Draft, ids: list[int], whole: np.ndarray) -> list[tuple[int, int]] | None:
        """Where the learned ranges lie in the tokens of the whole text; None where a token reaches over a border."""
        marks = _Marks(self._backend, draft.text, whole)
        spans = []
        for start, end, mark in draft.learned:
            first, last = self._after_prompt(draft.text, start, ids, marks), marks.index(mark, end)
            if first is None or last is None or not first <= last:
                return None
            spans.append((first, last + 1))
        return spans

    def _after_prompt(self, text: str, start: int, ids: list[int], marks: _Marks) -> int | None:
        """Number of tokens of the prompt ``text[:start]``, if the ids begin with exactly these; else None."""
        for tail in self._tails:
            if text.endswith(tail.text, 0, start):
                at = marks.index(tail.mark, start - len(tail.text) + len(tail.mark))
                if at is None or ids[at:at + len(tail.ids)] != tail.ids:
                    return None
                return at + len(tail.ids)
        prompt = self.ids(text[:start])
        self._remember_tail(text[:start], prompt)
        return len(prompt) if ids[:len(prompt)] == prompt else None

    def _remember_tail(self, prompt: str, ids: list[int]) -> None:
        at = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in self._special), None)
        if at is None or len(self._tails) == _MOST_TAILS:
            return
        mark = self._backend.id_to_token(ids[at])
        begin = prompt.rfind(mark)
        if begin >= 0 and len(prompt) - begin <= _LONGEST_TAIL:
            self._tails.append(_Tail(prompt[begin:], mark, self.ids(prompt[begin:])))

    def piecewise(self, draft: Draft) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and learned ranges, border by border: what :meth:`encode` must give as well, only slower.

        Raises:
            FormatError: the end of a turn would not be learned.
        """
        ids: list[int] = []
        spans, done = [], 0
        for start, end, mark in draft.learned:
            ids = self._continue(ids, draft.text[:done], draft.text[:start])
            first = len(ids)
            ids = self._continue(ids, draft.text[:start], draft.text[:end])
            if len(ids) == first or ids[-1] != self._backend.token_to_id(mark):
                raise FormatError(f"the answer would be learned without its end ({mark})")
            spans.append((first, len(ids)))
            done = end
        return ids, spans

    def _continue(self, ids: list[int], text: str, longer: str) -> list[int]:
        """Ids of ``longer`` that start with ``ids``, the ids of its prefix ``text``.

        When the model answers, it has seen the prefix tokenised by itself. If a token of the whole text would reach
        over that border, the rest is tokenised separately, as it happens then.
        """
        whole = self.ids(longer)
        if whole[:len(ids)] == ids:
            return whole
        return ids + self.ids(longer[len(text):])


class _Marks:
    """Special tokens in a text and in its ids: the n-th there is the n-th here."""

    def __init__(self, backend: Any, text: str, ids: np.ndarray):
        self._backend, self._text, self._ids = backend, text, ids
        self._found: dict[str, list[int]] = {}

    def index(self, mark: str, end: int) -> int | None:
        """Index of the token for the ``mark`` that ends at this character; None if text and ids disagree."""
        if mark not in self._found:
            places = np.flatnonzero(self._ids == self._backend.token_to_id(mark)).tolist()
            self._found[mark] = places if len(places) == self._text.count(mark) else []
        places = self._found[mark]
        return places[self._text.count(mark, 0, end) - 1] if places else None
