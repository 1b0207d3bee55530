"""The README.md of the exported files at the Hub: how they are run, what each format loses, and how they were made.

The last, and the licence, are what the merged model's own card says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base.words import size_text
from gemma_tune.export.checks import ExportChecks, formats_markdown
from gemma_tune.export.parity_report import markdown_table
from gemma_tune.export.senses import taken
from gemma_tune.export.target import Target
from gemma_tune.models.licence import card_header
from gemma_tune.ollama.modelfile import system_text


@dataclass(frozen=True)
class Listed:
    """A GGUF file of a repository.

    Args:
        format: its number format as the Hub and llama.cpp know it; None of a mix, which has no name there.
        bytes: its size.
    """

    name: str
    format: str | None
    bytes: int

    def for_ollama(self, repo_id: str) -> str:
        """What Ollama calls it."""
        return f"hf.co/{repo_id}:{self.format or self.name}"

    def for_llama(self, repo_id: str, others: Sequence[Listed]) -> str:
        """The options by which llama.cpp takes it: it looks for a format anywhere in a name, so that F16 is in BF16."""
        if self.format and not any(f"{self.format}." in other.name for other in others if other != self):
            return f"-hf {repo_id}:{self.format}"
        return f"-hf {repo_id} --hf-file {self.name}"


def card_of(repo_id: str, merged: Path, files: Sequence[Listed], to_take: str, summary: Mapping[str, Any],
            target: Target, projector: Listed | None = None) -> str:
    """A model card for the Hugging Face Hub, in Markdown with a YAML header.

    Args:
        merged: the folder of the merged model, whose card tells how it was made.
        files: of the repository.
        to_take: name of the one that the examples use.
        summary: the export's, as the manifest keeps it.
        projector: the file that the model sees with.
    """
    import yaml

    path = merged / "README.md"
    card, told = path.read_text(encoding="utf-8") if path.is_file() else "", card_header(merged)
    example = next(file for file in files if file.name == to_take)
    header = {name: value for name, value in told.items() if name != "library_name"}
    header["tags"] = ["gguf", *told.get("tags", ["gemma-tune"])]
    if projector is None and "pipeline_tag" in header:
        header["pipeline_tag"] = "text-generation"  # though the merged model takes pictures
    figures = summary["quants"]
    losses = ExportChecks.recorded(figures, summary).losses
    differs = [f"- {text}" for text in summary.get("different_in_ollama", ())]
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    made = [line for name in ("How it was made", "Licence") if (text := _section(card, name))
            for line in (f"## {name}", "", text, "")]
    return "\n".join([
        "---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
        f"# {title[1] if title else 'A fine-tuned model'}, as GGUF", "",
        "GGUF files for Ollama, llama.cpp, LM Studio and others, with the chat template of the training in them.", "",
        "## Use", "", *_usage(repo_id, files, example, target, projector), "",
        *_pictures(summary, example.for_llama(repo_id, files), projector),
        *(["Different in Ollama:", "", *differs, ""] if differs else []),
        "## Files", "", *markdown_table(_rows(repo_id, files, target, projector)),
        *(formats_markdown(figures, losses) if losses else ()), "", *made])


def _section(card: str, name: str) -> str:
    found = re.search(rf"^## {name}\n+(.*?)\s*(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _rows(repo_id: str, files: Sequence[Listed], target: Target, projector: Listed | None) -> list[tuple[str, ...]]:
    rows = [("file", "size", "for llama.cpp", "for Ollama"), *(
        (file.name, size_text(file.bytes), f"`{file.for_llama(repo_id, files)}`", f"`{file.for_ollama(repo_id)}`")
        for file in files)]
    if projector:
        rows.append((projector.name, size_text(projector.bytes), *["comes with each"] * 2))
    return rows if target.chat.template is not None else [row[:-1] for row in rows]  # Ollama is not to run it from here


def _pictures(summary: Mapping[str, Any], llama: str, projector: Listed | None) -> list[str]:
    """What is to be known of pictures; ``llama``: the options by which llama.cpp takes the file of the examples."""
    if projector is None:
        said = "The model that these files are of takes more than text; the files take text alone."
        return [said, ""] if summary.get("text_alone") else []
    return [f"`{projector.name}` is what the model takes {taken(summary['projector']['senses'])} with. Ollama and "
            f"llama.cpp load it along with each of the other files (`llama-mtmd-cli {llama}` in a terminal), and so "
            "does LM Studio from the same folder.", ""]


def _usage(repo_id: str, files: Sequence[Listed], file: Listed, target: Target, projector: Listed | None) -> list[str]:
    llama = file.for_llama(repo_id, files)
    folder = repo_id.split("/")[1]
    downloads = " ".join(one.name for one in (file, projector) if one)
    create = [f"hf download {repo_id} Modelfile {downloads} --local-dir {folder}",
              f"ollama create {target.name} -f {folder}/Modelfile", f"ollama run {target.name}"]
    with_ollama = [f"ollama run {file.for_ollama(repo_id)}"] if target.chat.template is not None else create
    lines = ["```bash", *with_ollama, f"llama-cli {llama}", f"llama-server {llama} --jinja", "```", ""]
    if target.chat.template is None:
        lines.append(f"For Ollama the Modelfile names its renderer {target.chat.renderer}, which lays out prompts as in"
                     " the training; `ollama run hf.co/…` does not know of it.")
    else:
        said = ["`template`, the chat template of the training in Ollama's language", "`params`, sampling, context "
                "length and stop texts",
                *(["`system`, the system prompt"] if system_text(target.chat, target.system) else [])]
        lines.append(f"Ollama reads here {'; '.join(said)}. `Modelfile` says the same for `ollama create`.")
    if target.system:  # the chat template has its own in it
        lines += ["", "llama.cpp does not read `system`: llama-cli takes a copy of it with `--system-prompt-file`, "
                      "llama-server a system message with each request."]
    return lines
