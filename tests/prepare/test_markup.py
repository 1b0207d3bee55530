"""What web pages leave in texts is counted and shown, and what only looks like it, or is meant, is not."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

from gemma_tune.prepare.markup import ENTITIES, TAGS, NoticedMarkup
from support.command import rows, write_rows
from support.prepared import report
from support.templates import assistant, user


def noticed(*examples):
    """As two processes notice it."""
    first, then = NoticedMarkup(), NoticedMarkup()
    for n, example in enumerate(examples, start=1):
        (first if n < 3 else then).look_at(f"rows.jsonl:{n}", example)
    first.add(pickle.loads(pickle.dumps(then)))
    return first.as_dict()


def says(text):
    return {"messages": [user("q"), assistant(text)]}


@pytest.mark.parametrize("text, kind, shown", [
    ("Profits at AT&amp;T rose.", ENTITIES, "Profits at AT&amp;T rose."), ("it&#39;s", ENTITIES, "it&#39;s"),
    ("a&nbsp;b", ENTITIES, "a&nbsp;b"), ("a &lt; b", ENTITIES, "a &lt; b"), ("&#x2019;", ENTITIES, "&#x2019;"),
    ("`&amp;` is code, and R&amp;D is not", ENTITIES, "` is code, and R&amp;D is not"), ("One.<br>Two.", TAGS, "One.<br>Two."),
    ("<p>One.</p>", TAGS, "<p>One.</p>"), ("one<br />two", TAGS, "one<br />two"), ("</DIV>", TAGS, "</DIV>"),
    ('see <a href="https://example.org">this</a>', TAGS, 'see <a href="https://example.org">th'),
    ("收入<span style='color:red'>增长</span>", TAGS, "收入<span style='color:red'>增长</span")])
def test_leftovers_are_counted_and_the_first_is_shown(text, kind, shown):
    other = TAGS if kind == ENTITIES else ENTITIES
    found = noticed(says("fine"), says(text), {"text": text}, {**says("fine"), "rejected": [user("q"), assistant(text)]})
    assert found == {kind: {"rows": 3, "first": f"rows.jsonl:2: {shown}"}, other: {"rows": 0, "first": ""}}


@pytest.mark.parametrize("text", [
    "AT&T; R&D; and Q&A;", "&notanentity;", "a<b and b>c", "if a <b and c> d", "x <p, y>", "```html\n<br>&amp;\n```", "use `<br>`",
    "In HTML, <br> breaks a line and &amp; is an ampersand.", "<!DOCTYPE html>\n<p>&amp;</p>", "在网页里，<br> 表示换行。"])
def test_what_is_meant_or_only_looks_like_it(text):
    assert noticed(says(text)) == {kind: {"rows": 0, "first": ""} for kind in (ENTITIES, TAGS)}


def test_what_tools_answer_is_for_programs():
    page = {"role": "tool", "content": "<p>&amp;</p>", "name": "fetch"}
    assert not any(kind["rows"] for kind in noticed({"messages": [user("q"), page, assistant("a")]}).values())


@pytest.mark.parametrize("text", ["&" * 500_000, "&a" * 250_000, "<" * 500_000, "<a " * 160_000, "<a b=" * 100_000, "<b" + " " * 500_000,
                                  "<br>" + "`" * 500_000, "&amp;" + "```" * 160_000, "&abc;" * 100_000])
def test_no_text_takes_long(text):
    start = time.process_time()
    noticed(says(text))
    assert time.process_time() - start < 2


def test_prepare_notes_them_and_takes_the_rows(prepare):
    plain = rows(6)
    plain[4]["messages"][1]["content"] = "R&amp;D rose.<br>It fell."
    done = prepare(write_rows(Path("rows.jsonl"), plain), "--valid", 0)
    said = " ".join(done["err"].split())
    assert ("in 1 row a text has HTML's names for characters outside code, as web pages leave them, which are learned as they stand; the "
            "first is rows.jsonl:5: R&amp;D rose.<br>It fell.") in said and "HTML's tags outside code" in said
    assert report()["markup"]["tags"]["rows"] == 1 and report()["rejected_rows"] == 0
