"""Other names for what a row holds: aliases that are read by themselves, and names that the user gives."""

from __future__ import annotations

import json
import shlex

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user

TURNS = [user("Sky?"), answer("Blue.")]
PIRATE = {"role": "system", "content": "Speak like a pirate."}
ROWS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
    "alpaca": {"instruction": "Sky?", "output": "Blue."},
    "prompt-completion": {"prompt": "Sky?", "completion": "Blue."},
    "gemini": {"contents": [{"role": "user", "parts": [{"text": "Sky?"}]}, {"role": "model", "parts": [{"text": "Blue."}]}]},
}


def read(row, columns=None, **how):
    return Formats(None, columns or {}, None, **how).example(row)


def problems(row, **how):
    with pytest.raises(RowError) as caught:
        read(row, **how)
    return caught.value.problems


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("format", ROWS)
def test_a_rows_system_text_is_read_in_every_format(format, name):
    example = read(ROWS[format] | {name: PIRATE["content"]})
    assert (example.format, example.messages) == (format, [PIRATE, *TURNS])
    assert example.unread == ()


def test_a_rows_system_text_beside_one_of_its_turns():
    assert read({"messages": [PIRATE, *TURNS], "system_prompt": PIRATE["content"]}).messages == [PIRATE, *TURNS]
    [problem] = problems({"messages": [PIRATE, *TURNS], "system_prompt": "Be brief."})
    assert problem.code == "system_inside" and "`system_prompt`" in problem.reason
    [problem] = problems({"messages": TURNS, "system_prompt": "Be brief.", "system": "Be long."})
    assert "`system` and `system_prompt`" in problem.reason


def test_context_and_earlier_turns_of_instructions():
    row = {"instruction": "Who?", "context": "Ann sings.", "output": "Ann."}
    assert read(row).messages == [user("Who?\n\nAnn sings."), answer("Ann.")]
    assert read({**row, "context": None, "passage": "Ann sings."}).messages == [user("Who?\n\nAnn sings."), answer("Ann.")]
    row = {"instruction": "Sky?", "output": "Blue.", "chat_history": [["Hi", "Hello"]]}
    assert read(row).messages == [user("Hi"), answer("Hello"), *TURNS]


def test_context_beside_a_prompt_is_not_guessed_at():
    [problem] = problems({"prompt": "Who?", "context": "Ann sings.", "completion": "Ann."})
    assert "`context`" in problem.reason
    assert "--columns user=prompt,assistant=completion,context=context" in problem.fix
    named = {"user": "prompt", "assistant": "completion", "context": "context"}
    assert read({"prompt": "Who?", "context": "Ann sings.", "completion": "Ann."}, named).messages == [
        user("Who?\n\nAnn sings."), answer("Ann.")]


@pytest.mark.parametrize("beside", ["label", "answer", "summary", "target", "completion"])
def test_a_text_beside_what_may_be_its_answer_is_asked_about(beside):
    [problem] = problems({"text": "Buy now", beside: "spam"})
    assert f"`{beside}`" in problem.reason
    assert f"--columns user=text,assistant={beside}" in problem.fix and "--format text" in problem.fix
    example = read({"text": "Buy now", beside: "spam"}, {"user": "text", "assistant": beside})
    assert example.messages == [user("Buy now"), answer("spam")]
    example = Formats("text", {}, None).example({"text": "Buy now", beside: "spam"})
    assert example.text == "Buy now" and [item.name for item in example.unread] == [beside]


def test_roles_and_keys_that_the_user_names():
    turns = [{"speaker": "kunde", "utterance": "Sky?"}, {"speaker": "berater", "utterance": "Blue."}]
    how = {"roles": {"kunde": "user", "berater": "assistant"}, "turn_keys": {"role": "speaker", "content": "utterance"}}
    assert read({"messages": turns}, **how).messages == TURNS
    assert read({"dialogue": turns}, {"turns": "dialogue"}, **how).messages == TURNS
    assert read({"dialogue": json.dumps(turns)}, {"turns": "dialogue"}, **how).messages == TURNS


def test_messages_about_names_say_how_to_give_them():
    [problem, *_] = problems({"messages": [{"role": "kunde", "content": "Sky?"}, answer("Blue.")]})
    assert "'kunde'" in problem.reason
    assert problem.fix == "name it with --roles kunde=ROLE, each ROLE being user, assistant, system or tool, or rename the role"
    [problem, *_] = problems({"messages": [{"speaker": "user", "utterance": "Sky?"}, {"speaker": "assistant", "utterance": "B"}]})
    assert "--turn-keys role=speaker,content=utterance" in problem.fix


@pytest.mark.parametrize(("names", "option"), [
    (("用户", "助手"), "用户=user,助手=assistant"), (("User", "Assistant"), "User=user,Assistant=assistant"),
    (("customer", "Agent"), "customer=user,Agent=assistant"), (("prompter", "gpt"), "prompter=user"),
    (("Ann", "bot"), "Ann=ROLE,bot=assistant")])
def test_one_option_names_all_roles_of_a_conversation_and_none_the_wrong_way_round(names, option):
    row = {"conversations": [{"from": names[0], "value": "Sky?"}, {"from": names[1], "value": "Blue."}]}
    for problem in problems(row):
        assert f"--roles {shlex.quote(option)}" in problem.fix and ("ROLE being" in problem.fix) == ("=ROLE" in option)
    roles = dict(part.split("=") for part in option.replace("ROLE", "user").split(","))
    assert read(row, roles=roles).messages == TURNS, "and it reads them"


@pytest.mark.parametrize(("name", "fix"), [("customer service", "rename the role"), (" USER", "write `user`")])
def test_a_role_that_cannot_be_typed_gets_no_option_that_names_another(name, fix):
    [first, second] = problems({"messages": [{"role": name, "content": "Sky?"}, {"role": "Agent", "content": "Blue."}]})
    assert first.fix == fix and "--roles Agent=assistant" in second.fix


def test_chinese_turns_get_the_whole_command():
    row = {"对话": [{"角色": "用户", "内容": "Sky?"}, {"角色": "助手", "内容": "Blue."}]}
    [problem] = problems(row)
    assert problem.fix == "use --columns 'turns=对话' --turn-keys 'role=角色,content=内容', and --roles for roles of other names"
    how = {"columns": {"turns": "对话"}, "turn_keys": {"role": "角色", "content": "内容"}}
    [problem, _] = problems(row, **how)
    assert "--roles '用户=user,助手=assistant'" in problem.fix
    assert read(row, **how, roles={"用户": "user", "助手": "assistant"}).messages == TURNS


@pytest.mark.parametrize("keys", [("human", "assistant"), ("input", "output"), ("问题", "答案")])
def test_an_exchange_among_turns_is_not_taken_for_a_turn_with_other_keys(keys):
    [problem] = problems({"conversation": [dict(zip(keys, ("Sky?", "Blue."))), *TURNS]})
    assert "a question and its answer" in problem.reason and "--turn-keys" not in problem.fix
    assert f"with `{keys[0]}`, and" in problem.fix and f"with `{keys[1]}`" in problem.fix
