"""Built-in example data, so that a first run needs no file of one's own.

The example teaches one visible habit: every answer to a question on financial
analysis comes as four labelled lines, in the language of the question.  A
habit of form is chosen on purpose.  A small model picks it up in a short run
on a laptop, and whether it did can be decided by a plain check
(:func:`in_form`) on questions the training never saw, without another model
or a person as the judge.

The conversations were written for this project.  They show a form and are not
investment advice.

Pairs of answers lie beside it, for learning from preferences: to a plain
question the better answer explains in a sentence and ends with the fact, the
worse one apologises, asks back or talks about the question.

Beside them lies general text: short passages of many kinds in several languages,
written for this project as well, in two halves of the same make-up about other
things.  By one an export rounds, so that a model does not lose what it knew
beside what it learned; on the other it measures.

This module needs the standard library only, so the
command line can list the example or check an answer before torch is loaded.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = [
    "EXAMPLES",
    "FORM_DESCRIPTION",
    "SAMPLE",
    "example_path",
    "general_calibration",
    "general_measuring",
    "heldout_path",
    "heldout_questions",
    "in_form",
    "training_path",
]

SAMPLE = "finance"
"""The name people type to pick the example instead of a file of their own."""

EXAMPLES = (SAMPLE, "pairs")
"""The built-in examples to prepare by name: conversations, and pairs of a
better and a worse answer."""

FORM_DESCRIPTION = (
    "Every answer is exactly four lines, labelled Conclusion, Basis, Risk and "
    "Next check (in Chinese 结论, 依据, 风险 and 复核), with one sentence on each."
)
"""What the example teaches, in words to show to people."""

# One entry per language: the labels in their order, and the colons allowed
# after them.  Chinese text is typed with either colon, and both read the same
# to a person, so neither counts as a fault there.
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Conclusion", "Basis", "Risk", "Next check"), (":",)),
    (("结论", "依据", "风险", "复核"), ("：", ":")),
)


def _real_path(name: str) -> Path:
    """Return a data file of this package as a path in the file system.

    Other parts of the program open, hash and copy the file like one given by
    the user, so they need a real path and not a resource handle.
    """
    return Path(str(files(__name__) / name))


def training_path() -> Path:
    """Return the path of the training conversations, one JSON object a line."""
    return _real_path(f"{SAMPLE}.jsonl")


def example_path(name: str) -> Path:
    """Return the path of one of the ``EXAMPLES``, one JSON object a line."""
    if name not in EXAMPLES:
        raise ValueError(f"no example {name!r}")
    return _real_path(f"{name}.jsonl")


def heldout_path() -> Path:
    """Return the path of the held-out questions.

    They lie in a file of their own so that no run can train on them by
    accident: a before-and-after comparison means something only on questions
    the model has not seen.
    """
    return _real_path(f"{SAMPLE}_heldout.jsonl")


def heldout_questions() -> list[dict[str, Any]]:
    """Return the held-out questions in file order.

    Each has ``id``, ``language`` (``"en"`` or ``"zh"``) and ``messages``,
    which end with the user turn that waits for an answer.
    """
    return _rows(heldout_path())


def general_calibration() -> list[str]:
    """Return the passages of general text to round by, about 3,000 tokens."""
    return [row["text"] for row in _rows(_real_path("general_calibration.jsonl"))]


def general_measuring() -> list[str]:
    """Return the passages of general text to measure on, about 2,000 tokens.

    Nothing of them is calibrated by: what a number format loses can only be
    told on text that its rounding has not seen.
    """
    return [row["text"] for row in _rows(_real_path("general_measuring.jsonl"))]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, one JSON object a line."""
    # Split on "\n" alone: splitlines() would also cut at rarer separators
    # (U+2028 for one) that may stand unescaped inside a JSON string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _has_label(line: str, label: str, colons: tuple[str, ...]) -> bool:
    """Say whether the line is the label, one of the colons, then some text."""
    return any(
        line.startswith(label + colon) and bool(line[len(label + colon) :].strip())
        for colon in colons
    )


def in_form(answer: str) -> bool:
    """Say whether an answer has the form that the example teaches.

    White space around the whole answer is forgiven, because generation often
    leaves some.  Anything else is not: a lenient check would report success
    for a model that learned only half of the habit.  The content of the lines
    is not judged.
    """
    lines = answer.strip().split("\n")
    return any(
        len(lines) == len(labels)
        and all(
            _has_label(line, label, colons)
            for line, label in zip(lines, labels, strict=True)
        )
        for labels, colons in _FORMS
    )
