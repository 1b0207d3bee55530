"""A run directory as it is at the end, written by hand: what a report is made of, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_tune.measure.intervals import compare
from gemma_tune.run.directory import RunDir

TIME = ("2026-03-01T10:00:00+00:00", "2026-03-01T10:02:30+00:00")


def stage(summary: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"status": "done", "started": TIME[0], "ended": TIME[1], "base": "b", "inputs": {}, "outputs": {},
            "config": {name: {"value": value, "from": "flag"} for name, value in settings.items()}, "summary": summary}


def measures(rows: int = 24) -> dict[str, Any]:
    """Plausible figures of ``eval``, with real intervals."""
    import numpy as np

    random = np.random.default_rng(1)
    base, tuned = 4 + random.random(rows), 2.5 + random.random(rows)
    tokens = random.integers(40, 90, rows)
    found = {"loss": compare(base * tokens, tuned * tokens, tokens).as_json(),
             "perplexity": compare(base * tokens, tuned * tokens, tokens, change=np.exp).as_json(),
             "chrf": compare(10 * random.random(rows), 30 + 10 * random.random(rows)).as_json(),
             "exact_match": compare(np.zeros(rows), np.arange(rows) % 8 == 0).as_json(),
             "ended": compare(np.zeros(rows), np.ones(rows)).as_json(),
             "repeats": compare(np.arange(rows) % 2, np.zeros(rows)).as_json(),
             "length": compare(np.full(rows, 128), random.integers(40, 90, rows)).as_json(),
             "general_loss": compare(2.7 + random.random(20), 2.72 + random.random(20)).as_json()}
    found["general_perplexity"] = found["general_loss"]
    return found


def finished_run(root: Path, text: str = "Is the margin falling?", name: str = "tiny-gemma") -> RunDir:
    """A run with everything that a report shows; ``text`` stands wherever a text of data or a model can."""
    run = RunDir(root, name)
    for folder in (run.data, run.metrics.parent):
        folder.mkdir(parents=True)
    quants = {quant: {"bytes": size * 10**6, "ollama_name": f"{name}:{quant}", "file": f"{name}-{quant}.gguf",
                      "perplexity": 18.8 * (1 + loss), "general_perplexity": 16.7 * (1 + 2 * loss), "kl": loss,
                      **({"loses": text} if loss > 0.1 else {})}
              for quant, size, loss in (("q8_0", 292, 0.0), ("q6_k", 283, 0.001), ("q5_k_m", 260, 0.004),
                                        ("q4_k_m", 253, 0.033), ("q4_0", 241, 0.11))}
    counts = {"equal": 22, "template_only": 0, "known_limit": 1, "differs": 0, "not_checked": 0, "remarks": [text]}
    stages = {
        "prepare": stage({"rows": 240}, data=["../rows.jsonl"], valid=0.1),
        "train": stage({"steps": 68, "eval_loss_before": 4.2252, "eval_loss_after": 2.94, "kept_step": 34,
                        "tokens_per_second": 466.7, "training_seconds": 72.0, "adapter_norm": 2.53, "device": "cpu",
                        "dtype": "bf16", "effective_batch": 4, "divergence_from_base": 1.39,
                        "trainable_parameters": 3796992}, rank=16, alpha=32.0, learning_rate=2e-4),
        "eval": stage({"questions": 3, "rows": 24, "rows_there": 24, "base_ended": 0, "tuned_ended": 3,
                       "measures": measures(),
                       "tasks": {"arc_easy": {"acc": {"base": [0.41, 0.02], "tuned": [0.43, 0.02]}}}}, questions=3),
        "merge": stage({"check_same_answers": 4, "check_prompts": 4, "check_divergence": 5e-5}),
        "export-ollama": stage({"quants": quants, "f16_perplexity": 18.8, "f16_general_perplexity": 16.7,
                                "recommended": "q4_k_m",
                                "parity": {"ok": True, "engine": text, "ids": {"llama.cpp": counts, "Ollama": counts},
                                           "greedy": {"q8_0": {"answers": 4, "whole": 4, "tokens": 128,
                                                               "leading": 128}}}}, quant=["q8_0", "q4_0"])}
    manifest = {"schema": 1, "gemma_tune": "0.1.0", "libraries": {}, "stages": stages,
                "model": {"id": "google/gemma-3-270m-it", "name": name, "source": "hub", "revision": "a" * 40, "path": None,
                          "fingerprint": "f", "files": {}}}
    run.manifest.write_text(json.dumps(manifest))
    run.answers.write_text(json.dumps([
        {"prompt": [{"role": "system", "content": text}, {"role": "user", "content": text}], "base": text * 3,
         "base_ended": False, "tuned": text, "tuned_ended": True, "reference": text, "tools": [text]}] * 3))
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in [
        {"step": 0, "eval_loss": 4.2252},
        *({"step": n, "loss": 2.2 + 2 / (1 + n / 9) + (n % 5) / 12} for n in range(1, 69)),
        *({"step": n, "eval_loss": 3.1 - n / 300 if n < 40 else 2.9 + n / 800} for n in (17, 34, 51, 68))]))
    run.data_report.write_text(json.dumps({
        "rows": 240, "train_rows": 216, "valid_rows": 24, "rejected_rows": 3, "duplicate_rows": 2, "tokens": 30000,
        "trained_tokens": 18000, "rejected_by_reason": {text: 3}, "formats": {"messages": 240},
        "drawn": [{"data": f"/home/somebody/{text}", "rows": 240, "of": 52002}, {"data": "small.jsonl", "rows": 9, "of": 9}],
        "files": [{"file": f"/home/somebody/{text}", "rows": 240}], "ends_held_out": [{}] * 3,
        "before_the_limit": {"scripts": {"Latin": 0.5, "Han": 0.5}, "length": {"longest": 209},
                             "histogram": [{"from": 84 + 12 * n, "to": 95 + 12 * n, "rows": rows}
                                           for n, rows in enumerate((7, 20, 22, 5, 0, 0, 4, 7, 6, 1))]}}))
    return run
