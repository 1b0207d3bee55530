"""What is told of an answer, against texts whose verdict a person sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gemma_tune.evaluate.scores import chrf, per_answer, repeats_itself, same_text


@pytest.mark.parametrize("text", [
    "A bond is a bond. A bond is a bond. A bond is a bond. A bo", "账上现金只有1500万元。" * 4, "no\n" * 20,
    "First it answers well, then: " + "ha " * 30, "The model is a 10-year plan. " * 3, "=" * 40])
def test_an_answer_that_goes_round_in_circles_is_one(text):
    assert repeats_itself(text) and repeats_itself(text + "  \n")


@pytest.mark.parametrize("text", [
    "", "No.", "very, very, very good", "A bond is a bond. A bond is a bond. Nothing else.", "- one\n- two\n- three\n- four",
    "A bond is a bond. " * 5 + "But then it says something else altogether.", "结论：利润下降。\n依据：收入减少。",
    "| a | b |\n|---|---|\n| 1 | 2 |", "Ha ha ha!"])
def test_other_answers_are_not(text):
    assert not repeats_itself(text)


def test_a_long_loop_is_found_in_time():
    assert repeats_itself("x" * 200 + "".join(f"{n} " for n in range(300)) * 40)
    assert not repeats_itself("".join(f"{n} " for n in range(20_000)))


def test_white_space_and_composed_letters_do_not_make_another_answer():
    assert same_text(" Caf\u00e9\n is  open", "Cafe\u0301 is open ")
    assert not same_text("It rains", "It rains.")


def test_chrf_is_sacrebleus_and_knows_chinese():
    equal, none, near = chrf(["毛利率在下降", "abc", "the margin is falling"],
                             ["毛利率在下降", "xyz", "the margins are falling"])
    assert equal == 100 and none == 0 and 40 < near < 100


def test_only_questions_with_an_answer_of_their_own_are_compared_with_it():
    answers = [SimpleNamespace(text=text, tokens=n, ended=ended) for n, (text, ended) in enumerate(
        [("yes", True), ("yes", False), ("no", True), ("no", False)], start=3)]
    questions = [SimpleNamespace(reference=reference, judged=judged) for reference, judged in
                 (("yes", False), ("yes", True), (None, True), (None, True))]
    found = per_answer(answers, questions, lambda text: text == "no")
    assert found["exact_match"].tolist() == [1, 0], "an answer that ran on is not the same one"
    assert found["chrf"].tolist() == [100, 100]
    assert found["in_form"].tolist() == [0, 1, 0], "nor has one the form whose end nobody saw"
    assert found["length"].tolist() == [3, 4, 5, 6] and found["ended"].tolist() == [1, 0, 1, 0]


def test_texts_of_report_md_bring_no_html_along():
    from gemma_tune.evaluate.markdown import _quoted, _without_tags

    assert _without_tags("<script>alert(1)</script> a < b") == "&lt;script>alert(1)&lt;/script> a < b"
    assert _quoted("<b>\n```\n<b>\n```\n</b>") == ["> &lt;b>", "> ```", "> <b>", "> ```", "> &lt;/b>"]
