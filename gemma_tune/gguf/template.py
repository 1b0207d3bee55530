"""The chat template as a GGUF carries it: what this program does around a template is written into it.

llama.cpp renders the template by itself, with its own idea of thinking and of system messages.
"""

from __future__ import annotations

from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.thinking import settled

# Templates that refuse system messages, or leave them out, get them in the first user's turn, as in training; llama.cpp
# would join them with one line break.
_FOLD = ("{%- if messages[0]['role'] == 'system' and messages | length > 1 -%}{%- set messages = [{'role': "
         "messages[1]['role'], 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] "
         "-%}{%- endif -%}")


def gguf_template(chat: ChatFormat, think: bool | None) -> str:
    """The Jinja text for ``tokenizer.chat_template``.

    Args:
        think: how the template's switch for reasoning stood in training; None where it has none.
    """
    template = settled(chat.template, think)
    return _FOLD + template if chat.folds_system else template
