"""What of an answer is scored: what it says, and nothing of what was thought before, in every family's own marks."""

from __future__ import annotations

import pytest

from gemma_tune.answers.thoughts import said
from gemma_tune.encoding.chat_format import ChatFormat
from support.templates import (
    CHATML,
    GEMMA_4,
    QWEN_WORDS,
    SMOLLM2,
    byte_tokenizer,
    gemma_tokenizer,
    gpt_oss_tokenizer,
    trl_template,
)

MARKS = {"mistral": ("[THINK]", "[/THINK]"), "special": ("<think>", "</think>"), "seed-oss": ("<seed:think>", "</seed:think>")}
ANALYSIS, FINAL = "<|channel|>analysis<|message|>maybe 5 or 7", "<|channel|>final<|message|>"
CALLED = ' to=functions.look<|channel|>commentary json<|message|>{"a": 4}'


def chat_of(family: str) -> ChatFormat:
    if family == "gemma4":
        return ChatFormat(gemma_tokenizer(GEMMA_4, trl_template("gemma4_v5")), "gemma4")
    if family == "gpt-oss":
        return ChatFormat(gpt_oss_tokenizer(), "gpt_oss")
    if family == "seed-oss":  # whose marks are added, and not special
        return ChatFormat(byte_tokenizer(CHATML, SMOLLM2, others=MARKS[family]), "seed_oss")
    if family in MARKS:
        return ChatFormat(byte_tokenizer((*CHATML, *MARKS[family]), SMOLLM2), "llama")
    return ChatFormat(byte_tokenizer(CHATML, SMOLLM2, others=QWEN_WORDS), "qwen3")


def scored(family: str, prompt: str, answer: str) -> str:
    chat = chat_of(family)
    return said(chat, *(chat.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)))


@pytest.mark.parametrize(("prompt", "answer", "expected"), [
    ("", "<|channel>thought\nmaybe 5 or 7<channel|>4<turn|>", "4"), ("", "<|channel>thought\nmaybe 5 or 7", ""),
    ("", "<|channel>thought\nmaybe 5 or 7<turn|>", ""), ("<|channel>thought\n", "maybe 5 or 7<channel|>\n4<turn|>", "4"),
    ("<|channel>thought\n", "maybe 5 or 7", ""), ("<|channel>thought\n<channel|>", "4<turn|>", "4"),
    ("", "<|channel>thought\na<channel|><|channel>thought\n5<channel|> 4", "4"), ("", " 4 \n<turn|>5", "4"),
    ("", "4<channel|>", "4"), ("", "", "")])
def test_of_gemma_4(prompt, answer, expected):
    assert scored("gemma4", f"<|turn>user\n2+2<turn|>\n<|turn>model\n{prompt}", answer) == expected


@pytest.mark.parametrize("family", [*MARKS, "qwen3"])
def test_of_marks_around_a_thought(family):
    begin, end = MARKS.get(family, ("<think>", "</think>"))
    for prompt, answer, expected in [
            ("", f"{begin}5 or 7{end}\n\n4<|im_end|>", "4"), ("", f"{begin}5 or 7", ""), (f"{begin}\n", f"5 or 7\n{end}\n\n4", "4"),
            (f"{begin}\n", "5 or 7", ""), (f"{begin}\n\n{end}\n\n", "4<|im_end|>", "4"), ("", " 4\n", "4")]:
        assert scored(family, f"<|im_start|>assistant\n{prompt}", answer) == expected, (prompt, answer)


@pytest.mark.parametrize(("answer", "expected"), [
    (f"{ANALYSIS}<|end|><|start|>assistant{FINAL}4<|return|>", "4"), (ANALYSIS, ""), (f"{ANALYSIS}<|end|><|start|>assistant", ""),
    (f"{ANALYSIS}<|end|><|start|>assistant<|channel|>fin", ""), (f"{FINAL}4", "4"), ("4", "4"),
    (f"{ANALYSIS}<|end|>{ANALYSIS}<|end|><|start|>assistant{FINAL}4", "4"),
    (f"{ANALYSIS}<|end|><|start|>assistant{CALLED}<|call|>", 'assistant to=functions.lookcommentary json{"a": 4}')])
def test_of_gpt_oss(answer, expected):
    assert scored("gpt-oss", "<|start|>user<|message|>2+2<|end|><|start|>assistant", answer) == expected


def test_an_answer_that_talks_about_such_marks_is_scored_whole():
    assert scored("qwen3", "", "write <think> first, then </think>") == "write <think> first, then </think>"
    assert scored("qwen3", "", "<think>a</think> ends with </think>") == "<think>a</think> ends with </think>"
