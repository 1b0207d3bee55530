"""LLaMA-Factory's dataset_info.json: what an entry says is how its rows are read, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.command import invoke, write_rows
from support.hub import LoopbackHub
from support.prepared import alpaca, prepared, read, report, row, with_template
from support.rows import answer, user

TURNS = [user("Sky?"), answer("Blue.")]
SHAREGPT = {"formatting": "sharegpt"}


def described(entry: dict[str, Any], *rows: Any, name: str = "mine.json", **others: Any) -> Path:
    Path("data").mkdir(exist_ok=True)
    Path("data", "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name, **entry}, **others}))
    if rows:
        Path("data", name).write_text(json.dumps(rows, ensure_ascii=False))
    return Path("data", name)


def said(done: dict[str, Any]) -> str:
    return " ".join(done["err"].split())


def contents(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row["messages"]]


READ = {
    "columns": ({"columns": {"prompt": "问", "query": "景", "response": "答", "system": "s", "history": "h"}},
                {"问": "Sky?", "景": "Over Rome.", "答": "Blue.", "s": "Be brief.", "h": [["Hi", "Hello"]]},
                {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Hello"),
                              user("Sky?\n\nOver Rome."), answer("Blue.")]}),
    "by-default": ({}, {"instruction": "Sky?", "input": "", "output": "Blue."}, {"messages": TURNS}),
    "against-its-own-names": ({"columns": {"prompt": "output", "response": "instruction"}},
                              {"instruction": "Blue.", "output": "Sky?"}, {"messages": TURNS}),
    "text": ({"columns": {"prompt": "content"}}, {"content": "All of a text. " * 9}, {"text": "All of a text. " * 9}),
    "pair": ({"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
             {"q": "Sky?", "good": "Blue.", "bad": "Red."}, {"messages": TURNS, "rejected": [answer("Red.")]}),
    "kto": ({"columns": {"prompt": "q", "response": "a", "kto_tag": "fine"}}, {"q": "Sky?", "a": "Blue.", "fine": False},
            {"messages": TURNS, "kto_tag": False}),
    "sharegpt": (SHAREGPT, {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
                 {"messages": TURNS}),
    "tags": (SHAREGPT | {"columns": {"messages": "turns", "system": "persona"}, "tags": {
        "role_tag": "who", "content_tag": "said", "user_tag": "客户", "assistant_tag": "客服", "system_tag": "rule"}},
        {"turns": [{"who": "客户", "said": "Sky?"}, {"who": "客服", "said": "Blue."}], "persona": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}),
    "system-tag-first": (SHAREGPT | {"columns": {"messages": "m", "system": "s"}, "tags": {"system_tag": "rule"}},
                         {"m": [{"from": "rule", "value": "Be kind."}, {"from": "human", "value": "Sky?"},
                                {"from": "gpt", "value": "Blue."}], "s": "Be brief."},
                         {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]}),
    "openai": (SHAREGPT | {"columns": {"messages": "messages"}, "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        {"messages": TURNS}, {"messages": TURNS}),
    "pair-of-turns": (SHAREGPT | {"ranking": True, "columns": {"messages": "conv", "chosen": "c", "rejected": "r"}, "tags": {
        "role_tag": "who", "content_tag": "said", "user_tag": "u", "assistant_tag": "a"}},
        {"conv": [{"who": "u", "said": "Sky?"}], "c": {"who": "a", "said": "Blue."}, "r": {"who": "a", "said": "Red."}},
        {"messages": TURNS, "rejected": [answer("Red.")]}),
    "kto-of-turns": (SHAREGPT | {"columns": {"messages": "messages", "kto_tag": "label"}, "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        {"messages": TURNS, "label": True}, {"messages": TURNS, "kto_tag": True}),
}


@pytest.mark.parametrize("how", ["beside", "named"])
@pytest.mark.parametrize("name", READ)
def test_rows_are_read_as_the_entry_says(prepare, name, how):
    entry, value, expected = READ[name]
    path = described(entry, value)
    done = prepare(path if how == "beside" else "data/dataset_info.json:mine", "--valid", 0)
    assert [row for row in read("train")] == [expected]
    assert "data/mine.json: read as the entry `mine` of data/dataset_info.json says:" in said(done)


TOOLS = json.dumps([{"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}])
CALLS = [{"from": "u", "value": "Sky?"}, {"from": "call", "value": '{"name": "look", "arguments": {}}'},
         {"from": "seen", "value": "blue"}, {"from": "a", "value": "Blue."}]


def test_tools_their_calls_and_results(tiny, tmp_path):
    tool_model = with_template(tiny, tmp_path)
    tags = {"user_tag": "u", "assistant_tag": "a", "function_tag": "call", "observation_tag": "seen"}
    path = described(SHAREGPT | {"columns": {"messages": "c", "tools": "t"}, "tags": tags}, {"c": CALLS, "t": TOOLS})
    prepared(tool_model, path, "--valid", 0)
    [row] = read("train")
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "look" == row["tools"][0]["function"]["name"]
    path = described({"columns": {"prompt": "q", "query": "x", "response": "a", "tools": "t"}},
                     {"q": "Sky?", "x": "Now?", "a": "Blue.", "t": TOOLS})
    prepared(tool_model, path, "--valid", 0)
    [row] = read("train")
    assert row["tools"][0]["function"]["name"] == "look" and row["messages"] == [user("Sky?\n\nNow?"), answer("Blue.")]


def test_what_the_entry_does_not_name_is_not_read_and_reported(prepare):
    path = described({"columns": {"prompt": "q", "response": "a"}},
                     {"q": "Sky?", "a": "Blue.", "system": "Be brief.", "messages": "x", "history": [["a", "b"]]})
    prepare(path, "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]
    names = {unread["name"] for unread in report()["unread"]}
    assert names == {f"{name} (not in dataset_info.json)" for name in ("system", "messages", "history")}


REFUSED = {
    "videos": ({"columns": {"prompt": "q", "response": "a", "videos": "clips"}}, "names videos (`clips`)"),
    "images-without-an-answer": ({"columns": {"prompt": "q", "images": "pics"}}, "`columns` names `images`, and no `response`"),
    "formatting": ({"formatting": "mystery"}, "its `formatting` is 'mystery'"),
    "unknown": ({"num_sample": 5}, "`num_sample`, which is not known; did you mean `num_samples`?"),
    "unknown-column": ({"columns": {"prompt": "q", "respons": "a"}}, "`respons`, which is not known; did you mean `response`?"),
    "same-tag": (SHAREGPT | {"tags": {"user_tag": "who", "assistant_tag": "who"}},
                 "by `tags`, both `user_tag` and `assistant_tag` are `who`"),
    "tag-of-another": (SHAREGPT | {"tags": {"user_tag": "gpt"}}, "by `tags`, both `user_tag` and `assistant_tag` are `gpt`"),
    "same-key": (SHAREGPT | {"tags": {"role_tag": "value"}}, "by `tags`, both `role_tag` and `content_tag` are `value`"),
    "same-column": ({"columns": {"prompt": "q", "response": "q"}}, "by `columns`, both `prompt` and `response` are `q`"),
    "unknown-tag": (SHAREGPT | {"tags": {"user": "u"}}, "`tags` has `user`"),
    "other-formatting": ({"columns": {"prompt": "q", "messages": "m"}}, "`columns` names `messages`, which is none of"),
    "pair": ({"columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}, "`ranking` is not true"),
    "no-pair": ({"ranking": True}, "`columns` does not name both `chosen` and `rejected`"),
    "no-prompt": ({"columns": {"response": "a"}}, "names no `prompt`"),
    "ranking": ({"ranking": "false"}, "`ranking` is neither true nor false"),
    "samples": ({"num_samples": "many"}, "`num_samples` is no number of rows"),
    "formatting-list": ({"formatting": ["alpaca"]}, "its `formatting` is ['alpaca']"),
    "split": ({"split": "test"}, "its `split` is 'test'"),
    "columns": ({"columns": ["q"]}, "`columns` is no object of names"),
}


@pytest.mark.parametrize("how", ["beside", "named"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused(cli, tiny, name, how):
    entry, reason = REFUSED[name]
    path = described(entry, {"q": "Sky?", "a": "Blue."})
    result = cli("prepare", path if how == "beside" else "data/dataset_info.json:mine", "--model", tiny)
    assert result.code == 2 and reason in " ".join(result.err.split()) and "Hint: change the entry" in result.err
    assert not Path("runs").exists(), "before a model is looked for"


@pytest.mark.parametrize(("entry", "reason"), [
    ({"file_name": "../secret.json"}, "its file ../secret.json is not in the directory"),
    ({"file_name": "sub/../../secret.json"}, "is not in the directory"), ({"file_name": "/etc/hostname"}, "is not in the directory"),
    ({"script_url": "maker", "file_name": "mine.json"}, "made by a program (`script_url`)"),
    ({"ms_hub_url": "a/b"}, "on ModelScope (`ms_hub_url`)"), ({"cloud_file_name": "s3://a"}, "in a cloud's storage"),
    ({"hf_hub_url": "org/a", "folder": "x"}, "names a `folder`"), ({"columns": {"prompt": "q"}}, "it names no data")])
def test_data_that_lie_elsewhere_are_refused(cli, tiny, entry, reason):
    write_rows(Path("secret.json"), [row()])
    described({}, alpaca("Sky?", "Blue."), other=entry)
    result = cli("prepare", "data/dataset_info.json:other", "--model", tiny)
    assert result.code == 2 and reason in " ".join(result.err.split())


def test_which_entry_is_meant(cli, tiny):
    described({}, alpaca("Sky?", "Blue."), other={"file_name": "mine.json", "columns": {"prompt": "output", "response": "input"}})
    result = cli("prepare", "data/dataset_info.json:mime", "--model", tiny)
    assert result.code == 2 and "has no entry mime; did you mean `mine`?" in " ".join(result.err.split())
    result = cli("prepare", "data/dataset_info.json", "--model", tiny)
    assert result.code == 2 and "name one, such as data/dataset_info.json:mine; there are mine, other" in " ".join(result.err.split())
    result = cli("prepare", "data/mine.json", "--model", tiny)
    assert result.code == 2 and "is described by 2 entries of" in result.err and "data/dataset_info.json:mine" in result.err


def test_a_file_is_read_in_one_way(cli, tiny, prepare):
    described({}, alpaca("Sky?", "Blue."), other={"file_name": "mine.json", "columns": {"prompt": "output", "response": "instruction"}})
    names = ["data/dataset_info.json:mine", "data/dataset_info.json:other"]
    result = cli("prepare", *names, "--model", tiny)
    assert result.code == 2 and "data/mine.json is named twice, to be read in two ways" in " ".join(result.err.split())
    for name in names:
        prepare(name, "--valid", 0)
    described({}, alpaca("Sky?", "Blue."))
    prepare(names[0], "data/mine.json", "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]


def test_a_single_entry_needs_no_name(prepare):
    described({"columns": {"prompt": "q", "response": "a"}}, {"q": "Sky?", "a": "Blue."})
    prepare("data/dataset_info.json", "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]


def test_options_that_say_how_rows_are_read_go_before_what_lies_beside(prepare):
    path = described({"columns": {"prompt": "q", "response": "a"}}, {"q": "Sky?", "a": "Red.", "b": "Blue."})
    done = prepare(path, "--columns", "user=q,assistant=b", "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]
    assert "data/mine.json: read as --columns says, not as dataset_info.json does" in said(done)


def test_a_directory_and_a_named_folder(prepare):
    described({"file_name": "parts", "columns": {"prompt": "q", "response": "a"}}, name="parts")
    Path("data", "parts").mkdir()
    write_rows(Path("data", "parts", "one.jsonl"), [{"q": "one?", "a": "1"}])
    write_rows(Path("data", "plain.jsonl"), [alpaca("plain?", "p")])
    for data, expected in (("data", {"one?", "plain?"}), ("data/dataset_info.json:mine", {"one?"}), ("data/parts/one.jsonl", {"one?"})):
        prepare(data, "--valid", 0)
        assert {contents(row)[0] for row in read("train")} == expected


def test_what_else_is_called_so_is_left_alone(prepare, cli, tiny):
    write_rows(Path("mine.jsonl"), [alpaca("Sky?", "Blue.")])
    Path("dataset_info.json").write_text('{"features": {}, "citation": ""}')
    prepare("mine.jsonl", "--valid", 0)
    Path("dataset_info.json").write_text("{broken")
    done = prepare("mine.jsonl", "--valid", 0)
    assert "dataset_info.json is not JSON" in done["err"] and "it is not looked at" in said(done)
    Path("dataset_info.json").write_text('[{"ms_dataset_id": "a/b"}]')
    result = cli("prepare", "dataset_info.json:mine", "--model", tiny)
    assert result.code == 2 and "does not describe data sets as LLaMA-Factory's" in result.err


def test_the_number_of_samples(prepare):
    columns = {"columns": {"prompt": "q", "response": "a"}}
    path = described(columns | {"num_samples": 7}, *({"q": f"q{n}", "a": "x"} for n in range(40)))
    write_rows(Path("data", "plain.jsonl"), [alpaca(f"p{n}", "p") for n in range(30)])
    done = prepare(path, "--valid", 0)
    assert "data/mine.json: 7 of 40 rows drawn (`num_samples` of its description)" in said(done)
    done = prepare("data", "--valid", 0)
    assert {part["data"]: (part["rows"], part["of"]) for part in done["summary"]["drawn"]} == {
        "data": (30, 30), "dataset_info.json:mine": (7, 40)}
    done = prepare(path, "--max-samples", "mine.json=9", "--valid", 0)
    assert [part["rows"] for part in done["summary"]["drawn"]] == [9]
    done = prepare("data/plain.jsonl", "--valid", path)
    assert "all of its rows are taken, as `num_samples` is for training" in said(done) and len(read("valid")) == 40


def test_more_samples_than_rows_are_refused_as_no_row_is_repeated(cli, prepare, tiny):
    columns = {"prompt": "q", "response": "a"}
    path = described({"columns": columns, "num_samples": 90}, *({"q": f"q{n}", "a": "x"} for n in range(40)),
                     few={"file_name": "few.jsonl", "num_samples": 31, "columns": columns})
    write_rows(Path("data", "few.jsonl"), [{"q": f"few {n}", "a": "x"} for n in range(30)])
    result = cli("prepare", path, "--model", tiny)
    told = " ".join(result.err.split())
    assert result.code == 2 and not Path("runs/tiny-gemma/data").exists()
    assert ("data/mine.json: the entry `mine` of data/dataset_info.json asks for 90 samples of its 40 rows "
            "(`num_samples`), and no row is taken twice") in told
    assert "take each row once: --max-samples data/mine.json=40; " in told
    both = " ".join(cli("prepare", "data", "--model", tiny, "--max-samples", 1000).err.split())
    advised = "data/dataset_info.json:few=30,data/dataset_info.json:mine=40"
    assert f"take each row once: --max-samples {advised}; " in both and "asks for 31 samples of its 30 rows" in both
    for most, taken in (("data/mine.json=40", 40), ("mine=90", 40), (20, 20)):
        assert prepare(path, "--max-samples", most, "--valid", 0)["summary"]["rows"] == taken
    assert prepare("data", "--max-samples", advised, "--valid", 0)["summary"]["rows"] == 70


def test_an_entry_s_name_is_one_of_its_data(cli, prepare, tiny):
    """For --max-samples, whether it is named, or found beside its file."""
    columns = {"columns": {"prompt": "q", "response": "a"}}
    described(columns, *({"q": f"q{n}", "a": "x"} for n in range(40)), other=columns | {"file_name": "o.jsonl"})
    write_rows(Path("data", "o.jsonl"), [{"q": f"other {n}", "a": "x"} for n in range(30)])
    for first in ("data/mine.json", "data/dataset_info.json:mine"):
        done = prepare(first, "data/o.jsonl", "--max-samples", "mine=7,other=5", "--valid", 0)
        assert [part["rows"] for part in done["summary"]["drawn"]] == [7, 5]
        again = invoke("prepare", "--model", tiny, "--force", "--json")
        assert again.code == 0 and again.json["summary"]["drawn"] == done["summary"]["drawn"], again.err
    wrong = cli("prepare", "data/mine.json", "--model", tiny, "--max-samples", "mein=7")
    assert wrong.code == 2 and "mein is not among the DATA; did you mean `mine`?" in wrong.err
    Path("mine").mkdir()
    write_rows(Path("mine", "plain.jsonl"), [alpaca(f"p{n}", "p") for n in range(30)])
    both = cli("prepare", "mine", "data/mine.json", "--model", tiny, "--max-samples", "mine=7")
    assert both.code == 0, "that which is called so as a whole goes before"
    both = cli("prepare", "./mine", "data/mine.json", "--model", tiny, "--max-samples", "mine=7")
    assert both.code == 2 and "mine may be ./mine or data/mine.json" in both.err


def test_the_number_of_samples_of_an_entry_for_a_directory(prepare, tiny):
    described({"num_samples": 7}, name="mine", other={"file_name": "other.jsonl", "num_samples": 5})
    Path("data", "mine").mkdir()
    for name in ("mine/1.jsonl", "mine/2.jsonl", "other.jsonl", "plain.jsonl"):
        write_rows(Path("data", name), [alpaca(f"{name} {n}", "a") for n in range(20)])
    mine = {"dataset_info.json:mine": (7, 40)}
    for name, drawn in (("data", mine | {"data": (20, 20), "dataset_info.json:other": (5, 20)}), ("data/mine", mine)):
        done = prepare(name, "--valid", 0)
        assert {part["data"]: (part["rows"], part["of"]) for part in done["summary"]["drawn"]} == drawn
    done = prepare("data", "--max-samples", "other.jsonl=2,dataset_info.json:mine=3", "--valid", 0)
    assert [part["rows"] for part in done["summary"]["drawn"]] == [20, 3, 2]
    again = invoke("prepare", "--model", tiny, "--force", "--json")
    assert again.code == 0 and again.json["summary"]["drawn"] == done["summary"]["drawn"], again.err


def test_a_file_of_an_entry_is_in_its_directory_also_in_the_current_one(cli, tiny, monkeypatch):
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(write_rows(Path("home", "x.jsonl"), [alpaca("q", "a")]).parent.resolve()))
    for name in ("~/x.jsonl", "example:pairs", "hf:org/x", "-"):
        Path("dataset_info.json").write_text(json.dumps({"mine": {"file_name": name}}))
        result = cli("prepare", "dataset_info.json:mine", "--model", tiny)
        assert result.code == 2 and f"there is no file {name}" in result.err


@pytest.mark.parametrize("entry", ["sub/deep/mine.jsonl", "sub/deep", "sub"])
@pytest.mark.parametrize("named", ["data", "data/sub/deep/mine.jsonl"])
def test_a_file_some_directories_below(prepare, entry, named):
    described({"columns": {"prompt": "output", "response": "instruction"}}, name=entry)
    Path("data/sub/deep").mkdir(parents=True)
    write_rows(Path("data/sub/deep/mine.jsonl"), [alpaca("Blue.", "Sky?")])
    prepare(named, "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]


def test_a_rejected_row_is_named_by_its_own_columns_and_kept_as_it_is(prepare):
    rows = [{"问": f"q{n}", "答": "x"} for n in range(8)]
    bad = [{"问": "q", "答": ["a", "b"]}, {"问": "q", "other": "x"}]
    prepare(described({"columns": {"prompt": "问", "response": "答"}}, *rows, *bad), "--valid", 0)
    first, second = read("rejected")
    assert "`答` is a list of 2 texts" in first["reason"] and first["row"] == bad[0]
    assert second["code"] == "missing_column" and "the column `答` is missing" in second["reason"] and second["row"] == bad[1]


def test_again_without_naming_it_and_when_the_entry_changes(tiny):
    described({"columns": {"prompt": "q", "response": "a"}}, {"q": "Sky?", "a": "Blue.", "b": "Red."})
    name = "data/dataset_info.json:mine"
    assert prepared(tiny, name, "--valid", 0)["status"] == "done"

    def again() -> dict[str, Any]:
        result = invoke("prepare", "--model", tiny, "--json")
        assert result.code == 0, result.err
        return result.json

    assert again()["status"] == "up-to-date"
    described({"columns": {"prompt": "q", "response": "b"}})
    assert again()["status"] == "done" and contents(read("train")[0]) == ["Sky?", "Red."]
    result = invoke("prepare", "--model", tiny, "--force", "--json")
    assert result.code == 0 and contents(read("train")[0]) == ["Sky?", "Red."], result.err


def test_a_dataset_of_the_hub(prepare, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        hub.isolate_datasets(monkeypatch, tmp_path / "home")
        (tmp_path / "repo" / "data").mkdir(parents=True)
        write_rows(tmp_path / "repo" / "data" / "test.jsonl", [{"q": "Sky?", "a": "Blue."}])
        write_rows(tmp_path / "repo" / "data" / "train.jsonl", [{"q": "no", "a": "no"}])
        hub.add_repo("datasets/org/set", tmp_path / "repo")
        described({}, other={"hf_hub_url": "org/set", "split": "test", "columns": {"prompt": "q", "response": "a"}})
        done = prepare("data/dataset_info.json:other", "--valid", 0)
    assert [row["messages"] for row in read("train")] == [TURNS]
    assert "hf:org/set:test: read as the entry `other`" in said(done)


def test_to_validate_with(prepare):
    path = described({"columns": {"prompt": "q", "response": "a"}}, {"q": "Sky?", "a": "Blue."})
    write_rows(Path("train.jsonl"), [alpaca("q", "a")])
    for name in (path, "data/dataset_info.json:mine"):
        prepare("train.jsonl", "--valid", name)
        assert [row["messages"] for row in read("valid")] == [TURNS]


def test_several_processes_read_them_so(prepare, monkeypatch):
    from gemma_tune.prepare import passes

    monkeypatch.setattr(passes, "_processes", lambda sources, total: 2)
    monkeypatch.setattr(passes, "_BLOCK", 700)
    prepare(described({"columns": {"prompt": "q", "response": "a"}}, *({"q": f"q{n}", "a": "x"} for n in range(90))),
            "--valid", 0, "--max-samples", 60)
    assert len(read("train")) == 60 and not read("rejected")


def test_eval_reads_others_as_the_entry_says(cli, tiny):
    write_rows(Path("train.jsonl"), [alpaca(f"q{n}", "a") for n in range(8)])
    prepared(tiny, "train.jsonl")
    assert cli("train", "--max-steps", 1, "--rank", 2, "--dtype", "fp32").code == 0
    described({"columns": {"prompt": "q", "response": "a"}}, *({"q": f"q{n}", "a": "Blue."} for n in range(3)))
    for name in ("data/mine.json", "data/dataset_info.json:mine"):
        result = cli("eval", "--data", name, "--questions", 1, "-n", 2, "--json")
        assert result.code == 0 and result.json["summary"]["rows"] == 3, result.err
    again = cli("eval", "--json")
    assert again.code == 0 and again.json["summary"]["rows"] == 3, again.err
