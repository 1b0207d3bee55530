"""A command around its work: arguments that were meant otherwise, and errors as a message, a hint and an exit code."""

from __future__ import annotations

import contextlib
import errno
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.exceptions
from typer.core import TyperCommand, TyperGroup

from gemma_tune.base import shell
from gemma_tune.base.errors import Interrupted, UserError, WorkFailed
from gemma_tune.base.machine import (
    Terminated,
    end_at_once,
    is_out_of_memory,
    no_memory,
    noting_ctrl_c,
    occupy_standard_streams,
    terminable,
)
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import as_text, shown
from gemma_tune.cli import help_page, hints, live, screen
from gemma_tune.cli.request import waiting_training
from gemma_tune.cli.spinner import saying_what_is_loaded
from gemma_tune.config.habits import meant, meant_command
from gemma_tune.config.settings import refuse_no_names
from gemma_tune.train import processes

# What the system says of a path, and not of the work: no permission, (not) a directory, too long, links in a circle,
# and, on Windows, signs that no name can have there, or a name such as aux.
_OF_PATHS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_STOPPED = ("stopped", "run the same command again; finished stages are kept")
# What a command does whose results are no files of the run.
_STOPPED_CHAT = ("stopped", "answers that were written stay; the same command begins anew")
_LONGEST_NAME = _LONGEST_COMMAND = 400  # that a message shows
_NAME_COLUMNS = "use --columns "  # how the advice about a row's columns begins
_FILES = ("data", "valid")  # options that name files of rows, and
# other files and directories
# How Typer refuses a number, which does not say what it was given.
_NO_NUMBER = re.compile("Input should be a valid (integer|number)")
_NUMBERS = {"integer": "a whole number", "number": "a number"}
_PLACES = ("model", "run", "folder", "config", "input", "adapter", "from_adapter", "converter", "calibration")


class Commands(TyperGroup):
    """The command line; where ``accelerate launch`` runs it several times, one process speaks for all."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_page.page(self, ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except typer.exceptions.TyperException as e:
            if hasattr(e, "message") and (habit := meant_command(args[0])):
                e.message = f"No such command '{args[0]}'; {habit}"  # without what is spelt alike
            raise

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        occupy_standard_streams()
        if not processes.is_main():
            screen.mute()
        words = sys.argv[1:] if args is None else args
        typed = {"json": "--json" in words}
        try:
            code = super().main(args, *rest, **kwargs | {"standalone_mode": False})
        except typer.Abort:
            code = WorkFailed.exit_code
        except (OSError, screen.OutputLost) as e:  # --help and --version; commands have said what is wrong with theirs
            code = _output_is_lost(e, typed)
        except Exception as e:
            if not hasattr(e, "format_message"):
                raise
            code = _wrong_usage(e, next((word for word in words[:1] if word in self.commands), None), typed)
        if code:
            processes.let_the_main_one_speak()
        sys.exit(code)


def _found(options: Sequence[str], typed: Sequence[str]) -> str:
    """What was given to an option, as the end of a message; the last one counts."""
    for word, following in reversed([*pairwise([*typed, ""])]):
        name, _, value = word.partition("=")
        if name in options:
            return f", found {shown(value or following)}"
    return ""


def _wrong_usage(e: Any, command: str | None, params: Mapping[str, Any]) -> int:
    """Show what Typer refuses as every other error is shown."""
    if "NoArgs" in type(e).__name__:
        typer.echo(e.ctx.get_help(), err=True)
        return e.exit_code
    _show(UserError(e.format_message().rstrip("."), f"see `{' '.join(filter(None, ('gemma-tune', command)))} --help`"),
          params)
    return UserError.exit_code


def _output_is_lost(e: Exception, params: Mapping[str, Any]) -> int:
    screen.drop_output()
    if not screen.reader_has_gone(e):
        reason = getattr(e, "strerror", None) or e
        _show(WorkFailed(f"standard output cannot be written: {reason}",
                         "let it go to a file or a program that takes it; what was finished is kept"), params)
    return WorkFailed.exit_code


class Command(TyperCommand):
    """A command whose errors are a message, a hint and an exit code instead of a traceback."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_page.page(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = [self.name, *args]
        try:
            return super().parse_args(ctx, args)
        except typer.exceptions.TyperException as e:
            if getattr(e, "param", None) and (number := _NO_NUMBER.match(e.message)):
                e.message = f"expected {_NUMBERS[number[1]]}{_found(e.param.opts, ctx.meta['arguments'])}"
            elif hasattr(e, "message"):
                e.message += self._meant(ctx, e)
            raise

    def _meant(self, ctx: Any, problem: Any) -> str:
        """The end of a message about arguments that this command does not take."""
        option = getattr(problem, "option_name", None)
        own = any(option in param.opts for param in self.params)  # its value is missing
        if option == "--data" and not own and any(param.name == "data" for param in self.params):
            problem.possibilities = []
            return "; files of data are named without an option"
        if option and not own and ctx.parent is not None:
            others = [name for name, command in ctx.parent.command.commands.items()
                      if any(option in param.opts for param in command.params)]
            if others:
                problem.possibilities = []  # what is spelt alike is not what was meant
                return f"; `{'`, `'.join(others)}` {'has' if len(others) == 1 else 'have'} it"
            if habit := meant(option, [name for param in self.params for name in param.opts]):
                problem.possibilities = []
                return f"; {habit}"
        if "unexpected extra argument" not in problem.message:
            return ""
        if self.name == "chat":
            return "; a question to answer goes behind --prompt, in quotes"
        run = "; a run directory goes behind --run" if any("--run" in param.opts for param in self.params) else ""
        return run + shell.COMMAS

    def invoke(self, ctx: Any) -> Any:
        with noting_ctrl_c() as stopped, terminable():
            return self._invoke(ctx, stopped)

    def _invoke(self, ctx: Any, stopped: Callable[[], bool]) -> Any:
        screen.warnings.clear()
        hints.about()
        try:
            if not self._takes_part(ctx):
                return None
            if ctx.params.get("json") or self.name == "chat":
                screen.require_output()
            self._check_texts(ctx)
            with saying_what_is_loaded(quiet=bool(ctx.params.get("quiet"))):
                result = super().invoke(ctx)
            processes.leave()
            return result
        except UserError as e:
            problem = e
        except (KeyboardInterrupt, Terminated):
            problem = Interrupted(*self._stopped)
        except (typer.Exit, typer.Abort):
            raise
        except (BrokenPipeError, screen.OutputLost) as e:
            if not _was_ended(e):
                _leave(_output_is_lost(e, ctx.params))
            problem = Interrupted(*self._stopped)
        except Exception as e:  # noqa: BLE001 - the last resort: a fault of ours is reported as one
            if type(e).__module__.startswith(("click", "typer")):
                raise
            ended = _was_ended(e) or stopped()
            problem = Interrupted(*self._stopped) if ended else _refused_by_system(e) or WorkFailed(
                f"unexpected {type(e).__name__}: {e}",
                "repeat with --debug and report the traceback; finished stages are kept")
            problem.__cause__ = e
        shown = processes.settle(problem)
        if shown is None:  # another process shows it
            _leave(problem.exit_code)
        screen.unmute()
        if ctx.params.get("debug"):
            with contextlib.suppress(OSError):
                screen.err.print(_traceback(shown), markup=False)
        _show(_with_columns(_without_force(shown, self.name, ctx.params), ctx), ctx.params)
        _leave(shown.exit_code)

    @property
    def _stopped(self) -> tuple[str, str]:
        return _STOPPED_CHAT if self.name == "chat" else _STOPPED

    def _check_texts(self, ctx: Any) -> None:
        """Make text of arguments that were typed in a locale without their characters, and look at those that name
        something.

        Raises:
            UserError: bytes that are not UTF-8 (the names of data files alone may hold such: files are called so), an
                empty name, an access token in the place of one; all of them together.
        """
        problems = []
        for param in self.params:
            value = ctx.params.get(param.name)
            if not isinstance(value, str | Path | list):
                continue
            environment = getattr(ctx.get_parameter_source(param.name), "name", "") == "ENVIRONMENT"
            name = (param.metavar or "").strip("[]") if param.param_type_name == "argument" else param.opts[0]
            called = str(param.envvar) if environment else name
            try:
                if param.name in (*_PLACES, "revision"):
                    refuse_no_names({called: value})
                if param.name in _FILES:
                    continue
                texts = [as_text(str(one), called) for one in (value if isinstance(value, list) else [value])]
            except UserError as e:
                problems.append(e)
                continue
            if param.name not in _PLACES:  # the system knows those by their bytes
                ctx.params[param.name] = texts if isinstance(value, list) else texts[0]
        if problems:
            fault = "are not UTF-8 text" if all("UTF-8" in e.message for e in problems) else "cannot be used"
            raise problems[0] if len(problems) == 1 else UserError(
                f"{len(problems)} arguments {fault}", problems[0].hint, [e.message for e in problems])

    def _takes_part(self, ctx: Any) -> bool:
        """Whether this process runs the command itself: only `train` is a matter of several, led by the main one."""
        here = processes.place()
        together = here.count > 1 and self.name == "train" and not ctx.params["dry_run"]
        if together:
            processes.join(lambda problem: _show(problem, ctx.params))
        elif here.rank == 0:
            processes.forget()
        if together and here.rank:
            from gemma_tune.train.stage import follow

            follow()
            processes.leave()
            end_at_once()
        return here.rank == 0


def _leave(code: int) -> NoReturn:
    """Leave a command that failed. One of several processes ends at once: at an interpreter's usual end the thread that
    asks their store whether another has failed aborts the process, and the exit code is lost."""
    if processes.joined():
        end_at_once(code)
    raise typer.Exit(code) from None


def _traceback(problem: UserError) -> str:
    """The traceback without the notes of the problem itself, which is shown below it with its hint."""
    told = traceback.TracebackException.from_exception(problem)
    told.__notes__ = None
    return "".join(told.format())


def _show(problem: UserError, params: Mapping[str, Any]) -> None:
    live.close_all()  # its listener may be in the middle of something that never ends
    if params.get("json"):
        with contextlib.suppress(OSError, screen.OutputLost):  # people still learn of it
            screen.result_json({"error": screen.error_json(problem)})
    with contextlib.suppress(OSError):  # stderr is full or has no reader: the exit code says it
        screen.error(problem)


def _was_ended(e: BaseException | None) -> bool:
    """Whether SIGTERM or SIGHUP came first, and what failed was the putting away: on a terminal that has gone, say."""
    while e is not None and not isinstance(e, Terminated):
        e = e.__context__
    return e is not None


def _refused_by_system(e: Exception) -> UserError | None:
    """A path that the system does not let be used, or memory that it does not have, wherever that showed; None for all
    other errors."""
    if is_out_of_memory(e):
        return no_memory(e, "close other programs, or take a smaller model")
    if isinstance(e, OSError) and e.filename is not None and e.errno in _OF_PATHS:
        name = str(e.filename)
        return UserError(f"{name if len(name) <= _LONGEST_NAME else name[:60] + '…'} cannot be used: {e.strerror}",
                         "check the path, and the permissions of the directories on the way there")
    return None


def _without_force(problem: UserError, name: str | None, params: Mapping[str, Any]) -> UserError:
    """Where the advice is to repeat a command that was given --force: without it, as that would start anew."""
    hint = problem.hint or ""
    if params.get("force") and (name == "run" or name == "train" and waiting_training(params)):
        if "same command" in hint:
            problem.hint = hint.replace("same command", "same command without --force", 1)
        elif name == "run" and isinstance(problem, Interrupted):
            problem.hint = f"{hint}; then the same command without --force"
    return problem


def _with_columns(problem: UserError, ctx: Any) -> UserError:
    """Where the advice is to name columns: the command that was typed, with them, to be pasted."""
    try:
        option = shlex.split((problem.hint or "").removeprefix(_NAME_COLUMNS))
    except ValueError:  # a sentence with an apostrophe
        return problem
    typed, data = ctx.meta["arguments"], ctx.params.get("data") or []
    if not (problem.hint or "").startswith(_NAME_COLUMNS) or len(option) != 1 or "-" in typed:  # what was piped is gone
        return problem
    if any(word.partition("=")[0] == "--columns" for word in typed):
        return problem
    takes = any(param.name == "columns" for param in ctx.command.params)
    command = shell.join(["gemma-tune", *(typed if takes else ["prepare", *map(str, data)]), "--columns", *option])
    if len(command) <= _LONGEST_COMMAND:
        problem.hint = f"{problem.hint}: {redact(command)}"
    return problem
