"""Files that an earlier export left beside those of the last one, whether they are of the same merged model and of the
same settings for Ollama, and which of all the files is recommended."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.config.stages import QUANTS
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.manifest import Manifest

# Of a format's figures: a digest of what its Modelfile says but for the file's name, see `export.modelfiles`. The file
# itself has the chat template and the settings of sampling in it.
TOLD = "told_sha256"
# Of a format's figures; those of f16 were measured on the same rows.
_KEPT = ("file", "bytes", "ollama_name", "loses", "perplexity", "general_perplexity", "f16_perplexity",
         "f16_general_perplexity", "sha256", "stamp", TOLD)


def earlier_formats(run: RunDir, manifest: Manifest,
                    quants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What lies in the run's ollama/ from earlier exports, by number format, for the manifest.

    Args:
        quants: the figures of the formats that are exported now.

    Returns:
        For each file: its name and size, ``merged``, the sha256 of the merged model that it was made from, and
        ``stale``: whether that is another one by now. Both are None of a file that no export recorded. One of this
        merged model has ``other_settings`` where its Modelfile says other things than those of now.
    """
    known = _recorded(manifest)
    current = manifest.stages.get("merge", {}).get("outputs", {}).get("merged", {}).get("sha256")
    told = next((figures.get(TOLD) for figures in quants.values()), None)
    found, beginning = {}, f"{run.model_name}-"
    for path in sorted(run.ollama.glob("*.gguf")):
        quant = path.stem.removeprefix(beginning)
        # One that was removed just now, or leads nowhere, is none.
        if quant in {*quants} or path == run.projector or path.name.startswith(".") or not path.is_file():
            continue
        size = path.stat().st_size
        figures = known.get(quant, {})
        if figures.get("bytes", size) != size:  # another one by now
            figures = {}
        merged = figures.get("merged")
        stale = None if merged is None else merged != current
        kept = {key: figures[key] for key in _KEPT if key in figures}
        found[quant] = {**kept, "file": path.name, "bytes": size, "merged": merged, "stale": stale}
        if stale is False and figures.get(TOLD) != told:
            found[quant]["other_settings"] = True
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
    return {best: _again(run, figures, [best])}


def of_this_model(earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of the files of earlier exports those of the merged model that the run has now."""
    return {quant: item for quant, item in earlier.items() if item.get("stale") is False}


def still_good(earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of these files those that are what an export would make now: of which Ollama is told the same, too."""
    return {quant: item for quant, item in of_this_model(earlier).items() if not item.get("other_settings")}


def remark(item: Mapping[str, Any]) -> str:
    """What is to be known of a file of an earlier export before it is used; empty for nothing."""
    if item["stale"]:
        return "of an earlier merged model"
    return "of other settings for Ollama" if item.get("other_settings") else ""


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


def advice(run: RunDir, earlier: Mapping[str, Mapping[str, Any]], current: Collection[str]) -> str | None:
    """What to do about files that are not what an export would make now; None if there are none."""
    old = {quant: f"{item['file']} is {remark(item)}" for quant, item in earlier.items() if remark(item)}
    if not old:
        return None
    them = "it" if len(old) == 1 else "them"
    return (f"{', '.join(old.values())}: make {them} again ({_again(run, current, [*old])}), or remove {them} from "
            f"{run.ollama}")


def _again(run: RunDir, current: Collection[str], wanted: Sequence[str]) -> str:
    """The command that makes files of the wanted number formats and sizes, and of the current ones; it takes one size,
    so that there is one for each that is wanted."""
    formats = [label for label in dict.fromkeys([*current, *wanted]) if label in QUANTS]
    sizes = [label for label in wanted if label not in QUANTS] or [label for label in current if label not in QUANTS]
    quant = ["--quant", ",".join(formats)] if formats else []
    return ", then ".join(command("export-ollama", run.root, *quant, *size)
                          for size in ([["--size", size] for size in sizes] or [[]]))
