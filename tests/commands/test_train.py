"""Training: determinism, resume, guards, the adapter as others read it, and what is learned."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.base import fingerprints
from gemma_tune.encoding import tokenizer
from gemma_tune.run import stopped
from support.command import QUICK, Result, copied_run, invoke, rows, write_rows
from support.training import adapter_bytes, by_hand, plain_loss, stop_at, stopped_at

LONG = ("--epochs", 6, "--rank", 4, "--dtype", "fp32", "--save-steps", 2)


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory) -> Path:
    """A run that is prepared; copy it, do not change it."""
    place = tmp_path_factory.mktemp("prepared")
    run = place / "runs/tiny-gemma"
    done = invoke("prepare", write_rows(place / "rows.jsonl", rows()), "--model", tiny, "--run", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def prepared(prepared_once, tiny, tmp_path) -> Path:
    """Such a run of one's own."""
    copied_run(prepared_once, tmp_path, tiny)
    return Path("runs/tiny-gemma")


def test_loss_falls_and_is_logged(cli, prepared):
    result = cli("train", "--epochs", 12, "--learning-rate", 5e-3, "--dtype", "fp32", "--json")
    assert result.code == 0, result.err
    summary, log = result.json["summary"], metrics(prepared)
    assert summary["eval_loss_after"] < 0.6 * summary["eval_loss_before"]
    assert summary["steps"] == 36  # 11 rows in batches of 4, 12 epochs
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 37))
    assert all(r["tokens_per_second"] > 0 and r["seconds_left"] >= 0 and r["grad_norm"] > 0 for r in steps)
    evals = {r["step"]: r["eval_loss"] for r in log if "eval_loss" in r}
    assert list(evals) == [0, *range(3, 37, 3)]
    assert evals[0] == summary["eval_loss_before"] and evals[36] == summary["eval_loss_after"]
    assert (prepared / "logs" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert summary["tokens"] == 12 * sum(len(ids) for ids, _ in by_hand(prepared, "train"))


def test_losses_equal_plain_cross_entropy(cli, prepared, tiny):
    """The first evaluation is the base model's loss: recomputed with plain transformers and the tokenizer's ids."""
    from transformers import AutoModelForCausalLM

    summary = cli("train", *QUICK, "--json").json["summary"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    total, count = plain_loss(model, by_hand(prepared, "valid"))
    assert summary["eval_loss_before"] == pytest.approx(total / count, rel=1e-5)


# --- what prepare has encoded

def test_the_adapter_is_that_of_rows_encoded_by_hand(cli, prepared, monkeypatch):
    """Training takes the tokens as they are in the files: the same adapter, bit for bit."""
    from datasets import Dataset

    from gemma_tune.train import job
    from gemma_tune.train import stage as train

    assert cli("train", *QUICK).code == 0
    expected = adapter_bytes(prepared)
    hands = [by_hand(prepared, side) for side in ("train", "valid")]
    sides = [Dataset.from_dict(dict(zip(("input_ids", "labels"), zip(*rows))) | {"pictures": [b""] * len(rows)}) for rows in hands]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "prepared_sequences", lambda session, listener=None: asked.append(session) or sides)
        patch.setattr(job, "trained_of",
                      lambda rows: np.array([sum(n != -100 for n in labels[1:]) for labels in rows["labels"]]))
        assert cli("train", *QUICK, "--force").code == 0
    assert asked and adapter_bytes(prepared) == expected


def test_rows_are_not_encoded_again(cli, prepared, monkeypatch):
    from gemma_tune.encoding.chat_format import ChatFormat

    def again(*args, **kwargs):
        raise AssertionError("training encoded a row")

    monkeypatch.setattr(ChatFormat, "encode_many", again)
    monkeypatch.setattr(ChatFormat, "encode_texts", again)
    assert cli("train", *QUICK).code == 0


@pytest.mark.parametrize("command", [("train", *QUICK), ("tune", "--learning-rates", "1e-3,2e-3", "--minutes", 5, "--epochs", 1)],
                         ids=["train", "tune"])
def test_the_tokenizer_is_loaded_once(cli, tiny, tmp_path, monkeypatch, command):
    """That of a Gemma takes seconds."""
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(14)), "--model", tiny).code == 0
    loads, plain = [], tokenizer.load_tokenizer
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda checkpoint: loads.append(checkpoint) or plain(checkpoint))
    done = cli(*command)
    assert done.code == 0 and len(loads) == 1, done.err


def test_the_longest_sequences_come_first(cli, tiny, tmp_path):
    """So that memory that does not suffice shows at once; their lengths are those of the tokens."""
    run = Path("runs/tiny-gemma")
    data = write_rows(tmp_path / "rows.jsonl", [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} " * (1 + 7 * n % 11) + "."}]}
        for n in range(11)])
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    assert cli("train", *QUICK).code == 0
    lengths = sorted(len(ids) for ids, _ in by_hand(run, "train"))
    assert metrics(run)[0]["tokens"] == sum(lengths[-4:]) > sum(lengths[:4])


@pytest.fixture
def other_version(monkeypatch):
    """As if the code or a library had changed since: a call switches to it."""
    from gemma_tune.encoding.tokens import encoding_key
    from gemma_tune.prepare import stage as prepare
    from gemma_tune.train import job as train

    def switch(**changes: str) -> None:
        for module in (prepare, train):
            monkeypatch.setattr(module, "encoding_key", lambda base: encoding_key(base) | changes)

    return switch


@pytest.mark.parametrize("part", ["code", "transformers"])
def test_tokens_of_another_version_are_refused_until_prepare_has_made_them_again(cli, prepared, other_version, part):
    assert cli("prepare", "--json").json["status"] == "up-to-date"
    before = json.loads((prepared / "manifest.json").read_text())["stages"]["prepare"]["summary"]["encoding"]
    other_version(**{part: "another"})
    refused = cli("train", *QUICK)
    assert refused.code == 2 and "made by another version of gemma-tune or its libraries" in refused.err
    assert not (prepared / "tiny-gemma_lora_adapter").exists()
    [said] = [line for line in refused.err.splitlines() if "gemma-tune prepare" in line]
    assert said.endswith("gemma-tune prepare --run runs/tiny-gemma")
    again = cli("prepare", "--run", "runs/tiny-gemma", "--json")
    assert again.code == 0, again.err
    assert again.json["status"] == "done"
    assert "`prepare` runs again: other versions of the code or its libraries made the tokens" in again.err
    assert again.json["summary"]["encoding"] == before | {part: "another"}
    assert cli("prepare", "--json").json["status"] == "up-to-date"
    assert cli("train", *QUICK).code == 0


def talks(count: int = 8) -> list[dict]:
    """Conversations of two questions, so that settings change what is learned of the same rows."""
    return [{"messages": [*first["messages"], *second["messages"]]} for first, second in zip(rows(count), rows(count)[1:])]


@pytest.mark.parametrize(("flags", "changed"), [
    (("--train-on", "last"), True), (("--max-length", 60, "--on-long", "split"), True),
    (("--max-length", 45, "--on-long", "truncate"), True), (("--max-length", 500), False)])
def test_other_tokens_of_the_same_rows_are_trained_again(cli, tiny, tmp_path, flags, changed):
    """And the same tokens are not: what counts is the result, not the setting."""
    run = Path("runs/tiny-gemma")
    data = write_rows(tmp_path / "talks.jsonl", talks())
    assert cli("prepare", data, "--model", tiny).code == 0
    assert cli("train", *QUICK).code == 0
    before, adapter = (run / "data" / "train.jsonl").read_bytes(), adapter_bytes(run)
    again = cli("prepare", data, *flags, "--json")
    assert again.code == 0 and again.json["status"] == "done", again.err
    assert (run / "data" / "train.jsonl").read_bytes() == before
    state = cli("status", "--json").json["stages"]["train"]["state"]
    assert state.startswith("stale: `prepare` has run again with another result") == changed
    second = cli("train", *QUICK, "--json")
    assert second.code == 0, second.err
    assert second.json["status"] == ("done" if changed else "up-to-date")
    assert (adapter_bytes(run) != adapter) == changed


def test_other_tokens_do_not_go_on_from_a_checkpoint_of_the_earlier_ones(cli, tiny, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "talks.jsonl", talks())
    assert cli("prepare", data, "--model", tiny).code == 0
    stopped_at(3, monkeypatch, *LONG)
    told = cli("prepare", data, "--train-on", "last", "--json")
    assert told.code == 0
    [warning] = [text for text in told.json["warnings"] if "stopped" in text]
    assert "a training that was stopped (checkpoint-3) cannot go on with these data" in warning
    assert "or start anew, as gemma-tune status --run runs/tiny-gemma says" in warning
    for refused in (cli("train", *LONG), cli("train", "--dry-run"), cli("run", "--run", "runs/tiny-gemma")):
        assert refused.code == 2
        assert "holds an interrupted training on other data than are prepared now: it cannot go on with these" in refused.err
    status = cli("status", "--json").json
    assert "it cannot go on with these" in status["stages"]["train"]["state"]
    assert status["next"].endswith(" --force") and status["next"] in refused.err
    result = cli(*shlex.split(status["next"])[1:], "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 0, result.err


def stopped_with_other_data(cli, tiny, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Stops a training after two steps; returns the data that it learns from, and others."""
    data, other = (write_rows(tmp_path / f"{n}.jsonl", rows(n)) for n in (12, 13))
    assert cli("prepare", data, "--model", tiny).code == 0
    stopped_at(2, monkeypatch, *QUICK)
    return data, other


def test_a_stopped_training_goes_on_when_its_data_are_back(cli, tiny, tmp_path, monkeypatch):
    data, other = stopped_with_other_data(cli, tiny, tmp_path, monkeypatch)
    assert "cannot go on" in cli("prepare", other).err
    assert "cannot go on" not in cli("prepare", data).err
    result = cli("train", "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 2


def test_data_that_a_stopped_training_did_not_begin_with_take_no_place_of_those_that_it_did(cli, tiny, tmp_path, monkeypatch):
    """Of `train DATA` and `run DATA`, which could not train on them; `prepare` does as it is told, and warns."""
    data, other = stopped_with_other_data(cli, tiny, tmp_path, monkeypatch)
    run = Path("runs/tiny-gemma")

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    before = contents()
    for command in (("train", other), ("run", other, "--no-create")):
        result = cli(*command, "--run", run)
        assert result.code == 2 and "an interrupted training waits (checkpoint-2), and cannot go on with these rows" in result.err
        assert f"to finish it: gemma-tune train --run {run}; to give it up and learn these: --force" in result.err
        assert contents() == before
    finished = cli("train", data, "--run", run, "--json")
    assert finished.code == 0 and finished.json["summary"]["resumed_from_step"] == 2, finished.err


def test_data_that_a_stopped_training_did_not_begin_with_are_learned_by_force(cli, tiny, tmp_path, monkeypatch):
    data, other = stopped_with_other_data(cli, tiny, tmp_path, monkeypatch)
    third = write_rows(tmp_path / "third.jsonl", rows(14))
    assert cli("prepare", other).code == 0
    refused = cli("train", third)
    assert refused.code == 2 and "to finish it, once those that it began with are prepared again: gemma-tune train" in refused.err
    planned = cli("train", "--force", "--dry-run", "--json")
    assert any("--force starts anew: it is lost" in note for note in planned.json["notes"]), planned.err
    result = cli("train", third, "--force", "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 0, result.err
    assert result.json["prepare"]["summary"]["rows"] == 14


def test_a_stopped_training_s_rows_are_not_read_to_tell_whether_they_are_those_of_now(cli, tiny, tmp_path, monkeypatch):
    """Whatever their number: their sum is in the manifest, and counts where they lie as they were prepared."""
    data, other = stopped_with_other_data(cli, tiny, tmp_path, monkeypatch)
    sequences = Path("runs/tiny-gemma/data/tokens/train.arrow")

    def state(*flags, reads: bool = False) -> str:
        read = fingerprints.sha256_file
        with monkeypatch.context() as patch:
            for module in (fingerprints, stopped):
                patch.setattr(module, "sha256_file", lambda path: read(path) if reads or path.name != sequences.name else
                              pytest.fail(f"{path} is read"))
            return cli("status", *flags, "--json").json["stages"]["train"]["state"]

    assert state() == "interrupted: checkpoint-2 is saved"
    assert cli("prepare", other).code == 0
    assert "it cannot go on with these" in state()
    assert cli("prepare", data).code == 0 and "cannot go on" not in state()
    content, times = sequences.read_bytes(), sequences.stat()
    sequences.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "it cannot go on with these" in state(reads=True), "changed by hand"
    os.utime(sequences, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "cannot go on" not in state() and "it cannot go on with these" in state("--verify", reads=True)
    run = Path("runs/tiny-gemma/manifest.json")
    manifest = json.loads(run.read_text())
    manifest["stages"]["prepare"]["summary"].pop(stopped.SEQUENCES)
    run.write_text(json.dumps(manifest))
    assert "it cannot go on with these" in state(reads=True), "where the manifest does not have it they are read"


def test_new_data_of_another_kind_take_a_stopped_training_s_method_away(cli, tiny, tmp_path, monkeypatch):
    pairs = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n}"} for n in range(12)])
    assert cli("prepare", pairs, "--model", tiny).code == 0
    stopped_at(2, monkeypatch, *QUICK)
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows())).code == 0
    following = cli("status", "--json").json["next"]
    assert following == "gemma-tune train --run runs/tiny-gemma --force" and following in cli("train").err
    result = cli(*shlex.split(following)[1:], "--max-steps", 2, "--json")
    assert result.code == 0 and result.json["summary"]["method"] == "sft", result.err


@pytest.mark.parametrize("limit", [2048, 16])
def test_plain_texts_are_learned_with_their_mean_loss(cli, tiny, tmp_path, limit):
    """Also in pieces: every token but the BOS is learned once, with the token before it in sight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [f"The price of bond {n} falls when its rate rises, and the other way round." for n in range(4)]
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    assert cli("prepare", data, "--model", tiny, "--valid", 0, "--max-length", limit, "--on-long", "split").code == 0
    result = cli("train", "--epochs", 1, "--rank", 4, "--dtype", "fp32", "--batch-size", 1, "--accumulation", 100, "--json")
    assert result.code == 0, result.err
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        whole = [2, *ids, 1]  # the BOS that the chat template writes, too
        labels = [-100, *whole[1:]]
        # Every part but the first begins with the last token of the one before, which is not learned again.
        pieces += [(whole[n:n + limit], [-100, *labels[n + 1:n + limit]]) for n in range(0, len(whole) - 1, limit - 1)]
    assert (len(pieces) > 4) == (limit == 16)
    total, count = plain_loss(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), pieces)
    assert result.json["summary"]["steps"] == 1
    assert result.json["summary"]["train_loss_first"] == pytest.approx(total / count, rel=1e-4)


# --- settings and guards

def test_accumulation_equals_a_larger_batch(cli, prepared):
    """One normaliser: 2 x 2 accumulated conversations give the gradient of 4, whatever their lengths."""
    losses = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        result = cli("train", "--epochs", 2, "--rank", 4, "--dtype", "fp32", "--batch-size", size, "--accumulation",
                     accumulation, "--force", "--json")
        assert result.code == 0, result.err
        assert result.json["summary"]["effective_batch"] == 4
        losses.append(result.json["summary"]["eval_loss_after"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[2] == pytest.approx(losses[0], rel=2e-3)


def test_the_adapter_is_standard_peft(trained, tiny):
    """Plain PEFT and transformers, in a process that does not know this package, where the base's name leads to it."""
    script = """
import sys, json
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
assert "gemma_tune" not in sys.modules
print(json.dumps([text, sorted(model.peft_config["default"].target_modules),
                  sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)]))
"""
    done = subprocess.run([sys.executable, "-c", script, trained / "tiny-gemma_lora_adapter"], capture_output=True,
                          text=True, timeout=120, cwd=tiny.parent)
    assert done.returncode == 0, done.stderr
    text, modules, parameters = json.loads(done.stdout)
    assert text == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    generation = json.loads((trained / "tiny-gemma_lora_adapter" / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
    assert parameters == json.loads((trained / "manifest.json").read_text())["stages"]["train"]["summary"][
        "trainable_parameters"]
    files = {p.name for p in (trained / "tiny-gemma_lora_adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= files
    assert not [p for p in trained.rglob("*") if p.name == "training_args.bin"], "pickles must not be kept"


def test_every_setting_reaches_the_adapter(cli, prepared):
    result = cli("train", "--rank", 3, "--alpha", 5, "--dropout", 0.1, "--target-modules", "q_proj, v_proj", "--epochs",
                 1, "--dtype", "fp32", "--warmup", 0.5, "--schedule", "linear", "--lr", 1e-3, "--json")
    assert result.code == 0, result.err
    config = json.loads((prepared / "tiny-gemma_lora_adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5.0, 0.1)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    rates = [r["learning_rate"] for r in metrics(prepared) if "loss" in r]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])  # 3 steps, of which round(1.5) = 2 rise to the peak


def interrupted(forks, run: Path, after_step: int, number: int) -> Result:
    """Start training in a process of its own and send it a signal once it has logged ``after_step``."""
    log = run / "logs" / "metrics.jsonl"
    log.unlink(missing_ok=True)
    process = forks.start("train", *LONG, "--run", run)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and f'"step": {after_step}, ' in log.read_text():
            os.kill(process, number)
            break
        time.sleep(0.002)
    return forks.result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_training_goes_on_to_the_same_adapter(cli, prepared, forks, number):
    uninterrupted = prepared.with_name("whole")
    shutil.copytree(prepared, uninterrupted)
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert cli("train", *LONG, "--run", uninterrupted).code == 0, manifest

    done = interrupted(forks, prepared, 3, number)
    assert done.code == 130, done.err
    assert "it is saved" in done.err and "repeat the same command to go on" in done.err
    assert "train" not in json.loads((prepared / "manifest.json").read_text())["stages"]
    status = cli("status", "--run", prepared, "--json").json
    assert status["stages"]["train"]["state"].startswith("interrupted: checkpoint-")

    resumed = cli("train", *LONG, "--run", prepared, "--json")
    assert resumed.code == 0, resumed.err
    assert 3 <= resumed.json["summary"]["resumed_from_step"] < 18
    assert adapter_bytes(prepared) == adapter_bytes(uninterrupted), "bit for bit"
    assert [r["step"] for r in metrics(prepared) if "loss" in r] == list(range(1, 19))


def test_how_often_is_evaluated_is_nothing_to_dropout(cli, prepared):
    """Nor where a training ends that is continued later: both evaluate there."""
    found = []
    for flags in ((), ("--eval-steps", 1), ("--eval-steps", 4, "--max-steps", 3)):
        command = ("train", *LONG, "--run", prepared, "--dropout", 0.3, "--keep", "last", "--schedule", "constant",
                   "--warmup", 0, *flags, "--force")
        assert cli(*command).code == 0
        if "--max-steps" in flags:
            again = cli("train", "--run", prepared, "--continue", "--max-steps", 18, "--json")
            assert again.code == 0 and again.json["summary"]["steps"] == 18, again.err
        found.append(load_file(next(prepared.glob("*_lora_adapter")) / "adapter_model.safetensors"))
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_killed_training_goes_on_from_the_newest_whole_checkpoint(cli, prepared, forks):
    uninterrupted = prepared.with_name("whole")
    shutil.copytree(prepared, uninterrupted)
    assert cli("train", *LONG, "--run", uninterrupted).code == 0
    assert interrupted(forks, prepared, 7, signal.SIGKILL).code == -signal.SIGKILL
    checkpoints = sorted((prepared / "training_checkpoints").glob("checkpoint-*"),
                         key=lambda p: int(p.name.split("-")[1]))
    newest = [c for c in checkpoints if (c / "complete.json").exists()][-1]
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-9])  # damaged: pass it over
    result = cli("train", *LONG, "--run", prepared, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["resumed_from_step"] == int(newest.name.split("-")[1]) - 2
    assert adapter_bytes(prepared) == adapter_bytes(uninterrupted)


def test_an_interrupted_training_is_not_resumed_with_other_settings(cli, prepared, monkeypatch):
    def stopped(*flags) -> int:
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            return cli("train", *flags).code

    assert stopped(*LONG) == 130
    checkpoint = max((prepared / "training_checkpoints").glob("checkpoint-*/complete.json"))
    result = cli("train", *LONG, "--rank", 8)
    assert result.code == 2
    assert "rank: 4 then, 8 now" in result.err
    assert "--force" in result.err
    # What it says to type does finish the training, also from `status`.
    finish = cli("status", "--json").json["next"]
    assert finish in result.err.replace("\n", " ")
    assert shlex.split(finish)[:2] == ["gemma-tune", "train"]
    assert {"--rank", "--save-steps", "--epochs"} <= set(shlex.split(finish))
    assert cli(*shlex.split(finish)[1:]).code == 0
    assert stopped(*LONG, "--seed", 5) == 130
    status = cli("status", "--json").json
    assert status["stages"]["train"]["state"].startswith("interrupted"), "although an earlier training is recorded"
    checkpoint = max((prepared / "training_checkpoints").glob("checkpoint-*/complete.json"))
    assert checkpoint.exists()
    assert cli("train", *QUICK, "--force").code == 0


def test_a_gradient_that_is_not_finite_stops_the_run(cli, trained, monkeypatch):
    from gemma_tune.train.trainer import GemmaTrainer

    before, manifest = adapter_bytes(trained), (trained / "manifest.json").read_bytes()
    plain = GemmaTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(GemmaTrainer, "compute_loss", poisoned)
    result = cli("train", *LONG, "--force")
    assert result.code == 1
    assert "not finite at step 3" in result.err and "--learning-rate" in result.err
    assert adapter_bytes(trained) == before
    assert (trained / "manifest.json").read_bytes() == manifest
    assert [p.name for p in (trained / "training_checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    for tensor in __import__("safetensors.torch").torch.load_file(
            trained / "training_checkpoints" / "checkpoint-2" / "adapter_model.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_unknown_target_modules_are_named_with_the_known_ones(cli, prepared):
    result = cli("train", "--target-modules", "q_proj,query", "--dtype", "fp32")
    assert result.code == 2
    assert "query" in result.err
    assert "its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in result.err


def test_out_of_memory_says_what_helps(cli, prepared, monkeypatch):
    from gemma_tune.train.trainer import GemmaTrainer

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(GemmaTrainer, "compute_loss", full)
    result = cli("train", *QUICK)
    assert result.code == 2
    assert "out of memory" in result.err and "use --activation-checkpointing, --qlora, or a smaller model\n" in result.err
    result = cli("train", *QUICK, "--activation-checkpointing", "--qlora")
    assert "use a smaller model\n" in result.err, "all else is done"


def test_activation_checkpointing_changes_nothing(cli, prepared):
    plain = cli("train", *QUICK, "--json").json["summary"]["eval_loss_after"]
    result = cli("train", *QUICK, "--activation-checkpointing", "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["eval_loss_after"] == pytest.approx(plain, rel=1e-4)


def test_qlora_trains_and_its_adapter_merges_into_the_16_bit_base(cli, prepared):
    result = cli("train", "--epochs", 12, "--learning-rate", 5e-3, "--qlora", "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert summary["eval_loss_after"] < 0.7 * summary["eval_loss_before"]
    assert cli("merge").code == 0
    from safetensors import safe_open

    with safe_open(prepared / "tiny-gemma_lora_merged" / "model.safetensors", "pt") as f:
        assert {f.get_tensor(n).dtype for n in f.keys()} == {torch.bfloat16}


def test_without_validation_rows_nothing_is_evaluated(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    result = cli("train", *QUICK, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["eval_loss_after"] is None
    assert not [r for r in metrics(Path("runs/tiny-gemma")) if "eval_loss" in r]


def test_one_row_is_enough(cli, tiny, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "one.jsonl", rows(1)), "--model", tiny).code == 0
    result = cli("train", *QUICK, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["steps"] == 1


def test_towers_are_left_alone():
    from gemma_tune.lora.layers import target_modules

    class Multimodal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({
                "language_model": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}),
                "vision_tower": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}),
                "multi_modal_projector": torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4)})})
            self.lm_head = torch.nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.lm_head

    assert target_modules(Multimodal(), ()) == ["model.language_model.q_proj"]


def test_the_family_sets_the_learning_rate_and_says_why(cli, prepared):
    result = cli("train", "--epochs", 1, "--rank", 4, "--dtype", "fp32")
    assert "learning rate 0.0002: Google's own for Gemma with LoRA" in result.err
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["stages"]["train"]["config"]["learning_rate"] == {"value": 0.0002, "from": "family"}


def test_dtype_is_chosen_by_measurement_and_fp16_only_when_asked(monkeypatch):
    from gemma_tune.base.errors import UserError
    from gemma_tune.models import placement as models

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "bf16_instructions", lambda: None)  # as where PyTorch cannot say
    for ratio, dtype in ((2.0, torch.bfloat16), (0.4, torch.float32)):
        monkeypatch.setattr(models, "bf16_speed", lambda ratio=ratio: ratio)
        placement = models.choose_placement("auto")
        assert placement.dtype == dtype and f"{ratio:.1f}x as fast" in placement.reason
    with pytest.raises(UserError, match="fp16"):
        models.choose_placement("fp16")


def test_live_progress_on_a_terminal(prepared, forks):
    child = forks.terminal("train", *LONG, "--run", prepared, timeout=120, dimensions=(30, 120), TERM="xterm-256color")
    child.expect(r"training.*\d+/18.*loss \d\.\d+.*tok/s")
    child.expect("train: done")
    child.read()
    child.close()


def test_a_training_that_was_killed_after_its_last_step_is_finished_without_another(cli, prepared, monkeypatch):
    """Mid-epoch, where the trainer by itself would go on to the end of the epoch."""
    from gemma_tune.train import stage as train

    flags = ("--max-steps", 4, "--schedule", "constant", "--dtype", "fp32", "--rank", 4)
    assert cli("train", *flags).code == 0
    expected = adapter_bytes(prepared)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_adapter", killed)
        assert cli("train", *flags, "--force").code == 130
    result = cli("train", *flags, "--json")
    assert result.code == 0, result.err
    assert result.json["status"] == "done"
    assert result.json["summary"]["steps"] == 4 == result.json["summary"]["resumed_from_step"]
    assert result.json["summary"]["tokens"] > 0
    assert adapter_bytes(prepared) == expected


def test_an_interrupted_repetition_with_the_same_settings_is_finished(cli, prepared, monkeypatch):
    assert cli("train", *LONG).code == 0
    expected, whole = adapter_bytes(prepared), json.loads((prepared / "manifest.json").read_text())
    again = stopped_at(5, monkeypatch, *LONG, "--force")
    assert "--force" not in again.err.split("Hint:")[1]
    assert cli("status", "--json").json["stages"]["train"]["state"].startswith("interrupted")
    result = cli("train", *LONG, "--json")
    assert result.code == 0, result.err
    assert (result.json["status"], result.json["summary"]["resumed_from_step"]) == ("done", 5)
    assert adapter_bytes(prepared) == expected
    # The figures are those of the whole training, not of the part after the interruption.
    before, after = whole["stages"]["train"]["summary"], result.json["summary"]
    for name in ("tokens", "steps", "eval_loss_before", "eval_loss_after", "train_loss_first", "train_loss_last"):
        assert after[name] == before[name], name
    assert cli("train", *LONG, "--json").json["status"] == "up-to-date"
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"


def test_a_resumed_training_stays_with_its_compute_type(cli, prepared, monkeypatch):
    from gemma_tune.models import placement as models

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ("--epochs", 2, "--rank", 4)
    monkeypatch.setattr(models, "bf16_instructions", lambda: None)
    monkeypatch.setattr(models, "bf16_speed", lambda: 2.0)
    stopped_at(2, monkeypatch, *flags)
    monkeypatch.setattr(models, "bf16_speed", lambda: 0.5)
    refused = cli("train", *flags, "--dtype", "fp32")
    assert refused.code == 2 and "computed in bf16" in refused.err
    result = cli("train", *flags, "--json")
    assert result.code == 0, result.err
    assert "computing in bf16 on cpu, as the training began" in result.err and "as asked" not in result.err
    assert (result.json["summary"]["dtype"], result.json["summary"]["resumed_from_step"]) == ("bf16", 2)


def test_the_adapter_directory_is_the_same_in_another_process(trained, tmp_path):
    before = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["outputs"]["adapter"]["sha256"]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # not this process's, as a rule a random one
    done = subprocess.run([sys.executable, "-m", "gemma_tune", "train", *map(str, QUICK), "--force", "--run", trained],
                          capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit" not in done.stderr, "remarks of libraries at their import"
    after = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["outputs"]["adapter"]["sha256"]
    assert after == before


def test_a_head_that_the_loss_does_not_know_is_refused(cli, prepared, monkeypatch):
    from gemma_tune.train.trainer import GemmaTrainer

    plain = GemmaTrainer._summed_loss
    monkeypatch.setattr(GemmaTrainer, "_summed_loss", staticmethod(lambda model, inputs: plain(model, inputs) * 1.3))
    result = cli("train", *QUICK)
    assert result.code == 2
    assert "computes its logits in a way that gemma-tune does not know" in result.err
    assert not (prepared / "tiny-gemma_lora_adapter").exists()


def test_generation_settings_that_transformers_refuses_to_save_do_not_lose_the_adapter(cli, tiny, data, tmp_path):
    base = tmp_path / "odd"
    shutil.copytree(tiny, base)
    (base / "generation_config.json").write_text(json.dumps(
        {"temperature": 0.7, "top_p": 0.9, "eos_token_id": [1, 7], "pad_token_id": 0}))
    assert cli("prepare", data, "--model", base).code == 0
    result = cli("train", *QUICK)
    assert result.code == 0, result.err
    saved = json.loads(Path("runs/odd/odd_lora_adapter/generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 5, 7], "the base's other end tokens stay, the turn's end is added"
    assert saved["top_p"] == 0.9
    assert cli("merge").code == 0


def test_the_hint_after_a_bad_gradient_works(cli, trained, monkeypatch):
    from gemma_tune.train.trainer import GemmaTrainer

    plain = GemmaTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "compute_loss", lambda self, *a, **k: plain(self, *a, **k) * float(
            "nan" if self.state.global_step == 2 else 1))
        failed = cli("train", *LONG, "--learning-rate", 1, "--force")
    assert failed.code == 1 and "--force and a lower --learning-rate" in failed.err
    assert cli("train", *QUICK, "--force").code == 0


def test_out_of_memory_while_loading_says_what_helps(cli, prepared, monkeypatch):
    from transformers import Gemma3ForCausalLM

    from gemma_tune.models import load as loading

    def full(self, *args, **kwargs):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)")

    monkeypatch.setattr(Gemma3ForCausalLM, "to", full)
    result = cli("train", *QUICK)
    assert result.code == 2
    assert "out of memory" in result.err and "train --qlora keeps it in 4 bits" in result.err
    assert "--micro-batch" not in result.err, "which does not make weights smaller"
    monkeypatch.setattr(loading, "with_decoder", full)
    result = cli("train", *QUICK, "--qlora")
    assert "take a smaller model\n" in result.err, "it is in 4 bits"


# --- settings that leave the result as it is

def test_how_a_batch_is_worked_on_does_not_train_again(cli, prepared):
    assert cli("train", *QUICK).code == 0
    for flags in (("--micro-batch", 1), ("--activation-checkpointing",), ("--compile",)):
        again = cli("train", *QUICK, *flags, "--json")
        assert (again.code, again.json["status"]) == (0, "up-to-date"), again.err
    assert cli("train", *QUICK, "--accumulation", 2, "--json").json["status"] == "done"


def test_an_adapter_of_a_version_with_fewer_settings_is_up_to_date(cli, prepared):
    assert cli("train", *QUICK).code == 0
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("rslora", "dora", "compile", "micro_batch", "num_processes", "strategy"):
        del manifest["stages"]["train"]["config"][name]
    path.write_text(json.dumps(manifest))
    assert cli("train", *QUICK, "--json").json["status"] == "up-to-date"
    again = cli("train", *QUICK, "--rslora", "--json")
    assert again.json["status"] == "done" and "`train` runs again: rslora: False -> True" in again.err


def test_the_adapter_of_a_4_bit_base_is_trained_in_fp32(cli, prepared):
    """As bf16, a small step would often be lost in rounding."""
    from safetensors.torch import load_file

    assert cli("train", *QUICK, "--qlora").code == 0
    tensors = load_file(prepared / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any((t != t.to(torch.bfloat16)).any() for t in tensors.values())


def test_force_keeps_an_interrupted_training_until_the_new_one_has_begun(cli, prepared, monkeypatch):
    stopped_at(3, monkeypatch, *LONG)
    assert cli("train", *LONG, "--target-modules", "no_proj", "--force").code == 2
    assert cli("train", *LONG, "--json").json["summary"]["resumed_from_step"] > 0


# --- a training that made the model worse

HARM = ("--max-steps", 6, "--learning-rate", 0.1, "--rank", 4, "--dtype", "fp32")


@pytest.fixture
def climbing(monkeypatch):
    """Steps that go the wrong way: what too high a rate does to a real model, a random one can bear."""
    monkeypatch.setattr("gemma_tune.train.job.rate_at", lambda *_: -1.0)


def test_a_training_that_made_the_model_worse_is_an_error(cli, trained, climbing):
    """Its adapter is kept apart, the good one stays, and nothing goes on from it."""
    before, manifest = adapter_bytes(trained), (trained / "manifest.json").read_bytes()
    result = cli("train", *HARM)
    assert result.code == 1
    assert "made the model worse: validation loss" in result.err
    logged = [r["eval_loss"] for r in metrics(trained, "failed.jsonl") if "eval_loss" in r]
    assert f"{logged[0]:.4g} before, {min(logged[1:]):.4g} after" in result.err and min(logged[1:]) > 1.1 * logged[0]
    assert "lower --learning-rate" in result.err
    apart = trained / "tiny-gemma_lora_adapter_worse"
    assert f"kept apart, in {apart.relative_to(Path.cwd())}" in result.err
    assert (apart / "adapter_model.safetensors").exists()
    assert adapter_bytes(trained) == before and (trained / "manifest.json").read_bytes() == manifest
    status = cli("status", "--json").json
    assert status["stages"]["train"]["state"] == "done" and "chat" not in status["stages"]
    assert cli("train", *QUICK, "--json").json["status"] == "up-to-date"


def test_a_first_training_that_made_the_model_worse_leaves_the_stage_open(cli, prepared, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gemma_tune.train.job.rate_at", lambda *_: -1.0)
        result = cli("train", *HARM, "--json")
    assert result.code == 1 and "made the model worse" in result.json["error"]["message"]
    assert "the earlier adapter" not in result.err
    assert cli("status", "--json").json["stages"]["train"]["state"] == "missing"
    assert cli("merge").code == 2
    assert cli("train", *QUICK).code == 0, "with no checkpoint of the other in its way"


def test_without_validation_rows_the_training_loss_says_whether_it_got_worse(cli, tiny, data, climbing):
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    result = cli("train", *HARM, "--max-steps", 12)
    assert result.code == 1 and "made the model worse: training loss" in result.err


def test_a_resumed_training_is_compared_with_its_beginning(cli, prepared, monkeypatch, climbing):
    stopped_at(2, monkeypatch, *HARM)
    result = cli("train", *HARM)
    assert result.code == 1, result.err
    assert "going on from checkpoint-2" in result.err and "made the model worse: validation loss" in result.err
    assert f"{metrics(prepared)[0]['eval_loss']:.4g} before" in result.err


def test_run_stops_at_a_training_that_made_the_model_worse(cli, tiny, data, tmp_path, climbing):
    settings = tmp_path / "settings.yaml"
    settings.write_text("train:\n  dtype: fp32\n")
    result = cli("run", data, "--model", tiny, "--max-steps", 6, "--learning-rate", 0.1,
                 "--rank", 4, "--config", settings)
    assert result.code == 1 and "made the model worse" in result.err and "3/5" not in result.err


# --- --force, and the command that goes on

def test_a_forced_training_that_is_stopped_goes_on_with_the_command_that_is_shown(cli, trained, monkeypatch):
    flags = ("--epochs", 3, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-3)
    stopped = stopped_at(2, monkeypatch, *flags, "--force")
    hint = stopped.err.split("Hint: ")[1].strip()
    assert "repeat" not in hint and "--force" not in hint
    shown = shlex.split(hint.split("to go on from there: ")[1])
    result = cli(*shown[1:], "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 2, result.err


def test_forcing_again_says_what_is_lost(cli, prepared, monkeypatch):
    stopped_at(2, monkeypatch, *LONG)
    result = cli("train", *LONG, "--force")
    assert "--force starts anew: checkpoint-2 of an interrupted training is lost" in result.err


def test_memory_that_runs_out_later_names_the_command_that_goes_on(cli, prepared, monkeypatch):
    from gemma_tune.train.trainer import GemmaTrainer

    plain = GemmaTrainer.compute_loss

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GemmaTrainer, "compute_loss", full)
        least = cli("train", *LONG, "--micro-batch", 1, "--activation-checkpointing")
        result = cli("train", *LONG, "--force")
    assert least.code == 2 and "it goes on" not in least.err, "what is advised is done already"
    assert result.code == 2 and "it goes on from checkpoint-4" in result.err
    shown = shlex.split(result.err.split("checkpoint-4: ")[1].splitlines()[0])
    assert "--force" not in shown and {"--micro-batch", "--activation-checkpointing"} <= set(shown)
    finished = cli(*shown[1:], "--json")
    assert finished.code == 0 and finished.json["summary"]["resumed_from_step"] == 4, finished.err


@pytest.mark.parametrize("waiting", [True, False])
def test_repeating_a_forced_training_is_advised_without_force(cli, trained, monkeypatch, waiting):
    """Where that goes on; else it would do nothing."""
    from gemma_tune.train import stage as train

    if waiting:
        stopped_at(2, monkeypatch, *QUICK, "--force")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_decide", killed)
    result = cli("train", *QUICK, "--force")
    assert result.code == 130
    assert ("run the same command without --force again" in result.err) == waiting


# --- settings that a run remembers

def test_settings_of_a_training_are_kept(cli, prepared):
    assert cli("train", "--rank", 3, "--dtype", "fp32", "--epochs", 1, "--learning-rate", 1e-3).code == 0
    before = adapter_bytes(prepared)
    again = cli("train", "--json")
    assert again.code == 0 and again.json["status"] == "up-to-date", again.err
    assert "settings as before: rank 3, learning_rate 0.001, epochs 1, dtype fp32" in again.err
    assert adapter_bytes(prepared) == before
    other = cli("train", "--rank", 5)
    assert other.code == 0 and "`train` runs again: rank: 3 -> 5" in other.err
    config = json.loads((prepared / "manifest.json").read_text())["stages"]["train"]["config"]
    assert {n: (config[n]["value"], config[n]["from"]) for n in ("rank", "epochs", "seed")} == {
        "rank": (5, "flag"), "epochs": (1.0, "flag"), "seed": (42, "default")}
    forced = cli("train", "--rank", 4, "--force")
    assert "`train` runs with other settings than before: rank: 5 -> 4" in forced.err


def test_as_many_processes_as_before_are_said(cli, trained, monkeypatch):
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["stages"]["train"]["config"]["num_processes"] = {"value": 8, "from": "flag"}
    (trained / "manifest.json").write_text(json.dumps(manifest))
    launched = []
    monkeypatch.setattr("gemma_tune.train.launch.launch", lambda count, arguments: launched.append(count) or 0)
    done = cli("train")
    assert (done.code, launched) == (0, [8])
    assert "8 processes on this machine, as many as before; --num-processes sets another number" in done.err
    assert "as before" not in cli("train", "--num-processes", 2).err and launched == [8, 2]


def test_an_interrupted_training_is_finished_by_train_alone(cli, prepared, monkeypatch):
    """Its settings are newer than those of the run's result."""
    assert cli("train", *QUICK).code == 0
    stopped_at(2, monkeypatch, "--rank", 16, "--epochs", 2, "--seed", 7)
    planned = cli("train", "--dry-run", "--json").json
    assert planned["steps"] == 6
    result = cli("train", "--json")
    assert result.code == 0, result.err
    assert "settings of the interrupted training: rank 16, epochs 2, seed 7" in result.err
    assert result.json["summary"]["resumed_from_step"] == 2 and result.json["summary"]["steps"] == 6


def took(run: Path, seconds: float) -> None:
    """As if the training had taken so long."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["train"]["summary"]["training_seconds"] = seconds
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_an_adapter_that_took_long_is_not_replaced_unasked(cli, trained):
    took(trained, 3600)
    before = adapter_bytes(trained)
    refused = cli("train", "--rank", 8)
    assert refused.code == 2
    assert "took 60 min, and is not replaced unasked by one with other settings (rank: 4 -> 8)" in refused.err
    assert "--force" in refused.err.split("Hint:")[1] and adapter_bytes(trained) == before
    assert cli("run", "--rank", 8).code == 2 and adapter_bytes(trained) == before
    assert cli("train", "--json").json["status"] == "up-to-date"
    assert cli("train", "--rank", 8, "--force").code == 0 and adapter_bytes(trained) != before


@pytest.mark.parametrize(("answer", "replaced"), [("y", True), ("", False)])
def test_on_a_terminal_it_is_asked(trained, forks, answer, replaced):
    took(trained, 3600)
    before = adapter_bytes(trained)
    child = forks.terminal("train", "--rank", 8, "--run", trained, timeout=120, dimensions=(30, 200))
    child.expect(r"replace it \(rank: 4 -> 8\)\? \[y/N\]")
    child.sendline(answer)
    child.read()
    child.wait()
    child.close()
    assert child.exitstatus == (0 if replaced else 2)
    assert (adapter_bytes(trained) != before) == replaced


# --- the learning rate of each step

@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_step_learns(cli, prepared, schedule):
    result = cli("train", "--epochs", 2, "--warmup", 0.34, "--schedule", schedule, "--rank", 4, "--dtype", "fp32",
                 "--eval-steps", 1, "--lr", 1e-3)
    assert result.code == 0, result.err
    log = metrics(prepared)
    evals = [r["eval_loss"] for r in log if "eval_loss" in r]
    rates = [r["learning_rate"] for r in log if "loss" in r]
    assert len(set(evals)) == len(evals) == 7, "each step changes the loss"
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3]) and min(rates) > 0


def test_four_bits_do_not_go_with_apples_gpu(cli, prepared, monkeypatch):
    """Before any work, in a plan and in a training; and nothing advises them there."""
    from gemma_tune.models import placement
    from gemma_tune.train import going_on, job, memory, stage

    for module in (stage, going_on):
        monkeypatch.setattr(module, "choose_placement", lambda dtype: placement.Placement("mps", torch.bfloat16, ""))
    monkeypatch.setattr(job, "available", lambda device: 2**34)
    monkeypatch.setattr(stage, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    for more in ((), ("--dry-run",)):
        result = cli("train", *QUICK, "--qlora", *more)
        assert result.code == 2 and "Apple's GPU" in result.err and "leave --qlora out" in result.err
    monkeypatch.setattr(memory, "best_device", lambda: "mps")
    assert "qlora" not in memory._what_helps(*_tight())
    assert "qlora" not in memory.out_of_memory(MemoryError(), _tight()[0], 1).hint


def _tight():
    """A choice that does not fit for its weights, with settings, and the longest row's tokens."""
    from types import SimpleNamespace

    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.train.memory import BatchChoice

    parts = SimpleNamespace(total=2**35, activations=0, working=0, weights=2**34)
    return BatchChoice(1, False, parts, 2**33, fits=False, reason=""), TrainConfig(), 100
