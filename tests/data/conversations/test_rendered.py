"""Conversations that a chat template wrote already are taken apart; what is not one from end to end stays a text."""

from __future__ import annotations

import json
import time

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.conversations.rendered import is_rendered
from support.command import write_rows

TWO = [("user", "2+2?"), ("assistant", "    4\n\nsure")]
WITH_SYSTEM = [("system", "Be brief."), *TWO, ("user", "And <b>3+3</b>?"), ("assistant", "6")]


def turns(text: str) -> list[tuple[str, str]]:
    example = Formats().example({"text": text})
    assert example.format == "rendered" and example.text is None and not example.unread
    return [(turn["role"], turn["content"]) for turn in example.messages]


@pytest.mark.parametrize(("begin", "end", "model"), [
    ("<|im_start|>{role}\n", "<|im_end|>\n", "assistant"), ("<|im_start|>{role}<|im_sep|>", "<|im_end|>", "assistant"),
    ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "assistant"),
    ("<|header_start|>{role}<|header_end|>\n\n", "<|eot|>", "assistant"),
    ("<start_of_turn>{role}\n", "<end_of_turn>\n", "model"), ("<|turn>{role}\n", "<turn|>\n", "model"),
    ("<|{role}|>\n", "<|end|>\n", "assistant"), ("<|{role}|>\n", "</s>\n", "assistant")],
    ids=["chatml", "phi-4", "llama 3", "llama 4", "gemma 3", "gemma 4", "phi-3", "zephyr"])
@pytest.mark.parametrize("start", ["", "<s>", "<bos>", "<|begin_of_text|>"])
@pytest.mark.parametrize("wanted", [TWO, WITH_SYSTEM], ids=["two", "system"])
def test_marked_turns(begin, end, model, start, wanted):
    parts = [begin.format(role=model if role == "assistant" else role) + text + end for role, text in wanted]
    assert turns(start + "".join(parts)) == wanted
    assert turns(start + "".join(parts) + "<|endoftext|>\n") == wanted
    assert turns(start + "".join(parts).removesuffix(end)) == wanted, "the last end is often left out"


@pytest.mark.parametrize(("text", "wanted"), [
    ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] And? [/INST] 6 </s>",
     [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And?"), ("assistant", "6")]),
    ("[INST] 2+2? [/INST] 4", [("user", "2+2?"), ("assistant", "4")]),
    ("<s> [INST] 2+2? [/INST] 4</s>[INST] And? [/INST] 6</s>",
     [("user", "2+2?"), ("assistant", "4"), ("user", "And?"), ("assistant", "6")]),
    ("<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜>4<｜end▁of▁sentence｜>",
     [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]),
    ("### Human: 2+2?### Assistant: 4### Human: And?\n### Assistant: 6",
     [("user", "2+2?"), ("assistant", "4"), ("user", "And?"), ("assistant", "6")]),
    ("### Instruction:\n翻译\n\n### Input:\nhello\n\n### Response:\n你好</s>", [("user", "翻译\n\nhello"), ("assistant", "你好")]),
    ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
     "### Instruction:\n2+2?\n\n### Response:\n4", [("user", "2+2?"), ("assistant", "4")]),
    ("### System:\nBe brief.\n### User:\n2+2?\n### Assistant:\n4<|endoftext|>",
     [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]),
    ("### Question: 2+2?\n### Answer: 4", [("user", "2+2?"), ("assistant", "4")]),
    # An answer that has titles itself.
    ("### Human: Make a card\n### Assistant: Sure:\n### Question: 2+2?\n### Answer: 4",
     [("user", "Make a card"), ("assistant", "Sure:\n### Question: 2+2?\n### Answer: 4")])])
def test_written_in_other_ways(text, wanted):
    assert turns(text) == wanted


@pytest.mark.parametrize("text", [
    "plain", "", "### Notes\n\nhere", "### Instruction:\nalone", "<html>", "say [INST] q [/INST] a",
    "<|im_start|>user\nq<|im_end|> and more <|im_start|>assistant\na<|im_end|>", "<|im_start|>user\nq<|im_end|>",
    "<|im_start|>narrator\nq<|im_end|><|im_start|>assistant\na<|im_end|>", "A play.\n### Human: q\n### Assistant: a",
    '<|im_start|>user\nq<|im_end|><|im_start|>assistant\n<tool_call>{"name": "f"}</tool_call><|im_end|>'])
def test_what_is_none_stays_a_text(text):
    assert not is_rendered(text)


@pytest.mark.parametrize("text", ["### Human: q" + " " * 200_000 + "### Assistant: " + " \n" * 200_000 + "x",
                                  "<|im_start|>user\n" + "<|im_end|> " * 20_000, "[INST] " * 50_000, "<|user|>" + "\n" * 300_000,
                                  "You are\n" + (" " * 999 + "\n") * 300 + "User:" + "\nQ:" * 50_000, "USER: " * 50_000 + "ASSISTANT: x"])
def test_it_takes_no_longer_than_the_text_is_long(text):
    began = time.process_time()
    is_rendered(text)
    assert time.process_time() - began < 2


def test_names_are_looked_for_at_beginnings_of_lines_only_where_there_are_some():
    """Each looked at every sign of any text that begins like a system prompt, which took most of the time to read it."""
    text = "You are here.\n" + "The quick brown fox.\n" * 400_000
    began = time.process_time()
    assert not is_rendered(text)
    assert time.process_time() - began < 0.5


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
          "answers to the user's questions.")
FOUR = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4, I say:\n5")]
AS_FOUR = [{"role": role, "content": said} for role, said in FOUR]


@pytest.mark.parametrize(("text", "system"), [
    (f"{VICUNA} USER: Hi ASSISTANT: Hello</s>USER: 2+2? ASSISTANT: 4, I say:\n5</s>", VICUNA),
    ("USER: Hi\nASSISTANT: Hello\nUSER: 2+2?\nASSISTANT: 4, I say:\n5\n", None),
    ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 4, I say:\n5", None),
    ("System: Be brief.\nUser:Hi\nAssistant:Hello\nUser:2+2?\nAssistant:4, I say:\n5", "Be brief."),
    ("You are a bot.\n\nHuman: Hi\nAI: Hello\nHuman: 2+2?\nAI: 4, I say:\n5", "You are a bot."),
    ("The following is a dialog.\nUser: Hi\nAssistant: Hello\nUser: 2+2?\nAssistant: 4, I say:\n5", "The following is a dialog."),
    ("Q: Hi\nA: Hello\n\nQ: 2+2?\nA: 4, I say:\n5", None), ("Question: Hi\nAnswer: Hello\nQuestion: 2+2?\nAnswer: 4, I say:\n5", None),
    ("用户：Hi\n助手：Hello\n用户：2+2?\n助手：4, I say:\n5", None)])
def test_names_of_speakers_before_what_is_said(text, system):
    assert turns(text) == [("system", system), *FOUR][system is None:]


@pytest.mark.parametrize("text", [
    "User: hi", "A play.\n\nHuman: To be?\nAssistant: Sir.", f"The prompt is\n{VICUNA} USER: {{prompt}} ASSISTANT:", "Q: a\nA: b\nA: c",
    "Question: is it so?\nI think:\nAnswer with care.", "User: our guide says\nthat an Assistant: is not a name", "You are here.\nA: one",
    "Q: Which?\nA: one\nB: two\nAnswer: B", "Q: Which?\n A: one\n B：two\n\nQ: So?\nA: Yes.",
    "Q: Pay how?\n\nA: By card.\n\n## Shipping\n\nQ: How long?\n\nA: A week.", "A: Hi\nQ: Hello?",
    'User: Hi\nAssistant: <tool_call>{"name": "f"}</tool_call>'])
def test_a_text_that_only_has_such_names_in_it_stays_one(text):
    assert not is_rendered(text)


def test_code_below_a_name_keeps_its_indent():
    assert turns("User: Add.\nAssistant: \n\n    a = 1\n    a += 1\n") == [("user", "Add."), ("assistant", "    a = 1\n    a += 1")]
    assert turns("User:\n\nHi\nAssistant:\u3000 Hello\nUser: So?\nAssistant:\tYes.") == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "Yes.")]


def test_choices_and_headings_belong_to_what_is_said_elsewhere():
    assert turns("Question: Which?\nA: one\nB: two\nAnswer: B\n\nQuestion: 1?\nAnswer: Yes.\n# End") == [
        ("user", "Which?\nA: one\nB: two"), ("assistant", "B"), ("user", "1?"), ("assistant", "Yes.\n# End")]
    assert turns("User: Hi\nAssistant: Hello\nB: no\n# x\nUser: 1?\nAssistant: Yes.")[1] == ("assistant", "Hello\nB: no\n# x")


@pytest.mark.parametrize(("text", "reason"), [
    ("User: Hi\nAssistant: Hello\nUser: 2+2?", "the conversation ends with `user`"), ("User: Hi\nUser: 2+2?\nAssistant: 4", "turn 2 is `user`"),
    ("USER: Hi ASSISTANT:", "turn 2 (assistant) is empty")])
def test_a_dialog_that_cannot_be_learned_is_refused_and_no_plain_text(text, reason):
    with pytest.raises(RowError) as caught:
        Formats().example({"text": text})
    assert reason in str(caught.value) and caught.value.fix.endswith("; or keep the text as it is with --format text")
    assert Formats("text").example({"text": text}).text == text


@pytest.mark.parametrize(("prompt", "completion"), [
    ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:", " 4, I say:\n5"),
    ("USER: Hi ASSISTANT: Hello</s>USER: 2+2? ASSISTANT:", " 4, I say:\n5</s>"),
    ("<s>[INST] Hi [/INST] Hello </s><s>[INST] 2+2? [/INST]", " 4, I say:\n5 </s>"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
     "4, I say:\n5<|im_end|>\n"),
    ("### Human: Hi\n### Assistant: Hello\n### Human: 2+2?\n### Assistant:", " 4, I say:\n5")])
@pytest.mark.parametrize("name", ["completion", "response"])
def test_a_prompt_that_is_written_up_to_its_answer_is_taken_apart(prompt, completion, name):
    example = Formats().example({"prompt": prompt, name: completion})
    assert example.messages == [AS_FOUR[0], AS_FOUR[1] | {"train": False}, *AS_FOUR[2:]] and not example.unread


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer")])
@pytest.mark.parametrize("prompt", ["User: Hi\nUser: 2+2?\nAssistant:", "System: s\nUser: Hi\nAssistant:", "AI: Hello\nHuman: 2+2?\nAI:"])
def test_a_prompt_whose_turns_cannot_be_learned_has_a_way_out(prompt, names):
    row = dict(zip(names, (prompt, "4"), strict=True)) | {"system": "t"}
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert caught.value.fix.endswith("; or keep the prompt as it is with --columns user=…,assistant=…")
    kept = Formats(columns=dict(zip(("user", "assistant"), names, strict=True))).example(row)
    assert kept.messages == [{"role": "system", "content": "t"}, {"role": "user", "content": prompt}, {"role": "assistant", "content": "4"}]
    with pytest.raises(RowError) as caught:
        Formats().example({"prompt": "User: Hi\nAssistant:", "completion": " "})
    assert "--columns" not in caught.value.fix


def test_what_a_completion_says_in_a_prompts_layout_is_the_answers():
    row = {"prompt": "User: Hi\nAssistant:", "completion": " Hello.\nUser: no"}
    assert Formats().example(row).messages == [AS_FOUR[0], {"role": "assistant", "content": "Hello.\nUser: no"}]


@pytest.mark.parametrize("prompt", ["User: Hi\nAssistant:", "### Instruction:\nHi\n\n### Response:\n", "[INST] Hi [/INST]",
                                    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"])
@pytest.mark.parametrize(("completion", "said"), [
    ("    a = 1\n    b = 2", "    a = 1\n    b = 2"), ("\n\ta = 1\n\tb = 2", "\ta = 1\n\tb = 2"), (" 4", "4"), ("4 = 4", "4 = 4"),
    ("    a = 1\n\nUser: no", "    a = 1\n\nUser: no")])
def test_the_first_line_of_a_completion_keeps_its_indent(prompt, completion, said):
    assert Formats().example({"prompt": prompt, "completion": completion}).messages == [AS_FOUR[0], {"role": "assistant", "content": said}]


@pytest.mark.parametrize("prompt", ["User: Hi", "What does User: mean?", "### Human: Hi\n### Assistant: Hello\n### Human:", "User: Hi\nAssistant: Hello, and"])
def test_a_prompt_that_does_not_end_where_an_answer_begins_stays_as_it_is(prompt):
    assert Formats().example({"prompt": prompt, "completion": "x"}).messages[0] == {"role": "user", "content": prompt}


@pytest.mark.parametrize("beside", ["label", "response", "intent", "completion"])
def test_a_dialog_beside_what_may_be_its_answer_is_asked_about(beside):
    row = {"text": "User: Hi\nAssistant: Hello", beside: "greeting"}
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert f"`text` stands beside `{beside}`" in str(caught.value)
    assert caught.value.fix == (f"use --columns user=text,assistant={beside}, or --format text to learn the text alone, "
                                "or --format rendered for the turns in it")
    assert Formats("rendered").example(row).messages == AS_FOUR[:2]
    marked = "### Human: Hi\n### Assistant: Hello"
    assert Formats().example(row | {"text": marked}).messages == AS_FOUR[:2], "which is one for certain"
    assert Formats().example({"text": row["text"], "system": "s", "id": 1}).messages[1:] == AS_FOUR[:2]


def test_rows_beside_others_and_the_named_format():
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert Formats().example({"text": text, "system": "s"}).messages[0] == {"role": "system", "content": "s"}
    assert [item.name for item in Formats().example({"text": text, "source": "x"}).unread] == ["source"]
    assert Formats("text").example({"text": text}).text == text
    assert Formats().example({"instruction": "i", "output": "o", "text": "### Instruction:\ni\n\n### Response:\no"}).format == "alpaca"
    with pytest.raises(RowError, match="not a row of the format `rendered`"):
        Formats("rendered").example({"text": "plain"})
    with pytest.raises(RowError, match="no better and worse answer"):
        Formats(take="pairs").example({"text": text})


def test_lists_of_rows_in_one_object_are_no_turns():
    with pytest.raises(RowError) as caught:
        Formats().example({"train": [{"instruction": "q", "output": "a"}], "test": []})
    assert "`train` holds rows, not turns" in str(caught.value)
    assert "jq -c '(arrays[], objects).train[]' FILE.json > train.jsonl" in caught.value.fix


def test_they_are_prepared_as_the_conversations_that_they_are(cli, tiny, tmp_path):
    """The same tokens and the same labels as the turns themselves give."""
    conversations = [[{"role": "user", "content": f"What is {n}+{n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]
                     for n in range(20)]
    plain = write_rows(tmp_path / "plain.jsonl", [{"messages": turns} for turns in conversations])
    chat = "<|im_start|>{role}\n{content}<|im_end|>\n"
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "".join(chat.format(**turn) for turn in turns)} for turns in conversations])
    rows = []
    for run, data in (("plain", plain), ("texts", texts)):
        done = cli("prepare", data, "--model", tiny, "--run", run, "--json")
        assert done.code == 0, done.err
        rows.append([json.loads(line) for line in (tmp_path / run / "data" / "train.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1] and "format: rendered (rows have a `text` that a chat template wrote" in done.err
