"""What training gets: rows that are longer than the limit, and turns that are not to be learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from support.command import write_rows
from support.llamas import save_opt
from support.prepared import (
    contents,
    format_of,
    learned,
    prepared,
    questions,
    read,
    report,
    row,
    sequences,
    talk,
    with_template,
)
from support.templates import TOOLS, assistant, call, result, user

LIMIT = 96
POLICIES = ("drop", "split", "truncate")


@pytest.fixture(scope="module")
def qwen(tiny, tmp_path_factory) -> Path:
    """A model whose template has a place for system messages and tools."""
    return with_template(tiny, tmp_path_factory.mktemp("qwen"))


def conversations(count: int = 40) -> list[dict[str, Any]]:
    """Conversations of all lengths, some with a system prompt; each answer and question is there once."""
    draw = random.Random(7)
    return [talk(*(draw.choice((0, 2, 5, 9, 30)) for _ in range(draw.randint(1, 6))), name=f"{n}.",
                 first=draw.choice((None, f"system {n}"))) for n in range(count)]


def lengths(chat: Any, values: list[dict[str, Any]]) -> list[int]:
    return [max(len(s.ids) for s in chat.encode(value["messages"], value.get("tools"))) for value in values]


def test_by_default_a_longer_row_is_left_out_whole(prepare, tiny):
    values = conversations()
    long = [n > LIMIT for n in lengths(format_of(tiny), values)]
    assert 5 < sum(long) < 35
    done = prepare(write_rows(Path("rows.jsonl"), values), "--max-length", LIMIT, "--valid", 0)
    assert [r["line"] for r in read("rejected")] == [n for n, is_long in enumerate(long, start=1) if is_long]
    assert [r["row"] for r in read("rejected")] == [value for value, is_long in zip(values, long) if is_long]
    assert read("train") == [value for value, is_long in zip(values, long) if not is_long]
    assert "left_out_answers" in report() and report()["left_out_answers"] == 0
    assert f"longer than {LIMIT} tokens and left out" in done["err"]


def test_a_row_that_is_too_long_says_what_would_do(prepare):
    long = row("long", "word " * 60)
    write_rows(Path("rows.jsonl"), [row("good"), long])
    for policy, reason, fix in (("drop", "", ", or shorten"),
                                ("split", ", and no single exchange of it fits", ", or shorten")):
        prepare("rows.jsonl", "--max-length", 80, "--on-long", policy)
        [record] = read("rejected")
        length = record["reason"].split()[0]
        assert record["code"] == "too_long" and record["row"] == long
        assert record["reason"] == f"{length} tokens are more than --max-length 80{reason}"
        assert record["fix"] == f"use --max-length {length}{fix} the conversation"
    assert prepare("rows.jsonl", "--max-length", length)["summary"]["longest"] == int(length)
    assert prepare("rows.jsonl", "--max-length", int(length) - 1)["summary"]["rejected_by_reason"] == {"too_long": 1}


def test_a_longer_row_may_stop_everything(prepare):
    write_rows(Path("rows.jsonl"), [talk(1), talk(60), talk(2)])
    prepare("rows.jsonl", "--max-length", 500)
    before = contents(Path("runs"))
    error = prepare("rows.jsonl", "--max-length", LIMIT, "--on-long", "fail", code=2)
    assert error["message"] == f"1 of 3 rows are longer than --max-length {LIMIT}"
    assert "--on-long split" in error["hint"] and error["problems"][0].startswith("rows.jsonl:2: ")
    assert contents(Path("runs")) == before
    prepare("rows.jsonl", "--max-length", 500, "--on-long", "fail")


def test_the_report_tells_what_dividing_cost(prepare):
    """Rows of one exchange that does not fit cannot be divided: they are rejected, and that is said."""
    values = [row(f"q{n}", "word " * 60) for n in range(3)] + [talk(1, 1, 1, 1, 60), row("short")]
    done = prepare(write_rows(Path("rows.jsonl"), values), "--max-length", LIMIT, "--on-long", "split", "--valid", 0)
    assert done["summary"]["rejected_by_reason"] == {"too_long": 3}
    said = report()["before_the_limit"]["long"]["message"]
    lost = 1 - report()["trained_tokens"] / report()["before_the_limit"]["trained_tokens"]
    assert said.startswith(f"4 rows are longer than {LIMIT} tokens: 1 divided, 3 rejected; {100 * lost:.1f} % of the trained "
                           "tokens are lost; --max-length ")
    assert said in done["err"]


def test_too_many_long_rows_say_which_limit_would_do(prepare):
    write_rows(Path("rows.jsonl"), [talk(1), *(talk(n) for n in range(40, 60))])
    error = prepare("rows.jsonl", "--max-length", LIMIT, "--max-rejected", 0.2, code=2)
    assert error["problems"][0].startswith("20 rows (") and "--max-length " in error["problems"][0]
    assert error["hint"].startswith("use a larger --max-length, or go on without them"), "no row has parts"
    enough = error["problems"][0].split("--max-length ")[1].split()[0]
    assert prepare("rows.jsonl", "--max-length", enough, "--max-rejected", 0.2)["summary"]["rejected_rows"] <= 1


def test_rows_that_have_parts_may_be_divided(prepare):
    write_rows(Path("rows.jsonl"), [talk(1), *(talk(n, 9) for n in range(40, 60))])
    error = prepare("rows.jsonl", "--max-length", LIMIT, "--max-rejected", 0.2, code=2)
    assert error["hint"].startswith("use a larger --max-length or --on-long split, or go on without them: ")
    write_rows(Path("rows.jsonl"), [talk(n, 9) for n in range(40, 60)])
    error = prepare("rows.jsonl", "--max-length", LIMIT, code=2)
    assert error["hint"] == "use a larger --max-length or --on-long split", "also where there are no others"


def test_too_many_rows_that_cannot_be_divided_are_not_told_of_what_was_asked_for(prepare):
    """Nor that all longer rows are left out: the last four are divided."""
    write_rows(Path("rows.jsonl"), [talk(1), *(talk(n) for n in range(40, 60)), *(talk(9, 9, 9, 9) for _ in range(4))])
    error = prepare("rows.jsonl", "--max-length", LIMIT, "--on-long", "split", "--max-rejected", 0.2, code=2)
    assert "20 of 25 rows cannot be used" in error["message"] and "left out" not in error["err"]
    assert error["hint"] == "use a larger --max-length, or go on without them: --max-rejected 0.8"
    assert all("no single exchange of it fits" in problem for problem in error["problems"][:-1])


def exchanges(value: dict[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """The system prompt, and the turns from each question to the next."""
    first = [m for m in value["messages"] if m["role"] == "system"]
    parts: list[list[Any]] = []
    for message in value["messages"][len(first):]:
        if message["role"] == "user":
            parts.append([])
        parts[-1].append(message)
    return first, parts


def split_by_hand(chat: Any, value: dict[str, Any], limit: int) -> list[list[int]]:
    """Ids of the pieces: from left to right as many exchanges as fit; one that fits nowhere is left out."""
    def ids(parts: list[list[Any]]) -> list[int]:
        [encoded] = chat.encode([*first, *(m for part in parts for m in part)], value.get("tools"))
        return encoded.ids.tolist()

    first, parts = exchanges(value)
    pieces, piece = [], []
    for part in parts:
        if len(ids([*piece, part])) <= limit:
            piece.append(part)
            continue
        pieces += [ids(piece)] if piece else []
        piece = [part] if len(ids([part])) <= limit else []
    return pieces + ([ids(piece)] if piece else [])


def answers_that_fit(chat: Any, value: dict[str, Any], limit: int) -> list[str]:
    """As the model writes them, with their end."""
    first, parts = exchanges(value)
    found = []
    for part in parts:
        [encoded] = chat.encode([*first, *part], value.get("tools"))
        if len(encoded.ids) <= limit:
            found += [chat.tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans.tolist()]
    return found


@pytest.mark.parametrize("model, limit", [("tiny", LIMIT), ("qwen", 2 * LIMIT)])
def test_a_longer_conversation_is_divided_between_turns(request, model, limit):
    model = request.getfixturevalue(model)
    chat, values = format_of(model), conversations()
    done = prepared(model, write_rows(Path("rows.jsonl"), values), "--max-length", limit, "--on-long", "split", "--valid", 0)
    expected = [split_by_hand(chat, value, limit) for value in values]
    assert any(len(pieces) > 2 for pieces in expected)
    assert [r["line"] for r in read("rejected")] == [n for n, pieces in enumerate(expected, start=1) if not pieces]
    assert read("train") == [value for value, pieces in zip(values, expected) if pieces], "rows stay whole"
    assert [s.ids for s in sequences()] == [ids for pieces in expected for ids in pieces]
    # Every answer that fits with its question is learned once, in order.
    fitting = [m for value in values for m in answers_that_fit(chat, value, limit)]
    assert [text for stretches in learned(chat) for text in stretches] == fitting
    answers = sum(m["role"] == "assistant" for value in read("train") for m in value["messages"])
    assert report()["left_out_answers"] == answers - len(fitting)
    assert (f"{answers - len(fitting)} answers of the rows that are used are left out" in done["err"]) == (
        answers > len(fitting))


def test_a_call_and_its_result_stay_together(qwen):
    turns = [(user(f"weather {n}?"), call("weather", city=f"Oslo {n}"), result("wet" * (90 if n == 1 else 2)),
              assistant(f"wet {n}")) for n in range(4)]
    chat = format_of(qwen)
    value = {"messages": [turn for exchange in turns for turn in exchange], "tools": TOOLS}
    lengths = [len(chat.encode(list(exchange), TOOLS)[0].ids) for exchange in turns]
    limit = len(chat.encode([*turns[2], *turns[3]], TOOLS)[0].ids)
    assert lengths[0] < lengths[1] > limit
    prepared(qwen, write_rows(Path("rows.jsonl"), [value]), "--max-length", limit, "--on-long", "split", "--valid", 0)
    assert [s.ids for s in sequences()] == split_by_hand(chat, value, limit)
    assert [["Oslo" in text for text in stretches] for stretches in learned(chat)] == [[True, False], [True, False] * 2]
    assert report()["left_out_answers"] == 2


def test_the_system_prompt_is_in_front_of_every_piece(qwen):
    write_rows(Path("rows.jsonl"), [talk(9, 9, 9, first="Be kind.")])
    prepared(qwen, "rows.jsonl", "--max-length", LIMIT, "--on-long", "split")
    texts = [format_of(qwen).tokenizer.decode(s.ids) for s in sequences()]
    assert len(texts) == 3
    assert all(text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n") for text in texts)


def test_cut_conversations(prepare, tiny):
    values = conversations()
    write_rows(Path("rows.jsonl"), values)
    done = prepare("rows.jsonl", "--max-length", LIMIT, "--on-long", "truncate", "--valid", 0)
    expected = []
    for value in values:
        [encoded] = format_of(tiny).encode(value["messages"])
        ends = [min(b, LIMIT) for a, b in encoded.spans.tolist() if a < LIMIT]
        expected.append(encoded.ids[:ends[-1]].tolist() if ends else [])
    assert [s.ids for s in sequences()] == [ids for ids in expected if ids]
    assert any(len(ids) == LIMIT for ids in expected), "some end in the middle of an answer"
    lost = report()["before_the_limit"]["long"]["ends"]
    assert f"and {lost:,} of them the end of the last answer" in done["err"]
    assert read("rejected") == [] and len(read("train")) == len(values)
    asked = sum(m["role"] == "assistant" for value in values for m in value["messages"])
    assert report()["left_out_answers"] == asked - sum(len(s.spans) for s in sequences()) > 0


def test_nothing_is_left_of_a_row_whose_answers_begin_after_the_limit(prepare):
    write_rows(Path("rows.jsonl"), [row("word " * 40), row()])
    prepare("rows.jsonl", "--max-length", LIMIT, "--on-long", "truncate", "--valid", 0)
    [record] = read("rejected")
    assert record["code"] == "too_long" and record["reason"].endswith("and no answer begins before it")
    assert questions() == ["What is a bond?"]


@pytest.mark.parametrize("policy", POLICIES)
def test_figures_of_the_limit(prepare, tiny, policy):
    values = [*conversations(20), *conversations(3)]  # of which the last are duplicates
    prepare(write_rows(Path("rows.jsonl"), values), "--max-length", LIMIT, "--on-long", policy, "--valid", 0.2)
    chat = format_of(tiny)
    gone = {r["line"] - 1 for r in read("duplicates")}
    counted = [chat.encode(value["messages"])[0] for n, value in enumerate(values) if n not in gone]
    long = [s for s in counted if len(s.ids) > LIMIT]
    figures = report()["before_the_limit"]
    assert 0 < len(long) < len(counted)
    assert {name: figures["long"][name] for name in ("max_length", "on_long", "rows", "row_tokens", "tokens", "ends")} == {
        "max_length": LIMIT, "on_long": policy, "rows": len(long), "row_tokens": sum(s.trained for s in long),
        "tokens": sum(label != -100 for s in counted for label in s.labels[LIMIT:]),
        "ends": sum(s.spans[-1, 1] > LIMIT for s in counted)}
    assert (figures["rows"], figures["tokens"], figures["trained_tokens"]) == (
        len(counted), sum(len(s.ids) for s in counted), sum(s.trained for s in counted))
    assert figures["turns"] == sum(len(value["messages"]) for n, value in enumerate(values) if n not in gone)
    sizes = sorted(len(s.ids) for s in counted)
    assert (figures["length"]["shortest"], figures["length"]["longest"]) == (sizes[0], sizes[-1])
    assert figures["longest_rows"][0]["tokens"] == sizes[-1]
    assert sum(item["rows"] for item in figures["histogram"]) == len(counted)


# --- texts for continued training

TEXTS = [{"text": "\n  Once upon a time there was a fox.\n"}, {"text": "word " * 70}, {"text": "The end."}]


def whole(chat: Any, value: dict[str, Any]) -> list[int]:
    return chat.encode_text(value["text"]).ids.tolist()


def test_texts_are_learned_from_the_first_to_the_last_token(prepare, tiny):
    write_rows(Path("rows.jsonl"), [*TEXTS, row()])
    prepare("rows.jsonl", "--valid", 0)
    chat = format_of(tiny)
    assert read("train") == [*TEXTS, row()], "white space of a text is kept"
    found = sequences()[:3]
    assert [s.ids for s in found] == [whole(chat, value) for value in TEXTS]
    assert all(s.ids[0] == chat.tokenizer.bos_token_id for s in found), "as its chat template begins"
    assert [s.spans for s in found] == [[(1, len(s.ids))] for s in found]
    assert all(s.ids[-1] == chat.tokenizer.eos_token_id for s in found)
    assert report()["formats"] == {"text": 3, "messages": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_longer_texts(prepare, tiny, policy):
    prepare(write_rows(Path("rows.jsonl"), TEXTS), "--max-length", LIMIT, "--on-long", policy, "--valid", 0)
    long = whole(format_of(tiny), TEXTS[1])
    found = [s.ids for s in sequences()]
    assert len(long) > 2 * LIMIT
    if policy == "drop":
        assert [r["line"] for r in read("rejected")] == [2] and len(found) == 2
    elif policy == "truncate":
        assert found[1] == long[:LIMIT]
    else:
        assert [*found[1][:1], *(i for ids in found[1:-1] for i in ids[1:])] == long  # each part repeats one token
        assert all(len(ids) == LIMIT for ids in found[1:-2])
        assert [s.row for s in sequences()] == [0] + [1] * (len(found) - 2) + [2]
        assert report()["left_out_answers"] == 0


# --- what is learned

def test_only_the_last_answer(prepare, tiny):
    values = [talk(1, 2, 3), talk(4)]
    prepare(write_rows(Path("rows.jsonl"), values), "--valid", 0, "--train-on", "last")
    assert learned(format_of(tiny)) == [["word word word end 2<end_of_turn>"], ["word word word word end 0<end_of_turn>"]]
    assert read("train") == values
    assert len(sequences()[0].ids) == len(format_of(tiny).encode(values[0]["messages"])[0].ids), "the rest is read"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_answers_that_are_not_to_be_learned(prepare, tiny, mark):
    value = talk(1, 2, 3)
    value["messages"][3] |= mark
    prepare(write_rows(Path("rows.jsonl"), [value]), "--valid", 0)
    assert learned(format_of(tiny)) == [["word end 0<end_of_turn>", "word word word end 2<end_of_turn>"]]
    [kept] = read("train")
    assert [turn.get("train") for turn in kept["messages"]] == [None, None, None, False, None, None]


def test_the_last_answer_alone_when_it_is_not_to_be_learned(prepare):
    value = talk(1, 2)
    value["messages"][3]["train"] = False
    write_rows(Path("rows.jsonl"), [value, talk(3)])
    prepare("rows.jsonl", "--train-on", "last", "--valid", 0)
    [record] = read("rejected")
    assert (record["code"], record["line"]) == ("nothing_to_learn", 1)
    assert "--train-on all" in record["fix"] and "tokens" not in record["reason"]
    prepare("rows.jsonl", "--valid", 0)
    assert read("rejected") == []


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_marks_hold_in_rows_that_are_too_long(prepare, tiny, policy):
    value = talk(9, 9, 9, 9)
    value["messages"][1]["train"] = False
    write_rows(Path("rows.jsonl"), [value])
    prepare("rows.jsonl", "--max-length", LIMIT, "--on-long", policy, "--valid", 0)
    texts = "".join(text for stretches in learned(format_of(tiny)) for text in stretches)
    assert "end 0" not in texts and texts.startswith("word")
    assert texts.count("end ") == (3 if policy == "split" else 0)


def test_answers_that_are_only_read_stand_before_those_that_are_learned(prepare, tiny):
    """As many as fit: an answer without what was said before it teaches little."""
    value, chat = talk(9, 9, 9, 9), format_of(tiny)
    limit = len(chat.encode(value["messages"][4:])[0].ids)
    write_rows(Path("rows.jsonl"), [value])
    for more, questions_before in ((0, 2), (-1, 1)):
        prepare("rows.jsonl", "--max-length", limit + more, "--on-long", "split", "--train-on", "last", "--valid", 0)
        assert learned(chat) == [["word " * 9 + "end 3<end_of_turn>"]]
        expected = chat.encode(value["messages"][-2 * questions_before:])[0].ids.tolist()
        assert [s.ids for s in sequences()] == [expected]
        assert report()["left_out_answers"] == 0


def test_reasoning_over_several_turns_becomes_several_sequences(tiny, tmp_path):
    """Qwen 3 drops the reasoning of earlier turns: each answer is learned after the prompt that it will get."""
    model = with_template(tiny, tmp_path / "models", "qwen3")
    value = {"messages": [user("a"), assistant("one", reasoning_content="think 1"), user("b"),
                          assistant("two", reasoning_content="think 2")]}
    done = prepared(model, write_rows(Path("rows.jsonl"), [value, row()]), "--valid", 0)
    texts = [text for stretches in learned(format_of(model))[:2] for text in stretches]
    assert [("think 1" in text, "think 2" in text) for text in texts] == [(True, False), (False, True)]
    assert [s.row for s in sequences()] == [0, 0, 1] and done["summary"]["sequences"] == 3
    assert "think 1" not in format_of(model).tokenizer.decode(sequences()[1].ids)
    assert "1 row holds reasoning; --thinking on asks for it in every prompt" in done["err"]
    # As a row it is as long as its longest sequence.
    assert report()["before_the_limit"]["length"]["longest"] == max(len(s.ids) for s in sequences())


def test_reasoning_in_a_text_that_the_template_marks_otherwise_counts_as_such(tiny, tmp_path):
    model = with_template(tiny, tmp_path / "models")
    (model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% if m.reasoning_content %}"
        "[{{ m.reasoning_content }}]{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% if enable_thinking %}{% endif %}{% endif %}")
    value = {"messages": [user("a"), assistant("<think>\nwhy\n</think>\n\none")]}
    done = prepared(model, write_rows(Path("rows.jsonl"), [value, row()]), "--valid", 0)
    assert learned(format_of(model))[0] == ["[why]one<end_of_turn>"]
    assert "1 row holds reasoning; --thinking on asks for it in every prompt" in done["err"]


def test_a_part_that_the_template_refuses_rejects_its_row_alone(tiny, tmp_path):
    """The whole conversation is fine for this template, and so is every other row."""
    model = with_template(tiny, tmp_path / "models")
    path = model / "chat_template.jinja"
    path.write_text("{% if messages[0]['content'] == 'q1' %}{{ raise_exception('no q1 here') }}{% endif %}"
                    + path.read_text())
    write_rows(Path("rows.jsonl"), [talk(40, 1, 1), talk(1)])
    prepared(model, "rows.jsonl", "--max-length", 2 * LIMIT, "--on-long", "split", "--valid", 0)
    [record] = read("rejected")
    assert (record["line"], record["code"]) == (1, "template") and "no q1 here" in record["reason"]
    assert json.dumps(read("train")) == json.dumps([talk(1)])


def test_rows_that_are_longer_than_the_model_was_made_for_are_told(cli, tiny, tmp_path):
    """It would learn what it can never be asked."""
    long = [{"messages": [{"role": "user", "content": "number " * 500}, {"role": "assistant", "content": f"the {n}"}]}
            for n in range(6)]
    result = cli("prepare", write_rows(tmp_path / "long.jsonl", long), "--model", tiny)
    assert result.code == 0, result.err
    assert "tiny-gemma was made for 1,024: it can do little or nothing with what comes behind; --max-length 1024" in result.err
    assert "was made for" not in cli("prepare", tmp_path / "long.jsonl", "--max-length", 1024, "--on-long", "truncate").err
    # Nor of a row that is left out, as it is longer than the limit itself.
    longer = [row("a", "word " * 2000), *(row(f"number {n}") for n in range(9))]
    write_rows(tmp_path / "longer.jsonl", longer)
    left_out = cli("prepare", tmp_path / "longer.jsonl", "--max-length", 1500, "--max-rejected", 1)
    assert left_out.code == 0 and "was made for" not in left_out.err


def test_a_table_of_positions_ends_somewhere(cli, tmp_path):
    save_opt(tmp_path / "opt")
    long = [{"messages": [{"role": "user", "content": f"{n} " + "cat " * 60}, {"role": "assistant", "content": "yes"}]}
            for n in range(6)]
    assert cli("prepare", write_rows(tmp_path / "long.jsonl", long), "--model", tmp_path / "opt").code == 0
    for more in ((), ("--dry-run",)):
        result = cli("train", *more)
        assert result.code == 2 and "do not fit into the 64 positions of this model" in result.err
        assert "--max-length 64" in result.err
    # Nor can the model be asked about a row that is held out.
    short = [{"messages": [{"role": "user", "content": f"{n} cat"}, {"role": "assistant", "content": "yes"}]} for n in range(6)]
    valid = write_rows(tmp_path / "valid.jsonl", long[:1])
    assert cli("prepare", write_rows(tmp_path / "short.jsonl", short), "--valid", valid, "--force").code == 0
    for command in (("train",), ("tune", "--learning-rates", "1e-4,2e-4")):
        result = cli(*command)
        assert result.code == 2 and "do not fit into the 64 positions of this model" in result.err, result.err
