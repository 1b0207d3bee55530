"""Which of two answers is likelier: against whole logits, for base and tuned model, through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gemma_tune.encoding.sequences import Encoder, Outcome, part
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.evaluate import compare as compare_module
from gemma_tune.evaluate import rows as rows_module
from gemma_tune.evaluate.preferences import Preferences, better_of, preferences_of
from gemma_tune.measure.likelihood import Wanted, negative_log_likelihoods
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.report.tables import verdict


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(question: str, chosen: str, rejected: str, *before: dict) -> dict:
    """As it is prepared; ``prompt`` and ``chosen`` are for the tests."""
    asked = [m | ({"train": False} if m["role"] == "assistant" else {}) for m in (*before, turn("user", question))]
    return {"messages": [*asked, turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}


def prompt(row: dict) -> list[dict]:
    return [{name: value for name, value in m.items() if name != "train"} for m in row["messages"][:-1]]


def answers(row: dict) -> list[str]:
    return [row["messages"][-1]["content"], row["rejected"][0]["content"]]


PAIRS = [pair(f"Say number {n}.", f"The number is {n}, no more.", f"Sorry, what do you mean by {n}?") for n in (3, 7)]
LONGER = pair("And 5?", "The number is 5, no more.", "No.", turn("system", "Be brief."), turn("user", "Say number 3."),
              turn("assistant", "The number is 3, no more."))
JUDGED = [{"messages": [*row["messages"][:-1], turn("assistant", text)], "kto_tag": good}
          for row in PAIRS for text, good in zip(answers(row), (True, False))]


@pytest.fixture
def chat(talkative):
    return load_format(talkative, "gemma3_text")


def test_the_answer_alone_is_predicted_behind_the_same_prompt(chat):
    found = preferences_of([*PAIRS, LONGER], Encoder(chat, 200))
    assert found.paired and found.left_out == 0
    for row, better, worse in zip([*PAIRS, LONGER], found.better, found.worse, strict=True):
        for text, wanted in zip(answers(row), (better, worse)):
            assert chat.tokenizer.decode(wanted.labels[:-1]) == text
            assert wanted.labels[-1] == chat.terminator_id
            assert wanted.at.tolist() == list(range(wanted.at[0], wanted.at[0] + len(wanted.at)))
        start = better.at[0] + 1
        assert start == worse.at[0] + 1 and better.ids[0, :start].tolist() == worse.ids[0, :start].tolist()


def test_a_pair_with_an_answer_that_does_not_fit_is_left_out_whole(chat):
    long = pair("Say number 3.", "The number is 3, no more.", "fox " * 200)
    for how in ("drop", "split"):
        found = preferences_of([PAIRS[0], long], Encoder(chat, 100, how))
        assert (len(found.better), len(found.worse), found.left_out) == (1, 1, 1)
    found = preferences_of([long], Encoder(chat, 100, "truncate"))
    assert found.left_out == 0 and found.worse[0].ids.shape[1] < 100


def test_an_answer_that_a_limit_has_cut_is_no_reference(chat):
    [outcome] = Encoder(chat, 200).encode([LONGER])
    [whole, _] = outcome.full
    assert rows_module.reference_of(chat, Outcome([whole], [whole])) == "The number is 5, no more."
    cut = part(whole, 0, len(whole.ids) - 2)
    assert rows_module.reference_of(chat, Outcome([cut], [cut])) is None


def test_other_rows_are_none_of_this(chat):
    plain = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    assert preferences_of([plain, {"text": "c"}], Encoder(chat, 100)) is None
    assert better_of(plain) == plain
    assert better_of(JUDGED[1]) is None
    assert better_of(JUDGED[0]) == better_of(PAIRS[0]) == {"messages": PAIRS[0]["messages"]}


def wanted(tokens: int) -> Wanted:
    return Wanted(np.zeros((1, tokens + 1), np.int64), np.arange(tokens), np.zeros(tokens, np.int64))


def test_figures_by_hand():
    found = Preferences([wanted(2), wanted(10), wanted(4)], [wanted(4), wanted(2), wanted(4)], True)
    base = np.array([3.0, 20, 8, 4, 6, 8])
    tuned = np.array([2.0, 10, 8, 8, 12, 9])
    measures = found.measures(base, tuned, 0)
    value = {name: [m["base"][0], m["tuned"][0], m["difference"][0]] for name, m in measures.items()}
    assert value["preferred"] == pytest.approx([(1 + 0 + 0.5) / 3, 1, 0.5])
    assert value["preferred_per_token"] == pytest.approx([(0 + 1 + 0.5) / 3, 1, 0.5])
    assert value["margin"] == pytest.approx([(1 - 14 + 0) / 3, (6 + 2 + 1) / 3, (9 + 13) / 3])
    assert value["better_log_probability"] == pytest.approx([-31 / 3, -20 / 3, 11 / 3])
    assert value["worse_log_probability"] == pytest.approx([-6, -29 / 3, -11 / 3])
    assert {m["rows"] for m in measures.values()} == {3}
    low, high = measures["margin"]["difference"][1:]
    assert 0 < low < 22 / 3 < high, "every pair's margin grew or stayed"
    judged = Preferences([wanted(2)], [wanted(4), wanted(2)], False).measures(base[:3], tuned[:3], 0)
    assert list(judged) == ["better_log_probability", "worse_log_probability"]
    assert judged["worse_log_probability"]["difference"][0] == 5
    assert list(Preferences([], [wanted(4)], False).measures(base[:1], tuned[:1], 0)) == ["worse_log_probability"]
    assert verdict("worse_log_probability", measures["worse_log_probability"]) == "better"


def test_log_probabilities_are_those_of_whole_logits(chat, talkative):
    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    found = preferences_of([*PAIRS, LONGER], Encoder(chat, 200))
    nats = negative_log_likelihoods(model, found.sequences)
    for row, text, value in [(row, answers(row)[side], nats[n + 3 * side]) for side in (0, 1)
                             for n, row in enumerate([*PAIRS, LONGER])]:
        asked = chat.prompt_ids(prompt(row))
        answer = [*chat.tokenizer(text, add_special_tokens=False).input_ids, chat.terminator_id]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1:-1]
        expected = -torch.log_softmax(logits.double(), 1)[range(len(answer)), answer].sum()
        assert value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("examples", "names"), [
    (PAIRS, {"preferred", "preferred_per_token", "margin", "better_log_probability", "worse_log_probability"}),
    (JUDGED, {"better_log_probability", "worse_log_probability"})])
def test_eval_compares_base_and_tuned(cli, fluent, monkeypatch, examples, names):
    monkeypatch.setattr(rows_module, "_of_run", lambda session, encoder, limit: (examples, len(examples)))
    computed = []
    monkeypatch.setattr(compare_module, "negative_log_likelihoods", lambda model, sequences, *more: computed.append(
        [wanted.ids.tobytes() for wanted in sequences]) or negative_log_likelihoods(model, sequences, *more))
    result = cli("eval", "--max-new-tokens", 16, "--json", "--dtype", "fp32")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    measures = summary["measures"]
    assert names | {"loss", "chrf", "general_loss"} <= measures.keys()
    assert measures["loss"]["rows"] == 2, "of the better answers alone"
    assert (summary["rows"], summary["rows_there"]) == (len(examples), len(examples))
    assert [a["prompt"] for a in summary["answers"]] == [prompt(row) for row in PAIRS]
    assert [a["reference"] for a in summary["answers"]] == [answers(row)[0] for row in PAIRS]
    assert len(computed) == 2 and all(len(ids) == len(set(ids)) for ids in computed), "each sequence once per model"
    likelihood, loss = measures["better_log_probability"], measures["loss"]
    for side in ("base", "tuned"):
        assert -2 * likelihood[side][0] == pytest.approx(loss["tokens"] * loss[side][0]), "of the same two answers"
    better, worse = (measures[f"{name}_log_probability"] for name in ("better", "worse"))
    tokens = measures["loss"]["tokens"]
    assert better["base"][0] * 2 == pytest.approx(-measures["loss"]["base"][0] * tokens, rel=1e-5)
    assert better["difference"][0] > 5, "what was learned"
    assert (better["rows"], worse["rows"]) == (2, 2)
    if examples is PAIRS:
        assert measures["preferred"]["tuned"] == [1, 1, 1]
        assert measures["margin"]["tuned"][0] == pytest.approx(better["tuned"][0] - worse["tuned"][0])
        assert "better answer is likelier" in result.err
        for page in ("report.md", "report.html"):
            assert "better answer is likelier" in (fluent / page).read_text(encoding="utf-8")
    kept = json.loads((fluent / "manifest.json").read_text())["stages"]["eval"]["summary"]["measures"]
    assert kept == measures


def test_bad_answers_count_among_the_rows_that_a_limit_leaves(cli, fluent, monkeypatch):
    monkeypatch.setattr(rows_module, "_of_run", lambda session, encoder, limit: (JUDGED[:limit], len(JUDGED)))
    result = cli("eval", "--limit", 2, "--max-new-tokens", 2, "--json", "--dtype", "fp32")
    assert result.code == 0, result.err
    assert (result.json["summary"]["rows"], result.json["summary"]["rows_there"]) == (2, 4)
    assert "2 of 4 rows are measured; --limit 0 takes all" in result.err and "keeps more aside" not in result.err
