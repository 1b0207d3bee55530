"""``prepare`` on whatever it may be given: no row is lost, and nothing but a message comes out when it fails."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.base.errors import BAD_INPUT
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.prepare.noticed import kind_of
from support.command import invoke
from support.prepared import SIDES, alpaca, check_files, read, report, row, same_examples, talk, with_template
from support.templates import TOOLS, assistant, call, result, user

ANY = Path("any/data")

# --- rows: arbitrary JSON, good rows of every format, and these with something broken in them

texts = st.one_of(st.sampled_from(["hi", " ", "", "<end_of_turn>", "a\u2028b", "\ufffd", "\ud800", "0", "{{name}}"]),
                  st.text(max_size=8))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                      max_leaves=6)

GOOD: list[dict[str, Any]] = [
    row(), row("q", "another answer"), row("q", "a", "Be brief."), row("q", "a", reasoning_content="because"),
    talk(1, 2, 3), talk(40), alpaca(), alpaca(input="1 and 2"), alpaca(history=[["a", "b"]], system="s"),
    {"messages": [user("a"), call("weather", city="Oslo"), result("wet"), assistant("wet")], "tools": TOOLS},
    {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", train=True)]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"},
    {"instruction": "a", "context": "b", "response": "c", "category": "d"},
    {"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]},
    {"text": "Once upon a time."}, {"text": "word " * 60}, {"question": "a", "answer": "b", "system": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"system": "SYSTEM: s", "chat": "USER: a\n\n\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{}'} "
                                    "<|endoftext|>\n\n\nFUNCTION RESPONSE: 1\n\n\nASSISTANT: b <|endoftext|>"},
]


@st.composite
def half_broken(draw: Any) -> Any:
    """A good row in which one value, at any depth, is another one or gone."""
    value = copy.deepcopy(draw(st.sampled_from(GOOD)))
    place: Any = value
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            del place[key]
        return value


any_rows = st.one_of(st.sampled_from(GOOD), half_broken(), values)
no_json = st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=["Cs"]), max_size=12)
lines = st.one_of(any_rows.map(json.dumps), no_json)
SETTINGS = [(), ("--on-long", "split", "--max-length", 128), ("--on-long", "truncate", "--max-length", 128),
            ("--max-length", 128, "--duplicates", "keep"), ("--near-duplicates", "--take", "chosen"),
            ("--train-on", "last", "--valid", 0.5), ("--allow", "placeholder,foreign_marker,control_character"),
            ("--columns", "user=question,assistant=answer,system=system")]


@pytest.fixture(scope="module", params=["qwen2_5", "gemma3"])
def model(request, tiny, tmp_path_factory) -> Path:
    """A model that knows tools, and one that does not."""
    return with_template(tiny, tmp_path_factory.mktemp(request.param), request.param)


def run(model: Path, *args: object) -> dict[str, Any] | None:
    """The summary of ``prepare`` in the run "any", or None where it refuses its input as it should."""
    done = invoke("prepare", *args, "--model", model, "--run", "any", "--max-rejected", 1, "--json", "--force")
    assert done.code in (0, BAD_INPUT), done.err
    assert "Traceback" not in done.err
    if done.code == BAD_INPUT:
        assert done.json["error"]["message"] and done.json["error"]["hint"]
        return None
    check_files(done.json["summary"], model, ANY, "truncate" in args)
    return done.json["summary"]


def value_of(line: str) -> Any:
    """What a line says; itself where it is no JSON."""
    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(line.removeprefix("\ufeff"), parse_constant=refuse)
    except ValueError:
        return line.rstrip("\r")


@same_examples(40)
@given(content=st.lists(lines, max_size=8), newline=st.sampled_from(["\n", "\r\n"]), args=st.sampled_from(SETTINGS))
def test_every_row_ends_up_in_exactly_one_file(model, content, newline, args):
    text = newline.join([json.dumps(row("good")), *content, ""])
    Path("any.jsonl").write_bytes(text.encode())
    summary = run(model, "any.jsonl", *args)
    by_line = {n: value_of(line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if summary is None:
        assert len(kinds(by_line.values(), args)) > 1, "there is a row that can be used"
        return
    divided = len(report(ANY)["ends_held_out"])
    assert summary["rows"] == len(by_line)
    gone = [record for side in ("rejected", "duplicates") for record in read(side, ANY)]
    assert all(record["file"] == "any.jsonl" for record in gone)
    for record in read("rejected", ANY):
        assert record["row"] == by_line[record["line"]]
    left = [by_line[n] for n in sorted(by_line.keys() - {record["line"] for record in gone})]
    for record in read("duplicates", ANY):
        assert record["row"] == example(by_line[record["line"]], args)
        same = example(by_line[int(record["same_as"].partition(":")[2])], args)
        assert record["kind"] == "near" or same == record["row"]
    # What is left is there as it was, in the order of the file on either side; of a text that is divided, behind the others, a
    # part is on each.
    expected = [json.dumps(example(value, args), sort_keys=True) for value in left]
    sides = {side: read(side, ANY) for side in SIDES[:2]}
    parts = [[side.pop()["text"] for _ in range(divided)] for side in sides.values()]
    whole = [json.dumps({"text": begin + end}) for begin, end in zip(*parts, strict=True)]
    found = {side: [json.dumps(r, sort_keys=True) for r in of_side] for side, of_side in sides.items()}
    assert Counter(expected) == Counter(found["train"] + found["valid"] + whole)
    for side, of_side in found.items():
        assert of_side == [value for value in expected if value in of_side], side


def formats(args: tuple[Any, ...]) -> Formats:
    columns = {"user": "question", "assistant": "answer", "system": "system"} if "--columns" in args else {}
    return Formats(None, columns, "chosen" if "--take" in args else None)


def kinds(found: Iterable[Any], args: tuple[Any, ...]) -> set[str]:
    """What is learned from rows, those that cannot be read left out; one run learns from one kind."""
    there = set()
    for value in found:
        with contextlib.suppress(RowError):
            there.add(kind_of(formats(args).example(value).as_row()))
    return there


def example(value: Any, args: tuple[Any, ...]) -> Any:
    """A row as train.jsonl has it, by the module that knows the formats."""
    found = formats(args).example(value)
    if found.text is not None:
        return {"text": found.text}
    return {"messages": found.messages} | ({"tools": found.tools} if found.tools else {})


@same_examples(20)
@given(content=st.lists(lines, max_size=6), indent=st.sampled_from([None, 1]))
def test_every_element_of_an_array_ends_up_in_exactly_one_file(model, content, indent):
    Path("any.json").write_text("[" + ",\n".join(content) + "]", encoding="utf-8")
    summary = run(model, "any.json")
    elements = value_of(Path("any.json").read_text(encoding="utf-8"))
    if summary is None or not isinstance(elements, list):
        return
    assert summary["rows"] == len(elements)
    assert Counter(json.dumps(r["row"]) for r in read("rejected", ANY)) <= Counter(map(json.dumps, elements))


# --- bytes

ROWS = [row("a"), alpaca("é"), {"bad": 1}, *(row(f"q{n}") for n in range(5))]
LINES = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in ROWS).encode()


def parquet(table: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue()


FILES = {
    "jsonl": LINES, "json": json.dumps(ROWS, indent=1).encode(), "csv": b'prompt,completion\na,b\n"c\n",d\ne\n',
    "tsv": b"instruction\toutput\na\tb\n", "parquet": parquet({"prompt": ["a", "b"], "completion": ["c", None]}),
    "jsonl.gz": gzip.compress(LINES, mtime=0), "json.zst": zstandard.compress(json.dumps(ROWS).encode()),
    "txt": LINES.decode().encode("utf-16"),
}


@st.composite
def damaged_files(draw: Any) -> tuple[str, bytes]:
    """A name's ending, and bytes: any, or a good file of some kind that is cut, or has something else in it."""
    ending = draw(st.sampled_from(sorted(FILES)))
    if not draw(st.integers(0, 3)):
        return ending, draw(st.binary(max_size=60))
    content = FILES[draw(st.sampled_from([ending, ending, ending, *sorted(FILES)]))]
    start = draw(st.integers(0, len(content)))
    end = draw(st.sampled_from([start, start + 1, start + 9, len(content)]))
    return ending, content[:start] + draw(st.binary(max_size=4)) + content[end:]


@same_examples(120)
@given(damaged_files())
def test_any_bytes(tiny, file):
    ending, content = file
    Path(f"any.{ending}").write_bytes(content)
    run(tiny, f"any.{ending}")


@pytest.mark.parametrize("ending", FILES)
def test_files_that_are_whole(tiny, ending):
    Path(f"any.{ending}").write_bytes(FILES[ending])
    summary = run(tiny, f"any.{ending}", "--valid", 0)
    good = {"csv": (2, 1), "tsv": (1, 0), "parquet": (1, 1)}.get(ending, (7, 1))
    assert (summary["train_rows"], summary["rejected_rows"]) == good
