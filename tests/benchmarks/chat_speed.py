"""Chat: the first token and the pace of each turn, beside plain ``generate`` and llama.cpp.

Every contender answers the same questions of one conversation, greedily, with as many tokens for each answer; plain
``generate`` reads the whole conversation anew at each turn, as a loop around it does. The conversation goes on with the
first contender's answers, so all read the same tokens. Run it from the repository, on a run that is trained (and
exported, for llama.cpp): ``python tests/benchmarks/chat_speed.py --run runs/demo``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from gemma_tune.answers.stream import Stream
from gemma_tune.base.listener import Listener
from gemma_tune.chat import llama, local
from gemma_tune.config.stages import ChatConfig
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.gguf.llama_cpp import find_engine
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.run.session import Session, open_session

QUESTIONS = ("What is EBITDA?", "Why does it leave interest out?", "Revenue rose 20 %, cash flow fell. What might that mean?",
             "Which figures would you look at next?", "What is free cash flow?", "And what is it good for?")


class Plain:
    """PEFT's model and ``generate``, without anything kept."""

    def __init__(self, session: Session):
        placement = choose_placement("auto")
        self.model = add_adapter(load_model(session.model.path, placement).eval(), session.run.adapter)
        self.chat = load_format(session.run.adapter, session.model.config["model_type"])

    def ask(self, messages: Any, config: ChatConfig) -> Stream:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return Stream(self.model, self.chat, messages, config.max_new_tokens, greedy)

    def close(self) -> None:
        self.model = None


def turns(voice: Any, answers: list[str], config: ChatConfig) -> list[tuple[float, float, int, str]]:
    """Seconds to the first token, tokens per second after it, tokens in context and the answer, of each turn."""
    messages: list[dict[str, Any]] = []
    found = []
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        stream = voice.ask(messages, config)
        for _ in stream:
            pass
        answer = stream.finish()
        pace = (answer.tokens - 1) / max(stream.seconds - (stream.first or 0.0), 1e-9)
        found.append((stream.first or stream.seconds, pace, stream.prompt_tokens + answer.tokens, answer.text))
        messages.append({"role": "assistant", "content": answers[number] if answers else answer.text})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    session = open_session("chat", options.run, listener=Listener())
    config = ChatConfig(max_new_tokens=options.tokens, temperature=0.0)
    contenders: dict[str, Callable[[], Any]] = {
        "adapter, folded": lambda: local.open_base(session, adapter=True),
        "adapter beside (--compare)": lambda: local.open_pair(session)["adapter"],
        "plain generate": lambda: Plain(session)}
    if find_engine() and "export-ollama" in session.manifest.stages:
        contenders["llama.cpp"] = lambda: llama.open_gguf(session)
    answers: list[str] = []
    for name, make in contenders.items():
        begun = time.perf_counter()
        voice = make()
        loaded = time.perf_counter() - begun
        found = turns(voice, answers, config)
        answers = answers or [text for *_, text in found]
        print(f"{name:28} loaded in {loaded:5.1f} s")
        for number, (first, pace, context, _) in enumerate(found, start=1):
            print(f"  turn {number}: first token {first:6.3f} s, then {pace:6.1f} tokens/s, {context:5} tokens in context",
                  flush=True)
        voice.close()


if __name__ == "__main__":
    main()
