"""New tokens: which entries of a vocabulary are unused, and what a tokenizer makes of names for them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.new_tokens import name_tokens
from support.llamas import byte_level_tokenizer

RESERVED = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<unused3>", "[unused7]", "<SPECIAL_9>", "<|dummy_4|>")


def llama3() -> Any:
    tokenizer = byte_level_tokenizer("llama-bpe")
    tokenizer.add_special_tokens({"extra_special_tokens": list(RESERVED)})
    return tokenizer


def test_reserved_entries_are_taken_in_their_order_and_keep_their_ids(tmp_path):
    tokenizer = llama3()
    size, first = len(tokenizer), tokenizer.convert_tokens_to_ids(RESERVED[0])
    was = tokenizer("a <plan>b", add_special_tokens=False).input_ids
    found = name_tokens(tokenizer, ["<plan>", "<act>"], size)
    assert [*found] == [first, first + 1] and len(found[first]) > 1
    assert len(was) > 4 and len(tokenizer) == size
    for one in (tokenizer, saved(tokenizer, tmp_path)):
        ids = one("a <plan>b<act><unused3>", add_special_tokens=False).input_ids
        assert [i for i in ids if i >= first] == [first, first + 1, first + 2]
        assert one.decode(ids, skip_special_tokens=True) == "a <plan>b<act>" and one.convert_tokens_to_ids("<act>") == first + 1
        assert not one.added_tokens_decoder[first].special and one.added_tokens_decoder[first + 2].special
        assert RESERVED[0] not in one.get_vocab()


def saved(tokenizer: Any, folder: Any) -> Any:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_all_kinds_of_names_are_known_and_then_the_rows_behind_them(tmp_path):
    tokenizer = llama3()
    size = len(tokenizer)
    names = [f"<new_{n}>" for n in range(len(RESERVED) + 2)]
    found = name_tokens(tokenizer, names, size + 2)
    assert [*found] == [*range(size - len(RESERVED), size + 2)]
    again = saved(tokenizer, tmp_path)
    assert again.convert_tokens_to_ids(names) == [*found] and len(again) == size + 2
    with pytest.raises(UserError) as caught:
        name_tokens(llama3(), [*names, "<more>"], size + 2)
    assert caught.value.problems == (f"9 new tokens are named, and the model's vocabulary of {size + 2:,} has 8 unused entries",)


def test_what_a_template_writes_is_in_use():
    tokenizer, size = llama3(), len(llama3())
    tokenizer.chat_template = "{{ '<|reserved_special_token_0|>' }}"
    first = tokenizer.convert_tokens_to_ids(RESERVED[0])
    assert [*name_tokens(tokenizer, ["<plan>"], size, "<|reserved_special_token_1|>")] == [first + 2]


def test_names_that_are_tokens_are_told_of_together():
    tokenizer = llama3()
    with pytest.raises(UserError) as caught:
        name_tokens(tokenizer, ["<think>", "a", "<plan>", "<turn>"], len(tokenizer))
    assert [problem.split(" is one token")[0] for problem in caught.value.problems] == ["'<think>'", "'a'", "'<turn>'"]
    assert "rename" in caught.value.hint


def test_a_vocabulary_that_is_a_list_is_named_too():
    pieces = [("<unk>", 0.0), ("<unused0>", -5.0), *((letter, -3.0) for letter in "<>abcplan▁")]
    backend = Tokenizer(models.Unigram([*dict(pieces).items()], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [*name_tokens(tokenizer, ["<plan>"], len(tokenizer))] == [1]
    assert tokenizer("a<plan>").input_ids[-1] == 1 and tokenizer.convert_ids_to_tokens(1) == "<plan>"


def test_an_entry_that_merges_lead_to_is_reached_by_its_new_name_alone():
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<", "u", "n", "0", ">", "<u", "<un", "<un0", "<unused0>", "p"])}
    backend = Tokenizer(models.BPE(vocab=vocab | {"<unused": 11, "0>": 12}, merges=[("<", "u"), ("<unused", "0>"), ("0", ">")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [*name_tokens(tokenizer, ["<pn>"], 13)] == [9]
    assert tokenizer("p<pn>n").input_ids == [10, 9, 3] and tokenizer("<u").input_ids == [6]
