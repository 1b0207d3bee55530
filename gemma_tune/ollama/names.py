"""Names of models in Ollama: `[host/][namespace/]model[:tag]`.

Sources: Ollama's `types/model/name.go` and `internal/modelref`.
"""

from __future__ import annotations

import re

from gemma_tune.base.errors import UserError

_NAME_RULE = (
    "A name is [host/][namespace/]model[:tag]; each part has 1 to 80 of the characters a-z, A-Z, 0-9, _, - and . "
    "(no letters of other scripts or with accents, no spaces), begins with none of - and ., and a namespace has no ."
)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_HOST, _NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_NAME = re.compile(rf"(({_HOST}/)?{_NAMESPACE}/)?{_PART}(:(?P<tag>{_PART}))?")


def validate_model_name(name: str) -> str:
    """The name, if Ollama takes it.

    Raises:
        UserError: it doesn't, or would send the questions to another place (`:cloud`) or another model (`:local`).
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name!r} is not a name for an Ollama model", _NAME_RULE)
    tag = (match["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        raise UserError(
            f"{name!r}: Ollama reads the tag {tag!r} as the place where a model runs", "Use another tag, or none."
        )
    return name


def default_model_name(model_name: str) -> str:
    """`<model_name>-tuned` in lower case, with what Ollama doesn't take replaced by a hyphen."""
    stem = re.sub(r"[^a-z0-9_.-]+", "-", model_name.rsplit("/", 1)[-1].lower())
    stem = stem.lstrip("-.")[: 80 - len("-tuned")].rstrip("-.")
    return f"{stem or 'model'}-tuned"


def tagged(name: str, quant: str) -> str:
    """The name with a number format as its tag, which tells several models of one name apart.

    Raises:
        UserError: the name has a tag already, or is none that Ollama takes.
    """
    match = _NAME.fullmatch(validate_model_name(name))
    if match["tag"]:
        raise UserError(f"{name!r} has a tag, and several number formats need one each",
                        f"leave :{match['tag']} out of --name, or ask for one --quant")
    return validate_model_name(f"{name}:{quant}")
