"""White space around texts: what a template writes of it is read off its renders."""

from __future__ import annotations

import pytest

from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.white_space import divided
from support.models import TURNS
from support.templates import CHATML, SMOLLM2, assistant, gemma_tokenizer, system, trl_template, user

PADDED = "\n\n   x\n "
TOOL = {"role": "tool", "content": PADDED, "name": "f"}
FORMATS = {"gemma3": (TURNS, trl_template("gemma3"), "gemma3_text"), "ours": (TURNS, None, "gemma3_text"),
           "gemma": (TURNS, trl_template("gemma"), "gemma2"), "smollm2": (CHATML, SMOLLM2, "llama"),
           "qwen3": (CHATML, trl_template("qwen3"), "qwen3")}


@pytest.mark.parametrize("text, parts", [
    ("x", ("", "x", "")), (" a b\n", (" ", "a b", "\n")), ("\u3000x", ("\u3000", "x", "")), ("", ("", "", "")), (" \n", (" \n", "", ""))])
def test_a_text_is_divided(text, parts):
    assert divided(text) == parts and "".join(parts) == text


@pytest.mark.parametrize("name, turn, content", [
    ("gemma3", user(PADDED), "x"), ("gemma3", assistant(PADDED), "x"), ("ours", assistant(PADDED), "x"),
    ("smollm2", user(PADDED), PADDED), ("smollm2", assistant(PADDED), PADDED), ("smollm2", system(PADDED), PADDED),
    ("qwen3", user(PADDED), PADDED), ("qwen3", TOOL, PADDED),
    ("qwen3", assistant(PADDED), "   x\n "),  # it drops the line breaks before an answer, and keeps the rest
    ("gemma", system(PADDED), "x\n "),  # put before the user's text, with which it is trimmed
    ("gemma3", TOOL, PADDED),  # refused, or written in another way than a text: nothing can be told
])
def test_what_a_template_writes(name, turn, content):
    special, template, family = FORMATS[name]
    chat = ChatFormat(gemma_tokenizer(special, template), family)
    assert chat.written(turn) == {**turn, "content": content}
    bare = {**turn, "content": "x"}
    assert chat.written(bare) is bare


def test_reasoning_has_margins_of_its_own():
    chat = ChatFormat(gemma_tokenizer(*FORMATS["qwen3"][:2]), "qwen3")
    assert chat.written(assistant(" x", reasoning_content="\n  why\n")) == assistant(" x", reasoning_content="  why")
