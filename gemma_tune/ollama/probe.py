"""A Jinja chat template asked with marker words, so that what stands around them can be read off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from gemma_tune.encoding.rendering import compiled

Messages = list[dict[str, Any]]

BOS, EOS = "[[bos]]", "[[eos]]"  # stand in for the tokens' texts, so that they can be told from the rest
SYSTEM, FIRST, REPLY, SECOND = "Zsystem", "Zfirst", "Zreply", "Zsecond"
SWITCH = "enable_thinking"  # what templates that can think have in common


class Unlike(Exception):
    """The Jinja template does something that turns with fixed surroundings cannot express."""


class Jinja:
    """Renders what training rendered, less the BOS token.

    Args:
        source: the template.
        eos_token: for the few templates that print it.
        bos_token: as the tokenizer has it, for templates that spell it out.
        keeps_bos: whether it is a part of the turns, and stays in what is rendered.
        special_tokens: all that the tokenizer names, of which a template can print others as well.
    """

    def __init__(self, source: str, eos_token: str, bos_token: str | None = None, keeps_bos: bool = False,
                 special_tokens: Mapping[str, Any] | None = None):
        self.template, self.eos_token = compiled(source), eos_token
        bos = bos_token if bos_token and keeps_bos else BOS
        # Without tools and documents, a template is told so, as in training: OLMo 3's asks for `tools is none`.
        self._names = {**(special_tokens or {}), "bos_token": bos, "eos_token": eos_token, "tools": None,
                       "documents": None}
        self.all_bos = () if keeps_bos else (BOS, bos_token or BOS)
        self.knows_system = self._knows_system()

    def __call__(self, messages: Messages, generation: bool = True, **more: Any) -> str:
        """The text of a conversation; ``more`` are other variables, such as ``tools``.

        Raises:
            TemplateError: the template refuses it.
            Unlike: it fails.
        """
        try:
            text = self.template.render(messages=messages, add_generation_prompt=generation, **self._names | more)
        except TemplateError:
            raise
        except Exception as error:  # whatever a template from the Hub does with a plain conversation
            raise Unlike(f"it fails on a plain conversation ({error})") from error
        for bos in self.all_bos:
            text = text.removeprefix(bos)
        return text

    def _knows_system(self) -> bool:
        """Whether the template writes a system message: Gemma 1's and 2's refuse it, the first Phi-3's leave it out."""
        try:
            return SYSTEM in self(talk(FIRST, system=SYSTEM))
        except TemplateError:
            return False


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*contents: str, system: str | None = None) -> Messages:
    """User and assistant in turn, below a system message."""
    turns = [message("assistant" if number % 2 else "user", text) for number, text in enumerate(contents)]
    return turns if system is None else [message("system", system), *turns]


def split(text: str, *marks: str) -> list[str]:
    """What stands before, between and after the marks.

    Raises:
        Unlike: one is missing.
    """
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise Unlike("a message is missing from what it renders")
        parts.append(before)
    return [*parts, text]


def without(text: str, start: str) -> str:
    """The text after its start.

    Raises:
        Unlike: it starts otherwise.
    """
    if not text.startswith(start):
        raise Unlike(f"a turn does not always end in {start!r}")
    return text.removeprefix(start)
