"""The number formats of an export as lines for people: size, what each loses, its name; and what was there before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.base.words import size_text

OF_THE_FIRST = ("quant", "gguf_bytes", "ollama_name", "check_largest_error", "loses")  # figures that each format has


def format_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each number format of an export, those of the last one first, with what is to be said of it.

    Args:
        summary: of ``export-ollama``, as the manifest keeps it.
    """
    reference = summary.get("f16_perplexity")
    for quant, figures in summary.get("quants", {}).items():
        said = [size_text(figures["bytes"])]
        if reference and "perplexity" in figures:
            said.append(f"perplexity {figures['perplexity'] / reference - 1:+.1%} against f16")
        yield quant, ", ".join([*said, *_marks(figures), figures["ollama_name"]])
    for quant, figures in summary.get("earlier", {}).items():
        age = {None: "not recorded by any export", True: "from an earlier export, of an earlier merged model: stale",
               False: "from an earlier export"}[figures["stale"]]
        yield quant, ", ".join([size_text(figures["bytes"]), *_marks(figures), age])


def _marks(figures: Mapping[str, Any]) -> list[str]:
    return [figures["loses"]] if "loses" in figures else []
