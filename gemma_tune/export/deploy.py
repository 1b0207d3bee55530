"""From exported files to a model that answers: in Ollama where a server is, else as commands to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.answers.prompts import Prompt
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.export.files import ExportSource
from gemma_tune.export.target import Target
from gemma_tune.export.worth import finer_than
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.server import Server
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.prompts import held_out
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport

ANSWER_TOKENS = 256  # longest answer of the question that a new model is asked
PATIENCE = 600.0  # seconds for it: the server first loads the model


@dataclass(frozen=True)
class ExportReport:
    """The stage's report, and what became of the model in Ollama.

    Args:
        name: the model's name in Ollama.
        created: whether it is there now.
        next_steps: commands that are left to do.
        elsewhere: commands for other programs that take the same file.
        advice: what to do before the next steps.
        answer: what Ollama answered to a held-out prompt, with ``done_reason`` and counts of tokens.
    """

    stage: StageReport
    name: str
    created: bool
    next_steps: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    advice: str | None = None
    answer: Mapping[str, Any] | None = None


def model_names(name: str, quants: Sequence[str]) -> dict[str, str]:
    """The model's name in Ollama for each number format: a tag tells several apart.

    Raises:
        UserError: a name that Ollama does not take.
    """
    ollama.validate_model_name(name)
    return {quant: ollama.tagged(name, quant) if len(quants) > 1 else name for quant in quants}


def deploy(session: Session, stage: StageReport, server: Server | None,
           source: Callable[[Session], ExportSource]) -> ExportReport:
    """Create the exported models in Ollama and ask the first good one a held-out prompt.

    Args:
        server: None where none answers, or none is wanted: the commands to type are given instead.
        source: what the files were made from; asked for only where there is a server.

    Raises:
        WorkFailed: Ollama refuses, is too old, or its model does not answer.
    """
    files = [(stage.artifacts[key], stage.artifacts[key.replace("gguf", "modelfile", 1)])
             for key in stage.artifacts if key.startswith("gguf")]
    quants = stage.summary["quants"]
    names = [figures["ollama_name"] for figures in quants.values()]
    # What loses much of what was learned is made as it was asked for, but nobody is sent there.
    good = [n for n, figures in enumerate(quants.values()) if "loses" not in figures]
    if not good:
        better = command("export-ollama", session.run.root, "--quant", finer_than(quants))
    elsewhere = tuple(f"llama-cli -m {shlex.quote(files[n][0])}" for n in good[:1])
    run_it = (f"ollama run {names[good[0]]}",) if good else (better,)
    if server is None:
        steps = [ollama.manual_command(Path(files[n][1]), names[n]) for n in good]
        advice = None if session.config.create is False else ollama.install_hint()
        return ExportReport(stage, names[good[0] if good else 0], False, (*steps, *run_it), elsewhere, advice)
    chat, target = source(session).chat, source(session).target
    digests = _digests(session)
    for name, (gguf, _) in zip(names, files, strict=True):
        _create(session, server, replace(target, name=name), Path(gguf), digests[Path(gguf).name])
    main = names[good[0] if good else 0]
    answer = _ask(session, server, replace(target, name=main), chat)
    return ExportReport(stage, main, True, run_it, elsewhere, answer=answer)


def _create(session: Session, server: Server, target: Target, gguf: Path, sha256: str) -> None:
    session.listener.note(f"creating {target.name} in Ollama {server.version} at {server.place}")
    ollama.create_model(server, target.name, gguf, target.chat, target.parameters, target.system, target.license,
                        session.listener.progress, sha256)


def _digests(session: Session) -> dict[str, str]:
    """sha256 of each exported file, by its name, as the run's manifest has it now that they are exported."""
    manifest = read_manifest(session.run.root) or session.manifest
    outputs = manifest.stages["export-ollama"]["outputs"]
    return {Path(item["path"]).name: item["sha256"] for item in outputs.values()}


def _question(session: Session, chat: ChatFormat) -> Prompt:
    """A held-out prompt that Ollama can be asked: one without tools, which it writes down in its own way."""
    prompts = held_out(session, chat, 20, ANSWER_TOKENS)
    plain = (p for p in prompts if p.text is None and not p.tools and all(turn["content"] for turn in p.messages))
    return next(plain, Prompt(samples.heldout_questions()[0]["messages"]))


def _same_prompt(chat: ChatFormat, target: Target, prompt: Prompt, laid_out: str) -> bool:
    """Whether a server's text of a prompt is Hugging Face's; either may spell out the BOS token."""
    messages, bos = prompt.messages, chat.tokenizer.bos_token or ""
    if target.system and messages[0]["role"] != "system":  # Ollama puts the model's SYSTEM in front
        messages = [{"role": "system", "content": target.system}, *messages]
    return laid_out.removeprefix(bos) == chat.render(messages, prompt=True).removeprefix(bos)


def _ask(session: Session, server: Server, target: Target, chat: ChatFormat) -> dict[str, Any]:
    """Ask a held-out prompt; a model that does not end its answer is told of, as a short training can leave one so."""
    prompt = _question(session, chat)
    session.listener.note(f"asking {target.name} a held-out prompt")
    laid_out = ollama.rendered_prompt(server, target.name, prompt.messages, PATIENCE, chat=target.chat)
    answer = ollama.generate_check(server, target.name, prompt.messages, PATIENCE, ANSWER_TOKENS, chat=target.chat)
    answer["prompt_as_trained"] = None if laid_out is None else _same_prompt(chat, target, prompt, laid_out)
    if answer["prompt_as_trained"] is False:
        session.listener.warn(f"Ollama lays out a prompt for {target.name} otherwise than training did: {laid_out!r}")
    if answer["done_reason"] != "stop":
        session.listener.warn(f"{target.name} did not end its answer within {ANSWER_TOKENS} tokens; `gemma-tune eval` "
                              "shows whether the adapter itself does")
    return answer
