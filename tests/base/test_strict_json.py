"""JSON whose objects say one thing for each key, and files that hold one object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.base import strict_json
from support.damage import DEEP


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": "x", "c": 0, "a": "y"}}]', '{"a": NaN, "a": 1}',
                                  '{"a": 1, "a": null}', '{"\\u0061": 1, "a": 2}'])
def test_a_key_with_two_values_is_refused(text):
    with pytest.raises(ValueError, match="the key 'a' stands twice in one object, with two values"):
        strict_json.row(text)


def test_a_key_with_the_same_value_twice_says_one_thing():
    assert strict_json.row('{"a": [1], "b": 2, "a": [1]}') == {"a": [1], "b": 2}
    assert strict_json.row('{"a": NaN, "b": {"a": 1}}') == {"a": None, "b": {"a": 1}}


def test_an_object_in_a_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert strict_json.object_in(path) == {"time_step_limit": [0.0, float("inf")]}
    for content, said in ((b"[]", "no object"), (b"null", "no object"), (DEEP, "nested too deeply"), (b"\xff", "utf-8"),
                          (b'{"a": ' + b"9" * 5000 + b"}", "digits"), (b"{" + b'"a":[' * 200 + b"]" * 200, "delimiter")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            strict_json.object_in(path)


@pytest.mark.parametrize("inside", ["1", '"[[{{"', "[]", '{"a": 1}'])
def test_a_hundred_levels_are_kept_and_more_are_not(inside):
    levels = strict_json.MAX_DEPTH - (inside[0] in "[{")
    many = ", ".join(["[1]"] * 60)  # brackets beside each other
    for opened, closed in (("[", "]"), ('{"a": ', "}"), (f'[{many}, {{"b": 0, "a": ', "}]")):
        times = levels // (2 if "b" in opened else 1)
        text = opened * times + inside + closed * times
        assert strict_json.loads(text) == json.loads(text)
        with pytest.raises(ValueError, match="nested too deeply"):
            strict_json.loads(f"[[{text}]]")


def test_signs_of_chinese_text_in_place_of_jsons_own_are_told(prepare):
    good = '{"prompt": "他说：“问？”，", "completion": "｛答｝。"}'
    bad = [('{“prompt”：“问？”，“completion”：“答。”}', "property name enclosed in double quotes", 2), ('{"prompt"：“问？”}', "':' delimiter", 10),
           ('{"prompt": “问？”}', "Expecting value", 12), ('{"prompt": "问？”，“"，"completion": "答。"}', "',' delimiter", 19)]
    Path("rows.jsonl").write_text("\n".join([good, *(line for line, _, _ in bad)]), encoding="utf-8")
    prepare("rows.jsonl", "--valid", 0, "--max-rejected", 0.9)
    rejected = [json.loads(line) for line in Path("runs/tiny-gemma/data/rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, (_, expected, column) in zip(rejected, bad, strict=True):
        assert row["reason"].endswith(f"{expected}, and not the sign of Chinese text there, at column {column}")
        assert row["fix"].startswith('around names and texts write " for “ and ”')


def test_rows_with_a_key_that_stands_twice_are_rejected(prepare):
    turns = json.dumps([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    others = turns.replace("A", "B")
    Path("rows.jsonl").write_text("\n".join([
        f'{{"messages": {turns}}}', f'{{"messages": {turns}, "messages": {others}}}',
        '{"messages": [{"role": "user", "content": "x", "content": "y"}, {"role": "assistant", "content": "z"}]}',
        f'{{"id": 1, "messages": {others}, "id": 1}}']))
    prepare("rows.jsonl", "--valid", 0, "--max-rejected", 0.5)
    rejected = [json.loads(line) for line in Path("runs/tiny-gemma/data/rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["code"]) for r in rejected] == [(2, "broken_json"), (3, "broken_json")]
    assert "the key 'messages' stands twice" in rejected[0]["reason"] and "'content'" in rejected[1]["reason"]
