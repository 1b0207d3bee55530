"""``eval``: the same held-out prompts answered by the base and the tuned model, side by side, in report.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.answers.generation import Answer, greedy_answers
from gemma_tune.answers.prompts import Prompt, headline, read_prompts, shown, tool_names
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, write_atomic, write_json
from gemma_tune.base.words import counted
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.run.prompts import prompt_limit
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, run_stage

BATCH = 10  # answers made together


def evaluate(session: Session) -> StageReport:
    """Answer held-out prompts with and without the adapter, greedily.

    Returns:
        The report, whose summary also holds the prompts and answers. The manifest has the figures alone.

    Raises:
        UserError: no adapter yet, or no held-out prompts.
    """
    done = run_stage(session, "eval", _evaluate)
    answers = json.loads(Path(done.artifacts["answers"]).read_text(encoding="utf-8"))
    return replace(done, summary={**done.summary, "answers": answers})


def _evaluate(session: Session) -> Finished:
    config, listener = session.config, session.listener
    prompts, judge = held_out_prompts(session)
    chat = load_format(session.inputs["adapter"], session.model.config["model_type"])
    model = add_adapter(load_model(session.model.path, choose_placement(config.dtype)), session.inputs["adapter"])
    prompts = _fitting(session, prompts, chat)
    answers: dict[str, list[Answer]] = {"base": [], "tuned": []}
    batches = [prompts[n:n + BATCH] for n in range(0, len(prompts), BATCH)]
    for n, batch in enumerate(batches):
        listener.progress("answering held-out prompts", 2 * n, 2 * len(batches))
        question = [prompt.messages for prompt in batch], config.max_new_tokens, [prompt.tools for prompt in batch]
        with model.disable_adapter():
            answers["base"] += greedy_answers(model, chat, *question)
        listener.progress("answering held-out prompts", 2 * n + 1, 2 * len(batches))
        answers["tuned"] += greedy_answers(model, chat, *question)
    listener.progress("answering held-out prompts", 2 * len(batches), 2 * len(batches))
    summary, compared = _summary(answers, judge), _compared(prompts, answers)
    outputs = {"report": session.run.report, "answers": session.run.answers}
    made = {path: fresh_path(path) for path in outputs.values()}
    write_atomic(made[outputs["report"]], report(session, {**summary, "answers": compared}).encode())
    write_json(made[outputs["answers"]], compared)
    return Finished(outputs, summary, made)


def held_out_prompts(session: Session) -> tuple[list[Prompt], Any]:
    """Prompts that training has not seen, and for the built-in example the check of the form it teaches.

    Raises:
        UserError: the run has no validation rows, or none with a question.
    """
    count = session.config.questions
    if _is_example(session):
        return [Prompt(q["messages"]) for q in samples.heldout_questions()][:count], samples.in_form
    prompts: list[Prompt] = []
    texts = 0
    for prompt in read_prompts(session.inputs["valid_rows"]):
        if prompt.text is not None:
            texts += 1
        elif len(prompts) < count:
            prompts.append(prompt)
        else:
            break
    if not prompts:
        raise UserError(nothing_to_ask(session) or "", "the validation loss of `train` compares base and tuned model"
                        if texts else "prepare again with --valid 0.1")
    if texts:
        rows = counted(texts, "held-out row of plain text is", "held-out rows of plain text are")
        session.listener.note(f"{rows} left out: no question to ask")
    if len(prompts) < count:
        session.listener.note(f"the run has {len(prompts)} held-out prompts; `prepare --valid 0.2` keeps more aside")
    return prompts, None


def nothing_to_ask(session: Session) -> str | None:
    """Why a prepared run has no held-out prompts; None if it has some."""
    if _is_example(session):
        return None
    reason = "the run has no validation rows to ask about"
    for prompt in read_prompts(session.run.valid_rows):
        if prompt.text is None:
            return None
        reason = "the validation rows are plain text, with no question to ask"
    return reason


def _is_example(session: Session) -> bool:
    return not session.settings_of("prepare").get("data")


def _fitting(session: Session, prompts: Sequence[Prompt], chat: ChatFormat) -> list[Prompt]:
    """Prompts as long as those in training, with room for an answer."""
    limit = prompt_limit(session, session.config.max_new_tokens)
    try:
        fitted = [prompt.fitted(chat, limit) for prompt in prompts]
    except FormatError as e:
        raise UserError(f"a held-out prompt cannot be rendered: {e}", "prepare and train again") from e
    kept = [prompt for prompt in fitted if prompt]
    if not kept:
        raise UserError(f"the {len(prompts)} held-out prompts are all longer than {limit} tokens",
                        "ask about more of them with --questions")
    if longer := len(fitted) - len(kept):
        session.listener.note(f"{counted(longer, 'held-out prompt is', 'held-out prompts are')} left out: longer than "
                              f"{limit} tokens")
    if parts := sum(len(p.messages) < len(q.messages) for p, q in zip(fitted, prompts) if p):
        asked = counted(parts, "held-out prompt is asked without its first turns",
                        "held-out prompts are asked without their first turns")
        session.listener.note(f"{asked}: longer than {limit} tokens with them")
    return kept


def _summary(answers: dict[str, list[Answer]], judge: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {"questions": len(answers["tuned"])}
    for which, given in answers.items():
        summary[f"{which}_ended"] = sum(a.ended for a in given)
        if judge:
            summary[f"{which}_in_form"] = sum(a.ended and judge(a.text) for a in given)
    return summary


def _compared(prompts: Sequence[Prompt], answers: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    """Each prompt with both of its answers, as answers.json keeps them."""
    return [{"prompt": prompt.messages, **({"tools": tool_names(prompt.tools)} if prompt.tools else {}),
             "base": base.text, "base_ended": base.ended, "tuned": tuned.text, "tuned_ended": tuned.ended}
            for prompt, base, tuned in zip(prompts, answers["base"], answers["tuned"])]


def report(session: Session, summary: dict[str, Any]) -> str:
    """The comparison as Markdown; ``summary`` with the ``answers`` of :func:`_compared`."""
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
        lines += ["", f"## {n}. {headline(item['prompt'])}"]
        if item.get("tools"):
            lines += ["", f"*tools on offer*: {', '.join(f'`{name}`' for name in item['tools'])}"]
        for turn in item["prompt"]:
            lines += ["", f"*{turn['role']}*", "", *_quoted(shown(turn))]
        for which in ("base", "tuned"):
            cut = "" if item[f"{which}_ended"] else " (cut off at the limit)"
            lines += ["", f"**{which}**{cut}", "", *_quoted(item[which])]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    """Lines of a Markdown quotation: a heading or an open code fence in a text ends with it."""
    return [f"> {line}" for line in (text.splitlines() if text.strip() else ["(nothing)"])]
