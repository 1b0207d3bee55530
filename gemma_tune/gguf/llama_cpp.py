"""llama.cpp on this machine: which one there is, and how it is started on a GGUF file.

It comes from the ``xllamacpp`` wheel, whose process runs this module, or is a ``llama-server`` on the PATH.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from gemma_tune.base.machine import cores

ERRORS_ONLY = 1  # of llama.cpp's levels of verbosity
INSTALL_HINT = "pip install xllamacpp, or put llama.cpp's llama-server on the PATH"
# What llama.cpp prints of an error: "0.00.038.483 E srv  load_model: failed to load model", or a failed assertion.
_ERROR_LINE = re.compile(r"^(?:[\d.]+ E +(.*)|(.*GGML_ASSERT.*)|.*\b(error: .*))$", re.MULTILINE)


def find_engine() -> str | None:
    """``xllamacpp <version>``, else ``llama-server <path>``; None where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp"):
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    server = shutil.which("llama-server")
    return f"llama-server {server}" if server else None


def engine_name() -> str:
    """The engine without a path, for records."""
    return re.sub(r"^(llama-server) .*", r"\1", find_engine() or "")


def engine_words(log: str) -> str:
    """The error lines of llama.cpp's output, at most three; without any, its last line."""
    lines = [next(filter(None, match.groups())).strip() for match in _ERROR_LINE.finditer(log)]
    lines = [re.sub(r"\s+", " ", line) for line in dict.fromkeys(lines)] or log.strip().splitlines()[-1:]
    return "; ".join(lines[:3])


def threads() -> int:
    """Physical cores that this process may use: a second thread on a core makes llama.cpp slower.

    No more than ``OMP_NUM_THREADS`` says: beside other work llama.cpp's threads wait for one another at every step.
    """
    allowed = cores()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = max(1, int(asked)) if asked.isdecimal() else allowed
    return min(psutil.cpu_count(logical=False) or allowed, allowed, most)


def apart(wanted: bool) -> dict[str, Any]:
    """How a process is started that Ctrl-C on the terminal does not reach."""
    if os.name == "nt":  # where sessions are passed over
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP if wanted else 0}
    return {"start_new_session": wanted}


def server_command(server: str, gguf: Path, context: int, talking: bool, projector: Path | None) -> list[str]:
    """The command of a ``llama-server`` on a free port, which is its last word; see ``engine.Engine``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [server, "--model", str(gguf), "--ctx-size", str(context), "--parallel", "1", "--threads", str(threads()),
            # A check is to compute as this machine's CPU does; a person wants an answer from whatever is fastest.
            *(["--swa-full"] if talking else ["--n-gpu-layers", "0"]),
            *(["--mmproj", str(projector), "--no-mmproj-offload"] if projector else []),
            "--no-warmup", "--jinja", "--host", "127.0.0.1", "--port", str(port)]


def same_file(props: Mapping[str, Any], gguf: Path) -> bool:
    """Whether a server has loaded the file, by what it says of itself."""
    return Path(props.get("model_path", "")).name == gguf.name


def child_command(gguf: Path, context: int, talking: bool, projector: Path | None) -> list[str]:
    """The command of a process of our own, which runs :func:`serve`."""
    return [sys.executable, "-m", "gemma_tune.gguf.llama_cpp", str(gguf), str(context), str(int(talking)),
            *([str(projector)] if projector else [])]


def serve(gguf: str, context: int, talking: bool, projector: str = "") -> None:
    """Load a file with xllamacpp, print the address as JSON, and serve until standard input is closed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = threads()
    # A sliding window that keeps what lies behind it can be cut back, as after /undo, without reading all anew.
    params.swa_full = talking
    params.warmup, params.cache_ram_mib, params.verbosity = False, 0, ERRORS_ONLY
    if projector:
        params.mmproj.path, params.mmproj_use_gpu = projector, False
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", *sys.argv[4:])
