"""``eval``: the same held-out prompts answered by the base and the tuned model, side by side, in report.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gemma_tune import samples
from gemma_tune.errors import UserError
from gemma_tune.files import write_atomic
from gemma_tune.generation import Answer, greedy_answers
from gemma_tune.models import add_adapter, choose_placement, load_format, load_model
from gemma_tune.stage import Finished, Session, StageReport, run_stage

BATCH = 10  # answers made together


def evaluate(session: Session) -> StageReport:
    """Answer held-out prompts with and without the adapter, greedily.

    Raises:
        UserError: no adapter yet, or no held-out prompts.
    """
    return run_stage(session, "eval", _evaluate)


def _evaluate(session: Session) -> Finished:
    config, listener = session.config, session.listener
    prompts, judge = held_out_prompts(session)
    chat = load_format(session.inputs["adapter"], session.model.config["model_type"])
    model = add_adapter(load_model(session.model.path, choose_placement(config.dtype)), session.inputs["adapter"])
    answers: dict[str, list[Answer]] = {"base": [], "tuned": []}
    batches = [prompts[n:n + BATCH] for n in range(0, len(prompts), BATCH)]
    for n, batch in enumerate(batches):
        listener.progress("answering held-out prompts", 2 * n, 2 * len(batches))
        with model.disable_adapter():
            answers["base"] += greedy_answers(model, chat, batch, config.max_new_tokens)
        listener.progress("answering held-out prompts", 2 * n + 1, 2 * len(batches))
        answers["tuned"] += greedy_answers(model, chat, batch, config.max_new_tokens)
    listener.progress("answering held-out prompts", 2 * len(batches), 2 * len(batches))
    summary = _summary(prompts, answers, judge)
    write_atomic(session.run.report, report(session, summary).encode())
    return Finished({"report": session.run.report}, summary)


def held_out_prompts(session: Session) -> tuple[list[list[dict[str, str]]], Any]:
    """Prompts that training has not seen, and for the built-in example the check of the form it teaches.

    Raises:
        UserError: the run has no validation rows.
    """
    count = session.config.questions
    if not session.settings_of("prepare").get("data"):
        return [q["messages"] for q in samples.heldout_questions()][:count], samples.in_form
    lines = session.inputs["valid_rows"].read_text(encoding="utf-8").split("\n")
    prompts = [_until_last_answer(json.loads(line)["messages"]) for line in lines[:count] if line]
    if not prompts:
        raise UserError("the run has no validation rows to ask about", "prepare again with --valid 0.1")
    if len(prompts) < count:
        session.listener.note(f"the run has {len(prompts)} held-out prompts; `prepare --valid 0.2` keeps more aside")
    return prompts, None


def _until_last_answer(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list(messages[:-1])


def _summary(prompts, answers: dict[str, list[Answer]], judge) -> dict[str, Any]:
    summary: dict[str, Any] = {"questions": len(prompts)}
    for which, given in answers.items():
        summary[f"{which}_ended"] = sum(a.ended for a in given)
        if judge:
            summary[f"{which}_in_form"] = sum(a.ended and judge(a.text) for a in given)
    summary["answers"] = [
        {"prompt": prompt, "base": base.text, "base_ended": base.ended, "tuned": tuned.text, "tuned_ended": tuned.ended}
        for prompt, base, tuned in zip(prompts, answers["base"], answers["tuned"])]
    return summary


def report(session: Session, summary: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    trained = session.manifest.stages["train"]["summary"]
    total = summary["questions"]
    lines = [f"# {session.model.name}: before and after", "", "| | base | tuned |", "|---|---|---|"]
    if trained.get("eval_loss_before") is not None:
        lines.append(f"| validation loss | {trained['eval_loss_before']:.4f} | {trained['eval_loss_after']:.4f} |")
    lines.append(f"| answers that end by themselves | {summary['base_ended']}/{total} "
                 f"| {summary['tuned_ended']}/{total} |")
    if "base_in_form" in summary:
        lines += [f"| answers in the example's form | {summary['base_in_form']}/{total} "
                  f"| {summary['tuned_in_form']}/{total} |", "", samples.FORM_DESCRIPTION]
    lines += ["", f"Held-out prompts, answered greedily with at most {session.config.max_new_tokens} tokens."]
    for n, item in enumerate(summary["answers"], start=1):
        lines += ["", f"## {n}. {item['prompt'][-1]['content'].strip().splitlines()[0]}"]
        for turn in item["prompt"]:
            lines += ["", f"*{turn['role']}*", "", *_quoted(turn["content"])]
        for which in ("base", "tuned"):
            cut = "" if item[f"{which}_ended"] else " (cut off at the limit)"
            lines += ["", f"**{which}**{cut}", "", *_quoted(item[which])]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    """Lines of a Markdown quotation: a heading or an open code fence in a text ends with it."""
    return [f"> {line}" for line in text.splitlines() or ["(nothing)"]]
