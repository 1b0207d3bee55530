"""From exported files to a model that answers: in Ollama where a server is, else as commands to type.

A server is then asked how it reads every prompt of the parity report, whose Ollama column becomes the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.answers.prompts import Prompt
from gemma_tune.base import shell
from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.words import counted
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.export import served_sight
from gemma_tune.export.checks import report_title
from gemma_tune.export.files import ExportSource
from gemma_tune.export.parity import ANSWER_TOKENS as COMPARED_TOKENS
from gemma_tune.export.parity import HELD_OUT, LONGEST_PROMPT, prompts_of
from gemma_tune.export.parity_report import DIFFERS, EQUAL, OLLAMA, Parity, replaced
from gemma_tune.export.served import PATIENCE, ask_server
from gemma_tune.export.target import Target
from gemma_tune.export.worth import finer_than
from gemma_tune.ollama import client as ollama
from gemma_tune.ollama.capabilities import tell_capabilities
from gemma_tune.ollama.server import Server
from gemma_tune.run.amend import amend, result_id
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import Manifest, read_manifest
from gemma_tune.run.prompts import held_out
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport

ANSWER_TOKENS = 256  # longest answer of the question that a new model is asked


@dataclass(frozen=True)
class Elsewhere:
    """A GGUF file, which has the chat template in it, for other programs.

    Args:
        file: its path.
        projector: the path of what it sees with; None of a model that takes text alone.
        commands: of llama.cpp and LM Studio.
        lm_studio_folder: where LM Studio finds a copy of both without a command.
    """

    file: str
    projector: str | None
    commands: tuple[str, ...]
    lm_studio_folder: str

    @classmethod
    def of(cls, gguf: str, model: str, projector: str | None = None) -> Elsewhere:
        """How a file is used; ``model`` is its name, without a tag."""
        path, publisher = shell.quote(gguf), "gemma-tune"
        folder = f"~/.lmstudio/models/{publisher}/{model}/"
        # Unless it is told to copy a file, LM Studio moves it out of the run.
        if projector is None:
            return cls(gguf, None, (f"llama-cli -m {path}", f"llama-server -m {path} --jinja",
                                    f"lms import --copy {path}"), folder)
        sees = f"--mmproj {shell.quote(projector)}"
        import_it = f"lms import --copy --user-repo {publisher}/{model}"  # both into one folder
        commands = (f"llama-mtmd-cli -m {path} {sees} --jinja", f"llama-server -m {path} {sees} --jinja",
                    f"{import_it} {path}", f"{import_it} {shell.quote(projector)}")
        return cls(gguf, projector, commands, folder)


@dataclass(frozen=True)
class ExportReport:
    """The stage's report, and what became of the model in Ollama.

    Args:
        name: the model's name in Ollama.
        created: whether it is there now.
        next_steps: commands that are left to do.
        elsewhere: the file for other programs; None if none keeps enough of what was learned.
        advice: what to do before the next steps.
        answer: what Ollama answered to a held-out prompt, with ``done_reason`` and counts of tokens.
        picture: what came of asking Ollama about a picture, see ``served_sight.tried``; None if it was not.
    """

    stage: StageReport
    name: str
    created: bool
    next_steps: tuple[str, ...]
    elsewhere: Elsewhere | None = None
    advice: str | None = None
    answer: Mapping[str, Any] | None = None
    picture: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """What a program learns beside the stage's report and the next steps."""
        other = self.elsewhere
        return {"created": self.created, "name": self.name, "advice": self.advice, "answer": self.answer,
                "picture": self.picture, "file": other.file if other else None,
                "projector": other.projector if other else None, "elsewhere": list(other.commands) if other else [],
                "lm_studio_folder": other.lm_studio_folder if other else None}


def model_names(name: str, quants: Sequence[str]) -> dict[str, str]:
    """The model's name in Ollama for each number format: a tag tells several apart.

    Raises:
        UserError: a name that Ollama does not take.
    """
    ollama.validate_model_name(name)
    return {quant: ollama.tagged(name, quant) if len(quants) > 1 else name for quant in quants}


def deploy(session: Session, stage: StageReport, server: Server | None,
           source: Callable[[Session], ExportSource]) -> ExportReport:
    """Create the exported models in Ollama, compare how it reads prompts, and ask the first good one a held-out prompt.

    Args:
        server: None where none answers, or none is wanted: the commands to type are given instead.
        source: what the files were made from; asked for only where there is a server.

    Raises:
        WorkFailed: Ollama refuses, is too old, reads prompts otherwise than training did, or its model does not answer.
    """
    files = [(stage.artifacts[key], stage.artifacts[key.replace("gguf", "modelfile", 1)])
             for key in stage.artifacts if key.startswith("gguf")]
    names = [figures["ollama_name"] for figures in stage.summary["quants"].values()]
    good, main = _good_and_main(stage.summary)
    projector = Path(path) if (path := stage.artifacts.get("projector")) else None
    elsewhere = Elsewhere.of(files[main][0], f"{session.run.model_name}-tuned", path) if good else None
    run_it = (f"ollama run {names[main]}",) if good else (_better(session, stage),)
    if server is None:
        steps = [ollama.manual_command(Path(files[n][1]), names[n]) for n in good]
        advice = None if session.config.create is False else ollama.install_hint()
        return ExportReport(stage, names[main], False, (*steps, *run_it), elsewhere, advice)
    chat, target = source(session).chat, source(session).target
    record = read_manifest(session.run.root) or session.manifest
    result, digests = result_id(record, stage.stage), _digests(record)
    ggufs = {name: Path(gguf) for name, (gguf, _) in zip(names, files, strict=True)}

    def create(projector: Path | None) -> None:
        for name, gguf in ggufs.items():
            _create(session, server, replace(target, name=name), gguf, digests, projector)

    target, question = replace(target, name=names[main]), _question(session, chat)
    create(projector)
    picture = served_sight.tried(server, target, create, projector, session.listener) if projector else None
    as_trained = None
    if session.config.verify is not False:
        stage, as_trained = _compare(session, stage, result, server, target, chat)
    answer = _ask(session, server, target, question)
    if session.config.verify is False:
        as_trained = _compare_layout(session, server, target, chat, question)
    return ExportReport(stage, names[main], True, run_it, elsewhere,
                        answer={**answer, "prompt_as_trained": as_trained}, picture=picture)


def _good_and_main(summary: Mapping[str, Any]) -> tuple[list[int], int]:
    """Places of the formats that lose little, and of the one that people are sent to: one that loses much of what was
    learned is made as it was asked for, and no more."""
    quants = summary["quants"]
    good = [n for n, figures in enumerate(quants.values()) if "loses" not in figures]
    taken = [*quants].index(summary["quant"])
    return good, taken if taken in good or not good else good[0]


def _better(session: Session, stage: StageReport) -> str:
    """What to type where each format that was made loses too much: a good one can be there from an earlier export."""
    if best := stage.summary.get("recommended"):
        return command("chat", session.run.root, "--use", "gguf", "--quant", best)
    return command("export-ollama", session.run.root, "--quant", finer_than(stage.summary["quants"]))


def _create(session: Session, server: Server, target: Target, gguf: Path, sha256: Mapping[str, str],
            projector: Path | None) -> None:
    session.listener.note(f"creating {target.name} in Ollama {server.version} at {server.place}")
    ollama.create_model(server, target.name, gguf, target.chat, target.parameters, target.system, target.license,
                        session.listener.progress, sha256, projector=projector,
                        again=command("export-ollama", session.run.root, "--force"))
    tell_capabilities(server, target.name, target.chat, session.listener, sees=projector is not None)


def _digests(manifest: Manifest) -> dict[str, str]:
    """sha256 of each exported file, by its name, as the run's manifest has it now that they are exported."""
    outputs = manifest.stages["export-ollama"]["outputs"]
    return {Path(item["path"]).name: item["sha256"] for item in outputs.values()}


def _compare(session: Session, stage: StageReport, result: tuple[str, ...], server: Server, target: Target,
             chat: ChatFormat) -> tuple[StageReport, bool | None]:
    """Let the server's own column stand in the parity report.

    Returns:
        The stage's report with it, and whether all texts are those of training (None: the server does not show them).

    Raises:
        WorkFailed: a prompt is read otherwise, and that is not allowed; it is recorded all the same.
    """
    listener = session.listener
    prompts = prompts_of(chat, held_out(session, chat, HELD_OUT, COMPARED_TOKENS, most=LONGEST_PROMPT))
    ggufs = [Path(path) for name, path in stage.artifacts.items() if name.startswith("gguf")]
    served, cases = ask_server(server, target, chat, prompts, listener, ggufs=ggufs)
    before = Parity.from_json(stage.summary.get("parity")) or Parity("", (), {}, "no llama.cpp ran the files", ())
    parity = before.with_server(served, cases)
    path = Path(stage.artifacts["export_report"])
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else report_title(session.run.model_name)
    stage = amend(session, stage, result, {"parity": parity.as_json()}, {"export_report": replaced(text, parity)})
    states = [case.checks[OLLAMA].state for case in parity.cases]
    listener.note(f"{served} reads {states.count(EQUAL)} of {counted(len(states), 'prompt')} as training did")
    for remark in parity.remarks(OLLAMA) if DIFFERS not in states else ():
        listener.note(remark)
    if served.untold:
        listener.warn(f"{served.untold}: update Ollama, and run the same command again to compare all")
    if DIFFERS in states:
        _differs(session, server, f"{served} reads {states.count(DIFFERS)} of {counted(len(states), 'prompt')} for "
                                  f"{target.name} otherwise than training did", parity.remarks(OLLAMA, (DIFFERS,)),
                 path)
    return stage, None if not served.shows else DIFFERS not in states


def _differs(session: Session, server: Server, message: str, problems: Sequence[str], report: Path) -> None:
    """An error, unless differences are allowed."""
    if session.config.allow_difference:
        session.listener.warn("; ".join([message, *problems]))
        return
    where = ("--host", server.place) if session.config.host else ()
    anyway = command("export-ollama", session.run.root, "--allow-difference", *where)
    raise WorkFailed(message, f"update Ollama and run the same command again, or take the model as it is: {anyway}. "
                              f"It stays in Ollama, the files are whole, and {report} has the whole table.", problems)


def _compare_layout(session: Session, server: Server, target: Target, chat: ChatFormat, prompt: Prompt) -> bool | None:
    """Whether one prompt is laid out as in training, where nothing else is compared; None if that is not told."""
    served, [case] = ask_server(server, target, chat, {"the prompt": prompt}, session.listener, count=False)
    check = case.checks[OLLAMA]
    if check.state == DIFFERS:
        session.listener.warn(f"Ollama lays out a prompt for {target.name} otherwise than training did: {check.detail}")
    return None if not served.shows else check.state != DIFFERS


def _question(session: Session, chat: ChatFormat) -> Prompt:
    """A held-out prompt that Ollama can be asked: one without tools, which it writes down in its own way."""
    prompts = held_out(session, chat, 20, ANSWER_TOKENS)
    plain = (p for p in prompts if p.text is None and not p.tools and all(turn["content"] for turn in p.messages))
    return next(plain, Prompt(samples.heldout_questions()[0]["messages"]))


def _ask(session: Session, server: Server, target: Target, prompt: Prompt) -> dict[str, Any]:
    """Ask a held-out prompt; a model that does not end its answer is told of, as a short training can leave one so."""
    session.listener.note(f"asking {target.name} a held-out prompt")
    answer = ollama.generate_check(server, target.name, prompt.messages, PATIENCE, ANSWER_TOKENS, chat=target.chat)
    if answer["done_reason"] != "stop":
        session.listener.warn(f"{target.name} did not end its answer within {ANSWER_TOKENS} tokens; `gemma-tune eval` "
                              "shows whether the adapter itself does")
    return answer
