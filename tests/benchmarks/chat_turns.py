"""A long conversation with the base and the tuned model out of one loaded model, as after ``/compare`` in a chat.

Both answer each question, greedily, and the conversation goes on with the tuned model's answer. Run it from the repository on
a run that is trained: ``python tests/benchmarks/chat_turns.py --run runs/demo``. Prints one JSON object: for each model the
seconds to the first token and the tokens per second after it, turn by turn, the GPU's memory after each turn, and, where
steps are not captured on a GPU, why.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from chat_speed import QUESTIONS

from gemma_tune.answers import decoders, decoding
from gemma_tune.base.listener import Listener
from gemma_tune.chat import local
from gemma_tune.config.stages import ChatConfig
from gemma_tune.run.session import open_session


def turn(voice: Any, messages: list[dict[str, Any]], config: ChatConfig) -> tuple[float, float | None, str]:
    """Seconds to the first token, tokens per second after it (None for a single one), and the answer. One that no text comes
    of, as a model with random weights gives with a tiny tokenizer, is a whole: its seconds, and its tokens per second."""
    stream = voice.ask(messages, config)
    for _ in stream:
        pass
    answer = stream.finish()
    if stream.first is None:
        return round(stream.seconds, 4), round(answer.tokens / stream.seconds, 1), answer.text
    first = stream.first
    pace = (answer.tokens - 1) / max(stream.seconds - first, 1e-9) if answer.tokens > 1 else None
    return round(first, 4), pace and round(pace, 1), answer.text


def talk(run: str | None, turns: int, tokens: int) -> dict[str, Any]:
    """So many turns of at most so many tokens."""
    session = open_session("chat", run, listener=Listener())
    voices, config = local.open_pair(session), ChatConfig(max_new_tokens=tokens, temperature=0.0)
    model, on_gpu = voices["adapter"].model, torch.cuda.is_available()
    found: dict[str, Any] = {name: {"first": [], "pace": []} for name in voices} | {"reserved": []}
    messages: list[dict[str, Any]] = []
    for number in range(turns):
        messages.append({"role": "user", "content": f"{QUESTIONS[number % len(QUESTIONS)]} ({number + 1})"})
        answers = {}
        for name, voice in voices.items():
            first, pace, answers[name] = turn(voice, messages, config)
            found[name]["first"].append(first)
            found[name]["pace"].append(pace)
        messages.append({"role": "assistant", "content": answers["adapter"] or "…"})
        found["reserved"].append(torch.cuda.memory_reserved() if on_gpu else None)
    return found | {"not_captured": decoders._given_up.get(model) or decoding.unknown(model) or (
        "" if on_gpu else "no CUDA GPU"), "captured": sum(len(d._captured) for d in decoders._kept.get(model, []))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    print(json.dumps(talk(options.run, options.turns, options.tokens)))


if __name__ == "__main__":
    main()
