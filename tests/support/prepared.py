"""What the tests of ``prepare`` share: rows, the command with a check of all that it wrote, and its files read back."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings

from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from support.command import invoke
from support.models import TURNS
from support.templates import CHATML, assistant, gemma_tokenizer, system, trl_template, user

DATA = Path("runs/tiny-gemma/data")
SIDES = ("train", "valid", "rejected", "duplicates")
RECORD = {"file", "line", "code", "reason", "fix", "row"}


def same_examples(count: int) -> Any:
    """The same examples every time. To look for more, raise the number and leave derandomize out."""
    return settings(derandomize=True, database=None, deadline=None, max_examples=count, suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def row(question: str = "What is a bond?", answer: str = "A loan.", instruction: str | None = None,
        **more: Any) -> dict[str, Any]:
    """A conversation of one question, perhaps with a system prompt; ``more`` goes into the answer's turn."""
    first = [] if instruction is None else [system(instruction)]
    return {"messages": [*first, user(question), assistant(answer, **more)]}


def alpaca(instruction: Any = "Add.", output: Any = "3", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


def talk(*words: int, first: str | None = None, name: str = "") -> dict[str, Any]:
    """A conversation whose n-th answer has so many words, after the question "<name>q<n>"."""
    turns = [] if first is None else [system(first)]
    for n, count in enumerate(words):
        turns += [user(f"{name}q{n}"), assistant("word " * count + f"end {n}")]
    return {"messages": turns}


@dataclass(frozen=True)
class Sequence:
    """A sequence of tokens/…arrow: ids, learned ranges, and the line (from 0) of its row."""

    ids: list[int]
    spans: list[tuple[int, int]]
    row: int


def read(side: str, folder: Path = DATA) -> list[Any]:
    """Rows of one of the four files; reading is strict JSON."""
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (folder / f"{side}.jsonl").read_bytes().decode("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def report(folder: Path = DATA) -> dict[str, Any]:
    """data/report.json."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def kept() -> list[list[dict[str, str]]]:
    """The conversations for training and validation together."""
    return [record["messages"] for side in ("train", "valid") for record in read(side)]


def questions(side: str = "train") -> list[str]:
    """The first user turn of each conversation."""
    return [next(m["content"] for m in record["messages"] if m["role"] == "user") for record in read(side)]


def sequences(side: str = "train", folder: Path = DATA) -> list[Sequence]:
    """What training gets, read as plain Arrow."""
    with pa.OSFile(str(folder / "tokens" / f"{side}.arrow")) as f, pa.ipc.open_stream(f) as stream:
        records = stream.read_all().to_pylist()
    return [Sequence(r["input_ids"], list(zip(r["spans"][::2], r["spans"][1::2], strict=True)), r["row"])
            for r in records]


def learned(chat: ChatFormat, side: str = "train", folder: Path = DATA) -> list[list[str]]:
    """The learned stretches of each sequence as text."""
    return [[chat.tokenizer.decode(s.ids[a:b]) for a, b in s.spans] for s in sequences(side, folder)]


@functools.cache
def format_of(model: Path) -> ChatFormat:
    return load_format(model, "gemma3_text")


def with_template(tiny: Path, folder: Path, template: str = "qwen2_5") -> Path:
    """The tiny model with one of TRL's chat templates, in a directory of its own; Qwen's know tools."""
    folder = folder / tiny.name
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "added_tokens*"))
    gemma_tokenizer((*CHATML, *TURNS), trl_template(template)).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, but for the list of the rows that a preparation was refused for."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and (p.name, p.parent.name) != ("rejected.jsonl", "tiny-gemma")}


def prepared(model: Path, *args: object, code: int = 0, stdin: Any = None) -> dict[str, Any]:
    """``prepare`` with no limit on rejected rows, unless one is given: the JSON result or error, and ``err``."""
    if "--max-rejected" not in args:
        args = (*args, "--max-rejected", 1)
    result = invoke("prepare", *args, "--model", model, "--json", stdin=stdin)
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    if code:
        return result.json["error"] | {"err": result.err}
    check_files(result.json["summary"], model, Path(result.json["run"]) / "data", "truncate" in args)
    return result.json | {"err": result.err}


def check_files(summary: dict[str, Any], model: Path, folder: Path = DATA, cut: bool = False) -> None:
    """All that must hold of what ``prepare`` wrote, whatever it was given."""
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*")} == {
        *(f"{side}.jsonl" for side in SIDES), "report.json", "origins.npy", "tokens",
        *(f"tokens/{side}.arrow" for side in SIDES[:2])}
    assert {p.name for p in folder.parent.iterdir()} <= {"data", "inputs", "manifest.json", ".lock"}
    records = {side: read(side, folder) for side in SIDES}
    figures = report(folder)
    assert summary["rows"] == figures["rows"] == sum(f["rows"] for f in figures["files"])
    divided = len(figures["ends_held_out"])  # texts of which a part is on each side
    assert summary["rows"] + divided == sum(map(len, records.values()))
    for side, found in records.items():
        name = "duplicate_rows" if side == "duplicates" else f"{side}_rows"
        assert summary[name] == figures[name] == len(found)
    assert summary["rejected_by_reason"] == figures["rejected_by_reason"] == Counter(
        r["code"] for r in records["rejected"])
    _check_rest(records, figures)
    _check_tokens(summary, records, figures, format_of(model), folder, cut)


def _check_rest(records: dict[str, list[Any]], figures: dict[str, Any]) -> None:
    gone = [f"{r['file']}:{r['line']}" for side in ("rejected", "duplicates") for r in records[side]]
    lines = [place for place in gone if ".json:" not in place]  # elements of an array can share a line
    assert len(set(lines)) == len(lines)
    for file in figures["files"]:
        of_file = [r["line"] for r in records["rejected"] if r["file"] == file["file"]]
        assert of_file == sorted(of_file)
    for record in records["rejected"]:
        assert set(record) - {"others"} == RECORD and record["reason"] and record["fix"]
        if "others" in record:
            assert record["others"] and all(set(other) == {"code", "reason", "fix"} for other in record["others"])
    for record in records["duplicates"]:
        assert set(record) == {"file", "line", "same_as", "kind", "row"} and record["same_as"] not in lines
        assert record["kind"] in ("exact", "near")
    assert figures["near_duplicate_rows"] == sum(r["kind"] == "near" for r in records["duplicates"])
    assert figures["first_rejected"].keys() == figures["rejected_by_reason"].keys()
    assert set(figures["first_rejected"].values()) <= set(gone)


def _check_tokens(summary: dict[str, Any], records: dict[str, list[Any]], figures: dict[str, Any], chat: ChatFormat,
                  folder: Path, cut: bool) -> None:
    found = {side: sequences(side, folder) for side in SIDES[:2]}
    for side, of_side in found.items():
        places = [s.row for s in of_side]
        assert places == sorted(places) and set(places) == set(range(len(records[side]))), "each row has its tokens"
        for s in of_side:
            assert 0 < len(s.ids) <= summary["max_length"]
            flat = [edge for span in s.spans for edge in span]
            assert flat == sorted(flat) and all(a < b for a, b in s.spans)
            assert flat[0] >= 0 and flat[-1] == len(s.ids), "nothing follows what is learned last"
            if not cut and "messages" in records[side][s.row]:
                assert {s.ids[end - 1] for _, end in s.spans} == {chat.terminator_id}, "an answer without its end"
    both = [s for of_side in found.values() for s in of_side]
    assert summary["sequences"] == figures["sequences"] == len(both)
    assert summary["tokens"] == figures["tokens"] == sum(len(s.ids) for s in both)
    assert summary["trained_tokens"] == figures["trained_tokens"] == sum(b - a for s in both for a, b in s.spans)
