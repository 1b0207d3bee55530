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

from dataclasses import dataclass, replace

from jinja2 import TemplateError

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.rendering import compiled
from gemma_tune.encoding.thinking import choice_in
from gemma_tune.ollama.turns import Messages, Turns


@dataclass(frozen=True)
class OllamaChat:
    """How Ollama lays out a conversation for one model.

    Args:
        template: the Go TEMPLATE; None where a renderer built into Ollama does the work.
        stops: texts that end an answer.
        renderer: name of Ollama's built-in renderer, or None.
        parser: name of Ollama's built-in parser of answers, or None.
        default_system: what the Jinja template says where a conversation has no system message; belongs in SYSTEM.
        family: "gemma", "gemma4", "chatml", "llama3", or "other" (derived, no marker known).
        notes: differences between the two templates that could not be closed, one sentence each.
        think: how the template's switch for thinking stands where nobody sets it, as in training; None without one. A
            request to a server that lists thinking among the model's capabilities has to say the same.
    """

    template: str | None
    stops: tuple[str, ...]
    renderer: str | None = None
    parser: str | None = None
    default_system: str | None = None
    family: str = "other"
    notes: tuple[str, ...] = ()
    think: bool | None = None

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


def chat_for(chat_template_jinja: str, family_hint: str | None = None, *, eos_token: str | None = None) -> OllamaChat:
    """Ollama's settings for the model that was saved with this Jinja template.

    Args:
        chat_template_jinja: the template as it was saved with the model.
        family_hint: a name for the messages; it never decides anything.
        eos_token: needed by the few templates that print `eos_token`.

    Raises:
        UserError: the template cannot be reproduced in Ollama.
    """
    family, stop = next(((f, s) for mark, f, s in FAMILIES if mark in chat_template_jinja), ("other", ""))
    try:
        jinja = _Jinja(chat_template_jinja, eos_token or _EOS)
        if family == "gemma4":
            return _gemma4(jinja, stop, choice_in(chat_template_jinja))
        turns = _read_turns(jinja)
        notes, think = _compare(jinja, turns), _thinking(jinja)
        ending = turns.assistant[1].strip()
        if not ending:
            raise _Unlike("nothing marks the end of an answer")
    except (_Unlike, TemplateError) as error:
        raise UserError(
            f"the chat template of {family_hint or 'this model'} cannot be turned into an Ollama TEMPLATE: {error}",
            "Write a TEMPLATE by hand (https://docs.ollama.com/template), then run `ollama create NAME -f Modelfile`.",
        ) from error
    if "strftime_now(" in chat_template_jinja:
        notes += ("The template prints the date; Ollama has no dates, so the day of the export stays in the prompt.",)
    if think is False and choice_in(chat_template_jinja) is None:
        notes += (_WITHOUT_THINKING,)
    stop = stop if stop and stop in ending else ending
    return OllamaChat(turns.go(), (stop,), default_system=turns.default_system, family=family, notes=notes, think=think)


_WITHOUT_THINKING = (
    "Prompts ask for no thinking, as in training, whatever a program says; `prepare --thinking on` trains for it."
)


def tools_are_lost(chat: OllamaChat, rows: int) -> str | None:
    """What becomes of ``rows`` rows with tools that a model was trained on, where Ollama does not take them."""
    if not rows or chat.takes_tools:
        return None
    have = "One row has" if rows == 1 else f"{rows:,} rows have"
    return (f"{have} tools, and the TEMPLATE for Ollama has no place for them yet: Ollama refuses a request with tools "
            '(400 "does not support tools"). llama.cpp takes them with the same GGUF: llama-server --jinja.')


def _thinking(jinja: _Jinja) -> bool | None:
    """How the template's switch for thinking stands where nobody sets it; None without a switch."""
    on, off, unset = (jinja(_talk(_FIRST), **names) for names in ({_SWITCH: True}, {_SWITCH: False}, {}))
    return None if on == off else {on: True, off: False}.get(unset)


# --- Gemma 4 --------------------------------------------------------------------------------------------------------

_EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
_GEMMA4 = Turns(
    user=("<|turn>user\n", "<turn|>\n"),
    assistant=("<|turn>model\n", "<turn|>\n"),
    system=("<|turn>system\n", "<turn|>\n"),
    prompt="<|turn>model\n",
    trims=frozenset({"user", "assistant", "system"}),
)


def _gemma4(jinja: _Jinja, stop: str, choice: bool | None) -> OllamaChat:
    """The settings that make Ollama's own layout the template's.

    The renderer is named by its size: "gemma4" alone would choose by what the model happens to be called. A model that
    was trained without thinking gets the parser without it, since Ollama asks every model for thinking that it thinks
    able to.
    """
    large = jinja(_talk(_FIRST), **{_SWITCH: False}).endswith(_EMPTY_THOUGHT)
    think = _thinking(jinja)
    if think:
        before, after = "<|turn>system\n<|think|>\n", "<turn|>\n"
        turns = replace(_GEMMA4, system=(before, after), opening=before + after)
    else:
        turns = replace(_GEMMA4, prompt=_GEMMA4.prompt + _EMPTY_THOUGHT) if large else _GEMMA4
    try:
        notes = _compare(jinja, turns)
    except _Unlike as error:
        notes = (f"Ollama lays out Gemma 4 in its own code, and this model's template differs: {error}.",)
    if think is False and choice is None:
        notes += (_WITHOUT_THINKING,)
    renderer, parser = f"gemma4-{'large' if large else 'small'}", "gemma4" if think else "gemma4-no-thinking"
    return OllamaChat(None, (stop,), renderer=renderer, parser=parser, family="gemma4", notes=notes, think=think)


# --- the Jinja side -------------------------------------------------------------------------------------------------

_BOS, _EOS = "[[bos]]", "[[eos]]"  # stand in for the tokens' texts, so that they can be told from the rest
_LITERAL_BOS = ("<bos>", "<|begin_of_text|>", "<s>")  # templates that spell BOS out
_SYSTEM, _FIRST, _REPLY, _SECOND = "Zsystem", "Zfirst", "Zreply", "Zsecond"
_SWITCH = "enable_thinking"  # what templates that can think have in common


class _Unlike(Exception):
    """The Jinja template does something that turns with fixed surroundings cannot express."""


class _Jinja:
    """Renders what training rendered, less the BOS token."""

    def __init__(self, source: str, eos_token: str):
        self.template, self.eos_token = compiled(source), eos_token
        self.knows_system = self._knows_system()

    def __call__(self, messages: Messages, generation: bool = True, **more: bool) -> str:
        names = {"add_generation_prompt": generation, "bos_token": _BOS, "eos_token": self.eos_token, **more}
        try:
            text = self.template.render(messages=messages, **names)
        except TemplateError:
            raise
        except Exception as error:  # whatever a template from the Hub does with a plain conversation
            raise _Unlike(f"it fails on a plain conversation ({error})") from error
        for bos in (_BOS, *_LITERAL_BOS):
            text = text.removeprefix(bos)
        return text

    def _knows_system(self) -> bool:
        try:
            self(_talk(_FIRST, system=_SYSTEM))
        except TemplateError:  # Gemma 1 and 2: "System role not supported"
            return False
        return True


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(*contents: str, system: str | None = None) -> Messages:
    turns = [_message("assistant" if number % 2 else "user", text) for number, text in enumerate(contents)]
    return turns if system is None else [_message("system", system), *turns]


# --- what stands around the turns -----------------------------------------------------------------------------------


def _read_turns(jinja: _Jinja) -> Turns:
    """Takes the surroundings from renderings of marker words.

    Raises:
        _Unlike: a marker is missing, or what stands around it changes with its place.
    """
    lead, first_end = _split(jinja(_talk(_FIRST)), _FIRST)
    _, to_reply, to_second, _ = _split(jinja(_talk(_FIRST, _REPLY, _SECOND)), _FIRST, _REPLY, _SECOND)
    user_after = _turn_end(jinja, _talk(_FIRST), first_end)
    reply_after = _turn_end(jinja, _talk(_FIRST, _REPLY), to_second)
    user_before = _without(to_second, reply_after)
    if not lead.endswith(user_before) or not user_before:
        raise _Unlike("later user turns are not written like the first")
    turns = Turns(
        user=(user_before, user_after),
        assistant=(_without(to_reply, user_after), reply_after),
        prompt=_without(first_end, user_after),
        opening=lead.removesuffix(user_before),
        trims=frozenset(role for role in ("user", "assistant", "system") if _trims(jinja, role)),
        **_system_place(jinja, user_before),
    )
    text = repr(turns)
    if any(bos in text for bos in (_BOS, *_LITERAL_BOS)):
        raise _Unlike("it prints BOS between turns, while Ollama has one at the start")
    if jinja.eos_token == _EOS and _EOS in text:
        raise _Unlike("it prints eos_token, which was not given")
    return _with_default_system(turns)


def _split(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise _Unlike("a message is missing from what it renders")
        parts.append(before)
    return [*parts, text]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Unlike(f"a turn does not always end in {start!r}")
    return text.removeprefix(start)


def _turn_end(jinja: _Jinja, messages: Messages, followed: str) -> str:
    """What ends the last message; some templates add EOS where no answer is asked for, which is no part of the turn."""
    end = _split(jinja(messages, generation=False), messages[-1]["content"])[1]
    return end if followed.startswith(end) else end.removesuffix(jinja.eos_token)


def _system_place(jinja: _Jinja, user_before: str) -> dict:
    if not jinja.knows_system:
        return {"fold": ("", "\n\n"), "fold_first": True}
    before, after, _ = _split(jinja(_talk(_FIRST, system=_SYSTEM)), _SYSTEM, _FIRST)
    if after.endswith(user_before):
        return {"system": (before, after.removesuffix(user_before))}
    return {"fold": (_without(before, user_before), after)}


def _trims(jinja: _Jinja, role: str) -> bool:
    """Whether white space around a message of this role is dropped; partly dropped counts as kept (see `_compare`)."""
    if role == "system" and not jinja.knows_system:
        return False
    plain = _talk(_FIRST, _REPLY, _SECOND, system=_SYSTEM if role == "system" else None)
    padded = [{**m, "content": f" \n{m['content']}\u3000\n"} if m["role"] == role else m for m in plain]
    return jinja(padded) == jinja(plain)


def _with_default_system(turns: Turns) -> Turns:
    """An opening that is a system turn with words in it is a default system prompt, which Ollama keeps in SYSTEM."""
    opening, (before, after) = turns.opening, turns.system or ("", "")
    inner = opening[len(before) : len(opening) - len(after)]
    if turns.system and inner and opening == inner.join(turns.system):
        return replace(turns, opening="", default_system=inner)
    return turns


def _compare(jinja: _Jinja, turns: Turns) -> tuple[str, ...]:
    """Holds the two against each other on conversations that `_read_turns` did not use.

    Raises:
        _Unlike: they differ in more than the white space around a message.
    """

    def same(*contents: str, system: str | None = None) -> bool:
        folded = turns.fold_first and system is not None
        asked = _talk(f"{system}\n\n{contents[0]}", *contents[1:]) if folded else _talk(*contents, system=system)
        return jinja(asked) == turns.render(_talk(*contents, system=system))

    for contents in (("Hi",), ("Hi 👩‍👩‍👧", "你好。", "{{ a }}\n\n<b>"), ("a", "b", "c", "d", "e")):
        for system in (None, "Be brief.\n\nAnswer in 中文."):
            if not same(*contents, system=system):
                raise _Unlike(f"a conversation with{'' if system else 'out'} a system message comes out differently")
    padded = (" \n hi\t", "\n yes \n", "\u3000so?\n")
    if same(*padded) and same(*padded, system="\n be brief "):
        return ()
    return ("White space at the start or end of a message is not treated as in training.",)
