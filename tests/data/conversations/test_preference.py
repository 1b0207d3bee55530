"""Prompts of pairs and judged answers that are written as a dialog in one text."""

import pytest

from gemma_tune.data.conversations import rendered
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.conversations.spoken import spoken

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "train": False},
         {"role": "user", "content": "2+2?"}]
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
# A prompt up to where the answer begins, and what ends the answer.
WRITTEN = {
    "HH": ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:", ""), "lines": ("Human: Hi\nAI: Hello\nHuman: 2+2?\nAI: ", ""),
    "Vicuna": ("USER: Hi ASSISTANT: Hello</s>USER: 2+2? ASSISTANT:", "</s>"), "ChatML": (CHATML, "<|im_end|>\n"),
    "Llama 2": ("<s>[INST] Hi [/INST] Hello </s><s>[INST] 2+2? [/INST]", " </s>"), "Chinese": ("用户：Hi\n助手：Hello\n用户：2+2?\n助手：", ""),
    "titles": ("### Human: Hi\n### Assistant: Hello\n### Human: 2+2?\n### Assistant:", "")}
written = pytest.mark.parametrize(("prompt", "end"), WRITTEN.values(), ids=WRITTEN)


def answer(text):
    return {"role": "assistant", "content": text}


def read(row, **options):
    return Formats(**options).example(row)


@written
def test_a_prompt_that_is_written_up_to_its_answers_is_taken_apart(prompt, end):
    four, five = f" 4, I say:\n5{end}", f" Five.{end}"
    for name in ("prompt", "question"):
        example = read({name: prompt, "chosen": four, "rejected": five})
        assert example.messages == [*ASKED, answer("4, I say:\n5")] and example.rejected == [answer("Five.")] and not example.unread
        example = read({name: prompt, "chosen": [answer("4")], "rejected": [answer("5")]})
        assert example.messages == [*ASKED, answer("4")] and example.rejected == [answer("5")]
    example = read({"prompt": prompt, "chosen": four, "rejected": five}, take="chosen")
    assert [turn | {"train": False} if turn == answer("Hello") else turn for turn in example.messages] == [*ASKED, answer("4, I say:\n5")]
    example = read({"prompt": prompt, "completion": five, "label": False})
    assert example.messages == [*ASKED, answer("Five.")] and example.good is False and not example.unread


@written
def test_answers_that_are_whole_dialogs_share_their_beginning(prompt, end):
    both = {side: f"{prompt.rstrip(' ')} {said}{end}".replace("\n ", "\n") for side, said in (("chosen", 4), ("rejected", 5))}
    for beside in ({}, {"prompt": prompt}, {"prompt": "2+2?"}, {"prompt": "Hi"}):
        example = read(beside | both)
        assert example.messages == [*ASKED, answer("4")] and example.rejected == [answer("5")] and not example.unread


@pytest.mark.parametrize("row", [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}])
def test_each_text_of_a_pair_is_taken_apart_once(row, monkeypatch):
    taken = []
    monkeypatch.setattr(rendered, "spoken", lambda text, *how: taken.append(text) or spoken(text, *how))
    rendered._read.cache_clear()
    assert read(row).rejected == [answer("b")] and len(taken) == len({*taken}) <= 3


def test_an_answer_with_a_dialog_in_it_stays_an_answer():
    said = "User: Hi\nAssistant: Hello"
    example = read({"prompt": "Write a dialog.", "chosen": said, "rejected": "No."})
    assert example.messages == [{"role": "user", "content": "Write a dialog."}, answer(said)]


def test_a_prompt_that_is_text_is_kept_as_such():
    prompt, asked = "User: Hi\nAssistant:", [{"role": "user", "content": "User: Hi\nAssistant:"}]
    named = read({"prompt": prompt, "chosen": "a", "rejected": "b"}, columns={"user": "prompt", "chosen": "chosen", "rejected": "rejected"})
    turns = read({"prompt": asked, "chosen": "a", "rejected": "b"})
    assert named.messages == turns.messages == [*asked, answer("a")] and named.rejected == turns.rejected == [answer("b")]
    assert read({"prompt": asked, "completion": "a", "kto_tag": True}).messages == [*asked, answer("a")]
    assert read({"instruction": "i", "input": "j", "q": "Hi", "good": "a", "bad": "b"},
                columns={"user": "q", "chosen": "good", "rejected": "bad"}).messages == [{"role": "user", "content": "Hi"}, answer("a")]
    whole = {"q": "Hi", "good": "Human: Hi\nAI: a", "bad": "Human: Hi\nAI: b"}
    assert read(whole, columns={"user": "q", "chosen": "good", "rejected": "bad"}).rejected == [answer("b")]
    document = "Q: one\nA: two\n\nSum it up."
    assert read({"prompt": document, "chosen": "a", "rejected": "b"}).messages[0]["content"] == document


@pytest.mark.parametrize(("answers", "way"), [
    ({"chosen": "a", "rejected": "b"}, "with --columns user=…,chosen=…,rejected=…"),
    ({"completion": "a", "label": True}, 'as [{"role": "user", "content": "…"}]')])
@pytest.mark.parametrize("take", [None, "chosen"])
def test_a_prompt_whose_turns_cannot_be_learned_has_a_way_out(answers, way, take):
    with pytest.raises(RowError) as caught:
        read({"prompt": "User: Hi\nUser: 2+2?\nAssistant:", **answers}, take=take)
    assert caught.value.code == "alternation" and caught.value.fix.endswith(f"; or keep the prompt as it is {way}")


@pytest.mark.parametrize(("prompt", "chosen", "said"), [
    ("\n\nHuman: Hi", "\n\nAssistant: Yes.", "Yes."), ("\n\nHuman: Hi\n\nAssistant: I", " am.", "I am."),
    ("<|user|>\nHi</s>\n", "<|assistant|>\nYes.</s>\n", "Yes.")])
def test_a_prompt_may_end_before_or_behind_where_the_answer_begins(prompt, chosen, said):
    """As Zephyr's recipe writes both sides, and as the beginning that two texts share ends."""
    example = read({"prompt": prompt, "chosen": chosen, "rejected": chosen.replace(".", "?")})
    assert example.messages == [{"role": "user", "content": "Hi"}, answer(said)] and example.rejected == [answer(said.replace(".", "?"))]


@pytest.mark.parametrize(("prompt", "chosen"), [
    ("### Question: which?", "One has titles:\n### Answer: this"), ("\n\nHuman: Hi", "Yes.\n\nAssistant: they say."),
    ("<|user|>\nHi", "Zephyr writes <|assistant|>\nYes.")])
def test_what_an_answer_shows_further_on_is_no_place_where_it_begins(prompt, chosen):
    row = {"prompt": prompt, "chosen": chosen, "rejected": "No."}
    assert read(row).messages == [{"role": "user", "content": prompt}, answer(chosen)] and read(row).rejected == [answer("No.")]


def test_between_empty_lines_names_at_other_lines_are_part_of_what_is_said():
    play = "Write a play:\nHuman: Hi\nAssistant: Hello"
    row = {"chosen": f"\n\nHuman: {play}\n\nAssistant: A", "rejected": f"\n\nHuman: {play}\n\nAssistant: B"}
    asked = {"role": "user", "content": play}
    assert read(row).messages == read({"text": row["chosen"]}).messages == [asked, answer("A")]
    assert read({"text": "\n\nHuman: a\nAssistant: b"}).messages == [{"role": "user", "content": "a"}, answer("b")]


PLAY = "A play:\nHuman: Hi\nAssistant: Hello"
ASSISTANT_AGAIN = "Sure:\n\nAssistant: is a name.\nAssistant: again"


@pytest.mark.parametrize("begin", ["", "\n\n", "\n", " \n\n"])
@pytest.mark.parametrize(("asked", "said"), [(PLAY, "A"), (PLAY, ASSISTANT_AGAIN), ("Hi", ASSISTANT_AGAIN), ("Hi", PLAY), ("Hi", "A"),
                                             (f"{PLAY}\n\nwith an empty line", PLAY)])
def test_where_two_transcripts_part_the_answer_begins_with_or_without_empty_lines_before_them(begin, asked, said):
    before = f"Human: {asked}\n\nAssistant: Yes.\n\nHuman: Go on.\n\nAssistant:"
    example = read({"chosen": f"{begin}{before} {said}", "rejected": f"{begin}{before} No."})
    assert example.messages == [{"role": "user", "content": asked}, answer("Yes.") | {"train": False},
                                {"role": "user", "content": "Go on."}, answer(said)]
    assert example.rejected == [answer("No.")]
    assert read({"chosen": f"{before} No.", "rejected": f"{before} {said}"}).rejected == [answer(said)]


def test_a_dialogue_with_which_both_answers_begin_is_no_turn_where_empty_lines_part_turns():
    before = f"\n\nHuman: Hi\n\nAssistant: {PLAY}"
    example = read({"chosen": f"{before} there.", "rejected": f"{before} you."})
    assert [turn["content"] for turn in example.messages] == ["Hi", f"{PLAY} there."]
    assert example.rejected == [answer(f"{PLAY} you.")]


def test_so_it_does_in_transcripts_without_any_empty_lines():
    before = "Human: Hi\nAssistant: Yes.\nHuman: Go on.\nAssistant:"
    example = read({"chosen": f"{before} Sure:\nAssistant: is a name.", "rejected": f"{before} No."})
    assert [turn["content"] for turn in example.messages] == ["Hi", "Yes.", "Go on.", "Sure:\nAssistant: is a name."]
    mixed = "Human: Hi\n\nAssistant: Yes.\nHuman: Go on.\nAssistant:"
    example = read({"chosen": f"{mixed} a", "rejected": f"{mixed} b"})
    assert [turn["content"] for turn in example.messages] == ["Hi", "Yes.", "Go on.", "a"] and example.rejected == [answer("b")]


def test_behind_where_they_part_they_may_go_on_with_turns_or_have_other_questions():
    before = "Human: Hi\n\nAssistant:"
    example = read({"chosen": f"{before} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{before} d"})
    assert example.messages[1:] == [answer("a"), {"role": "user", "content": "b"}, answer("c")] and example.rejected == [answer("d")]
    with pytest.raises(RowError, match="the two answers are to different prompts"):
        read({"chosen": "Human: a\n\nAssistant: x", "rejected": "Human: b\n\nAssistant: y"})


def test_a_prompt_without_turns_is_no_prompt():
    with pytest.raises(RowError, match="there is no `prompt` that it answers"):
        read({"prompt": [], "chosen": "a", "rejected": "b"})
