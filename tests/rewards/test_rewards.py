"""What answers are worth: the built-in rewards, how they are written, and programs that score, also those that fail."""

from __future__ import annotations

import json
import os
import sys
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.config.rewards import in_words, problems_of, read
from gemma_tune.config.settings import as_flags, resolve
from gemma_tune.config.settings_file import load_yaml
from gemma_tune.config.stages import TrainConfig
from gemma_tune.rewards import program as reward_program
from gemma_tune.rewards import scores as rewards
from gemma_tune.rewards.last_number import last_number
from gemma_tune.rewards.program import RewardProgram, refuse_missing, words_of
from gemma_tune.rewards.scores import Scored, Scorer

PROMPT = [{"role": "user", "content": "How many? 多少"}]
# Reads all lines before it writes any number, writes to standard error as well, and says what it was given.
SCORES = """
import json, sys
given = []
for line in sys.stdin:
    given.append(json.loads(line))
    print("thinking about", given[-1]["answer"], file=sys.stderr)
    if len(given) == 2:
        for one in given:
            print(len(one["answer"]) / 2 if one["prompt"][0]["content"].endswith("多少") and one["reference"] == "4" else -1, flush=True)
        given.clear()
"""


def scored(answer: str, reference: str = "4", ended: bool = True) -> Scored:
    return Scored(PROMPT, answer, reference, ended)


def score(reward: str, *answers: Scored) -> list[float]:
    with Scorer(read([reward])) as scorer:
        return scorer.scores(answers)[:, 0].tolist()


@pytest.mark.parametrize(("reward", "answer", "reference", "expected"), [
    ("exact", " It \n rains. ", "It rains.", 1), ("exact", "It rains", "It rains.", 0), ("exact", "e\u0301", "\u00e9", 1),
    ("contains", "I say: It  rains. Always.", "It rains.", 1), ("contains", "It rain", "It rains.", 0),
    ("number", "So 6 x 200 = 1,200.", "#### 1200", 1), ("number", "1,200 and then 3", "1200", 0), ("number", "no idea", "12", 0),
    ("number", "twelve", "twelve", 0), ("number", "is 3/4", "0.75", 1), ("number", "$-0.50", "-1/2", 1), ("number", "5-3", "3", 1),
    ("number", "１２", "12", 1), ("number", "1/0", "1/0", 0), ("json", '{"a": [1, 2]}\n', "", 1), ("json", "{'a': 1}", "", 0), ("json", "", "", 0),
    ("json", "[NaN]", "", 0), ("json", "```json\n{}\n```", "", 0), ("json", "[" * 100_000, "", 0), ("regex:^\\d{1,3}$", "123", "", 1),
    ("regex:^\\d{1,3}$", "1234", "", 0), ("contains", "anything", " ", 0), ("chrf", "It rains.", "It rains.", 1), ("chrf", "xyz", "It rains.", 0)])
def test_rewards_of_an_answer(reward, answer, reference, expected):
    assert score(reward, scored(answer, reference)) == [expected]


def test_a_reward_between_none_and_all_and_of_the_end():
    [near] = score("chrf", scored("It rained.", "It rains."))
    assert 0.3 < near < 1
    assert score("ended", scored("a"), scored("a", ended=False)) == [1, 0]


def test_several_rewards_have_columns_and_weights():
    with Scorer(read(["exact=2", "regex:a", "regex=-0.5:b"])) as scorer:
        found = scorer.scores([scored("4"), scored("ab"), scored("b")])
        assert found.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
        assert (found @ scorer.weights).tolist() == [2, 0.5, -0.5]
        assert [one.name for one in scorer.rewards] == ["exact", "regex", "regex_2"]
        assert scorer.scores([]).shape == (0, 3)


@pytest.mark.parametrize(("text", "value"), [
    ("25 m²", 25), ("5 m2", 5), ("25 m^2", 25), ("5 m s^{-1}", 5), ("x_1 = 3, so x_2", 3), ("CO₂", None), ("v1.5", None),
    ("2½", Fraction(5, 2)), ("-2 ¾", Fraction(-11, 4)), ("⅓", Fraction(1, 3)), ("1 1/2", Fraction(3, 2)),
    ("1.5e3", 1500), ("so 2.5E+3 J.", 2500), ("1e5.", 10**5), ("6.02 × 10^23", 602 * 10**21), (r"2 \times 10^{-3}", Fraction(1, 500)),
    ("10²³", 10**23), ("5 x 10⁻¹", Fraction(1, 2)), ("2^10", 1024), ("2^0.5", None), ("0^-1", None), ("10^999999999999", None),
    ("1e999999999999", None), ("-$5", -5), ("-¥5", -5), (r"−\$ 5", -5), ("￥５", 5), ("－５．５", Fraction(-11, 2)), ("答案是-5", -5),
    ("50%-60%", 60), ("50 %", 50), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)), (r"3\frac{1}{2}$", Fraction(7, 2)),
    ("1 200", 1200), ("1\u202f200\u202f000.5", Fraction(2400001, 2)), ("1{,}200", 1200), ("１，２００", 1200), ("1 2005", 2005),
    ("12,34", Fraction(617, 50)), ("0,125", Fraction(1, 8)), ("1,2,3", 3), ("**-5**", -5), ("_5_", 5), ("3rd", 3)])
def test_the_last_number(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize("text", ["9" * 5000, "1," * 3000 + "x", "-" * 5000, "1/" + "9" * 5000, "1 200 " * 3000, "-$ " * 3000,
                                  "1e" + "9" * 5000, "9" * 900 + "^9", "a^{" * 3000, "1²" * 3000, "a" + "9" * 5000 + ".5"])
def test_absurd_numbers_take_no_time(text):
    began = time.monotonic()
    last_number(text)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("written", "problem"), [
    ("exakt", "'exakt' is not one of exact, contains, number, chrf, json, ended, regex:PATTERN, command:PROGRAM"), ("exakt", "did you mean `exact`?"),
    ("exact=0", "with the weight 0, 'exact=0' counts for nothing"), ("exact:x", "exact takes no argument"), ("regex", "regex needs a pattern"),
    ("regex:(", "is no regular expression"), ("command:", "command needs a program"), ("exact=some", "the weight 'some' of 'exact=some' is no number"),
    ("regex=:a", "the weight '' of 'regex=:a' is no number"), ("exact=inf", "is no number; write one such as 0.5"), ("exact,json", "is several")])
def test_rewards_that_are_none(written, problem):
    [found] = problems_of([written])
    assert found.startswith("reward: ") and problem in found


def test_a_reward_that_is_there_twice():
    assert "is there twice" in problems_of(["exact", "exact=2"])[0]
    assert problems_of(["regex:a", "regex:b"]) == []


@pytest.mark.parametrize(("given", "expected"), [
    (["exact=1e-1,json"], [("exact", "", 0.1), ("json", "", 1)]),
    (["command:python score.py --threshold=0.5"], [("command", "python score.py --threshold=0.5", 1)]),
    (["ended, command=2:python s.py --kinds exact,json", "json=-1"], [("ended", "", 1), ("command", "python s.py --kinds exact,json", 2), ("json", "", -1)]),
    (["regex:answer=4", "regex=0.5:foo,json"], [("regex", "answer=4", 1), ("regex_2", "foo,json", 0.5)]),
    (["exact, regex = -1 : [a-z]{1,3}:,command:x"], [("exact", "", 1), ("regex", "[a-z]{1,3}:,command:x", -1)])])
def test_patterns_and_commands_are_taken_as_they_are(given, expected):
    """Also by YAML, as text or as a list, and again from what was recorded, and from the flags that hints give."""
    config = resolve(TrainConfig, {"reward": given}).config
    assert [(one.name, one.argument, one.weight) for one in read(config.reward)] == expected
    for again in (list(config.reward), *([given[0]] if len(given) == 1 else [])):
        assert resolve(TrainConfig, {}, {"reward": again}).config == config
    flags = as_flags(TrainConfig, {"reward": config.reward})
    assert flags[::2] == ["--reward"] * len(expected) and resolve(TrainConfig, {"reward": flags[1::2]}).config == config


def test_rewards_of_a_settings_file(tmp_path):
    path = tmp_path / "settings.yaml"
    for written, expected in (('"ended=0.5,regex:[ae]{1,3}"', ["ended=0.5", "regex:[ae]{1,3}"]), ('["exact,json", "regex:a,b"]', ["exact", "json", "regex:a,b"])):
        path.write_text(f"train:\n  reward: {written}\n")
        assert resolve(TrainConfig, {}, load_yaml(path)["train"]).config.reward == tuple(expected)
    for empty in ('""', '" , "', '[""]'):
        path.write_text(f"train:\n  reward: {empty}\n")
        with pytest.raises(UserError) as refused:
            load_yaml(path)
        assert "train.reward: is empty" in refused.value.problems


def test_the_overview_says_how_rewards_were_read():
    assert in_words(["exact=2", "regex:answer=4", "command=0.5:python s.py --kinds exact,json"]) == (
        "exact with the weight 2, the pattern `answer=4`, the program `python s.py --kinds exact,json` with the weight 0.5")


def test_a_pattern_that_takes_for_ever_ends_with_its_name(monkeypatch):
    monkeypatch.setattr(rewards, "MOST_SECONDS", 0.2)
    with pytest.raises(WorkFailed) as failed:
        score("regex:(a|[^b]|.)*zzz$", scored("zzz" + "a" * 60))
    assert "--reward regex:(a|[^b]|.)*zzz$ was looked for over 0.2 seconds in the answer 'zzzaaaa" in failed.value.message


# ---- programs

@pytest.fixture
def program(tmp_path):
    """A command of a Python program with this text."""
    def command(text: str) -> str:
        path = tmp_path / "score it.py"
        path.write_text(text, encoding="utf-8")
        return f'"{sys.executable}" "{path}" --some "argument, or two"'

    return command


def test_a_program_scores_several_answers_at_once(program):
    with Scorer(read([f"command=2:{program(SCORES)}", "ended"])) as scorer:
        for _ in range(2):  # it goes on
            assert scorer.scores([scored("abcd"), scored("ab", ended=False)]).tolist() == [[2, 1], [1, 0]]
        assert scorer.weights.tolist() == [2, 1]
        process = scorer._programs[0]._process
    assert process.poll() == 0, "it ended with its input"


def test_a_program_gets_an_object_on_one_line(program):
    text = "import json, sys\nfor line in sys.stdin:\n    print(float(sorted(json.loads(line)) == {}), flush=True)"
    keys = sorted(["prompt", "answer", "reference", "ended"])
    assert score(f"command:{program(text.format(keys))}", scored("a\nb\u2028c")) == [1]


def test_a_program_may_read_in_its_own_encoding_and_forget_to_flush(program, monkeypatch):
    """Such as Latin-1, in which UTF-8's bytes of a Chinese letter are others, and split lines as Python's texts do."""
    text = ("import io, json, sys\nfor line in io.TextIOWrapper(sys.stdin.buffer, 'latin-1'):\n    assert len(line.splitlines()) == 1\n"
            "    print(len(json.loads(line)['answer']))")
    monkeypatch.setattr(reward_program, "PATIENCE", 10.0)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert score(f"command:{program(text)}", scored("多少"), scored("a\u2028b\ud800")) == [2, 4]


@pytest.mark.parametrize(("more", "what"), [
    ("0.5", "wrote more numbers than it read lines, the first of them '0.5'"), ("ready", "wrote 'ready', which is no finite number")])
def test_a_number_too_many_is_no_score_of_the_next_answer(program, more, what):
    running = RewardProgram(program(f"import sys\nfor line in sys.stdin:\n    print(1, flush=True)\n    print('{more}', flush=True)"))
    try:
        assert running.scores([json.dumps({"answer": "多"})]) == [1]
        time.sleep(0.5)
        with pytest.raises(WorkFailed) as failed:
            running.scores(["{}"])
    finally:
        running.close()
    assert f"{what}; it was given {{\"answer\": \"多\"}}" in failed.value.message


@pytest.mark.parametrize(("text", "what"), [
    ("import sys\nsys.exit('no model here')", "ended with exit code 1"), ("import sys; sys.stdin.readline(); print('nan')", "wrote 'nan', which is no finite number"),
    ("import sys; sys.stdin.readline(); print('good')", "wrote 'good', which is no finite number"),
    ("import sys; sys.stdin.readline(); print()", "wrote '', which is no finite number"), ("input(); print('inf')", "wrote 'inf'"),
    ("import time\nprint(1, flush=True)\ntime.sleep(60)", "wrote nothing for 1 seconds")],
    ids=["ended", "nan", "word", "empty", "infinite", "silent"])
def test_a_program_that_fails_is_told_with_what_it_was_given(program, monkeypatch, text, what):
    monkeypatch.setattr(reward_program, "PATIENCE", 1.0 if "sleep" in text else 60.0)
    monkeypatch.setattr(reward_program, "_TO_END", 2.0)
    with pytest.raises(WorkFailed) as failed:
        score(f"command:{program(text)}", scored("an answer"), scored("x" * 10_000))
    assert what in failed.value.message and "it was given {" in failed.value.message and "score it.py" in failed.value.message
    assert '"answer": "an answer"' in failed.value.message or "sleep" in text and len(failed.value.message) < 1000
    assert ("its last words: no model here" in failed.value.message) == ("exit(" in text)
    assert "the same command goes on" in failed.value.hint


def test_a_program_that_is_not_there_is_refused_before_any_work(tmp_path):
    rewards = read(["exact", "command:no-such-program --x"])
    with pytest.raises(UserError) as refused:
        refuse_missing(rewards)
    assert "there is no program no-such-program" in refused.value.message
    with pytest.raises(UserError, match="cannot be started"):
        Scorer(rewards)
    with pytest.raises(UserError, match="cannot be read"):
        refuse_missing(read(["command:python 'score.py"]))


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_does_not_reach_a_program(program):
    running = RewardProgram(program("import sys\nfor line in sys.stdin: print(1, flush=True)"))
    try:
        assert os.getpgid(running._process.pid) != os.getpgid(0)
        assert running.scores([json.dumps({})]) == [1]
    finally:
        running.close()


@pytest.mark.skipif(os.name != "posix", reason="process groups, and what is executable")
@pytest.mark.parametrize(("command", "system"), [
    ("sleep 40; true", "posix"), ("sleep 40 & echo 1; wait", "posix"), ("sleep 40 & exit 0", "posix"), ("sleep 40; true", "nt")])
def test_what_a_program_started_ends_with_it(monkeypatch, command, system):
    monkeypatch.setattr(reward_program, "_TO_END", 0.5)
    began, running = time.monotonic(), RewardProgram(f"bash -c 'echo $$ >&2; {command}'")
    group = running._process.pid
    with monkeypatch.context() as patch:
        patch.setattr(reward_program.os, "name", system)
        running.close()
    assert time.monotonic() - began < 10 and running._process.stdout.closed
    members = [one for one in psutil.process_iter() if _group_of(one.pid) == group and one.status() != psutil.STATUS_ZOMBIE]
    assert not psutil.wait_procs(members, 5)[1]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def test_a_program_that_does_not_read_is_ended(program, monkeypatch):
    monkeypatch.setattr(reward_program, "_TO_END", 2.0)
    monkeypatch.setattr(reward_program, "PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(WorkFailed, match="wrote nothing"):
        score(f"command:{program('import time; time.sleep(60)')}", scored("x" * 1_000_000))
    assert time.monotonic() - began < 20


def test_ctrl_c_while_a_program_ends_leaves_nothing(program, monkeypatch):
    running = RewardProgram(program("import time; time.sleep(60)"))
    monkeypatch.setattr(running, "_let_end", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.close()
    assert running._process.poll() is not None


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_a_file_that_cannot_be_started_is_told_from_one_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("score.sh").write_text("#!/bin/sh\n")
    with pytest.raises(UserError) as refused:
        refuse_missing(read(["command:./score.sh --x"]))
    assert refused.value.message.startswith("./score.sh, which --reward command:./score.sh --x asks for, is there")
    assert "name what runs it before it, such as --reward 'command:python score.py', or make it one: chmod +x ./score.sh" in refused.value.hint


def test_words_of_windows(monkeypatch):
    command = r""" "C:\Program Files\python.exe" C:\score.py --opt="a b" --it's 'x'"""
    with monkeypatch.context() as patch:
        patch.setattr(reward_program.os, "name", "nt")
        words = words_of(command)
    assert words == [r"C:\Program Files\python.exe", r"C:\score.py", "--opt=a b", "--it's", "'x'"]
