"""What a chat template may take: time, and characters that it makes. Templates come from the Hub, as weights do.

The sandbox of Jinja keeps a template from the machine, not from looping or from doubling a text thirty times. So each
turn of a loop looks at the clock, and what can make something larger counts what it makes.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.runtime import Undefined
from jinja2.visitor import NodeTransformer

from gemma_tune.base.errors import UserError

MOST_SECONDS, MOST_CHARACTERS = 10.0, 1 << 28  # of one rendering
_MOST_BITS = 1 << 16  # of a number
# Filters, and methods of texts, that make much of little: by the product of the two largest things that they are given.
_GROWING = frozenset(("replace", "join", "center", "indent", "ljust", "rjust", "zfill", "expandtabs", "translate",
                      "wordwrap", "batch", "slice", "tojson"))
_WRITING = frozenset(("tojson", "string", "join", "sum", "format", "pprint", "urlize", "list"))  # whatever it is
_WIDTH = re.compile(r"\d{6,}")  # of a place in a format


class Endless(TemplateRuntimeError):
    """A template that makes more of a conversation than anybody needs."""


class Slow(UserError):
    """A template that takes longer than anybody waits."""


class Bounded:
    """A compiled template whose rendering ends.

    Args:
        environment: sandboxed; it is copied.
        source: of the template.
    """

    def __init__(self, environment: Any, source: str):
        self._environment = _bounded(environment)
        self._template = self._environment.from_string(source)

    def render(self, **variables: Any) -> str:
        """As the template's own ``render``.

        Raises:
            jinja2.TemplateError: the template refuses it, or makes too much of it (:class:`Endless`).
            Slow: it takes too long.
        """
        self._environment.budget.begin()
        try:
            return self._template.render(variables)
        except MemoryError as e:
            raise Endless("it takes more memory than there is") from e


class _Budget:
    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.made, self.end = 0, time.monotonic() + MOST_SECONDS

    def tick(self, _: None) -> str:
        """What each turn of a loop begins with, as a filter: these are called without Jinja's checks."""
        if time.monotonic() > self.end:
            raise Slow(f"it takes more than {MOST_SECONDS:g} seconds", "mend the chat template, or use another model")
        return ""

    def spend(self, size: int) -> None:
        self.made += size
        if self.made > MOST_CHARACTERS:
            raise Endless(f"it makes more than {MOST_CHARACTERS >> 20} million characters of this conversation")

    def made_of(self, value: Any) -> Any:
        """A new value, counted."""
        if value.__class__ is str or isinstance(value, (str, list, tuple, dict)):
            self.spend(len(value))
        return value

    def joined(self, parts: Iterable[str]) -> str:
        """All texts as one."""
        kept, size, room = [], 0, MOST_CHARACTERS - self.made
        for part in parts:
            size += len(part)
            if size > room:
                break
            kept.append(part)
        self.spend(size)
        return "".join(kept)

    def written(self, *values: Any) -> str:
        """What Jinja's ``~`` makes of values."""
        return self.joined(str(self.writable(value)) for value in values)

    def writable(self, value: Any) -> Any:
        """A value that is about to be written out: one that holds another many times is counted so."""
        if value.__class__ is not str and isinstance(value, (list, tuple, dict)):
            self.spend(_length(value, {}))
        return value

    def refuse_growth(self, name: str, values: list[Any]) -> None:
        if name in _WRITING:
            for value in values:
                self.writable(value)
        if name in _GROWING:
            sizes = sorted((len(v) if hasattr(v, "__len__") else v for v in values
                            if isinstance(v, (int, str, list, tuple, dict))), reverse=True)
            if len(sizes) > 1 and sizes[0] * sizes[1] > MOST_CHARACTERS or sizes and sizes[0] > MOST_CHARACTERS:
                self.spend(MOST_CHARACTERS + 1)
        if name in ("format", "format_map") and any(isinstance(v, str) and _WIDTH.search(v) for v in values):
            self.spend(MOST_CHARACTERS + 1)


def _length(value: Any, known: dict[int, int]) -> int:
    """Characters of a value's texts and containers, each as often as it is there."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # a value that holds itself is written once
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(_length(one, known) for one in inner)
    return known[id(value)]


class _Counting(NodeTransformer):
    """Looks at the clock in each loop and macro, and counts what ``~`` and blocks make."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *others = node.nodes
        return _filter("written", first, others, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = _filter("tick", nodes.Const(None, lineno=node.lineno), [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For


def _filter(name: str, value: nodes.Node, arguments: list[Any], line: int) -> nodes.Node:
    return nodes.Filter(value, f"gemma_tune_{name}", arguments, [], None, None, lineno=line)


def _bounded(environment: Any) -> Any:
    """A copy of a sandboxed environment that counts, with a ``budget``."""
    budget = _Budget()

    class Environment(type(environment)):
        intercepted_binops = frozenset("+*%") | {"**"}

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = _Counting().visit(super()._parse(source, name, filename))
            return tree.set_environment(self)

        def call(self, context: Any, called: Any, /, *args: Any, **settings: Any) -> Any:
            name = getattr(called, "__name__", "")
            if name in _GROWING or name in _WRITING or name == "format_map":
                method = getattr(called, "__wrapped__", called)  # the sandbox has its own of `format`
                budget.refuse_growth(name, [getattr(method, "__self__", None), *args, *settings.values()])
            return budget.made_of(super().call(context, called, *args, **settings))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator != "+":
                _refuse_large(budget, operator, left, right)
            return budget.made_of(self.binop_table[operator](left, right))

    copy = object.__new__(Environment)
    vars(copy).update(vars(environment), shared=False, overlayed=True, cache=None, budget=budget, concat=budget.joined,
                      # What a compiler works out beforehand, nobody counts: with a context, it does not.
                      optimized=False, finalize=pass_context(lambda _, value: budget.writable(value)))
    copy.extensions = {key: extension.bind(copy) for key, extension in environment.extensions.items()}
    copy.filters = {name: _counted(name, function, budget) for name, function in environment.filters.items()}
    copy.filters |= {"gemma_tune_tick": budget.tick, "gemma_tune_written": budget.written}
    copy.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}  # endless text
    return copy


def _refuse_large(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(1, abs(right)) if operator == "**" else left.bit_length() + right.bit_length()
        if operator in ("*", "**") and bits > _MOST_BITS:
            raise Endless("it makes a number of thousands of digits")
    elif operator == "*" and not isinstance(left, (float, Undefined)) and not isinstance(right, (float, Undefined)):
        number, other = (left, right) if isinstance(left, int) else (right, left)
        if hasattr(other, "__len__") and isinstance(number, int) and len(other) * number > MOST_CHARACTERS:
            budget.spend(MOST_CHARACTERS + 1)
    elif operator == "%" and isinstance(left, str):
        budget.refuse_growth("format", [left, *(right.values() if isinstance(right, Mapping) else [right])])


def _counted(name: str, function: Callable, budget: _Budget) -> Callable:
    careful = name in _GROWING or name in _WRITING

    @functools.wraps(function)
    def counted(*args: Any, **settings: Any) -> Any:
        if not careful:
            return budget.made_of(function(*args, **settings))
        if name in ("join", "sum"):  # of what a filter before it goes on giving
            args = tuple(list(arg) if hasattr(arg, "__next__") else arg for arg in args)
        budget.refuse_growth(name, [*args, *settings.values()])
        return budget.made_of(function(*args, **settings))

    return counted
