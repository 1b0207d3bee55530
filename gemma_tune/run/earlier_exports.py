"""Files that an earlier export left beside those of the last one, whether they are of the same merged model, and which
of all the files is recommended."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.config.stages import QUANTS
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.manifest import Manifest

# Of a format's figures; those of f16 were measured on the same rows.
_KEPT = ("file", "bytes", "ollama_name", "loses", "perplexity", "general_perplexity", "f16_perplexity",
         "f16_general_perplexity", "sha256", "stamp")


def earlier_formats(run: RunDir, manifest: Manifest, quants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What lies in the run's ollama/ from earlier exports, by number format, for the manifest.

    Args:
        quants: the formats that are exported now.

    Returns:
        For each file: its name and size, ``merged``, the sha256 of the merged model that it was made from, and
        ``stale``: whether that is another one by now. Both are None of a file that no export recorded.
    """
    known = _recorded(manifest)
    current = manifest.stages.get("merge", {}).get("outputs", {}).get("merged", {}).get("sha256")
    found, beginning = {}, f"{run.model_name}-"
    for path in sorted(run.ollama.glob("*.gguf")):
        quant = path.stem.removeprefix(beginning)
        # One that was removed just now, or leads nowhere, is none.
        if quant in {*quants} or path.name.startswith(".") or not path.is_file():
            continue
        size = path.stat().st_size
        figures = known.get(quant, {})
        if figures.get("bytes", size) != size:  # another one by now
            figures = {}
        merged = figures.get("merged")
        kept = {key: figures[key] for key in _KEPT if key in figures}
        found[quant] = {**kept, "file": path.name, "bytes": size, "merged": merged,
                        "stale": None if merged is None else merged != current}
    return found


def _recorded(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What the manifest has of the files of the last export, and of those that it left, by number format."""
    record = manifest.stages.get("export-ollama")
    if record is None:
        return {}
    summary, made = record["summary"], {Path(item["path"]).name: item for item in record["outputs"].values()}
    common = {"merged": record["inputs"].get("merged", {}).get("sha256"),
              **{name: value for name, value in summary.items() if name.startswith("f16_")}}
    last = {}
    for quant, figures in summary.get("quants", {}).items():
        item = made.get(figures.get("file"), {})
        last[quant] = {**figures, **common, **{name: item[name] for name in ("sha256", "stamp") if name in item}}
    return {**summary.get("earlier", {}), **last}


def summary_now(run: RunDir, manifest: Manifest) -> dict[str, Any]:
    """The summary of the last export, as far as it is about files of earlier ones by what lies there now: one that was
    removed since is not recommended."""
    summary = manifest.stages.get("export-ollama", {"summary": {}})["summary"]
    figures = summary.get("quants", {})
    return with_formats(summary, figures, earlier_formats(run, manifest, figures)) if summary else {}


def gone(run: RunDir, manifest: Manifest) -> dict[str, str]:
    """The number format that was recommended, where that was of an earlier export whose file is gone, and the command
    that makes it again."""
    summary = manifest.stages.get("export-ollama", {"summary": {}})["summary"]
    best, figures = summary.get("recommended"), summary.get("quants", {})
    if best is None or best in {**figures, **earlier_formats(run, manifest, figures)}:
        return {}
    return {best: _again(run, [*figures, best])}


def still_good(earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of the files of earlier exports those of the merged model that the run has now."""
    return {quant: item for quant, item in earlier.items() if item.get("stale") is False}


def smallest_sound(figures: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The smallest format against which nothing is to be said; None where there is none, or nothing was measured.

    Args:
        figures: by number format, as the manifest keeps them.
    """
    sound = [quant for quant, found in figures.items() if "loses" not in found
             and ("perplexity" in found or "general_perplexity" in found)]
    return min(sound, key=lambda quant: figures[quant]["bytes"], default=None)


def with_formats(summary: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]],
                 earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An export's summary with the format that is recommended of all that lie there, and with what earlier exports
    left, in place of what it says of both."""
    best = smallest_sound({**figures, **still_good(earlier)})
    kept = {name: value for name, value in summary.items() if name not in ("recommended", "earlier")}
    return kept | ({"recommended": best} if best else {}) | ({"earlier": dict(earlier)} if earlier else {})


def leftover_modelfiles(run: RunDir, current: Iterable[Path]) -> list[str]:
    """Names of Modelfiles of earlier exports."""
    return sorted(path.name for path in {*run.ollama.glob("Modelfile*")} - {*current})


def advice(run: RunDir, earlier: Mapping[str, Mapping[str, Any]], current: Iterable[str]) -> str | None:
    """What to do about files of an earlier merged model; None if there are none."""
    stale = [quant for quant, figures in earlier.items() if figures["stale"]]
    if not stale:
        return None
    files = [earlier[quant]["file"] for quant in stale]
    again = _again(run, [*current, *stale])
    remove = shlex.join(["rm", *(str(run.ollama / name) for name in files)])
    return (f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} of an earlier merged model: make "
            f"{'it' if len(files) == 1 else 'them'} again ({again}), or remove {'it' if len(files) == 1 else 'them'} "
            f"({remove})")


def _again(run: RunDir, labels: Iterable[str]) -> str:
    """The command that makes files of these number formats and sizes."""
    once = [*dict.fromkeys(labels)]
    formats, sizes = ([label for label in once if (label in QUANTS) == named] for named in (True, False))
    return command("export-ollama", run.root, *(["--quant", ",".join(formats)] if formats else []),
                   *(["--size", sizes[0]] if sizes else []))
