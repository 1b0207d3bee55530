"""Whether what is trained on a model can be brought to Ollama: known before any training, from what lies beside the
weights."""

from __future__ import annotations

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.gguf.architectures.parts import NotInLlamaCpp
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.writer import parts_of
from gemma_tune.models.quantised import quantisation
from gemma_tune.models.source import BaseModel
from gemma_tune.ollama.template import layout_of


def refuse_unexportable(model: BaseModel, chat: ChatFormat, *, converter: bool = False) -> None:
    """What ``export-ollama`` would refuse later.

    Args:
        converter: whether llama.cpp's own will be used where a model cannot be written here.

    Raises:
        UserError: the chat template has no form for Ollama, or the model or its tokenizer none in a GGUF.
    """
    layout_of(chat, model.config.get("model_type"))
    if quantisation(model.config) is not None:  # of that the 16-bit model is exported
        return
    try:
        if converter:
            architecture_of(model.config, model.path / "config.json")
        else:
            parts_of(model.path, chat.tokenizer)
    except NotInLlamaCpp:  # which no converter can do anything about
        raise
    except UserError:
        if not converter:
            raise
