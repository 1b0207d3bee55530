"""Short trainings one after the other on one loaded model: each begins with the adapter as a training would.

What runs is ``train``'s own trainer, with its batches, labels, optimiser and schedule, so that a candidate is judged by
what it would do there. What takes time only once, faster layers, the longest batch, captured steps, is kept for all
candidates of one rank.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.machine import free_unused, is_out_of_memory
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.start import load_start, names_in, weights_of
from gemma_tune.lora.whole import copies_in
from gemma_tune.models.placement import Placement
from gemma_tune.run.session import Session
from gemma_tune.train.callbacks import StopRequest
from gemma_tune.train.checkpoints import Training
from gemma_tune.train.halving import Candidate, Costs
from gemma_tune.train.job import Job, make_trainer, sequences_of_a_row
from gemma_tune.train.late import LateFigures
from gemma_tune.train.looking import Shown
from gemma_tune.train.memory import BatchChoice, out_of_memory
from gemma_tune.train.plan import rate_at, steps_per_epoch, total_steps
from gemma_tune.train.startup import Startup
from gemma_tune.train.tuning import Trial

_TIMED = 4  # steps by which the time of all others is estimated; the first is not counted, as things are made in it


class StopTrial(StopRequest):
    """First Ctrl-C, SIGTERM or SIGHUP: leave at the step's end; what was tried before is kept."""

    said = "stopping after this step; what was tried so far is kept; press Ctrl-C again to stop at once"

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.requested
        return control


class TrialLog(TrainerCallback):
    """The validation losses of a trial by step, when its steps ended and how many tokens they had, and its end where
    time is up.

    Args:
        told: is called after each step.
    """

    def __init__(self, told: Callable[[], None]):
        self.told = told
        self.begin(math.inf)

    def begin(self, deadline: float) -> None:
        """A trial begins, which ends when ``time.monotonic()`` has passed ``deadline``."""
        self.losses: dict[int, float] = {}
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.deadline = deadline

    def seconds_per_token(self, evaluation: float) -> float | None:
        """In all steps but the first; None where there was no other.

        Args:
            evaluation: seconds of one.
        """
        if len(self.tokens) < 2:
            return None
        between = self.ends[-1] - self.ends[0] - evaluation * sum(step < len(self.ends) for step in self.losses)
        return between / sum(self.tokens[1:])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "tokens" in (logs or {}):
            self.tokens.append(logs["tokens"])

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())
        self.told()
        control.should_training_stop = control.should_training_stop or time.monotonic() > self.deadline
        return control

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.losses[state.global_step] = metrics["eval_loss"]


class Trials:
    """A context manager; afterwards the model is without an adapter.

    Args:
        session: whose settings are those of a training by one process; checkpoints would lie in its run.
        model: the base, loaded.
        rows: training and validation sequences.
        start: directory of the adapter that each candidate starts from; None where that is zero.
        told: is called after each step.
        shown: pictures of the rows, where they have any.
    """

    def __init__(self, session: Session, model: Any, chat: ChatFormat, rows: tuple[Any, Any], placement: Placement,
                 choice: BatchChoice, start: Path | None, stop: StopTrial, told: Callable[[], None],
                 shown: Shown | None = None):
        self.session, self.model, self.chat, self.rows = session, model, chat, rows
        self.placement, self.choice, self.stop, self.log = placement, choice, stop, TrialLog(told)
        self.start, self.shown = start, shown
        self.steps = total_steps(len(rows[0]) // sequences_of_a_row(session.config), session.config)
        self.base_loss = math.nan
        self._trainer: Any = None
        self.rank: int | None = None
        self._layers = contextlib.ExitStack()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def measure(self, candidate: Candidate) -> Costs:
        """Take the time of an evaluation, which also gives ``base_loss``, and of a few steps."""
        change = self._use(candidate.rank)
        trainer, config = self._trainer, self.session.config
        began = time.perf_counter()
        with self._memory_errors():
            self.base_loss = trainer.evaluate()["eval_loss"]
        evaluation = time.perf_counter() - began
        self._remember()
        began = time.perf_counter()
        with contextlib.suppress(WorkFailed):  # a rate that diverges at once is found out when its turn comes
            self._train(candidate, min(_TIMED, self.steps), math.inf)
        took = time.perf_counter() - began
        lengths = trainer.lengths[0]
        usual = min(len(lengths), config.effective_batch) * float(sum(lengths)) / len(lengths)
        per_token = self.log.seconds_per_token(evaluation)
        step = took if per_token is None else usual * per_token
        return Costs(max(step, 1e-4), evaluation, config.eval_steps or steps_per_epoch(len(lengths), config), change)

    def run(self, candidate: Candidate, steps: int, deadline: float = math.inf) -> Trial | None:
        """Train a candidate for so many steps; None where it was ended before.

        Args:
            deadline: of ``time.monotonic()``.

        Raises:
            UserError: out of memory.
        """
        self._use(candidate.rank)
        began, reason, loss = time.perf_counter(), "", None
        try:
            self._train(candidate, steps, deadline)
            if self._trainer.state.global_step < steps:
                return None
            if steps not in self.log.losses:
                self._trainer.evaluate()
            loss = self._loss()
        except WorkFailed as e:  # loss or gradient is not finite
            reason = e.message
        seconds = round(time.perf_counter() - began, 3)
        if loss is not None and not math.isfinite(loss):
            loss, reason = None, f"the validation loss is {loss}"
        return Trial(candidate.learning_rate, candidate.rank, steps, loss, seconds, reason)

    def _loss(self) -> float:
        """That of the adapter which a training would keep."""
        losses = [loss for step, loss in sorted(self.log.losses.items()) if step]
        return min(losses) if self.session.config.keep == "best" else losses[-1]

    def _train(self, candidate: Candidate, steps: int, deadline: float) -> None:
        trainer, config = self._trainer, self.session.config
        self._restart()
        trainer.args.learning_rate, trainer.args.max_steps = candidate.learning_rate, steps
        trainer.rate = lambda step: rate_at(step, steps, config)
        self.log.begin(deadline)
        with self._memory_errors():
            trainer.train()

    def _restart(self) -> None:
        """As it was before the first step, whatever came of the candidate before."""
        trainer = self._trainer
        trainer.forget_moments()
        with torch.no_grad():
            if self.start:
                adapter = read_adapter(self.start)
                load_start(trainer.model, weights_of(adapter, self._names))
            else:
                trainer.begin_anew()
            for weight, start in self._start:
                weight.copy_(start)
        torch.random.set_rng_state(self._random)
        if self.placement.device != "cpu":
            torch.get_device_module(self.placement.device).set_rng_state(self._random_of_gpu)
        trainer.gradients.clear()
        trainer.figures, trainer.tokens_seen, trainer.overflows = LateFigures(trainer.accelerator.device), 0, 0

    def _remember(self) -> None:
        """What a candidate begins with: of what files have, all weights of a model perhaps, no copy is kept."""
        whole = {id(p) for _, module in copies_in(self._trainer.model).values() for p in module.parameters()}
        self._start = [] if self.start else [(weight, weight.detach().clone())
                                             for weight in self._trainer.gradients.weights if id(weight) not in whole]
        self._random = torch.random.get_rng_state()
        if self.placement.device != "cpu":
            self._random_of_gpu = torch.get_device_module(self.placement.device).get_rng_state()

    # ---- one trainer for all candidates of a rank --------------------------------------------------------------------

    def _use(self, rank: int) -> float:
        """Have an adapter of this rank, or all weights; returns the seconds that it took to make it."""
        if rank == self.rank:
            return 0.0
        began = time.perf_counter()
        self._release()
        session = replace(self.session, resolved=self.session.resolved.but({"rank": rank} if rank else {}, {}))
        job = Job(session, Training("", "", {}, ""), None, self.start, self.placement, self.choice, [], Startup())
        callbacks = self.log, self.stop
        self._names = names_in(self.model, read_adapter(self.start)) if self.start else {}
        self._trainer = trainer = make_trainer(job, self.model, self.chat, *self.rows, self.steps, callbacks,
                                                self.shown)
        trainer.base.rest(session.model.path)
        # Nothing is written of a trial, and nobody else is told of it.
        ours = (DefaultFlowCallback, TrialLog, StopTrial)
        trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, ours)]
        trainer.args.save_strategy = "no"
        with self._memory_errors():
            self._layers.enter_context(trainer.fast(captured=session.config.cuda_graphs))
            trainer.begin_steps()
        self.rank = rank
        self._remember()
        return time.perf_counter() - began

    def _release(self) -> None:
        """Take the adapter off the model again."""
        self._layers.close()
        if self._trainer is None:
            return
        self._trainer.forget_moments()
        self._trainer.take_off()
        self.model = self._trainer.model.unload()
        vars(self.model).pop("forward", None)  # which TRL and we have put there
        self._trainer, self.rank = None, None
        free_unused(self.placement.device)

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as e:
            if is_out_of_memory(e):
                raise out_of_memory(e, self.choice, self._trainer.micro_batch) from e
            raise
