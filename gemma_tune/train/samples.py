"""Answers to a few prompts while a model learns: of the base model, and after each evaluation.

They take a small part of the training's time and change nothing of it: no random number is drawn, and what does not fit
into that part is left out or cut off.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gemma_tune.answers.generation import Answer, greedy_continuations
from gemma_tune.answers.prompts import Prompt, headline, named_shortly
from gemma_tune.base.files import os_errors
from gemma_tune.base.words import first_line, opening
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.run.prompts import held_out
from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.attention import AS_MASKED
from gemma_tune.train.callbacks import MetricsLog, write_last
from gemma_tune.train.undoing import plain_forward

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer

SHARE = 0.04  # of the command's time up to its last step
MOST_TOKENS = 64  # of an answer
LONGEST_PROMPT = 512
LEAST = 0.1  # seconds for an answer; in less, no model that is worth asking says anything
_SHOWN = 160  # characters of an answer


class Samples(TrainerCallback):
    """Asks the model in training, writes its answers to logs/samples.jsonl, and shows them.

    A line has the ``step`` after which the model was asked (0: the base model), the number of the ``prompt`` from 0,
    how it ``begins`` and the names of its ``pictures`` where it has any, the ``answer``, its ``tokens``, whether the
    model ended it itself (``ended``), and ``seconds``.

    Args:
        count: of prompts, those first that are not trained on; 0 asks nothing.
        log: knows how long steps take.
        earlier: lines of the file up to the checkpoint that training goes on from.
        spent: seconds of the command so far.
    """

    def __init__(self, session: Session, chat: ChatFormat, count: int, log: MetricsLog,
                 earlier: Sequence[Mapping[str, Any]] = (), spent: float = 0.0):
        self.session, self.chat, self.count, self.log = session, chat, count, log
        self.trainer: GemmaTrainer | None = None
        self.seconds = 0.0
        self.path, self.records = session.run.samples, [dict(record) for record in earlier]
        self._began = time.perf_counter() - spent
        self._prompts: list[Prompt] | None = None
        self._why_not = ""
        self._begun = False  # until there is something to write, the file is that of the training before

    def on_evaluate(self, args, state, control, **kwargs):
        self.ask(state.global_step)

    def ask(self, step: int, parts: int | None = None) -> None:
        """Ask the model as it is after ``step``, unless it was asked then, or that would take too long.

        Args:
            parts: among how many occasions the time that is left is to be divided, this one included.
        """
        if not self.count or not processes.is_main() or any(record["step"] == step for record in self.records):
            return
        assert self.trainer is not None
        began = time.perf_counter()
        seconds = self._affordable(step, parts) / self.count
        if self.trainer.sharded:
            self._why_not = "with --strategy fsdp all processes would have to make them together"
        elif seconds < LEAST:
            self._why_not = f"they would take more than {SHARE:.0%} of the training's time"
        else:
            self._ask(step, seconds)
            self.seconds += time.perf_counter() - began

    def _ask(self, step: int, seconds: float) -> None:
        assert self.trainer is not None
        try:
            if self._prompts is None:
                shown = self.trainer.shown
                self._prompts = held_out(self.session, self.chat, self.count, MOST_TOKENS, LONGEST_PROMPT,
                                         set(shown.names) if shown else ())
            with contextlib.nullcontext() if step else self.trainer.base.in_memory():
                for number, prompt in enumerate(self._prompts):
                    self._add(step, number, prompt, seconds)
        except Exception as e:  # noqa: BLE001 - whatever it is, the training is worth more than what was to show it
            self.count = 0
            self.session.listener.warn(f"no sample answers from now on: {first_line(e)}")

    def _affordable(self, step: int, parts: int | None) -> float:
        """Seconds for the answers of this step: an equal part of what is left for all that are still to be asked.

        Where that is too little, the base model's and the last answers share it.
        """
        left = SHARE * (time.perf_counter() - self._began + self._seconds_left(step)) - self.seconds
        if parts:
            return left / parts
        equal = left / (1 + self._evaluations_after(step))
        return left / 2 if step == 0 and equal < LEAST * self.count else equal

    def _seconds_left(self, step: int) -> float:
        assert self.trainer is not None
        if done := step - self.log.first_step:
            return self.log.busy / done * (self.trainer.args.max_steps - step)
        # A GPU's first batch takes many times as long as the others.
        return self.trainer.expected_seconds() if self.trainer.accelerator.device.type == "cpu" else 0.0

    def _evaluations_after(self, step: int) -> int:
        assert self.trainer is not None
        args = self.trainer.args
        if self.trainer.eval_dataset is None:
            return 1  # at the end
        return -(-(args.max_steps - step) // int(args.eval_steps))

    def _add(self, step: int, number: int, prompt: Prompt, seconds: float) -> None:
        began = time.perf_counter()
        answer = self._answer(prompt, seconds, base=step == 0)
        begins = opening(prompt.text if prompt.text is not None else headline(prompt.messages))
        pictures = {"pictures": list(prompt.pictures)} if prompt.pictures else {}
        record = {"step": step, "prompt": number, "begins": begins, **pictures, "answer": answer.text,
                  "tokens": answer.tokens, "ended": answer.ended, "seconds": round(time.perf_counter() - began, 3)}
        self.records.append(record)
        with os_errors(self.path):
            write_last(self.path, self.records, self._begun)
        self._begun = True
        when = f"after step {step}" if step else "before the first step"
        self.session.listener.note(f"{when}, {_question(record)}: {_shown(record)}")

    def _answer(self, prompt: Prompt, seconds: float, base: bool) -> Answer:
        """To one prompt alone, which so needs no padding: the attention of training does not know any on the left."""
        trainer = self.trainer
        assert trainer is not None
        device, pictures = trainer.accelerator.device, prompt.pictures
        seen = trainer.shown.seen if pictures and trainer.shown else None
        masked = {AS_MASKED: True} if pictures else {}
        with (torch.random.fork_rng([] if device.type == "cpu" else [device]), trainer.evaluating(),
              trainer.model.disable_adapter() if base else contextlib.nullcontext(),
              plain_forward(trainer.causal_lm, **masked)):
            [answer] = greedy_continuations(trainer.causal_lm, self.chat, [prompt.ids(self.chat)], MOST_TOKENS, seconds,
                                            [pictures], seen)
        return answer

    def compare(self, kept: int, last: int) -> None:
        """Show the answers of the trained model beside those of the base model, and ask what was not asked.

        Args:
            kept: the step whose adapter stays, and is in the model; 0 where it is the one that was there before.
            last: the training's last step.
        """
        asked = {record["step"] for record in self.records}
        missing = [step for step in (0, kept) if step not in asked]
        for n, step in enumerate(missing):
            self.ask(step, parts=len(missing) - n)
        before, after = ({record["prompt"]: record for record in self.records if record["step"] == step}
                         for step in (0, kept))
        for number in sorted(before.keys() & after.keys()) if kept else ():  # step 0 has answers of the base model
            trained = "trained" if kept == last else f"after step {kept}"
            self.session.listener.note(f"{_question(before[number])} – base model: {_shown(before[number])} – "
                                       f"{trained}: {_shown(after[number])}")
        if self._why_not and not after:
            self.session.listener.note(f"no sample answers: {self._why_not}")


def _question(record: Mapping[str, Any]) -> str:
    """How a prompt begins, and its pictures."""
    pictures = named_shortly(record.get("pictures", ()))
    return f"“{record['begins']}”" + (f" ({pictures})" if pictures else "")


def _shown(record: Mapping[str, Any]) -> str:
    """An answer on one line."""
    text = " ".join(str(record["answer"]).split())
    cut = len(text) > _SHOWN or not record["ended"]
    return (text[:_SHOWN] + (" …" if cut else "")).strip() or "(nothing)"
