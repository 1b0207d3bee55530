"""Whether an Ollama server reads prompts as they were trained: it shows the text of each, and counts its tokens.

An older Ollama lays prompts out and tokenises them by itself, so only the server tells what a model is given there.
What it does not tell is not taken for equal: servers from before ``_debug_render_only`` show no text, and the first
ones on llama.cpp's server (0.30, ollama#16414) count only tokens that they had not cached. Whether a server is one of
these is found out with a prompt that nobody has asked before, asked twice: the counts are the same, or tell nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.export.parity_cases import Limit, known, limit_of
from gemma_tune.export.parity_report import DIFFERS, EQUAL, KNOWN, OLLAMA, UNCHECKED, Case, Check, Served
from gemma_tune.export.target import Target
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.kept import NOTE as KEPT_NOTE
from gemma_tune.ollama.kept import is_known
from gemma_tune.ollama.modelfile import unix_lines
from gemma_tune.ollama.server import Server

PATIENCE = 600.0  # seconds without a byte: the server first loads the model
MOST_SECONDS = 600.0  # for all prompts once the first is answered; a 4B model on a CPU takes several for each
_SHOWN = 30  # characters of a difference


@dataclass(frozen=True)
class Wanted:
    """A prompt as it was trained: its text without BOS, and the number of tokens with it.

    Args:
        is_kept: whether another text is that of training but for what Ollama changes in tools and calls.
        limit: what may differ in a model's files.
    """

    prompt: Prompt
    text: str
    tokens: int
    is_kept: Callable[[str], bool]
    limit: Callable[[], Limit | None]


def wanted(chat: ChatFormat, target: Target, ggufs: Sequence[Path], name: str, prompt: Prompt) -> Wanted | Check:
    """What the server is to make of a prompt, or the check where nothing can be said of that."""
    messages, system = prompt.messages, target.system
    if system is not None and messages[0]["role"] != "system":
        if system:  # Ollama puts the model's SYSTEM in front
            messages = [{"role": "system", "content": unix_lines(system)}, *messages]
        elif target.chat.default_system:
            return Check(UNCHECKED, "SYSTEM was to be empty, and the template of training puts a text there")

    try:
        text, count = chat.prompt_text(messages, prompt.tools), len(chat.prompt_ids(messages, tools=prompt.tools))
        return Wanted(prompt, text, count,
                      partial(is_known, messages=messages, tools=prompt.tools, trained=chat.prompt_text),
                      partial(limit_of, name, messages, chat, ggufs))
    except FormatError as e:
        return Check(UNCHECKED, f"not for this template: {e}")


@dataclass
class Asked:
    """A model on a server, and what has been found out about both.

    Args:
        count: whether tokens are to be counted as well.
        num_ctx: room that the prompts need, if it is more than the model has; another context makes the server load it
            again.
        shows, counts: whether the server shows prompts, and counts the tokens of whole ones; None as long as that is
            not known.
    """

    server: Server
    target: Target
    bos: str
    count: bool = True
    num_ctx: int | None = None
    shows: bool | None = None
    counts: bool | None = None
    think: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.think = ollama.thinking_of(self.server, self.target.name, self.target.chat)

    def check(self, want: Wanted) -> Check:
        """How the server reads one prompt.

        Raises:
            WorkFailed: no answer in time, or an error that is not about the prompt.
        """
        about_tools = bool(want.prompt.tools) or any(
            turn["role"] == "tool" or turn.get("tool_calls") for turn in want.prompt.messages)
        try:
            check = self._text(want)
            if check.state in (EQUAL, UNCHECKED) and self.count:
                check = self._counted(want, check)
        except ollama.Refused as e:
            if e.status != 400:
                raise
            check = Check(DIFFERS, f"{OLLAMA} refuses it: {e.words}")
        if check.state == DIFFERS and about_tools and not self.target.chat.takes_tools:
            return Check(KNOWN, f"the TEMPLATE has no place for tools ({check.detail})")  # which the export has told of
        return check

    @property
    def untold(self) -> str:
        """What the server does not tell."""
        texts = "does not show its prompts" if self.shows is False else ""
        counts = "counts only tokens that it had not cached" if self.counts is False else ""
        return f"this server {' and '.join(filter(None, (texts, counts)))}" if texts or counts else ""

    def _ask(self, how: Callable[..., Any], prompt: Prompt) -> Any:
        return how(self.server, self.target.name, prompt.messages, PATIENCE, think=self.think, tools=prompt.tools,
                   num_ctx=self.num_ctx)

    def _text(self, want: Wanted) -> Check:
        text = self._ask(ollama.rendered_prompt, want.prompt) if self.shows is not False else None
        self.shows = text is not None
        if text is None:
            return Check(UNCHECKED, self.untold)
        text = text.removeprefix(self.bos)
        if text == want.text:
            return Check(EQUAL)
        if want.is_kept(text):
            return Check(KNOWN, KEPT_NOTE)
        n = next((n for n, (a, b) in enumerate(zip(want.text, text)) if a != b), min(len(want.text), len(text)))
        detail = f"from character {n + 1} on {text[n:n + _SHOWN]!r} instead of {want.text[n:n + _SHOWN]!r}"
        return known(want.limit(), detail, in_text=True) or Check(DIFFERS, detail)

    def _counted(self, want: Wanted, of_text: Check) -> Check:
        """The check of a text together with the number of tokens."""
        if self.counts is None:
            self.counts = self._counts_whole_prompts()
        tokens = self._ask(ollama.prompt_tokens, want.prompt) if self.counts else None
        if tokens is None:
            return Check(EQUAL, "text alone") if of_text.state == EQUAL else of_text
        if tokens != want.tokens:
            detail = f"{tokens} tokens instead of {want.tokens}: the server seems to have a tokenizer of its own"
            return known(want.limit(), detail, in_text=False) or Check(DIFFERS, detail)
        return Check(EQUAL, "number of tokens alone") if of_text.state == UNCHECKED else of_text

    def _counts_whole_prompts(self) -> bool:
        question = Prompt([{"role": "user", "content": secrets.token_hex(8)}])
        first, again = (self._ask(ollama.prompt_tokens, question) for _ in range(2))
        return first is not None and first == again


def ask_server(server: Server, target: Target, chat: ChatFormat, prompts: Mapping[str, Prompt], listener: Listener, *,
               count: bool = True, ggufs: Sequence[Path] = ()) -> tuple[Served, list[Case]]:
    """How a server reads prompts for a model that it has.

    Args:
        target: what the server was told about the model.
        prompts: by name.
        count: whether tokens are counted as well, which runs the model.
        ggufs: the model's file.

    Returns:
        The server, and each prompt with its check in the column ``OLLAMA``.

    Raises:
        WorkFailed: no answer in time, or an error that is not about a single prompt.
    """
    wants = {name: wanted(chat, target, ggufs, name, prompt) for name, prompt in prompts.items()}
    longest = 1 + max((want.tokens for want in wants.values() if isinstance(want, Wanted)), default=0)
    asked = Asked(server, target, chat.tokenizer.bos_token or "", count,
                  num_ctx=longest if longest > target.parameters.get("num_ctx", longest) else None)
    progress = partial(listener.progress, f"asking Ollama {server.version} how it reads prompts")
    cases, deadline = [], None
    for n, (name, want) in enumerate(wants.items(), start=1):
        if isinstance(want, Check):
            cases.append(Case(name, 0, {OLLAMA: want}))
        elif deadline is not None and time.monotonic() > deadline:
            cases.append(Case(name, want.tokens, {OLLAMA: Check(
                UNCHECKED, f"the server took more than {MOST_SECONDS:.0f} seconds for the prompts before")}))
        else:
            cases.append(Case(name, want.tokens, {OLLAMA: asked.check(want)}))
            deadline = deadline or time.monotonic() + MOST_SECONDS
        progress(n, len(wants))
    return Served(server.version, target.name, asked.shows is True, asked.untold), cases
