"""The keys by which a turn says that it is not to be learned."""

from __future__ import annotations

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user


def first_answer(**mark):
    return Formats().example({"messages": [user("a"), answer("b", **mark), user("c"), answer("d")]}).messages[1]


@pytest.mark.parametrize("mark, learned", [
    ({"loss": False}, False), ({"loss": True}, True), ({"trainable": False}, False), ({"training": False}, False),
    ({"learn": False}, False), ({"loss_weight": 0}, False), ({"loss_weight": 1.0}, True), ({"loss_scale": 0.0}, False),
    ({"loss_mask": 0}, False), ({"loss_mask": 1}, True), ({"masked": True}, False), ({"masked": False}, True),
    ({"mask": True}, False), ({"mask": False}, True), ({"loss": None, "masked": None}, True),
    ({"loss": True, "weight": 0}, False), ({"masked": True, "train": True}, False), ({"train_detail": []}, True)])
def test_every_programs_mark_is_followed(mark, learned):
    assert first_answer(**mark) == (answer("b") if learned else answer("b", train=False))


@pytest.mark.parametrize("mark, reason", [
    ({"loss": "false"}, "`loss` of turn 2 is 'false'"), ({"loss": 0}, "`loss` of turn 2 is 0"),
    ({"mask": 1}, "`mask` of turn 2 is 1"), ({"loss_weight": 0.3}, "turn 2 has the loss_weight 0.3"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}]}, "`train_detail` of turn 2 says which parts")])
def test_a_mark_that_cannot_be_followed_is_an_error(mark, reason):
    with pytest.raises(RowError, match=reason) as caught:
        first_answer(**mark)
    assert caught.value.code == "turn_weight"
