"""GGUF files of any architecture that llama.cpp knows, by its own converter in a checkout of a person's own.

The converter runs as a process of its own, with the checkout's `gguf` package instead of the installed one: they belong
together, and both change with every architecture that is added.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import replacing, sync
from gemma_tune.base.listener import Listener

SCRIPT = "convert_hf_to_gguf.py"
OUTTYPES = ("f32", "f16", "bf16", "q8_0")  # what it writes; anything else is made from f16 afterwards
_PERCENT = re.compile(rb"Writing:\s+(\d+)%")  # its progress bar
_KEPT = 8192  # bytes of its output to look for the reason in when it fails
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


def find_converter(path: Path) -> Path:
    """The converter's script in ``path``, a checkout of llama.cpp or the script itself.

    Raises:
        UserError: there is none.
    """
    script = path / SCRIPT if path.is_dir() else path
    if script.is_file():
        return script
    raise UserError(f"There is no {SCRIPT} at {path}.",
                    "Get llama.cpp (git clone https://github.com/ggml-org/llama.cpp) and pass its folder: --converter "
                    "llama.cpp")


def convert_with(path: Path, checkpoint: Path, out: Path, outtype: str, listener: Listener) -> None:
    """Convert ``checkpoint`` with llama.cpp's converter; ``out`` appears, or is replaced, when the new file is whole.

    Args:
        path: a checkout of llama.cpp or its convert_hf_to_gguf.py.
        checkpoint: a Hugging Face checkpoint folder.
        out: the GGUF file to write.
        outtype: one of `OUTTYPES`.
        listener: hears how far it is, in per cent.

    Raises:
        UserError: no such script, another type, or a checkpoint with code of its own, which the converter would run.
        WorkFailed: the converter failed; with the last lines that it printed.
    """
    script = find_converter(path)
    if outtype not in OUTTYPES:
        raise UserError(f"llama.cpp's converter doesn't write {outtype}.", f"Choose one of: {', '.join(OUTTYPES)}.")
    if code := sorted(file.name for file in checkpoint.glob("*.py")):
        raise UserError(f"{checkpoint} holds code that llama.cpp's converter may run: {', '.join(code)}.",
                        "Look at it, and remove it from there if the model does without.")
    with replacing(out) as partial:
        command = [sys.executable, str(script.resolve()), str(checkpoint.resolve()),
                   "--outfile", str(partial.resolve()), "--outtype", outtype]
        code, said = _run(command, _environment(script.resolve().parent), f"converting to {out.name}", listener)
        if code or not partial.is_file():
            raise WorkFailed(f"llama.cpp's converter could not convert {checkpoint} (exit status {code}).",
                             "Update llama.cpp and what its requirements.txt lists; its last words are above.", said)
        sync(partial)


def _environment(checkout: Path) -> dict[str, str]:
    """The converter needs no network and no token; it gets the checkout's `gguf` before any other, and what else it
    needs from where a person has it, as on a cluster whose modules set PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if key not in _SECRETS}
    own = checkout / "gguf-py"
    if own.is_dir():
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own), env.get("PYTHONPATH")]))
    return env | {"HF_HUB_OFFLINE": "1"}


def _run(command: list[str], env: dict[str, str], task: str, listener: Listener) -> tuple[int, list[str]]:
    """Run a command to its end: its exit status, and the last lines that it printed."""
    tail = b""
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, bufsize=0) as process:
        assert process.stdout is not None
        try:
            while block := process.stdout.read(_KEPT):
                tail = (tail + block)[-_KEPT:]
                if percents := _PERCENT.findall(block):
                    listener.progress(task, int(percents[-1]), 100)
        except BaseException:
            process.kill()
            raise
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail.decode(errors="replace")) if line.strip()]
    return process.returncode, lines[-5:]
