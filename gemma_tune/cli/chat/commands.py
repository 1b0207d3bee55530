"""The commands of a conversation, which begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.table import Table

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted, near, nearest
from gemma_tune.chat.conversation import CHANGEABLE, Conversation
from gemma_tune.chat.pictures import paths_in
from gemma_tune.chat.transcript import export
from gemma_tune.cli import console, screen
from gemma_tune.cli.chat.say import say, say_place
from gemma_tune.data.conversations.pictures import pictures_in

ON_OFF = {"on": True, "off": False}


class Talk(Protocol):
    """What commands work on."""

    conversation: Conversation
    markdown: bool
    left: bool

    def exchange(self, question: str) -> bool:
        """Ask and answer; whether there is an answer that became part of the conversation."""

    def compare(self, question: str, *, keep: bool = True) -> bool:
        """The same with base and tuned model."""

    def somebody_answers(self) -> None:
        """Wait for the model."""

    def several_lines(self) -> str:
        """Lines up to one with a dot alone."""


@dataclass(frozen=True)
class Command:
    """What a name after the slash does, with its arguments and a line of help."""

    run: Callable[[Talk, str], None]
    takes: str
    help: str


_LOOKS_LIKE_ONE = re.compile(r"/[A-Za-z?]+")  # and not /usr/bin, // or /*
_ALIKE = 0.8  # how alike the name of a command a word is that begins a line of several: more than /etc and /set


def is_command(line: str) -> bool:
    """Whether a line is for the chat and not for the model: also one that seems to be misspelt, as a word that stands
    alone does, or one that is much like a name."""
    name, rest = _parts(line)
    if name in COMMANDS or name in ALIASES:
        return True
    return bool(_LOOKS_LIKE_ONE.fullmatch(name)) and (not rest or bool(nearest(name, COMMANDS, least=_ALIKE)))


def _parts(line: str) -> tuple[str, str]:
    """The first word, which is none where the line begins with white space, and the rest."""
    name = re.split(r"\s", line, maxsplit=1)[0]
    return name, line[len(name):].strip()


def obey(talk: Talk, line: str) -> None:
    """Do what a line that is a command says.

    Raises:
        UserError: it cannot be done.
    """
    name, rest = _parts(line)
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        meant = near(name, COMMANDS)
        say(f"(there is no {name}{meant} A space before it makes it a question)" if meant else
            f"(there is no {name}; /help lists what there is; with a space before it, it is a question)")
        return
    COMMANDS[name].run(talk, rest)


def _help(talk: Talk, rest: str) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, command in COMMANDS.items():
        table.add_row(screen.Text(f"{name} {command.takes}"), screen.Text(command.help))
    table.add_row("Enter", "send; Alt-Enter, or a \\ at the end of a line, begins a new line")
    table.add_row("Ctrl-C", "stop the answer; Ctrl-D leaves")
    screen.err.print(table, style="dim")


def _system(talk: Talk, rest: str) -> None:
    talk.conversation.reset(rest)
    say(f"(system prompt: {talk.conversation.system or 'none'})")


def _reset(talk: Talk, rest: str) -> None:
    talk.conversation.reset()
    say("(the conversation starts anew)")


def _retry(talk: Talk, rest: str) -> None:
    conversation = talk.conversation
    conversation.last_question()
    if conversation.comparing:
        return _compare(talk, "")
    before = conversation.turns[-1]
    with conversation.again() as question:  # no new answer, and the old one stays
        say(f"(again: {_short(question)})")
        new = talk.exchange(question)
    if new:
        name = conversation.answered_again(before)
        say(f"(that was answer {name}; /better 1, or another number, keeps which one is better)" if name
            else "(the same answer again; a higher /set temperature draws others)")


def _image(talk: Talk, rest: str) -> None:
    waiting = talk.conversation.waiting
    if rest:
        talk.somebody_answers()
        show(talk, paths_in(rest))
    elif waiting:
        waiting.clear()
        say("(no picture is shown with the next question)")
    else:
        raise UserError("/image needs a path", "/image PATH shows a picture with the next question; the file can be "
                                               "dragged into the terminal")


def show(talk: Talk, paths: Sequence[Path]) -> None:
    """Show pictures with the next question.

    Raises:
        UserError: one of them cannot be; those before it are.
    """
    for path in paths:
        talk.conversation.show(path)
        say_place(f"(shown with the next question: {path})")


def _undo(talk: Talk, rest: str) -> None:
    question = talk.conversation.undo()
    left = counted(len(talk.conversation.turns) // 2, "exchange")
    say(f"(taken back: {_short(question)}; {left} left)")


def _set(talk: Talk, rest: str) -> None:
    name, _, value = rest.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        config = talk.conversation.config
        values = {n: getattr(config, n) for n in CHANGEABLE} | {"markdown": "on" if talk.markdown else "off"}
        unset = {name: "the model's own" for name in values} | {"seed": "random"}
        say("\n".join(f"{n}  {unset[n] if v is None else v}" for n, v in values.items())
            + "\n(/set NAME VALUE; the value `default` sets one back)")
    elif not value:
        raise UserError(f"/set {name} needs a value", f"/set {name} VALUE, or /set alone to see all")
    elif name == "markdown":
        if value not in ON_OFF:
            raise UserError(f"markdown is on or off, not {value}", "/set markdown off shows answers as they are")
        talk.markdown = ON_OFF[value]
        say(f"(markdown: {value})")
    else:
        if name == "seed":
            talk.somebody_answers()
        now = talk.conversation.set(name, value)
        say(f"({name}: {'as it was at first' if now is None else now})")


def _compare(talk: Talk, rest: str) -> None:
    if rest in ON_OFF:
        if ON_OFF[rest]:
            talk.somebody_answers()
            talk.conversation.pair()
        talk.conversation.comparing = ON_OFF[rest]
        say("(every question is answered by base and tuned model; the tuned one's answer goes on)" if ON_OFF[rest]
            else "(one answers again)")
    elif rest:
        talk.compare(rest)
    else:
        with talk.conversation.again() as question:
            say(f"(again: {_short(question)})")
            talk.compare(question, keep=False)


def _who(name: str) -> Callable[[Talk, str], None]:
    def change(talk: Talk, rest: str) -> None:
        talk.somebody_answers()
        talk.conversation.let_answer(name)
        say(f"({talk.conversation.which} answers)")
    return change


def _save(talk: Talk, name: str) -> None:
    conversation, commands = talk.conversation, []
    saves = conversation.saves
    try:
        path, changed = conversation.save(name)
        say_place(f"({'saved in' if changed else 'already in'} {path})")
        if conversation.cut:
            cut = counted(conversation.cut, "answer was cut off and is", "answers were cut off and are")
            say(f"({cut} not learned; /fix TEXT mends the last one)")
        commands.append(saves.command_to_prepare(path))
    finally:
        if pairs := saves.pairs.number():
            say_place(f"({counted(pairs, 'pair')} of a better and a worse answer in {saves.pairs.path})")
            commands.append(saves.command_to_prepare_pairs())
        if len(commands) == 2:
            say("(a run learns from one kind: the first command takes the conversations, the second the pairs)")
        if commands:
            console.what_next(commands)


def _fix(talk: Talk, text: str) -> None:
    if talk.conversation.turns and not text:
        say("(the right answer; a line with a dot alone ends it, Ctrl-C leaves the answer as it is)")
        try:
            text = talk.several_lines()
        except KeyboardInterrupt:
            say("\n(the answer stays as it is)")
            return
    pairs, otherwise = talk.conversation.correct(text)
    say("(the answer is replaced)")
    _tell_pairs(talk, pairs, otherwise)


def _better(talk: Talk, name: str) -> None:
    pairs, otherwise = talk.conversation.better(name)
    say(f"(answer {name} stays in the conversation)" if name.isdigit() else f"(the {name} model's answer stays in the "
        "conversation)")
    _tell_pairs(talk, pairs, otherwise)


def _tell_pairs(talk: Talk, pairs: int, otherwise: str) -> None:
    if pairs:
        say_place(f"({counted(pairs, 'pair')} of this question in {talk.conversation.saves.pairs.path})")
    else:
        say(f"({otherwise})")


def _history(talk: Talk, rest: str) -> None:
    called = {"system": "system", "user": "you", "assistant": "model"}
    for turn in talk.conversation.messages:
        say(f"{called[turn['role']]}:")
        for picture in pictures_in([turn]):
            say_place(f"({picture['path']})")
        say(turn["content"], style="")
    if not talk.conversation.messages:
        say("(nothing was said yet)")


def _export(talk: Talk, name: str) -> None:
    conversation = talk.conversation
    if conversation.turns:
        talk.somebody_answers()
    which = conversation.which if conversation.turns else ""
    path = export(conversation.messages, which, conversation.saves.run.root, name)
    say_place(f"(written to {path})")


def _exit(talk: Talk, rest: str) -> None:
    talk.left = True


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


COMMANDS = {
    "/help": Command(_help, "", "this help"),
    "/system": Command(_system, "TEXT", "new system prompt, and a new conversation; no TEXT removes it"),
    "/reset": Command(_reset, "", "forget the conversation"),
    "/image": Command(_image, "PATH", "show a picture with the next question; alone: show none"),
    "/retry": Command(_retry, "", "answer the last question again"),
    "/better": Command(_better, "1|2", "after /retry, which answer is better; after /compare: base|tuned"),
    "/undo": Command(_undo, "", "take the last question and its answer back"),
    "/set": Command(_set, "[NAME VALUE]", "temperature, max_new_tokens, seed and others; alone: show them"),
    "/compare": Command(_compare, "[TEXT|on|off]", "base and tuned model side by side; alone: on the last question"),
    "/base": Command(_who("base"), "", "the untuned model answers from now on"),
    "/tuned": Command(_who("tuned"), "", "the tuned model answers from now on"),
    "/save": Command(_save, "[FILE]", "keep the conversation as training data"),
    "/fix": Command(_fix, "TEXT", "TEXT in place of the last answer, both kept as a pair; alone: lines up to a dot"),
    "/history": Command(_history, "", "the conversation so far"),
    "/export": Command(_export, "[FILE]", "write it to a file: Markdown, or JSON for .json and .jsonl"),
    "/exit": Command(_exit, "", "leave"),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
