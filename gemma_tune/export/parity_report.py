"""What is known about the parity of an export with the trained model, as a table, as Markdown and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LLAMA_CPP, OLLAMA = COLUMNS = ("llama.cpp", "Ollama")
EQUAL, TEMPLATE, DIFFERS, KNOWN, UNCHECKED = STATES = ("equal", "template only", "differs", "known limit",
                                                       "not checked")


@dataclass(frozen=True)
class Check:
    """One prompt in one column: one of ``STATES``, and if it is not simply ``equal``, how or why.

    ``template only`` is equal as far as it can be told without an Ollama server: its TEMPLATE was rendered by Go's
    engine, and the text tokenised by llama.cpp. A ``known limit`` is a difference that llama.cpp has with such prompts
    whatever was exported, or that the export has told of already.
    """

    state: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}" if self.detail else self.state


@dataclass(frozen=True)
class Case:
    """One prompt: its name, its number of token ids (0 where Hugging Face's template refuses it), the checks.

    Args:
        ids: where the Ollama column is a server's, what was found out of its ids before: a server only counts them.
    """

    name: str
    tokens: int
    checks: Mapping[str, Check]
    ids: Check | None = None

    def with_server(self, check: Check, before: Check | None) -> Case:
        """The prompt with a server's check; ids that llama.cpp makes otherwise may be as many as in training.

        Args:
            before: the check of the ids that llama.cpp makes of the TEMPLATE's text.
        """
        if check.state == EQUAL and before and before.state in (KNOWN, DIFFERS):
            check = replace(before, detail=f"{before.detail}; as many tokens")
        return replace(self, checks={**self.checks, OLLAMA: check}, ids=before)


@dataclass(frozen=True)
class Agreement:
    """Greedy answers of llama.cpp against those of the merged model in transformers.

    Args:
        answers: prompts that were answered.
        whole: answers that are equal to their end, or to the limit.
        tokens: in llama.cpp's answers, with the token that ends one.
        leading: of these, how many come before the first difference.
    """

    answers: int
    whole: int
    tokens: int
    leading: int


@dataclass(frozen=True)
class Served:
    """Who the Ollama column is of: a server's version, the model that it was asked for, and what it does not tell.

    Args:
        shows: whether the server shows the text of its prompts.
        untold: what it does not tell, as a clause; empty if it tells all.
    """

    version: str
    model: str
    shows: bool
    untold: str = ""

    def __str__(self) -> str:
        return f"{OLLAMA} {self.version}"


@dataclass(frozen=True)
class Parity:
    """The report: prompts, and for each GGUF (by its label) the agreement of greedy answers.

    Args:
        engine: what ran the GGUF files, without a path; empty if nothing did.
        greedy_unchecked: why answers were not compared; empty if they were.
        served: the server of the Ollama column; None where that is of the TEMPLATE alone.
    """

    engine: str
    cases: Sequence[Case]
    greedy: Mapping[str, Agreement]
    greedy_unchecked: str = ""
    columns: Sequence[str] = COLUMNS
    served: Served | None = None

    @classmethod
    def from_json(cls, record: Any) -> Parity | None:
        """The report that :meth:`as_json` made, as far as it is one."""
        try:
            columns = tuple(record["ids"])
            cases = [Case(row["name"], row["tokens"], {
                column: Check(row[column], row.get("details", {}).get(column, "")) for column in columns},
                Check(**row["ids"]) if "ids" in row else None) for row in record["prompts"]]
            unchecked = record["greedy"].get("not_checked", "")
            greedy = {} if unchecked else {label: Agreement(**counts) for label, counts in record["greedy"].items()}
            served = Served(**record["served"]) if "served" in record else None
            return cls(record["engine"], cases, greedy, unchecked, columns, served)
        except (TypeError, KeyError, AttributeError):
            return None

    def with_server(self, served: Served, found: Sequence[Case]) -> Parity:
        """The report with the Ollama column as a server has it; ``found`` has that column alone."""
        theirs = {case.name: case.checks[OLLAMA] for case in found}
        unasked = Check(UNCHECKED, "the server was not asked")
        cases = [case.with_server(theirs.pop(case.name, unasked), case.ids if self.served else case.checks.get(OLLAMA))
                 for case in self.cases]
        unknown = {column: Check(UNCHECKED, "not among the prompts then") for column in self.columns}
        cases += [replace(case, checks={**unknown, **case.checks}) for case in found if case.name in theirs]
        return replace(self, cases=cases, columns=tuple(dict.fromkeys([*self.columns, OLLAMA])), served=served)

    @property
    def ok(self) -> bool:
        """Whether something was checked, and all checked ids are equal but for known limits."""
        states = [check.state for case in self.cases for check in case.checks.values()]
        return bool({EQUAL, TEMPLATE} & {*states}) and DIFFERS not in states

    def counts(self, column: str) -> dict[str, int]:
        """How many prompts have each state."""
        states = [case.checks[column].state for case in self.cases]
        return {state: states.count(state) for state in STATES}

    def as_json(self) -> dict[str, Any]:
        """The table and its sums for the manifest, without the prompts' texts."""
        return {
            "ok": self.ok, "engine": self.engine, **({"served": vars(self.served)} if self.served else {}),
            "prompts": [_as_json(case) for case in self.cases],
            "ids": {column: {**{state.replace(" ", "_"): n for state, n in self.counts(column).items()},
                             "remarks": self.remarks(column)} for column in self.columns},
            "greedy": {label: vars(agreement) for label, agreement in self.greedy.items()}
            or {"not_checked": self.greedy_unchecked}}

    def remarks(self, column: str, states: Sequence[str] = (DIFFERS, KNOWN, UNCHECKED)) -> list[str]:
        """What is not equal: each difference by itself, and each reason for not checking once."""
        remarks: dict[str, list[str]] = {}
        for case in self.cases:
            if (check := case.checks[column]).state in states:
                remarks.setdefault(str(check), []).append(case.name)
        total = len(self.cases)
        return [f"{f'all {total}' if len(names) == total else ', '.join(names)}: {remark}"
                for remark, names in remarks.items()]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people, with its heading: prompt, tokens, and the state in each column."""
        names = {OLLAMA: str(self.served)} if self.served else {}
        heading = ("prompt", "tokens", *(names.get(column, column) for column in self.columns))
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
        return "\n".join([*lines, "", " ".join(self._sources())]) + "\n"

    def _sources(self) -> Iterator[str]:
        """What each column comes from, as sentences."""
        if self.engine:
            yield f"Checked with {self.engine}."
        if self.served:
            yield (f"The column of {self.served} is that server's: it laid out each prompt for {self.served.model} and "
                   f"said how many tokens it read.{f' But {self.served.untold}.' if self.served.untold else ''}")
        else:
            yield ("No Ollama server was asked: its column is of the TEMPLATE, rendered by Go's engine and tokenised "
                   "by llama.cpp. An older Ollama can have a tokenizer of its own.")


def replaced(report: str, parity: Parity) -> str:
    """report.md with this section in the place of what it has of it, else at its end."""
    section = re.compile(r"^## Parity\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not section.search(report):
        return f"{report.rstrip()}\n\n{parity.markdown()}"
    return section.sub(lambda found: parity.markdown() + ("\n" if found.end() < len(report) else ""), report, count=1)


def _as_json(case: Case) -> dict[str, Any]:
    details = {column: check.detail for column, check in case.checks.items() if check.detail}
    states = {column: check.state for column, check in case.checks.items()}
    ids = {"ids": vars(case.ids)} if case.ids else {}
    return {"name": case.name, "tokens": case.tokens, **states, **({"details": details} if details else {}), **ids}


def _share(agreement: Agreement) -> str:
    return f"{100 * agreement.leading / agreement.tokens:.1f} %" if agreement.tokens else "–"


def markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table of rows, the first of which is its heading."""
    for n, row in enumerate(rows):
        cells = (" ".join(cell.replace("|", "\\|").splitlines()) for cell in row)
        yield f"| {' | '.join(cells)} |"
        if n == 0:
            yield "|" + "---|" * len(row)
