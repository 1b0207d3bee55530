"""``eval``: base and tuned model on the same held-out rows: losses, answers side by side, and how sure it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.prompts import tool_names
from gemma_tune.base.checkpoint import read_config, vocabulary_of
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, new_directory, remove, write_atomic, write_json
from gemma_tune.base.words import counted
from gemma_tune.data.conversations.kept_pictures import keep_alone
from gemma_tune.encoding.eye import PICTURES, eye_of
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.evaluate.compare import (
    SIDES,
    answers,
    losses,
    measured_answers,
    on_both,
    worse_at_general_text,
    worse_at_the_rows,
    worse_by_rewards,
)
from gemma_tune.evaluate.markdown import report
from gemma_tune.evaluate.pictures import other_pictures, require_use, with_folder
from gemma_tune.evaluate.rewards import THEN, Rewards, rewards_of, with_training_s
from gemma_tune.evaluate.rows import FILE, Question, choose, nothing_to_measure
from gemma_tune.evaluate.sight import base_that_sees
from gemma_tune.evaluate.tasks import Tasks, compared, found_names, with_files
from gemma_tune.evaluate.tasks import require as require_tasks
from gemma_tune.lora.load import add_adapter
from gemma_tune.report.page import write_report
from gemma_tune.report.tables import FEW_ROWS, rough_rows, short_rows, task_rows
from gemma_tune.rewards.files import reward_files
from gemma_tune.rewards.program import refuse_missing
from gemma_tune.rewards.scores import Scorer
from gemma_tune.run.directory import command
from gemma_tune.run.foreign import refuse_foreign_in_evaluated, remove_evaluated
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, run_stage
from gemma_tune.run.state import OUTSIDE, require_output

__all__ = ["evaluate", "evaluate_alone", "nothing_to_measure", "require_settings"]


def evaluate(session: Session) -> StageReport:
    """As :func:`evaluate_alone`, and the run's report.html with it."""
    done = evaluate_alone(session)
    return replace(done, artifacts={**done.artifacts, "html_report": str(write_report(session.run))})


def evaluate_alone(session: Session) -> StageReport:
    """Compare base and tuned model on held-out rows, and answer prompts of theirs with both, greedily.

    Returns:
        The report, whose summary also holds the prompts and answers. The manifest has the figures alone.

    Raises:
        UserError: no adapter yet, no held-out rows, or a file of them that cannot be used.
        WorkFailed: a benchmark of ``--tasks`` that cannot be run, or a program of ``--reward`` that failed; the earlier
            result stays.
    """
    session.require("eval")
    require_tasks(found_names(session))
    session, files = FILE.with_file(with_folder(session), session.config.data_file)
    session, task_files = with_files(session)
    session = with_training_s(session)
    refuse_missing(rewards := rewards_of(session.config), THEN)
    more = task_files | reward_files(session, rewards)
    if session.config.data_file and (others := other_pictures(session)):
        session.listener.note(f"`eval` runs again: {others}")
        session = replace(session, force=True)
    done = run_stage(session, "eval", _evaluate, files | more, elsewhere=_from_elsewhere(session, files))
    if "pictures" not in done.artifacts:
        remove_evaluated(session.run)  # of other rows; perhaps a command was killed before it came to that
    given = json.loads(Path(done.artifacts["answers"]).read_text(encoding="utf-8"))
    _tell(session, done.summary)
    return replace(done, summary={**done.summary, "answers": given})


def _from_elsewhere(session: Session, files: Mapping[str, Path]) -> dict[str, Path]:
    """Of a run that merges an adapter from elsewhere and has trained none: that adapter; and rows, where it has none.

    Raises:
        UserError: no rows are named for a run that has none, or the adapter is gone.
    """
    run, stages = session.run, session.manifest.stages
    merged = stages.get("merge", {"inputs": {}})["inputs"].get(f"{OUTSIDE}adapter")
    if merged is None or "train" in stages:
        return {}
    if "prepare" not in stages and not files:
        raise UserError(f"{run.root} merges an adapter that was trained elsewhere, and has no rows to compare on",
                        f"name some: {command('eval', run.root)} --data FILE")
    adapter = Path(run.found(merged["path"]))
    if not adapter.is_dir():
        raise UserError(f"the adapter that {run.root} merges is not at {adapter} any more",
                        f"put it there, or merge it from where it is: {command('merge', run.root)} --adapter DIR")
    return {"adapter": adapter} | ({} if "prepare" in stages else {"valid_rows": next(iter(files.values()))})


def require_settings(config: Any) -> None:
    """What can be known of the settings before a run is looked at.

    Raises:
        UserError: a file, folder or package that is missing, or a folder of pictures without rows.
    """
    require_tasks(config.tasks)
    refuse_missing(rewards_of(config), THEN)
    FILE.require(config.data_file)
    require_use(config)


def _evaluate(session: Session) -> Finished:
    run = session.run
    if session.config.data_file is None:
        return _measured(session)
    refuse_foreign_in_evaluated(run)
    with new_directory(run.evaluated) as folder:
        done = _measured(session)
    if not any(folder.iterdir()):  # texts alone
        remove(folder)
        return done
    return replace(done, outputs={**done.outputs, "pictures": run.evaluated},
                   fresh={**done.fresh, run.evaluated: folder})


def _measured(session: Session) -> Finished:
    rewards = rewards_of(session.config)
    with Scorer(rewards, THEN) if rewards else contextlib.nullcontext() as scorer:
        return _measured_with(session, scorer)


def _measured_with(session: Session, scorer: Scorer | None) -> Finished:
    config, listener = session.config, session.listener
    # An adapter from elsewhere may come without a tokenizer; what was merged has the one that goes with it.
    elsewhere = "train" not in session.manifest.stages
    asks_with = (require_output(session.run, session.manifest, "eval", "merge", "merged") if elsewhere
                 else session.inputs["adapter"])
    chat = load_format(asks_with, session.model.config["model_type"])
    chat.eye = eye_of(session.model.path, chat.tokenizer, session.run.pictures)  # an adapter comes without one
    vocabulary = _other_vocabulary(session) if elsewhere else None
    chosen = choose(session, chat)
    rewards = Rewards(scorer, chosen.questions, chat) if scorer else None
    if rewards and (missing := rewards.left_out()):
        listener.warn(missing)
    tasks = Tasks(found_names(session), listener) if config.tasks else None
    base, seen = base_that_sees(session, chat.eye, chosen.pictures)
    model = add_adapter(base, session.inputs["adapter"], vocabulary)
    measures = losses(model, chat, chosen, config.seed, listener, seen)
    given: dict[str, list[Answer]] = {side: [] for side in SIDES}
    worth: dict[int, dict[str, float]] = {}
    if chosen.questions:
        given = answers(model, chat, chosen.questions, config.max_new_tokens, listener, seen)
        measures |= measured_answers(given, chosen.questions, config.seed)
    if rewards:
        found, worth = rewards.measures(given, config.seed)
        measures |= found
    summary = _counts(given, measures) | {"rows": chosen.rows, "rows_there": chosen.there, "measures": measures}
    if tasks:
        summary["tasks"] = compared(on_both(
            model, lambda side: tasks.run(model, chat, config.limit, config.seed, side)))
    for said in filter(None, (worse_by_rewards(measures), worse_at_the_rows(measures),
                              worse_at_general_text(measures))):
        listener.warn(said)
    side_by_side = _compared(chosen.questions, given, worth)
    keep_alone(fresh_path(session.run.evaluated) / PICTURES,  # of a file's rows: the report shows no others
               {name for question in chosen.questions for name in question.prompt.pictures})
    outputs = {"report": session.run.report, "answers": session.run.answers}
    made = {path: fresh_path(path) for path in outputs.values()}
    write_atomic(made[outputs["report"]], report(session, {**summary, "answers": side_by_side}).encode())
    write_json(made[outputs["answers"]], side_by_side)
    return Finished(outputs, summary, made)


def _other_vocabulary(session: Session) -> int | None:
    """Entries of the vocabulary that an adapter from elsewhere was trained with, as the merged model has them; None
    where the base has as many. To the base, which is measured with them as well, tokens that were added mean nothing.
    """
    entries = vocabulary_of(read_config(session.run.merged))
    if entries == vocabulary_of(session.model.config):
        return None
    session.listener.note(f"the adapter was trained with a vocabulary of another size than the base's, {entries:,} "
                          "entries: both are measured with that")
    return entries


def _counts(given: dict[str, list[Answer]], measures: dict[str, Any]) -> dict[str, Any]:
    """How many answers end, and have the example's form, for people who count."""
    found: dict[str, Any] = {"questions": len(given["tuned"])}
    for side in SIDES:
        found[f"{side}_ended"] = sum(a.ended for a in given[side])
        if "in_form" in measures:
            found[f"{side}_in_form"] = round(measures["in_form"][side][0] * measures["in_form"]["rows"])
    return found


def _compared(questions: Sequence[Question], given: dict[str, list[Answer]],
              worth: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Each prompt with both of its answers, and what these are worth, as answers.json keeps them."""
    return [{"prompt": q.prompt.messages, **({"tools": tool_names(q.prompt.tools)} if q.prompt.tools else {}),
             **({"reference": q.reference} if q.reference is not None else {}),
             "base": base.text, "base_ended": base.ended, "tuned": tuned.text, "tuned_ended": tuned.ended,
             **worth.get(n, {})}
            for n, (q, base, tuned) in enumerate(zip(questions, given["base"], given["tuned"], strict=True))]


def _tell(session: Session, summary: dict[str, Any]) -> None:
    """The comparison as tables, also where it is up to date."""
    if rows := short_rows(summary):
        session.listener.grid("base against tuned",
                              [("", "base", "tuned", "difference [95 % interval]", ""), *rows])
        if fewest := rough_rows(summary):
            session.listener.note(f"figures of {counted(fewest, 'row')} are among these: with fewer than {FEW_ROWS} an "
                                  "interval is rough, and so is what is said of it")
    if rows := task_rows(summary):
        session.listener.grid("lm-evaluation-harness", [("task", "metric", "base", "tuned", "difference"), *rows])
