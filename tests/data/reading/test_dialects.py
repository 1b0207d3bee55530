"""Tables as programs and people write them: what parts the columns, what a quote is, and that no row is swallowed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.base.errors import BAD_INPUT, UserError
from gemma_tune.base.listener import Listener
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import find_sources, read_blocks, source_of
from support.listener import Said

same_examples = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read(content: str | bytes, name: str, said: Listener | None = None, delimiter: str | None = None) -> list[Any]:
    """Values of a table's rows, or their errors; how much is read at once must not matter."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = source_of(Path(name), how=How(delimiter))
    found = [[row.error or row.value for block in read_blocks(source, size, said) for row in block.rows()]
             for size in (7, 1 << 20)]
    assert found[0] == found[1]
    return found[1]


def write(rows: list[tuple[str, ...]], **how: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **how).writerows(rows)
    return out.getvalue()


TWELVE = [(f"question {n}", {3: '"Hello', 6: 'world"'}.get(n, f"answer {n}")) for n in range(1, 13)]


@pytest.mark.parametrize(("sign", "name"), [("\t", "rows.tsv"), ("\t", "rows.csv"), ("|", "rows.csv")])
def test_a_quote_in_a_table_without_quoting_is_text_and_swallows_nothing(sign, name):
    said = Said()
    text = "\n".join(sign.join(row) for row in [("question", "answer"), *TWELVE]) + "\n"
    assert read(text, name, said) == [{"question": q, "answer": a} for q, a in TWELVE]
    assert said.notes[-1] == f"{name}: quotes are taken as text, first in line 4: '\"Hello'"
    # A broken row more does not change what the quotes are.
    broken = read(text + "just this\n", name)
    assert (len(broken), broken[-1]) == (13, "not a row of this table: 1 cell where the header has 2")


def test_a_word_in_quotes_is_text_where_no_program_would_have_quoted_it():
    assert read('q\ta\nx\t"Hello"\ny\t"Well"\nz\tplain\n', "rows.tsv")[0] == {"q": "x", "a": '"Hello"'}
    assert read('q\ta\nx\t"Hello, you"\ny\tyes, you\n', "rows.tsv")[0] == {"q": "x", "a": '"Hello, you"'}
    assert read('q\ta\nx\t5" wide\n', "rows.tsv") == [{"q": "x", "a": '5" wide'}]


ROWS = [("question", "answer"), ("a\tb", 'say "hi"'), ("two\nlines", "plain, with a comma"), ("c", "d"), ("1", "")]


@pytest.mark.parametrize("how", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_NONNUMERIC}])
@pytest.mark.parametrize("sign", ["\t", "|"])
def test_what_programs_have_quoted_is_unquoted(how, sign):
    said = Said()
    text = write([tuple(cell.replace("\t", sign) for cell in row) for row in ROWS], delimiter=sign, **how)
    assert read(text, "rows.tsv" if sign == "\t" else "rows.csv", said) == [
        {"question": q.replace("\t", sign), "answer": a} for q, a in ROWS[1:]]
    assert "cells in quotes are taken without them, first in line" in said.notes[-1]
    assert not said.warnings


@pytest.mark.parametrize("text", [
    'q\ta\nx\t"He said ""hi"""\ny\tplain\n',  # doubled quotes
    'q\ta\nx\t"Hello, you"\ny\tplain\n',  # Excel quotes what holds a comma
    '"q"\t"a"\n"x"\t"Hello"\n"y"\t"b"\n'], ids=["doubled", "for commas", "all"])
def test_quotes_without_a_tab_or_line_break_in_them_are_told_by_their_form(text):
    assert not [row for row in read(text, "rows.tsv") if row["a"].startswith('"')]


@same_examples
@given(st.lists(st.tuples(st.text(st.sampled_from('ab,"\n\t '), max_size=6), st.text(st.sampled_from('a,"\r\n\t;'), max_size=6)),
                min_size=1, max_size=6), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
def test_whatever_is_quoted_everywhere_comes_out_as_it_went_in(content, quoting):
    text = write([("question", "answer"), *content], delimiter="\t", quoting=quoting)
    assert read(text, "rows.tsv") == [{"question": q, "answer": a} for q, a in content]


@same_examples
@given(st.lists(st.tuples(st.text(st.sampled_from('ab,"; '), min_size=1, max_size=6), st.text(st.sampled_from('a,"| x'), max_size=6)),
                min_size=1, max_size=8))
def test_a_table_without_quoting_keeps_its_number_of_rows(content):
    content = [*content, ("x", "y")]
    text = "question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in content)
    assert len(read(text, "rows.tsv")) == sum(bool((q + a).strip(" ")) for q, a in content)


# --- CSV

def test_a_csv_cell_that_looks_like_rows_is_reported_with_its_lines():
    said = Said()
    text = "q,a\n" + "".join(f"{q},{a}\n" for q, a in TWELVE)
    assert len(read(text, "rows.csv", said)) == 9
    [warning] = said.warnings[:1]
    assert warning.startswith("rows.csv: lines 4 to 7: one row with line breaks inside quotes, though each line looks like a row")


@pytest.mark.parametrize("text", [
    'q,a\nx,"Dear John,\nthanks for your letter, and see you."\n', 'q,a\n"Why, then?","First\nthis, then that"\n',
    'q;a\nx;"first; second\nthird; fourth"\n', 'text\n"one\ntwo"\n', 'q,a\nx,"one\ntwo,three,four"\n'])
def test_sentences_with_commas_are_no_rows(text):
    said = Said()
    assert len(read(text, "rows.csv", said)) == 1
    assert not said.warnings


def test_a_broken_row_of_several_lines_names_them_all():
    [error, good] = read('q,a\nx,"one\ntwo",more\ny,z\n', "rows.csv")
    assert error == "not a row of this table: 3 cells where the header has 2 (lines 2 to 3)"
    assert good == {"q": "y", "a": "z"}
    assert read('q,a\nx,"one\ny,"two"\n', "rows.csv")[0].endswith("(lines 2 to 3)")


# --- the delimiter

@pytest.mark.parametrize(("text", "name"), [
    ("sep=;\nq;a\nx;y\n", "rows.csv"), ('"sep=|"\r\n\r\nq|a\r\nx|y\r\n', "rows.csv"), ("sep=\t\nq\ta\nx\ty\n", "rows.csv"),
    ("q|a\nx|y\n", "rows.csv"), ("q | a\nx | y\n", "rows.csv"), ("q;a\nx;y\n", "rows.tsv"), ("q,a\nx,y\n", "rows.tsv")])
def test_delimiters_are_found(text, name):
    assert read(text, name) in ([{"q": "x", "a": "y"}], [{"q": "x ", "a": "y"}]), "spaces behind a delimiter are no text"


@pytest.mark.parametrize("header", ['"Frage, kurz";"Antwort"', "Frage, kurz;Antwort"])
def test_a_comma_in_a_name_is_no_delimiter(header):
    rows = read(f"{header}\nWas ist das?;Ein Test, kurz\nWer?;Ich\nUnd, ja?;Ja, du\n", "rows.csv")
    assert rows[1] == {"Frage, kurz": "Wer?", "Antwort": "Ich"}
    assert rows[2] == {"Frage, kurz": "Und, ja?", "Antwort": "Ja, du"}


def test_a_comma_in_a_quoted_name_strips_no_cell():
    assert read('"q, or so",a\nx," y"\n', "rows.csv") == [{"q, or so": "x", "a": " y"}]


def test_a_column_of_sentences_stays_one_column():
    assert read("text, in short\nHello, you\nPlain\n", "rows.tsv") == [{"text, in short": "Hello, you"}, {"text, in short": "Plain"}]


def test_lines_count_from_the_top_of_the_file():
    Path("rows.csv").write_text("sep=;\n\nq;a\nx;y\n\nz;a\n")
    [block] = read_blocks(source_of(Path("rows.csv")))
    assert [row.line for row in block.rows()] == [4, 6]


def test_a_delimiter_can_be_named():
    assert read("q^a\nx, y^z;\n", "rows.csv", delimiter="^") == [{"q": "x, y", "a": "z;"}]
    assert read('q\ta\n"x\ty\n', "notes.txt", delimiter="\t") == [{"q": '"x', "a": "y"}]
    Path("rows.jsonl").write_text("{}")
    [rows, notes] = find_sources(["rows.jsonl", "notes.txt"], Path("keep"), how=How("\t"))
    assert (rows.kind, rows.delimiter, notes.kind, notes.delimiter) == ("jsonl-or-json", None, "csv", "\t")
    with pytest.raises(UserError, match=r"(?m)^rows.csv:1: the header has no ';' between its columns: 'q,a'$") as caught:
        read("q,a\nx,y\n", "rows.csv", delimiter=";")
    assert caught.value.hint and caught.value.exit_code == BAD_INPUT


@pytest.mark.parametrize(("flags", "yaml"), [
    (["--delimiter", "tab"], None), (["--delimiter", "\\t"], None), ([], "prepare: {delimiter: tab}"), ([], 'prepare: {delimiter: "\\t"}')])
def test_the_option_is_one_of_the_command_line_and_of_yaml(cli, tiny, flags, yaml):
    Path("table.txt").write_text("question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in TWELVE))
    if yaml:
        Path("s.yaml").write_text(yaml)
        flags = ["--config", "s.yaml"]
    done = cli("prepare", "table.txt", "--columns", "user=question,assistant=answer", "--model", tiny, "--json", *flags)
    assert done.code == 0, done.err
    assert done.json["summary"]["rows"] == 12
    assert "table.txt: quotes are taken as text, first in line 4" in " ".join(done.err.split())
    again = cli("prepare", "--json")
    assert again.json["status"] == "up-to-date", again.err


@pytest.mark.parametrize("value", ["", "ab", "x", '"', "\n"])
def test_what_is_no_delimiter(cli, tiny, value):
    done = cli("prepare", "--delimiter", value, "--model", tiny)
    assert done.code == BAD_INPUT
    assert "is no sign between columns" in done.err


@pytest.mark.parametrize("columns", [
    ("user=Frage, kurz,assistant=Antwort",), ("assistant=Antwort", "user=Frage, kurz"), ("user=Frage, kurz, assistant=Antwort",)])
def test_a_columns_own_comma_stays_on_the_command_line(cli, tiny, columns):
    Path("t.csv").write_text('"Frage, kurz";"Antwort"\nWo?;Da.\n')
    flags = [part for one in columns for part in ("--columns", one)]
    done = cli("prepare", "t.csv", "--model", tiny, "--run", "r", *flags)
    assert done.code == 0, done.err
    assert json.loads(Path("r/data/train.jsonl").read_text())["messages"][0]["content"] == "Wo?"
