"""Models with several chat templates, each with a name: which one a run takes.

It takes one, as it is in the adapter, the merged model, the GGUF file and Ollama: `default`, or `tool_use`, which is
meant for conversations with tools, where that writes all others as `default` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.rendering import compiled

DEFAULT, TOOL_USE = "default", "tool_use"
_SYSTEM = {"role": "system", "content": " Be brief.\n\nBe kind. "}
_TEXTS = ("Hi", "Hello.", " {{ a }}\n\n<b> ", "\n\n    é 你好\n", "So?")
_TALK = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(_TEXTS)]
# Conversations without tools: of one and of several turns, with and without a system message.
_PLAIN = [[*first, *_TALK[:turns]] for first in ([], [_SYSTEM]) for turns in range(1, len(_TALK) + 1)]
NO_TOOLS = ("a run has one chat template, and this model's `tool_use` writes conversations without tools in another "
            "way than its `default`: to train with tools, save tool_use as chat_template.jinja in a copy of the "
            "model's directory; or leave the row out")


def chosen(templates: Mapping[str, str], variables: Mapping[str, Any]) -> str:
    """The name of the template that a run takes.

    Args:
        templates: Jinja texts by name.
        variables: what templates are rendered with beside the conversation.

    Raises:
        UserError: there is none that is meant for all conversations.
    """
    if DEFAULT not in templates:
        raise UserError(f"this model has the chat templates {', '.join(sorted(templates))}, and none of them is "
                        f"`{DEFAULT}`, so it is not clear which one a conversation is to have",
                        "save the one to train with as chat_template.jinja in the model's directory (for a model of "
                        "the Hub a copy of it: `hf download ID --local-dir DIR`), and name that with --model")
    if TOOL_USE in templates and _writes_the_same(templates[DEFAULT], templates[TOOL_USE], variables):
        return TOOL_USE
    return DEFAULT


def _writes_the_same(one: str, other: str, variables: Mapping[str, Any]) -> bool:
    """Whether two templates write conversations without tools in the same way, refusals included."""
    return all(_rendered(one, turns, ask, variables, tools=None) == _rendered(other, turns, ask, variables, **tools)
               for turns in _PLAIN for ask in (True, False)
               for tools in ({"tools": None}, {}))  # some programs define them, and some do not


def _rendered(template: str, turns: list[dict[str, Any]], ask: bool, variables: Mapping[str, Any],
              **tools: None) -> str | None:
    try:
        return compiled(template).render(messages=turns, add_generation_prompt=ask, **variables, **tools)
    except UserError:  # it would take as long each time
        raise
    except Exception:  # noqa: BLE001 - a template from the Hub can fail in any way; it is judged where it is used
        return None
