"""What decides which rows have the same prompt, and so stand on the same side of the split."""

from __future__ import annotations

import pytest

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.prepare.judge import Judge
from support.prepared import format_of, with_template
from support.templates import TOOLS, assistant, call, user


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory) -> Judge:
    return Judge(format_of(with_template(tiny, tmp_path_factory.mktemp("tools"))), PrepareConfig())


def asked(id: str = "a", tools: list | None = None, answer: str = "It rains.") -> dict:
    turns = [user("Weather in Oslo?"), call("weather", city="Oslo"), {"role": "tool", "tool_call_id": id, "content": "wet"}]
    return {"messages": [*turns, assistant(answer)], **({} if tools is None else {"tools": tools})}


def test_other_tools_make_another_prompt(judge):
    prompts = [judge._prompt(asked(tools=tools)) for tools in (None, TOOLS, [*TOOLS, TOOLS[0]])]
    assert len(set(prompts)) == 3


def test_the_ids_of_calls_and_the_answer_do_not(judge):
    prompts = [judge._prompt(asked(*how)) for how in (("a", TOOLS), ("b", TOOLS), ("b", TOOLS, "It is wet."))]
    assert len(set(prompts)) == 1
