"""What is known about the parity of an export with the trained model, as a table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LLAMA_CPP, OLLAMA = COLUMNS = ("llama.cpp", "Ollama")
EQUAL, DIFFERS, KNOWN, UNCHECKED = STATES = ("equal", "differs", "known limit", "not checked")


@dataclass(frozen=True)
class Check:
    """One prompt in one column: one of ``STATES``, and if it is not ``equal``, how or why.

    A ``known limit`` is a difference that llama.cpp has with such prompts whatever was exported.
    """

    state: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}" if self.detail else self.state


@dataclass(frozen=True)
class Case:
    """One prompt: its name, its number of token ids (0 where Hugging Face's template refuses it), the checks."""

    name: str
    tokens: int
    checks: Mapping[str, Check]


@dataclass(frozen=True)
class Agreement:
    """Greedy answers of llama.cpp against those of the merged model in transformers.

    Args:
        answers: prompts that were answered.
        whole: answers that are equal to their end, or to the limit.
        tokens: in Hugging Face's answers, with the token that ends one.
        leading: of these, how many come before the first difference.
    """

    answers: int
    whole: int
    tokens: int
    leading: int


@dataclass(frozen=True)
class Parity:
    """The report: prompts, and for each GGUF (by its label) the agreement of greedy answers.

    Args:
        engine: what ran the GGUF files, without a path.
        greedy_unchecked: why answers were not compared; empty if they were.
    """

    engine: str
    cases: Sequence[Case]
    greedy: Mapping[str, Agreement]
    greedy_unchecked: str = ""
    columns: Sequence[str] = COLUMNS

    @property
    def ok(self) -> bool:
        """Whether something was checked, and all checked ids are equal but for known limits."""
        states = [check.state for case in self.cases for check in case.checks.values()]
        return EQUAL in states and DIFFERS not in states

    def counts(self, column: str) -> dict[str, int]:
        """How many prompts have each state."""
        states = [case.checks[column].state for case in self.cases]
        return {state: states.count(state) for state in STATES}

    def as_json(self) -> dict[str, Any]:
        """The table and its sums for the manifest, without the prompts' texts."""
        return {
            "ok": self.ok, "engine": self.engine,
            "prompts": [{"name": case.name, "tokens": case.tokens}
                        | {column: check.state for column, check in case.checks.items()} for case in self.cases],
            "ids": {column: {**{state.replace(" ", "_"): n for state, n in self.counts(column).items()},
                             "remarks": self._remarks(column)} for column in self.columns},
            "greedy": {label: vars(agreement) for label, agreement in self.greedy.items()}
            or {"not_checked": self.greedy_unchecked}}

    def _remarks(self, column: str) -> list[str]:
        """What is not equal: each difference by itself, and each reason for not checking once."""
        remarks: dict[str, list[str]] = {}
        for case in self.cases:
            if (check := case.checks[column]).state != EQUAL:
                remarks.setdefault(str(check), []).append(case.name)
        total = len(self.cases)
        return [f"{f'all {total}' if len(names) == total else ', '.join(names)}: {remark}"
                for remark, names in remarks.items()]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people, with its heading: prompt, tokens, and the state in each column."""
        heading = ("prompt", "tokens", *self.columns)
        return [heading, *((case.name, f"{case.tokens:,}" if case.tokens else "–",
                            *(str(case.checks[column]) for column in self.columns)) for case in self.cases)]

    def greedy_rows(self) -> list[tuple[str, ...]]:
        """The same for greedy answers, one row for each GGUF."""
        heading = ("GGUF", "whole answers equal", "tokens before the first difference")
        return [heading, *((label, f"{a.whole}/{a.answers}", f"{a.leading}/{a.tokens} ({_share(a)})")
                           for label, a in self.greedy.items())]

    def markdown(self) -> str:
        """A section for report.md."""
        lines = ["## Parity", "", "Token ids of whole prompts against Hugging Face's.", "",
                 *markdown_table(self.rows()), ""]
        if self.greedy:
            lines += ["Greedy answers of each GGUF in llama.cpp against the merged model's in transformers.", "",
                      *markdown_table(self.greedy_rows())]
        else:
            lines.append(f"Greedy answers: not checked: {self.greedy_unchecked}")
        return "\n".join([*lines, "", f"Checked with {self.engine}."]) + "\n"


def _share(agreement: Agreement) -> str:
    return f"{100 * agreement.leading / agreement.tokens:.1f} %" if agreement.tokens else "–"


def markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table of rows, the first of which is its heading."""
    for n, row in enumerate(rows):
        cells = (" ".join(cell.replace("|", "\\|").splitlines()) for cell in row)
        yield f"| {' | '.join(cells)} |"
        if n == 0:
            yield "|" + "---|" * len(row)
