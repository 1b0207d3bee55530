"""What is typed: a line editor on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gemma_tune.base.cache import cache_dir
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Held
from gemma_tune.base.loading import in_progress
from gemma_tune.base.machine import ended_by
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import as_text
from gemma_tune.chat.ahead import Ahead
from gemma_tune.chat.conversation import CHANGEABLE
from gemma_tune.chat.pictures import SUFFIXES
from gemma_tune.chat.preferences import COMPARED
from gemma_tune.chat.scripts import keep_bytes
from gemma_tune.cli import screen
from gemma_tune.cli.chat.commands import COMMANDS, is_command
from gemma_tune.cli.spinner import LOOKS_EVERY, is_watched, keeping_still, loading_text, moving

_PROMPT = "> "
_AT_ONCE = 0.02  # seconds within which the lines of a paste follow each other


class Plain:
    """``input()``, where nothing can be drawn again: a dumb terminal, another program."""

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
            import readline  # its import gives input() line editing and history

            # Without these the C locale takes é for two keys.
            for setting in ("input-meta on", "output-meta on", "convert-meta off"):
                readline.parse_and_bind(f"set {setting}")
        keep_bytes(sys.stdin)

    def read(self) -> str:
        """A question or command; lines that were pasted at once are one question.

        Raises:
            UserError: it is no text.
            EOFError, KeyboardInterrupt: Ctrl-D, Ctrl-C.
        """
        lines = [self.line()]
        while not is_command(lines[0]) and _more_is_there():
            try:
                lines.append(as_text(input(), "what was typed", sys.stdin.encoding))
            except EOFError:
                break
        return "\n".join(lines)

    def line(self) -> str:
        """One line. input() writes its prompt to stdout, which holds answers alone when it is a file."""
        if sys.stdout.isatty():
            line = input("\n> ")
        else:
            screen.err.print("\n> ", end="", markup=False)
            line = input()
        return as_text(line, "what was typed", sys.stdin.encoding)


def _more_is_there(within: float = _AT_ONCE) -> bool:
    """Whether a terminal has more lines already, or ``within`` seconds."""
    if os.name != "posix" or not screen.stdin_is_terminal():
        return False
    import select

    return bool(select.select([sys.stdin], [], [], within)[0])


class Editor:
    """Several lines, history and completion, by prompt_toolkit."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        # The prompt goes where people read, and stdout holds answers alone where it is a file.
        output = create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr)
        self._session = PromptSession(
            history=_history(), completer=_completer(), complete_while_typing=True, multiline=True,
            key_bindings=_keys(), output=output, prompt_continuation="  ", enable_suspend=True,
            reserve_space_for_menu=4)

    def read(self) -> str:
        """As :meth:`Plain.read`."""
        return self._read(_PROMPT)

    line = read

    def _read(self, message: Any, **more: Any) -> str:
        """What was typed while an answer came is there already: a line is sent, a paste of several waits for Enter."""
        screen.err.print()
        lines = _typed_before()
        if self._as_keys(lines):
            lines = []
        several = len(lines) > 1 or bool(lines) and _half_a_line_is_there()
        before = "".join(lines)
        text = self._prompt(message, default=before if several else before.rstrip("\n"),
                            accept_default=bool(lines) and not several, **more)
        return as_text(text.rstrip("\n") if several else text, "what was typed", "utf-8")

    def _as_keys(self, lines: list[str]) -> bool:
        """Have these typed again in the editor, where they are no lines; whether it was so.

        What is typed while the editor is about to close, it has read and not used, or has left to the terminal as keys:
        Enter is no end of a line there, and what has no end was not sent.
        """
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        keys = get_typeahead(self._session.input)
        again = bool(lines) and (bool(keys) or not all(line.endswith("\n") for line in lines))
        if again:
            parser = Vt100Parser(keys.append)
            parser.feed("".join(lines))
            parser.flush()
        store_typeahead(self._session.input, keys)
        return again

    def _prompt(self, message: Any, pre_run: Callable[[], None] = lambda: None, **more: Any) -> str:
        """prompt_toolkit's prompt, which SIGTERM leaves by the door: what is raised in a callback of its event loop
        is shown as a fault of the program's, and Enter awaited."""
        app = self._session.app

        def leave() -> None:
            if app.future is not None and not app.future.done():
                app.exit(exception=EOFError)

        def end() -> None:
            if app.loop is not None:
                app.loop.call_soon_threadsafe(leave)

        def begin() -> None:
            pre_run()
            if came():
                leave()

        with ended_by(end) as came:
            return self._session.prompt(message, pre_run=begin, **more)

    def read_meanwhile(self, ahead: Ahead, said: Held) -> str:
        """The same while the model is being loaded: above the prompt stands what of it, and what is said.

        Raises:
            UserError, EOFError, KeyboardInterrupt: as :meth:`read`; UserError also when it cannot be loaded.
        """
        from prompt_toolkit.application import get_app

        def watch() -> None:
            get_app().create_background_task(self._watch(ahead, said))

        spinner = moving("the model")

        def message() -> list[tuple[str, str]]:
            if not ahead.going_on or get_app().is_done or not is_watched():
                return [("", _PROMPT)]
            spinner.update(text=loading_text(in_progress() or "the model"))
            return [("ansicyan", f"{spinner.render(time.monotonic())}\n"), ("", _PROMPT)]

        with keeping_still():
            return self._read(message, pre_run=watch)

    async def _watch(self, ahead: Ahead, said: Held) -> None:
        from prompt_toolkit.application import get_app, run_in_terminal

        app, going_on = get_app(), True
        while going_on:
            going_on = ahead.going_on
            if said.waits:
                await run_in_terminal(said.tell)
            app.invalidate()
            await asyncio.sleep(LOOKS_EVERY)
        if ahead.failure is not None:
            app.exit(exception=ahead.failure)


def _typed_before() -> list[str]:
    """The lines that a terminal has already.

    Raises:
        EOFError: Ctrl-D was typed.
    """
    lines = []
    while _more_is_there(0):
        line = os.read(sys.stdin.fileno(), 1 << 16)  # one at a time, as long as nobody edits it
        if not line:
            raise EOFError
        lines.append(line.decode("utf-8", "surrogateescape"))
    return lines


def _half_a_line_is_there() -> bool:
    """Whether a terminal has the beginning of a line, which it keeps to itself until that ends."""
    with _terminal_without("ICANON", "ECHO", "ECHONL"):
        return _more_is_there(0)


def _history() -> Any:
    """Questions of earlier chats, without access tokens; in memory alone where there is no place for a file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                if redact(string) == string:
                    super().store_string(string)

    try:
        path = cache_dir() / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # for its owner alone
        return History(str(path))
    except (OSError, UserError):
        return InMemoryHistory()


def _completer() -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)
    pictures = PathCompleter(expanduser=True, file_filter=lambda name: (
        os.path.isdir(os.path.expanduser(name)) or name.lower().endswith(SUFFIXES)))
    words = {"/set": (*CHANGEABLE, "markdown"), "/compare": ("on", "off"), "/better": ("1", "2", *COMPARED)}

    class Commands(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Any]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                for known, command in COMMANDS.items():
                    if known.startswith(name):
                        yield Completion(known, -len(name), display_meta=command.help)
            elif name in ("/save", "/export"):
                yield from paths.get_completions(Document(rest), event)
            elif name == "/image":
                yield from pictures.get_completions(Document(rest), event)
            else:
                yield from (Completion(word, -len(rest)) for word in words.get(name, ()) if word.startswith(rest))

    return Commands()


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("enter")(send)
    keys.add("c-j")(send)  # what Enter is after something else has read the terminal
    keys.add("escape", "enter")(new_line)
    keys.add("escape", "c-j")(new_line)
    return keys


def typist() -> Plain | Editor:
    """What reads here."""
    if not (screen.stdin_is_terminal() and screen.is_live()):
        return Plain()
    try:
        return Editor()
    except Exception:  # noqa: BLE001 - a terminal that prompt_toolkit cannot use, such as one without a window
        return Plain()


@contextlib.contextmanager
def nothing_shown() -> Iterator[None]:
    """Keep what is typed meanwhile out of the answer; it waits for the next question."""
    with _terminal_without("ECHO", "ECHONL"):
        yield


@contextlib.contextmanager
def _terminal_without(*modes: str) -> Iterator[None]:
    """The terminal without these of its local modes, where standard input is one that has such."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        changed = [*before]
        for mode in modes:
            changed[3] &= ~getattr(termios, mode)
        termios.tcsetattr(number, termios.TCSANOW, changed)
    except (termios.error, OSError, ValueError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError, ValueError):  # it has gone, which its signal tells
            termios.tcsetattr(number, termios.TCSANOW, before)


def several_lines(reader: Plain | Editor) -> str:
    """Lines as they are, up to one with a dot alone, or the end of the input.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        while True:
            try:
                text = reader.line()
                if text == ".":
                    break
                lines.append(text)
                if text.endswith("\n."):
                    lines[-1] = text[:-2]
                    break
            except UserError as e:  # the other lines stay
                screen.error(e)
    return "\n".join(lines).strip("\n")

