"""``tune``: what it compares is what ``train`` would do, nothing tried is lost, and the run stays as it was."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from commands.test_preferences import pairs

from gemma_tune.base.errors import WorkFailed
from gemma_tune.config.settings_file import load_yaml
from gemma_tune.train import results, shape, tune_report
from gemma_tune.train import trials as trials_module
from gemma_tune.train import tune as tune_module
from gemma_tune.train.halving import Costs, Rung
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.trials import StopTrial, TrialLog, Trials
from support.command import rows, write_rows
from support.listener import Said

RUN = Path("runs/tiny-gemma")
FEW = ("--max-steps", 1, "--samples", 0, "--keep", "last")
STATE, WINNER = RUN / "tune.json", RUN / "tune.yaml"
RATES = ("--learning-rates", "1e-5,5e-3,1e-3")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes most of the time here: pictures, memory by shapes, and looking for garbage."""
    monkeypatch.setattr(tune_report, "draw", lambda path, *_, **__: path.write_bytes(b"drawn"))
    monkeypatch.setattr(shape, "_kept", lambda *_: 1 << 20)
    monkeypatch.setattr(trials_module, "_TIMED", 2)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def ran(monkeypatch):
    """The trials that were run, as (learning rate, rank, steps)."""
    found, run = [], Trials.run

    def noted(self, candidate, steps, deadline=math.inf):
        found.append((candidate.learning_rate, candidate.rank, steps))
        return run(self, candidate, steps, deadline)

    monkeypatch.setattr(Trials, "run", noted)
    return found


@pytest.fixture
def rungs(monkeypatch):
    """The plan: rungs of so many steps, whatever the time."""
    def plan(*steps):
        monkeypatch.setattr(tune_module, "plan", lambda candidates, *_: (len(candidates), [Rung(len(candidates), steps[0])]))
        monkeypatch.setattr(tune_module, "plan_rungs", lambda count, *_, least, **__: [
            Rung(count, s) for s in steps if s >= least][:1])
    return plan


def trained_loss(cli, *flags) -> float:
    done = cli("train", *flags, "--force", "--json")
    assert done.code == 0, done.err
    return done.json["summary"]["eval_loss_after"]


def by_candidate(result) -> dict[tuple[float, int], float]:
    return {(t["learning_rate"], t["rank"]): t["eval_loss"] for t in result.json["summary"]["trials"]}


# ---- what is measured ------------------------------------------------------------------------------------------------

def test_the_best_rate_is_written_for_train_and_the_run_stays_as_it_is(cli, trained, monkeypatch):
    monkeypatch.setattr(tune_report, "draw", results.draw)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and not path.name.startswith(".")}
    done = cli("tune", *RATES, "--json")
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in before} == before
    losses = by_candidate(done)
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 3 and best == (5e-3, 4), "the case itself"
    summary = done.json["summary"]
    assert (summary["learning_rate"], summary["rank"]) == best and summary["eval_loss_after"] == losses[best]
    settings = load_yaml(WINNER)["train"]
    assert settings["learning_rate"] == 5e-3 and settings["rank"] == 4 and settings["epochs"] == 1, "what was given stays"
    assert "seed" not in settings, "and what was not is left to the defaults"
    assert (RUN / "logs" / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert "the best is learning rate 0.005, rank 4" in done.err and "it has the highest learning rate" in done.err
    [step] = done.json["next"]
    assert step == "gemma-tune train --run runs/tiny-gemma --config runs/tiny-gemma/tune.yaml" and step in done.err
    # As long as the training itself, the trial was that training.
    again = cli("train", "--config", WINNER, "--json")
    assert again.code == 0, again.err
    assert again.json["summary"]["eval_loss_after"] == losses[best]
    assert again.json["summary"]["eval_loss_before"] == summary["eval_loss_before"]
    assert "tune.yaml" in cli("status").err


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_pairs_are_tuned_as_they_are_trained(cli, tiny, tmp_path, method):
    """Also where a part of the validation pairs decides, and another rank is tried."""
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs()), "--model", tiny, "--valid", 4).code == 0
    flags = ("--method", method, "--epochs", 1, "--batch-size", 2, "--rank", 4, "--dtype", "fp32", "--samples", 0)
    Path("s.yaml").write_text(f"train: {{method: {method}, epochs: 1, batch_size: 2, rank: 4, dtype: fp32, samples: 0}}\n")
    done = cli("tune", "--learning-rates", "1e-5,4e-3", "--config", "s.yaml", "--json")
    assert done.code == 0, done.err
    losses = by_candidate(done)
    assert losses[4e-3, 4] < losses[1e-5, 4] and "the best is learning rate 0.004" in done.err
    assert not (RUN / "logs" / "reference.safetensors").exists(), "nothing of the run's own is written"
    trained = cli("train", "--config", WINNER, *flags, "--learning-rate", 4e-3, "--json")
    assert trained.code == 0, trained.err
    assert trained.json["summary"]["eval_loss_after"] == losses[4e-3, 4]
    assert trained.json["summary"]["eval_loss_before"] == done.json["summary"]["eval_loss_before"]
    more = cli("tune", "--learning-rates", "4e-3", "--ranks", "2,4", "--valid-sequences", 4, "--method", method, "--config", "s.yaml",
               "--json")
    assert more.code == 0 and len(by_candidate(more)) == 2, more.err


def test_pairs_are_tuned_from_the_adapter_that_the_run_has(cli, trained, tmp_path):
    """Which has learned answers; no copy of it is made yet."""
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs()), "--run", trained, "--valid", 4).code == 0
    before = {path: path.read_bytes() for path in (trained / "tiny-gemma_lora_adapter").iterdir()}
    done = cli("tune", "--learning-rates", "1e-5,4e-3", "--json")
    assert done.code == 0, done.err
    assert "starting from the adapter" in done.err
    assert {path: path.read_bytes() for path in before} == before
    assert not any("sft" in path.name for path in trained.iterdir())
    after = cli("train", "--config", WINNER, "--json")
    assert after.code == 0, after.err
    assert after.json["summary"]["eval_loss_after"] == min(by_candidate(done).values())


def test_each_trial_is_what_train_would_do(cli, trained, ran):
    """The second one, too, which begins where the first did, with the same random numbers."""
    Path("s.yaml").write_text("train: {dora: true, dropout: 0.1, epochs: 2, eval_steps: 2}\n")
    found = by_candidate(cli("tune", "--learning-rates", "1e-3,4e-3", "--config", "s.yaml", "--json"))
    assert ran == [(1e-3, 4, 6), (4e-3, 4, 6)]
    assert found[4e-3, 4] == trained_loss(cli, "--config", "s.yaml", "--lr", 4e-3)


def test_all_weights_have_no_rank(cli, trained):
    """What was found for them is nothing for an adapter, and the other way round."""
    flags = ("--learning-rates", "1e-4,1e-3", "--epochs", 1)
    refused = cli("tune", "--full", "--ranks", "4,8", *flags)
    assert refused.code == 2 and "--ranks names ranks of adapters" in refused.err and "--no-full" in refused.err
    done = cli("tune", "--full", *flags, "--json")
    assert done.code == 0 and "the best is learning rate 0.001: validation loss" in done.err and "rank 16" not in done.err, done.err
    assert "rank" not in done.json["summary"] and "rank" not in WINNER.read_text() and "full: true" in WINNER.read_text()
    told = f"{WINNER} has the settings that `tune` found best"
    assert told not in cli("train", "--rank", 2, *FEW).err and told in cli("train", "--full", *FEW).err.replace("\n", " ")
    best = cli("train", "--config", WINNER, *FEW)
    assert best.code == 0 and "learning_rate 0.001 (of a settings file)" in best.err.replace("\n", " "), best.err
    other = cli("train", "--config", WINNER, "--no-full", "--dry-run")
    assert other.code == 0 and "the learning rate 0.001 of the settings file is one for all weights: LoRA learns" in other.err
    assert "is one for" not in cli("train", "--config", WINNER, "--no-full", "--lr", 1e-3, "--dry-run").err
    assert cli("tune", "--no-full", *flags).code == 0 and "full: false" in WINNER.read_text()
    other = cli("train", "--config", WINNER, "--full", "--rank", 16, "--dry-run")
    assert other.code == 0 and "is one for LoRA: all weights learn with a tenth of it" in other.err, other.err


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_all_weights_begin_each_trial_from_their_file(cli, trained, ran, monkeypatch, start):
    """No copy of them is kept, and none of what the optimiser knew."""
    remember, restart, kept = Trials._remember, Trials._restart, []
    monkeypatch.setattr(Trials, "_remember", lambda self: remember(self) or kept.append(self._start))

    def restarted(self):
        before = self._trainer.optimizer
        restart(self)
        assert self._trainer.optimizer is None and not (before and before.state)

    monkeypatch.setattr(Trials, "_restart", restarted)
    flags = ("--full", "--dtype", "bf16")
    if start == "adapter":
        assert cli("train", *flags, "--lr", 1e-3, "--max-steps", 2, "--samples", 0, "--force").code == 0
        shutil.copytree(RUN / "tiny-gemma_lora_adapter", "given")
        Path("s.yaml").write_text("train: {from_adapter: given, dtype: bf16}\n")
        flags = ("--config", "s.yaml")
    found = by_candidate(cli("tune", *flags, "--learning-rates", "1e-3,4e-3", "--json"))
    assert [rate for rate, *_ in ran] == [1e-3, 4e-3] and kept and not any(kept)
    assert found[4e-3, 0] == trained_loss(cli, *flags, "--lr", 4e-3)


def test_modules_beside_ranks_are_the_base_s_again(cli, trained):
    """Whose weights have been on the disk."""
    Path("s.yaml").write_text("train: {modules_to_save: [embed_tokens, o_proj]}\n")
    flags = ("--config", "s.yaml")
    found = by_candidate(cli("tune", "--learning-rates", "1e-3,4e-3", "--ranks", "2,4", *flags, "--json"))
    assert found[4e-3, 2] == trained_loss(cli, "--lr", 4e-3, "--rank", 2, *flags)


def test_ranks_are_tried_on_the_same_weights(cli, trained, ran, monkeypatch):
    load, loaded = tune_module.load_model, []
    monkeypatch.setattr(tune_module, "load_model", lambda *args, **how: loaded.append(load(*args, **how)) or loaded[0])
    done = cli("tune", "--learning-rates", "1e-3,4e-3", "--ranks", "2,4", "--json")
    assert done.code == 0, done.err
    found = by_candidate(done)
    assert [rank for _, rank, _ in ran] == [4, 4, 2, 2], "another adapter is made once"
    [model] = loaded
    assert "forward" not in vars(model) and not [name for name, _ in model.named_parameters() if "lora" in name]
    assert found.keys() == {(rate, rank) for rate in (1e-3, 4e-3) for rank in (2, 4)}
    assert found[4e-3, 2] == trained_loss(cli, "--lr", 4e-3, "--rank", 2)


def test_several_processes_become_one_that_learns_from_as_many_rows(cli, trained):
    Path("s.yaml").write_text("train: {num_processes: 2, batch_size: 2}\n")
    found = by_candidate(cli("tune", "--learning-rates", "1e-3,4e-3", "--config", "s.yaml", "--json"))
    assert found[4e-3, 4] == trained_loss(cli, "--lr", 4e-3, "--batch-size", 2, "--accumulation", 2)
    assert load_yaml(WINNER)["train"]["num_processes"] == 2 and "accumulation" not in load_yaml(WINNER)["train"]


def test_validation_is_of_so_many_sequences_spread_over_all(cli, tiny, tmp_path, monkeypatch):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(24)), "--model", tiny, "--valid", 9).code == 0
    seen = []
    monkeypatch.setattr(GemmaTrainer, "evaluate", lambda self: seen.append(
        (self.eval_dataset[:]["input_ids"], list(self.lengths[1]), list(self.trained[1]))) or (_ for _ in ()).throw(WorkFailed("x")))
    assert cli("tune", "--valid-sequences", 3, "--dtype", "fp32").code == 1
    [(ids, lengths, trained)] = seen
    from gemma_tune.encoding.tokens import open_tokens

    every = open_tokens(RUN / "data" / "tokens" / "valid.arrow")[:]["input_ids"]
    assert len(every) == 9 and [list(row) for row in ids] == [list(every[n]) for n in (0, 4, 8)]
    assert lengths == [len(row) for row in ids] and all(0 < count < n for count, n in zip(trained, lengths))


# ---- rungs -----------------------------------------------------------------------------------------------------------

def test_the_better_half_goes_on_for_longer(cli, trained, rungs, ran):
    rungs(1, 2, 3)
    done = cli("tune", "--json")
    assert done.code == 0, done.err
    trials = done.json["summary"]["trials"]
    assert [(t["rung"], t["steps"]) for t in trials] == [(1, 1)] * 5 + [(2, 2)] * 3 + [(3, 3)] * 2
    for rung in (1, 2):
        here = sorted((t for t in trials if t["rung"] == rung), key=lambda t: t["eval_loss"])
        on = {t["learning_rate"] for t in trials if t["rung"] == rung + 1}
        assert on == {t["learning_rate"] for t in here[:-(-len(here) // 2)]}
    last = [t for t in trials if t["rung"] == 3]
    assert done.json["summary"]["learning_rate"] == min(last, key=lambda t: t["eval_loss"])["learning_rate"]
    assert "steps of the whole training" not in done.err and len(ran) == 10
    again = cli("tune", "--json")
    assert again.json["status"] == "up-to-date" and again.json["summary"] == done.json["summary"] and len(ran) == 10


def stop_after(monkeypatch, trials: int) -> None:
    """As if Ctrl-C came in the trial after so many."""
    plain, run, count = StopTrial.on_step_end, Trials.run, []
    monkeypatch.setattr(Trials, "run", lambda self, *args: count.append(0) or run(self, *args))

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = self.requested or len(count) > trials
        return plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopTrial, "on_step_end", on_step_end)


def test_interrupted_it_goes_on(cli, trained, rungs, ran, monkeypatch):
    """In the first rung, and in the second."""
    rungs(2, 3)
    for after, kept in ((1, 1), (2, 3)):
        with monkeypatch.context() as patch:
            stop_after(patch, after)
            stopped = cli("tune", *RATES)
        assert stopped.code == 130, stopped.err
        assert f"kept: {kept} trial" in stopped.err and "repeat the same command to go on" in stopped.err
        assert len(json.loads(STATE.read_text())["trials"]) == kept and not WINNER.exists()
    assert "going on with a search that was interrupted" in stopped.err
    ran.clear()
    done = cli("tune", *RATES, "--json")
    assert done.code == 0 and len(ran) == 2
    ours, whole = done.json["summary"], cli("tune", *RATES, "--force", "--json").json["summary"]
    assert len(ran) == 2 + 5
    assert [t | {"seconds": 0} for t in ours["trials"]] == [t | {"seconds": 0} for t in whole["trials"]]
    assert ours["learning_rate"] == whole["learning_rate"]


def test_other_data_or_settings_start_anew_and_what_was_tried_of_the_same_is_kept(cli, trained, rungs, ran):
    rungs(1)
    tried = ("--learning-rates", "1e-3,2e-3")
    assert cli("tune", *tried).code == 0
    ran.clear()
    more = cli("tune", "--learning-rates", "1e-3,2e-3,4e-3")
    assert more.code == 0 and [rate for rate, *_ in ran] == [4e-3], "the same training for the same steps"
    ran.clear()
    other = cli("tune", *tried, "--batch-size", 2)
    assert "this one starts anew" in other.err and len(ran) == 2


# ---- candidates that fail --------------------------------------------------------------------------------------------

@pytest.fixture
def faulty(monkeypatch):
    """Rates from 0.5 on climb up the loss, and at 0.001 the second step's gradient is not finite; how often it was."""
    finish, spoiled = GemmaTrainer._finish_gradients, []

    def spoil(self, most):
        for weight in self.gradients.weights if self.args.learning_rate >= 0.5 else ():
            weight.grad.neg_()
        if self.args.learning_rate == 1e-3 and self.state.global_step == 1:
            self.gradients.weights[0].grad.fill_(math.inf)
            spoiled.append(self)
        return finish(self, most)

    monkeypatch.setattr(GemmaTrainer, "_finish_gradients", spoil)
    return spoiled


def test_what_diverges_drops_out_and_leaves_no_trace(cli, trained, faulty):
    done = cli("tune", "--learning-rates", "1e-3,4e-3,0.9", "--json")
    assert done.code == 0 and faulty, done.err
    found = {t["learning_rate"]: t for t in done.json["summary"]["trials"]}
    assert found[1e-3]["eval_loss"] is None and found[1e-3]["diverged"]
    assert found[0.9]["diverged"] and found[0.9]["eval_loss"] > done.json["summary"]["eval_loss_before"]
    # Of a narrow table a cell can go on in the next line.
    assert done.err.count("diverged: ") == 2 and all(words in done.err for words in ("the gradient of", "above the"))
    assert done.json["summary"]["learning_rate"] == 4e-3
    assert found[4e-3]["eval_loss"] == trained_loss(cli, "--lr", 4e-3)


def test_the_time_left_reckons_without_the_steps_that_a_candidate_left_out(cli, trained, faulty, rungs, monkeypatch):
    """What is done grows by a step at a time, also where one drops out."""
    rungs(6)
    shown, begin = [], tune_module._Progress.begin

    def watched(self, *args):
        self.listener = Said()
        shown.append(self.listener.steps)
        begin(self, *args)

    monkeypatch.setattr(tune_module._Progress, "begin", watched)
    done = cli("tune", "--learning-rates", "1e-3,4e-3,2e-3", "--batch-size", 2)
    assert done.code == 0 and "gives finite ones\n" in done.err, "it did not take the rung's steps"
    [steps] = shown
    assert steps[0][1:] == (1, 18) and 12 < steps[-1][1] == steps[-1][2] < 18
    assert {after[1] - before[1] for before, after in zip(steps, steps[1:])} <= {0, 1}


def test_where_nothing_helps_it_is_an_error_that_says_what_to_try(cli, trained, faulty):
    failed = cli("tune", "--learning-rates", "0.5,0.9")
    assert failed.code == 1 and "no candidate lowered the validation loss" in failed.err
    assert "--learning-rates 0.05,0.2" in failed.err and not WINNER.exists()


# ---- time ------------------------------------------------------------------------------------------------------------

def test_too_little_time_is_an_error_with_how_much_is_needed(cli, trained, monkeypatch):
    monkeypatch.setattr(trials_module.Trials, "measure", lambda self, candidate: Costs(30.0, 0.0, 100))
    failed = cli("tune", "--minutes", 2)
    assert failed.code == 2 and "--minutes 2 is too short to try two candidates" in failed.err
    minutes = float(re.search(r"tune --run runs/tiny-gemma --minutes ([0-9.]+)", failed.err)[1])
    assert 3 <= minutes < 5, "two candidates of three steps of half a minute"
    assert not WINNER.exists()


@pytest.mark.parametrize(("whole", "within", "decides"), [(2, 1, 1), (8, 3, 2)])
def test_when_time_is_up_the_last_whole_rung_decides(cli, trained, rungs, monkeypatch, whole, within, decides):
    """Of the first rung, two candidates do."""
    rungs(2, 4, 6)
    begin, begun = TrialLog.begin, []

    def late(self, deadline):
        begun.append(deadline)
        begin(self, -math.inf if len(begun) > whole + 2 else deadline)  # one is the log's own, one takes the time

    monkeypatch.setattr(TrialLog, "begin", late)
    done = cli("tune", "--batch-size", 2, "--json")
    assert done.code == 0, done.err
    assert f"time is up within rung {within}" in done.err
    trials = done.json["summary"]["trials"]
    assert len(trials) == whole
    assert ("that is 2 of the 6 steps of the whole training" in done.err) == (decides == 1)
    best = min((t for t in trials if t["rung"] == decides), key=lambda t: t["eval_loss"])
    assert (done.json["summary"]["learning_rate"], done.json["summary"]["tuned_steps"]) == (best["learning_rate"], best["steps"])
    again = cli("tune", "--batch-size", 2, "--json")
    assert again.json["status"] == "up-to-date"
    for summary, warnings in ((each.json["summary"], each.json["warnings"]) for each in (done, again)):
        assert (summary["candidates"], summary["candidates_asked"]) == (min(whole, 5), 5)
        said = [text for text in warnings if "left no time for 3 of the 5 candidates (" in text]
        assert len(said) == (whole == 2), warnings


def test_candidates_that_stay_are_those_nearest_to_the_training_s_own_settings(cli, trained, monkeypatch):
    """Which were given here, and are no defaults."""
    monkeypatch.setattr(tune_module, "plan", lambda candidates, *_: (2, [Rung(2, 2)]))
    done = cli("tune", "--json", "--config", write_rows(trained / "own.yaml", [{"train": {"learning_rate": 8e-3}}]))
    assert done.code == 0 and "time for 2 candidates of 5, nearest to train's settings" in done.err, done.err
    assert {t["learning_rate"] for t in done.json["summary"]["trials"]} == {8e-3, 4e-3}


def test_a_first_rung_that_there_was_no_time_for_is_an_error(cli, trained, rungs, monkeypatch):
    rungs(3)
    monkeypatch.setattr(Trials, "run", lambda *_: None)
    failed = cli("tune")
    assert failed.code == 2 and "is too short to try two candidates" in failed.err


# ---- what is needed --------------------------------------------------------------------------------------------------

def test_what_is_missing_is_said_before_any_work(cli, tiny, data, monkeypatch):
    monkeypatch.setattr(tune_module, "load_model", lambda *_, **__: pytest.fail("it began"))
    nothing = cli("tune", "--model", tiny)
    assert nothing.code == 2 and "is not a run yet" in nothing.err
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    failed = cli("tune")
    assert failed.code == 2 and "has no validation rows" in failed.err
    assert "gemma-tune prepare --run runs/tiny-gemma --valid 0.1" in failed.err


def test_one_candidate_is_no_choice(cli, trained):
    for flags in (("--learning-rates", "1e-4"), ("--learning-rates", "1e-4,1e-4", "--ranks", 8)):
        failed = cli("tune", *flags)
        assert failed.code == 2 and "nothing to choose from: learning rate 0.0001" in failed.err
    bad = cli("tune", "--learning-rates", "fast,2", "--minutes", 0, "--json").json["error"]
    assert [problem.split(":")[0] for problem in bad["problems"]] == ["minutes", "learning_rates"]


def test_a_training_is_told_of_what_was_found(cli, trained):
    WINNER.write_text("train:\n  learning_rate: 0.005\n")
    manifest = json.loads((RUN / "manifest.json").read_text())
    del manifest["stages"]["train"]
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(RUN / "training_checkpoints")
    told = f"{WINNER} has the settings that `tune` found best: --config {WINNER}"
    assert told in " ".join(cli("train", "--epochs", 1, "--rank", 4).err.split())
    assert told not in " ".join(cli("train", "--config", WINNER, "--force").err.split())


def test_status_leads_to_what_was_found_for_these_data_and_not_trained_with_yet(cli, trained, tmp_path):
    def changed(change) -> None:
        manifest = json.loads((RUN / "manifest.json").read_text())
        change(manifest["stages"])
        (RUN / "manifest.json").write_text(json.dumps(manifest))

    plain, tuned = f"gemma-tune train --run {RUN}", f"gemma-tune train --run {RUN} --config {WINNER}"
    assert cli("tune", *RATES).code == 0
    record = json.loads((RUN / "manifest.json").read_text())["stages"]["train"]
    changed(lambda stages: stages.pop("train"))
    shutil.rmtree(RUN / "training_checkpoints")
    assert cli("status", "--json").json["next"] == tuned
    later = record | {"started": "2100-01-01T00:00:00+00:00"}
    shutil.rmtree(RUN / "tiny-gemma_lora_adapter")
    changed(lambda stages: stages.update(train=record))
    assert cli("status", "--json").json["next"] == tuned, "what was trained before was not with it"
    changed(lambda stages: stages.update(train=later))
    assert cli("status", "--json").json["next"] == plain
    changed(lambda stages: stages.pop("train"))
    assert cli("prepare", write_rows(tmp_path / "other.jsonl", rows(9))).code == 0
    assert cli("status", "--json").json["next"] == plain
