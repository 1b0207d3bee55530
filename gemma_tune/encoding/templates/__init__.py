"""Chat templates of the Gemma families, for base models that come without one (text and system messages)."""

from __future__ import annotations

from importlib.resources import files

# Gemma 1, 2 and 3 share their turn markers; Gemma 4 has its own. Keys are `model_type` values of config.json.
_FILES = {
    "gemma": "gemma.jinja",
    "gemma2": "gemma.jinja",
    "gemma3": "gemma.jinja",
    "gemma3_text": "gemma.jinja",
    "gemma4": "gemma4.jinja",
    "gemma4_text": "gemma4.jinja",
    "gemma4_unified": "gemma4.jinja",
    "gemma4_unified_text": "gemma4.jinja",
}


def family_template(model_type: str) -> str | None:
    """The family's chat template (Jinja source), or None for other families."""
    name = _FILES.get(model_type)
    return files(__name__).joinpath(name).read_text(encoding="utf-8") if name else None
