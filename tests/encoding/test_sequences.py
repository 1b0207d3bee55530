"""From rows to the sequences that training gets: what is kept of a long one, and that nothing is learned twice."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.labels import IGNORE_INDEX, Encoded
from gemma_tune.encoding.sequences import Encoder, part
from support.models import TURNS
from support.templates import (
    CHATML,
    GPT2_WORDS,
    QWEN_WORDS,
    SMOLLM2,
    TOOLS,
    assistant,
    byte_tokenizer,
    call,
    gemma_tokenizer,
    learned,
    result,
    system,
    trl_template,
    user,
)

examples = functools.partial(settings, deadline=None, derandomize=True, database=None)


@functools.cache
def chat_of(name: str) -> ChatFormat:
    """Gemma 1 folds the system prompt, SmolLM2 has a default one, Qwen 3 drops the reasoning of earlier turns."""
    tokenizer, family = {
        "gemma": lambda: (gemma_tokenizer(TURNS, trl_template("gemma")), "gemma"),
        "smollm2": lambda: (byte_tokenizer(CHATML, SMOLLM2, GPT2_WORDS), "llama"),
        "qwen2.5": lambda: (byte_tokenizer(CHATML, trl_template("qwen2_5"), others=QWEN_WORDS), "qwen2"),
        "qwen3": lambda: (byte_tokenizer(CHATML, trl_template("qwen3"), others=QWEN_WORDS), "qwen3"),
    }[name]()
    return ChatFormat(tokenizer, family)


def outcome(chat: ChatFormat, example: dict, limit: int, on_long: str = "drop", train_on: str = "all"):
    """Of one row; an error is raised."""
    [found] = Encoder(chat, limit, on_long, train_on).encode([example])
    if isinstance(found, FormatError):
        raise found
    return found


def kept(chat: ChatFormat, example: dict, limit: int, on_long: str, train_on: str = "all") -> list[list[str]]:
    """The learned stretches of each kept sequence."""
    return learned(chat, outcome(chat, example, limit, on_long, train_on).kept)


def shown(chat: ChatFormat, sequences) -> list[str]:
    """Each sequence as text."""
    return [chat.tokenizer.decode(s.ids) for s in sequences]


def tokens(chat: ChatFormat, turns: list[dict], tools=None) -> int:
    """Of the longest sequence of a conversation."""
    return max(len(s.ids) for s in chat.encode(turns, tools))


def same(one, other) -> bool:
    return [(s.ids.tolist(), s.spans.tolist()) for s in one] == [(s.ids.tolist(), s.spans.tolist()) for s in other]


FOUR = [system("S"), user("q0"), assistant("a0"), user("q1"), assistant("a1"), user("q2"), assistant("a2"),
        user("q3"), assistant("a3")]


# --- conversations by hand

def test_a_row_that_fits_exactly_is_kept_and_one_token_less_drops_it():
    chat = chat_of("smollm2")
    length = tokens(chat, FOUR)
    for on_long in ("drop", "fail", "truncate", "split"):
        found = outcome(chat, {"messages": FOUR}, length, on_long)
        assert found.kept is found.full and found.longest == length
    for on_long in ("drop", "fail"):
        found = outcome(chat, {"messages": FOUR}, length - 1, on_long)
        assert (list(found.kept), found.longest, len(found.full)) == ([], length, 1)


def test_split_repeats_the_system_prompt_and_cuts_only_between_exchanges():
    chat = chat_of("smollm2")
    found = outcome(chat, {"messages": FOUR}, tokens(chat, FOUR[:5]), "split")
    assert shown(chat, found.kept) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
        "<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\na3<|im_end|>"]
    assert learned(chat, found.kept) == [["a0<|im_end|>", "a1<|im_end|>"], ["a2<|im_end|>", "a3<|im_end|>"]]


def test_split_folds_the_system_prompt_into_each_piece_of_a_template_without_one():
    chat = chat_of("gemma")
    assert chat.folds_system
    found = outcome(chat, {"messages": FOUR}, tokens(chat, FOUR[:3]), "split")
    assert len(found.kept) == 4
    assert all(text.startswith("<bos><start_of_turn>user\nS\n\nq") for text in shown(chat, found.kept))


def test_split_leaves_out_the_exchange_that_fits_nowhere_and_goes_on_after_it():
    chat = chat_of("smollm2")
    turns = copy.deepcopy(FOUR)
    turns[4]["content"] = "word " * 60
    assert kept(chat, {"messages": turns}, tokens(chat, FOUR[:5]), "split") == [
        ["a0<|im_end|>"], ["a2<|im_end|>", "a3<|im_end|>"]]
    turns[0]["content"] = "word " * 60
    assert kept(chat, {"messages": turns}, tokens(chat, FOUR[:5]), "split") == []


def test_split_keeps_calls_their_results_and_the_answer_together():
    chat = chat_of("qwen2.5")
    turns = [user("q0"), call("weather", city="Rome"), result("sunny"), assistant("a0"),
             user("q1"), call("weather", city="Oslo"), result("snow"), assistant("a1")]
    row = {"messages": turns, "tools": TOOLS}
    limit = max(tokens(chat, turns[:4], TOOLS), tokens(chat, turns[4:], TOOLS))
    found = outcome(chat, row, limit, "split")
    assert [text.count("# Tools") for text in shown(chat, found.kept)] == [1, 1]
    calls = [f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{c}"}}}}\n</tool_call><|im_end|>'
             for c in ("Rome", "Oslo")]
    assert learned(chat, found.kept) == [[calls[0], "a0<|im_end|>"], [calls[1], "a1<|im_end|>"]]
    assert kept(chat, row, tokens(chat, turns[4:6], TOOLS), "split") == [], "a call alone is not an exchange"


def test_turns_that_are_not_learned_stay_in_the_pieces_as_context():
    chat = chat_of("smollm2")
    turns = copy.deepcopy(FOUR)
    turns[2]["train"] = turns[6]["train"] = False
    limit = tokens(chat, FOUR[:5])
    found = outcome(chat, {"messages": turns}, limit, "split")
    assert learned(chat, found.kept) == [["a1<|im_end|>"], ["a3<|im_end|>"]]
    assert ["a0<|im_end|>" in shown(chat, found.kept)[0], "a2<|im_end|>" in shown(chat, found.kept)[1]] == [True, True]
    # Where there is no room for both, the question of the learned one is what stays.
    alone = outcome(chat, {"messages": turns}, limit - 1, "split")
    assert learned(chat, alone.kept) == [["a1<|im_end|>"], ["a3<|im_end|>"]]
    assert not any("a0" in text or "a2" in text for text in shown(chat, alone.kept))


def test_the_last_turn_alone_keeps_as_much_before_it_as_fits():
    chat = chat_of("smollm2")
    row = {"messages": FOUR}
    found = outcome(chat, row, tokens(chat, FOUR[:7]), "split", "last")
    assert learned(chat, found.full) == learned(chat, found.kept) == [["a3<|im_end|>"]]
    [text] = shown(chat, found.kept)
    assert [f"q{n}" in text for n in range(4)] == [False, True, True, True]
    assert kept(chat, row, tokens(chat, FOUR[:3]), "split", "last") == [["a3<|im_end|>"]]
    assert kept(chat, row, tokens(chat, FOUR[:3]) - 1, "split", "last") == []
    assert kept(chat, row, tokens(chat, FOUR), "drop", "last") == [["a3<|im_end|>"]]


def test_nothing_is_left_of_a_conversation_whose_last_turn_is_not_to_be_learned():
    turns = [*FOUR[:-1], assistant("a3", train=False)]
    for on_long in ("drop", "split", "truncate"):
        for limit in (20, 2000):
            found = outcome(chat_of("smollm2"), {"messages": turns}, limit, on_long, "last")
            assert (list(found.full), list(found.kept), found.longest) == ([], [], 0)


def test_truncate_cuts_an_answer_and_drops_what_comes_after_the_last_learned_token():
    chat = chat_of("smollm2")
    full = chat.encode(FOUR)[0]
    b, c = full.spans[1, 1].tolist(), full.spans[2, 0].tolist()
    cut = outcome(chat, {"messages": FOUR}, b - 1, "truncate").kept
    assert learned(chat, cut) == [["a0<|im_end|>", "a1"]], "the end is lost: that is what was asked for"
    for limit in (b, b + 1, c):  # the next question is of no use without its answer
        [cut] = outcome(chat, {"messages": FOUR}, limit, "truncate").kept
        assert cut.ids.tolist() == full.ids[:b].tolist() and cut.spans.tolist() == full.spans[:2].tolist()
    [cut] = outcome(chat, {"messages": FOUR}, c + 1, "truncate").kept
    assert len(cut.ids) == c + 1 and cut.spans.tolist()[-1] == [c, c + 1]
    assert outcome(chat, {"messages": FOUR}, int(full.spans[0, 0]), "truncate").kept == []


def test_a_conversation_that_becomes_several_sequences_is_measured_by_the_longest():
    chat = chat_of("qwen3")
    turns = [user("q0"), assistant("a0", reasoning_content="r0 " * 30), user("q1"),
             assistant("a1", reasoning_content="r1")]
    row = {"messages": turns}
    lengths = [len(s.ids) for s in chat.encode(turns)]
    assert len(lengths) == 2 and lengths[0] > lengths[1]
    found = outcome(chat, row, lengths[0])
    assert found.kept is found.full and found.longest == lengths[0]
    assert outcome(chat, row, lengths[0] - 1).kept == []
    assert ["r0" in text for text in shown(chat, found.kept)] == [True, False], "as Qwen 3 is shown earlier turns"
    # Each sequence is cut by itself, and the first one's answer lies behind its reasoning.
    cut = outcome(chat, row, lengths[0] - 1, "truncate").kept
    assert [len(s.ids) for s in cut] == [lengths[0] - 1, lengths[1]]
    assert [stretch[-1].endswith("<|im_end|>") for stretch in learned(chat, cut)] == [False, True]
    # Split leaves out the first exchange, which fits nowhere; the second one stands without it.
    split = outcome(chat, row, lengths[0] - 1, "split").kept
    assert learned(chat, split) == [["<think>\nr1\n</think>\n\na1<|im_end|>"]] and "q0" not in shown(chat, split)[0]


def test_plain_texts_are_cut_between_tokens():
    chat = chat_of("gemma")
    text = "The price of a bond falls when rates rise. " * 8
    full = chat.encode_text(text)
    assert full.spans.tolist() == [[1, len(full.ids)]], "everything but BOS is learned"
    assert same(outcome(chat, {"text": text}, len(full.ids)).kept, [full])
    assert outcome(chat, {"text": text}, len(full.ids) - 1).kept == []
    pieces = outcome(chat, {"text": text}, 20, "split").kept
    assert [i for n, p in enumerate(pieces) for i in p.ids[int(n > 0):]] == full.ids.tolist()
    assert [p.ids[0] for p in pieces[1:]] == [p.ids[-1] for p in pieces[:-1]]
    assert [p.spans.tolist() for p in pieces] == [[[1, len(p.ids)]] for p in pieces]
    [cut] = outcome(chat, {"text": text}, 20, "truncate").kept
    assert (cut.ids.tolist(), cut.spans.tolist()) == (full.ids[:20].tolist(), [[1, 20]])


def test_rows_of_every_kind_come_back_in_their_places():
    """Chats and texts are tokenised apart; a row that the template refuses harms no other."""
    chat = chat_of("gemma")
    rows = [{"text": "first"}, {"messages": FOUR[1:3]}, {"messages": FOUR[1:3], "tools": TOOLS}, {"text": "second"},
            {"messages": FOUR[5:7]}]
    found = Encoder(chat, 100).encode(rows)
    assert isinstance(found[2], FormatError) and "tools" in str(found[2])
    texts = [shown(chat, f.kept) for f in found if not isinstance(f, FormatError)]
    assert [("first" in t[0], "a0" in t[0], "second" in t[0], "a2" in t[0]) for t in texts] == [
        (True, False, False, False), (False, True, False, False), (False, False, True, False), (False, False, False, True)]
    assert Encoder(chat, 100).encode([]) == []


def test_a_template_that_refuses_a_piece_rejects_that_row_only():
    """As a template could that wants the first question in a form of its own."""
    tokenizer = byte_tokenizer(CHATML, SMOLLM2.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if loop.first and message['content'] == 'q1' %}"
        "{{ raise_exception('begin with another question') }}{% endif %}", 1), GPT2_WORDS)
    chat = ChatFormat(tokenizer, "llama")
    long = FOUR[1:]
    found = Encoder(chat, tokens(chat, long[:2]), "split").encode([{"messages": long}, {"messages": long[:2]}])
    assert isinstance(found[0], FormatError) and "begin with another question" in str(found[0])
    assert learned(chat, found[1].kept) == [["a0<|im_end|>"]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=5), st.integers(0, 5),
       st.integers(0, 40), st.integers(0, 40))
@examples(max_examples=200)
def test_a_part_has_the_labels_of_its_tokens(gaps, rest, start, size):
    edges, at = [], 0
    for gap, length in gaps:
        edges.append((at + gap, at + gap + length))
        at += gap + length
    whole = Encoded(np.arange(10, 10 + at + rest, dtype=np.int32), np.array(edges, np.int32))
    labels = whole.labels[start:start + size]
    if labels:
        labels[0] = IGNORE_INDEX  # nothing stands before it that could predict it
    while labels and labels[-1] == IGNORE_INDEX:
        labels.pop()
    found = part(whole, start, start + size)
    if not labels:
        assert found is None
    else:
        assert found.labels == labels and found.ids.tolist() == whole.ids[start:start + len(labels)].tolist()


# --- properties

@st.composite
def conversations(draw) -> dict:
    """Rows with turns that can be told apart: the n-th answer has the word "A<n>." in it."""
    name = draw(st.sampled_from(["gemma", "smollm2", "qwen2.5", "qwen3"]))
    words = st.integers(0, 14).map(lambda n: " word" * n)
    thinks = name == "qwen3" and draw(st.booleans())
    tools = name.startswith("qwen") and draw(st.booleans())
    turns = [system("Sys" + draw(words))] if draw(st.booleans()) else []
    answers = 0
    for n in range(draw(st.integers(1, 5))):
        turns.append(user(f"q{n}" + draw(words)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            turns += [call("weather", f"A{answers}.", city="Rome" + draw(words)), result("sunny")]
            answers += 1
        turns.append(assistant(f"A{answers}." + draw(words)))
        answers += 1
    for turn in turns:
        if turn["role"] == "assistant":
            if thinks and draw(st.booleans()):
                turn["reasoning_content"] = "why" + draw(words)
            if draw(st.integers(0, 3)) == 0:
                turn["train"] = False
    return {"chat": name, "messages": turns, **({"tools": TOOLS} if tools else {})}


def asked_for(turns: list[dict], train_on: str) -> set[str]:
    """The answers that are to be learned."""
    answers = [m for m in turns if m["role"] == "assistant"]
    return {m["content"].split()[0] for m in (answers[-1:] if train_on == "last" else answers) if "train" not in m}


def exchanges_of(turns: list[dict]) -> list[list[dict]]:
    starts = [n for n, m in enumerate(turns) if m["role"] == "user"]
    return [turns[a:b] for a, b in zip(starts, [*starts[1:], len(turns)])]


def times_learned(chat: ChatFormat, sequences) -> Counter:
    return Counter(word for stretches in learned(chat, sequences) for stretch in stretches
                   for word in stretch.replace("<", " <").split() if word.startswith("A") and word.endswith("."))


@given(conversations(), st.integers(20, 150), st.sampled_from(["all", "last"]))
@examples(max_examples=300)
def test_what_is_kept(row, limit, train_on):
    """No kept sequence is too long; what fits is as it is; and each policy keeps what it promises, once."""
    chat, turns, tools = chat_of(row["chat"]), row["messages"], row.get("tools")
    full = chat.encode(turns, tools, train_on=train_on)
    wanted = asked_for(turns, train_on)
    assert times_learned(chat, full) == Counter(wanted)
    fits = all(len(s.ids) <= limit for s in full)
    for on_long in ("drop", "fail", "truncate", "split"):
        found = outcome(chat, row, limit, on_long, train_on)
        assert same(found.full, full) and found.longest == max((len(s.ids) for s in full), default=0)
        assert all(s.trained > 0 and len(s.ids) <= limit and s.spans[-1, 1] == len(s.ids) for s in found.kept)
        if fits:
            assert found.kept is found.full
        elif on_long in ("drop", "fail"):
            assert found.kept == []
        elif on_long == "truncate":
            expected = []
            for s in full:
                labels = s.labels[:limit]
                while labels and labels[-1] == IGNORE_INDEX:
                    labels.pop()
                expected += [(s.ids[:len(labels)].tolist(), labels)] if labels else []
            assert [(s.ids.tolist(), s.labels) for s in found.kept] == expected
    if not fits:
        check_split(chat, turns, tools, outcome(chat, row, limit, "split", train_on).kept, limit, train_on)


def check_split(chat: ChatFormat, turns: list[dict], tools, pieces, limit: int, train_on: str) -> None:
    wanted = asked_for(turns, train_on)
    turns = [m | {"train": False} if m["role"] == "assistant" and m["content"].split()[0] not in wanted else m
             for m in turns]
    first = [m for m in turns[:1] if m["role"] == "system"]
    exchanges = exchanges_of(turns)

    def fits(run: list[list[dict]]) -> bool:
        return all(len(s.ids) <= limit for s in chat.encode([*first, *sum(run, [])], tools))

    alone = [exchange for exchange in exchanges if asked_for(exchange, "all") and fits([exchange])]
    assert times_learned(chat, pieces) == Counter(word for exchange in alone for word in asked_for(exchange, "all"))
    assert all("Sys" in text for text in shown(chat, pieces)) or not first
    # Step by step instead of by halving: from each learned exchange backwards over what is not learned, then onwards.
    expected, done = [], 0
    for n, exchange in enumerate(exchanges):
        if n < done or not asked_for(exchange, "all") or not fits([exchange]):
            continue
        begin, end = n, n + 1
        while begin > done and not asked_for(exchanges[begin - 1], "all") and fits(exchanges[begin - 1:end]):
            begin -= 1
        while end < len(exchanges) and fits(exchanges[begin:end + 1]):
            end += 1
        while not asked_for(exchanges[end - 1], "all"):  # left to the next piece, in front of what is learned there
            end -= 1
        expected += chat.encode([*first, *sum(exchanges[begin:end], [])], tools)
        done = end
    assert same(pieces, expected)


@given(st.sampled_from(["gemma", "smollm2"]), st.text(st.characters(codec="utf-8"), min_size=1, max_size=120),
       st.integers(2, 40))
@examples(max_examples=150)
def test_texts_are_learned_once_and_never_beyond_the_limit(name, text, limit):
    chat = chat_of(name)
    full = chat.encode_text(text)
    for on_long in ("drop", "fail", "truncate", "split"):
        found = outcome(chat, {"text": text}, limit, on_long)
        assert same(found.full, [full]) and found.longest == len(full.ids)
        assert all(len(s.ids) <= limit for s in found.kept)
        if len(full.ids) <= limit:
            assert same(found.kept, [full])
        elif on_long == "split":
            assert [i for n, s in enumerate(found.kept) for i in s.ids[int(n > 0):]] == full.ids.tolist()
            assert [i for n, s in enumerate(found.kept) for i in s.labels[int(n > 0):]] == full.labels
            assert all(s.labels[0] == IGNORE_INDEX for s in found.kept)
        elif on_long == "truncate":
            assert [(s.ids.tolist(), s.labels) for s in found.kept] == [
                (full.ids[:limit].tolist(), full.labels[:limit])]
        else:
            assert found.kept == []


@pytest.mark.parametrize("on_long", ["drop", "truncate", "split"])
def test_encoding_many_rows_is_encoding_each(on_long):
    chat = chat_of("smollm2")
    rows = [{"messages": FOUR[:2 * n + 3]} for n in range(4)] + [{"text": "word " * n} for n in (1, 20)]
    together = Encoder(chat, 40, on_long).encode(rows)
    for row, found in zip(rows, together, strict=True):
        alone = outcome(chat, row, 40, on_long)
        assert same(found.kept, alone.kept) and same(found.full, alone.full)
