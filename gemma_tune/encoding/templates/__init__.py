"""Chat templates for base models that come without one (text and system messages): of the Gemma families, and some
that any model can be given by name."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

# Gemma 1, 2, 3 and 3n share their turn markers; Gemma 4 has its own. Keys are `model_type` values of config.json.
_FILES = {
    "gemma": "gemma.jinja",
    "gemma2": "gemma.jinja",
    "gemma3": "gemma.jinja",
    "gemma3_text": "gemma.jinja",
    "gemma3n": "gemma.jinja",
    "gemma3n_text": "gemma.jinja",
    "gemma4": "gemma4.jinja",
    "gemma4_text": "gemma4.jinja",
    "gemma4_unified": "gemma4.jinja",
    "gemma4_unified_text": "gemma4.jinja",
}
# For ``prepare --chat-template``, and what ends an answer: None is the tokenizer's end of text. With the last one a
# prompt is continued as it stands, which suits a model of plain text.
ENDING_WITH_EOS, COMPLETION = "alpaca", "completion"
FOR_TURNS: dict[str, str | None] = {ENDING_WITH_EOS: None, "chatml": "<|im_end|>"}
NAMED = (*FOR_TURNS, COMPLETION)
OWN = "own"  # the model's, again


def named_template(name: str | None) -> Path | None:
    """The Jinja file that ``--chat-template`` means: one of ``NAMED``, or the user's own; None for the model's."""
    if name in (None, OWN):
        return None
    return Path(__file__).with_name(f"{name}.jinja") if name in NAMED else Path(os.path.expanduser(name))


def shown(template: Path) -> str:
    """What people call a template's file."""
    return template.stem if template == named_template(template.stem) else str(template)


def family_template(model_type: str) -> str | None:
    """The family's chat template (Jinja source), or None for other families."""
    name = _FILES.get(model_type)
    return files(__name__).joinpath(name).read_text(encoding="utf-8") if name else None
