"""Token ids and labels against an independent reference: TRL's training templates, and spans checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.labels import IGNORE_INDEX, Encoded
from gemma_tune.encoding.templates import family_template
from support.models import TURNS
from support.templates import (
    CHATML,
    GEMMA_4,
    GLM,
    GLM4,
    LLAMA,
    SMOLLM2,
    TOOLS,
    assistant,
    byte_tokenizer,
    call,
    gemma_tokenizer,
    learned,
    result,
    spans,
    system,
    trl_template,
    user,
)

CONVERSATIONS = {
    "one turn": [user("Say fox."), assistant("fox")],
    "several turns": [user("a"), assistant("seven wizards"), user("b"), assistant("the lazy dog"), user("c"),
                      assistant("z")],
    "padded": [user("  \n left and right \n\n"), assistant("\n\n  two  spaces  \n"), user(" b "), assistant(" c\n")],
    "emoji": [user("😀?"), assistant("😀😀 Grüße 😀")],
    "Chinese": [user("今天天气好吗?"), assistant("今天天气很好,我们去公园散步。"), user("好"), assistant("龘")],
    "paragraphs": [user("x\n\ny"), assistant("shells\n\nsea\n\n\nshore")],
    "answer again": [user("fox"), assistant("fox"), user("fox"), assistant("fox")],
}
WITH_SYSTEM = {f"system, {name}": [system("Be brief.\nBe kind."), *turns] for name, turns in CONVERSATIONS.items()}


def conversations(system: bool = True) -> Any:
    chosen = {**CONVERSATIONS, **(WITH_SYSTEM if system else {})}
    return pytest.mark.parametrize("messages", chosen.values(), ids=chosen.keys())


def encoded_as_one(chat: ChatFormat, messages) -> Encoded:
    """These templates write earlier turns as they wrote them first: a conversation is one sequence."""
    [encoded] = chat.encode(messages)
    return encoded


# name -> special tokens, the template, its variant with {% generation %} (None: there is none), family, terminator
FORMATS = {
    "gemma-2": (TURNS, trl_template("gemma"), trl_template("gemma_training"), "gemma2", "<end_of_turn>"),
    "gemma-3": (TURNS, trl_template("gemma3"), trl_template("gemma3_training"), "gemma3_text", "<end_of_turn>"),
    "our gemma": (TURNS, None, trl_template("gemma3_training"), "gemma3_text", "<end_of_turn>"),
    "gemma-4": (GEMMA_4, trl_template("gemma4_v5"), None, "gemma4", "<turn|>"),
    "our gemma-4": (GEMMA_4, None, None, "gemma4", "<turn|>"),
    "llama-3": (LLAMA, trl_template("llama3"), trl_template("llama3_training"), "llama", "<|eot_id|>"),
    "chatml": (CHATML, SMOLLM2, None, "llama", "<|im_end|>"),
}


@pytest.fixture
def chat(request) -> ChatFormat:
    """The format that the test names."""
    special, template, _, family, _ = FORMATS[request.param]
    return ChatFormat(gemma_tokenizer(special, template), family)


each_format = pytest.mark.parametrize("chat", FORMATS, indirect=True)
each_reference = pytest.mark.parametrize(
    ("chat", "name"), [(n, n) for n, (_, _, training, _, _) in FORMATS.items() if training], indirect=["chat"])


def folded(messages):
    """By hand, what templates without a system role are given."""
    if messages[0]["role"] != "system":
        return messages
    return [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]


def crosses_a_border(chat: ChatFormat, messages) -> bool:
    """Whether a token of the whole text reaches from a prompt into its answer: only ChatML's template does not trim."""
    return chat.template == SMOLLM2 and any(
        turn["role"] == "assistant" and turn["content"].startswith("\n") for turn in messages)


@each_reference
@conversations()
def test_trained_tokens_are_those_of_trls_training_template(chat, name, messages):
    """Equal but for one choice: TRL also trains the newline behind <end_of_turn>. Nobody ever sees the model write
    it, as generation stops before; we leave it out."""
    reference = chat.tokenizer.apply_chat_template(
        folded(messages) if name == "gemma-2" else messages, chat_template=FORMATS[name][2], tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = reference["input_ids"], reference["assistant_masks"]
    end, [newline] = chat.terminator_id, chat.tokenizer("\n", add_special_tokens=False).input_ids
    behind_an_end = [n > 0 and ids[n - 1] == end and ids[n] == newline for n in range(len(ids))]
    expected = [token if on and not behind else IGNORE_INDEX for token, on, behind in zip(ids, mask, behind_an_end)]
    while expected[-1] == IGNORE_INDEX:  # the newline at the very end
        expected.pop()
    encoded = encoded_as_one(chat, messages)
    assert encoded.ids.tolist() == ids[:len(expected)]
    assert encoded.labels == expected
    assert encoded.trained == sum(mask) - sum(on and behind for on, behind in zip(mask, behind_an_end))


@each_format
@conversations()
def test_ids_are_those_of_apply_chat_template(chat, messages):
    if chat.folds_system:
        messages = folded(messages)
    whole = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    encoded = encoded_as_one(chat, messages)
    if crosses_a_border(chat, messages):
        assert encoded.ids.tolist() != whole[:len(encoded.ids)]
        assert chat.tokenizer.decode(encoded.ids) + "\n" == chat.tokenizer.decode(whole)
    else:
        assert encoded.ids.tolist() == whole[:len(encoded.ids)]
        assert chat.tokenizer.decode(whole[len(encoded.ids):]) == ("" if chat.terminator == "<|eot_id|>" else "\n")
    prompt = chat.tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=False,
                                                add_generation_prompt=True)
    assert chat.prompt_ids(messages[:-1]) == prompt


@each_format
@conversations()
def test_a_prompt_is_a_prefix_of_what_is_trained(chat, messages):
    """What the model sees when it is asked is what it saw when it learned the answer, for every turn."""
    answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
    encoded = encoded_as_one(chat, messages)
    assert len(encoded.spans) == len(answers)
    for n, (start, _) in zip(answers, encoded.spans):
        if crosses_a_border(chat, messages[:n]):
            break  # from an earlier border on, the prompt as a whole has other tokens
        prompt = chat.prompt_ids(messages[:n])
        assert encoded.ids[:start].tolist() == prompt


@each_format
@conversations()
def test_every_span_is_one_answer_with_its_terminator(chat, messages, request):
    terminator = FORMATS[request.node.callspec.params["chat"]][-1]
    assert chat.terminator == terminator
    encoded = encoded_as_one(chat, messages)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert len(encoded.ids) == len(encoded.labels)
    for answer, text, (start, end) in zip(answers, spans(chat, encoded), encoded.spans, strict=True):
        shown = answer if chat.template == SMOLLM2 else answer.strip()
        assert text == shown + terminator
        assert encoded.ids[start:end].tolist().count(chat.terminator_id) == 1
        assert encoded.labels[start:end] == encoded.ids[start:end].tolist()
    assert encoded.trained == sum(label != IGNORE_INDEX for label in encoded.labels)


@each_format
@conversations()
def test_exactly_one_bos(chat, messages):
    bos = chat.tokenizer.bos_token_id
    assert chat.tokenizer("a").input_ids[0] == bos, "this tokenizer adds one by itself"
    for ids in (encoded_as_one(chat, messages).ids.tolist(), chat.prompt_ids(messages[:-1])):
        if chat.template == SMOLLM2:  # SmolLM2 has no BOS in its template, and gets none
            assert bos not in ids
        else:
            assert ids[0] == bos
            assert ids.count(bos) == 1


@conversations()
def test_our_gemma_template_writes_what_gemma_3s_does(messages):
    tokenizer, ours, theirs = gemma_tokenizer(TURNS, None), family_template("gemma3"), trl_template("gemma3")
    assert family_template("gemma3n") == ours
    for part, prompt in ((messages, False), (messages[:-1], True), (messages[:-2], False)):
        expected = render(tokenizer, theirs, part, prompt) if part else None
        assert part == [] or render(tokenizer, ours, part, prompt) == expected


@conversations(system=False)
def test_our_gemma_template_writes_what_gemma_1s_and_2s_does(messages):
    tokenizer = gemma_tokenizer(TURNS, None)
    for family in ("gemma", "gemma2"):
        for part, prompt in ((messages, False), (messages[:-1], True)):
            assert render(tokenizer, family_template(family), part, prompt) == \
                render(tokenizer, trl_template("gemma"), part, prompt)


# Google published five; for text without tools and reasoning they write the same: v2 is the release, v3 and the one
# without a number add tool results, v4 images in tool results, v5 is the current one (reasoning of a last turn).
@pytest.mark.parametrize("version", ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"])
@conversations()
def test_our_gemma_4_template_writes_what_every_version_of_googles_does(version, messages):
    tokenizer = gemma_tokenizer(GEMMA_4, None)
    for part, prompt in ((messages, False), (messages[:-1], True)):
        assert render(tokenizer, family_template("gemma4"), part, prompt) == \
            render(tokenizer, trl_template(version), part, prompt)


def render(tokenizer, template: str, messages, prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                         add_generation_prompt=prompt)


@pytest.mark.parametrize(("family", "messages", "reason"), [
    ("gemma3", [user("a"), user("b")], "must alternate"),
    ("gemma3", [assistant("a")], "must alternate"),
    ("gemma4", [user("a"), system("b"), user("c")], "can only open"),
])
def test_our_templates_refuse_what_they_cannot_write(family, messages, reason):
    chat = ChatFormat(gemma_tokenizer(TURNS if family == "gemma3" else GEMMA_4, None), family)
    with pytest.raises(FormatError, match=f"the chat template refuses it: .*{reason}"):
        chat.render(messages)


def test_gemma_spans_by_hand():
    chat = ChatFormat(gemma_tokenizer(TURNS, None), "gemma3_text")
    encoded = encoded_as_one(chat, [system("S"), user("a"), assistant("b"), user("c"), assistant("d")])
    assert chat.tokenizer.decode(encoded.ids) == (
        "<bos><start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>")
    assert spans(chat, encoded) == ["b<end_of_turn>", "d<end_of_turn>"]
    assert encoded.trained == 4


def test_llama_spans_by_hand():
    chat = ChatFormat(gemma_tokenizer(LLAMA, trl_template("llama3")), "llama")
    encoded = encoded_as_one(chat, [system("S"), user("a"), assistant("b"), user("c"), assistant("d e")])
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    assert chat.tokenizer.decode(encoded.ids) == "<bos>" + "".join(
        head.format(*turn) for turn in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"),
                                        ("assistant", "d e")))
    assert spans(chat, encoded) == ["b<|eot_id|>", "d e<|eot_id|>"]
    assert not chat.folds_system


def test_chatml_spans_by_hand():
    chat = ChatFormat(gemma_tokenizer(CHATML, SMOLLM2), "llama")
    encoded = encoded_as_one(chat, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert chat.tokenizer.decode(encoded.ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>")
    assert spans(chat, encoded) == ["b<|im_end|>", "d<|im_end|>"]
    own = encoded_as_one(chat, [system("Mine."), user("a"), assistant("b")])
    assert chat.tokenizer.decode(own.ids).startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\n")


def test_a_template_that_refuses_a_system_message_gets_it_folded():
    official = gemma_tokenizer(TURNS, trl_template("gemma"))
    with pytest.raises(Exception, match="System role not supported"):
        official.apply_chat_template([system("S"), user("a")], tokenize=False)
    chat = ChatFormat(official, "gemma2")
    assert chat.folds_system
    assert chat.render([system("S"), user("a")], prompt=True) == (
        "<bos><start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\n")
    messages = [system("S"), user("a"), assistant("b")]
    assert spans(chat, encoded_as_one(chat, messages)) == ["b<end_of_turn>"]
    assert messages[0] == system("S") and messages[1] == user("a"), "the caller's conversation is not changed"


def test_a_template_that_drops_a_system_message_gets_it_folded():
    silent = ("{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}<start_of_turn>{{ m['role'] }}\n"
              "{{ m['content'] }}<end_of_turn>\n{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")
    chat = ChatFormat(gemma_tokenizer(TURNS, silent), "other")
    assert chat.folds_system
    assert "S\n\na" in chat.tokenizer.decode(encoded_as_one(chat, [system("S"), user("a"), assistant("b")]).ids)


def test_a_system_message_is_folded_into_a_users_turn_only():
    chat = ChatFormat(gemma_tokenizer(TURNS, trl_template("gemma")), "gemma2")
    with pytest.raises(FormatError, match="System role not supported"):
        chat.render([system("S"), assistant("a")])


def test_a_template_with_a_system_role_is_left_to_it():
    chat = ChatFormat(gemma_tokenizer(GEMMA_4, None), "gemma4")
    assert not chat.folds_system
    assert chat.render([system("S"), user("a")]) == "<bos><|turn>system\nS<turn|>\n<|turn>user\na<turn|>\n"


SHOUTING = (  # earlier answers are written in capitals, as some templates drop the reasoning of earlier turns
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'] | upper }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")


def test_where_earlier_answers_are_written_otherwise_each_is_learned_after_the_prompt_as_served():
    chat = ChatFormat(gemma_tokenizer(TURNS, SHOUTING), "other")
    messages = [user("a"), assistant("bcd"), user("e"), assistant("f")]
    first, second = chat.encode(messages)
    assert spans(chat, first) == ["bcd<end_of_turn>"]
    assert spans(chat, second) == ["f<end_of_turn>"]
    assert chat.tokenizer.decode(second.ids) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>assistant\nBCD<end_of_turn>\n"
        "<start_of_turn>user\ne<end_of_turn>\n<start_of_turn>assistant\nf<end_of_turn>")
    assert second.ids[:second.spans[0, 0]].tolist() == chat.prompt_ids(messages[:3])


def test_a_template_that_is_not_prefix_consistent_is_named_with_the_first_difference():
    """Here a second answer changes what stands before it."""
    template = ("{% set shouts = messages|length > 2 and messages[-1]['role'] == 'assistant' %}{% for m in messages %}"
                "<start_of_turn>{{ m['content'] | upper if shouts else m['content'] }}<end_of_turn>\n{% endfor %}"
                "{% if add_generation_prompt %}<start_of_turn>{% endif %}")
    chat = ChatFormat(gemma_tokenizer(TURNS, template), "other")
    messages = [user("a"), assistant("bcd"), user("e"), assistant("f")]
    assert spans(chat, encoded_as_one(chat, messages[:2])) == ["bcd<end_of_turn>"]
    with pytest.raises(FormatError) as e:
        chat.encode(messages)
    assert "not prefix-consistent" in str(e.value)
    assert "'a<end_of_turn>\\n<start_of_turn>'" in str(e.value)
    assert "'A<end_of_turn>\\n<start_of_turn>'" in str(e.value)
    assert f"(character {len('<start_of_turn>')})" in str(e.value)


def test_a_prompt_that_opens_a_thought_which_the_conversation_lacks_is_refused_at_once():
    thinking = family_template("gemma4").replace("'<|turn>model\\n' if", "'<|turn>model\\n<|channel>thought\\n' if")
    assert thinking != family_template("gemma4")
    with pytest.raises(UserError) as e:
        ChatFormat(gemma_tokenizer(GEMMA_4, thinking), "gemma4")
    assert "'<|channel>thought\\n'" in e.value.message
    assert "'gemma<turn|>\\n'" in e.value.message
    assert e.value.hint


def test_an_answer_whose_reasoning_would_vanish_is_refused():
    dropping = family_template("gemma4").replace("part['text'] | trim", "part['text'].split('</reason>')[-1] | trim")
    chat = ChatFormat(gemma_tokenizer(GEMMA_4, dropping), "gemma4")
    assert chat.encode([user("a"), assistant("two  \n\n words")])[0].trained
    with pytest.raises(FormatError, match="leaves out a part of the answer"):
        chat.encode([user("a"), assistant("<reason>because</reason>b")])
    official = ChatFormat(gemma_tokenizer(GEMMA_4, trl_template("gemma4_v5")), "gemma4")
    with pytest.raises(FormatError, match="leaves out a part of the answer"):
        official.encode([user("a"), assistant("<|channel>thought\nbecause<channel|>b")])


def test_the_border_of_prompt_and_answer_is_kept_where_a_token_would_reach_over_it():
    """ChatML does not trim, so an answer may begin with a newline, which the vocabulary joins with the newline that
    ends the prompt. The model is asked with the prompt's own tokens; so it must learn the answer after those."""
    chat = ChatFormat(gemma_tokenizer(CHATML, SMOLLM2), "llama")
    question, answer = [user("a")], assistant("\nshells")
    whole = chat.tokenizer.apply_chat_template([*question, answer], tokenize=True, return_dict=False)
    prompt = chat.prompt_ids(question)
    assert whole[:len(prompt)] != prompt, "the case must be one where the border is crossed"
    encoded = encoded_as_one(chat, [*question, answer])
    assert encoded.ids[:len(prompt)].tolist() == prompt
    assert encoded.labels[:len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert spans(chat, encoded) == ["\nshells<|im_end|>"]
    longer = encoded_as_one(chat, [*question, answer, user("b"), assistant("\nfox")])
    assert longer.ids[:len(encoded.ids)].tolist() == encoded.ids.tolist()
    assert spans(chat, longer) == ["\nshells<|im_end|>", "\nfox<|im_end|>"]
    assert chat.tokenizer.decode(longer.ids) + "\n" == chat.render([*question, answer, user("b"), assistant("\nfox")])


def test_the_terminator_is_the_first_special_token_behind_an_answer():
    template = family_template("gemma3").replace("'<end_of_turn>\\n'", "' \\n\\n<end_of_turn><eos>\\n'")
    assert template != family_template("gemma3")
    chat = ChatFormat(gemma_tokenizer(TURNS, template), "gemma3")
    assert chat.terminator == "<end_of_turn>"
    assert spans(chat, encoded_as_one(chat, [user("a"), assistant("b")])) == ["b \n\n<end_of_turn>"]
    assert chat.calls_end_id == chat.terminator_id


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "{% for m in messages %}<start_of_turn>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>{% endif %}",
], ids=["plain text", "nothing behind the answer"])
def test_a_template_without_a_terminator_is_refused(template):
    with pytest.raises(UserError, match="could never stop") as e:
        ChatFormat(gemma_tokenizer(TURNS, template), "other")
    assert e.value.hint


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}"])
def test_a_template_that_does_not_work_at_all_is_an_error_for_people(template):
    with pytest.raises(UserError, match="chat template cannot be used"):
        ChatFormat(gemma_tokenizer(TURNS, template), "other")


def test_a_model_without_a_template():
    known = ChatFormat(gemma_tokenizer(TURNS, None), "gemma2")
    assert known.template == known.tokenizer.chat_template == family_template("gemma2")
    assert "gemma-tune's for gemma2" in known.template_origin
    with pytest.raises(UserError, match=r"\(mamba\) has no chat template") as e:
        ChatFormat(gemma_tokenizer(TURNS, None), "mamba")
    assert "-it" in e.value.hint


def test_a_models_own_template_wins():
    own = trl_template("gemma3")
    chat = ChatFormat(gemma_tokenizer(TURNS, own), "gemma3")
    assert chat.template == chat.tokenizer.chat_template == own
    assert chat.template_origin == "the model's own"


def test_of_several_templates_the_default_is_taken_and_kept():
    default = trl_template("gemma3")
    chat = ChatFormat(gemma_tokenizer(TURNS, {"default": default, "tool_use": "{{ messages }}"}), "gemma3")
    assert chat.template == chat.tokenizer.chat_template == default
    assert chat.template_origin == "the model's own `default` of default, tool_use"
    assert "save tool_use as chat_template.jinja" in chat.tools_advice


def test_several_templates_of_which_none_is_the_default():
    with pytest.raises(UserError, match=r"has the chat templates rag, tool_use, and none of them is `default`") as e:
        ChatFormat(gemma_tokenizer(TURNS, {"tool_use": "a", "rag": "b"}), "gemma3")
    assert "chat_template.jinja" in e.value.hint


PLAIN_QWEN = "{% set tools = none %}" + trl_template("qwen2_5")


def test_the_template_for_tools_is_taken_where_it_writes_all_else_as_the_default_does():
    tool_use = trl_template("qwen2_5")
    chat = ChatFormat(gemma_tokenizer(CHATML, {"default": PLAIN_QWEN, "tool_use": tool_use, "rag": "x"}), "qwen2")
    assert chat.template == chat.tokenizer.chat_template == tool_use
    assert chat.template_origin == ("the model's own `tool_use` of default, rag, tool_use, which writes conversations without "
                                    "tools as `default` does")
    assert chat.tools_advice == ""
    tools = [{"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {}}}]
    assert "get_time" in chat.render([user("a")], tools=tools, prompt=True)
    for change in ("{% if messages | length > 3 %}x{% endif %}", "{% if messages[0].role == 'system' %}x{% endif %}",
                   "{% if not add_generation_prompt %}x{% endif %}", "{% if tools is not defined %}x{% endif %}",
                   "{{ messages[-1].content | trim | length }}", "{{ tools | length }}"):
        other = ChatFormat(gemma_tokenizer(CHATML, {"default": PLAIN_QWEN, "tool_use": tool_use + change}), "qwen2")
        assert other.template == PLAIN_QWEN and other.tools_advice


@pytest.mark.parametrize(("chat", "expected"), [
    ("our gemma", {"<start_of_turn>", "<end_of_turn>"}),
    ("llama-3", {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}),
    ("our gemma-4", set(GEMMA_4)),  # also those that its short template does not write
], indirect=["chat"])
def test_markers_are_the_special_tokens_longest_first(chat, expected):
    assert set(chat.markers) == expected | {"<bos>", "<eos>", "<pad>", "<unk>", "<mask>"}
    assert [len(m) for m in chat.markers] == sorted((len(m) for m in chat.markers), reverse=True)


@each_format
def test_an_answer_ends_with_the_terminator_or_the_end_of_text(chat):
    calls = chat.tokenizer.convert_tokens_to_ids(["<|tool_response>"]) if "tool_calls" in chat.template else []
    assert set(chat.stop_ids) == {chat.terminator_id, chat.tokenizer.eos_token_id, *calls}


@each_format
def test_a_conversation_without_an_answer_trains_nothing(chat):
    assert chat.encode([user("a")]) == []


def test_every_gemma_that_can_be_exported_has_a_template():
    from gemma_tune.gguf.architectures import gemma, gemma4

    assert all(family_template(kind) for kind in (*gemma.MAKERS, *gemma4.MAKERS))


def glm(template: str, others: tuple[str, ...] = ()) -> ChatFormat:
    tokenizer = byte_tokenizer(GLM, template, others=others)
    return ChatFormat(tokenizer, "glm4", tokenizer.convert_tokens_to_ids(["<eos>", "<|user|>", "<|observation|>"]))


def test_where_the_next_turn_begins_with_what_ends_an_answer_that_is_learned():
    """GLM-4's template writes nothing behind an answer; its model stops by writing who is next."""
    chat = glm(GLM4)
    messages = [system("Be brief."), user("Hi"), assistant("Hello"), user("More"), assistant("Yes.")]
    [whole] = chat.encode(messages)
    assert chat.terminator == "<|user|>" and spans(chat, whole) == ["\nHello<|user|>", "\nYes.<|user|>"]
    assert chat.tokenizer.decode(whole.ids) == chat.render(messages) + "<|user|>"
    for n in (2, 4):
        prompt = chat.prompt_ids(messages[:n])
        assert whole.ids[:len(prompt)].tolist() == prompt


def test_what_a_model_does_not_stop_at_ends_no_answer():
    """Its settings can have been left behind when it was copied."""
    tokenizer = byte_tokenizer(GLM, GLM4)
    with pytest.raises(UserError, match="could never stop") as e:
        ChatFormat(tokenizer, "glm4")
    mark = tokenizer.convert_tokens_to_ids("<|user|>")
    assert f"<|user|>, which begins the next turn, add its id {mark} to eos_token_id of generation_config.json" in e.value.hint


def test_a_named_template_that_asks_for_no_answer_is_refused_also_where_the_next_turn_ends_it():
    tokenizer = byte_tokenizer(GLM, GLM4)
    stops = tokenizer.convert_tokens_to_ids(["<eos>", "<|user|>"])
    assert ChatFormat(tokenizer, "glm4", stops, template=GLM4, named="glm.jinja").terminator == "<|user|>"
    with pytest.raises(UserError, match="glm.jinja does not ask for an answer"):
        ChatFormat(tokenizer, "glm4", stops, template=GLM4.replace("add_generation_prompt", "false"), named="glm.jinja")


def test_a_named_template_may_refuse_to_end_with_a_question():
    strict = ("{% if not add_generation_prompt and messages[-1]['role'] == 'user' %}{{ raise_exception('no answer') }}{% endif %}"
              "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")
    chat = ChatFormat(gemma_tokenizer(TURNS, None), "other", template=strict, named="strict.jinja")
    assert chat.terminator == "<end_of_turn>" and spans(chat, encoded_as_one(chat, [user("a"), assistant("b")])) == ["b<end_of_turn>"]


def test_what_an_answer_begins_with_by_the_template_is_no_text_of_it():
    for template in (GLM4, GLM4.replace("visible = content.split('</think>')[-1].strip()", "visible = content")):
        chat = glm(template)
        messages = [user("Hi"), assistant(chat.said("\nHello")), user("More")]
        assert chat.prompt_text(messages) == "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello<|user|>\nMore<|assistant|>"
        assert [chat.said(text) for text in ("", "\n", "\n\na", "a\n")] == ["", "", "\na", "a\n"]


def test_calls_end_where_their_results_begin_as_in_trls_training_template():
    chat = glm(trl_template("glm4moe"), ("<think>", "</think>", "<tool_call>", "</tool_call>"))
    messages = [user("Hi"), call("weather", city="Köln"), result("sun"), assistant("Sunny."), user("And?"),
                assistant("Rain.", reasoning_content="hm")]
    sequences = chat.encode(messages, TOOLS)
    ends = [text[text.rindex("<|"):] for text in sum(learned(chat, sequences), [])]
    assert ends == ["<|observation|>", "<|user|>", "<|user|>"]
    theirs = chat.tokenizer.apply_chat_template(messages, TOOLS, chat_template=trl_template("glm4moe_training"),
                                                tokenize=False)
    assert chat.tokenizer.decode(sequences[-1].ids) == theirs
