"""Whether an Ollama server lets a model see that was made with what it sees with.

Before it ran every model in llama.cpp (about 0.30), Ollama could not load some architectures, such as Gemma 4's, with a
file of its own for that, and answered nothing at all (ollama#14730, ollama#15346). Later ones took such a file for a
second model where what it sees with has no layers, as Gemma 4 12B's (until ollama#16472).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.base.pictures import QUESTION, RED, square
from gemma_tune.export.served import PATIENCE
from gemma_tune.export.target import Target, shortened
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.server import Server

_NEWER = "Update Ollama and run the same command again"


def tried(server: Server, target: Target, create: Callable[[Path | None], None], projector: Path,
          listener: Listener) -> dict[str, Any]:
    """Ask a model that was just made about a picture; where the server cannot load it so, it is made without sight.

    Args:
        create: makes it anew, with a projector or without.

    Returns:
        ``read``: whether pictures are read; with ``answer``, the model's, or ``error``, the server's words.

    Raises:
        WorkFailed: no answer to a text in time, or the connection is lost.
    """
    if words := _refused(server, target):
        create(None)
        if not _refused(server, target):  # else it is not for the projector, and the held-out prompt will tell
            listener.warn(f"Ollama {server.version} cannot load {target.name} with {projector.name} ({words}), so it "
                          f"was made without: it answers text, and reads no pictures. {_NEWER}; --no-vision leaves "
                          "pictures out of the Modelfile, too")
        return {"read": False, "error": words}
    listener.note(f"showing {target.name} a red square")
    try:
        answer = ollama.picture_answer(server, target.name, square(RED), QUESTION, PATIENCE, chat=target.chat)
    except WorkFailed as e:  # what else is wrong with the server, the held-out prompt will tell
        words = e.words if isinstance(e, ollama.Refused) else e.message
        listener.warn(f"{target.name} answers text in Ollama {server.version}, and no picture: {words}. {_NEWER}")
        return {"read": False, "error": words}
    listener.note(f"{target.name} says about it: {shortened(answer)}")
    return {"read": True, "answer": answer}


def _refused(server: Server, target: Target) -> str:
    """The server's words where it answers nothing with the model; empty where it does."""
    try:
        ollama.prompt_tokens(server, target.name, [{"role": "user", "content": QUESTION}], PATIENCE,
                             think=ollama.thinking_of(server, target.name, target.chat))
    except ollama.Refused as e:
        return e.words
    return ""
