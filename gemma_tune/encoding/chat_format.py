"""From a conversation to token ids and labels, for any chat template.

What is trained is defined by the template itself: the prompt up to an assistant turn must be a prefix of the render
that includes the turn, and the difference, up to and including the turn's terminator, is what the model learns to
write. So the ids in training are those that the model sees when it is asked, and every answer is learned with its
end (a Gemma whose mask leaves `<end_of_turn>` out never stops).

GLM's templates write nothing behind an answer: the next turn begins with what ends it, `<|user|>` or `<|observation|>`,
so the model learns to write that.

Where a template writes earlier turns differently once later ones are there (Qwen 3 and Gemma 4 drop their reasoning),
a conversation becomes several sequences, each with the prompt that the model will be shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.bounds import Slow
from gemma_tune.encoding.ending import Reader
from gemma_tune.encoding.eye import PICTURES, Eye, pictures_of, with_parts
from gemma_tune.encoding.labels import Draft, Encoded, FormatError, Labeller
from gemma_tune.encoding.left_out import (
    QUESTION,
    Messages,
    Tools,
    kinds_in,
    left_out_kinds,
    refuse_ignored,
    refuse_lost_answer,
    refuse_lost_question,
)
from gemma_tune.encoding.named_templates import DEFAULT, NO_TOOLS, TOOL_USE, chosen
from gemma_tune.encoding.rendering import compiled
from gemma_tune.encoding.templates import family_template
from gemma_tune.encoding.thinking import (
    answer_after,
    apart,
    closed_thought,
    ended,
    first_difference,
    has_switch,
    marks_otherwise,
    no_reasoning,
    opened_thought,
    takes_thoughts_out,
    with_thinking,
    written_thought,
)
from gemma_tune.encoding.unusable import Refusals, fitting
from gemma_tune.encoding.white_space import REASONING, divided, written_margins

_MARK = re.compile(r"<\|?\w+\|?>")
_MOST_MARGINS = 1000  # kinds of white space around texts that are remembered


class NoTemplate(UserError):
    """A base model that has no chat template, and was given none."""


class ChatFormat:
    """A tokenizer with the chat template that is used everywhere: training, chat, merge and export.

    Args:
        tokenizer: a fast transformers tokenizer; its ``chat_template`` is set when it has none.
        model_type: ``model_type`` of the model's config.json, which names the family.
        other_stop_ids: ids that end an answer by the model's generation settings (Llama 3 has three).
        thinking: ``on`` and ``off`` are written into the template, ``auto`` leaves it as it is.
        template: Jinja source in the place of the tokenizer's own.
        named: what that is called in messages, such as its file.

    Attributes:
        eye: what the model sees pictures with; None where it takes text alone.
        new_tokens: entries of the vocabulary that got names of one's own, by id, with the ids that their text had.

    Raises:
        NoTemplate: the tokenizer has none, and none is known for the family.
        UserError: several templates of which none is `default`, one that does not end an assistant's turn, one
            without a switch for thinking where it is to be on, or a tokenizer of the slow kind.
    """

    def __init__(self, tokenizer: Any, model_type: str, other_stop_ids: Sequence[int] = (), thinking: str = "auto",
                 template: str | None = None, named: str = "that was named"):
        self.tokenizer, self.other_stop_ids, self.thinking = tokenizer, tuple(other_stop_ids), thinking
        self.eye: Eye | None = None
        self.new_tokens: dict[int, list[int]] = {}
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(f"this model's tokenizer ({type(tokenizer).__name__}) has no tokenizer.json",
                            "convert it with transformers, or use another model")
        self.template_origin = "the model's own"
        self._refusals = Refusals(tokenizer, None if template is None else named,
                                  bool(tokenizer.chat_template or family_template(model_type)))
        if template is not None:
            tokenizer.chat_template, self.template_origin = template, "the one that was named"
        if not tokenizer.chat_template:
            tokenizer.chat_template = family_template(model_type)
            self.template_origin = f"gemma-tune's for {model_type}: this base model has none"
        if not tokenizer.chat_template:
            raise NoTemplate(f"this model ({model_type}) has no chat template, so a conversation cannot be rendered",
                             "use an instruction-tuned version of it (often named …-it or …-Instruct), or give it one, "
                             "beside your data and --model: gemma-tune prepare … --chat-template "
                             f"{fitting(tokenizer)}; plain text alone, of .txt and .md files or with --format text, "
                             "needs none")
        self._variables = {**tokenizer.special_tokens_map, "documents": None}
        self.tools_advice = ""  # what to do about tools where another template of the model is meant for them
        if not isinstance(tokenizer.chat_template, str):
            self._choose_template(tokenizer.chat_template)
        self._labeller = Labeller(tokenizer)
        self._use(with_thinking(tokenizer.chat_template, thinking))
        self._margins: dict[tuple[str, str, str], tuple[str, str]] = {}
        self.folds_system = self._takes_thoughts_out = self._opens_thoughts = self._begins_thoughts = False
        self._has_other_marks = False
        self.folds_system = not self._shows_system()
        self._takes_thoughts_out = takes_thoughts_out(self.render)
        self._has_other_marks = marks_otherwise(self.render)
        if thinking != "auto" and not has_switch(self.template):
            self._use(ended(self.template, thinking, self.render([QUESTION], prompt=True), self._takes_thoughts_out))
        if self._takes_thoughts_out:
            prompt = self.render([QUESTION], prompt=True)
            self._opens_thoughts = bool(opened_thought(prompt))
            self._begins_thoughts = self._opens_thoughts or closed_thought(prompt)
        self._ending = Reader(tokenizer, self._labeller.ids, self._render, self.other_stop_ids,
                              self._takes_thoughts_out, self._refusals).read()
        self.terminator_id, self.calls_end_id = self._ending.terminator_id, self._ending.calls_end_id

    def _use(self, template: str) -> None:
        self.tokenizer.chat_template = self.template = template
        try:
            self._compiled = compiled(template)
        except TemplateError as e:
            raise self._refusals.unusable(e) from e

    def _choose_template(self, templates: dict[str, str]) -> None:
        name = chosen(templates, self._variables)
        same = f", which writes conversations without tools as `{DEFAULT}` does" if name != DEFAULT else ""
        self.template_origin = f"the model's own `{name}` of {', '.join(sorted(templates))}{same}"
        self.tools_advice = NO_TOOLS if name == DEFAULT and TOOL_USE in templates else ""
        self.tokenizer.chat_template = templates[name]

    def __getstate__(self) -> dict[str, Any]:
        # Child processes that are not forked get a copy; a compiled template cannot be copied.
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compiled = compiled(self.template)

    def has_unthought(self, messages: Messages, train_on: str = "all") -> bool:
        """Whether an answer without reasoning is to be learned behind a thought that the prompt begins."""
        return self._opens_thoughts and any(
            "reasoning_content" not in apart(messages[n], True) for n in _learned_turns(messages, train_on))

    @cached_property
    def terminator(self) -> str:
        """The token that ends an assistant's turn, such as ``<end_of_turn>``."""
        return self.tokenizer.convert_ids_to_tokens(self.terminator_id)

    @cached_property
    def turns_begin_with_bos(self) -> bool:
        """Whether BOS is in each turn, as in Seed-OSS's; elsewhere there is one, before all."""
        bos = self.tokenizer.bos_token
        try:
            return bool(bos) and self.render([QUESTION, {"role": "assistant", "content": "a"}, QUESTION]).count(bos) > 1
        except FormatError:
            return False

    def decoded(self, ids: Sequence[int]) -> str:
        """What a model wrote, for :meth:`said`: without special tokens, unless these tell what is said."""
        return self.tokenizer.decode(ids, skip_special_tokens=not self._ending.channel)

    def said(self, answer: str, whole: bool = True) -> str:
        """An answer's text, without white space that the template itself writes between a prompt and an answer: as a
        turn of a conversation the text would have it twice. Of several channels it is what the last one says, to which
        reasoning does not belong; where a model wrote nothing there, it is everything.

        Args:
            answer: what the model wrote, decoded as :meth:`decoded` does or as llama.cpp does.
            whole: whether that is all; else it may be the first characters.
        """
        if self._ending.channel:
            _, found, text = answer.partition(self._ending.channel)
            return text if found else self._without_marks(answer) if whole else ""
        return "" if self._ending.lead.startswith(answer) else answer.removeprefix(self._ending.lead)

    def _without_marks(self, text: str) -> str:
        for mark in self.markers:
            text = text.replace(mark, "")
        return text

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: the terminators, the end of text, and what else ends the base's."""
        ids = {self.terminator_id, self.calls_end_id, self.tokenizer.eos_token_id, *self.other_stop_ids}
        return sorted(ids - {None})

    @cached_property
    def markers(self) -> list[str]:
        """The tokenizer's special tokens, longest first; none of them belongs in a turn's text."""
        special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        special |= {self.terminator, self.tokenizer.bos_token, self.tokenizer.eos_token} - {None}
        return sorted((t for t in special if t.strip()), key=lambda t: (-len(t), t))

    def render(self, messages: Messages, *, prompt: bool = False, tools: Tools = None) -> str:
        """The conversation as text; with ``prompt`` it ends where the assistant is to begin.

        Raises:
            FormatError: if the template refuses the conversation.
        """
        return self._render(self._for_template(messages), tools, prompt)

    def with_thoughts_apart(self, messages: Messages) -> list[dict[str, Any]]:
        """The turns, with reasoning in an answer's text under a key of its own where the template has other marks for
        it. So programs are to send them whose prompts are compared with these."""
        if self._takes_thoughts_out or self._has_other_marks:
            return [apart(message, self._begins_thoughts) for message in messages]
        return list(messages)

    def prompt_text(self, messages: Messages, tools: Tools = None) -> str:
        """The prompt for the next answer, without the BOS that whoever tokenises it puts in front."""
        bos = "" if self.turns_begin_with_bos else self.tokenizer.bos_token or ""
        return self.render(messages, prompt=True, tools=tools).removeprefix(bos)

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Ids of the prompt for the next answer, with exactly one BOS; of a picture all tokens that stand for it.

        Raises:
            FormatError: the template refuses the conversation, or does not show its pictures.
        """
        text = self.render(messages, prompt=True, tools=tools)
        if pictures := pictures_of(messages):
            text = self._seeing.shown(text, pictures)
        return self._labeller.ids(text)

    @property
    def _seeing(self) -> Eye:
        if self.eye is None:
            raise FormatError("it has a picture, and the model takes text alone")
        return self.eye

    def refuse_left_out(self, messages: Messages, tools: Tools = None) -> None:
        """Find out that the template has a place for all of a conversation.

        Raises:
            FormatError: it leaves tools, calls or results out.
        """
        if kinds := kinds_in(messages, tools):
            refuse_ignored(kinds & self._ignored)

    def encode(self, messages: Messages, tools: Tools = None, *, train_on: str = "all") -> list[Encoded]:
        """Sequences for training: each learned assistant turn, with its terminator, is in exactly one of them.

        Args:
            messages: turns; ``"train": False`` on an assistant's keeps it from being learned.
            tools: schemas of the functions that the assistant may call.
            train_on: ``all`` or ``last``, the assistant turns that are learned.

        Raises:
            FormatError: when a prompt is not what its answer is rendered after, the template leaves out a part of the
                conversation, or a turn's end would not be learned.
        """
        [result] = self.encode_many([(messages, tools)], train_on=train_on)
        if isinstance(result, FormatError):
            raise result
        return result

    def encode_many(self, items: Sequence[tuple[Messages, Tools]], *,
                    train_on: str = "all") -> list[list[Encoded] | FormatError]:
        """As :meth:`encode`, for many conversations (messages and tools) at once."""
        drafts: list[list[Draft] | FormatError] = []
        for messages, tools in items:
            try:
                made = self.drafts(messages, tools, train_on=train_on)
                drafts.append([self._seeing.drawn(draft) if draft.pictures else draft for draft in made])
            except FormatError as e:
                drafts.append(e)
        encoded = iter(self._encoded([d for row in drafts if isinstance(row, list) for d in row]))
        results: list[list[Encoded] | FormatError] = []
        for row in drafts:
            sequences = row if isinstance(row, FormatError) else [next(encoded) for _ in row]
            failures = [s for s in sequences if isinstance(s, FormatError)] if isinstance(sequences, list) else []
            results.append(failures[0] if failures else sequences)
        return results

    def _encoded(self, drafts: Sequence[Draft]) -> list[Encoded | FormatError]:
        return [self._seeing.found(draft, result) if draft.pictures and isinstance(result, Encoded) else result
                for draft, result in zip(drafts, self._labeller.encode(drafts))]

    def encode_text(self, text: str) -> Encoded:
        """A plain text for continued training: BOS (if the tokenizer or the template adds one), the text, EOS.

        The first token is not learned.
        """
        [encoded] = self.encode_texts([text])
        return encoded

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """As :meth:`encode_text`, for many texts at once."""
        bos = self.tokenizer.bos_token
        return self._labeller.encode_texts(texts, bool(bos) and self.render([QUESTION], prompt=True).startswith(bos))

    def drafts(self, messages: Messages, tools: Tools = None, *, train_on: str = "all") -> list[Draft]:
        """The texts of the sequences of :meth:`encode`, with the ranges that are learned.

        Raises:
            FormatError: as there.
        """
        turns = self._for_template(messages)
        self.refuse_left_out(turns, tools)
        folded = len(messages) - len(turns)
        drafts: list[Draft] = []
        text, learned, seen, pictures = "", [], 0, ()
        for i in _learned_turns(messages, train_on):
            prompt, answer, mark = self._turn(turns[:i - folded + 1], tools)
            if learned and not prompt.startswith(text):
                drafts.append(Draft(text, tuple(learned), pictures))
                learned, seen = [], 0
            refuse_lost_question(turns[seen:i - folded], None if learned else tools, prompt)
            text, seen, pictures = prompt + answer, i - folded, tuple(pictures_of(messages[:i]))
            learned.append((len(prompt), len(text), mark))
        return [*drafts, Draft(text, tuple(learned), pictures)] if learned else []

    def written(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn with no more white space around its texts than the template writes."""
        changed = {}
        for name, place in (("content", turn["role"]), ("reasoning_content", REASONING)):
            before, text, after = divided(turn.get(name, ""))
            if text and (before or after):
                changed[name] = text.join(self._written_margins(place, before, after))
        return turn | changed if changed else turn

    def _written_margins(self, place: str, before: str, after: str) -> tuple[str, str]:
        if (place, before, after) not in self._margins:
            if len(self._margins) > _MOST_MARGINS:
                self._margins.clear()
            self._margins[place, before, after] = written_margins(
                lambda turns, prompt: self.render(turns, prompt=prompt), place, before, after)
        return self._margins[place, before, after]

    def difference(self, messages: Messages, tools: Tools = None, *, train_on: str = "all") -> str:
        """How the template first writes earlier turns in another way, so that a new sequence begins; empty if never."""
        drafts = self.drafts(messages, tools, train_on=train_on)
        return first_difference(drafts[0].text, drafts[1].text) if len(drafts) > 1 else ""

    def _turn(self, turns: Messages, tools: Tools) -> tuple[str, str, str]:
        """Prompt and answer of the last turn, up to its end, and the special token that ends it."""
        turn = turns[-1]
        if "reasoning_content" in turn and "tool_calls" not in turn and not turn.get("content", "").strip():
            raise FormatError("the answer holds reasoning and nothing else, so an empty one would be learned",
                              fix="leave the row out, as it seems to be cut off, or write what is to be said")
        prompt, full = self._render(turns[:-1], tools, prompt=True), self._render(turns, tools)
        if self._ending.in_next:
            calls = "tool_calls" in turn and self.calls_end_id is not None
            full += self.tokenizer.convert_ids_to_tokens(self.calls_end_id if calls else self.terminator_id)
        answer = self._answer_after(prompt, full, turns, tools)
        if self._takes_thoughts_out:
            if "reasoning_content" in turn and closed_thought(prompt):
                raise no_reasoning()
            answer = written_thought(prompt, turn.get("reasoning_content", "")) + answer
        marks = {self.terminator}
        if "tool_calls" in turn and self.calls_end_id is not None:
            marks.add(self.tokenizer.convert_ids_to_tokens(self.calls_end_id))
        end, mark = max((answer.rfind(mark), mark) for mark in marks)
        if end < 0:
            raise FormatError(f"the answer would be learned without its end ({self.terminator})")
        answer = answer[:end + len(mark)]
        refuse_lost_answer(turn, opened_thought(prompt) + answer)
        if self.thinking == "off" and "reasoning_content" in turn:
            raise no_reasoning("answers without reasoning are to be learned")
        return prompt, answer, mark

    def _answer_after(self, prompt: str, full: str, turns: Messages, tools: Tools) -> str:
        """What is to be written after a prompt.

        Where the answer is there, a template can leave out what was thought before the calls that led to it, as
        GPT-OSS's does. The answer is then read from a conversation without these thoughts, and learned after the prompt
        as it is served, which has them.

        Raises:
            FormatError: the template does not write the turn after the prompt.
        """
        try:
            return answer_after(prompt, full, self._takes_thoughts_out)
        except FormatError:
            earlier = [_unthought(turn) for turn in turns[:-1]]
            called = max((n for n, turn in enumerate(earlier) if "tool_calls" in turn), default=None)
            if called is None or earlier == turns[:-1] or self._ending.in_next:
                raise
            bare, before = self._render(earlier, tools, prompt=True), self._render(earlier[:called + 1], tools)
            answer = answer_after(bare, self._render([*earlier, turns[-1]], tools), self._takes_thoughts_out)
            # The results of the calls, and what asks for the answer.
            same_end = bare.startswith(before) and prompt.endswith(bare[len(before):])
            if not same_end or not full.endswith(answer):
                raise
            return answer

    @cached_property
    def _ignored(self) -> set[str]:
        return left_out_kinds(self._render)

    def _render(self, turns: Messages, tools: Tools = None, prompt: bool = False) -> str:
        """Render turns that :meth:`_for_template` has made, as ``apply_chat_template`` does but for its copies."""
        if not turns:
            raise FormatError("the chat template refuses it: nothing stands before the assistant's turn")
        turns = [*map(with_parts, turns)]
        try:
            return self._compiled.render(messages=turns, tools=tools or None, add_generation_prompt=prompt,
                                         **self._variables)
        except Slow as e:  # so would every other conversation: it is no row's fault
            raise self._refusals.unusable(e) from e
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                RecursionError) as e:
            with_tools = bool(tools) or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
            raise FormatError(f"the chat template refuses it: {e}", about_tools=with_tools) from e

    def _for_template(self, messages: Messages) -> list[dict[str, Any]]:
        """The turns as templates expect them.

        For templates without a place for a system message, it is put before the first user turn, as Gemma 3's does.
        """
        turns = [_plain(message) for message in self.with_thoughts_apart(messages)]
        if not (self.folds_system and len(turns) > 1 and turns[0]["role"] == "system" and turns[1]["role"] == "user"):
            return turns
        system, first, *rest = turns
        before = f"{system['content']}\n\n"
        moved = [picture | {"at": picture["at"] + len(before)} for picture in first.get(PICTURES, ())]
        return [{**first, "content": before + first["content"], **({PICTURES: moved} if moved else {})}, *rest]

    def _shows_system(self) -> bool:
        """Whether the template writes a system message; some refuse it, and some leave it out in silence."""
        system, question = {"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}
        try:
            return system["content"] in self.render([system, question], prompt=True)
        except FormatError:
            return False

    @cached_property
    def marks_of_others(self) -> list[str]:
        """What a named template writes like a special token, and is none of this model: several tokens of text."""
        marks = dict.fromkeys(_MARK.findall(self.render([QUESTION], prompt=True))) if self._refusals.named else ()
        return [mark for mark in marks if len(self._labeller.ids(mark)) > 1]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A turn with what concerns templates only; reasoning has two names there."""
    turn = {key: value for key, value in message.items() if value not in (None, []) and key != "train"}
    return {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn


def _unthought(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without reasoning, and without text beside calls, which some templates write as such."""
    turn = {key: value for key, value in turn.items() if key not in ("reasoning_content", "thinking")}
    return {**turn, "content": ""} if "tool_calls" in turn else turn


def _learned_turns(messages: Messages, train_on: str) -> list[int]:
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    return [n for n in turns if messages[n].get("train") is not False]
