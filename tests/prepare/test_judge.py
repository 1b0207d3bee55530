"""What decides which rows have the same prompt, and so stand on the same side of the split."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.prepare.judge import Judge, _with_pictures
from gemma_tune.prepare.near import signature, similarity
from gemma_tune.prepare.opposites import beside
from support.command import write_rows
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


@pytest.mark.parametrize("letters", ["abcdefghijkl", "абвгдежзиклм"])
def test_calls_are_compared_by_words_in_every_script(letters):
    """Two of forty words that differ by a letter are too much; in JSON's escapes each letter would be a word."""
    words = ["".join(letters[(n + 5 * k) % 12] for k in range(4)) + letters[n // 4 % 12] * (n % 3 + 4) for n in range(40)]
    other = [word[:-1] + letters[(n + 7) % 12] if n in (9, 25) else word for n, word in enumerate(words)]
    signatures = [signature([*beside([call("note", words=text)])]) for text in (" ".join(words), " ".join(other), " ".join(words).upper())]
    assert similarity(signatures[0], signatures[1]) < 0.85 and similarity(signatures[0], signatures[2]) == 1


LAST_THOUGHT = """{{ bos_token }}{{ tools | tojson }}{% for m in messages %}<start_of_turn>{{ m.role }}
{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}] {% endif %}{{ m.content }}
{%- for one in m.tool_calls or [] %}{{ one.function | tojson }}{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant
{% endif %}"""


@pytest.mark.parametrize("which", ["all", "last"])
def test_how_an_answer_that_is_judged_becomes_several_sequences_is_told_whatever_is_learned_of_others(cli, tiny, which):
    Path("last.jinja").write_text(LAST_THOUGHT)
    turns = [user("Weather in Oslo?"), call("weather", city="Oslo") | {"reasoning_content": "hmm"},
             {"role": "tool", "content": "wet"}, assistant("It rains.")]
    write_rows(Path("rows.jsonl"), [{"messages": turns, "tools": TOOLS, "label": n > 0} for n in range(2)])
    said = cli("prepare", "rows.jsonl", "--model", tiny, "--chat-template", "last.jinja", "--valid", 0, "--train-on", which)
    assert said.code == 0, said.err
    assert "2 rows become several sequences" in said.err and "rows.jsonl:1: the chat template is not prefix-consistent" in said.err
    assert "1 good, 1 bad" in said.err


def looked_at(text: str, *places: int, file: str = "a.png", answer: str = "A dot.") -> dict:
    pictures = [{"at": at, "file": f"pictures/{file}"} for at in places]
    return {"messages": [user(text) | {"pictures": pictures}, assistant(answer)]}


def test_pictures_are_part_of_a_prompt(judge):
    """White space around the text is not, wherever it leaves them in the row's own count."""
    same = [looked_at("What is this?", 0, 8), looked_at("\n What is this? ", 2, 10), looked_at(" What is this?", 0, 9, answer="No.")]
    others = [looked_at("What is this?", 0, 7), looked_at("What is this?", 0), looked_at("What is this?", 0, 8, file="b.png"),
              {"messages": [user("What is this?"), assistant("A dot.")]}]
    assert len({judge._prompt(row) for row in same}) == 1
    assert len({judge._prompt(row) for row in [same[0], *others]}) == 5


def test_pictures_move_with_the_text_that_is_compared():
    padded = user("  ab  ") | {"pictures": [{"at": at, "file": "f"} for at in (0, 2, 3, 6)]}
    written = _with_pictures({**padded, "content": " ab"}, padded)
    assert [picture["at"] for picture in written["pictures"]] == [0, 1, 2, 3] and written["content"] == " ab"
    assert _with_pictures(padded, padded) is padded
