"""Chat templates as Transformers' ``apply_chat_template`` renders them: sandboxed, as templates come from the Hub.

What training rendered, what the GGUF carries and what Ollama's TEMPLATE is derived from go through this one function.
"""

from __future__ import annotations

import functools
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_tune.encoding.bounds import Bounded


@functools.lru_cache(64)
def compiled(template: str) -> Bounded:
    """A template, ready to render; the same source is compiled once. What a rendering takes is bounded.

    Raises:
        jinja2.TemplateError: it cannot be compiled.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from gemma_tune.encoding.bounds import Bounded

    return Bounded(_compile_jinja_template("").environment, template)


def line_of(error: BaseException) -> int | None:
    """The line of a template that an exception of its compilation or rendering comes from; None where none is known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return getattr(error, "lineno", None) or (lines[-1] if lines else None)
