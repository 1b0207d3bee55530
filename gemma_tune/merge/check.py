"""Whether the merged model is base + adapter: greedy answers and next-token distributions on held-out prompts.

One of the two models is in memory at a time. The answers of base + adapter are the yardstick: both models read them,
and their distributions are compared at every position.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import samples
from gemma_tune.answers.generation import Answer, greedy_continuations
from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.tensors import open_tensors, read_header
from gemma_tune.lora.config import WEIGHTS
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import place
from gemma_tune.models.quantised import parameter_count
from gemma_tune.run.prepared import rows_with_pictures
from gemma_tune.run.prompts import held_out
from gemma_tune.run.session import Session

if TYPE_CHECKING:
    import torch

    from gemma_tune.encoding.chat_format import ChatFormat

# The merged weights are rounded to 16 bits once more than base + adapter, which takes back changes below half of a
# weight's last bit. Measured in nats per token: 1e-4 on Gemma 3 270M, 1e-2 on SmolLM2 135M, both with an adapter that
# changes about one; a wrong merge moves as much as the adapter does.
ROUNDING = 5e-3  # nats that are allowed whatever the adapter changes
PART_OF_EFFECT = 0.25  # of what it changes
# From here on it is told: divergence grows with the square of a change, so this is a fifth of what was learned.
WORTH_TELLING = 0.04
ANSWER_TOKENS = 32  # longest answer of the check


@dataclass(frozen=True)
class _Reading:
    """What one model makes of the prompts: its answers, and fp32 log-probabilities (positions, vocabulary) of each."""

    answers: list[Answer]
    scores: list[torch.Tensor]


def check(session: Session, merged: Path, chat: ChatFormat, adapter: Adapter, vocabulary: int | None = None,
          ) -> dict[str, Any]:
    """Compare the merged model with base + adapter.

    Args:
        merged: the merged checkpoint.
        chat: its tokenizer and chat template.
        adapter: what was merged.
        vocabulary: entries that it was trained with, where the base has another number.

    Returns:
        The figures of the comparison, or why there is none: the models do not fit the memory.

    Raises:
        WorkFailed: the mean divergence is near what the adapter itself changes.
    """
    prompts = _prompts(session, chat)
    scores = 3 * len(prompts) * ANSWER_TOKENS * len(chat.tokenizer) * 4  # bytes of log-probabilities that are compared
    placement, lacking = place(sum(map(_parameters, (merged, adapter.folder))), scores)
    if placement is None:
        session.listener.warn(f"the merged model was not compared with base + adapter: {lacking}")
        return {"check_skipped": lacking}
    tuned = add_adapter(load_model(session.model.path, placement), adapter.folder, vocabulary)
    session.listener.progress("checking", 0, 2)
    answers = greedy_continuations(tuned, chat, prompts, ANSWER_TOKENS)
    sequences = [(prompt, chat.tokenizer(answer.text, add_special_tokens=False).input_ids)
                 for prompt, answer in zip(prompts, answers)]
    before = _Reading(answers, [_log_probabilities(tuned, *sequence) for sequence in sequences])
    with tuned.disable_adapter():
        bare = [_log_probabilities(tuned, *sequence) for sequence in sequences]
    effect = compare(before, bare.__getitem__)["check_divergence"]
    del tuned, bare
    gc.collect()
    session.listener.progress("checking", 1, 2)
    model = load_model(merged, placement)
    figures = compare(before, lambda n: _log_probabilities(model, *sequences[n]))
    session.listener.progress("checking", 2, 2)
    return _judge(session, figures | {"check_adapter_effect": effect, "check_dtype": placement.short})


def compare(before: _Reading, scores_of: Callable[[int], torch.Tensor]) -> dict[str, Any]:
    """The figures: divergence in nats per token is KL(base + adapter || merged), at every position of the answers.

    A greedy answer is the same if the merged model's likeliest token is at each of its positions; so it need not be
    generated twice.

    Args:
        scores_of: log-probabilities of the merged model for prompt n.
    """
    divergences, largest, equal, same = [], 0.0, 0, []
    for n, expected in enumerate(before.scores):
        found = scores_of(n)
        divergences += (expected.exp() * (expected - found)).sum(-1).tolist()
        likeliest = expected.argmax(1, keepdim=True)
        largest = max(largest, (expected - found).gather(1, likeliest).abs().max().item())
        agrees = found.argmax(1) == likeliest[:, 0]
        equal += int(agrees.sum())
        same.append(bool(agrees[:len(agrees) if before.answers[n].ended else -1].all()))  # what came behind a limit
    return {"check_prompts": len(same), "check_same_answer": all(same), "check_same_answers": sum(same),
            "check_answer_tokens": sum(answer.tokens for answer in before.answers),
            "check_same_tokens": equal / len(divergences), "check_divergence": sum(divergences) / len(divergences),
            "check_max_divergence": max(divergences), "check_max_logprob_difference": largest}


def _judge(session: Session, figures: dict[str, Any]) -> dict[str, Any]:
    divergence, effect = figures["check_divergence"], figures["check_adapter_effect"]
    allowed = max(ROUNDING, PART_OF_EFFECT * effect)
    if not divergence <= allowed:
        raise WorkFailed(f"the merged model differs from base + adapter by {divergence:.3g} nats per token (at most "
                         f"{allowed:.3g} expected; the adapter itself changes {effect:.3g}); it was not kept",
                         "merge with --dtype fp32, where nothing is rounded; if that differs as well, please report it "
                         "and use the adapter itself meanwhile")
    others = figures["check_prompts"] - figures["check_same_answers"]
    found = (f"{others} of {figures['check_prompts']} greedy answers of the merged model differ in wording from base + "
             "adapter's" if others else "the merged model takes back a part of what the adapter changes")
    if others or divergence > WORTH_TELLING * effect:
        session.listener.warn(f"{found}: rounding to 16 bits changes {divergence:.2g} nats per token, the adapter "
                              f"{effect:.2g}; --dtype fp32 rounds nothing")
    return figures


def _prompts(session: Session, chat: ChatFormat) -> list[list[int]]:
    """Ids of prompts of the run's data, held-out rows first, that leave room for an answer; else of the example's."""
    found = held_out(session, chat, session.config.check_prompts, ANSWER_TOKENS)
    if not found and (rows_with_pictures(session, "valid") or rows_with_pictures(session, "train")):
        session.listener.note("the merged model is compared on questions of the built-in example: those of the run "
                              "have pictures, and what sees these is the base's")
    examples = [Prompt(row["messages"]) for row in samples.heldout_questions()[:session.config.check_prompts]]
    return [prompt.ids(chat) for prompt in found or examples]


def _parameters(folder: Path) -> int:
    """Parameters of a checkpoint or an adapter."""
    tensors = read_header(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else open_tensors(folder).values()
    return parameter_count(tensors)


def _log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """fp32 log-probabilities (answer's tokens + 1, vocabulary) from the prompt's last position on."""
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0]
    return torch.log_softmax(logits.float(), -1).cpu()
