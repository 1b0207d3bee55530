"""Which pictures rows use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gemma_tune.prepare.near import signature, similarity, unlike
from gemma_tune.prepare.pictures import UsedPictures
from support.picture_files import as_bytes, drawn, name_of, prepared_row, save


def test_the_figures_are_those_of_rows_that_are_used():
    names = {n: name_of(save(f"kept/{name_of(as_bytes(drawn(n)))}", as_bytes(drawn(n)))) for n in range(4)}
    used = UsedPictures(Path("kept"), 7)
    def line(*numbers: int, **more: str) -> bytes:
        return (json.dumps(prepared_row(*(names[n] for n in numbers), **more), ensure_ascii=False) + "\n").encode()

    ids = [(np.array([1, 7, 7, 7, 2], np.int32), None, ""), (np.array([7], np.int32), None, "")]
    used.add("train", line(0, 1), ids)
    used.add("valid", line(1), ids[1:])
    used.add("train", (json.dumps({"messages": [{"role": "user", "content": 'Is "pictures": [ a word and 7?'}]}) + "\n").encode(), ids)
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"pictures": [7]}}}]}
    used.add("train", (json.dumps({"messages": [calling]}) + "\n").encode(), ids)
    assert used.settled() == {"picture_rows": 2, "pictures": 2, "picture_tokens": 5, "pictures_on_both_sides": 1,
                              "picture_bytes": sum(len(as_bytes(drawn(n))) for n in (0, 1))}
    assert {path.name for path in Path("kept").iterdir()} == {names[0], names[1]}


def test_where_no_row_is_used_nothing_stays():
    save("kept/a.png")
    assert UsedPictures(Path("kept"), None).settled() == {} and not Path("kept").exists()
    assert UsedPictures(Path("nowhere"), None).settled() == {}


def test_rows_about_other_pictures_are_not_near():
    words = signature(["what is shown in this picture here"])
    one, two, both = unlike(words, ["a"]), unlike(words, ["b"]), unlike(words, ["a", "b"])
    assert similarity(one, two) < 0.1 and similarity(one, both) < 0.1 and similarity(one, words) < 0.1
    assert similarity(unlike(words, ["a"]), one) == 1
