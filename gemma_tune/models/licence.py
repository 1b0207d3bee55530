"""The licence of a base model, as its files state it: in its model card, its LICENSE file, or its GGUF metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.cache import cache_dir
from gemma_tune.base.errors import UserError
from gemma_tune.models.source import DEMO, BaseModel

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # how the Hub writes licences: gemma, apache-2.0, bigcode-openrail-m
_HEADER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_TEXTS = {"gemma": r"Gemma\s+Terms\s+of\s+Use", "apache-2.0": r"Apache\s+License\s+Version\s+2\.0",
          "mit": r"MIT\s+License"}
_BEGINNING = 2000  # characters of a licence that hold its name
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
_LICENCES = ("LICEN[SC]E*", "Licen[sc]e*", "licen[sc]e*")
LICENCE_FILES = (*_LICENCES, "NOTICE*", "USE_POLICY*")  # patterns of what goes along with the weights


def base_licence(model: BaseModel) -> dict[str, str]:
    """``license``, and ``license_name`` and ``license_link`` where there are such, as a model card's header has them.

    Empty where nothing states a licence: the kind of model does not tell under which terms somebody gave it away.
    """
    return _from_card(model) or _from_text(model.path) or _from_gguf(model)


def licence_note(licence: Mapping[str, str]) -> str:
    """What a card says about the licence."""
    if not licence:
        return "The base model's licence applies to this model too. It was not stated where this model was made."
    if licence["license"] == "gemma":  # as section 3.1 of the terms wants it, with that files were modified
        return (f"Gemma is provided under and subject to the Gemma Terms of Use found at [ai.google.dev/gemma/terms]"
                f"({GEMMA_TERMS}). The weights here are modified: they were fine-tuned. The terms, with the prohibited "
                "uses that they list, apply to whoever uses or passes on this model.")
    name = licence.get("license_name") or licence["license"]
    link = licence.get("license_link")
    return (f"That of the base model: {f'[{name}]({link})' if link else name}. The weights here are modified: they "
            "were fine-tuned.")


def licence_notice(licence: Mapping[str, str]) -> str | None:
    """What a file NOTICE is to say beside the weights; None where the licence wants none.

    Gemma's terms want a text file with this sentence, in section 3.1, whoever passes the model on.
    """
    if licence.get("license") != "gemma":
        return None
    return "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"


def card_header(folder: Path) -> dict[str, Any]:
    """What the header of the card in a model's folder says; empty where there is none, or none that can be read."""
    import yaml

    header = _HEADER.match(_beginning(folder / "README.md", 100_000))
    try:
        values = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _from_card(model: BaseModel) -> dict[str, str]:
    return _fields(card_header(model.path), model)


def _fields(values: Mapping[str, Any], model: BaseModel) -> dict[str, str]:
    licence = values.get("license")
    if not isinstance(licence, str) or not _ID.fullmatch(licence.lower()):
        return {}
    found = {"license": licence.lower()}
    if isinstance(name := values.get("license_name"), str) and _ID.fullmatch(name.lower()):
        found["license_name"] = name.lower()
    if isinstance(link := values.get("license_link"), str) and (address := _address(link.strip(), model)):
        found["license_link"] = address
    return found


def _address(link: str, model: BaseModel) -> str | None:
    """A link that leads to the base's licence also from the merged model, which has a copy of the file."""
    if re.fullmatch(r"https?://[^\s()<>]+", link):
        return link
    if not re.fullmatch(r"\w[\w.-]*", link):
        return None
    if link in [path.name for path in _texts(model.path)]:
        return link
    return f"https://huggingface.co/{model.id}/blob/{model.revision}/{link}" if model.source == "hub" else None


def _from_text(folder: Path) -> dict[str, str]:
    """By the licence's file, which the merged model has a copy of."""
    for path in _texts(folder):
        beginning = _beginning(path, _BEGINNING)
        for licence, text in _TEXTS.items():
            if re.search(text, beginning):
                return {"license": licence}
        return {"license": "other", "license_name": "base-model-license", "license_link": path.name}
    return {}


def _texts(folder: Path) -> list[Path]:
    return sorted({path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()})


def _beginning(path: Path, length: int) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read(length)
    except OSError:
        return ""


def _from_gguf(model: BaseModel) -> dict[str, str]:
    from gemma_tune.gguf.reader import read_gguf_metadata

    paths = sorted((cache_dir() / DEMO).glob("*.gguf")) if model.source == DEMO else [model.origin]
    if model.source not in (DEMO, "gguf") or not paths or paths[0] is None:
        return {}
    keys = {f"general.license{part}": f"license{part.replace('.', '_')}" for part in ("", ".name", ".link")}
    try:
        found = read_gguf_metadata(paths[0], keys)
    except UserError:
        return {}
    return _fields({keys[name]: value for name, value in found.items()}, model)
