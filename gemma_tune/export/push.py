"""The exported files go to the Hugging Face Hub, laid out as Ollama and llama.cpp look for them there.

For ``ollama run hf.co/account/name:Q8_0`` the Hub takes the GGUF whose name has that number format in it, and what the
files ``template``, ``system`` and ``params`` say in place of what it would guess; a file that begins with ``mmproj``
comes along, there as in llama.cpp. A Modelfile is not read, so that a
renderer of Ollama's own cannot be named (https://huggingface.co/docs/hub/ollama, ollama#7307, ollama#17636). Of a name
the Hub goes by the last number format, llama.cpp by any (huggingface.js, ``gguf.ts``; its ``common/download.cpp``).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune import __version__
from gemma_tune.config.stages import QUANTS
from gemma_tune.export.card import Listed, card_of
from gemma_tune.export.files import ExportSource
from gemma_tune.export.target import Target, shortened
from gemma_tune.gguf.types import FILE_TYPES
from gemma_tune.hub import push as hub
from gemma_tune.hub.push import Parcel, names_in
from gemma_tune.models.licence import LICENCE_FILES
from gemma_tune.ollama.modelfile import merged_parameters, render_modelfile, system_text
from gemma_tune.run.earlier_exports import still_good
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport
from gemma_tune.run.state import require_unharmed

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_MAKE, _STAGE = "gemma-tune export-ollama", "export-ollama"
_OF_OLLAMA = ("template", "system", "params")
_FORMATS = {quant: FILE_TYPES[quant].name.removeprefix("MOSTLY_").removeprefix("ALL_") for quant in QUANTS}
_FORMAT_IN_NAME = re.compile(rf"[-._]({'|'.join({*QUANTS, *_FORMATS.values()})})(?![a-z0-9_])", re.IGNORECASE)
# A number format or a size of file, which 7B is none of.
_OWN_ENDING = re.compile(rf"-({'|'.join(_FORMATS.values())}|[0-9.]+[KMGT]I?B|[0-9.]{{4,}}B)\.gguf")


def check_push(repo_id: str, model_name: str, *, private: bool = False) -> None:
    """Whether :func:`push_export` could push to ``repo_id``, see :func:`hub.push.check_push`."""
    hub.check_push(repo_id, _MAKE, partial(_unfit, _bare(model_name)), private=private)


def push_export(session: Session, stage: StageReport, source: ExportSource) -> str:
    """Upload the GGUF files of an export with what Ollama is told of them, see :func:`hub.push.push`.

    Files of earlier pushes stay if the run has them still and they are what an export would make now; else they leave,
    as what Ollama is told would be said of them as well.

    Returns:
        The commit's address.

    Raises:
        HubError: refused, or broken off; the same call continues where it stopped.
        UserError: a file was changed since the export.
    """
    config, manifest = session.config, read_manifest(session.run.root) or session.manifest
    for name in stage.artifacts:
        if name.startswith("gguf") or name == "projector":  # made long ago, perhaps
            require_unharmed(session.run, manifest, f"{_STAGE} --push", _STAGE, name)
    _say(session, source.target)
    with tempfile.TemporaryDirectory() as place:
        parcel = _parcel(session, stage, source, Path(place))
        session.listener.note(f"for the Hub: {', '.join(sorted(parcel.files))}, and a model card")
        return hub.push(parcel, config.push, session.listener, private=config.private)


def _parcel(session: Session, stage: StageReport, source: ExportSource, folder: Path) -> Parcel:
    """What is pushed; what stands beside the GGUF files is written into ``folder``."""
    run, quants = session.run, stage.summary["quants"]
    seen, sight = projector_there(run.model_name), stage.summary.get("projector")
    path = stage.artifacts.get("projector") if sight else None
    names = {quant: name_there(run.model_name, quant) for quant in quants}
    good = {name_there(run.model_name, quant): (quant, item)
            for quant, item in still_good(stage.summary.get("earlier", {})).items()}
    bare, to_take = _bare(run.model_name), names[stage.summary["quant"]]

    def kept(info: ModelInfo) -> dict[str, Listed]:
        there = {one.rfilename: one.lfs.sha256 for one in info.siblings or () if one.lfs}
        return {name: Listed(name, _FORMATS.get(quant), item["bytes"]) for name, (quant, item) in good.items()
                if item.get("sha256") and there.get(name) == item["sha256"]}

    def outdated(info: ModelInfo) -> list[str]:
        stay = kept(info).keys()
        return [name for name in names_in(info)
                if name in (*_OF_OLLAMA, seen) or _is_own(bare, name) and name not in stay]

    def card(info: ModelInfo) -> str:
        files = [Listed(names[quant], _FORMATS.get(quant), item["bytes"]) for quant, item in quants.items()]
        sees = Listed(seen, None, sight["bytes"]) if path else None
        return card_of(info.id, source.merged, [*files, *kept(info).values()], to_take, stage.summary, source.target,
                       sees)

    files = {names[quant]: run.ollama / item["file"] for quant, item in quants.items()}
    files |= {seen: Path(path)} if path else {}
    licences = {path.name: path for pattern in LICENCE_FILES for path in source.merged.glob(pattern) if path.is_file()}
    beside = dict(_beside(source.target, folder, to_take, session.model.id, seen if path else None))
    return Parcel(_MAKE, f"Model exported by gemma-tune {__version__}", {**licences, **beside, **files},
                  partial(_unfit, bare), outdated, card)


def name_there(model_name: str, quant: str) -> str:
    """What the file of a number format, or of a size, is called in a repository.

    >>> name_there("gemma-3-270m-it-q4_k_m", "q8_0"), name_there("a", "mxfp4"), name_there("a", "250mb")
    ('gemma-3-270m-it-Q8_0.gguf', 'a-MXFP4_MOE.gguf', 'a-250MB.gguf')
    """
    return f"{_bare(model_name)}-{_FORMATS.get(quant, quant.upper())}.gguf"


def projector_there(model_name: str) -> str:
    """What the file that the model sees with is called in a repository, where programs go by the beginning of its name.

    >>> projector_there("gemma-3-4b-it")
    'mmproj-gemma-3-4b-it-F16.gguf'
    """
    return f"mmproj-{_bare(model_name)}-F16.gguf"


def _bare(model_name: str) -> str:
    """A model's name without the number format that its base came in, which would be taken for that of the file."""
    return _FORMAT_IN_NAME.sub("", model_name) or "model"


def _is_own(bare: str, name: str) -> bool:
    """Whether a file of a repository is called as one that was pushed from a run of this model."""
    return name.startswith(bare) and _OWN_ENDING.fullmatch(name, len(bare)) is not None


def _unfit(bare: str, info: ModelInfo) -> str | None:
    names = {name for name in names_in(info) if "/" not in name}
    if any(name.endswith(".safetensors") or name == "adapter_config.json" for name in names):
        return "holds a checkpoint or an adapter, whose model card that of the GGUF files would replace"
    others = sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name
                    and not _is_own(bare, name))
    if others:
        return f"holds GGUF files of another model ({others[0]}), which could be taken for this one's"
    return None


def _say(session: Session, target: Target) -> None:
    if system := system_text(target.chat, target.system):
        session.listener.note(f"the system prompt is published, too: {shortened(system)}")
    if target.chat.template is None:
        session.listener.warn(f"Ollama lays out prompts of {session.model.id} by its renderer {target.chat.renderer}, "
                              "which a repository at the Hub cannot name: whoever runs it as hf.co/… gets the layout "
                              "that the Hub chooses; the model card says how to create it with the Modelfile")


def _beside(target: Target, folder: Path, gguf: str, model_id: str,
            projector: str | None) -> Iterator[tuple[str, Path]]:
    """What stands beside the GGUF files, written into ``folder``: what a Modelfile says of them.

    Args:
        gguf, projector: what the file to take, and the one that it sees with, are called in the repository.
    """
    chat = target.chat
    texts = {"template": chat.template, "system": system_text(chat, target.system),
             "params": json.dumps(merged_parameters(chat, target.parameters), indent=2, ensure_ascii=False),
             "Modelfile": render_modelfile(gguf, chat, parameters=target.parameters, system=target.system,
                                           license_text=target.license, projector_name=projector, comment_lines=[
                                               f"{model_id}, fine-tuned with gemma-tune",
                                               f"ollama create {target.name} -f Modelfile"])}
    for name, text in texts.items():
        if text is not None:
            path = folder / name
            path.write_text(text, encoding="utf-8", newline="")
            yield name, path
