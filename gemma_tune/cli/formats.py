"""The number formats of an export as lines for people: size, what each loses, its name; and what was there before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.base.words import size_text
from gemma_tune.run.earlier_exports import remark

OF_THE_FIRST = ("quant", "gguf_bytes", "ollama_name", "check_largest_error", "loses")  # figures that each format has


def format_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each number format of an export, those of the last one first, with what is to be said of it.

    Args:
        summary: of ``export-ollama``, as the manifest keeps it.
    """
    several = len({**summary.get("quants", {}), **summary.get("earlier", {})}) > 1
    best = {summary.get("recommended"): ["recommended"]} if several else {}
    for quant, figures in summary.get("quants", {}).items():
        said = [size_text(figures["bytes"]), *_measured(figures, summary)]
        yield quant, ", ".join([*said, *_marks(figures), figures["ollama_name"], *best.get(quant, [])])
    for quant, figures in summary.get("earlier", {}).items():
        age = "not recorded by any export" if figures["stale"] is None else "from an earlier export"
        age += f", {why}: stale" if (why := remark(figures)) else ""
        yield quant, ", ".join([size_text(figures["bytes"]), *_measured(figures, figures), *_marks(figures), age,
                                *best.get(quant, [])])


def _measured(figures: Mapping[str, Any], of_f16: Mapping[str, Any]) -> list[str]:
    """How much worse than f16 a format predicts, of what was measured."""
    worse = {prefix: figures[f"{prefix}perplexity"] / reference - 1 for prefix in ("", "general_")
             if (reference := of_f16.get(f"f16_{prefix}perplexity")) and f"{prefix}perplexity" in figures}
    shown = {name: f"{round(value, 3) + 0.0:+.1%}" for name, value in worse.items()}  # no -0.0%
    said = [f"perplexity {shown['']} against f16"] if "" in worse else []
    return [*said, *([f"{shown['general_']} on general text"] if "general_" in worse else [])]


def _marks(figures: Mapping[str, Any]) -> list[str]:
    return [figures["loses"]] if "loses" in figures else []
