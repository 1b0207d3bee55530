"""Tests of the built-in example data and of the check for its form."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from gemma_tune import samples
from support import make_pairs

Row = dict[str, Any]

EN = "Conclusion: a.\nBasis: b.\nRisk: c.\nNext check: d."
ZH = "结论：甲。\n依据：乙。\n风险：丙。\n复核：丁。"


@pytest.fixture
def little_general_text():
    """All of it, here."""


def _has_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def _language(row: Row) -> str:
    return "zh" if _has_chinese(row["messages"][-1]["content"]) else "en"


def _turns(row: Row, role: str) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == role]


def _plain(text: str) -> str:
    """Fold a prompt so that a change of case, space or marks is no difference."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(ch for ch in folded if ch.isalnum())


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    text = samples.training_path().read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


@pytest.fixture(scope="module")
def questions() -> list[Row]:
    return samples.heldout_questions()


def test_paths_are_the_two_files_of_the_sample() -> None:
    assert samples.SAMPLE == "finance"
    assert samples.training_path().is_file()
    assert samples.heldout_path().is_file()
    assert samples.training_path().name == "finance.jsonl"
    assert samples.heldout_path().name == "finance_heldout.jsonl"


def test_importing_the_samples_does_not_load_torch() -> None:
    code = (
        "import sys, gemma_tune.samples as s; s.heldout_questions(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(samples.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=root, timeout=30
    )
    assert done.returncode == 0


def test_counts_and_languages(rows: list[Row]) -> None:
    assert len(rows) >= 60
    languages = [_language(row) for row in rows]
    assert languages.count("en") == languages.count("zh") == 36


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_language_has_multi_turn_and_system_rows(
    rows: list[Row], language: str
) -> None:
    mine = [row for row in rows if _language(row) == language]
    assert sum(len(_turns(row, "user")) == 1 for row in mine) == 27
    assert sum(len(_turns(row, "user")) == 2 for row in mine) == 9
    assert sum(len(_turns(row, "system")) == 1 for row in mine) >= 8
    assert len({s for row in mine for s in _turns(row, "system")}) >= 5


def test_every_row_is_a_well_shaped_conversation(rows: list[Row]) -> None:
    for row in rows:
        assert set(row) == {"messages"}
        for message in row["messages"]:
            assert set(message) == {"role", "content"}
            assert message["content"]
            assert message["content"] == message["content"].strip()
        roles = [m["role"] for m in row["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2), row


def test_a_row_keeps_to_one_language(rows: list[Row]) -> None:
    for row in rows:
        chinese = {_has_chinese(m["content"]) for m in row["messages"]}
        assert len(chinese) == 1, row


def test_every_assistant_turn_is_in_form(rows: list[Row]) -> None:
    for row in rows:
        for answer in _turns(row, "assistant"):
            assert samples.in_form(answer), answer


def test_every_line_of_an_answer_is_one_sentence_without_markdown(
    rows: list[Row],
) -> None:
    for row in rows:
        for answer in _turns(row, "assistant"):
            for line in answer.split("\n"):
                # A point between digits is a decimal point, not an end.
                ends = re.findall(r"[.!?](?!\d)|[。！？]", line)
                assert len(ends) == 1 and line.endswith((".", "。")), line
                assert not re.search(r"[*#`_|]", line), line


def test_chinese_answers_use_the_full_width_colon(rows: list[Row]) -> None:
    for row in rows:
        if _language(row) == "zh":
            for answer in _turns(row, "assistant"):
                assert ":" not in answer
                assert answer.count("：") == 4


def test_answers_stay_short(rows: list[Row]) -> None:
    # A stand-in for the token count, which needs a tokenizer: training time on
    # a laptop's processor follows the length of the answers.
    for row in rows:
        limit = 130 if _language(row) == "zh" else 330
        for answer in _turns(row, "assistant"):
            assert len(answer) <= limit, answer


def test_prompts_and_answers_are_all_different(rows: list[Row]) -> None:
    for role in ("user", "assistant"):
        texts = [_plain(text) for row in rows for text in _turns(row, role)]
        assert len(texts) == len(set(texts))


def test_file_keeps_chinese_readable() -> None:
    for path in (samples.training_path(), samples.heldout_path()):
        data = path.read_bytes()
        assert b"\\u" not in data
        assert b"\r" not in data
        assert not data.startswith(b"\xef\xbb\xbf")


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    text = samples.example_path("pairs").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def test_pairs_are_what_their_generator_writes(pairs: list[Row]) -> None:
    assert pairs == make_pairs.pairs()
    assert b"\\u" not in samples.example_path("pairs").read_bytes()


def test_pairs_are_shaped_as_prepared_rows(pairs: list[Row]) -> None:
    assert len(pairs) == 120
    for row in pairs:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert [m["role"] for m in row["prompt"]] == ["user"]
        for side in ("chosen", "rejected"):
            [turn] = row[side]
            assert turn["role"] == "assistant" and turn["content"] == turn["content"].strip() != ""
            assert _has_chinese(turn["content"]) == _has_chinese(row["prompt"][0]["content"])
    assert sum(_has_chinese(row["prompt"][0]["content"]) for row in pairs) == 60


def test_no_prompt_and_no_answer_of_the_pairs_is_there_twice(pairs: list[Row]) -> None:
    for key in ("prompt", "chosen", "rejected"):
        assert len({_plain(row[key][0]["content"]) for row in pairs}) == len(pairs)


def test_the_better_answer_alone_ends_with_the_asked_fact(pairs: list[Row]) -> None:
    for row in pairs:
        explained, fact = row["chosen"][0]["content"].split("\n")
        assert re.fullmatch(r"Answer: [\w ]+|答案：\w+", fact), fact
        assert explained.endswith((".", "。"))
        assert not re.search(r"Answer|答案|\n", row["rejected"][0]["content"])


def test_numbers_in_the_better_answers_are_right(pairs: list[Row]) -> None:
    found = 0
    for row in pairs:
        text = row["chosen"][0]["content"]
        if product := re.search(r"(\d+) ?× ?(\d+)", text):
            fact = re.search(r"\d+", text.split("\n")[1])
            assert fact and int(product[1]) * int(product[2]) == int(fact[0]), text
            found += 1
    assert found == 44


def test_length_does_not_tell_the_better_answer(pairs: list[Row]) -> None:
    longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in pairs)
    assert 0.3 < longer / len(pairs) < 0.7


def test_an_example_that_is_not_there_has_no_path() -> None:
    with pytest.raises(ValueError, match="no example"):
        samples.example_path("../finance")


def test_heldout_questions_are_shaped_for_an_answer(questions: list[Row]) -> None:
    assert [q["id"] for q in questions] == [
        f"{language}-{n}" for language in ("en", "zh") for n in range(1, 6)
    ]
    for question in questions:
        assert set(question) == {"id", "language", "messages"}
        roles = [m["role"] for m in question["messages"]]
        assert roles in (["user"], ["system", "user"])
        for message in question["messages"]:
            assert message["content"]
            assert message["content"] == message["content"].strip()
            chinese = _has_chinese(message["content"])
            assert chinese == (question["language"] == "zh")
    with_system = [q["language"] for q in questions if len(q["messages"]) == 2]
    assert sorted(with_system) == ["en", "zh"]


def test_heldout_prompts_are_not_in_the_training_data(
    rows: list[Row], questions: list[Row]
) -> None:
    trained = {_plain(text) for row in rows for text in _turns(row, "user")}
    held = [_plain(text) for q in questions for text in _turns(q, "user")]
    assert len(held) == len(set(held)) == 10
    assert not trained.intersection(held)


@pytest.mark.parametrize(
    "answer",
    [
        EN,
        ZH,
        ZH.replace("：", ":"),
        ZH.replace("依据：", "依据:"),
        f"\n  {EN}\n\n",
        EN.replace("\n", "\r\n"),
        EN.replace("Conclusion: ", "Conclusion:"),
        EN.replace("a.", "a ratio of 3:1."),
    ],
)
def test_in_form_accepts(answer: str) -> None:
    assert samples.in_form(answer) is True


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("", id="nothing"),
        pytest.param("Liquidity is thin once stock is removed.", id="paragraph"),
        pytest.param("流动性偏弱，应关注存货。", id="paragraph-zh"),
        pytest.param("a.\nb.\nc.\nd.", id="four-lines-no-labels"),
        pytest.param(EN.replace("Risk: ", ""), id="label-missing"),
        pytest.param(EN.replace("Risk: c.\n", ""), id="line-missing"),
        pytest.param(ZH.replace("\n风险：丙。", ""), id="line-missing-zh"),
        pytest.param(
            "Basis: b.\nConclusion: a.\nRisk: c.\nNext check: d.", id="wrong-order"
        ),
        pytest.param(
            "结论：甲。\n风险：丙。\n依据：乙。\n复核：丁。", id="wrong-order-zh"
        ),
        pytest.param(f"Here is my view.\n{EN}", id="prose-before"),
        pytest.param(f"Well, {EN}", id="prose-before-on-the-line"),
        pytest.param(f"{EN}\nHope this helps.", id="five-lines"),
        pytest.param(f"{EN}\n{EN}", id="twice"),
        pytest.param(EN.replace("\n", "\n\n"), id="blank-lines-between"),
        pytest.param(EN.replace("\n", " "), id="one-line"),
        pytest.param(EN.replace("b.", ""), id="empty-value"),
        pytest.param(EN.replace("b.", "  "), id="blank-value"),
        pytest.param(ZH.replace("丁。", ""), id="empty-last-value-zh"),
        pytest.param(ZH.replace("乙。", "\u3000"), id="blank-value-zh"),
        pytest.param(
            "Conclusion: a.\nBasis: b.\n风险：丙。\n复核：丁。", id="mixed-languages"
        ),
        pytest.param(ZH.replace("结论：", "Conclusion: "), id="mixed-first-label"),
        pytest.param(EN.replace(":", "："), id="full-width-colon-in-english"),
        pytest.param(EN.replace("Risk:", "Risk"), id="colon-missing"),
        pytest.param(EN.replace("Risk:", "risk:"), id="lower-case-label"),
        pytest.param(EN.replace("Risk:", "**Risk:**"), id="markdown"),
        pytest.param(EN.replace("Risk:", " Risk:"), id="indented"),
    ],
)
def test_in_form_refuses(answer: str) -> None:
    assert samples.in_form(answer) is False


def test_the_description_is_one_sentence_naming_every_label() -> None:
    text = samples.FORM_DESCRIPTION
    assert text.count(".") == 1 and text.endswith(".")
    for answer in (EN, ZH):
        for line in answer.split("\n"):
            assert re.split("[:：]", line)[0] in text


def _general(name: str) -> list[Row]:
    return [json.loads(line) for line in (Path(samples.__file__).parent / f"general_{name}.jsonl").read_text(
        encoding="utf-8").splitlines()]


def test_the_halves_of_general_text_have_the_same_make_up_and_share_nothing() -> None:
    one, other = _general("calibration"), _general("measuring")
    assert samples.general_calibration() == [row["text"] for row in one]
    assert samples.general_measuring() == [row["text"] for row in other]
    assert [(row["language"], row["kind"]) for row in one] == [(row["language"], row["kind"]) for row in other]
    assert {row["language"] for row in one} == {"en", "zh", "de", "fr", "es", "ja", "code"}

    def fragments(rows: list[Row]) -> set[str]:
        """Runs of six words, or of twelve characters of what is written without spaces."""
        words = [row["text"].split() for row in rows if row["language"] not in ("zh", "ja")]
        runs = {" ".join(text[n:n + 6]) for text in words for n in range(len(text) - 5)}
        return runs | {row["text"][n:n + 12] for row in rows if row["language"] in ("zh", "ja")
                       for n in range(len(row["text"]) - 11)}

    assert not fragments(one) & fragments(other)


@pytest.mark.parametrize("name", ["calibration", "measuring"])
def test_general_text_is_clean(name: str) -> None:
    """No passage has another chat template's marks, odd controls or white space at its ends, and all are short."""
    for row in _general(name):
        text = row["text"]
        assert text == text.strip() and unicodedata.normalize("NFC", text) == text
        assert not re.search(r"<\||\[INST|<start_of|[\x00-\x08\x0b-\x1f\x7f\ufffd]", text)
        assert 60 < len(text) < 1000
    size = sum(len(row["text"]) for row in _general(name))
    assert {"calibration": 9_000, "measuring": 6_000}[name] < size < {"calibration": 13_000, "measuring": 9_000}[name]
