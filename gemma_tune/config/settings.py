"""How settings are declared, checked and combined; what settings there are is in ``stages``.

A setting is a field of a frozen dataclass made with :func:`option`. No heavy import: ``gemma-tune --help`` loads this
module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from gemma_tune.base.errors import UserError
from gemma_tune.base.secrets import is_token, place_of
from gemma_tune.base.words import counted, full_width, near, shown


def option(default: Any, help: str, *, least: float | None = None, most: float | None = None,
           choices: Sequence[str] | None = None, **extra: Any) -> Any:
    """Declare one setting: its default, the sentence people read in ``--help``, and its limits.

    ``default=None`` means that the value follows the model's family or the data; ``auto="…"`` says how. ``group``
    is where ``--help`` has it: common, data, speed or advanced. ``counts`` is what a number is of, for one that is too
    large; ``habit`` turns what people write into the choice that they mean, for the error that suggests it. ``apart``
    takes the texts of a list apart, where commas alone do not. The option of a ``repeated`` one is given once for each
    text, as a comma may be in it.
    """
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices, **extra})


class StageConfig:
    """Shared behaviour of the stage dataclasses: validation that reports every problem at once."""

    section: ClassVar[str]
    group: ClassVar[str] = "common"  # of its options in --help, see cli.help, but for those that name another

    def __post_init__(self) -> None:
        kinds = types_of(type(self))
        problems = [p for f in dataclasses.fields(self) if (p := problem_of(f, kinds[f.name], getattr(self, f.name)))]
        problems += [] if problems else self.more_problems()
        problems = [f"{p}{full_width(value_in_words(getattr(self, p.partition(':')[0], None)))}" for p in problems]
        if problems:
            raise UserError(f"{counted(len(problems), 'setting')} of `{self.section}` cannot be used",
                            f"see `gemma-tune {self.section} --help` for what each setting takes", problems)

    def more_problems(self) -> list[str]:
        """What is wrong between settings, or in a way that a limit cannot say."""
        return []

    def outdone(self, given: Collection[str], before: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Settings of before that are not kept, because of what is given now.

        Args:
            before: as :meth:`Resolved.record` wrote them.
        """
        return set()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


C = TypeVar("C", bound=StageConfig)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN; replace a token that others may have seen"
NOT_GIVEN = ("default", "family", "adapter", "method", "data")  # origins of settings that nobody gave


@dataclass(frozen=True)
class Resolved(typing.Generic[C]):
    """A stage's settings together with the origin of each: ``flag``, ``file``, ``family`` or ``default``;
    ``adapter`` where a training starts from one, which brings it along, ``method`` where that decides."""

    config: C
    origins: Mapping[str, str]

    @property
    def given(self) -> set[str]:
        """Names of the settings that somebody gave."""
        return {name for name, origin in self.origins.items() if origin not in NOT_GIVEN}

    def but(self, values: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]) -> Resolved[C]:
        """With other ``values``, whose origins are those that they have in ``before``.

        Raises:
            UserError: values that do not go together with the others.
        """
        origins = {name: before.get(name, {}).get("from", "flag") for name in values}
        return Resolved(dataclasses.replace(self.config, **values), {**self.origins, **origins})

    def record(self) -> dict[str, dict[str, Any]]:
        """``{name: {"value": …, "from": …}}``, as the manifest keeps it; of an address, without what may be secret."""
        values = self.config.as_dict()
        values |= {f.name: place_of(values[f.name]) for f in dataclasses.fields(self.config)
                   if f.metadata.get("address") and values[f.name]}
        return {k: {"value": v, "from": self.origins[k]} for k, v in values.items()}


def refuse_no_names(named: Mapping[str, Any]) -> None:
    """Whether texts name something, a model or a directory; what is None or no text is not looked at.

    Args:
        named: a text, or a list of them, by what it was given as.

    Raises:
        UserError: one is empty, as of a variable that a script did not set, or an access token.
    """
    for called, value in named.items():
        if problem := no_name(value):
            raise UserError(f"{called}: {problem}", _LOG_IN if "token" in problem else
                            f"leave {called} out for the default, or give it a value; perhaps a variable is not set")


def no_name(value: Any) -> str | None:
    """Why a text, or one of a list, can be no name; None if it can."""
    texts = [text for text in (value if isinstance(value, list | tuple) else [value]) if isinstance(text, str)]
    if any(not text.strip() for text in texts):
        return "is empty"
    return "holds an access token, which is no name" if any(map(is_token, texts)) else None


def same_result(cls: type[StageConfig]) -> tuple[str, ...]:
    """Names of the settings that say how something is computed, and leave the result as it is."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("same_result"))


def asks_more(cls: type[StageConfig], name: str, before: Any, now: Any) -> bool:
    """Whether a setting that changed asks for something that an earlier result does not have.

    Settings with ``check`` in their metadata say how much a result is compared: less of it is there already. None
    leaves it to the stage, which compares where it can; only an earlier refusal is certain to be less.
    """
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    if not field.metadata.get("check"):
        return True
    return before is False if now is None else now > (before or 0)


def as_flags(cls: type[StageConfig], settings: Mapping[str, Any], *, defaults: bool = False) -> list[str]:
    """The command line options that give ``settings``; those that are defaults anyway are left out unless asked for."""
    flags: list[str] = []
    for f in dataclasses.fields(cls):
        value = settings.get(f.name)
        if value is None or not defaults and value in (f.default, plain(f.default)):
            continue
        name = f.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif f.metadata.get("repeated"):
            flags += [word for one in value for word in (f"--{name}", f"{one}")]
        else:
            several = isinstance(value, (list, tuple))
            flags += [f"--{name}", ",".join(map(value_in_words, value)) if several else value_in_words(value)]
    return flags


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings as a note lists them.

    >>> in_words({"rank": 8, "quant": ("q8_0", "f16")})
    'rank 8, quant q8_0,f16'
    """
    return ", ".join(f"{name} {value_in_words(value)}" for name, value in settings.items())


def value_in_words(value: Any) -> str:
    """A setting's value as an option takes it; ``not set`` where there is none.

    >>> value_in_words(400.0), value_in_words((2e-4, 1.0)), value_in_words(0.5)
    ('400', '0.0002,1', '0.5')
    """
    if isinstance(value, (tuple, list)):
        return ",".join(map(value_in_words, value)) or "none"
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return "not set" if value is None else str(value)


def resolve(cls: type[C], flags: Mapping[str, Any], from_file: Mapping[str, Any] | None = None,
            family: Mapping[str, Any] | None = None) -> Resolved[C]:
    """Flags win over the file, the file over family defaults, those over the built-in defaults.

    Args:
        flags: values given on the command line by field name; ``None`` and empty tuples count as not given.
        from_file: the stage's section of the YAML file, already checked by ``settings_file.load_yaml``.
        family: defaults of the model's family for this stage.

    Raises:
        UserError: values outside their limits, all of them together.
    """
    values, origins, kinds = {}, {}, types_of(cls)
    for f in dataclasses.fields(cls):
        for origin, source in (("flag", flags), ("file", from_file or {}), ("family", family or {})):
            if source.get(f.name) not in (None, (), []):
                values[f.name], origins[f.name] = taken(f, kinds[f.name], source[f.name]), origin
                break
        else:
            origins[f.name] = "default"
    return Resolved(cls(**values), origins)


def as_before(resolved: Resolved[C], before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that an earlier result was asked for with, where nothing is said now: their values by name.

    Not those that leave the result as it is, nor what it is compared with: they belong to the command that they were
    given to. Nor a model, whose place is recorded relative to the run: the stage takes it up again itself. Nor one of
    several that say the same thing (``about``), where another of them is given.

    Args:
        before: as :meth:`Resolved.record` wrote it.
    """
    kinds, kept, said = types_of(type(resolved.config)), {}, said_by(type(resolved.config), resolved.given)
    for f in dataclasses.fields(resolved.config):
        earlier = before.get(f.name, {"from": "default", "value": None})
        passing = any(f.metadata.get(name) for name in ("same_result", "check", "kept_by_stage")) or f.name in said
        # An empty list is what a name such as `all` has set back, and so the default again.
        asked = earlier["from"] not in NOT_GIVEN and earlier["value"] != []
        if asked and not passing and resolved.origins[f.name] in NOT_GIVEN:
            kept[f.name] = converted(kinds[f.name], earlier["value"])
    return kept


def said_by(cls: type[StageConfig], given: Collection[str]) -> set[str]:
    """Names of settings that say the same thing (``about``) as one of those that are given, and those themselves."""
    found = {f.metadata["about"] for f in dataclasses.fields(cls) if f.metadata.get("about") and f.name in given}
    return {f.name for f in dataclasses.fields(cls) if f.metadata.get("about") in found} | {*given}


@functools.cache
def types_of(cls: type[StageConfig]) -> dict[str, Any]:
    """The type of each setting; ``from __future__ import annotations`` leaves their source text in the fields."""
    return typing.get_type_hints(cls)


def _kinds(kind: Any) -> tuple[set[type], bool]:
    """The plain types of a setting's type and whether None is allowed; tuples count as ``tuple``."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = {typing.get_origin(o) or o for o in options}
    return {p for p in plain if p is not type(None)}, type(None) in plain


def _item(kind: Any) -> type:
    """What a setting that is a list has in it: text or numbers."""
    return typing.get_args(kind)[0]


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list"}
_SEVERAL = {str: "text", int: "whole numbers", float: "numbers"}


_PAIRS = ("columns", "roles", "turn_keys", "parameter")  # settings whose items name something and what it is
_EXACT = 2 ** 53  # above it a float is no longer every whole number
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_WHOLE_IN_LIST = re.compile(r"[+-]?[0-9]{1,4000}")  # of those too large, limits tell; Python reads no more digits


def taken(f: dataclasses.Field, kind: Any, value: Any) -> Any:
    """A value of the command line or of YAML as this setting holds it, or as it is where that fails."""
    texts, apart = [value] if isinstance(value, str) else value, f.metadata.get("apart")
    if apart and isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        value = tuple(apart(texts)) or value  # without anything in it, it is refused
    return converted(kind, value)


def converted(kind: Any, value: Any) -> Any:
    """A value of the command line or of YAML as a setting of this type holds it, or as it is where that fails."""
    kinds, _ = _kinds(kind)
    if isinstance(value, os.PathLike):  # from Python
        value = (os.fspath(value),) if tuple in kinds else os.fspath(value)
    if tuple in kinds:
        return _listed(_item(kind), value)
    if {int, str} <= kinds and isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)  # what else the text may be, the setting knows
    # YAML 1.1 reads 2e-4 (without a dot) as text.
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def _listed(item: type, value: Any) -> Any:
    """The same for a setting that is a list."""
    if isinstance(value, str) and value.strip(", "):  # else it is empty, which is refused
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    elif item is not str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        return value
    if item is int:  # as a command line has them, which are texts
        return tuple(int(v) if isinstance(v, str) and _WHOLE_IN_LIST.fullmatch(v) else v for v in value)
    return tuple(converted(item, v) for v in value)


def misfit(f: dataclasses.Field, kind: Any, value: Any) -> str | None:
    """What is wrong with the type of a setting's value; None if nothing is."""
    kinds, optional = _kinds(kind)
    if value is None:
        return None if optional else f"{f.name}: needs a value"
    if isinstance(value, str) and str not in kinds and not value.strip(", "):
        return f"{f.name}: is empty"
    if not any(isinstance(value, k) and not (isinstance(value, bool) and k is not bool) for k in kinds):
        written = "; write NAME=VALUE, with commas between several"
        return (f"{f.name}: expected {' or '.join(sorted(_NAMES[k] for k in kinds))}, found {shown(value)}"
                f"{written if f.name in _PAIRS and isinstance(value, dict) else ''}")
    if isinstance(value, tuple):
        item = _item(kind)
        other = [v for v in value if not isinstance(v, item) or isinstance(v, bool)]
        return f"{f.name}: expected a list of {_SEVERAL[item]}, found {shown(other[0])} in it" if other else None
    return None


def problem_of(f: dataclasses.Field, kind: Any, value: Any) -> str | None:
    """What is wrong with the value of a setting of this type; None if nothing is."""
    if (problem := misfit(f, kind, value)) or value is None:
        return problem
    singles = value if isinstance(value, tuple) else (value,)
    if other := [single for single in singles if isinstance(single, float) and not math.isfinite(single)]:
        return f"{f.name}: {other[0]} is not a finite number"
    if not (f.metadata.get("prose") or f.metadata.get("files")) and (problem := no_name(value)):
        return f"{f.name}: {problem}"
    least, most, choices = (f.metadata.get(k) for k in ("least", "most", "choices"))
    for single in singles:
        if choices and single not in choices:
            word = f.metadata.get("habit", str.lower)(str(single))
            meant = near(word, _of_the_same_number(word, choices))
            return f"{f.name}: {shown(single)} is not one of {', '.join(choices)}{meant}"
        if isinstance(single, str):  # a setting that takes text as well as a number
            continue
        if least is not None and single < least:
            return f"{f.name}: {_number(single)} is below the least possible {_limit(least)}"
        if most is not None and single > most:
            counts = f"; it is {f.metadata['counts']}" if "counts" in f.metadata else ""
            return f"{f.name}: {_number(single)} is above the largest possible {_limit(most)}{counts}"
    return None


def _of_the_same_number(word: str, choices: Iterable[str]) -> list[str]:
    """Choices that a word may mean: who asks for three bits does not want six."""
    number = re.search(r"\d+", word)
    digits = sorted(number[0]) if number else []  # in whatever order they were typed
    return [choice for choice in choices if not digits or digits in map(sorted, re.findall(r"\d+", choice))]


def _number(value: Any) -> str:
    return value_in_words(value) if isinstance(value, float) else shown(value)


def _limit(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
