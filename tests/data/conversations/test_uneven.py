"""Turns that do not alternate, made so: what is joined, what is left out, and what stays as it is."""

from __future__ import annotations

import json

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.conversations.uneven import JOINED, OPENING, UNANSWERED
from support.command import rows, write_rows
from support.templates import assistant, call, result, system, user


def mended(*turns):
    example = Formats(mends=True).example({"messages": list(turns)})
    return example.messages, example.mended


@pytest.mark.parametrize(("turns", "expected", "done"), [
    ([user("a"), assistant("b")], [user("a"), assistant("b")], ()),
    ([user("a"), user("b"), assistant("c"), assistant("d")], [user("a\n\nb"), assistant("c\n\nd")], (JOINED,)),
    ([assistant("hello"), user("a"), assistant("b")], [user("a"), assistant("b")], (OPENING,)),
    ([system("s"), assistant("hello"), assistant("you"), user("a"), assistant("b"), user("bye"), user("!")],
     [system("s"), user("a"), assistant("b")], (OPENING, UNANSWERED)),
    ([user("a"), assistant("b", train=False), assistant("c", train=False), user("d"), assistant("e")],
     [user("a"), assistant("b\n\nc", train=False), user("d"), assistant("e")], (JOINED,)),
    ([user("a"), assistant("b", reasoning_content="r"), assistant("c")], [user("a"), assistant("b\n\nc", reasoning_content="r")],
     (JOINED,)),
    ([user("a"), assistant("look"), call("weather"), result("rain"), assistant("c")],
     [user("a"), call("weather", "look"), result("rain"), assistant("c")], (JOINED,)),
    ([user("a"), user("b"), call("weather"), result("rain"), assistant("c")],
     [user("a\n\nb"), call("weather"), result("rain"), assistant("c")], (JOINED,)),
    ([user("a"), call("weather"), user("b"), assistant("c")], [user("a"), call("weather"), user("b"), assistant("c")], ()),
])
def test_what_becomes_of_turns(turns, expected, done):
    assert mended(*turns) == (expected, done)


@pytest.mark.parametrize("turns", [
    [user("a")], [assistant("a")], [system("s"), assistant("a")], [user("a"), assistant("b"), system("s"), user("c"), assistant("d")],
    [user("a"), assistant("b", train=False), assistant("c")], [user("a"), assistant("b"), assistant("c", reasoning_content="r")],
    [user("a"), call("weather"), assistant("c")], [user("a"), assistant("b"), user(" ")]])
def test_what_would_have_to_be_made_up_is_refused(turns):
    with pytest.raises(RowError) as caught:
        mended(*turns)
    with pytest.raises(RowError) as plain:
        Formats().example({"messages": turns})
    assert not any("--on-uneven" in problem.fix for problem in (*caught.value.problems, *plain.value.problems))


def test_both_answers_of_a_pair_have_the_same_prompt():
    prompt = [assistant("hello"), user("a"), user("b")]
    pair = Formats(mends=True).example({"chosen": [*prompt, assistant("c")], "rejected": [*prompt, assistant("d")]})
    assert (pair.messages, pair.rejected) == ([user("a\n\nb"), assistant("c")], [assistant("d")])


def test_logs_are_prepared_where_that_is_asked_for(cli, tiny, tmp_path):
    log = [json.loads(line)["messages"] for line in write_rows(tmp_path / "even.jsonl", rows(12)).read_text().splitlines()]
    uneven = [{"messages": [assistant("Hello!"), turns[0], user("please"), *turns[1:], user("thanks")]} for turns in log]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven))
    refused = cli("prepare", "log.jsonl", "--model", tiny)
    assert refused.code == 2 and "--on-uneven mend does so" in " ".join(refused.err.split())
    done = cli("prepare", "log.jsonl", "--model", tiny, "--on-uneven", "mend", "--json")
    assert done.code == 0 and done.json["summary"]["rows"] == 12
    said = " ".join(done.err.split())
    for text in ("in 12 rows neighbouring turns of one role became one", "said before the first question was left out",
                 "said after the last answer was left out"):
        assert text in said
    kept = [json.loads(line)["messages"] for line in (tmp_path / "runs/tiny-gemma/data/train.jsonl").read_text().splitlines()]
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in kept)
    assert all(turns[0]["content"].endswith("\n\nplease") for turns in kept)
