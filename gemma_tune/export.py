"""``export-ollama``: the merged model as GGUF files with a Modelfile, checked, and as a model in Ollama."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune import ollama
from gemma_tune.architectures import Architecture, architecture_of
from gemma_tune.chat_format import ChatFormat
from gemma_tune.config import ExportConfig
from gemma_tune.converter import OUTTYPES, convert_with, find_converter
from gemma_tune.deploy import ExportReport, deploy, model_names
from gemma_tune.errors import UserError, WorkFailed
from gemma_tune.export_checks import Checks, check_files, format_rows, markdown, wants_engine
from gemma_tune.files import write_atomic
from gemma_tune.gguf_check import worst_error
from gemma_tune.gguf_types import llama_quantize, recommended
from gemma_tune.gguf_writer import write_gguf
from gemma_tune.modelfile import lossy_runes, render_modelfile
from gemma_tune.models import load_format, read_config
from gemma_tune.ollama_server import check_version
from gemma_tune.ollama_target import Target, parse_parameters, target_for
from gemma_tune.stage import Finished, Session, run_stage
from gemma_tune.thinking import settled


@dataclass(frozen=True)
class Written:
    """One GGUF file: where it is, and its figures for the manifest."""

    path: Path
    figures: dict[str, Any]


def export(session: Session) -> ExportReport:
    """Write and check the GGUF files and the Modelfile, then create the model in Ollama.

    Raises:
        UserError: no merged model, an architecture without a writer, a bad name.
        WorkFailed: with ``create``, no Ollama server; a GGUF does not hold the merged weights; Ollama refuses.
    """
    server = check_target(session.config, session.model.name)
    if server:
        check_version(server, session.model.config["model_type"])
    stage = run_stage(session, "export-ollama", _export)
    return deploy(session, stage, server)


def check_target(config: ExportConfig, model_name: str) -> ollama.Server | None:
    """What can be known before any work: names, parameters, and whether a server answers.

    Raises:
        UserError: a bad name, address or parameter.
        WorkFailed: ``create`` is asked for, and no server answers.
    """
    model_names(config.name or ollama.default_model_name(model_name), config.quant or ("",))
    parse_parameters(config.parameter)
    wants_engine(config)
    if config.converter is not None:
        find_converter(Path(config.converter))
    url = ollama.ollama_host({"OLLAMA_HOST": config.host} if config.host else os.environ)
    server = None if config.create is False else ollama.find_server(url)
    if config.create and server is None:
        raise WorkFailed(f"no Ollama server answers at {url}",
                         f"{ollama.install_hint()} Or leave --create out: the GGUF and the Modelfile are made anyway.")
    return server


def _export(session: Session) -> Finished:
    merged, run, listener = session.inputs["merged"], session.run, session.listener
    chat = load_format(merged, session.model.config["model_type"])
    target = target_for(session, merged, chat)
    for note in target.notes:
        listener.note(note)
    for note in target.chat.notes:
        listener.warn(note)
    if target.system and (lost := lossy_runes(target.system)):
        listener.warn(f"a Modelfile cannot hold these characters of the system prompt: {lost!r}")
    architecture = _architecture(session, merged)
    quants = _quants(session, merged, architecture)
    run.ollama.mkdir(exist_ok=True)
    write = _write if architecture else _convert
    files = {quant: write(session, merged, chat, target, quant, architecture) for quant in quants}
    earlier = sorted(p.name for p in run.ollama.glob("*.gguf") if p not in [file.path for file in files.values()])
    if earlier:
        listener.note(f"earlier files stay in {run.ollama}: {', '.join(earlier)}")
    checks = check_files(session, chat, target, {quant: file.path for quant, file in files.items()}, architecture)
    for quant, file in files.items():
        file.figures.update(checks.figures(quant))
    return _finished(session, target, files, checks)


def _architecture(session: Session, merged: Path) -> Architecture | None:
    """The model's architecture; None where the converter that was named is to write it."""
    try:
        return architecture_of(read_config(merged), merged / "config.json")
    except UserError:
        if session.config.converter is None:
            raise
        return None


def _quants(session: Session, merged: Path, architecture: Architecture | None) -> tuple[str, ...]:
    if session.config.quant:
        return tuple(dict.fromkeys(session.config.quant))
    if architecture:
        parameters = sum(math.prod(spec.shape) for spec in architecture.tensors if not spec.tied_to)
    else:  # 16 bits each
        parameters = sum(p.stat().st_size for p in merged.glob("*.safetensors")) // 2
    quant, reason = recommended(parameters)
    session.listener.note(f"number format {quant}: {reason}")
    return (quant,)


def _write(session: Session, merged: Path, chat: ChatFormat, target: Target, quant: str,
           architecture: Architecture) -> Written:
    """Write one file with our own writer, and compare every tensor with the checkpoint's."""
    run, listener = session.run, session.listener
    gguf = run.ollama / f"{run.model_name}-{quant}.gguf"
    progress = functools.partial(listener.progress, f"writing {gguf.name}")
    written = write_gguf(merged, gguf, quant, name=f"{run.model_name}-tuned", chat_template=settled(chat.template, target.chat.think),
                         eot_token_id=chat.terminator_id, sampling=_gguf_sampling(target.parameters),
                         on_tensor=lambda done, total, _: progress(done, total))
    for reason, count in Counter(reason for _, reason in written.fallbacks).items():
        listener.note(f"{gguf.name}: {count} matrices: {reason}")
    error, tensor = worst_error(merged, gguf, architecture)
    return Written(gguf, {"file": gguf.name, "bytes": written.size_bytes, "tensor_types": written.tensor_types,
                          "largest_error": error, "largest_error_tensor": tensor})


def _convert(session: Session, merged: Path, chat: ChatFormat, target: Target, quant: str, _: None) -> Written:
    """Write one file with llama.cpp's converter, and its quantiser where the converter has no such format."""
    run = session.run
    gguf, converter = run.ollama / f"{run.model_name}-{quant}.gguf", Path(session.config.converter)
    with _with_template(merged, run.ollama, settled(chat.template, target.chat.think)) as checkpoint:
        if quant in OUTTYPES:
            convert_with(converter, checkpoint, gguf, quant, session.listener)
        else:
            wide = run.ollama / f".new-{run.model_name}-bf16.gguf"
            try:
                convert_with(converter, checkpoint, wide, "bf16", session.listener)
                llama_quantize(wide, gguf, quant)
            finally:
                wide.unlink(missing_ok=True)
    return Written(gguf, {"file": gguf.name, "bytes": gguf.stat().st_size, "converter": converter.name})


@contextmanager
def _with_template(merged: Path, beside: Path, template: str) -> Iterator[Path]:
    """The checkpoint with another chat template, for a converter that reads it from there."""
    file = merged / "chat_template.jinja"
    if file.is_file() and file.read_text(encoding="utf-8") == template:
        yield merged
        return
    view = beside / f".new-{merged.name}"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    try:
        for path in merged.iterdir():
            if path.is_file() and path.name != file.name:
                (view / path.name).symlink_to(path.resolve())
        (view / file.name).write_text(template, encoding="utf-8")
        yield view
    finally:
        shutil.rmtree(view, ignore_errors=True)


def _gguf_sampling(parameters: Mapping[str, Any]) -> dict[str, float]:
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repeat_penalty": "repetition_penalty"}
    return {ours: parameters[theirs] for theirs, ours in names.items() if theirs in parameters}


def _finished(session: Session, target: Target, files: Mapping[str, Written], checks: Checks) -> Finished:
    """Write what stands beside the GGUF files, and give all of it to the manifest."""
    first = next(iter(files))
    names = model_names(target.name, tuple(files))
    outputs = {}
    for quant, file in files.items():
        modelfile = session.run.ollama / ("Modelfile" if quant == first else f"Modelfile-{quant}")
        _write_modelfile(session, modelfile, file.path, replace(target, name=names[quant]))
        suffix = "" if quant == first else f"_{quant}"
        outputs |= {f"gguf{suffix}": file.path, f"modelfile{suffix}": modelfile}
    report = session.run.ollama / "report.md"
    figures = {quant: file.figures for quant, file in files.items()}
    write_atomic(report, markdown(session.run.model_name, figures, checks).encode())
    _show(session, figures, checks)
    main = files[first].figures
    summary = {"quant": first, "gguf_bytes": main["bytes"], "ollama_name": names[first]}
    summary |= {f"check_{name}": main[name] for name in ("largest_error", "largest_error_tensor") if name in main}
    summary |= {"quants": figures, **checks.summary}
    return Finished({**outputs, "report": report}, summary)


def _show(session: Session, figures: Mapping[str, Mapping[str, Any]], checks: Checks) -> None:
    """Tables for people, and what was not checked."""
    listener = session.listener
    if checks.losses:
        listener.grid("number formats", format_rows(figures, checks.losses))
    if checks.parity:
        listener.grid("token ids of whole prompts, against Hugging Face's", checks.parity.rows())
        if checks.parity.greedy:
            listener.grid("greedy answers, against the merged model's", checks.parity.greedy_rows())
        if not checks.parity.ok:
            listener.warn("prompts are not the same everywhere: see the table, and ollama/report.md")
    for text in checks.unchecked:
        listener.note(f"not checked: {text}")


def _write_modelfile(session: Session, path: Path, gguf: Path, target: Target) -> None:
    write_atomic(path, render_modelfile(
        gguf.name, target.chat, parameters=target.parameters, system=target.system, license_text=target.license,
        comment_lines=[f"{session.model.id}, fine-tuned with gemma-tune",
                       f"ollama create {target.name} -f {path.name}"]).encode())
