"""Whether a server takes a model for what its TEMPLATE says: it refuses tools and thinking where it does not list them.

Sources: Ollama's `server/images.go` and `template/template.go`. A TEMPLATE with `.Tools` takes tools, one with texts
around `.Thinking` can think, a built-in parser says so by itself. From 0.31 on, the words in the GGUF's own chat
template are looked at as well: where these promise more, llama.cpp lays chats out with it instead of the TEMPLATE.
"""

from __future__ import annotations

from gemma_tune.base.listener import Listener
from gemma_tune.ollama.ask import capabilities
from gemma_tune.ollama.server import Server
from gemma_tune.ollama.template import OllamaChat

_WORDS = frozenset(("tools", "thinking"))


def tell_capabilities(server: Server, name: str, chat: OllamaChat, listener: Listener, *, sees: bool = False) -> None:
    """Warn where the server lists another than the promised "tools" and "thinking" for a model that was just made.

    A server that lists nothing at all (before 0.6.4) is not asked further.

    Args:
        sees: whether it was made with what pictures are read by, so that "vision" is to be listed, too.

    Raises:
        WorkFailed: it does not answer.
    """
    listed = capabilities(server, name)
    if not listed:
        return
    if sees and "vision" not in listed:
        listener.warn(f"Ollama {server.version} does not list vision for {name}, though it got what pictures are read "
                      "by: programs may offer no pictures to it. Update Ollama and run the same command again.")
    for word in sorted(chat.capabilities - listed):
        listener.warn(f"Ollama {server.version} does not list {word} for {name}, for which its TEMPLATE has a place: "
                      f"requests with {word} are refused. Update Ollama and run the same command again.")
    for word in sorted((listed & _WORDS) - chat.capabilities):
        if word in chat.gguf_capabilities:
            listener.note(f"Ollama {server.version} lists {word} for {name}: it lays chats out with the chat template "
                          "in the GGUF, which knows more than the TEMPLATE")
        else:
            listener.warn(f"Ollama {server.version} lists {word} for {name}, which its template does not know: "
                          f"requests with {word} are answered as if without. Send none to this model.")
