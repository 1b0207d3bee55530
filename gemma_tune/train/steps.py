"""The steps of a training from the first evaluation to the last, and what to type where they end too early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import Interrupted, UserError
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.lora.whole import head_once
from gemma_tune.run.session import Session
from gemma_tune.run.stopped import unfinished, whole
from gemma_tune.train import processes
from gemma_tune.train.aside import set_aside
from gemma_tune.train.checkpoints import clear, command_to_finish
from gemma_tune.train.memory import BatchChoice, out_of_memory
from gemma_tune.train.startup import Startup
from gemma_tune.train.verdict import validation_losses

if TYPE_CHECKING:
    from gemma_tune.train.best import Best
    from gemma_tune.train.callbacks import MetricsLog, StopRequest
    from gemma_tune.train.samples import Samples
    from gemma_tune.train.trainer import GemmaTrainer


def run_steps(trainer: GemmaTrainer, log: MetricsLog, stop: StopRequest, best: Best, samples: Samples, session: Session,
              choice: BatchChoice, checkpoint: Path | None, startup: Startup) -> dict[str, Any]:
    """Evaluate, train, evaluate, and put the best adapter into the model; figures for the summary."""
    evaluates = trainer.eval_dataset is not None
    try:
        with trainer.fast(session.config.compile, session.config.cuda_graphs):
            startup.done("longest batch")
            if processes.is_main():  # only now: what can fail at once has not
                _make_room(session, checkpoint)
            trainer.begin_steps()
            if evaluates and checkpoint is None:
                trainer.evaluate()  # the adapter starts at zero, so this is the base model's loss
                startup.done("first evaluation")
            elif checkpoint is None:
                samples.ask(0)
            session.listener.note(startup.described())
            if log.first_step < trainer.args.max_steps and not best.exhausted:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:  # it was interrupted after the last step: all that is missing is the adapter
                trainer.state.global_step, trainer.state.max_steps = log.first_step, trainer.args.max_steps
                _load_trained(trainer.model, checkpoint)
            if stop.requested and trainer.state.global_step < trainer.state.max_steps:
                raise _stopped(session, trainer.state)
            if evaluates and (not log.records or best.measure.key not in log.records[-1]):
                trainer.evaluate()
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            problem = out_of_memory(e, choice, trainer.micro_batch)
            less = trainer.micro_batch > 1 or not choice.checkpointing
            raise (_with_less(session, problem) if less else problem) from e
        raise
    trainer.forget_moments()  # the room is for the base model, with which what was learned is compared
    losses = [r["loss"] for r in log.records if "loss" in r]
    last = trainer.state.global_step
    kept = best.restore(last)
    if sentence := best.described(kept, last, "--max-steps" if session.config.max_steps else "--epochs"):
        session.listener.note(sentence)
    samples.compare(kept, last)
    return {"steps": trainer.state.global_step, "train_loss_first": losses[0] if losses else None,
            "train_loss_last": losses[-1] if losses else None,
            **_validated(log.records, kept), "kept_step": kept,
            "tokens": log.tokens, "tokens_per_second": round(log.overall_speed, 1),
            "training_seconds": round(log.seconds_before + log.busy, 1), "resumed_from_step": log.first_step,
            "startup_seconds": startup.seconds}


def _make_room(session: Session, checkpoint: Path | None) -> None:
    if checkpoint:
        clear(session.run.checkpoints, after=checkpoint)
    else:
        set_aside(session.run, session.manifest)


def _validated(records: Sequence[Mapping[str, Any]], kept: int) -> dict[str, float | None]:
    """What the validation says, of a training of preferences or from rewards with the figures that others lack."""
    losses = validation_losses(records)
    last = next((record for record in records if record["step"] == kept and "eval_loss" in record), {})
    names = {"eval_accuracy_after": "eval_rewards/accuracies", "eval_margin_after": "eval_rewards/margins"}
    more = {name: last[key] for name, key in names.items() if key in last}
    if steps := [record for record in records if "reward" in record]:
        rewards = {record["step"]: record["eval_reward"] for record in records if "eval_reward" in record}
        more |= {"eval_reward_before": rewards.get(0), "eval_reward_after": rewards.get(kept),
                 "train_reward_first": steps[0]["reward"], "train_reward_last": steps[-1]["reward"]}
        more |= {"train_loss_first": None, "train_loss_last": None}  # which say nothing there
    return {"eval_loss_before": losses.get(0), "eval_loss_after": losses.get(kept), **more}


def _stopped(session: Session, state: Any) -> Interrupted:
    # Repeated with --force, the same command would start anew.
    how = "to go on from there: " if session.force else "repeat the same command to go on from there, or: "
    return Interrupted(f"stopped at step {state.global_step} of {state.max_steps}; it is saved", how + _finish(session))


def _finish(session: Session, **other: Any) -> str:
    """The command that goes on with this training, perhaps with other settings that change nothing of its result."""
    return command_to_finish(session.run.checkpoints, session.config.as_dict() | other,
                             {*session.resolved.given, *other})


def _with_less(session: Session, problem: UserError) -> UserError:
    """The same problem, with the command that goes on from a checkpoint, where there is one."""
    if not unfinished(session.run.checkpoints, session.manifest.finished_trainings):
        return problem
    return UserError(problem.message, f"{problem.hint}; with --micro-batch 1 --activation-checkpointing it goes on "
                                      f"from {whole(session.run.checkpoints)[-1].name}: "
                                      + _finish(session, micro_batch=1, activation_checkpointing=True))


def _load_trained(model: Any, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with head_once(model):
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
