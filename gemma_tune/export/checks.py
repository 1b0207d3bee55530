"""What is known about exported files: what each number format loses; whether prompts and answers are as trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import size_text
from gemma_tune.config.stages import ExportConfig
from gemma_tune.export.files import ExportSource, load_merged
from gemma_tune.export.parity import ANSWER_TOKENS, HELD_OUT, LONGEST_PROMPT, verify
from gemma_tune.export.parity_report import Parity, markdown_table
from gemma_tune.export.quant_loss import (
    GENERAL,
    REFERENCE,
    TOKENS,
    VALIDATION,
    Loss,
    measure,
    validation_rows,
)
from gemma_tune.export.sight import UNCHECKED as PICTURES
from gemma_tune.gguf.llama_cpp import find_engine
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.measure.general import measuring_rows_of
from gemma_tune.measure.likelihood import Wanted, wanted_of
from gemma_tune.run.earlier_exports import remark
from gemma_tune.run.prompts import held_out
from gemma_tune.run.session import Session

_PREFIXES = {VALIDATION: "", GENERAL: "general_"}  # of figures in the manifest, by the text that they were measured on
_LOSS = "the loss of the number formats"  # of what was not checked
SMALL = 3_000_000_000  # bytes of merged weights up to which an f16 file is made for the comparison alone


@dataclass(frozen=True)
class ExportChecks:
    """What was found out about the files of one export.

    Args:
        losses: by text and number format; f16 is always among them, as the yardstick.
        parity: token ids and answers, or None.
        unchecked: what was not checked, and why, one sentence each.
        merged: how the merged model compares to base + adapter, the step before these.
    """

    losses: Mapping[str, Mapping[str, Loss]] = field(default_factory=dict)
    parity: Parity | None = None
    unchecked: tuple[str, ...] = ()
    merged: str = ""

    @property
    def of_text(self) -> ExportChecks:
        """Without what is said of pictures, which are checked by themselves."""
        return replace(self, unchecked=tuple(text for text in self.unchecked if not text.startswith(PICTURES)))

    @classmethod
    def recorded(cls, figures: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> ExportChecks:
        """What the manifest has of the checks of an export, by its number formats and in all."""
        losses = {}
        for text, prefix in _PREFIXES.items():
            names = {f.name: prefix + f.name for f in fields(Loss)}
            own = {quant: Loss(**{name: item[key] for name, key in names.items()}) for quant, item in figures.items()
                   if {*names.values()} <= item.keys()}
            if own and (perplexity := summary.get(f"f16_{prefix}perplexity")):
                losses[text] = {REFERENCE: Loss(perplexity, 0.0, 1.0, next(iter(own.values())).tokens), **own}
        return cls(losses, Parity.from_json(summary.get("parity")), tuple(summary.get("unchecked", ())))

    def completed(self, earlier: ExportChecks) -> ExportChecks:
        """With what was found out before about the same files, where nothing has been now."""
        before = [text for text in earlier.unchecked
                  if (not self.losses if text.startswith(_LOSS) else self.parity is None)]
        return replace(self, losses=self.losses or earlier.losses, parity=self.parity or earlier.parity,
                       unchecked=tuple(dict.fromkeys([*self.unchecked, *before])))

    def figures(self, quant: str) -> dict[str, Any]:
        """One format's figures for the manifest."""
        return {_PREFIXES[text] + name: value for text, losses in self.losses.items() if quant in losses
                for name, value in vars(losses[quant]).items()}

    @property
    def summary(self) -> dict[str, Any]:
        """The rest for the manifest."""
        found: dict[str, Any] = {"unchecked": list(self.unchecked)} if self.unchecked else {}
        found |= {f"f16_{_PREFIXES[text]}perplexity": losses[REFERENCE].perplexity
                  for text, losses in self.losses.items()}
        if self.parity:
            found["parity"] = self.parity.as_json()
        return found


def wants_engine(config: ExportConfig) -> bool:
    """Whether llama.cpp is to run the files.

    Raises:
        UserError: it was asked for, and there is none.
    """
    engine = find_engine() if config.verify is not False else None
    if config.verify and engine is None:
        raise UserError("--verify needs a llama.cpp engine, and none is installed",
                        "pip install xllamacpp, or put llama-server on the PATH")
    return engine is not None


def check_files(session: Session, source: ExportSource, files: Mapping[str, Path]) -> ExportChecks:
    """Compare the files with the merged model, which is loaded once for all of it.

    Args:
        files: number format → GGUF.
    """
    config, architecture = session.config, source.architecture
    texts, reason = _texts(session, source)
    compare = wants_engine(config)
    on_rows = " on validation rows" if texts else ""
    unchecked = [f"{_LOSS}{on_rows}: {reason}"] if config.measure and reason else []
    if not compare and config.verify is None:
        unchecked.append("token ids and answers: no llama.cpp engine is installed (pip install xllamacpp, then repeat "
                         "with --verify)")
    if not compare and not texts:
        return ExportChecks(unchecked=tuple(unchecked), merged=merge_check(session))
    beside = _engine_bytes(source, files) if compare else 0
    model, reason = _loaded(session, beside)
    if model is None and compare:
        unchecked.append(f"answers: {reason}")
    parity = _compared(session, source, files, model and model.lent()) if compare else None
    losses = {}
    if texts and architecture is not None:
        if model is None and beside:  # llama.cpp has ended
            model, reason = _loaded(session, 0)
        if model is None:
            unchecked.append(f"{_LOSS}: {reason}")
        else:
            task = "measuring the loss of " + ", ".join(files)
            losses = measure(model.given_away(), texts, files, architecture,
                             on_progress=partial(session.listener.progress, task))
            unchecked += _not_finite([text for text, rows in texts.items() if rows], files, losses)
    return ExportChecks(losses, parity, tuple(unchecked), merge_check(session))


class MergedModel:
    """The merged model in memory, until it is given to somebody who writes other weights over its own."""

    def __init__(self, model: Any):
        self._model = model

    def lent(self) -> Any:
        """The model with the merged weights.

        Raises:
            RuntimeError: they are no longer in it.
        """
        if self._model is None:
            raise RuntimeError("the merged weights have been overwritten")
        return self._model

    def given_away(self) -> Any:
        """The model, for good."""
        model, self._model = self.lent(), None
        return model


def merge_check(session: Session) -> str:
    """What `merge` found, as a sentence; it stands before the files in the chain from the adapter to an answer."""
    found = session.manifest.stages.get("merge", {"summary": {}})["summary"]
    names = ("check_same_answers", "check_prompts", "check_same_tokens", "check_divergence")
    if any(name not in found for name in names):  # not checked
        return ""
    return (f"The merged model against base + adapter, as `merge` measured it: {found['check_same_answers']} of "
            f"{found['check_prompts']} greedy answers equal, {found['check_same_tokens']:.1%} of the likeliest tokens, "
            f"divergence {found['check_divergence']:.2g} nats per token.")


def _texts(session: Session, source: ExportSource) -> tuple[dict[str, list[Wanted]], str]:
    """What the formats are measured on; and why not on validation rows, or on nothing, "" where they are."""
    if not session.config.measure:
        return {}, "--no-measure"
    if source.architecture is None:
        return {}, "the converter's tensors are not known here"
    rows, reason = validation_rows(session)
    general = wanted_of(measuring_rows_of(source.chat))
    return {VALIDATION: [] if rows is None else wanted_of(rows, TOKENS), GENERAL: general}, reason


def _not_finite(texts: Sequence[str], files: Mapping[str, Path],
                losses: Mapping[str, Mapping[str, Loss]]) -> list[str]:
    """What could not be measured, as nothing finite is predicted."""
    if any(text not in losses for text in texts):
        return [f"{_LOSS}: the merged model in {REFERENCE}, with which they are compared, predicts nothing finite; "
                "some of its weights may be beyond the range of that"]
    lacking = [quant for quant in files if any(quant not in found for found in losses.values())]
    return [f"{_LOSS}: {', '.join(lacking)} predicts nothing finite"] if lacking else []


def _loaded(session: Session, beside: int) -> tuple[MergedModel | None, str]:
    """The merged model, or None and why not; ``beside``: bytes that llama.cpp takes at the same time."""
    model, lacking = load_merged(session.inputs["merged"], beside)
    return (MergedModel(model), "") if model is not None else (None, lacking)


def _engine_bytes(source: ExportSource, files: Mapping[str, Path]) -> int:
    """What llama.cpp holds at a time: one of the files, the largest of which may be that in f16 made for comparison."""
    sizes = [path.stat().st_size for path in files.values()]
    return max([*sizes, _merged_bytes(source)] if _makes_f16(source, files) else sizes)


def _merged_bytes(source: ExportSource) -> int:
    return sum(path.stat().st_size for path in source.merged.glob("*.safetensors"))


def _makes_f16(source: ExportSource, files: Mapping[str, Path]) -> bool:
    """Whether a file in f16 is made for the comparison alone: the model is small, and no file is as exact."""
    return (source.architecture is not None and _merged_bytes(source) <= SMALL
            and not {"f32", "f16", "bf16"} & files.keys())


def _compared(session: Session, source: ExportSource, files: Mapping[str, Path], model: Any) -> Parity:
    """Ids and answers; among the files one in f16, which tells the writer's part of a difference from the format's."""
    prompts = held_out(session, source.chat, HELD_OUT, ANSWER_TOKENS, most=LONGEST_PROMPT)
    with _with_f16(session, source, files) as all_files:
        return verify(source.chat, source.target.chat, all_files, prompts, merged_model=model,
                      answer_tokens=ANSWER_TOKENS, listener=session.listener)


@contextmanager
def _with_f16(session: Session, source: ExportSource, files: Mapping[str, Path]) -> Iterator[Mapping[str, Path]]:
    if not _makes_f16(source, files):
        yield files
        return
    # Under a name that the next command clears away if this one is killed.
    extra = session.run.ollama / f".new-{session.run.model_name}-f16.gguf"
    compared = {REFERENCE: extra, **files}
    try:
        try:
            write_gguf(source.merged, extra, REFERENCE, name=source.name, eot_token_id=source.chat.terminator_id,
                       chat_template=source.template, parts=source.parts)
        except (UserError, WorkFailed) as e:  # no space for it, or numbers beyond its range: no fault of the others
            session.listener.note(f"answers are compared without a file in f16: {e.message}")
            compared = files
        yield compared
    finally:
        extra.unlink(missing_ok=True)


# --- as tables --------------------------------------------------------------------------------------------------------


_TITLES = {VALIDATION: "number formats", GENERAL: "number formats, on general text"}
_ON = {VALIDATION: "learned tokens of the validation rows",
       GENERAL: "tokens of the general text that comes with gemma-tune"}


def format_tables(figures: Mapping[str, Mapping[str, Any]],
                  losses: Mapping[str, Mapping[str, Loss]]) -> dict[str, list[tuple[str, ...]]]:
    """By its title, a table for each text that was measured on."""
    return {_TITLES[text]: _format_rows(figures, losses.get(text, {})) for text in losses or (VALIDATION,)}


def _format_rows(figures: Mapping[str, Mapping[str, Any]], losses: Mapping[str, Loss]) -> list[tuple[str, ...]]:
    """Number formats with their size and what they lose, the first row being the heading."""
    rows = [("format", "size", "perplexity", "against f16", "divergence (nats)", "same likeliest token")]
    reference = losses.get(REFERENCE)
    if reference and REFERENCE not in figures:
        rows.append((REFERENCE, "–", f"{reference.perplexity:.3f}", "", "", ""))
    for quant, figure in figures.items():
        size, loss = size_text(figure["bytes"]), losses.get(quant)
        rows.append((quant, size, "–", "", "", "") if loss is None or reference is None else
                    (quant, size, f"{loss.perplexity:.3f}", f"{loss.perplexity / reference.perplexity - 1:+.2%}",
                     f"{loss.kl:.4f}", f"{loss.agreement:.1%}"))
    return rows


def formats_markdown(figures: Mapping[str, Mapping[str, Any]],
                     losses: Mapping[str, Mapping[str, Loss]]) -> Iterator[str]:
    """The lines of a section about number formats: the tables, and what was measured on what."""
    for text, rows in zip(losses or (VALIDATION,), format_tables(figures, losses).values()):
        yield from ("", *markdown_table(rows))
        if loss := losses.get(text, {}).get(REFERENCE):
            yield from ("", f"On {loss.tokens:,} {_ON[text]}: perplexity, KL divergence from f16 per token, and how "
                            "often the likeliest token is f16's.")
    for quant, figure in figures.items():
        if "loses" in figure:
            yield from ("", f"**{quant} {figure['loses']}**: choose a format of more bits.")


def report_title(name: str) -> str:
    """The first line of ollama/report.md."""
    return f"# {name} in GGUF"


def markdown(name: str, figures: Mapping[str, Mapping[str, Any]], checks: ExportChecks, limits: Sequence[str] = (),
             earlier: Mapping[str, Mapping[str, Any]] | None = None, conclusion: str = "",
             pictures: Sequence[str] = ()) -> str:
    """ollama/report.md.

    Args:
        limits: what Ollama does otherwise than the training, one sentence each.
        earlier: what earlier exports left, see ``run.earlier_exports``.
        conclusion: which format to take, as a sentence.
        pictures: the lines of the section about them.
    """
    lines = [report_title(name), "", "## Number formats", *formats_markdown(figures, checks.losses)]
    lines += ["", f"{conclusion}."] if conclusion else []
    if recorded := [item for item in (earlier or {}).values() if item["stale"] is not None]:
        lines += ["", "From earlier exports: " + ", ".join(
            f"{item['file']} ({remark(item) or 'of this merged model'})" for item in recorded) + "."]
    if checks.merged:
        lines += ["", checks.merged]
    lines += pictures
    if checks.parity:
        lines += ["", checks.parity.markdown().rstrip()]
    if limits:
        lines += ["", "## Different in Ollama", "", *(f"- {text}" for text in limits)]
    if checks.unchecked:
        lines += ["", "## Not checked", "", *(f"- {text}" for text in checks.unchecked)]
    return "\n".join(lines) + "\n"
