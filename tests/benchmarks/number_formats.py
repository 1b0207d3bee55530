"""What number formats of a run's merged model lose: as ``llama-quantize`` rounds, with and without an importance matrix,
and as ``export-ollama`` does.

All three write the same formats from the same checkpoint; the importance matrix is computed on the very rows that ours is
calibrated by, and goes into ggml's own functions with llama.cpp's mix of types, which is what ``llama-quantize --imatrix``
does. Each file is measured on validation rows and on general text. Run it from the repository on a run that is merged:
``python tests/benchmarks/number_formats.py runs/demo --formats q4_0,q4_k_m``; ``--sizes 200MB,250MB`` adds the best mixes for
sizes, ``--no-measure`` measures time and memory alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tune.base.listener import Listener
from gemma_tune.export.calibration import Calibration, calibration_of
from gemma_tune.export.files import load_merged, source_of
from gemma_tune.export.mixes import Mixes
from gemma_tune.export.quant_loss import GENERAL, REFERENCE, VALIDATION, measure, validation_rows
from gemma_tune.gguf.compensated import Inputs, InputsOfExperts, Rounding
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.measure.general import measuring_rows_of
from gemma_tune.measure.likelihood import wanted_of
from gemma_tune.run.session import open_session


class _ImportanceOfExperts:
    """The same of experts."""

    def __init__(self, inputs: InputsOfExperts):
        self._inputs, self.device = inputs, inputs.device

    def of(self, expert: int) -> Inputs:
        return dataclasses.replace(self._inputs.of(expert), factors=None)


def importance_of(calibration: Calibration) -> Callable[[str], Inputs | InputsOfExperts | None]:
    """What an importance matrix knows of the same inputs."""

    def inputs(source: str) -> Inputs | InputsOfExperts | None:
        found = calibration.inputs(source)
        if found is None or isinstance(found, Inputs):
            return found and dataclasses.replace(found, factors=None)
        return _ImportanceOfExperts(found)

    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--formats", default="q8_0,q6_k,q5_k_m,q4_k_m,q4_0")
    parser.add_argument("--sizes", default="")
    parser.add_argument("--ways", default="plain,importance,ours")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    chosen = parser.parse_args()
    session = open_session("export-ollama", chosen.run)
    session = dataclasses.replace(session, inputs={"merged": session.run.merged})
    source = source_of(session)
    formats, sizes = chosen.formats.split(","), [size for size in chosen.sizes.split(",") if size]
    with tempfile.TemporaryDirectory(dir=chosen.run) as folder:
        files: dict[str, Path] = {}
        started = time.perf_counter()
        calibration, said = calibration_of(session, source, formats)
        if calibration is None:
            sys.exit(said)
        mixes = Mixes(source, calibration, Listener(), session.model.source in ("gguf", "demo"))
        mixes.measure([*formats, *sizes])
        print(f"calibrated on {said}: {time.perf_counter() - started:.1f} s to begin with", flush=True)
        for way in chosen.ways.split(","):
            for label in [*formats, *(sizes if way == "ours" else [])]:
                files[f"{label} {way}"] = _write(source, Path(folder) / f"{label}-{way}.gguf", label, way, mixes)
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
        if chosen.measure:
            _show(session, source, files)


def _write(source: Any, path: Path, label: str, way: str, mixes: Mixes) -> Path:
    started = time.perf_counter()
    quant, types = mixes.of(label) if way == "ours" else (label, {})
    inputs = {"plain": None, "importance": importance_of(mixes.calibration), "ours": mixes.calibration.inputs}[way]
    write_gguf(source.merged, path, quant, name=source.name, chat_template=source.template, parts=source.parts,
               eot_token_id=source.chat.terminator_id, rounding=Rounding(inputs) if inputs else None, types=types)
    print(f"{label} {way}: {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s", flush=True)
    return path


def _show(session: Any, source: Any, files: dict[str, Path]) -> None:
    model, lacking = load_merged(source.merged, 0)
    rows, reason = validation_rows(session)
    if model is None or rows is None:
        sys.exit(lacking or reason)
    texts = {VALIDATION: wanted_of(rows, 1000), GENERAL: wanted_of(measuring_rows_of(source.chat))}
    losses = measure(model, texts, files, source.architecture)
    for label in (REFERENCE, *files):
        cells = [f"{of[label].perplexity:8.3f} {of[label].perplexity / of[REFERENCE].perplexity - 1:+8.2%} "
                 f"{of[label].kl:7.4f} {of[label].agreement:6.1%}" for of in losses.values()]
        print(f"{label:24}", " | ".join(cells))
    print(*(f"{text}: {of[REFERENCE].tokens:,} tokens" for text, of in losses.items()), sep="; ")


if __name__ == "__main__":
    main()
