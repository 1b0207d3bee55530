"""``prepare`` from the command line: what it reads together, where each row goes, and what the split keeps apart."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tune.encoding.labels import IGNORE_INDEX
from gemma_tune.encoding.tokens import answers_of, lengths_of, liked, open_tokens
from support.command import rows, write_rows
from support.prepared import (
    DATA,
    SIDES,
    alpaca,
    contents,
    format_of,
    kept,
    learned,
    prepared,
    questions,
    read,
    report,
    row,
    sequences,
    with_template,
)
from support.rows import ALPACA, GLAIVE, OPENAI_TOOLS, SHAREGPT
from support.templates import TOOLS, assistant, call, user


@pytest.fixture(scope="module")
def tool_model(tiny, tmp_path_factory) -> Path:
    """A model whose template knows tools."""
    return with_template(tiny, tmp_path_factory.mktemp("tools"))


# --- what is read

def test_conversations_come_out_as_they_went_in(prepare):
    several = {"messages": [*row()["messages"], user("And a share?"), assistant("A part of a firm.")], "id": 7}
    done = prepare(write_rows(Path("rows.jsonl"), [several, *rows(3)]), "--valid", 0)
    assert read("train") == [{"messages": several["messages"]}, *rows(3)]
    assert read("valid") == read("rejected") == read("duplicates") == []
    assert done["summary"]["turns"] == 4 + 3 * 2
    assert (done["stage"], done["status"], done["run"]) == ("prepare", "done", "runs/tiny-gemma")
    names = {f"{side}_rows": f"{side}.jsonl" for side in SIDES[:3]} | {
        "duplicate_rows": "duplicates.jsonl", "data_report": "report.json", "tokens": "tokens"}
    assert done["artifacts"] == {name: str(DATA / path) for name, path in names.items()}
    assert done["next"] == ["gemma-tune train --run runs/tiny-gemma"]


def test_figures_about_the_tokens(prepare):
    done = prepare(write_rows(Path("rows.jsonl"), [row(answer="word " * n) for n in (1, 2, 40)]))["summary"]
    assert done["shortest"] < done["longest"] == done["p99"]
    assert done["shortest"] <= done["p50"] <= done["p90"] <= done["p99"]
    assert 0 < done["trained_tokens"] < done["tokens"] <= 3 * done["longest"]
    assert done["max_length"] == 2048


@pytest.mark.parametrize("value, question, instruction", [
    (alpaca(), "Add.", None),
    (alpaca(input="1 and 2"), "Add.\n\n1 and 2", None),
    (alpaca(input=""), "Add.", None),
    (alpaca(input=None, system=None), "Add.", None),
    (alpaca(input="  \n"), "Add.", None),
    (alpaca(system="Be brief."), "Add.", "Be brief."),
    (alpaca(input="1 and 2", system=" Be brief. "), "Add.\n\n1 and 2", " Be brief. "),
    (alpaca("", input="1 and 2"), "1 and 2", None),
    (alpaca(None, input="1 and 2"), "1 and 2", None),
    (alpaca(" Add. ", "3", source="web"), " Add. ", None),
])
def test_alpaca_rows_become_conversations(prepare, value, question, instruction):
    prepare(write_rows(Path("rows.jsonl"), [value]))
    assert kept() == [row(question, "3", instruction)["messages"]]


def test_a_file_with_one_row(prepare):
    summary = prepare(write_rows(Path("rows.jsonl"), [row()]))["summary"]
    assert (summary["train_rows"], summary["valid_rows"]) == (1, 0)


def test_several_files_are_read_in_order(prepare):
    write_rows(Path("one.jsonl"), [row("a"), {"bad": 1}])
    Path("two.json").write_text(json.dumps([row("b"), 7], indent=1))
    prepare("one.jsonl", "two.json", "--valid", 0)
    assert questions() == ["a", "b"]
    assert [(r["file"], r["line"]) for r in read("rejected")] == [("one.jsonl", 2), ("two.json", 14)]


def many_kinds() -> list[str]:
    """Sources of every kind, each with a row in another format; their names."""
    write_rows(Path("a.jsonl"), [row("JSONL"), {"bad": 1}])
    Path("b.csv").write_text('question,answer\nCSV,"two\nlines"\nshort\n')
    pq.write_table(pa.table({"conversations": [[{"from": "human", "value": "Parquet"}, {"from": "gpt", "value": "a"}],
                                               [{"from": "human", "value": "alone"}]]}), "c.parquet")
    Path("d.json.gz").write_bytes(gzip.compress(json.dumps([alpaca("gzip"), alpaca(7.5)], indent=1).encode()))
    Path("folder/deep").mkdir(parents=True)
    Path("folder/e.tsv").write_text("prompt\tcompletion\nTSV\ta\n")
    write_rows(Path("folder/deep/f.ndjson"), [row("NDJSON"), row("JSONL")])
    for unread in ("folder/.hidden.jsonl", "folder/notes.txt"):
        write_rows(Path(unread), [row("unread")])
    return ["a.jsonl", "b.csv", "c.parquet", "d.json.gz", "folder", "-"]


def test_many_kinds_of_sources_together(prepare):
    prepare(*many_kinds(), "--columns", "user=question,assistant=answer", "--valid", 0,
            stdin=json.dumps({"messages": row("stdin")["messages"]}) + "\n[]\n")
    assert questions() == ["JSONL", "CSV", "Parquet", "gzip", "NDJSON", "TSV", "stdin"]
    assert read("train")[1]["messages"][1]["content"] == "two\nlines"
    assert [(r["file"], r["line"], r["code"]) for r in read("rejected")] == [
        ("a.jsonl", 2, "missing_column"), ("b.csv", 4, "broken_row"), ("c.parquet", 2, "no_answer"),
        ("d.json.gz", 6, "not_text"), ("<stdin>", 2, "not_an_object")]
    [twice] = read("duplicates")
    assert (twice["file"], twice["line"], twice["same_as"]) == ("folder/deep/f.ndjson", 2, "a.jsonl:1")
    assert (twice["kind"], twice["row"]) == ("exact", row("JSONL"))
    assert [(f["file"], f["rows"]) for f in report()["files"]] == [
        ("a.jsonl", 2), ("b.csv", 2), ("c.parquet", 2), ("d.json.gz", 2), ("folder/deep/f.ndjson", 2),
        ("folder/e.tsv", 1), ("<stdin>", 2)]
    openings = {"a.jsonl:1": "JSONL", "b.csv:2": "CSV", "c.parquet:1": "Parquet", "d.json.gz:2": "gzip",
                "folder/deep/f.ndjson:1": "NDJSON", "folder/e.tsv:2": "TSV", "<stdin>:1": "stdin"}
    shown = [r for name in ("longest", "shortest") for r in report()["before_the_limit"][f"{name}_rows"]]
    assert len(shown) == 6 and all(openings[f"{r['file']}:{r['line']}"] == r["opening"] for r in shown)
    assert report()["formats"]["prompt-completion"] == report()["formats"]["columns"] == 1


def test_standard_input_is_kept_for_the_next_time(prepare):
    write_rows(Path("a.jsonl"), rows(2))
    prepare("-", "a.jsonl", "--valid", "0", stdin=json.dumps(row("piped")))
    before = contents(DATA)
    assert prepare(stdin="")["status"] == "up-to-date"
    assert "<stdin>" not in prepare("--force", stdin="")["err"]
    assert {**contents(DATA), "report.json": b""} == {**before, "report.json": b""}
    assert questions() == ["piped", "Say number 0.", "Say number 1."]


def test_published_formats_in_one_run(tool_model):
    """Alpaca, ShareGPT, OpenAI with tools, Glaive and Dolly as they are published, for a template that takes all."""
    glaive = GLAIVE | {"chat": GLAIVE["chat"].replace(" USER: is not my name.", "")}
    dolly = {"instruction": "When did it start?", "context": "It started in 2000.", "response": "In 2000.",
             "category": "closed_qa"}
    Path("alpaca.json").write_text(json.dumps([ALPACA, ALPACA | {"input": ""}], indent=4))
    Path("sharegpt.json").write_text(json.dumps([SHAREGPT]))
    write_rows(Path("openai.jsonl"), [OPENAI_TOOLS])
    write_rows(Path("glaive.jsonl"), [glaive])
    write_rows(Path("dolly.jsonl"), [dolly])
    done = prepared(tool_model, "alpaca.json", "sharegpt.json", "openai.jsonl", "glaive.jsonl", "dolly.jsonl", "--valid", 0,
                    "--max-rejected", 0)
    assert report()["formats"] == {"alpaca": 3, "sharegpt": 2, "messages": 1}
    assert "· format: alpaca (rows have `instruction` and `output`, or Dolly's `response`, or what" in done["err"]
    end, ask = "<|im_end|>", '<tool_call>\n{"name": "get_current_weather", "arguments": '
    texts = learned(format_of(tool_model))
    assert texts[:3] == [["Telegram" + end]] * 2 + [["It is short." + end, "You're welcome!" + end]]
    assert texts[3] == [
        ask + '{"location": "San Francisco, USA", "format": "celsius"}}\n</tool_call>\n' + ask +
        '{"location": "Paris", "format": "celsius"}}\n</tool_call>' + end,
        "It is 21 degrees in San Francisco, and 17 in Paris." + end]
    assert [text.count("<tool_call>") for text in texts[4]] == [0, 1, 0] and texts[5] == [["In 2000." + end]][0]
    [openai] = [record for record in read("train") if "get_current_weather" in json.dumps(record.get("tools"))]
    assert openai["tools"] == OPENAI_TOOLS["tools"] and len(openai["messages"]) == 5
    assert "get_exchange_rate" in format_of(tool_model).tokenizer.decode(sequences()[4].ids).partition("<|im_end|>")[0]


def test_a_system_message_is_folded_where_the_template_has_none(prepare, tiny):
    """The tiny model gets Gemma's template, which has no system role: its text opens the first user turn."""
    prepare(write_rows(Path("rows.jsonl"), [row(), row(instruction="Answer as a banker would.")]), "--valid", 0)
    plain, folded = (format_of(tiny).tokenizer.decode(s.ids) for s in sequences())
    assert kept()[1][0] == {"role": "system", "content": "Answer as a banker would."}
    assert folded == plain.replace("user\nWhat", "user\nAnswer as a banker would.\n\nWhat")
    assert "system" not in folded


def test_a_system_message_that_the_template_refuses_is_put_before_the_first_turn(tiny, tmp_path):
    model = with_template(tiny, tmp_path / "models", "gemma")  # Gemma 1 and 2
    done = prepared(model, write_rows(Path("rows.jsonl"), [row(), row(instruction="Be brief.")]), "--valid", 0)
    assert "no place for a system message: in 1 row it is put before the first user turn" in done["err"]
    assert "user\nBe brief.\n\nWhat is a bond?<end_of_turn>" in format_of(model).tokenizer.decode(sequences()[1].ids)


def test_columns_that_are_named(prepare):
    write_rows(Path("rows.jsonl"), [{"question": "2+2?", "answer": "4", "context": "Be brief.", "id": 1},
                                    {"question": "3+3?", "answer": "6", "hint": "x"}, {"question": "4+4?"}])
    error = prepare("rows.jsonl", code=2)
    assert "use --columns user=question,assistant=answer,system=context" not in error["problems"][0]
    assert "use --columns user=question,assistant=answer" in error["problems"][0]
    prepare("rows.jsonl", "--columns", "user=question, assistant=answer, system=context", "--valid", 0)
    assert kept() == [row("2+2?", "4", "Be brief.")["messages"], row("3+3?", "6")["messages"]]
    assert [(r["line"], r["code"]) for r in read("rejected")] == [(3, "missing_column")]
    assert "both `user=…` and `assistant=…`" in prepare("rows.jsonl", "--columns", "user=question", code=2)["err"]


def test_a_question_and_its_answer_alone_are_taken_as_that_and_it_is_said(prepare):
    write_rows(Path("rows.jsonl"), [*({"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(4)),
                                    {"question": "Which?", "answer": "A", "choices": ["1", "2"]}])
    done = prepare("rows.jsonl", "--valid", 0)
    assert ("`question` is taken for the question and `answer` for the answer to learn, as nothing else is in 4 rows; "
            "--columns user=…,assistant=… says otherwise") in " ".join(done["err"].split())
    assert kept() == [row(f"{n}+1?", f"{n + 1}")["messages"] for n in range(4)]
    [other] = read("rejected")
    assert (other["line"], other["fix"]) == (5, "use --columns user=question,assistant=answer")
    done = prepare("rows.jsonl", "--columns", "user=answer,assistant=question", "--valid", 0)
    assert "is taken for" not in done["err"] and kept()[0] == row("1", "0+1?")["messages"]


@pytest.mark.parametrize("cells", [{"answer": 7}, {"context": "C"}])
def test_where_most_rows_have_more_than_a_question_and_its_answer_columns_are_to_be_named(prepare, cells):
    """The few that have no more are of the same table: the others are not to be left out for these."""
    write_rows(Path("rows.jsonl"), [{"question": f"{n}+1?", "answer": f"{n + 1}"} | (cells if n else {}) for n in range(4)])
    hint = prepare("rows.jsonl", "--valid", 0, "--max-rejected", 0.2, code=2)["hint"]
    use, _, command = hint.partition(": ")
    assert use.startswith("use --columns user=question,assistant=answer") and command.endswith(use.removeprefix("use "))
    prepare("rows.jsonl", "--valid", 0, *use.removeprefix("use ").split())
    assert len(kept()) == 4 and kept()[0] == row("0+1?", "1")["messages"]


@pytest.mark.parametrize(("names", "named"), [("problem,solution", "user=problem,assistant=solution"),
                                              ("问题（必填）,答案", "'user=问题（必填）,assistant=答案'")])
def test_where_columns_are_to_be_named_the_command_is_shown_whole(cli, tiny, names, named):
    Path("two words.csv").write_text("\n".join([names, *(f"{n}+1?,{n}" for n in range(4))]))
    refused = cli("prepare", "two words.csv", "--model", tiny, "--valid", 0, "--json")
    command = f"gemma-tune prepare 'two words.csv' --model {tiny} --valid 0 --json --columns {named}"
    assert refused.code == 2 and refused.json["error"]["hint"] == f"use --columns {named}: {command}"
    done = cli(*shlex.split(command)[1:])
    assert done.code == 0 and done.json["summary"]["rows"] == 4, done.err
    trained = cli("train", "two words.csv", "--model", tiny, "--run", "other", "--rank", 2)  # which has no such option
    assert f"gemma-tune prepare --run other --model {tiny} 'two words.csv' --columns {named}" in " ".join(trained.err.split())
    again = cli("prepare", "two words.csv", "--columns", "user=x,assistant=y", "--model", tiny)
    assert again.code == 2 and "two words.csv' --" not in again.err


PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


def test_pairs_beside_other_rows_have_to_be_decided_about(prepare):
    write_rows(Path("rows.jsonl"), [row("a"), PAIR, row("b"), {"prompt": "Hi", "completion": "Ho", "label": False}])
    error = prepare("rows.jsonl", "--valid", 0, code=2)
    assert error["problems"] == ["2 rows to answer like, the first at rows.jsonl:1", "1 pair of answers, the first at rows.jsonl:2",
                                 "1 answer that is good or bad, the first at rows.jsonl:4"]
    assert "--take chosen" in error["err"] and "--take pairs --max-rejected 0.75" in error["err"]
    prepare("rows.jsonl", "--valid", 0, "--take", "chosen", "--max-rejected", 0.3)
    assert kept()[1] == row("Hi", "Hello!")["messages"] and len(kept()) == 3
    assert "Go away" not in (DATA / "train.jsonl").read_text()
    prepare("rows.jsonl", "--valid", 0, "--take", "pairs", "--max-rejected", 0.75)  # as the hint says
    assert read("train") == [{"messages": kept()[0], "rejected": row("Hi", "Go away.")["messages"][1:]}]
    assert [(r["code"], r["line"]) for r in read("rejected")] == [("no_pair", 1), ("no_pair", 3), ("no_pair", 4)]
    error = prepare("rows.jsonl", "--valid", 0, "--take", "auto", code=2)
    assert error["problems"][1] == "1 pair of answers, the first at rows.jsonl:2", "as without --take"


def test_what_is_said_to_do_about_several_kinds_counts_the_rows_that_cannot_be_used_anyway(prepare):
    bad = [{"prompt": f"q{n}", "completion": "Ho", "label": False} for n in range(4)]
    pairs = [{"prompt": f"p{n}", "chosen": "word " * (1 + 90 * (n == 4)), "rejected": "Go away."} for n in range(5)]
    write_rows(Path("rows.jsonl"), [row(f"{n}") for n in range(14)] + bad + pairs + [{"messages": []}] * 2)
    flags = ("--valid", 0, "--max-length", 128)
    hint = prepare("rows.jsonl", *flags, code=2)["hint"]
    for take, kept_rows in (("chosen", 18), ("pairs", 4)):
        share = re.search(rf"--take {take} (--max-rejected) ([\d.]+)", hint).groups()
        assert prepare("rows.jsonl", *flags, "--take", take, *share)["summary"]["train_rows"] == kept_rows


def test_a_pair_that_is_too_long(prepare):
    """Either answer counts. No way leaves half of it, and what is said fits a pair."""
    short, long = "no", "no " * 400
    pairs = [PAIR | {"prompt": f"Hi {n}", "chosen": c, "rejected": r} for n, (c, r) in enumerate(
        [("yes", short), ("yes", long), (long, "yes"), (long + "a", long + "b")])]
    write_rows(Path("rows.jsonl"), pairs)
    flags = ("--valid", 0, "--max-length", 128, "--max-rejected", 0.8)
    for way in ("drop", "split"):
        done = prepare("rows.jsonl", *flags, "--on-long", way)
        assert done["summary"]["train_rows"] == 1 and [r["line"] for r in read("rejected")] == [2, 3, 4]
        assert ("a pair cannot be divided" in done["err"]) == (way == "split")
        assert all("--on-long" not in json.dumps(r) for r in read("rejected"))
    done = prepare("rows.jsonl", *flags, "--on-long", "truncate")
    assert done["summary"]["train_rows"] == 3 and max(lengths_of(found := open_tokens(DATA / "tokens" / "train.arrow"))) == 128
    assert answers_of(found).tolist() == [1, -1] * 3
    [refused] = read("rejected")
    assert refused["line"] == 4 and "the answers are not two that differ" in json.dumps(refused)
    error = prepare("rows.jsonl", *flags, "--on-long", "fail", code=2)
    assert "3 of 4 rows are longer" in error["message"] and "split" not in error["hint"]


def test_the_preview_tells_which_answer_is_which(prepare):
    write_rows(Path("rows.jsonl"), [PAIR | {"prompt": f"Hi {n}"} for n in range(3)])
    shown = prepare("rows.jsonl", "--valid", 0, "--preview", 1)["err"]
    one, other = shown.split("── sequence 1, chosen\n")[1].split("── sequence 2, rejected\n")
    assert "⟦Hello!<end_of_turn>⟧" in one and "⟦Go away.<end_of_turn>⟧" in other and "sequence 3" not in shown
    assert "each row is a pair" in shown
    write_rows(Path("rows.jsonl"), [{"prompt": "Hi", "completion": c, "label": c == "Hello!"} for c in ("Hello!", "Ho")])
    shown = prepare("rows.jsonl", "--valid", 0, "--preview", 2)["err"]
    assert "── sequence 1, good\n" in shown and "── sequence 2, bad\n" in shown


def test_pairs_are_prepared_from_a_table_and_again_from_what_was_prepared(prepare):
    Path("rows.csv").write_text("prompt,completion,label\nHi,Hello!,True\nHi,Go away.,False\n")
    assert prepare("rows.csv", "--valid", 0)["summary"]["kind"] == "judged"
    before = read("train")
    assert [r["kto_tag"] for r in before] == [True, False]
    shutil.copy(DATA / "train.jsonl", "again.jsonl")
    prepare("again.jsonl", "--valid", 0)
    assert read("train") == before


def test_what_follows_the_prompt_does_not_divide_pairs_with_the_same_one(prepare):
    """Turns of the user in an answer are part of it, not of what is asked."""
    rows_ = []
    for n in range(40):
        asked = [user(f"Question {n // 2}")]
        rows_.append({"prompt": asked, "chosen": [assistant("Which?"), user(f"That {n}."), assistant("Here.")],
                      "rejected": [assistant("No.")]})
    prepare(write_rows(Path("rows.jsonl"), rows_), "--valid", 0.3)
    train, valid = ({r["messages"][0]["content"] for r in read(side)} for side in ("train", "valid"))
    assert train and valid and not train & valid


def test_pairs_become_two_sequences_with_the_same_prompt(prepare):
    pairs = [PAIR | {"prompt": f"Hi {n}", "rejected": "Go away." * (n + 1)} for n in range(8)]
    write_rows(Path("rows.jsonl"), [*pairs, pairs[0], pairs[1] | {"chosen": "Well, hello!"}, PAIR | {"rejected": "no " * 400}])
    found = prepare("rows.jsonl", "--valid", 0.3, "--max-length", 200, "--on-long", "split")
    summary = found["summary"]
    assert summary["kind"] == "pairs" and summary["duplicate_rows"] == 1 and summary["rejected_by_reason"] == {"too_long": 1}
    assert summary["sequences"] == 2 * (summary["train_rows"] + summary["valid_rows"]) == 18
    for side in ("train", "valid"):
        sequences = open_tokens(DATA / "tokens" / f"{side}.arrow")
        marks, texts = answers_of(sequences), []
        assert marks.tolist() == [1, -1] * (len(sequences) // 2)
        for n, (chosen, rejected) in enumerate(zip(sequences.select(range(0, len(sequences), 2)),
                                                   sequences.select(range(1, len(sequences), 2)))):
            starts = [int(np.flatnonzero(s["labels"] != IGNORE_INDEX)[0]) for s in (chosen, rejected)]
            assert starts[0] == starts[1] and (chosen["input_ids"][:starts[0]] == rejected["input_ids"][:starts[0]]).all()
            assert chosen["input_ids"][-1] == rejected["input_ids"][-1], "both end with the terminator"
            texts.append(read(side)[n]["messages"][0]["content"])
        assert len(liked(sequences)) == len(lengths_of(liked(sequences))) == len(sequences) // 2
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(liked(sequences), sequences.select(
            range(0, len(sequences), 2))))
    asked = [{r["messages"][0]["content"] for r in read(side)} for side in ("train", "valid")]
    assert not asked[0] & asked[1], "one prompt is on one side"


@pytest.mark.parametrize("code, text", [("foreign_marker", "What does <|im_end|> or [INST] mean?"),
                                        ("placeholder", "Dear {{name}}, hello"), ("control_character", "a\x0cb")])
def test_findings_that_may_be_allowed(prepare, code, text):
    write_rows(Path("rows.jsonl"), [row(text), row("Is <b>bold</b> or [1] a marker?"), row("What is <end_of_turn>?")])
    prepare("rows.jsonl", "--valid", 0)
    assert [r["code"] for r in read("rejected")] == [code, "template_marker"]
    prepare("rows.jsonl", "--valid", 0, "--allow", code)
    assert questions() == [text, "Is <b>bold</b> or [1] a marker?"]
    assert [r["code"] for r in read("rejected")] == ["template_marker"]
    others = {"foreign_marker", "placeholder", "control_character"} - {code}
    prepare("rows.jsonl", "--valid", 0, "--allow", ",".join(sorted(others)))
    assert [r["code"] for r in read("rejected")] == [code, "template_marker"]


# --- templates with names

TOOL_ROW = {"messages": [user("Weather?"), assistant("", tool_calls=[{"name": "get", "arguments": {"city": "Oslo"}}])],
            "tools": [{"name": "get", "description": "The weather"}]}


def with_named_templates(model: Path, folder: Path, templates: dict[str, str], in_config: bool) -> Path:
    """A copy of a model with several chat templates: a list in its tokenizer's configuration, or files."""
    folder = folder / model.name
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    if in_config:
        path = folder / "tokenizer_config.json"
        named = [{"name": name, "template": text} for name, text in templates.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
        return folder
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / place).write_text(text)
    return folder


@pytest.mark.parametrize("in_config", [True, False], ids=["list", "files"])
def test_rows_with_tools_have_the_template_for_them(tool_model, tmp_path, in_config):
    tool_use = (tool_model / "chat_template.jinja").read_text()
    default = "{% set tools = none %}" + tool_use
    model = with_named_templates(tool_model, tmp_path / "named", {"default": default, "tool_use": tool_use}, in_config)
    done = prepared(model, write_rows(Path("rows.jsonl"), [row("a"), TOOL_ROW]), "--valid", 0)
    assert "chat template: the model's own `tool_use` of default, tool_use" in done["err"]
    assert learned(format_of(model)) == learned(format_of(tool_model)) != []
    format_of(model).tokenizer.save_pretrained("adapter")
    assert not Path("adapter/additional_chat_templates").exists(), "a run has one template"
    assert format_of(Path("adapter")).template == tool_use


def test_calls_behind_which_the_user_goes_on_are_counted(tool_model, prepare):
    """Also where several blocks are put together."""
    def row(*turns):
        return {"messages": [user("q"), call("weather", city="Oslo"), *turns], "tools": TOOLS}

    then = {"role": "tool", "content": "Rain", "name": "weather", "tool_call_id": "call00001"}
    write_rows(Path("rows.jsonl"), [row(), row(then, assistant("Rain.")), row(user("And now?"), assistant("Rain."))])
    write_rows(Path("more.jsonl"), [row(user("And here?"), assistant("Sun."))])
    done = prepared(tool_model, "rows.jsonl", "more.jsonl", "--valid", 0)
    assert ("in 2 rows a tool is called and the user goes on without its result, which is learned so; the first is rows.jsonl:3: if what "
            "the user says there is the result, give that turn the role `tool`") in " ".join(done["err"].split())
    assert report()["calls_without_result"] == {"rows": 2, "first": "rows.jsonl:3"}
    write_rows(Path("rows.jsonl"), [row(), row(then, assistant("Rain."))])
    assert "goes on without its result" not in prepared(tool_model, "rows.jsonl", "--valid", 0)["err"]


def test_rows_with_tools_are_refused_where_their_template_is_another_ones(tool_model, tmp_path):
    tool_use = (tool_model / "chat_template.jinja").read_text()
    named = {"default": "{% set tools = none %}" + tool_use, "tool_use": "{{ 'Tools!' }}" + tool_use}
    model = with_named_templates(tool_model, tmp_path / "named", named, False)
    prepared(model, write_rows(Path("rows.jsonl"), [row("a"), TOOL_ROW]), "--valid", 0)
    [bad] = read("rejected")
    assert (bad["code"], bad["reason"]) == ("template", "the model's chat template has no place for tools and leaves them out")
    assert "a run has one chat template" in bad["fix"] and "save tool_use as chat_template.jinja" in bad["fix"]
    shutil.copyfile(model / "additional_chat_templates/tool_use.jinja", model / "chat_template.jinja")
    prepared(model, "rows.jsonl", "--valid", 0)
    assert read("rejected") == []


def test_no_template_is_the_default(tool_model, tmp_path):
    for in_config in (True, False):
        model = with_named_templates(tool_model, tmp_path / f"named{in_config}", {"rag": "a", "tool_use": "b"}, in_config)
        error = prepared(model, write_rows(Path("rows.jsonl"), [row("a")]), code=2)
        assert error["message"].startswith("this model has the chat templates rag, tool_use, and none of them is `default`")
        assert "chat_template.jinja" in error["hint"]


def test_a_call_below_what_is_said_is_learned_with_it(tool_model, prepare):
    turns = [("human", "Weather?"), ("gpt", "Let me see."), ("function_call", '{"name": "get", "arguments": {}}')]
    value = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": TOOL_ROW["tools"]}
    prepared(tool_model, write_rows(Path("rows.jsonl"), [value]), "--valid", 0)
    assert learned(format_of(tool_model)) == [
        ['Let me see.\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call><|im_end|>']]
    prepare(write_rows(Path("rows.jsonl"), [value, row("a")]), "--valid", 0)
    assert [r["code"] for r in read("rejected")] == ["template"], "it has no place for tools"


# --- white space around texts

CODE = "    return 1\n"


def test_white_space_that_the_template_keeps_is_learned(prepare, tiny, tmp_path):
    model = with_template(tiny, tmp_path / "qwen")
    rows_ = [row("Body?", CODE), row(" Body?", CODE), row("Body?", CODE.strip()), row("Body?", f"{CODE}"), row("x")]
    done = prepared(model, write_rows(Path("rows.jsonl"), rows_), "--valid", 0)
    chat = format_of(model)
    assert [messages[-1]["content"] for messages in kept()] == [CODE, CODE, CODE.strip(), "A loan."]
    assert learned(chat) == [[f"{answer}<|im_end|>"] for answer in (CODE, CODE, CODE.strip(), "A loan.")]
    assert "in 3 rows a text begins or ends with white space, which the chat template keeps" in done["err"]
    assert "leaves out white space" not in done["err"]
    assert report()["white_space_left_out"] == {"rows": 0, "first": ""}
    assert [r["line"] for r in read("duplicates")] == [4], "a space more is another conversation here"


def test_white_space_that_the_template_leaves_out_is_told_of(prepare, tiny):
    rows_ = [row("x"), row("Body?", CODE), row("Body? ", CODE.strip()), row("Body?", CODE, instruction=" Be brief.")]
    done = prepare(write_rows(Path("rows.jsonl"), rows_), "--valid", 0)
    assert [messages[-1]["content"] for messages in kept()] == ["A loan.", CODE, CODE]
    assert learned(format_of(tiny)) == [["A loan.<end_of_turn>"], *[["return 1<end_of_turn>"]] * 2]
    assert "in 3 rows the chat template leaves out white space at the beginning or end of a text" in done["err"]
    assert "the first is rows.jsonl:2" in done["err"]
    assert "in 1 row a text begins or ends with white space, which the chat template keeps" in done["err"]
    assert report()["white_space_left_out"] == {"rows": 3, "first": "rows.jsonl:2"}
    assert [r["line"] for r in read("duplicates")] == [3]


def test_white_space_does_not_tell_questions_apart(prepare, tiny, tmp_path):
    """A question stays on its side of the split, with and without white space around it."""
    model = with_template(tiny, tmp_path / "qwen")
    rows_ = [row(f"{before}q{n}{after}", f"{n} {before}") for n in range(40) for before, after in (("", ""), (" ", "\n"))]
    prepared(model, write_rows(Path("rows.jsonl"), rows_), "--valid", 0.3)
    train, valid = ({q.strip() for q in questions(side)} for side in ("train", "valid"))
    assert valid and not train & valid and len(train | valid) == 40
    assert report()["prompts_with_several_answers"]["prompts"] == 40


# --- duplicates

def test_a_repeated_conversation_is_listed_with_where_it_was_first(prepare):
    write_rows(Path("a.jsonl"), [row("x"), row(" x\n", "A loan. "), row("x", "Another answer.")])
    write_rows(Path("b.jsonl"), [alpaca("x", "A loan."), row("x", train=True), row("x", instruction="Be brief.")])
    done = prepare("a.jsonl", "b.jsonl", "--valid", 0, "--max-rejected", 0)
    assert [(r["file"], r["line"], r["same_as"], r["kind"]) for r in read("duplicates")] == [
        ("a.jsonl", 2, "a.jsonl:1", "exact"), ("b.jsonl", 1, "a.jsonl:1", "exact"), ("b.jsonl", 2, "a.jsonl:1", "exact")]
    assert [r["row"] for r in read("duplicates")] == [row(" x\n", "A loan. "), row("x"), row("x")]
    assert len(read("train")) == 3
    assert "3 duplicates are left out; they are listed in runs/tiny-gemma/data/duplicates.jsonl" in done["err"]


def test_duplicates_may_be_kept(prepare):
    write_rows(Path("rows.jsonl"), [row("x"), row("y"), row("x"), row("x")])
    prepare("rows.jsonl", "--duplicates", "keep", "--valid", 0.5)
    assert sorted(questions() + questions("valid")) == ["x", "x", "x", "y"]
    assert {*questions()} & {*questions("valid")} == set()
    assert read("duplicates") == []


def test_near_duplicates(prepare):
    words = random.Random(1).sample([f"word{n}" for n in range(500)], 120)
    other = [*words[:60], "changed", *words[61:]]
    write_rows(Path("rows.jsonl"), [row("q", " ".join(words)), row("q", " ".join(other)), row("short"), row("Short", "A LOAN!"),
                                    row("q", " ".join(words)), row("q", " ".join(reversed(words))), row("q", " ".join(other))])
    prepare("rows.jsonl", "--valid", 0)
    assert [(r["line"], r["same_as"], r["kind"]) for r in read("duplicates")] == [
        (5, "rows.jsonl:1", "exact"), (7, "rows.jsonl:2", "exact")]
    prepare("rows.jsonl", "--valid", 0, "--near-duplicates")
    assert [(r["line"], r["same_as"], r["kind"]) for r in read("duplicates")] == [
        (2, "rows.jsonl:1", "near"), (4, "rows.jsonl:3", "near"), (5, "rows.jsonl:1", "exact"),
        (7, "rows.jsonl:1", "exact")], "of what repeats a row that is left out the one that stays is named"
    assert read("duplicates")[0]["row"] == row("q", " ".join(other))
    prepare("rows.jsonl", "--valid", 0, "--near-duplicates", "--near-threshold", 1)
    assert [r["line"] for r in read("duplicates")] == [4, 5, 7]


def test_pairs_are_near_duplicates_only_where_both_answers_are(prepare):
    better, worse, other = (" ".join(f"{name}{n}" for n in range(60)) for name in ("better", "worse", "other"))
    write_rows(Path("rows.jsonl"), [{"prompt": "q", "chosen": better, "rejected": text}
                                    for text in (worse, other, worse.replace("worse30", "changed"))])
    prepare("rows.jsonl", "--valid", 0, "--near-duplicates")
    assert [(r["line"], r["same_as"], r["kind"]) for r in read("duplicates")] == [(3, "rows.jsonl:1", "near")]


CONTRADICTION = "rows.jsonl:1 and rows.jsonl:3: what is the better answer in one of them, or a good one, is the worse one in another"


@pytest.mark.parametrize("padding", ["", "  "])
@pytest.mark.parametrize(("better", "worse"), [("Paris.", "Rome."), ("Rome", "Paris"), ("Yes", "yes!")])
def test_pairs_whose_answers_change_places_contradict_each_other_and_repeat_nothing(prepare, better, worse, padding):
    asked = " ".join(f"word{n}" for n in range(300))  # so that the answers are little of what is compared
    said = [(better, worse), ("Oslo", "Bonn"), (f"{worse}{padding}", better), (better, worse)]
    write_rows(Path("rows.jsonl"), [{"prompt": asked if n != 1 else "q", "chosen": one, "rejected": other} for n, (one, other) in enumerate(said)])
    for args in ((), ("--near-duplicates",)):
        done = prepare("rows.jsonl", "--valid", 0, *args)
        assert [(r["line"], r["same_as"], r["kind"]) for r in read("duplicates")] == [(4, "rows.jsonl:1", "exact")]
        assert report()["contradictions"] == {"rows": 2, "examples": [["rows.jsonl:1", "rows.jsonl:3"]]}
        assert f"2 rows contradict each other, such as {CONTRADICTION}" in " ".join(done["err"].split())
    assert len(read("train")) == 3


def test_pairs_that_nearly_do_so_repeat_nothing_either(prepare):
    asked = " ".join(f"word{n}" for n in range(300))
    rows = [("Paris, I think", "Rome"), ("Rome!", "Paris, I think so"), ("paris, i think", "Rome."), ("Rome", "Paris, I think")]
    write_rows(Path("rows.jsonl"), [{"prompt": asked, "chosen": one, "rejected": other} for one, other in rows])
    prepare("rows.jsonl", "--valid", 0, "--near-duplicates")
    assert [(r["line"], r["same_as"]) for r in read("duplicates")] == [(3, "rows.jsonl:1"), (4, "rows.jsonl:2")]


def test_an_answer_that_is_marked_as_good_and_as_bad_is_a_contradiction(prepare):
    marks = [("a", True), ("b", True), ("a", False), ("b", True)]
    write_rows(Path("rows.jsonl"), [{"prompt": "q", "completion": text, "label": mark} for text, mark in marks])
    done = prepare("rows.jsonl", "--valid", 0)
    assert report()["contradictions"] == {"rows": 2, "examples": [["rows.jsonl:1", "rows.jsonl:3"]]}
    assert CONTRADICTION in " ".join(done["err"].split())
    write_rows(Path("rows.jsonl"), [row("x", "1"), row("x", "2"), row("y", "1")])
    assert "contradict" not in prepare("rows.jsonl", "--valid", 0)["err"] and not report()["contradictions"]["rows"]


@pytest.mark.parametrize("differs", ["calls", "reasoning", "mark"])
def test_rows_whose_answers_differ_beside_their_texts_are_no_near_duplicates(cli, tiny, tmp_path, differs):
    """The second one learns something else, and the third nearly what the first does."""
    words = [" ".join(f"{name}{n}" for n in range(40)) for name in ("one", "other")]
    said = [f"{words[0]} first", f"{words[1]} second", f"{words[0]} third"]
    write_rows(Path("rows.jsonl"), {
        "calls": [{"messages": [user("q"), call("weather", city=text)], "tools": TOOLS} for text in said],
        "reasoning": [{"messages": [user("q"), assistant("a") | {"reasoning_content": text}]} for text in said],
        "mark": [{"prompt": "q", "completion": f"{words[0]} {n}", "label": n != 1} for n in range(3)]}[differs])
    model = tiny if differs == "mark" else with_template(tiny, tmp_path / "other", "qwen3")
    prepared = cli("prepare", "rows.jsonl", "--model", model, "--run", "runs/x", "--valid", 0, "--near-duplicates")
    assert prepared.code == 0, prepared.err
    found = map(json.loads, Path("runs/x/data/duplicates.jsonl").read_text().splitlines())
    assert [(r["line"], r["same_as"], r["kind"]) for r in found] == [(3, "rows.jsonl:1", "near")]


def test_rows_that_are_too_long_repeat_nothing(prepare):
    """A row that is left out must not take another one with it."""
    write_rows(Path("rows.jsonl"), [row("x", "word " * 90), row("x", "word " * 90), row("y")])
    prepare("rows.jsonl", "--valid", 0, "--max-length", 64)
    assert [r["code"] for r in read("rejected")] == ["too_long"] * 2
    assert read("duplicates") == [] and questions() == ["y"]


def test_prompts_with_several_answers_are_reported_and_kept(prepare):
    write_rows(Path("rows.jsonl"), [row("x", "1"), row("y"), row("x", "2"), row("x", "2"), row("z"), row("x", "1", "s"),
                                    row("x", "3", "s")])
    done = prepare("rows.jsonl", "--valid", 0)
    assert report()["prompts_with_several_answers"] == {
        "prompts": 2, "rows": 4,
        "examples": [["rows.jsonl:1", "rows.jsonl:3"], ["rows.jsonl:6", "rows.jsonl:7"]]}
    assert "2 prompts have several answers, in 4 rows" in done["err"]
    assert len(read("train")) == 6
    write_rows(Path("rows.jsonl"), [row("x", "1"), row("x", "1"), row("y", "1")])
    prepare("rows.jsonl", "--valid", 0, "--duplicates", "keep")
    assert report()["prompts_with_several_answers"]["prompts"] == 0


# --- the split

def test_the_split_is_the_same_every_time_and_in_any_order(prepare):
    values = rows(60)
    sides = []
    for order in (values, random.Random(3).sample(values, 60)):
        prepare(write_rows(Path("rows.jsonl"), order), "--valid", 0.3, "--seed", 1)
        sides.append(set(questions("valid")))
        asked = [value["messages"][0]["content"] for value in order]
        assert questions("valid") == [q for q in asked if q in sides[-1]], "in the order of the file"
        assert questions() == [q for q in asked if q not in sides[-1]]
    assert sides[0] == sides[1] and 10 <= len(sides[0]) <= 26
    prepare("rows.jsonl", "--valid", 0.3, "--seed", 2)
    assert set(questions("valid")) != sides[0]


def test_rows_that_are_added_move_none_of_those_that_were_there(prepare):
    write_rows(Path("a.jsonl"), rows(50))
    prepare("a.jsonl", "--valid", 0.2)
    before = {side: set(questions(side)) for side in SIDES[:2]}
    write_rows(Path("b.jsonl"), [row(f"new {n}") for n in range(40)])
    prepare("b.jsonl", "a.jsonl", "--valid", 0.2)
    after = {side: set(questions(side)) for side in SIDES[:2]}
    assert all(before[side] == {q for q in after[side] if not q.startswith("new")} for side in before)
    assert 10 <= len(after["valid"]) <= 27


@pytest.mark.parametrize("valid", [0.3, 7])
def test_the_same_prompt_never_lies_on_both_sides(prepare, valid):
    values = [row(f"q{n % 12}", f"answer {n}") for n in range(40)]
    prepare(write_rows(Path("rows.jsonl"), values), "--valid", valid)
    sides = set(questions()), set(questions("valid"))
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"q{n}" for n in range(12)}
    assert report()["asked_on_both_sides"] == 0
    assert valid < 1 or 4 <= len(read("valid")) <= 7


def test_a_number_of_rows_for_validation(prepare):
    write_rows(Path("rows.jsonl"), rows(20))
    for number in (1, 7, 19):
        assert prepare("rows.jsonl", "--valid", number)["summary"]["valid_rows"] == number
    for number in (20, 1_234_567):
        error = prepare("rows.jsonl", "--valid", number, code=2)
        assert error["message"] == f"--valid {number:,} leaves no row for training: 20 can be used"


def test_system_prompts_and_earlier_turns_belong_to_the_prompt(prepare):
    values = [row("q", f"answer {n}", instruction=f"s{n}") for n in range(20)]
    summary = prepare(write_rows(Path("rows.jsonl"), values), "--valid", 5)["summary"]
    assert (summary["train_rows"], summary["valid_rows"]) == (15, 5)


def test_a_share_of_zero_gives_an_empty_file(prepare):
    assert prepare(write_rows(Path("rows.jsonl"), rows(5)), "--valid", 0)["summary"]["valid_rows"] == 0
    assert (DATA / "valid.jsonl").read_bytes() == b""
    assert (DATA / "rejected.jsonl").read_bytes() == b""


def test_two_prompts_are_enough_for_both_sides(prepare):
    for share in (0.01, 0.9):
        summary = prepare(write_rows(Path("rows.jsonl"), rows(2)), "--valid", share)["summary"]
        assert (summary["train_rows"], summary["valid_rows"]) == (1, 1)


def test_a_file_for_validation(prepare):
    """What is in both is validated with; what only asks the same is said to be a leak."""
    write_rows(Path("rows.jsonl"), [row("a"), row("held"), row("b"), row("asked", "in another way")])
    write_rows(Path("held.jsonl"), [row("held"), alpaca("asked", "so"), {"bad": 1}, row("held")])
    done = prepare("rows.jsonl", "--valid", "held.jsonl")
    assert (questions(), questions("valid")) == (["a", "b", "asked"], ["held", "asked"])
    assert [(r["file"], r["line"], r["same_as"]) for r in read("duplicates")] == [
        ("held.jsonl", 4, "held.jsonl:1"), ("rows.jsonl", 2, "held.jsonl:1")]
    assert [(r["file"], r["line"]) for r in read("rejected")] == [("held.jsonl", 3)]
    assert report()["asked_on_both_sides"] == 1
    assert "! 1 training row asks what validation rows ask" in done["err"]
    prepare("rows.jsonl", "--valid", "held.jsonl", "--duplicates", "keep")
    assert (questions(), questions("valid")) == (["a", "held", "b", "asked"], ["held", "asked", "held"])
    assert report()["asked_on_both_sides"] == 2
    write_rows(Path("held.jsonl"), [row("held"), row("other")])
    assert "training rows ask" not in prepare("rows.jsonl", "--valid", "held.jsonl")["err"]


def test_a_validation_file_of_which_nothing_can_be_used(prepare):
    write_rows(Path("rows.jsonl"), rows(5))
    write_rows(Path("held.jsonl"), [{"bad": 1}])
    error = prepare("rows.jsonl", "--valid", "held.jsonl", code=2)
    assert error["message"] == "no row of the validation file can be used" and "--valid 0.1" in error["hint"]


def test_a_system_column_that_no_row_has_is_a_mistake(prepare):
    Path("rows.csv").write_text("question,answer,context\na,b,c\nd,e,\n")
    error = prepare("rows.csv", "--columns", "user=question,assistant=answer,system=contxt", code=2)
    assert "no row has the column `contxt`" in error["message"] and "did you mean `context`?" in error["message"]
    assert "`question`, `answer`, `context`" in error["hint"]
    prepare("rows.csv", "--columns", "user=question,assistant=answer,system=context", "--valid", 0)
    assert [[m["content"] for m in r["messages"]] for r in read("train")] == [["c", "a", "b"], ["d", "e"]]


def test_options_that_are_repeated_add_up(prepare):
    Path("rows.csv").write_text("q,a\nHello {{name}},Hi\nBell \x07,Ring\n")
    prepare("rows.csv", "--columns", "user=q", "--columns", "assistant=a", "--allow", "placeholder", "--allow",
            "control_character", "--valid", 0)
    assert len(read("train")) == 2
    error = prepare("rows.csv", "--columns", "user=q,user=a,assistant=a", code=2)
    assert error["problems"] == ["columns: each role can have one column"]
    assert prepare("rows.csv", "--valid", "10%", code=2)["problems"] == [
        "valid: write 10% as a share below 1, such as 0.1"]
