"""Ollama's side of a chat template: the Jinja template that a model was trained with, as Ollama is to lay out chats.

A model answers well only to prompts laid out as in its training. Hugging Face lays them out with a Jinja template and
Ollama with a Go one, so the second is derived from the first: the Jinja template is rendered on short conversations of
marker words, what stands around each turn is read off and written as a Go TEMPLATE, and the two are compared on further
conversations. A template that cannot be matched is refused, instead of exporting a model that answers oddly.

Gemma 4 has no TEMPLATE: Ollama lays it out in its own code, whose rules are compared in the same way. Sources: Ollama's
`model/renderers/gemma4.go`, `server/renderer_resolution.go`, `model/parsers/parsers.go`, `server/images.go` (which
models can think) and `server/routes.go` (these do so unless a request says otherwise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.thinking import choice_in
from gemma_tune.ollama import harmony
from gemma_tune.ollama.go_layout import template_text
from gemma_tune.ollama.kept import NOTE as KEPT_NOTE
from gemma_tune.ollama.probe import EOS, FIRST, SWITCH, Jinja, Unlike, split, talk, without
from gemma_tune.ollama.read_turns import read_turns
from gemma_tune.ollama.thought import marks_alone, with_thought
from gemma_tune.ollama.tool_turns import conversations, read_tools
from gemma_tune.ollama.turns import Turns


@dataclass(frozen=True)
class OllamaChat:
    """How Ollama lays out a conversation for one model.

    Args:
        template: the Go TEMPLATE; None where a renderer built into Ollama does the work.
        stops: texts that end an answer.
        renderer: name of Ollama's built-in renderer, or None.
        parser: name of Ollama's built-in parser of answers, or None.
        default_system: what the Jinja template says where a conversation has no system message; belongs in SYSTEM.
        family: "gemma", "gemma4", "chatml", "llama3", "harmony", or "other" (derived, no marker known).
        notes: differences between the two templates that could not be closed, one sentence each.
        think: how the template's switch for thinking stands where nobody sets it, as in training; None without one. A
            request to a server that lists thinking among the model's capabilities has to say the same.
        tools_missing: why the TEMPLATE has no place for tools; empty where it has.
        gguf_capabilities: what an Ollama from 0.31 on takes the model to be able to do by its Jinja template.
    """

    template: str | None
    stops: tuple[str, ...]
    renderer: str | None = None
    parser: str | None = None
    default_system: str | None = None
    family: str = "other"
    notes: tuple[str, ...] = ()
    think: bool | None = None
    tools_missing: str = ""
    gguf_capabilities: frozenset[str] = frozenset()

    @property
    def capabilities(self) -> frozenset[str]:
        """What Ollama should find the model able to do, of "tools" and "thinking"."""
        if self.template is None:
            thinks = self.parser is not None and not self.parser.endswith("-no-thinking")
        else:
            thinks = ".Thinking" in self.template
        return frozenset(word for word, has in (("tools", self.takes_tools), ("thinking", thinks)) if has)

    @property
    def takes_tools(self) -> bool:
        """Whether Ollama takes requests with tools: its own layouts do, and a TEMPLATE that has a place for them."""
        return self.template is None or ".Tools" in self.template


# What opens a turn, the family it belongs to, and what ends an answer there. Looked for in this order.
FAMILIES = (
    ("<|turn>", "gemma4", "<turn|>"),
    ("<start_of_turn>", "gemma", "<end_of_turn>"),
    ("<|im_start|>", "chatml", "<|im_end|>"),
    ("<|start_header_id|>", "llama3", "<|eot_id|>"),
)


def chat_for(chat_template_jinja: str, family_hint: str | None = None, *, eos_token: str | None = None,
             bos_token: str | None = None, terminator: str = "", turns_begin_with_bos: bool = False,
             special_tokens: Mapping[str, Any] | None = None) -> OllamaChat:
    """Ollama's settings for the model that was saved with this Jinja template.

    Args:
        chat_template_jinja: the template as it was saved with the model.
        family_hint: a name for the messages; it never decides anything.
        eos_token: needed by the few templates that print `eos_token`.
        bos_token: the tokenizer's, which Ollama puts before a prompt by itself.
        terminator: what ends an answer, for templates that leave it to the next turn.
        turns_begin_with_bos: then the TEMPLATE writes them all, and the GGUF is one whose tokenizer adds none.
        special_tokens: all that the tokenizer names, as ``special_tokens_map`` has them.

    Raises:
        UserError: the template cannot be reproduced in Ollama.
    """
    family, stop = next(((f, s) for mark, f, s in FAMILIES if mark in chat_template_jinja), ("other", ""))
    try:
        jinja = Jinja(chat_template_jinja, eos_token or EOS, bos_token, turns_begin_with_bos, special_tokens)
        if family == "gemma4":
            return _gemma4(jinja, stop, choice_in(chat_template_jinja))
        if all(mark in chat_template_jinja for mark in harmony.MARKS) and (
                template := harmony.template_of(jinja, chat_template_jinja)):
            notes = () if harmony.follows_the_day(template) else _of_the_day(chat_template_jinja)
            return OllamaChat(template, harmony.STOPS, family="harmony", notes=notes,
                              gguf_capabilities=_by_words(chat_template_jinja))
        turns = read_turns(jinja)
        choice = choice_in(chat_template_jinja)
        notes, think = _compare(jinja, turns), False if choice is False else _thinking(jinja)
        turns, more, tools_missing = _extended(jinja, turns, think, choice)
        notes += more
        ending = turns.assistant[1].strip() or terminator
        if not ending:
            raise Unlike("nothing marks the end of an answer")
    except (Unlike, TemplateError) as error:
        raise UserError(
            f"the chat template of {family_hint or 'this model'} cannot be turned into an Ollama TEMPLATE: {error}",
            "Write a TEMPLATE by hand (https://docs.ollama.com/template), then run `ollama create NAME -f Modelfile`.",
        ) from error
    notes += _of_the_day(chat_template_jinja)
    if think is False and choice is None:
        notes += (_WITHOUT_THINKING,)
    stop = stop if stop and stop in ending else ending
    return OllamaChat(template_text(turns), (stop,), default_system=turns.default_system, family=family, notes=notes,
                      think=think, tools_missing=tools_missing,
                      gguf_capabilities=_by_words(chat_template_jinja))


def layout_of(chat: ChatFormat, family_hint: str | None = None) -> OllamaChat:
    """As :func:`chat_for`, of a tokenizer with its template."""
    tokenizer = chat.tokenizer
    return chat_for(chat.template, family_hint, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token,
                    terminator=chat.terminator, turns_begin_with_bos=chat.turns_begin_with_bos,
                    special_tokens=tokenizer.special_tokens_map)


def _of_the_day(source: str) -> tuple[str, ...]:
    if "strftime_now(" not in source:
        return ()
    return ("The template prints the date; here the day of the export stays in the prompt.",)


def _by_words(source: str) -> frozenset[str]:
    """As Ollama guesses from the words in a Jinja template (`server/images.go`)."""
    found = {"tools": "tools" in source or "tool_call" in source,
             "thinking": "<think>" in source and "</think>" in source}
    return frozenset(word for word, has in found.items() if has)


_WITHOUT_THINKING = (
    "Prompts ask for no thinking, as in training, whatever a program says; `prepare --thinking on` trains for it."
)


def tools_are_lost(chat: OllamaChat, rows: int) -> str | None:
    """What becomes of ``rows`` rows with tools that a model was trained on, where Ollama does not take them."""
    if not rows or chat.takes_tools:
        return None
    have = "One row has" if rows == 1 else f"{rows:,} rows have"
    why = f" ({chat.tools_missing})" if chat.tools_missing else ""
    return (f"{have} tools, and the TEMPLATE for Ollama has no place for them yet{why}: an Ollama before 0.31 refuses "
            'a request with tools (400 "does not support tools"), a later one lays them out with the template in the '
            "GGUF, as llama.cpp does: llama-server --jinja.")


def about_tools(chat: OllamaChat, rows: int) -> str | None:
    """What an export says of ``rows`` rows with tools: that Ollama does not take them, or what it changes in them."""
    return tools_are_lost(chat, rows) or (KEPT_NOTE if rows and chat.template is not None else None)


def _thinking(jinja: Jinja) -> bool | None:
    """How the template's switch for thinking stands where nobody sets it; None without a switch."""
    on, off, unset = (jinja(talk(FIRST), **names) for names in ({SWITCH: True}, {SWITCH: False}, {}))
    return None if on == off else {on: True, off: False}.get(unset)


def _extended(jinja: Jinja, turns: Turns, think: bool | None,
              choice: bool | None) -> tuple[Turns, tuple[str, ...], str]:
    """The turns with tools and reasoning, notes, and why there are no tools.

    A model that was trained without thinking gets no place for it: Ollama asks every model for thinking that it thinks
    able to. The switch is left to a request where it is in the GGUF (:func:`gemma_tune.encoding.thinking.settled`).
    """
    notes: tuple[str, ...] = ()
    if think and choice is None:
        turns, more = _with_switch(jinja, turns)
        notes += more
    candidates = [turns] if think is False else [with_thought(jinja, turns), turns]
    tried = []
    for each in candidates:
        found, missing = _with_tools(jinja, each)
        tried.append((found, missing, think is False or _same_reasoning(jinja, found)))

    def worth(result: tuple[Turns, str, bool]) -> tuple[bool, ...]:
        """Tools first, then reasoning as in training, and no place for it where it is not."""
        found, missing, same = result
        return not missing, same, same == (found.thought is not None)

    extended, missing, same = max(tried, key=worth)
    if not same:
        notes += ("Reasoning of earlier turns is not written as in training.",)
    if think is not False and not extended.thought:
        extended = replace(extended, thought=marks_alone(jinja, turns.prompt))
    return extended, notes, missing


def _with_tools(jinja: Jinja, turns: Turns) -> tuple[Turns, str]:
    """The turns with tools, or as they are and why."""
    try:
        with_tools = replace(turns, tools=read_tools(jinja, turns))
        _compare_tools(jinja, with_tools)
    except (Unlike, TemplateError) as error:
        return turns, str(error)
    return with_tools, ""


def _with_switch(jinja: Jinja, turns: Turns) -> tuple[Turns, tuple[str, ...]]:
    """The turns with another prompt for a request that wants no thinking."""
    talks = talk(FIRST), talk("a", "b", "c", system="S" if jinja.knows_system else None)
    try:
        prompt = jinja(talks[0], **{SWITCH: False})
        changed = replace(turns, unthinking=without(split(prompt, FIRST)[1], turns.user[1]))
        if all(jinja(messages, **{SWITCH: False}) == changed.render(messages, think=False) for messages in talks):
            return changed, ()
    except (Unlike, TemplateError):
        pass
    return turns, ("A request cannot turn thinking off: the template then writes more than the prompt in another way.",)


def _compare_tools(jinja: Jinja, turns: Turns) -> None:
    """Holds the two against each other on conversations with tools.

    Raises:
        Unlike: they differ, or the template refuses most of them.
    """
    compared = 0
    for messages, tools in conversations(turns.tools):
        try:
            theirs = jinja(messages, tools=tools)
        except TemplateError:  # such as two calls in one turn; a row with them cannot be trained on either
            continue
        compared += 1
        if theirs != turns.render(messages, tools):
            raise Unlike("a conversation with tools comes out differently")
    if compared < 3:
        raise Unlike("it refuses conversations with tools")


def _same_reasoning(jinja: Jinja, turns: Turns) -> bool:
    """Whether conversations with reasoning, and the same without, come out the same."""
    thought = {"reasoning_content": "So.\n\nHm", "thinking": "So.\n\nHm"}
    called = conversations(turns.tools) if turns.tools else []
    for messages, tools in [(talk("a", "b", "c", "d", "e"), None), *called]:
        for more in ({}, thought):
            reasoned = [turn | more if turn["role"] == "assistant" else turn for turn in messages]
            try:
                theirs = jinja(reasoned, tools=tools)
            except (Unlike, TemplateError):
                continue
            if theirs != turns.render(reasoned, tools):
                return False
    return True


# --- Gemma 4 --------------------------------------------------------------------------------------------------------

_EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
_GEMMA4 = Turns(
    user=("<|turn>user\n", "<turn|>\n"),
    assistant=("<|turn>model\n", "<turn|>\n"),
    system=("<|turn>system\n", "<turn|>\n"),
    prompt="<|turn>model\n",
    trims=frozenset({"user", "assistant", "system"}),
)


def _gemma4(jinja: Jinja, stop: str, choice: bool | None) -> OllamaChat:
    """The settings that make Ollama's own layout the template's.

    The renderer is named by its size: "gemma4" alone would choose by what the model happens to be called. A model that
    was trained without thinking gets the parser without it, since Ollama asks every model for thinking that it thinks
    able to.
    """
    large = jinja(talk(FIRST), **{SWITCH: False}).endswith(_EMPTY_THOUGHT)
    think = _thinking(jinja)
    if think:
        before, after = "<|turn>system\n<|think|>\n", "<turn|>\n"
        turns = replace(_GEMMA4, system=(before, after), opening=before + after)
    else:
        turns = replace(_GEMMA4, prompt=_GEMMA4.prompt + _EMPTY_THOUGHT) if large else _GEMMA4
    try:
        notes = _compare(jinja, turns)
    except Unlike as error:
        notes = (f"Ollama lays out Gemma 4 in its own code, and this model's template differs: {error}.",)
    if think is False and choice is None:
        notes += (_WITHOUT_THINKING,)
    renderer, parser = f"gemma4-{'large' if large else 'small'}", "gemma4" if think else "gemma4-no-thinking"
    return OllamaChat(None, (stop,), renderer=renderer, parser=parser, family="gemma4", notes=notes, think=think)


# --- the two side by side -------------------------------------------------------------------------------------------


def _compare(jinja: Jinja, turns: Turns) -> tuple[str, ...]:
    """Holds the two against each other on conversations that `read_turns` did not use.

    Raises:
        Unlike: they differ in more than the white space around a message.
    """

    def same(*contents: str, system: str | None = None) -> bool:
        folded = turns.fold_first and system is not None
        asked = talk(f"{system}\n\n{contents[0]}", *contents[1:]) if folded else talk(*contents, system=system)
        return jinja(asked) == turns.render(talk(*contents, system=system))

    for contents in (("Hi",), ("Hi 👩‍👩‍👧", "你好。", "{{ a }}\n\n<b>"), ("a", "b", "c", "d", "e")):
        for system in (None, "Be brief.\n\nAnswer in 中文."):
            if not same(*contents, system=system):
                raise Unlike(f"a conversation with{'' if system else 'out'} a system message comes out differently")
    notes = () if same("Hi", system="") else ("An empty system message is not treated as in training.",)
    padded = (" \n hi\t", "\n yes \n", "\u3000so?\n")
    if same(*padded) and same(*padded, system="\n be brief "):
        return notes
    return (*notes, "White space at the start or end of a message is not treated as in training.")
