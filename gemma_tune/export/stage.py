"""``export-ollama``: the merged model as GGUF files with a Modelfile, checked, and as a model in Ollama."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import NEW, fresh_path, remove
from gemma_tune.base.secrets import place_of
from gemma_tune.base.words import size_in_bytes, size_text
from gemma_tune.config.stages import ExportConfig
from gemma_tune.export.calibration_file import with_file
from gemma_tune.export.calibration_rows import not_calibrated, not_measured
from gemma_tune.export.checks import ExportChecks, check_files, format_tables, markdown, merge_check, wants_engine
from gemma_tune.export.deploy import ExportReport, deploy, model_names
from gemma_tune.export.files import ExportSource, source_of, write_file
from gemma_tune.export.looked_at import asked_about_a_row
from gemma_tune.export.modelfiles import Told, modelfiles_of
from gemma_tune.export.push import check_push, push_export
from gemma_tune.export.same_files import SameFiles, same_files
from gemma_tune.export.sight import Sight, lacks_sight, section, shown, sight_of
from gemma_tune.export.target import parse_parameters
from gemma_tune.export.worth import conclusion, file_to_take, gained, said_against, with_file_to_take
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.compensated import Rounding
from gemma_tune.gguf.converter import find_converter
from gemma_tune.gguf.types import COARSE, OF_EXPERTS, recommended
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.modelfile import lossy_runes
from gemma_tune.run.directory import command
from gemma_tune.run.earlier_exports import advice, earlier_formats, leftover_modelfiles, still_good, with_formats
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, run_stage

if TYPE_CHECKING:
    from gemma_tune.export.mixes import Mixes

_REPORT = "report.md"
_EIGHT_BITS = {"Q8_0", "F32"}  # types of a file whose matrices have eight bits each


def export(session: Session) -> ExportReport:
    """Write and check the GGUF files and the Modelfile, then create the model in Ollama, and push to the Hub where that
    is asked for.

    Raises:
        UserError: no merged model, an architecture without a writer, a bad name; a repository that cannot be pushed to.
        WorkFailed: with ``create``, no Ollama server; a GGUF does not hold the merged weights; Ollama refuses.
    """
    session.require("export-ollama")
    session, rows = with_file(session)
    server = check_target(session.config, session.model.name)
    if server:
        ollama.check_version(server, session.model.config["model_type"])
    if session.config.push:
        check_push(session.config.push, session.run.model_name, private=session.config.private)
    source = _once(source_of)  # by the stage if it runs, else by the deployment if there is a server, or for a push
    stage = run_stage(session, "export-ollama", lambda opened: _export(opened, source(opened)), rows,
                      unfinished=lambda manifest: lacks_sight(session, manifest))
    if stage.status == "up-to-date":  # what lay beside its files may be gone by now
        if not _names_everything(stage):
            raise UserError(f"{session.run.manifest} does not have the figures of each file of the last export",
                            f"make them again: {command('export-ollama', session.run.root, '--force')}")
        quants = stage.summary["quants"]
        stage = replace(stage, summary=with_formats(stage.summary, quants, _earlier(session, quants)))
    report = deploy(session, stage, server, source)
    if not session.config.push:
        return report
    address = push_export(session, report.stage, source(session))
    return replace(report, stage=replace(report.stage, summary=report.stage.summary | {"pushed": address}))


def _names_everything(recorded: StageReport) -> bool:
    """Whether a result that is up to date has what is asked of it: figures and Modelfile of each GGUF file."""
    quants, files = recorded.summary.get("quants", {}), [n for n in recorded.artifacts if n.startswith("gguf")]
    return (len(quants) == len(files) and recorded.summary.get("quant") in quants
            and all(name.replace("gguf", "modelfile", 1) in recorded.artifacts for name in files))


def _once(decide: Callable[[Session], ExportSource]) -> Callable[[Session], ExportSource]:
    """The same decision for whoever asks, made for the first one."""
    made: list[ExportSource] = []

    def decided(session: Session) -> ExportSource:
        if not made:
            made.append(decide(session))
        return made[0]

    return decided


def check_target(config: ExportConfig, model_name: str) -> ollama.Server | None:
    """What can be known before any work: names, parameters, tools that are needed, and whether a server answers.

    Raises:
        UserError: a bad name, address or parameter; no engine for ``verify``; no such converter.
        WorkFailed: ``create`` is asked for, and no server answers.
    """
    model_names(config.name or ollama.default_model_name(model_name), config.labels or ("",))
    if half := [text for text in (config.system or "", *config.parameter) if re.search("[\ud800-\udfff]", text)]:
        raise UserError(f"this is not text in UTF-8: {half[0]!r}", "check the terminal's encoding, or put it into a "
                                                                   "--config file that is saved as UTF-8")
    parse_parameters(config.parameter)
    wants_engine(config)
    if config.converter is not None:
        find_converter(Path(config.converter))
    url = ollama.ollama_host({"OLLAMA_HOST": config.host} if config.host else os.environ)
    server = None if config.create is False else ollama.find_server(url)
    if config.create and server is None:
        raise WorkFailed(f"no Ollama server answers at {place_of(url)}",
                         f"{ollama.install_hint()} Or leave --create out: the GGUF and the Modelfile are made anyway.")
    return server


def _export(session: Session, source: ExportSource) -> Finished:
    run = session.run
    _say(session, source)
    quants = _quants(session, source)
    modelfiles = modelfiles_of(session, source, quants)
    same = same_files(session, source, quants)
    if same is not None:
        session.listener.note("the GGUF stays as it is; " + (
            "what Ollama is told is written anew" if same.checked else "what was not checked is checked now"))
    run.ollama.mkdir(exist_ok=True)
    # Under other names until all of it is checked: a file that is there from before is not touched by what fails.
    files = same.files if same else {
        quant: fresh_path(run.ollama / f"{run.model_name}-{quant}.gguf") for quant in quants}
    sight = sight_of(session, source)
    try:
        if same and same.checked and same.sees_as(sight, source):
            return _told_otherwise(session, modelfiles, same, sight)
        figures = same.written if same else _write(session, source, files)
        checks = _checked(session, source, files, same)
        if sight:
            sight = shown(session, sight if same else sight.for_new_files, files.values())
            sight = asked_about_a_row(session, source, sight, files.values())
        finished = _finished(session, source, modelfiles, files, figures, checks, sight)
        return replace(finished, settings=same.settings) if same else finished
    except BaseException:
        beside = (run.ollama / _REPORT, *(path for told in modelfiles.values() for path in told.paths.values()))
        for path in (*(() if same else files.values()), *map(fresh_path, beside)):
            remove(path)
        if sight:
            sight.discard()
        raise


def _checked(session: Session, source: ExportSource, files: Mapping[str, Path], same: SameFiles | None) -> ExportChecks:
    """What is known about the files, with what was found out before about those that stay."""
    if same is None:
        return check_files(session, source, files)
    before = ExportChecks.recorded(same.figures, same.summary).of_text
    return replace(before, merged=merge_check(session)) if same.checked else (
        check_files(session, source, files).completed(before))


def _write(session: Session, source: ExportSource, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Write the files; those of few bits rounded by what the matrices are multiplied with on rows."""
    # They bring torch along, which an export that is up to date does without.
    from gemma_tune.export.calibration import BY_THEMSELVES, calibration_of
    from gemma_tune.export.mixes import Mixes

    listener = session.listener
    calibration, said = calibration_of(session, source, tuple(files))
    on_grid = _on_grid(session)
    mixes = Mixes(source, calibration, listener, on_grid) if calibration else None
    if mixes:
        mixes.require_room(tuple(files))
    if calibration:
        listener.note(f"rounding is calibrated on {said}" + (f"; {BY_THEMSELVES}" if OF_EXPERTS in files else ""))
    elif not said and session.config.calibration_file:
        listener.note("--calibration is not used: none of these formats has eight bits or fewer")
    elif said:
        listener.note(f"rounding is not calibrated: {said}")
        if on_grid:
            listener.warn("the base model came from a GGUF, so its weights lie on the steps of few bits: rounding each "
                          "by itself can take what was learned back to them; the table tells")
    if session.config.size and not mixes:
        raise _unmeasured(session.config.size, said)
    if mixes:
        mixes.measure(tuple(files))
    return {label: _write_one(session, source, label, path, mixes) for label, path in files.items()}


def _on_grid(session: Session) -> bool:
    """Whether the base model came from a GGUF, so that its weights lie on the steps of few bits."""
    return session.model.source in ("gguf", "demo")


def _write_one(session: Session, source: ExportSource, label: str, path: Path, mixes: Mixes | None) -> dict[str, Any]:
    quant, types = mixes.of(label) if mixes else (label, {})
    rounding = Rounding(mixes.calibration.inputs) if mixes and quant in COARSE else None
    figures = write_file(source, path, quant, session.listener, rounding, types)
    if types:
        counts = ", ".join(f"{n} in {kind.name}" for kind, n in Counter(types.values()).most_common())
        session.listener.note(f"{label}: types by what rounding each matrix was measured to cost: {counts}")
    if size_in_bytes(label) and {*figures["tensor_types"]} <= _EIGHT_BITS:
        session.listener.note(f"{label}: eight bits everywhere, the most that is mixed, take "
                              f"{size_text(figures['bytes'])}; more exact and larger is --quant bf16")
    return figures


def _say(session: Session, source: ExportSource) -> None:
    target = source.target
    for note in (*target.notes, *([source.text_alone] if source.text_alone else [])):
        session.listener.note(note)
    for note in source.limits:
        session.listener.warn(note)
    if target.system and (lost := lossy_runes(target.system)):
        session.listener.warn(f"`ollama create -f` would drop these characters of the system prompt from the "
                              f"Modelfile: {lost!r}; a model that this command creates has them")


def refuse_formats(config: ExportConfig, architecture: Architecture | None, model: str) -> None:
    """What a model cannot be exported in, whatever its weights are.

    Args:
        architecture: None where the converter alone knows it.
        model: its name for people.

    Raises:
        UserError: a format or a size that was asked for is that.
    """
    if architecture is None:
        return
    if OF_EXPERTS in config.quant and not architecture.experts:
        raise UserError(f"{OF_EXPERTS} is a format for mixtures of experts, and {model} has none",
                        "choose another one, such as q4_k_m")
    if config.size and (reason := not_measured(architecture)):
        raise _unmeasured(config.size, reason)


def _unmeasured(size: str, reason: str) -> UserError:
    return UserError(f"--size {size}: what rounding costs cannot be measured: {reason}",
                     "name a number format with --quant")


def _quants(session: Session, source: ExportSource) -> tuple[str, ...]:
    chosen = session.config.labels
    refuse_formats(session.config, source.architecture, session.model.id)
    if not chosen and source.architecture and (quant := source.architecture.made_in):
        session.listener.note(f"number format {quant}: the model was made in it, so that experts which were not "
                              "trained stay as they are; all else has eight bits")
        chosen = (quant,)
    if not chosen:
        if source.architecture:
            parameters = sum(math.prod(spec.shape) for spec in source.architecture.tensors if not spec.tied_to)
        else:  # 16 bits each
            parameters = sum(p.stat().st_size for p in source.merged.glob("*.safetensors")) // 2
        quant, reason = recommended(parameters, from_gguf=_on_grid(session),
                                    calibrated=not not_calibrated(session, source))
        session.listener.note(f"number format {quant}: {reason}")
        chosen = (quant,)
    return chosen


def _finished(session: Session, source: ExportSource, modelfiles: Mapping[str, Told], files: Mapping[str, Path],
              figures: Mapping[str, dict[str, Any]], checks: ExportChecks, sight: Sight | None) -> Finished:
    """Write what stands beside the files, and give all of it to the manifest."""
    run = session.run
    if sight and sight.unchecked:
        checks = replace(checks, unchecked=(*checks.unchecked, sight.unchecked))
    for quant, path in files.items():
        figures[quant].update({"file": path.name.removeprefix(NEW), **modelfiles[quant].figures,
                               **checks.figures(quant)})
        figures[quant] |= _worth(session, quant, checks)
    outputs, fresh = _results(modelfiles, files, figures, sight)
    earlier = _earlier(session, figures)
    left = [*(item["file"] for item in earlier.values()), *leftover_modelfiles(run, outputs.values()),
            *([run.projector.name] if not sight and run.projector.is_file() else [])]
    if left:
        session.listener.note(f"earlier files stay in {run.ollama}: {', '.join(left)}")
    report = run.ollama / _REPORT
    limits, seen = source.limits, sight and sight.figures
    concluded = conclusion(figures, checks.losses, command("export-ollama", run.root), still_good(earlier))
    fresh[report] = fresh_path(report)
    text = markdown(run.model_name, figures, checks, limits, earlier, concluded, section(seen, source.text_alone))
    fresh[report].write_text(text, encoding="utf-8")
    _show(session, figures, checks)
    if concluded:
        session.listener.note(concluded)
    known = {"different_in_ollama": list(limits), "projector": seen, "text_alone": source.text_alone}
    summary = {**{name: value for name, value in known.items() if value}, **checks.summary}
    return Finished({**outputs, "export_report": report}, _summary(summary, figures, earlier), fresh)


def _told_otherwise(session: Session, modelfiles: Mapping[str, Told], same: SameFiles,
                    sight: Sight | None) -> Finished:
    """The last export with other Modelfiles."""
    outputs, fresh = _results(modelfiles, same.files, same.figures, sight)
    figures = {quant: {**item, **modelfiles[quant].figures} for quant, item in same.figures.items()}
    return Finished({**outputs, "export_report": session.run.ollama / _REPORT},
                    _summary(same.summary, figures, _earlier(session, figures)), fresh, same.settings)


def _summary(other: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]],
             earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all formats, and what follows from them, with what is known beside them."""
    return with_formats(with_file_to_take(other, figures), figures, earlier) | {"quants": dict(figures)}


def _results(modelfiles: Mapping[str, Told], files: Mapping[str, Path], figures: Mapping[str, Mapping[str, Any]],
             sight: Sight | None) -> tuple[dict[str, Path], dict[Path, Path]]:
    """The files with the Modelfiles beside them, by their names in the manifest; and where what is new lies now."""
    main = file_to_take(figures)
    outputs: dict[str, Path] = {}
    fresh: dict[Path, Path] = {}
    for quant, path in files.items():
        gguf = path.with_name(path.name.removeprefix(NEW))
        if gguf != path:
            fresh[gguf] = path
        outputs["gguf" if quant == main else f"gguf_{quant}"] = gguf
        modelfiles[quant].write(outputs, fresh, quant == main)
    if sight:
        outputs["projector"] = sight.path
        fresh |= {sight.path: sight.made} if sight.made else {}
    return outputs, fresh


def _earlier(session: Session, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What earlier exports left; what to do about files that are not of now is said."""
    earlier = earlier_formats(session.run, session.manifest, figures)
    if told := advice(session.run, earlier, figures):
        session.listener.warn(told)
    return earlier


def _worth(session: Session, quant: str, checks: ExportChecks) -> dict[str, str]:
    """``loses``: what is to be said against a format, if anything is."""
    if said := said_against(quant, checks.losses, gained(session)):
        session.listener.warn(f"{quant} {said}: choose a format of more bits")
    return {"loses": said} if said else {}


def _show(session: Session, figures: Mapping[str, Mapping[str, Any]], checks: ExportChecks) -> None:
    """Tables for people, and what was not checked."""
    listener = session.listener
    if checks.losses or len(figures) > 1:
        for title, rows in format_tables(figures, checks.losses).items():
            listener.grid(title, rows)
    if checks.parity:
        listener.grid("token ids of whole prompts, against Hugging Face's", checks.parity.rows())
        if checks.parity.greedy:
            listener.grid("greedy answers, against the merged model's", checks.parity.greedy_rows())
        if checks.merged:
            listener.note(checks.merged)
        if not checks.parity.ok:
            listener.warn("prompts are not the same everywhere: see the table, and ollama/report.md")
    for text in checks.unchecked:
        listener.note(f"not checked: {text}")
