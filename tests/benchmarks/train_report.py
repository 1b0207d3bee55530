"""The figures of ``train_speed.py``: medians, tables, and how ours compares."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

TITLES = {"ours": "gemma-tune", "ours-eager": "gemma-tune, not captured", "trl": "TRL, its defaults", "trl-best": "TRL, tuned", "fp32": "plain fp32",
          "llama-factory": "LLaMA-Factory", "unsloth": "Unsloth"}
TO_REACH = {"trl": 6.0, "llama-factory": 3.0}  # times as many conversations per second


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def summarised(runs: list[dict[str, Any]], name: str, facts: dict[str, Any], epochs: int) -> dict[str, Any]:
    """A contender's figures: medians of its runs' speeds, the highest of their memory."""
    losses = runs[-1].get("losses")
    figures = {"runs": runs, "wall_seconds": statistics.median(r["wall_seconds"] for r in runs),
               "peak_bytes": max(r["peak_bytes"] for r in runs), "adapter": runs[-1].get("adapter"),
               "training_loss": statistics.fmean(losses) if losses else runs[-1].get("train_loss")}
    if name != "fp32":
        seconds = statistics.median(step_seconds(r, facts["tokens"] * epochs) for r in runs)
        least = facts["limit"]["all_tokens" if name == "trl" else "trained_only"]["seconds"] * epochs
        figures |= {"seconds": seconds, "conversations_per_second": facts["rows"] * epochs / seconds,
                    "tokens_per_second": facts["tokens"] * epochs / seconds, "share_of_limit": least / seconds} | speed(runs[-1])
    if runs[-1].get("rows", facts["rows"]) != facts["rows"]:
        say(f"{name}: it trained on {runs[-1]['rows']} rows, not on {facts['rows']}: its figures do not compare")
    return figures


def table(facts: dict[str, Any], contenders: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what was measured where, and a line for each contender."""
    m, limit = facts["machine"], facts["limit"]["trained_only"]
    where = m["gpu"] or f"{m['cores']} cores of {m['cpu']}"
    lines = [
        f"{facts['rows']} conversations ({facts['tokens']:,} tokens, {facts['trained_tokens']:,} of them learned), "
        f"{options.epochs} epoch(s) in batches of {options.batch_size}, model `{options.model}`. {where}, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB, {m['dtype']}; torch {m['versions']['torch']}, TRL {m['versions']['trl']}. "
        f"At the {limit['gflops_per_second']:,.0f} GFLOP/s measured for the model's matrix products, this takes "
        f"{limit['seconds'] * options.epochs:.1f} s at least." + (
            f" The held-out loss of the base model is {facts['held_out']['base']:.4f}." if "held_out" in facts else ""), "",
        "| | conversations/s | real tokens/s | of the matrix limit | peak memory | training loss | held-out loss | whole command |",
        "|---|---|---|---|---|---|---|---|"]
    for name, c in contenders.items():
        speed = ([f"{c['conversations_per_second']:.2f}", f"{c['tokens_per_second']:,.0f}", f"{c['share_of_limit']:.0%}",
                  f"{c['peak_bytes'] / 1e9:.2f} GB"] if "seconds" in c else ["–"] * 4)
        wall = f"{c['wall_seconds']:.0f} s" if "seconds" in c else "–"
        losses = [f"{x:.4f}" if x is not None else "–" for x in (c["training_loss"], c.get("held_out_loss"))]
        lines.append(f"| {TITLES.get(name, name)} | {' | '.join([*speed, *losses, wall])} |")
    return "\n".join([*lines, "", *warmup_table(contenders)])


def step_seconds(run: dict[str, Any], tokens: int) -> float:
    """Seconds in steps; profiled ones, which take longer, count as the mean of the others."""
    seen = run.get("steps_seen") or {}
    if seen.get("profiled_steps") and sum(seen.get("step_tokens", ())):
        return sum(seen["step_seconds"]) * tokens / sum(seen["step_tokens"])
    return run["seconds"]


def speed(run: dict[str, Any]) -> dict[str, Any]:
    """A contender's steps as step_clock.py saw them, and what it says itself."""
    seen = run.get("steps_seen") or {}
    said = ("warmup_seconds", "steady_tokens_per_second", "peak_gpu_bytes", "peak_reserved_bytes")
    return {"steps_seen": seen | {name: run[name] for name in said if name in run}}


def warmup_table(contenders: dict[str, Any]) -> list[str]:
    """Markdown lines: warm-up apart from the steady speed, and on a GPU how well it was used."""
    def shown(seen: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
        return form.format(seen[name] * scale) if seen.get(name) is not None else "–"

    on_gpu = any("peak_gpu_bytes" in c.get("steps_seen", {}) for c in contenders.values())
    columns = [("steady tokens/s", "steady_tokens_per_second", "{:,.0f}", 1.0), ("first step ended after",
                "first_step_after", "{:.1f} s", 1.0), ("steps until at speed", "warmup_steps", "{:.0f}", 1.0),
               ("which took", "warmup_seconds", "{:.1f} s", 1.0), ("padding", "padding", "{:.1%}", 1.0)]
    if on_gpu:
        columns += [("GPU busy", "gpu_busy", "{:.0%}", 1.0), ("kernels per step", "kernels_per_step", "{:,.0f}", 1.0),
                    ("GPU time per step", "gpu_seconds_per_step", "{:.1f} ms", 1e3),
                    ("allocated", "peak_gpu_bytes", "{:.2f} GB", 1e-9), ("reserved", "peak_reserved_bytes", "{:.2f} GB", 1e-9)]
    lines = ["| | " + " | ".join(title for title, *_ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, contender in contenders.items():
        if "seconds" in contender:
            cells = (shown(contender["steps_seen"], *column) for _, *column in columns)
            lines.append(f"| {TITLES.get(name, name)} | {' | '.join(cells)} |")
    return lines


def compare(contenders: dict[str, Any]) -> None:
    """Say how ours compares with what is to be reached."""
    ours = contenders.get("ours")
    if not ours:
        return
    for name, factor in TO_REACH.items():
        if name in contenders:
            times = ours["conversations_per_second"] / contenders[name]["conversations_per_second"]
            say(f"{times:.1f}x the conversations/s of {TITLES.get(name, name)} (to reach: {factor:g}x)")
    say(f"{ours['share_of_limit']:.0%} of the matrix limit (to reach: 50 %)")
    if "trl" in contenders:
        say(f"{ours['peak_bytes'] / contenders['trl']['peak_bytes']:.0%} of the peak memory of TRL's defaults (to reach: below)")
    if "fp32" in contenders and "held_out_loss" in ours:
        off = ours["held_out_loss"] / contenders["fp32"]["held_out_loss"] - 1
        say(f"held-out loss {off:+.2%} against plain fp32 (to reach: within 0.5 %)")
