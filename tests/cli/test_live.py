"""A training on a terminal: the lines below the notes at several widths, without Unicode, and what stays of them."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from rich.text import Text

from gemma_tune.base.errors import UserError
from gemma_tune.cli import invocation, live
from gemma_tune.cli.console import ConsoleListener
from gemma_tune.cli.live import Course, curve
from support.command import QUICK
from support.screen import Screen, on_screen, written


@pytest.fixture
def screen(monkeypatch):
    return Screen(monkeypatch)


def step(number: int, loss: float, steps: int = 64, **more) -> dict:
    return {"step": number, "steps": steps, "epoch": number / 16, "loss": loss, "grad_norm": 1.0, "learning_rate": 1.3e-4,
            "tokens": 400 * number, "training_seconds": 2.0 * number, "tokens_per_second": 212.34,
            "seconds_left": 2.0 * (steps - number), "memory_bytes": 3_412_000_000, **more}


def evaluated(number: int, loss: float, steps: int = 64) -> dict:
    return {"step": number, "steps": steps, "eval_loss": loss}


def course(steps: int = 33, **more) -> Course:
    found = Course([evaluated(0, 3.2)])
    for number in range(1, steps + 1):
        found.add(step(number, 3.0 - number / 50, **more))
        if number % 16 == 0:
            found.add(evaluated(number, 2.9 - number / 100))
    return found


def drawn(screen, found: Course, width: int, **more) -> list[str]:
    file = screen(terminal=True, width=width, color_system=None, **more)
    from gemma_tune.cli import screen as module

    module.err.print(found, soft_wrap=False)
    return written(file).splitlines()


def test_a_training_from_rewards_shows_them(screen):
    found = Course([{"step": 0, "steps": 64, "eval_reward": 0.2}])
    for number in range(1, 9):
        found.add(step(number, 1e-9, reward=number / 10, frac_reward_zero_std=0.375, **{
            "completions/mean_length": 21.4, "completions/clipped_ratio": 0.0}))
    for number, reward in ((8, 0.7), (9, 0.6)):
        found.add({"step": number, "steps": 64, "eval_reward": reward})
    _, reward, validation, speed = drawn(screen, found, 120)
    assert re.fullmatch(r"    reward 0\.800 ▲  ▁[▁▂▃▄▅▆▇█]+█", reward) and found.best == (8, 0.7)
    assert re.fullmatch(r"validation 0\.600 ▼  ▁█▇  highest 0\.700 after step 8", validation)
    assert speed.startswith("     speed 21 tokens an answer · 38% of the groups had one reward · 212 tok/s")


@pytest.mark.parametrize("width", [80, 120, 200])
def test_what_is_shown_of_a_training(screen, width):
    bar, loss, validation, speed = drawn(screen, course(), width)
    assert re.fullmatch(r"  training ━+─+  33/64  52%  1m02s left", bar) and len(bar) == min(width, 120)
    assert re.fullmatch(r"      loss 2\.340 ▼  █[▁▂▃▄▅▆▇█]+▁", loss)
    assert re.fullmatch(r"validation 2\.580 ▼  █▃▁  lowest 2\.580 after step 32", validation)
    assert speed == "     speed 212 tok/s · 3.41 GB memory · learning rate 1.30e-04 · epoch 2.06"
    assert all(Text(line).cell_len <= width for line in (bar, loss, validation, speed))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_too_wide_and_what_is_cut_says_so(screen, encoding):
    whole = drawn(screen, course(), 120, encoding=encoding)
    for width, found in itertools.product((12, 20, 33, 47, 60, 79), (course(), course(0), course(64))):
        lines = drawn(screen, found, width, encoding=encoding)
        assert all(Text(line).cell_len <= width for line in lines)
        if found.step == 33:  # but for the bar and the curves, every word is one of the whole
            words = {word.strip(",") for line in whole for word in line.split()}
            cut = [line for line in lines
                   if not {word.strip(",") for word in line.split() if word.strip("━─#-▁▂▃▄▅▆▇█_.=+*")} <= words]
            assert bool(cut) == (width < 20) and all(line.endswith(("…", "..."[:width])) for line in cut)
    assert encoding == "utf-8" or all(map(str.isascii, whole)), whole


def test_a_terminal_without_unicode(screen):
    bar, loss, validation, speed = drawn(screen, course(), 80, encoding="ascii")
    assert re.search(r" #+-+  33/64 ", bar) and " 2.340 v  #" in loss and "\\u" not in bar + loss + validation + speed
    assert "tok/s, 3.41 GB memory, " in speed


def test_the_direction_is_that_against_the_last_and_the_lowest_is_of_all(screen):
    found = Course([evaluated(0, 3.0), step(1, 2.0), step(2, 2.5), evaluated(2, 2.0), step(3, 2.5), evaluated(3, 2.1)])
    _, loss, validation, _ = drawn(screen, found, 80)
    assert "2.500   " in loss and "2.100 ▲" in validation and "lowest 2.000 after step 2" in validation
    found.add(step(4, 2.6))
    assert "2.600 ▲" in drawn(screen, found, 80)[1]
    assert "lowest 3.000 before the first step" in drawn(screen, Course([evaluated(0, 3.0), step(1, 2.0)]), 80)[2]


def test_the_memory_of_a_gpu(screen):
    speed = drawn(screen, course(peak_memory_bytes=5_100_000_000), 80)[-1]
    assert "3.41 GB memory, 5.10 GB at most" in speed and len(speed) <= 80


def test_losses_that_are_no_numbers(screen):
    found = Course([evaluated(0, math.nan), step(1, math.inf), step(2, math.nan), evaluated(2, math.nan)])
    assert "nan" in drawn(screen, found, 80)[1]
    assert curve([math.nan, 1.0, math.inf, 2.0], 10) == "▁█" and curve([math.nan], 10) == "" and curve([2, 2], 9) == "▁▁"


def test_a_curve_averages_what_has_no_room():
    assert curve([float(n) for n in range(800)], 8) == "▁▂▃▄▅▆▇█"
    assert curve([3, 1, 3, 1, 0, 0], 3) == "██▁" and len(curve(range(37), 10)) == 10
    assert curve(range(7), 7, blocks=False) == "_.-=+*#"


def test_the_time_left_goes_down_between_two_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    found = Course([step(60, 1.0)])
    assert found.seconds_left == 8.0
    now[0] += 3
    assert found.seconds_left == 5.0
    now[0] += 30
    assert found.seconds_left == 0.0


# --- as a training tells it

def told(listener: ConsoleListener, steps: int = 8) -> None:
    listener.training([])
    listener.metrics(evaluated(0, 3.0, steps))
    for number in range(1, steps + 1):
        listener.metrics(step(number, 3.0 - number / 10, steps))
        if number % 4 == 0:
            listener.metrics(evaluated(number, 3.0 - number / 20, steps))


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_and_keeps_the_evaluations(screen, width, monkeypatch):
    monkeypatch.setattr(live, "PER_SECOND", 0.01)  # each frame is drawn where the test asks for it
    file = screen(terminal=True, width=width)
    listener = ConsoleListener()
    told(listener, 8)
    seen = written(file)
    listener.close()
    assert "8/8" in seen and "tok/s" in seen
    assert written(file).count("\x1b[?25l") == written(file).count("\x1b[?25h") == 1
    assert [line for line in on_screen(written(file)) if line] == [
        f"  step {n}: validation loss {loss:.4f}" for n, loss in ((0, 3.0), (4, 2.8), (8, 2.6))]


def test_stopped_in_the_middle_it_leaves_a_clean_terminal(screen):
    file = screen(terminal=True)
    listener = ConsoleListener()
    listener.metrics(step(1, 3.0))
    listener.progress("loading", 1, 3)
    listener.warn("stopping after this step")
    assert "\x1b[?25h" not in written(file) and "loading" in "".join(on_screen(written(file)))
    invocation._show(UserError("it failed", "try again"), {})
    text = written(file)
    assert text.index("\x1b[?25h") < text.index("it failed")
    assert [line for line in on_screen(text) if line] == ["! stopping after this step", "Error: it failed",
                                                          "Hint: try again"]
    listener.close()
    assert written(file) == text


def test_lines_above_do_not_disturb_it(screen):
    file = screen(terminal=True, width=80)
    listener = ConsoleListener()
    listener.training([step(1, 3.5), evaluated(1, 1.5)])
    listener.metrics(step(2, 3.0))
    for n in range(3):
        listener.note(f"note {n}")
    shown = [line for line in on_screen(written(file)) if line]
    assert shown[:3] == ["· note 0", "· note 1", "· note 2"]
    assert [line.split()[0] for line in shown[3:]] == ["training", "loss", "validation", "speed"]
    assert "lowest 1.500 after step 1" in shown[5], "what an interrupted part had"
    listener.close()


@pytest.mark.parametrize("terminal, environment", [
    (False, {}), (True, {"TERM": "dumb"}), (True, {"FORCE_COLOR": "1"})], ids=["file", "dumb", "coloured file"])
def test_elsewhere_there_are_lines(screen, terminal, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = screen(terminal=terminal, environment=environment, color_system=None)
    listener = ConsoleListener()
    listener.detail("device", "computing in fp32")
    listener.overview({"model": "m"})
    told(listener, 2)
    listener.progress("loading", 1, 1)
    listener.close()
    assert re.sub(r"\x1b\[[\d;]*m", "", written(file)) == (
        "· computing in fp32\n  step 0: validation loss 3.0000\n  step 1/2  loss 2.900  212 tok/s  0m02s left\n"
        "  step 2/2  loss 2.800  212 tok/s  0m00s left\n  loading: 100%\n")


def test_lines_tell_how_far_a_task_is_and_what_is_left(screen, monkeypatch):
    file = screen(terminal=False)
    now = [100.0]
    monkeypatch.setattr("gemma_tune.cli.console.time.monotonic", lambda: now[0])
    listener = ConsoleListener()
    for seconds, done in ((0, 0), (1, 10), (3, 30), (2, 35), (30, 40), (1, 41), (9, 60), (8, 100)):
        now[0] += seconds
        listener.progress("answering prompts", done, 100)
    listener.progress("answering prompts", 0, 100)  # once more
    assert written(file).splitlines() == [
        "  answering prompts: 0%", "  answering prompts: 30%  0m09s left", "  answering prompts: 40%  0m54s left",
        "  answering prompts: 100%", "  answering prompts: 0%"]


def test_quiet_is_quiet(screen):
    file = screen(terminal=True)
    listener = ConsoleListener(quiet=True)
    listener.detail("device", "computing in fp32")
    listener.overview({"model": "m"})
    told(listener)
    listener.progress("loading", 1, 2)
    listener.close()
    assert written(file) == ""


def test_it_is_drawn_at_most_four_times_per_second():
    assert 0 < live.PER_SECOND <= 4


# --- what begins

LINES = {"model": "google/gemma-3-270m-it, 268 million parameters", "batch": "4 sequences a step, 4 at once (they fit)",
         "steps": "65 sequences x 4 epochs in batches of 4: 68 steps"}


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_begins_is_gathered_in_one_panel(screen, width, encoding):
    file = screen(terminal=True, width=width, encoding=encoding, color_system=None)
    listener = ConsoleListener()
    listener.detail("memory", "memory: about 2.29 GB of 24.00 GB available (weights 0.54 GB, activations 1.20 GB)")
    listener.detail("batch", "batch size 4: proposed")
    listener.overview(LINES | ({"name": "模型" * 40} if encoding == "utf-8" else {}))
    listener.detail("adapter", "is in it")
    listener.close()
    lines = written(file).splitlines()
    assert all(Text(line).cell_len <= width for line in lines) and "…" not in "".join(lines)
    text = re.sub(r"[\s│|]+", "", "".join(lines))
    for part in (*LINES.values(), "batch size 4: proposed", "about 2.29 GB of 24.00 GB", "activations 1.20 GB)"):
        assert "".join(part.split()) in text
    assert text.count("memory") == 1 and "isinit" not in text
    assert encoding == "utf-8" or all(map(str.isascii, lines))


def test_details_whose_panel_never_comes_are_notes(screen):
    file = screen(terminal=True, color_system=None)
    listener = ConsoleListener()
    listener.detail("memory", "memory: about 2.29 GB")
    assert written(file) == ""
    listener.close()
    assert on_screen(written(file))[0] == "· memory: about 2.29 GB"


# --- the whole command

@pytest.mark.parametrize("width", [80, 120])
def test_a_training_from_its_begin_to_its_end(screen, cli, trained, width, monkeypatch):
    monkeypatch.setattr(live, "PER_SECOND", 4)
    file = screen(terminal=True, width=width, color_system=None)
    result = cli("train", *QUICK, "--force", "--json", "--run", trained)
    assert result.code == 0 and result.json["status"] == "done"
    text = written(file)
    lines = [line for line in on_screen(text) if line]
    top, bottom = (next(n for n, line in enumerate(lines) if line.startswith(sign)) for sign in "╭╰")
    names = [line[2:].split("  ")[0].strip() for line in lines[top + 1:bottom]]
    assert [name for name in names if name][:6] == ["model", "data", "adapter", "batch", "steps", "learning rate"]
    assert {"device", "memory"} <= set(names)
    assert not any(line.startswith(("· computing", "· memory", "· LoRA", "· 11 sequences")) for line in lines)
    frames = [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text))
              if line.startswith(("│", "╭", "╰", "  training", "      loss", "validation", "     speed"))]
    assert any("3/3  100%" in line for line in frames) and any(" tok/s · " in line for line in frames)
    assert all(Text(line).cell_len <= width for line in frames)
    assert not any("tok/s · " in line for line in lines), "nothing of it stays"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")
