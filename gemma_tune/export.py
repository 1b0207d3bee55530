"""``export-ollama``: the merged model as a GGUF file with a Modelfile, and a model in Ollama where a server answers."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune import ollama
from gemma_tune.chat_format import ChatFormat
from gemma_tune.config import ExportConfig
from gemma_tune.errors import WorkFailed
from gemma_tune.files import write_atomic
from gemma_tune.gguf_writer import write_gguf
from gemma_tune.modelfile import OllamaChat, chat_for, lossy_runes, render_modelfile
from gemma_tune.models import load_format, read_config
from gemma_tune.stage import Finished, Session, StageReport, run_stage

# Ollama's own default of 4096 tokens or fewer would cut conversations that were trained whole.
LEAST_CONTEXT = 4096
# Largest relative error (RMS of the difference over RMS of the tensor) that a type should cause: half a step of an
# 11-bit or 8-bit mantissa for f16 and bf16, and what rounding to 8 and 4 bits per weight in blocks of 32 gives.
LARGEST_ERROR = {"f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q4_0": 0.16}


@dataclass(frozen=True)
class ExportReport:
    """The stage's report, and what became of the model in Ollama: ``created`` or the steps that are left to do."""

    stage: StageReport
    name: str
    created: bool
    next_steps: tuple[str, ...]
    advice: str | None = None


@dataclass(frozen=True)
class Target:
    """What Ollama is to be told about the model."""

    name: str
    chat: OllamaChat
    parameters: dict[str, Any]
    system: str | None
    license: str | None


def export(session: Session) -> ExportReport:
    """Write the GGUF and the Modelfile, then create the model in Ollama.

    Raises:
        UserError: no merged model, an architecture without a writer, a bad name.
        WorkFailed: with ``create``, no Ollama server; the GGUF does not hold the merged weights; Ollama refuses.
    """
    config = session.config
    server = check_target(config, session.model.name)
    stage = run_stage(session, "export-ollama", _export)
    modelfile = Path(stage.artifacts["modelfile"])
    if server is None:
        steps = (ollama.manual_command(modelfile, _name(session)), f"ollama run {_name(session)}")
        return ExportReport(stage, _name(session), False, steps,
                            None if config.create is False else ollama.install_hint())
    target = _target(session, session.run.merged, _chat(session, session.run.merged))
    session.listener.note(f"creating {target.name} in Ollama {server.version} at {server.url}")
    ollama.create_model(server, target.name, Path(stage.artifacts["gguf"]), target.chat, target.parameters,
                        target.system, target.license, session.listener.progress)
    return ExportReport(stage, target.name, True, (f"ollama run {target.name}",))


def check_target(config: ExportConfig, model_name: str) -> ollama.Server | None:
    """What can be known before any work: whether the name is one that Ollama takes, and whether a server answers.

    Raises:
        UserError: a bad name or address.
        WorkFailed: ``create`` is asked for, and no server answers.
    """
    ollama.validate_model_name(config.name or ollama.default_model_name(model_name))
    url = ollama.ollama_host({"OLLAMA_HOST": config.host} if config.host else os.environ)
    server = None if config.create is False else ollama.find_server(url)
    if config.create and server is None:
        raise WorkFailed(f"no Ollama server answers at {url}",
                         f"{ollama.install_hint()} Or leave --create out: the GGUF and the Modelfile are made anyway.")
    return server


def _name(session: Session) -> str:
    return session.config.name or ollama.default_model_name(session.model.name)


def _chat(session: Session, merged: Path) -> ChatFormat:
    return load_format(merged, session.model.config["model_type"])


def _target(session: Session, merged: Path, chat: ChatFormat) -> Target:
    config = read_config(merged)
    context = session.config.num_ctx or min(max(LEAST_CONTEXT, _longest_in_training(session)),
                                            config.get("max_position_embeddings", LEAST_CONTEXT))
    license_text = next((p.read_text(encoding="utf-8") for p in sorted(merged.glob("LICENSE*"))), None)
    return Target(_name(session), chat_for(chat.template, config["model_type"], eos_token=chat.tokenizer.eos_token),
                  {"num_ctx": context, **sampling_parameters(merged)}, session.config.system, license_text)


def _longest_in_training(session: Session) -> int:
    """An upper bound of the tokens of training's longest sequence; 0 where the manifest does not tell."""
    summary = session.manifest.stages.get("prepare", {"summary": {}})["summary"]
    limit = session.settings_of("prepare").get("max_length", 0)
    return min(summary.get("longest", limit), limit)  # the longest row is measured before the limit


def sampling_parameters(checkpoint: Path) -> dict[str, Any]:
    """Ollama's names for the model's own sampling settings.

    A model without any answers greedily in transformers; temperature 0 keeps that, where Ollama's default is 0.8.
    """
    try:
        own = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        own = {}
    if not own.get("do_sample"):
        return {"temperature": 0.0}
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
    return {"temperature": 1.0} | {theirs: own[ours] for ours, theirs in names.items() if own.get(ours) is not None}


def _export(session: Session) -> Finished:
    config, merged, run = session.config, session.inputs["merged"], session.run
    chat = _chat(session, merged)
    target = _target(session, merged, chat)
    for note in target.chat.notes:
        session.listener.warn(note)
    if target.system and (lost := lossy_runes(target.system)):
        session.listener.warn(f"a Modelfile cannot hold these characters of --system: {lost!r}")
    run.ollama.mkdir(exist_ok=True)
    gguf = run.ollama / f"{run.model_name}-{config.quant}.gguf"
    progress = functools.partial(session.listener.progress, f"writing {gguf.name}")
    written = write_gguf(merged, gguf, config.quant, name=f"{run.model_name}-tuned", chat_template=chat.template,
                         eot_token_id=chat.terminator_id, sampling=_gguf_sampling(target.parameters),
                         on_tensor=lambda done, total, _: progress(done, total))
    for tensor, reason in written.fallbacks:
        session.listener.warn(f"{tensor}: {reason}")
    error, tensor = worst_error(merged, gguf)
    if not error <= LARGEST_ERROR[config.quant]:
        raise WorkFailed(f"{tensor} in {gguf.name} is {error:.1%} off the merged weights, more than {config.quant} "
                         "explains", "please report this")
    if earlier := sorted(p.name for p in run.ollama.glob("*.gguf") if p != gguf):
        session.listener.note(f"earlier files stay in {run.ollama}: {', '.join(earlier)}")
    if config.quant == "q4_0":
        session.listener.note(f"q4_0 rounds each weight to 4 bits: {error:.0%} off on average is usual; q8_0 is closer "
                              "to what was trained")
    modelfile = run.ollama / "Modelfile"
    write_atomic(modelfile, render_modelfile(
        gguf.name, target.chat, parameters=target.parameters, system=target.system, license_text=target.license,
        comment_lines=[f"{session.model.id}, fine-tuned with gemma-tune",
                       f"ollama create {target.name} -f Modelfile"]).encode())
    return Finished({"gguf": gguf, "modelfile": modelfile},
                    {"quant": config.quant, "gguf_bytes": written.size_bytes, "tensor_types": written.tensor_types,
                     "check_largest_error": error, "check_largest_error_tensor": tensor, "ollama_name": target.name})


def _gguf_sampling(parameters: Mapping[str, Any]) -> dict[str, float]:
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repeat_penalty": "repetition_penalty"}
    return {ours: parameters[theirs] for theirs, ours in names.items() if theirs in parameters}


def worst_error(checkpoint: Path, gguf: Path) -> tuple[float, str]:
    """Largest relative RMS error of a GGUF tensor against the checkpoint's, and the tensor's name.

    The file is read back with the `gguf` package's reader and dequantiser, which share no code with the writer.
    """
    from gguf import GGUFReader, get_tensor_name_map
    from gguf.constants import MODEL_ARCH

    config = read_config(checkpoint)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    worst, where = 0.0, ""
    for name, blocks in _checkpoint_tensors(checkpoint):
        tensor = stored.get(names.get_name(name, (".weight",)))
        if tensor is None:  # a head tied to the embedding is not stored
            continue
        difference = total = 0.0
        for start, expected in blocks:
            got = _dequantised_rows(tensor, start, expected.shape)
            expected = expected + 1 if name.endswith("norm.weight") else expected
            difference += float(np.square(got - expected, dtype=np.float64).sum())
            total += float(np.square(expected, dtype=np.float64).sum())
        error = (difference / total) ** 0.5 if total else difference ** 0.5
        if not error <= worst:
            worst, where = error, tensor.name
    return worst, where


def _dequantised_rows(tensor: Any, start: int, shape: tuple[int, ...]) -> np.ndarray:
    from gguf.quants import dequantize

    data = tensor.data if len(shape) == 1 else tensor.data[start:start + shape[0]]
    return dequantize(data, tensor.tensor_type).reshape(shape)


def _checkpoint_tensors(checkpoint: Path, rows: int = 8192) -> Iterator[tuple[str, Iterator[tuple[int, np.ndarray]]]]:
    """Names, and for each the blocks of rows as fp32 with the row that they begin at."""
    from safetensors import safe_open

    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                step = part.get_shape()[0] if len(part.get_shape()) == 1 else rows
                yield name, ((n, part[n:n + step].float().numpy()) for n in range(0, part.get_shape()[0], step))
