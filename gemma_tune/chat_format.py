"""From a conversation to token ids and labels, for any chat template.

What is trained is defined by the template itself: the prompt up to an assistant turn must be a prefix of the render
that includes the turn, and the difference, up to and including the turn's terminator, is what the model learns to
write. So the ids in training are those that the model sees when it is asked, and every answer is learned with its
end (a Gemma whose mask leaves `<end_of_turn>` out never stops).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.loss import IGNORE_INDEX
from gemma_tune.templates import family_template

Messages = Sequence[dict[str, str]]


class FormatError(Exception):
    """This conversation cannot be rendered or labelled faithfully; the text says why. The row is rejected."""


@dataclass(frozen=True)
class Encoded:
    """One conversation: ``ids`` and ``labels`` of equal length; a label is the id, or -100 where nothing is learned."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class ChatFormat:
    """A tokenizer with the chat template that is used everywhere: training, chat, merge and export.

    Args:
        tokenizer: a fast transformers tokenizer; its ``chat_template`` is set when it has none.
        model_type: ``model_type`` of the model's config.json, which names the family.
        other_stop_ids: ids that end an answer by the model's generation settings (Llama 3 has three).

    Raises:
        UserError: no template known, or one that does not end an assistant's turn.
    """

    def __init__(self, tokenizer: Any, model_type: str, other_stop_ids: Sequence[int] = ()):
        self.tokenizer, self.other_stop_ids = tokenizer, tuple(other_stop_ids)
        self.template_origin = "the model's own"
        if not tokenizer.chat_template:
            tokenizer.chat_template = family_template(model_type)
            self.template_origin = f"gemma-tune's for {model_type}: this base model has none"
        if not tokenizer.chat_template:
            raise UserError(f"this model ({model_type}) has no chat template, so a conversation cannot be rendered",
                            "use an instruction-tuned version of it (often named …-it or …-Instruct)")
        if not isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = tokenizer.get_chat_template()
        self.template: str = tokenizer.chat_template
        self._markers: list[str] | None = None
        self.folds_system = False
        self.folds_system = not self._shows_system()
        self.terminator_id = self._find_terminator()

    @property
    def terminator(self) -> str:
        """The token that ends an assistant's turn, such as ``<end_of_turn>``."""
        return self.tokenizer.convert_ids_to_tokens(self.terminator_id)

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: the turn's terminator, the end of text, and what else ends the base's."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.terminator_id, *self.other_stop_ids, *([] if eos is None else [eos])})

    @property
    def markers(self) -> list[str]:
        """Special tokens that the template writes, longest first; none of them belongs in a turn's text."""
        if self._markers is None:
            special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special and str(t).strip()}
            ends = {self.terminator, self.tokenizer.bos_token, self.tokenizer.eos_token}
            used = {t for t in special if t in self.template} | {t for t in ends if t}
            self._markers = sorted(used, key=lambda t: (-len(t), t))
        return self._markers

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """The conversation as text; with ``prompt`` it ends where the assistant is to begin.

        Raises:
            FormatError: if the template refuses the conversation.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(self._folded(messages), tokenize=False,
                                                      add_generation_prompt=prompt)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as e:
            raise FormatError(f"the chat template refuses it: {e}") from e

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the prompt for the next answer, with exactly one BOS."""
        return self._ids(self.render(messages, prompt=True))

    def encode(self, messages: Messages) -> Encoded:
        """Ids and labels of a conversation; every assistant turn is learned with its terminator.

        Raises:
            FormatError: when the template is not prefix-consistent on it, leaves out a part of an answer (some drop
                reasoning), or a turn's end would not be learned.
        """
        ids: list[int] = []
        labels: list[int] = []
        text = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, full = self.render(messages[:i], prompt=True), self.render(messages[:i + 1])
            if not full.startswith(prompt) or not prompt.startswith(text):
                raise FormatError(_prefix_problem(prompt, full) if not full.startswith(prompt)
                                  else _prefix_problem(text, prompt))
            prompt_ids = self._continue(ids, text, prompt)
            full_ids = self._continue(prompt_ids, prompt, full)
            _refuse_lost_text(message["content"], full[len(prompt):])
            end = self._end_of_turn(full_ids, len(prompt_ids))
            labels += [IGNORE_INDEX] * (len(prompt_ids) - len(ids))
            labels += full_ids[len(prompt_ids):end] + [IGNORE_INDEX] * (len(full_ids) - end)
            ids, text = full_ids, full
        # White space after the last terminator is never predicted and never seen when the model answers.
        end = max((n for n, label in enumerate(labels) if label != IGNORE_INDEX), default=-1) + 1
        return Encoded(ids[:end], labels[:end])

    def _continue(self, ids: list[int], text: str, longer: str) -> list[int]:
        """Ids of ``longer`` that start with ``ids``, the ids of its prefix ``text``.

        When the model answers, it has seen the prefix tokenised by itself. If a token of the whole text would reach
        over that border, the rest is tokenised separately, as it happens then.
        """
        whole = self._ids(longer)
        if whole[:len(ids)] == ids:
            return whole
        return ids + self.tokenizer(longer[len(text):], add_special_tokens=False).input_ids

    def _ids(self, text: str) -> list[int]:
        """Ids of a rendered text. The template writes the BOS, so the tokenizer must not add a second one."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        for n in range(len(ids) - 1, start - 1, -1):
            if ids[n] == self.terminator_id:
                return n + 1
        raise FormatError(f"the answer would be learned without its end ({self.terminator})")

    def _folded(self, messages: Messages) -> list[dict[str, str]]:
        """For templates without a place for a system message, put it before the first user turn, as Gemma 3's does."""
        messages = list(messages)
        if not (self.folds_system and len(messages) > 1 and messages[0]["role"] == "system"):
            return messages
        system, first, *rest = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _shows_system(self) -> bool:
        """Whether the template writes a system message; some refuse it, and some leave it out in silence."""
        system, question = {"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}
        try:
            return system["content"] in self.render([system, question], prompt=True)
        except FormatError:
            return False

    def _find_terminator(self) -> int:
        """The first special token after an answer, read from the template itself."""
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "gemma"}
        try:
            prompt, full = self.render([question], prompt=True), self.render([question, answer])
        except FormatError as e:
            raise UserError(f"the model's chat template cannot be used: {e}",
                            "mend its chat_template.jinja, or use another model") from e
        if not full.startswith(prompt):
            raise UserError(_prefix_problem(prompt, full),
                            "such a model cannot be trained faithfully; use one whose chat template has no such case")
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        tail = full[len(prompt):].partition("gemma")[2]
        for token in self.tokenizer(tail, add_special_tokens=False).input_ids:
            if token in special and self.tokenizer.decode([token]).strip():
                return token
        raise UserError("the chat template does not end an assistant's turn with a special token, so a model trained "
                        "on it could never stop", "use a model whose template marks the end of a turn")


def _prefix_problem(shorter: str, longer: str) -> str:
    n = next((n for n, (a, b) in enumerate(zip(shorter, longer)) if a != b), min(len(shorter), len(longer)))
    return (f"the chat template is not prefix-consistent: it writes {shorter[n:n + 30]!r} at first, and "
            f"{longer[n:n + 30]!r} in its place once the next turn is there (character {n})")


def _refuse_lost_text(answer: str, rendered: str) -> None:
    """White space may change; words may not vanish."""
    if "".join(answer.split()) not in "".join(rendered.split()):
        raise FormatError("the chat template leaves out a part of the answer, such as its reasoning")
