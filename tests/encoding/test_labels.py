"""Labels for tools, reasoning and per-turn control: against TRL's training templates, and spans written by hand."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.labels import IGNORE_INDEX, Draft, Labeller
from gemma_tune.encoding.thinking import choice_in
from gemma_tune.encoding.tokenizer import load_format
from support.models import TURNS
from support.templates import (
    CHATML,
    GEMMA_4,
    GPT2_WORDS,
    LLAMA_3_1,
    QWEN_WORDS,
    SMOLLM2,
    TOOLS,
    assistant,
    byte_tokenizer,
    call,
    gemma_tokenizer,
    gpt_oss_tokenizer,
    learned,
    result,
    spans,
    system,
    trl_template,
    user,
)

# Gemma 4's larger models end a prompt without thinking with an empty thought, which the turn itself does not show.
GEMMA_4_LARGE = trl_template("gemma4_v5").replace(
    "{{- '<|turn>model\\n' -}}\n    {%- elif", "{{- '<|turn>model\\n' -}}{%- if not enable_thinking -%}"
    "{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}\n    {%- elif")
assert trl_template("gemma4_v5") != GEMMA_4_LARGE

TEMPLATES = {
    "gemma-1": lambda: (gemma_tokenizer(TURNS, trl_template("gemma")), "gemma"),
    "gemma-2": lambda: (gemma_tokenizer(TURNS, trl_template("gemma")), "gemma2"),
    "gemma-3": lambda: (gemma_tokenizer(TURNS, trl_template("gemma3")), "gemma3_text"),
    "our gemma": lambda: (gemma_tokenizer(TURNS, None), "gemma3_text"),
    "our gemma-4": lambda: (gemma_tokenizer(GEMMA_4, None), "gemma4"),
    "gemma-4 old": lambda: (gemma_tokenizer(GEMMA_4, trl_template("gemma4")), "gemma4"),
    "gemma-4": lambda: (gemma_tokenizer(GEMMA_4, trl_template("gemma4_v5")), "gemma4"),
    "gemma-4 large": lambda: (gemma_tokenizer(GEMMA_4, GEMMA_4_LARGE), "gemma4"),
    "smollm2": lambda: (byte_tokenizer(CHATML, SMOLLM2, GPT2_WORDS), "llama"),
    "llama-3": lambda: (byte_tokenizer(LLAMA_3_1, trl_template("llama3")), "llama"),
    "llama-3.1": lambda: (byte_tokenizer(LLAMA_3_1, trl_template("llama3_1")), "llama"),
    "qwen-2.5": lambda: (byte_tokenizer(CHATML, trl_template("qwen2_5"), others=QWEN_WORDS), "qwen2"),
    "qwen-3": lambda: (byte_tokenizer(CHATML, trl_template("qwen3"), others=QWEN_WORDS), "qwen3"),
}


def chat_of(name: str, thinking: str = "auto") -> ChatFormat:
    tokenizer, family = TEMPLATES[name]()
    return ChatFormat(tokenizer, family, thinking=thinking)


TALK = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
THOUGHTS = [user("q1"), assistant("a1", reasoning_content="r1"), user("q2"), assistant("a2", reasoning_content="r2")]
WEATHER = [system("S"), user("q1"), call("weather", city="Rome"), result("sunny, 20"), assistant("a1"), user("q2"),
           assistant("a2")]
WEATHER_THOUGHTS = [
    user("q1"), call("weather", reasoning="r1", city="Rome"), result("sunny, 20"),
    assistant("a1", reasoning_content="r2"), user("q2"), assistant("a2", reasoning_content="r3")]
TWO_CALLS = [
    user("q1"), assistant("", tool_calls=[
        {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"id": "call00002", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]),
    result("sunny"), result("snow", id="call00002"), assistant("a1")]

G4_ROME = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
QWEN_ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
EMPTY = "<think>\n\n</think>\n\n"


def think(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


# template, thinking, messages, tools → the learned stretches of each sequence, written by hand
GOLDEN = {
    "gemma 1, plain": ("gemma-1", "auto", TALK, None, [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    "gemma 2, plain": ("gemma-2", "auto", TALK, None, [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    "gemma 2, system": ("gemma-2", "auto", [system("S"), *TALK], None, [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    "gemma 3, plain": ("gemma-3", "auto", TALK, None, [["a1<end_of_turn>", "a2<end_of_turn>"]]),
    "gemma 4, plain": ("gemma-4", "auto", TALK, None, [["a1<turn|>", "a2<turn|>"]]),
    "gemma 4, reasoning": ("gemma-4", "auto", THOUGHTS, None, [
        ["<|channel>thought\nr1\n<channel|>a1<turn|>"], ["<|channel>thought\nr2\n<channel|>a2<turn|>"]]),
    "gemma 4, thinking on": ("gemma-4", "on", THOUGHTS, None, [
        ["<|channel>thought\nr1\n<channel|>a1<turn|>"], ["<|channel>thought\nr2\n<channel|>a2<turn|>"]]),
    "gemma 4, tools": ("gemma-4", "auto", WEATHER, TOOLS, [[f"{G4_ROME}<|tool_response>", "a1<turn|>", "a2<turn|>"]]),
    "gemma 4, two calls": ("gemma-4", "auto", TWO_CALLS, TOOLS, [
        [f"{G4_ROME}{G4_ROME.replace('Rome', 'Oslo')}<|tool_response>", "a1<turn|>"]]),
    "gemma 4, tools and reasoning": ("gemma-4", "auto", WEATHER_THOUGHTS, TOOLS, [
        [f"<|channel>thought\nr1\n<channel|>{G4_ROME}<|tool_response>", "<|channel>thought\nr2\n<channel|>a1<turn|>"],
        ["<|channel>thought\nr3\n<channel|>a2<turn|>"]]),
    # With thinking on, the prompt behind a tool's result opens the thought itself.
    "gemma 4, tools and thinking on": ("gemma-4", "on", WEATHER_THOUGHTS, TOOLS, [
        [f"<|channel>thought\nr1\n<channel|>{G4_ROME}<|tool_response>", "r2\n<channel|>a1<turn|>"],
        ["<|channel>thought\nr3\n<channel|>a2<turn|>"]]),
    "gemma 4 before v5, tools": ("gemma-4 old", "auto", WEATHER, TOOLS, [
        [f"{G4_ROME}<|tool_response>", "a1<turn|>", "a2<turn|>"]]),
    "gemma 4 large, plain": ("gemma-4 large", "auto", TALK, None, [["a1<turn|>"], ["a2<turn|>"]]),
    "gemma 4 large, thinking off": ("gemma-4 large", "off", TALK, None, [["a1<turn|>"], ["a2<turn|>"]]),
    "gemma 4 large, thinking on": ("gemma-4 large", "on", TALK, None, [["a1<turn|>", "a2<turn|>"]]),
    # Behind a tool's result no empty thought is served.
    "gemma 4 large, tools": ("gemma-4 large", "auto", WEATHER, TOOLS, [
        [f"{G4_ROME}<|tool_response>"], ["a1<turn|>", "a2<turn|>"]]),
    "smollm2, plain": ("smollm2", "auto", TALK, None, [["a1<|im_end|>", "a2<|im_end|>"]]),
    "llama 3, plain": ("llama-3", "auto", TALK, None, [["a1<|eot_id|>", "a2<|eot_id|>"]]),
    "llama 3.1, plain": ("llama-3.1", "auto", TALK, None, [["a1<|eot_id|>", "a2<|eot_id|>"]]),
    "llama 3.1, tools": ("llama-3.1", "auto", WEATHER, TOOLS, [
        ['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "a1<|eot_id|>", "a2<|eot_id|>"]]),
    "qwen 2.5, plain": ("qwen-2.5", "auto", TALK, None, [["a1<|im_end|>", "a2<|im_end|>"]]),
    "qwen 2.5, tools": ("qwen-2.5", "auto", WEATHER, TOOLS, [
        [f"{QWEN_ROME}<|im_end|>", "a1<|im_end|>", "a2<|im_end|>"]]),
    "qwen 3, plain": ("qwen-3", "auto", TALK, None, [[f"{EMPTY}a1<|im_end|>"], [f"{EMPTY}a2<|im_end|>"]]),
    "qwen 3, reasoning": ("qwen-3", "auto", THOUGHTS, None, [
        [think("r1") + "a1<|im_end|>"], [think("r2") + "a2<|im_end|>"]]),
    "qwen 3, thinking on": ("qwen-3", "on", THOUGHTS, None, [
        [think("r1") + "a1<|im_end|>"], [think("r2") + "a2<|im_end|>"]]),
    "qwen 3, reasoning inside the text": (
        "qwen-3", "auto", [user("q1"), assistant("<think>r1</think>a1")], None, [[think("r1") + "a1<|im_end|>"]]),
    "qwen 3, thinking off": ("qwen-3", "off", TALK, None, [["a1<|im_end|>"], ["a2<|im_end|>"]]),
    "qwen 3, tools": ("qwen-3", "auto", WEATHER, TOOLS, [
        [f"{EMPTY}{QWEN_ROME}<|im_end|>"], [f"{EMPTY}a1<|im_end|>"], [f"{EMPTY}a2<|im_end|>"]]),
    # Within one exchange Qwen 3 keeps its reasoning, so the call and the answer are one sequence.
    "qwen 3, tools and reasoning": ("qwen-3", "auto", WEATHER_THOUGHTS, TOOLS, [
        [f"{think('r1')}{QWEN_ROME}<|im_end|>", f"{think('r2')}a1<|im_end|>"], [f"{think('r3')}a2<|im_end|>"]]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_spans(case):
    name, thinking, messages, tools, expected = GOLDEN[case]
    chat = chat_of(name, thinking)
    sequences = chat.encode(messages, tools)
    assert learned(chat, sequences) == expected
    answers = iter(n for n, turn in enumerate(messages) if turn["role"] == "assistant")
    for sequence in sequences:
        for start, _ in sequence.spans:
            # What the model is shown when it is asked is what it was shown when it learned the answer.
            assert sequence.ids[:start].tolist() == chat.prompt_ids(messages[:next(answers)], tools)
        assert sequence.ids.dtype == sequence.spans.dtype == np.int32
        assert len(sequence.ids) == sequence.spans[-1, 1], "nothing follows what is learned"


# name → (our template, TRL's training variant of it, its own way of opening an answer inside the learned stretch)
REFERENCES = {
    "gemma-1": ("gemma_training", ""), "gemma-2": ("gemma_training", ""), "gemma-3": ("gemma3_training", ""), "llama-3": ("llama3_training", ""),
    "qwen-2.5": ("qwen2_5_training", "\n"), "qwen-3": ("qwen3_training", ""), "gemma-4": ("diffusion_gemma_training", ""),
}
COMPARED = {
    "plain": (TALK, None), "one turn": (TALK[:2], None), "reasoning": (THOUGHTS, None),
    "reasoning, one turn": (THOUGHTS[:2], None), "tools": (WEATHER, TOOLS), "two calls": (TWO_CALLS, TOOLS),
    "tools and reasoning": (WEATHER_THOUGHTS, TOOLS),
}
KNOW_NO_TOOLS = {"gemma-1", "gemma-2", "gemma-3", "llama-3"}
KNOW_NO_REASONING = {*KNOW_NO_TOOLS, "qwen-2.5"}


def reference(chat: ChatFormat, training: str, messages, tools) -> tuple[list[int], list[int]]:
    out = chat.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=trl_template(training), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("name", REFERENCES)
def test_what_is_learned_is_what_trl_learns(name, case):
    """Equal but for this: TRL also trains the line end behind a turn, which nobody sees the model write, and with
    Qwen 2.5 the one that the prompt ends with. With Gemma 4 (DiffusionGemma's template, which writes the same but for
    a new turn behind a tool's result) it does not train the token at which a call ends, and loses the reasoning of
    earlier turns."""
    training, opening = REFERENCES[name]
    chat, (messages, tools) = chat_of(name), COMPARED[case]
    if (name in KNOW_NO_REASONING and "reasoning" in case) or (name in KNOW_NO_TOOLS and tools):
        with pytest.raises(FormatError, match="leaves"):
            chat.encode(messages, tools)
        return
    sequences = chat.encode(messages, tools)
    ids, mask = reference(chat, training, messages, tools)
    masked = "".join(chat.tokenizer.decode([i]) if on else "\0" for i, on in zip(ids, mask))
    theirs = [text.removeprefix(opening).removesuffix("\n") for text in masked.split("\0") if text.strip()]
    ours = [text.removesuffix("<|tool_response>") for sequence in sequences for text in spans(chat, sequence)]
    if name == "gemma-4" and case in ("reasoning", "tools and reasoning"):
        earlier, last = ours[:-1], ours[-1:]
        assert theirs == [text.rpartition("<channel|>")[2] for text in earlier] + last
        assert all("<channel|>" in text for text in earlier)
    else:
        assert ours == theirs
    if len(sequences) == 1 and not (name == "gemma-4" and tools):
        # Otherwise TRL's ids hold all turns as the last one is written, which no prompt shows.
        [sequence] = sequences
        assert sequence.ids.tolist() == ids[:len(sequence.ids)]
        assert sequence.trained > 1
        here = np.array([label != IGNORE_INDEX for label in sequence.labels] + [False] * (len(ids) - len(sequence.ids)))
        there = np.array(mask, bool)
        assert not (here & ~there).any()
        assert not chat.tokenizer.decode([ids[n] for n in np.flatnonzero(there & ~here)]).strip()


# Rendering and tokenising --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("messages", "tools"), [
    (TALK, None), (THOUGHTS, None), (WEATHER, TOOLS), (WEATHER_THOUGHTS, TOOLS), (TWO_CALLS, TOOLS),
    ([system("S"), *TALK], None), ([user("<b>&amp;</b> {{ x }} {% y %}"), assistant("é😀\u2028")], None),
], ids=["talk", "thoughts", "weather", "weather, thoughts", "two calls", "system", "odd"])
def test_renders_are_those_of_apply_chat_template(name, messages, tools):
    chat = chat_of(name)
    if chat.folds_system and messages[0]["role"] == "system":
        messages = [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]
    for part, prompt in ((messages, False), (messages[:-1], True), (messages[:1], True), (messages[:3], False)):
        try:
            expected = chat.tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # noqa: BLE001 - whatever a template raises
            with pytest.raises(FormatError, match="refuses it"):
                chat.render(part, prompt=prompt, tools=tools)
            continue
        assert chat.render(part, prompt=prompt, tools=tools) == expected
        if prompt:
            assert chat.prompt_ids(part, tools) == chat.tokenizer(expected, add_special_tokens=False).input_ids


# Prompts that end in more than one line end, and without a special token near their end.
BRACKETS = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
            "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}")
AIRY = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}")
SPACED = AIRY.replace("\\n\\n", "\n\n").replace("\n\n", ":  ")
SHAPES = {
    "gemma": lambda: gemma_tokenizer(TURNS, None), "gemma, airy": lambda: gemma_tokenizer(CHATML, AIRY),
    "gemma, brackets": lambda: gemma_tokenizer(TURNS, BRACKETS), "gemma, spaced": lambda: gemma_tokenizer(CHATML, SPACED),
    "smollm2": lambda: byte_tokenizer(CHATML, SMOLLM2, GPT2_WORDS),
    "gpt-2, airy": lambda: byte_tokenizer(CHATML, AIRY, GPT2_WORDS),
    "gpt-2, spaced": lambda: byte_tokenizer(CHATML, SPACED, GPT2_WORDS),
    "llama, airy": lambda: byte_tokenizer(CHATML, AIRY), "llama, brackets": lambda: byte_tokenizer(CHATML, BRACKETS),
    "qwen 3": lambda: byte_tokenizer(CHATML, trl_template("qwen3"), others=QWEN_WORDS),
}
words = st.lists(st.sampled_from(
    ["\n", "\n\n", " ", "  ", "a", "fox", "shells", "é", "😀", "龘", "'s", "12", ".", "model", ":", "\t"]), min_size=1, max_size=6)
content = words.map("".join).filter(str.strip)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_a_whole_text_are_those_made_border_by_border(shape):
    chat = ChatFormat(SHAPES[shape](), "gemma3_text" if shape == "gemma" else "other")
    quick = 0

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(content, content), min_size=1, max_size=3))
    def check(exchanges):
        nonlocal quick
        messages = [turn for question, answer in exchanges for turn in (user(question), assistant(answer))]
        drafts = chat.drafts(messages)
        for draft, encoded in zip(drafts, chat.encode(messages), strict=True):
            ids, ranges = chat._labeller.piecewise(draft)
            assert encoded.ids.tolist() == ids
            assert [tuple(span) for span in encoded.spans.tolist()] == ranges
            start = draft.learned[0][0]
            assert ids[:ranges[0][0]] == chat.tokenizer(draft.text[:start], add_special_tokens=False).input_ids
            assert chat.tokenizer.decode(ids) == draft.text
            quick += chat._labeller._spans(draft, ids, encoded.ids) is not None

    check()
    assert quick > 20, "the quick way must be the usual one"


def test_a_border_that_only_the_pre_tokenizer_moves_is_seen():
    """GPT-2's words: between two line ends and a letter the whole text has a token's border, yet the prompt by itself
    has other tokens, as there the two line ends are one."""
    chat = ChatFormat(byte_tokenizer(CHATML, AIRY, GPT2_WORDS), "other")
    messages = [user("q"), assistant("shells")]
    whole = chat.tokenizer(chat.render(messages), add_special_tokens=False)
    prompt = chat.prompt_ids(messages[:1])
    border = len(chat.render(messages[:1], prompt=True))
    assert whole.token_to_chars(whole.char_to_token(border)).start == border
    assert whole.input_ids[:len(prompt)] != prompt
    [encoded] = chat.encode(messages)
    assert encoded.ids[:encoded.spans[0, 0]].tolist() == prompt
    assert spans(chat, encoded) == ["shells<|im_end|>"]


def test_an_end_that_is_no_token_of_its_own_is_refused():
    labeller = Labeller(byte_tokenizer(CHATML, None))
    text = "<|im_start|>q<|im_end|>ab"
    [problem] = labeller.encode([Draft(text, ((len("<|im_start|>q<|im_end|>"), len(text), "<|im_end|>"),))])
    assert isinstance(problem, FormatError)
    assert "without its end (<|im_end|>)" in str(problem)


def test_a_text_that_looks_like_a_mark_of_the_template_does_not_shift_the_labels():
    """A special token that is longer than the terminator and begins as it does: the text has two, the ids one."""
    chat = ChatFormat(byte_tokenizer((*CHATML, "<|im_end|>s"), SMOLLM2), "other")
    for messages in ([user("a<|im_end|>s"), assistant("b")], [user("a"), assistant("b"), user("c<|im_end|>s"), assistant("d")]):
        [encoded] = chat.encode(messages)
        assert spans(chat, encoded) == [f"{turn['content']}<|im_end|>" for turn in messages if turn["role"] == "assistant"]


def test_padding_and_truncation_of_the_tokenizer_do_not_matter():
    """tokenizer.json may ask for both, and earlier calls leave them switched on."""
    plain, other = chat_of("gemma-3"), chat_of("gemma-3")
    other.tokenizer(["a", "b c"], padding="max_length", max_length=40, truncation=True)
    other.tokenizer.backend_tokenizer.enable_truncation(5)
    assert other.encode(TALK)[0].ids.tolist() == plain.encode(TALK)[0].ids.tolist()
    other.tokenizer.backend_tokenizer.enable_truncation(5)
    assert other.prompt_ids(TALK[:3]) == plain.prompt_ids(TALK[:3])


def test_many_at_once_are_the_same_as_one_by_one():
    chat = chat_of("qwen-3")
    items = [(TALK, None), ([], None), ([assistant("a")], None), (WEATHER, TOOLS), ([user("a")], None),
             (THOUGHTS, None), ([user("a"), assistant("b", train=False)], None)]
    results = chat.encode_many(items)
    assert [len(r) if isinstance(r, list) else str(r) for r in results] == [
        2, 0, "the chat template refuses it: nothing stands before the assistant's turn", 3, 0, 2, 0]
    for item, sequences in zip(items, results):
        if isinstance(sequences, list):
            alone = chat.encode(*item)
            assert [(e.ids.tolist(), e.spans.tolist()) for e in sequences] == [
                (e.ids.tolist(), e.spans.tolist()) for e in alone]
    last = chat.encode_many(items, train_on="last")
    assert learned(chat, last[0]) == [[f"{EMPTY}a2<|im_end|>"]]


@pytest.mark.parametrize("name", ["gemma-2", "gemma-4"])
def test_a_copy_in_another_process_gives_the_same(name):
    chat = chat_of(name)
    messages = [system("S"), *TALK]
    expected = [e.ids.tolist() for e in chat.encode(messages)]
    copied = pickle.loads(pickle.dumps(chat))
    assert [e.ids.tolist() for e in copied.encode(messages)] == expected
    assert (copied.terminator, copied.stop_ids, copied.template) == (chat.terminator, chat.stop_ids, chat.template)


def test_labels_are_the_ids_in_the_spans():
    chat = chat_of("gemma-3")
    [encoded] = chat.encode(TALK)
    inside = {n for start, end in encoded.spans.tolist() for n in range(start, end)}
    assert encoded.labels == [i if n in inside else IGNORE_INDEX for n, i in enumerate(encoded.ids.tolist())]
    assert encoded.trained == len(inside)


# Per-turn control ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("skipped", "train_on", "expected"), [
    ((), "all", ["a1", "a2", "a3"]), ((1,), "all", ["a2", "a3"]), ((5,), "all", ["a1", "a2"]),
    ((1, 3), "all", ["a3"]), ((), "last", ["a3"]), ((1,), "last", ["a3"]), ((5,), "last", []), ((1, 3, 5), "all", []),
])
@pytest.mark.parametrize("name", ["gemma-2", "gemma-3", "gemma-4 large", "qwen-3"])
def test_only_the_turns_that_are_asked_for_are_learned(name, skipped, train_on, expected):
    chat = chat_of(name)
    messages = [system("S"), *TALK, user("q3"), assistant("a3")]
    messages = [{**turn, "train": False} if n - 1 in skipped else turn for n, turn in enumerate(messages)]
    before = copy.deepcopy(messages)
    sequences = chat.encode(messages, train_on=train_on)
    texts = [text.removeprefix(EMPTY).removesuffix(chat.terminator) for s in sequences for text in spans(chat, s)]
    assert texts == expected
    assert messages == before
    if expected:  # the others are there to be read, as far as a later turn is learned
        last = chat.tokenizer.decode(sequences[-1].ids)
        assert all(f"a{n}" in last for n in range(1, int(expected[-1][1]) + 1))


def test_a_turn_with_train_true_is_learned():
    chat = chat_of("gemma-3")
    assert learned(chat, chat.encode([user("q"), assistant("a", train=True)])) == [["a<end_of_turn>"]]


# What templates leave out --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gemma-2", "gemma-3", "our gemma", "our gemma-4", "llama-3", "smollm2"])
def test_tools_are_refused_where_the_template_ignores_them(name):
    chat = chat_of(name)
    for messages, tools, words in ((TALK, TOOLS, "no place for tools and leaves"), (WEATHER[1:3], None, "tool calls"),
                                   (WEATHER, TOOLS, "tools and tool calls")):
        with pytest.raises(FormatError, match=words):
            chat.encode(messages, tools)
    # A system prompt that happens to name the function does not make it better.
    with pytest.raises(FormatError, match="no place for tools"):
        chat.encode([user("use weather"), assistant("weather")], TOOLS)
    assert chat.encode(TALK, [])[0].trained, "no tools are no tools"


def test_templates_get_what_they_expect_and_nothing_else():
    llama = chat_of("llama-3.1")  # which writes an introduction to an empty list of tools, and refuses no calls at all
    assert llama.render(TALK, tools=[]) == llama.render(TALK)
    assert llama.render([user("q"), assistant("a", tool_calls=[], tool_call_id=None)]) == llama.render(
        [user("q"), assistant("a")])
    lfm = ("{{ messages[0] }}{% for m in messages %}<|im_start|>{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
           "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    chat = ChatFormat(byte_tokenizer(CHATML, lfm), "lfm2")  # LFM 2.5 reads `thinking`
    [encoded] = chat.encode([{**user("q"), "train": False, "name": None}, assistant("a", reasoning_content="r")])
    assert spans(chat, encoded) == ["<think>r</think>a<|im_end|>"]
    assert chat.tokenizer.decode(encoded.ids).startswith("{'role': 'user', 'content': 'q'}<|im_start|>")


def test_results_of_tools_are_refused_where_the_template_ignores_them():
    silent = trl_template("qwen2_5").replace('{%- elif message.role == "tool" %}', '{%- elif message.role == "none" %}')
    chat = ChatFormat(byte_tokenizer(CHATML, silent, others=QWEN_WORDS), "qwen2")
    with pytest.raises(FormatError, match="no place for tool results and leaves them out"):
        chat.encode(WEATHER, TOOLS)


@pytest.mark.parametrize(("name", "messages"), [
    ("gemma-3", THOUGHTS[:2]), ("llama-3.1", THOUGHTS), ("gemma-4 old", THOUGHTS[:2]), ("smollm2", THOUGHTS)])
def test_reasoning_that_would_vanish_is_refused(name, messages):
    chat = chat_of(name)
    with pytest.raises(FormatError, match="leaves out the reasoning"):
        chat.encode(messages)
    unlearned = [{**turn, "train": False} if "reasoning_content" in turn else turn for turn in messages]
    assert chat.encode(unlearned) == [], "what is not learned may be served without it"


def test_a_question_that_only_later_prompts_leave_out_is_refused():
    forgetful = ("{% for m in messages %}<|im_start|>{{ m.content if loop.index0 > 1 or messages|length < 3 else '-' }}"
                 "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    chat = ChatFormat(byte_tokenizer(CHATML, forgetful), "other")
    assert chat.encode(TALK[:2])
    with pytest.raises(FormatError, match="a part of a user's turn"):
        chat.encode(TALK)


def test_text_beside_a_call_that_would_vanish_is_refused():
    with pytest.raises(FormatError, match="text beside a tool call"):
        chat_of("llama-3.1").encode([user("q"), call("weather", "let me see", city="Rome")], TOOLS)
    chat = chat_of("qwen-2.5")
    assert learned(chat, chat.encode([user("q"), call("weather", "let me see", city="Rome")], TOOLS)) == [
        [f"let me see\n{QWEN_ROME}<|im_end|>"]]


def test_questions_and_results_that_would_vanish_are_refused():
    def chat(old: str, new: str) -> ChatFormat:
        template = trl_template("qwen2_5")
        assert old in template
        return ChatFormat(byte_tokenizer(CHATML, template.replace(old, new), others=QWEN_WORDS), "qwen2")

    short = "message.content[:12]"
    with pytest.raises(FormatError, match="a part of a user's turn"):
        chat("message.role + '\\n' + message.content +", f"message.role + '\\n' + {short} +").encode(
            [user("a question that is too long"), assistant("a")])
    with pytest.raises(FormatError, match="a part of a tool's result"):
        chat("        {{- message.content }}", "        {{- " + short + " }}").encode(
            [*WEATHER[1:3], result("a result that is too long"), assistant("a")], TOOLS)
    with pytest.raises(FormatError, match="a part of the system message"):
        chat("messages[0]['content'] + '<|im_end|>", "messages[0]['content'][:12] + '<|im_end|>").encode(
            [system("a system prompt that is long"), *TALK])
    with pytest.raises(FormatError, match="the tool other"):
        chat("tools %}\n        {{- \"\\n\"", "tools[:1] %}\n        {{- \"\\n\"").encode(
            TALK, [*TOOLS, {"type": "function", "function": {"name": "other", "parameters": {}}}])
    with pytest.raises(FormatError, match="an argument of a tool call: 'Rome'"):
        chat("tool_call.arguments | tojson", "{'city': 'gemma value'} | tojson").encode(WEATHER, TOOLS)
    with pytest.raises(FormatError, match="a call of weather"):
        chat("in message.tool_calls %}", "in message.tool_calls[:1] %}").encode(TWO_CALLS, TOOLS)


def test_texts_that_a_template_writes_as_json_are_there():
    """Llama 3.1 writes results as JSON strings, Qwen arguments: quotes and line ends look different, and are there."""
    odd = 'a "quoted"\n\tline é'
    for name in ("llama-3.1", "qwen-2.5", "qwen-3", "gemma-4"):
        chat = chat_of(name)
        messages = [user("q"), call("weather", city=odd, days=3, exact=True, more={"at": [odd, 1.5]}), result(odd),
                    assistant("a")]
        assert sum(len(s.spans) for s in chat.encode(messages, TOOLS)) == 2
    assert json.dumps(odd, ensure_ascii=False) in chat_of("llama-3.1").render(messages, tools=TOOLS)


def test_text_beside_a_call_with_a_result_cannot_be_served_by_gemma_4():
    """Its template puts the text behind the result and closes the turn, so the prompt for the answer opens none."""
    with pytest.raises(FormatError, match="not prefix-consistent: it writes '<turn\\|>"):
        chat_of("gemma-4").encode([user("q"), call("weather", "see", city="Rome"), result("sun"), assistant("a")], TOOLS)


# Ends ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "ends"), [
    ("gemma-3", {"<end_of_turn>", "<eos>"}), ("gemma-4", {"<turn|>", "<|tool_response>", "<eos>"}),
    ("our gemma-4", {"<turn|>", "<eos>"}), ("qwen-3", {"<|im_end|>", "<eos>"}), ("llama-3.1", {"<|eot_id|>", "<eos>"}),
])
def test_an_answer_stops_where_a_call_ends(name, ends):
    chat = chat_of(name)
    assert set(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids)) == ends


def test_a_call_without_an_end_of_its_own_ends_no_answer():
    """Text behind the last special token: stopping there would cut the call."""
    template = ("{% for m in messages %}<|im_start|>{% if m.tool_calls %}<|call|>{{ m.tool_calls[0].function.name }}"
                "{{ m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    chat = ChatFormat(byte_tokenizer((*CHATML, "<|call|>"), template), "other")
    assert set(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids)) == {"<|im_end|>", "<eos>"}
    with pytest.raises(FormatError, match="without its end"):
        chat.encode([user("q"), call("weather", city="Rome")])


def gpt_oss() -> ChatFormat:
    return ChatFormat(gpt_oss_tokenizer(), "gpt_oss")


@pytest.mark.parametrize("beside", [{"reasoning": "r1"}, {"text": "r1"}])
def test_what_gpt_oss_thought_before_a_call_stands_in_the_prompt_for_the_answer(beside):
    """Its template leaves that out once the answer is there: the answer is learned after the prompt that is served."""
    chat = gpt_oss()
    messages = [user("q1"), call("weather", **beside, city="Rome"), result("sunny, 20"),
                call("weather", **beside, city="Oslo"), result("snow"), assistant("a1", reasoning_content="r2")]
    sequences = chat.encode(messages, TOOLS)
    [[first, second, third]] = learned(chat, sequences)
    thought = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    assert first == f"{thought.format('r1')} to=functions.weather<|channel|>commentary json<|message|>" + '{"city": "Rome"}<|call|>'
    assert second == f"{thought.format('r1')} to=functions.weather<|channel|>commentary json<|message|>" + '{"city": "Oslo"}<|call|>'
    assert third == f"{thought.format('r2')}<|channel|>final<|message|>a1<|return|>"
    [sequence] = sequences
    prompt = chat.tokenizer.decode(sequence.ids[:sequence.spans[-1][0]])
    assert prompt == chat.render(messages[:-1], prompt=True, tools=TOOLS), "as it is served"


@pytest.mark.parametrize("chat", [gpt_oss, lambda: chat_of("gemma-4", "on")], ids=["gpt-oss", "gemma-4"])
def test_reasoning_in_an_answers_text_is_written_between_the_templates_own_marks(chat):
    """As R1's and Qwen's data have it: elsewhere a model would learn to say `<think>` to people."""
    chat = chat()
    beside = learned(chat, chat.encode([user("q"), assistant("a", reasoning_content="r 1")]))
    assert "r 1" in beside[0][0]
    for text in ("<think>\nr 1\n</think>\n\na", "<think>r 1</think>a", "<think>\r\nr 1\r\n</think>\r\n\r\na"):
        assert learned(chat, chat.encode([user("q"), assistant(text)])) == beside
    with pytest.raises(FormatError, match="holds reasoning and nothing else"):
        chat.encode([user("q"), assistant("<think>r 1</think>\n")])
    [[said]] = learned(chat, chat.encode([user("q"), assistant("write <think> and </think> around it")]))
    assert "write <think> and </think> around it" in said


def test_gpt_oss_ends_answers_and_calls_otherwise_than_it_repeats_them():
    chat = gpt_oss()
    assert set(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids)) == {"<|return|>", "<|call|>", "<eos>"}
    first, second = learned(chat, chat.encode(WEATHER, TOOLS))
    assert first == [' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
                     "<|channel|>final<|message|>a1<|return|>"]
    assert second == ["<|channel|>final<|message|>a2<|return|>"]


# Thinking ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gemma-4", "gemma-4 old", "gemma-4 large", "qwen-3"])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_thinking_is_written_into_the_template(name, thinking):
    plain, chat = chat_of(name), chat_of(name, thinking)
    assert chat.tokenizer.chat_template == chat.template != plain.template, "it is saved with the model"
    for part, prompt in ((TALK, False), (TALK[:3], True), (TALK[:1], True)):
        expected = plain.tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt,
                                                       enable_thinking=thinking == "on")
        assert chat.render(part, prompt=prompt) == expected
        # A program that chooses by itself is still heard.
        assert chat.tokenizer.apply_chat_template(
            part, tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking == "off",
        ) == plain.tokenizer.apply_chat_template(
            part, tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking == "off")


def test_a_saved_choice_is_kept_or_replaced_but_never_doubled():
    tokenizer, family = TEMPLATES["qwen-3"]()
    off = ChatFormat(tokenizer, family, thinking="off").template
    assert ChatFormat(tokenizer, family).template == off
    assert ChatFormat(tokenizer, family, thinking="off").template == off
    on = ChatFormat(tokenizer, family, thinking="on").template
    assert on == off.replace("enable_thinking = false", "enable_thinking = true")


def test_thinking_needs_a_switch_to_be_on():
    tokenizer, family = TEMPLATES["gemma-3"]()
    with pytest.raises(UserError, match="no switch for thinking") as e:
        ChatFormat(tokenizer, family, thinking="on")
    assert "--thinking" in e.value.hint
    assert ChatFormat(tokenizer, family, thinking="off").template == trl_template("gemma3")


def test_reasoning_is_refused_where_thinking_is_off():
    for name in ("qwen-3", "gemma-4", "gemma-4 large"):
        with pytest.raises(FormatError, match="thinking is off"):
            chat_of(name, "off").encode(THOUGHTS)
    with pytest.raises(FormatError, match="thinking is off"):
        chat_of("qwen-3", "off").encode([user("q"), assistant("<think>\nr\n</think>\n\na")])
    with pytest.raises(FormatError, match="thinking is off"):  # by the model's own default
        chat_of("gemma-4 large").encode(THOUGHTS)


def test_a_prompt_that_opens_a_thought_takes_answers_that_close_it():
    opening = trl_template("qwen3").replace("{{- '<|im_start|>assistant\\n' }}\n    {%- if",
                                            "{{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if")
    assert opening != trl_template("qwen3")
    chat = ChatFormat(byte_tokenizer(CHATML, opening, others=QWEN_WORDS), "qwen3")
    assert learned(chat, chat.encode(THOUGHTS[:2])) == [["r1\n</think>\n\na1<|im_end|>"]]
    inline = [user("q"), assistant("<think>\nr\n</think>\n\na")]
    assert learned(chat, chat.encode(inline)) == [["r\n</think>\n\na<|im_end|>"]]


def test_behind_a_result_gemma_4_opens_a_thought_when_thinking_is_on():
    with pytest.raises(FormatError, match="the prompt opens a thought, and this answer begins without"):
        chat_of("gemma-4", "on").encode(WEATHER, TOOLS)


DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
R1 = trl_template("deepseek_r1_distill")
LATER_R1 = R1.replace("<｜Assistant｜><think>\\n'}}", "<｜Assistant｜>'}}")  # whose model begins the thought itself
QWQ = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
       "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")


@pytest.mark.parametrize(("template", "end", "begun", "unthought"), [
    (R1, DEEPSEEK[2], "", "\n</think>\n\n"), (QWQ, "<|im_end|>", "", "\n</think>\n\n"),
    (LATER_R1, DEEPSEEK[2], "<think>\n", ""),
    (QWQ.replace("<think>\n'", "<think>'"), "<|im_end|>", "", "</think>")])
def test_thoughts_that_the_template_takes_out_of_answers_are_learned(template, end, begun, unthought):
    """The prompt is the served one, and earlier answers stand in it without their thoughts."""
    assert LATER_R1 != R1
    chat = ChatFormat(byte_tokenizer((*DEEPSEEK, *CHATML), template, others=QWEN_WORDS), "qwen2")
    between = unthought or "\n</think>\n\n"
    for turn in (assistant("a", reasoning_content="r"), assistant("a", reasoning_content="\nr\n"),
                 assistant("<think>\nr\n</think>\n\na"), *([] if begun else [assistant("r\n</think>\n\na")])):
        sequences = chat.encode([user("q"), turn, user("q2"), assistant("a2")])
        answers = [f"{begun}r{between}a{end}", f"{unthought}a2{end}"]
        assert learned(chat, sequences) == [[answer] for answer in answers]
        talks = [[user("q")], [user("q"), assistant("a"), user("q2")]]
        assert [chat.tokenizer.decode(s.ids) for s in sequences] == [
            chat.tokenizer.decode(chat.prompt_ids(talk)) + answer for talk, answer in zip(talks, answers)]
        assert chat.has_unthought([user("q"), turn, user("q2"), assistant("a2")]) == bool(unthought)
        assert not chat.has_unthought([user("q"), turn])
    assert learned(chat, chat.encode([user("q"), assistant("a")])) == [[f"{unthought}a{end}"]]


@pytest.mark.parametrize(("template", "end", "begun"), [
    (R1, DEEPSEEK[2], "<think>\n"), (QWQ, "<|im_end|>", "<think>\n"), (LATER_R1, DEEPSEEK[2], ""),
    (QWQ.replace("<think>\n'", "<think>'"), "<|im_end|>", "<think>")])
def test_models_that_always_think_have_no_switch_and_prompts_that_say_it_all_the_same(template, end, begun):
    """On, each prompt begins a thought; off, each ends with an empty one, behind which answers are learned."""
    def chat_with(thinking: str, template: str = template) -> ChatFormat:
        return ChatFormat(byte_tokenizer((*DEEPSEEK, *CHATML), template, others=QWEN_WORDS), "qwen2", thinking=thinking)

    auto, on, off = (chat_with(thinking) for thinking in ("auto", "on", "off"))
    prompts = [chat.render([user("q"), assistant("a"), user("q2")], prompt=True) for chat in (auto, on, off)]
    bare = prompts[0].removesuffix(begun)
    assert prompts[1] == bare + (begun or "<think>\n") and (on.template == template) == bool(begun)
    assert prompts[2] == bare + ("<think></think>" if begun == "<think>" else "<think>\n\n</think>\n\n")
    assert learned(off, off.encode([user("q"), assistant("a"), user("q2"), assistant("a2")])) == [[f"a{end}"], [f"a2{end}"]]
    assert not off.has_unthought([user("q"), assistant("a")]) and on.has_unthought([user("q"), assistant("a")])
    reasoned = [assistant("a", reasoning_content="r"), assistant("<think>\nr\n</think>\n\na"), assistant("r</think>a")]
    for turn in reasoned:
        [[answer]] = learned(on, on.encode([user("q"), turn]))
        assert answer.startswith("r") and answer.endswith(f"a{end}")
        for chat in (off, chat_with("auto", off.template)):
            with pytest.raises(FormatError, match="asks for an answer without reasoning .thinking is off.") as e:
                chat.encode([user("q"), turn])
            assert "--thinking on" in e.value.fix
    assert chat_with("off", off.template).template == off.template == chat_with("off", on.template).template
    assert chat_with("on", off.template).template == on.template
    assert (choice_in(off.template), choice_in(on.template)) == (False, None if begun else True)


def test_thinking_off_is_not_said_to_be_asked_for_where_nothing_asks():
    turns = [user("q"), assistant("a", reasoning_content="It rhymes.")]
    with pytest.raises(FormatError, match="the chat template leaves out the reasoning of the answer") as e:
        chat_of("gemma-3", "off").encode(turns)
    assert e.value.about_reasoning
    chat = ChatFormat(byte_tokenizer(CHATML, trl_template("lfm2_2_5"), others=QWEN_WORDS), "lfm2", thinking="off")
    with pytest.raises(FormatError, match=r"answers without reasoning are to be learned \(thinking is off\), and this one has some"):
        chat.encode(turns)


def test_an_answer_that_talks_about_marks_of_thoughts_is_not_taken_apart():
    chat = ChatFormat(byte_tokenizer(DEEPSEEK, LATER_R1, others=QWEN_WORDS), "qwen2")
    for text in ("Close it with </think> and go on.", "x <think>deep</think> y", "<think>r</think>Then </think> again."):
        with pytest.raises(FormatError, match="leaves out a part of the answer"):
            chat.encode([user("q"), assistant(text)])
    last = ChatFormat(byte_tokenizer(DEEPSEEK, R1, others=QWEN_WORDS), "qwen2")
    talk = [user("q"), assistant("a"), user("q2"), assistant("a2", reasoning_content="r")]
    assert last.has_unthought(talk) and not last.has_unthought(talk, "last"), "of which the first answer is not learned"


def test_a_template_that_writes_thoughts_somewhere_does_so_itself():
    for name in TEMPLATES:
        chat = chat_of(name)
        assert not chat.has_unthought([user("q"), assistant("a")])


@pytest.mark.parametrize("name", ["qwen-3", "gemma-4", "gemma-4 large"])
def test_no_turn_is_lost_and_none_is_learned_twice(name):
    chat = chat_of(name)
    text = st.sampled_from(["a1", "shells\n\nsea", "fox 😀", "z"])
    turn = st.tuples(text, text, st.sampled_from([None, "because\nof it"]), st.booleans())

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(turn, min_size=1, max_size=4))
    def check(turns):
        messages, expected = [], []
        for question, answer, reasoning, train in turns:
            if name == "gemma-4 large":
                reasoning = None
            more = {} if reasoning is None else {"reasoning_content": reasoning}
            messages += [user(question), assistant(answer, **more, **({} if train else {"train": False}))]
            if train:
                expected.append((reasoning or "", answer))
        sequences = chat.encode(messages)
        found = [text for sequence in sequences for text in spans(chat, sequence)]
        assert len(found) == len(expected)
        for text, (reasoning, answer) in zip(found, expected):
            assert reasoning in text
            assert text.endswith(answer + chat.terminator)
            assert text.count(chat.terminator) == 1
        for sequence in sequences:
            assert (np.diff(sequence.spans.ravel()) > 0).all(), "ascending and apart"

    check()


# Plain text ----------------------------------------------------------------------------------------------------------

def test_a_plain_text_stands_between_bos_and_eos():
    chat = chat_of("gemma-3")
    encoded = chat.encode_text("seven wizards\n")
    assert chat.tokenizer.decode(encoded.ids) == "<bos>seven wizards\n<eos>"
    assert encoded.ids[0] == chat.tokenizer.bos_token_id and encoded.ids[-1] == chat.tokenizer.eos_token_id
    assert encoded.spans.tolist() == [[1, len(encoded.ids)]]
    bare = chat_of("qwen-3")  # Qwen's tokenizer adds nothing by itself
    encoded, other = bare.encode_texts(["seven wizards", "龘"])
    assert bare.tokenizer.decode(encoded.ids) == "seven wizards<eos>"
    assert encoded.spans.tolist() == [[1, len(encoded.ids)]], "nothing could predict the first token"
    assert other.trained == len(other.ids) - 1


# From a checkpoint ---------------------------------------------------------------------------------------------------

def test_load_format_takes_the_choice_of_thinking(tiny, tmp_path):
    with pytest.raises(UserError, match="no switch for thinking"):
        load_format(tiny, "gemma3_text", thinking="on")
    tokenizer, family = TEMPLATES["gemma-4"]()
    tokenizer.save_pretrained(tmp_path)
    on = load_format(tmp_path, family, thinking="on")
    on.tokenizer.save_pretrained(tmp_path / "adapter")
    assert "<|think|>" in load_format(tmp_path / "adapter", family).render(TALK)
    assert "<|think|>" not in load_format(tmp_path, family).render(TALK)


def test_a_tokenizer_of_the_slow_kind_is_refused():
    class Slow:
        chat_template = "x"

    with pytest.raises(UserError, match="Slow.* has no tokenizer.json"):
        ChatFormat(Slow(), "gemma3_text")
