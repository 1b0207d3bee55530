"""What is kept in memory of rows that are not used."""

from __future__ import annotations

from gemma_tune.data.conversations.problems import Problem
from gemma_tune.data.reading.rows import Row
from gemma_tune.prepare.findings import Findings
from gemma_tune.prepare.noticed import Judged, Rejected


def test_rows_are_named_and_not_kept():
    """Each can hold pictures of megabytes; rejected.jsonl has them."""
    rejected = [Rejected(Row("a.jsonl", n, {"images": ["x" * 1000]}), (Problem(code, "because", "mend it"),))
                for n, code in enumerate(("picture", "too_long"), start=1)]
    findings = Findings()
    findings.add(Judged(None, rejected), source=0, usable=3, held_out=False)
    assert [str(item) for item in findings.examples] == ["a.jsonl:1: because", "a.jsonl:2: because"]
    assert [str(item) for item in findings.long_examples] == ["a.jsonl:2: because"]
    assert {item.row.value for item in findings.examples + findings.long_examples} == {None}
    assert (findings.rows, findings.rejected, findings.first_of) == (5, 2, {"picture": "a.jsonl:1", "too_long": "a.jsonl:2"})
