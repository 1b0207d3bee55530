"""Chat templates as Transformers' ``apply_chat_template`` renders them: sandboxed, as templates come from the Hub.

What training rendered, what the GGUF carries and what Ollama's TEMPLATE is derived from go through this one function.
"""

from __future__ import annotations

from typing import Any


def compiled(template: str) -> Any:
    """A template, ready to render; the same source is compiled once.

    Raises:
        jinja2.TemplateError: it cannot be compiled.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)
