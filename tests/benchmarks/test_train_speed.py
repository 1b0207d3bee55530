"""What the training benchmark says of a contender's steps, against schedules whose answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))

import step_clock  # noqa: E402
from train_report import speed, step_seconds, warmup_table  # noqa: E402
from train_speed import Work, answer, parse  # noqa: E402


def test_the_first_steps_are_reported_apart():
    """Two slow steps, then ten tokens in a second; one step that is slow in the middle stays in the steady figure."""
    found = step_clock.figures([50.0, 40.0, 10.0, 10.0, 10.0, 20.0, 10.0, 10.0], [100] * 8)
    assert found == {"warmup_steps": 2, "warmup_seconds": 90.0, "steady_tokens_per_second": pytest.approx(600 / 70)}
    longer = step_clock.figures([9.0, 1.0, 2.0, 4.0], [100, 100, 200, 400])  # longer rows are no slower
    assert longer["steady_tokens_per_second"] == 100 and longer["warmup_steps"] == 1
    assert step_clock.figures([], []) == {} == step_clock.figures([1.0], [])
    assert step_clock.figures([2.0], [100])["steady_tokens_per_second"] == 50


def test_kernels_that_overlap_count_once():
    assert step_clock.covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert step_clock.covered([]) == 0


def test_a_trainer_is_watched_without_a_change_to_it(tiny, tmp_path, monkeypatch):
    """Steps, padding and tokens of a plain Trainer, whose batches have a mask."""
    import transformers.trainer as library

    monkeypatch.setattr(library, "DEFAULT_CALLBACKS", list(library.DEFAULT_CALLBACKS))
    monkeypatch.setattr(library.Trainer, "get_batch_samples", library.Trainer.get_batch_samples)
    seen = step_clock.watch(profile=False)
    rows = Dataset.from_list([{"input_ids": [5] * 8, "labels": [5] * 8, "attention_mask": [1] * n + [0] * (8 - n)}
                              for n in (8, 4, 8, 4, 8, 4)])
    Trainer(model=AutoModelForCausalLM.from_pretrained(tiny), train_dataset=rows, args=TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=3, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True)).train()
    found = seen.figures()
    assert len(found["step_seconds"]) == 3 and sum(real for real, _ in seen.counts) == 36
    assert found["padding"] == pytest.approx(0.25)
    assert 0 < found["step_seconds"][0] < found["first_step_after"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_profile_counts_the_kernels_of_a_step():
    x = torch.ones(64, 64, device="cuda")
    profiler = step_clock._started()
    began = step_clock.time.perf_counter()
    for _ in range(10):
        x = x + 1
    found = step_clock._work(profiler, 2, began)
    assert found["kernels_per_step"] == 5 and 0 < found["gpu_busy"] < 1


def test_a_contender_is_a_command(tmp_path, monkeypatch):
    """It gets three arguments and the settings; what it prints last becomes its figures."""
    script = tmp_path / "other.py"
    script.write_text("import json, os, sys\nprint('noise')\nprint(json.dumps({'seconds': 2.0, 'rows': 3, 'train_loss': 1.5, "
                      "'peak_rss_bytes': 7, 'arguments': sys.argv[1:], 'batch': json.loads(os.environ['TRAIN_SPEED'])['batch_size']}))")
    monkeypatch.setattr(sys, "argv", ["train_speed.py", "rows.json", "--contender", f"other={sys.executable} {script}",
                                      "--with", "ours", "--batch-size", "8", "--max-steps", "2"])
    options = parse()
    assert options.contenders == ["ours", "other"] and options.rows == 16
    work = Work(tmp_path, options)
    work.job |= {"rows": "rows.jsonl", "checkpoint": "model"}
    figures = work.run("other")
    assert figures["arguments"] == ["rows.jsonl", "model", str(tmp_path / "adapter-other")]
    assert figures["batch"] == 8 and figures["peak_bytes"] == 7


@pytest.mark.parametrize("given", ["other", "=x", "ours=x", "other="])
def test_a_contender_that_is_none(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_speed.py", "rows.json", "--contender", given])
    with pytest.raises(SystemExit):
        parse()
    assert "give it as NAME=COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("printed, said", [("", "(nothing)"), ("done", "done"), ('{"seconds": 1}', "rows, train_loss")])
def test_a_contender_that_does_not_answer(printed, said):
    with pytest.raises(SystemExit, match="other: its last line") as stopped:
        answer(printed, "other")
    assert said in str(stopped.value)


def test_the_table_has_the_gpu_where_there_is_one():
    seen = {"warmup_steps": 1, "warmup_seconds": 3.0, "steady_tokens_per_second": 1234.5, "padding": 0.125}
    cpu = speed({"steps_seen": seen})
    assert warmup_table({"ours": cpu | {"seconds": 10.0}, "fp32": {}})[2:] == [
        "| gemma-tune | 1,234 | – | 1 | 3.0 s | 12.5% |"]
    gpu = speed({"steps_seen": seen | {"gpu_busy": 0.5}, "peak_gpu_bytes": 2_000_000_000})
    assert "| 50% | – | – | 2.00 GB | – |" in warmup_table({"x": gpu | {"seconds": 10.0}})[2]


def test_profiled_steps_do_not_slow_the_training_down():
    """Two of three steps of 100 tokens were timed, the third was profiled."""
    seen = {"profiled_steps": 1, "step_seconds": [3.0, 1.0], "step_tokens": [100, 100]}
    assert step_seconds({"seconds": 50.0, "steps_seen": seen}, 300) == 6
    assert step_seconds({"seconds": 50.0, "steps_seen": {"step_seconds": [1.0]}}, 300) == 50


def test_a_shape_is_made_once(tmp_path, monkeypatch):
    """Here with few layers; the real ones are too large for a test."""
    import shapes

    monkeypatch.setitem(shapes.SHAPES, "small", dict(
        shapes.SHAPES["gemma3-270m"], hidden_size=32, intermediate_size=64, num_hidden_layers=6, vocab_size=512))
    folder = shapes.make_checkpoint("small", tmp_path / "model", None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.layer_types.count("full_attention") == 1
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3_text"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes.make_checkpoint("small", folder, None) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
