"""What is said of new tokens when data are prepared, and that a run keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.config.preparation import NO_TOKENS
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokens import new_tokens_in, open_tokens
from gemma_tune.gguf.vocabulary.parts import looks_special
from gemma_tune.run.session import Session

_MOST = 8  # tokens in one message


def with_new_tokens(session: Session) -> Session:
    """The session with the run's new tokens: they belong to the model, and stay when other data are named."""
    record = session.manifest.stages.get("prepare", {"config": {}})["config"]
    before = tuple(session.settings_of("prepare").get("new_tokens", ()))
    if session.config.new_tokens == (NO_TOKENS,):
        return replace(session, resolved=session.resolved.but({"new_tokens": ()}, record))
    if not before or "new_tokens" in session.given or not session.config.data:
        return session
    session.listener.note(f"new tokens: {_listed(before)}, as before; --new-tokens {NO_TOKENS} is without")
    return replace(session, resolved=session.resolved.but({"new_tokens": before}, record))


def tell_of_new(listener: Listener, chat: ChatFormat) -> None:
    """Which entries of the vocabulary they are."""
    if not chat.new_tokens:
        return
    names = chat.tokenizer.convert_ids_to_tokens([*chat.new_tokens])
    listener.note("new tokens, in place of unused ones: "
                  f"{_listed([f'{name} ({i})' for name, i in zip(names, chat.new_tokens)])}")
    if hidden := [name for name in names if looks_special(name)]:
        listener.warn(f"llama.cpp and Ollama take {_listed(hidden)} for control tokens, as they are written so, and "
                      "leave them out of what they show; <plan> is a name that they show")


def warn_of_unseen(listener: Listener, chat: ChatFormat, tokens: Path) -> None:
    """New tokens that no training sequence has stay as they begin."""
    ids = [*chat.new_tokens]
    unseen = set(ids) - new_tokens_in(open_tokens(tokens / "train.arrow"), ids) if ids else ()
    if unseen:
        names = chat.tokenizer.convert_ids_to_tokens(sorted(unseen))
        listener.warn(f"{counted(len(names), 'new token')} {'is' if len(names) == 1 else 'are'} in no training row, "
                      f"and will mean nothing: {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST]) + (", …" if len(names) > _MOST else "")
