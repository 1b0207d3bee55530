"""Reasoning in chat templates: the switch for it, and prompts that open a thought or rule one out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.labels import FormatError
from gemma_tune.encoding.left_out import QUESTION

# Put in front of a template, so that the choice is saved with it and holds wherever the model is used.
_SWITCH = "enable_thinking"
_CHOICE = "{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {} -%}}{{%- endif -%}}"
# Put behind a template without a switch: what its prompts end with.
_ENDING = "{{%- if add_generation_prompt -%}}{{{{- '{}' -}}}}{{%- endif -%}}"
_ENDED = re.compile(re.escape(_ENDING.format("*")).replace(r"\*", r"((?:<think>|</think>|\\n)+)") + r"\Z")
_EMPTY_AT_END = re.compile(r"(<\|channel>thought\s*<channel\|>|<think>\s*</think>)\s*\Z")
_OPEN_AT_END = re.compile(r"(<\|channel>thought|<think>)\s*\Z")
_OPENED = re.compile(r"<\|channel>|<think>")
_BEGIN, _END = "<think>", "</think>"
_WORDS = "gemma reasoning"


def no_reasoning(why: str = "the prompt asks for an answer without reasoning") -> FormatError:
    """The error for an answer with reasoning where there is to be none."""
    return FormatError(f"{why} (thinking is off), and this one has some",
                       fix="prepare with --thinking on, or remove the reasoning from the turn")


def with_thinking(template: str, thinking: str) -> str:
    """The template with a choice in front, in place of an earlier one, where it has the switch.

    Args:
        thinking: ``on``, ``off``, or ``auto``, which leaves it as it is.
    """
    if thinking == "auto":
        return template
    for earlier in ("true", "false"):
        template = template.removeprefix(_CHOICE.format(earlier))
    template = _ENDED.sub("", template)
    return _CHOICE.format("true" if thinking == "on" else "false") + template if has_switch(template) else template


def has_switch(template: str) -> bool:
    """Whether a request can choose how prompts ask for reasoning."""
    return _SWITCH in template


def ended(template: str, thinking: str, prompt: str, always: bool) -> str:
    """A template without a switch whose prompts begin a thought, or end with an empty one, as a switch would have it.

    Args:
        thinking: ``on`` or ``off``.
        prompt: as it is now.
        always: whether its model thinks where the prompt does not say so, see :func:`takes_thoughts_out`.

    Raises:
        UserError: ``on`` for a template that knows of no thoughts.
    """
    opened = opened_thought(prompt).startswith(_BEGIN)
    if thinking == "on":
        if not opened and not always:
            raise UserError(f"this model's chat template has no switch for thinking ({_SWITCH}), so it cannot be "
                            "turned on", "leave --thinking out: reasoning of the rows is learned where the template "
                            "has a place for it; or use a model with the switch, such as Gemma 4 or Qwen 3")
        more = "" if opened else f"{_BEGIN}\n"
    elif opened:
        more = written_thought(prompt, "")
    else:
        more = f"{_BEGIN}\n\n{_END}\n\n" if always else ""
    return template + _ENDING.format(more.replace("\n", "\\n")) if more else template


def choice_in(template: str) -> bool | None:
    """The choice that :func:`with_thinking` put in front, or :func:`ended` behind; None without one."""
    if found := _ENDED.search(template):
        return _END not in found[1]
    return next((value == "true" for value in ("true", "false") if template.startswith(_CHOICE.format(value))), None)


def settled(template: str, thinking: bool | None) -> str:
    """The template of a GGUF file: thinking stands as in training, whatever the program that reads the file says.

    llama.cpp always gives ``enable_thinking`` a value, by itself true: a choice for where there is none never holds
    there, and a template that is silent on thinking (Gemma 4) asks for it. Where the template writes no turn's
    reasoning (Hunyuan), llama.cpp takes it for one that cannot think, and says false.

    Args:
        thinking: how the template's switch stands where nobody sets it; None without a switch.
    """
    choice = choice_in(template)
    left = choice is None and thinking and "reasoning_content" in template
    if thinking is None or left or not has_switch(template):
        return template
    value = "true" if thinking else "false"
    return "{%- set enable_thinking = " + value + " -%}" + template.removeprefix(_CHOICE.format(value))


def closed_thought(prompt: str) -> bool:
    """Whether a prompt ends with an empty thought, by which the model is told not to think."""
    return bool(_EMPTY_AT_END.search(prompt))


def opened_thought(prompt: str) -> str:
    """The beginning of a thought with which a prompt ends; empty where it ends otherwise."""
    found = _OPEN_AT_END.search(prompt)
    return found[0] if found else ""


def takes_thoughts_out(render: Callable[[Sequence[dict[str, Any]]], str]) -> bool:
    """Whether a template takes reasoning out of an answer's text, and writes it nowhere: DeepSeek R1's, QwQ's.

    Earlier answers are to be written so, and the model was made to write more: a thought, then the answer.

    Args:
        render: messages → text.
    """
    turns = ({"content": f"{_BEGIN}\n{_WORDS}\n{_END}\n\na"},
             {"content": "a", "reasoning_content": _WORDS, "thinking": _WORDS})
    try:
        return not any(_WORDS in render([QUESTION, {"role": "assistant", **turn}]) for turn in turns)
    except FormatError:
        return False


def marks_otherwise(render: Callable[[Sequence[dict[str, Any]]], str]) -> bool:
    """Whether a template writes reasoning between marks of its own, and those of R1 and Qwen as a part of the answer:
    GPT-OSS's, Gemma 4's.

    Args:
        render: messages → text.
    """
    inside = {"content": f"{_BEGIN}\n{_WORDS}\n{_END}\n\na"}
    beside = {"content": "a", "reasoning_content": _WORDS, "thinking": _WORDS}
    try:
        written, own = (render([QUESTION, {"role": "assistant", **turn}]) for turn in (inside, beside))
    except FormatError:
        return False
    return _BEGIN in written and _WORDS in own and _BEGIN not in own


def apart(turn: dict[str, Any], opened: bool) -> dict[str, Any]:
    """An assistant's turn whose text begins with a thought, with that under its own key, less the line breaks at its
    marks; others as they are.

    Args:
        opened: whether prompts begin the thought, so that an answer can be without its beginning.
    """
    text = turn["content"].lstrip()
    thought, end, said = text.removeprefix(_BEGIN).partition(_END)
    if not end or turn["role"] != "assistant" or "reasoning_content" in turn:
        return turn
    if not (opened or text.startswith(_BEGIN)) or _BEGIN in thought or _END in said:  # it talks about such marks
        return turn
    own = {"reasoning_content": thought.strip("\r\n")} if thought.strip() else {}
    return {**turn, "content": said.lstrip("\r\n"), **own}


def written_thought(prompt: str, reasoning: str) -> str:
    """What a model writes before an answer where its template shows no thoughts: one in the form of DeepSeek R1 and
    Qwen, an empty one only where the prompt has opened it."""
    reasoning = reasoning.strip("\n")
    if opened := opened_thought(prompt):
        lines = "\n" if opened.endswith("\n") else ""
        return f"{reasoning}{lines}{_END}{2 * lines}"
    return f"{_BEGIN}\n{reasoning}\n{_END}\n\n" if reasoning else ""


def answer_after(prompt: str, full: str, bare: bool = False) -> str:
    """What the model is to write after the prompt, read from a render that includes the turn.

    Some prompts end with an empty thought, by which the model is told not to think, and that is not written again with
    the turn itself (Gemma 4's larger ones): the answer is then learned after the prompt as it is served.

    Args:
        bare: whether a thought that the prompt opens is no part of the turn, see :func:`takes_thoughts_out`.

    Raises:
        FormatError: the template does not write the turn after the prompt.
    """
    if bare:
        prompt = prompt.removesuffix(opened_thought(prompt))
    if full.startswith(prompt):
        return full[len(prompt):]
    empty = _EMPTY_AT_END.search(prompt)
    if empty and full.startswith(prompt[:empty.start()]):
        answer = full[empty.start():]
        if not _OPENED.match(answer):
            return answer
        raise no_reasoning()
    opened = "; the prompt opens a thought, and this answer begins without" if opened_thought(prompt) else ""
    raise FormatError(first_difference(prompt, full) + opened)


def first_difference(prompt: str, full: str) -> str:
    """What a template writes at first, and what in its place later, as a sentence."""
    n = next((n for n, (a, b) in enumerate(zip(prompt, full)) if a != b), min(len(prompt), len(full)))
    return (f"the chat template is not prefix-consistent: it writes {prompt[n:n + 30]!r} at first, and "
            f"{full[n:n + 30]!r} in its place once the next turn is there (character {n})")
