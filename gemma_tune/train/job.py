"""What one training works with: its rows, its trainer, and how it is placed; for ``train`` and for ``tune``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.checkpoint import context_length
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.words import counted
from gemma_tune.config.stages import AUTO, TrainConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format, quiet_libraries
from gemma_tune.encoding.tokens import encoding_key, lengths_of, liked, open_tokens, trained_of
from gemma_tune.lora.experts import count_of
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.layers import described_adapter
from gemma_tune.lora.load import import_peft
from gemma_tune.lora.start import (
    digest_of,
    load_start,
    names_in,
    patterns_of,
    refuse_other_tokens,
    targets_from,
    weights_of,
)
from gemma_tune.lora.targets import Targets, lora_config, said_of_rest, targets_of
from gemma_tune.lora.whole import is_tied
from gemma_tune.models.placement import Placement, available, best_device
from gemma_tune.models.quantised import in_four_bits
from gemma_tune.models.source import BaseModel
from gemma_tune.models.whole import refuse_rotten
from gemma_tune.rewards.scores import Scorer
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session
from gemma_tune.run.stopped import step_of
from gemma_tune.train import processes
from gemma_tune.train.asked import is_divided, left_for_answers, prompts_in, starts_of, tell_of_short_answers
from gemma_tune.train.batch_size import proposed
from gemma_tune.train.checkpoints import Training
from gemma_tune.train.looking import Shown
from gemma_tune.train.memory import BatchChoice, choose, refuse_four_bits
from gemma_tune.train.plan import Sizes, rate_at, steps_per_epoch
from gemma_tune.train.results import name_no_place
from gemma_tune.train.shape import ModelShape, shape_of
from gemma_tune.train.startup import Startup


@dataclass(frozen=True)
class Job:
    """All that the processes of one training have to agree on.

    Args:
        checkpoint: what training goes on from, or None.
        start: directory of the adapter that it started from, or None.
        earlier: records of the log up to there.
        startup: what the time went to so far.
    """

    session: Session
    training: Training
    checkpoint: Path | None
    start: Path | None
    placement: Placement
    choice: BatchChoice
    earlier: list[dict[str, Any]]
    startup: Startup


def load_libraries() -> None:
    """Import what takes seconds to import."""
    quiet_libraries()  # before their import, which has something to say already
    import_peft()
    with keeping_garbage():
        import gemma_tune.train.callbacks
        import gemma_tune.train.trainer  # noqa: F401 - with all that it stands on


def checked_beside(model: BaseModel) -> Future[None]:
    """Have a base model read whole while its weights are loaded, as their hashes take as long; the result raises what
    is wrong with it."""
    hashing = ThreadPoolExecutor(1)
    found = hashing.submit(refuse_rotten, model.path, model.files)
    hashing.shutdown(wait=False)
    return found


def chat_format_of(session: Session) -> ChatFormat:
    """The tokenizer and the chat template that the data was prepared with."""
    prepared = session.settings_of("prepare")
    return load_format(session.model.path, session.model.config["model_type"], prepared.get("thinking", "auto"),
                       session.chat_template(), prepared.get("new_tokens", ()))


def refuse_start_of_others(start: Path | None, chat: ChatFormat) -> None:
    """Whether the adapter that a training starts from has rows of the run's new tokens.

    Raises:
        UserError: they are others, or called otherwise.
    """
    if start:
        names = chat.tokenizer.convert_ids_to_tokens([*chat.new_tokens])
        refuse_other_tokens(read_adapter(start), dict(zip(chat.new_tokens, names)))


def prepared_sequences(session: Session, listener: Listener | None = None) -> tuple[Any, Any]:
    """Training's and validation's sequences, as ``prepare`` wrote them.

    Args:
        listener: hears which of them the method has to leave out.

    Raises:
        UserError: another version of the code or its libraries made them, which might do it differently today; or
            rows that the method cannot learn from.
    """
    folder = session.inputs["tokens"]
    if session.manifest.stages["prepare"]["summary"].get("encoding") != encoding_key(session.model.fingerprint):
        raise UserError("the prepared tokens were made by another version of gemma-tune or its libraries, or with "
                        "another tokenizer", f"make them again: {command('prepare', session.run.root)}")
    sides = open_tokens(folder / "train.arrow"), open_tokens(folder / "valid.arrow")
    if session.config.method == "grpo":
        return prompts_in(sides, session, lambda: chat_format_of(session).stop_ids, listener)
    return sides if session.config.prefers else (liked(sides[0]), liked(sides[1]))


def sizes_of(sequences: Any, config: TrainConfig) -> Sizes:
    """Without reading tokens."""
    if config.method == "grpo":
        starts = starts_of(sequences)
        return Sizes(starts, np.full(len(starts), config.answers * config.max_new_tokens),
                     int(starts.max(initial=0)) + config.max_new_tokens)
    lengths, trained = lengths_of(sequences), trained_of(sequences)
    size = sequences_of_a_row(config)
    return Sizes(lengths.reshape(-1, size).sum(1), trained.reshape(-1, size).sum(1), int(lengths.max(initial=0)))


def sequences_of_a_row(config: TrainConfig) -> int:
    """Two where a row is a pair of answers, else one."""
    return 2 if config.method in ("dpo", "orpo") else 1


def with_batch_size(session: Session, rows: int) -> Session:
    """The same, with a number where the batch size is left to us."""
    if session.config.batch_size != AUTO:
        return session
    size, reason = proposed(rows, session.config, best_device())
    session.listener.detail("batch", reason)
    return replace(session, resolved=session.resolved.but({"batch_size": size}, {"batch_size": {"from": AUTO}}))


def fit(session: Session, sizes: Sequence[Sizes], placement: Placement, before: int = 0,
        start: Path | None = None) -> tuple[Placement, ModelShape, BatchChoice]:
    """Where and how the model computes, how large it is, and how a batch of its longest rows can go through it here.

    Args:
        sizes: of the training's rows, and of the validation's.
        placement: what it began with, or begins with if it fits; else what is to be taken instead.
        before: the micro-batch that a resumed training had, which is kept if it fits.
        start: directory of the adapter that is trained further.
    """
    config = session.config
    refuse_four_bits(config, placement.device, session.model.config)
    if config.whole or config.compile or config.shards > 1:  # which need weights in the type of the products
        return _as_placed(session, sizes, placement.as_stored(), before, start)
    found = _as_placed(session, sizes, placement, before, start)
    if found[2].fits or placement.instead is None:
        return found
    return _as_placed(session, sizes, placement.instead, before, start)


def _as_placed(session: Session, sizes: Sequence[Sizes], placement: Placement, before: int,
               start: Path | None) -> tuple[Placement, ModelShape, BatchChoice]:
    shape = shape_of(session.model.path, session.config, placement.dtype, read_adapter(start) if start else None,
                     placement.device, narrow=placement.stored is not None)
    shape = replace(shape, adapter=shape.adapter + _rows_of_new_tokens(session, shape))
    longest = sizes[0].longest
    _refuse_beyond_positions(session, shape, max(rows.longest for rows in sizes))
    here, room, sequences = processes.place(), available(placement.device), sequences_of_a_row(session.config)
    if placement.device == "cpu":  # whose memory processes share; a plan is made by one, before the others are started
        room //= here.local_count if here.count > 1 else session.config.num_processes
    config = replace(session.config, qlora=session.config.qlora or in_four_bits(session.model.config))
    if config.micro_batch is None and 0 < before <= config.learned_at_once:
        kept = choose(shape, replace(config, micro_batch=before), longest, placement.device, room, sequences)
        if kept.fits:
            return placement, shape, replace(kept, reason="as before")
    return placement, shape, choose(shape, config, longest, placement.device, room, sequences)


def _rows_of_new_tokens(session: Session, shape: ModelShape) -> int:
    """How many numbers the rows of new tokens are, where they are trained by themselves."""
    count = 0 if shape.head_trained else len(session.settings_of("prepare").get("new_tokens", ()))
    return count and count * shape.hidden * (1 if is_tied(shape.model.get_base_model()) else 2)


def _refuse_beyond_positions(session: Session, shape: ModelShape, longest: int) -> None:
    """A model that looks its positions up in a table (OPT, GPT-2) has none for longer rows.

    Raises:
        UserError: there are such rows.
    """
    sampled = session.config.max_new_tokens if session.config.method == "grpo" else 0
    left = left_for_answers(session, longest - sampled) if sampled else None
    context = context_length(session.model.config)
    if not context or longest <= context:
        return
    if _has_a_table(shape.model, context):
        what, again = "rows", command("prepare", session.run.root, "--max-length", str(context))
        if sampled:
            what, again = "prompts with answers", command("train", session.run.root, "--max-new-tokens", str(left))
        raise UserError(f"{what} of up to {longest:,} tokens do not fit into the {context:,} positions of this model",
                        again)
    if left is not None:
        tell_of_short_answers(session, left)


def _has_a_table(model: Any, context: int) -> bool:
    """Whether a model looks so many positions up."""
    import torch

    words = model.get_base_model().get_input_embeddings()
    return any(isinstance(m, torch.nn.Embedding) and m is not words and context <= m.num_embeddings <= context + 2
               for m in model.modules())


def make_trainer(job: Job, model, chat, train_rows, valid_rows, steps, callbacks, shown: Shown | None = None,
                 scorer: Scorer | None = None):
    """The trainer of a base model, with a new adapter on it, or the one that the job starts from.

    Args:
        shown: pictures of the rows, where they have any.
        scorer: what answers are worth, where they are learned from rewards.

    Raises:
        UserError: these settings do not go with this model.
    """
    from transformers import PrinterCallback, ProgressCallback

    from gemma_tune.lora.dora import start_from_base
    from gemma_tune.lora.routed import install
    from gemma_tune.train.culprits import names_of
    from gemma_tune.train.token_rows import new_tokens

    session, config = job.session, job.session.config
    start = read_adapter(job.start) if job.start else None
    names = names_in(model, start) if start else {}
    targets = targets_from(model, start, names) if start else targets_of(model, config)
    session.listener.detail("adapter", f"{described_adapter(config)}, {_described_places(model, targets)}")
    if not start:
        for said in said_of_rest(model, config):
            session.listener.note(said)
    try:
        sizes = sizes_of(train_rows, config), sizes_of(valid_rows, config)
        arguments = _arguments(session, steps, len(sizes[0]), job.placement, job.choice, bool(len(valid_rows)))
        kind, more = _reward_trainer(job, chat, scorer, train_rows, valid_rows) if scorer else (
            _kind_of_trainer(job, chat, train_rows, valid_rows))
        trainer = kind(
            model=model, args=arguments,
            train_dataset=train_rows, eval_dataset=valid_rows if len(valid_rows) else None,
            processing_class=chat.tokenizer,
            peft_config=lora_config(config, targets, **(patterns_of(start, names) if start else {})),
            callbacks=[*callbacks], training=job.training, listener=session.listener,
            lengths=(sizes[0].lengths, sizes[1].lengths), trained=(sizes[0].trained, sizes[1].trained),
            micro_batch=job.choice.micro_batch, rate=lambda step: rate_at(step, steps, config),
            row_names=names_of(session.run, train_rows, sequences_of_a_row(config)), shown=shown,
            tokens=new_tokens(model, chat.new_tokens, targets), **more)
    except ValueError as e:
        raise UserError(f"this model cannot be trained with these settings: {e}",
                        "see `gemma-tune train --help`") from e
    name_no_place(trainer.model, session.model.id)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if config.dora:
        start_from_base(trainer.model)
    install(trainer.model)
    if start:  # also before a checkpoint takes its place: what the training changed is told by it
        load_start(trainer.model, weights_of(start, names))
    return trainer


def _described_places(model: Any, targets: Targets) -> str:
    """Where adapters are, and what is trained as a whole."""
    def leaves(names: Sequence[str]) -> str:
        return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))

    layers = {parameter.rpartition(".")[0] for parameter in targets.parameters}
    places = [f"{len(targets.layers)} linear layers ({leaves(targets.layers)})"] if targets.layers else []
    places += [f"{count_of(model)} experts in each of {len(layers)} layers"] if layers else []
    whole = [f"{counted(len(targets.whole), 'module')} as a whole ({leaves(targets.whole)})"] if targets.whole else []
    return ", and ".join([f"on {' and '.join(places)}"] * bool(places) + whole)


def _kind_of_trainer(job: Job, chat: ChatFormat, train_rows: Any, valid_rows: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the trainer, and what it takes beside what all do."""
    from gemma_tune.train.trainer import GemmaTrainer

    session, config = job.session, job.session.config
    if not config.prefers:
        return GemmaTrainer, {}
    from gemma_tune.train.preference import PreferenceTrainer
    from gemma_tune.train.reference import key_of
    from gemma_tune.train.units import Units

    size, mismatched = sequences_of_a_row(config), config.method == "kto"
    units = Units(train_rows, size, mismatched), Units(valid_rows, size, mismatched)
    tokens = [sha256_file(session.inputs["tokens"] / f"{side}.arrow") for side in ("train", "valid")]
    new = [f"{chat.new_tokens}"] if chat.new_tokens else []  # by which their rows begin
    key = key_of(session, (session.model.fingerprint, *tokens, *new), digest_of(job.start) if job.start else None,
                 job.training.compute)
    return PreferenceTrainer, {"units": units, "session": session, "reference_key": key}


def _reward_trainer(job: Job, chat: ChatFormat, scorer: Scorer, train_rows: Any, valid_rows: Any,
                    ) -> tuple[Any, dict[str, Any]]:
    from gemma_tune.train.callbacks import earlier_records
    from gemma_tune.train.grpo import RewardTrainer
    from gemma_tune.train.prompts import Prompts

    session = job.session
    run, divided = session.run, chat if is_divided(session) else None
    prompts = Prompts(train_rows, run.train_rows, divided), Prompts(valid_rows, run.valid_rows, divided)
    first = step_of(job.checkpoint) if job.checkpoint else 0
    return RewardTrainer, {"prompts": prompts, "session": session, "chat": chat, "scorer": scorer,
                           "earlier": earlier_records(run.rollouts, first)}


def _steps_as_one(placement: Placement, config: TrainConfig) -> bool:
    """Whether AdamW's step is that of PyTorch's kernel for many weights at once. Of Apple's not every version heeds the
    loss scaler of fp16, see https://github.com/pytorch/pytorch/pull/186360; on a CPU it pays for many numbers."""
    if placement.device == "cpu":
        return config.whole
    return placement.device == "cuda" or placement.short != "fp16"


def _arguments(session: Session, steps: int, rows: int, placement: Any, choice: BatchChoice,
               evaluates: bool):
    import torch
    from trl import SFTConfig

    config = session.config
    per_epoch = steps_per_epoch(rows, config)
    arguments = SFTConfig(
        output_dir=str(session.run.checkpoints), max_steps=steps, per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate, max_grad_norm=config.clip,
        router_aux_loss_coef=0.0,  # the loss is our own, and some models have routers in name alone
        weight_decay=config.weight_decay, seed=config.seed, data_seed=config.seed,
        optim="adamw_torch_fused" if _steps_as_one(placement, config) else "adamw_torch",
        use_cpu=placement.device == "cpu", bf16=False, fp16=placement.dtype == torch.float16,
        activation_checkpointing=choice.checkpointing,
        logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no", eval_steps=config.eval_steps or per_epoch,
        save_strategy="steps", save_steps=config.save_steps or per_epoch, save_total_limit=None,
        report_to=[], disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        dataloader_pin_memory=False, remove_unused_columns=False)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would put the model on all of them with DataParallel
        session.listener.note(f"training on one GPU of {torch.cuda.device_count()}; all train together with "
                              f"--num-processes {torch.cuda.device_count()}")
    return arguments
