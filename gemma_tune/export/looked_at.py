"""What llama.cpp answers to a row with pictures, beside the merged model in transformers, which looks itself."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tune.answers.prompts import LOOKED_AT, read_prompts
from gemma_tune.answers.sight import inputs_beside, see
from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import counted
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.eye import pictures_of, png_of, with_parts
from gemma_tune.export.files import ExportSource
from gemma_tune.export.parity import ANSWER_TOKENS, leading
from gemma_tune.export.sight import CONTEXT, UNCHECKED, Sight
from gemma_tune.export.target import shortened
from gemma_tune.gguf.engine import Completion, Engine
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import place
from gemma_tune.models.quantised import parameter_count
from gemma_tune.run.session import Session

Turns = list[dict[str, Any]]
_END = -1  # stands for the token that ends an answer, which has several names


def asked_about_a_row(session: Session, source: ExportSource, sight: Sight, ggufs: Collection[Path]) -> Sight:
    """The file with what came of asking llama.cpp, which was quick with other pictures just now, a question of the
    run's rows.

    Its answer is compared with the merged model's. Whatever is found is told and no more: llama.cpp prepares pictures
    in its own way.
    """
    quick = session.config.verify is not False and not sight.unchecked and "pictures_apart" in sight.figures
    if source.chat.eye is None or not quick:
        return sight
    source.chat.eye.folder = session.run.pictures
    if (question := _question(session, source.chat)) is None:
        return sight
    turns, pictures = question
    placement, lacking = place(parameter_count(open_tensors(source.merged).values()))
    if placement is None:
        return replace(sight, unchecked=f"{UNCHECKED}answers to a row with some: {lacking}")
    gguf = min(ggufs, key=lambda path: path.stat().st_size)
    try:
        with Engine(gguf, CONTEXT, projector=sight.lies_at) as engine:
            answer = engine.complete_seen([*map(with_parts, turns)], pictures, ANSWER_TOKENS)
        own = _likeliest(load_model(source.merged, placement, sight="towers").eval(), source.chat, turns, answer)
    except UserError as e:
        return replace(sight, unchecked=f"{UNCHECKED}answers to a row with some: {e.message}")
    given = [*answer.ids, *([_END] if answer.ended else [])]
    same = leading(given, own)
    session.listener.note(f"llama.cpp answers a row with pictures: {shortened(source.chat.decoded(list(answer.ids)))}; "
                          f"the first {same} of {counted(len(given), 'token')} are the merged model's")
    return replace(sight, figures={**sight.figures, "row_tokens": len(given), "row_same": same})


def _question(session: Session, chat: ChatFormat) -> tuple[Turns, list[bytes]] | None:
    """Turns with pictures before an answer, of a row that training has not seen, else of another, and the pictures as
    PNG files; None without any."""
    for path in (session.run.valid_rows, session.run.train_rows):
        for prompt in itertools.islice(read_prompts(path), LOOKED_AT) if path.exists() else ():
            if pictures_of(prompt.messages) and not prompt.tools:
                # The data was prepared again, for another template; or pictures are gone or damaged.
                with contextlib.suppress(FormatError, OSError):
                    if len(chat.prompt_ids(prompt.messages)) + ANSWER_TOKENS <= CONTEXT:
                        return prompt.messages, [png_of(session.run.pictures / name)
                                                 for name in pictures_of(prompt.messages)]
    return None


def _likeliest(model: Any, chat: ChatFormat, turns: Turns, answer: Completion) -> list[int]:
    """The merged model's likeliest token at each of an answer, and behind it where that has ended; any that ends an
    answer as :data:`_END`."""
    import torch

    prompt = chat.prompt_ids(turns)
    ids = torch.tensor([[*prompt, *answer.ids]], device=model.device)
    seen = [see(model, chat.eye, name) for name in pictures_of(turns)]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer.ids) + 1,
                       **inputs_beside(chat.eye, ids, seen)).logits[0]
        logits[:, list(model.generation_config.suppress_tokens or ())] = -torch.inf  # as `generate` does
        likeliest = logits.argmax(1).tolist()[:len(answer.ids) + answer.ended]
    return [_END if token in chat.stop_ids else token for token in likeliest]
