"""``merge``: the adapter goes into the 16-bit base, tensor by tensor, and the result is checked against base + adapter.

``lora.files`` says what an adapter holds, ``plan`` what each tensor is made of, ``weights`` computes and writes,
``check`` compares.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import new_directory
from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import counted, size_in_bytes
from gemma_tune.encoding.tokenizer import load_format, load_tokenizer
from gemma_tune.lora.config import require_folder
from gemma_tune.lora.files import Adapter, read_adapter
from gemma_tune.merge.base import INPUT, with_base
from gemma_tune.merge.card import model_card
from gemma_tune.merge.check import check
from gemma_tune.merge.plan import MergePlan, plan_merge
from gemma_tune.merge.weights import lay_out, require_space, write_files
from gemma_tune.models.licence import LICENCE_FILES, base_licence, licence_notice
from gemma_tune.models.source import BaseModel
from gemma_tune.models.whole import refuse_rotten
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, run_stage
from gemma_tune.run.state import OUTSIDE, require_unharmed

if TYPE_CHECKING:
    from gemma_tune.encoding.chat_format import ChatFormat

# Copied beside the weights: from the base always, and from the adapter, which trained with them, or else the base.
_OF_BASE = ("tokenizer.model", "*processor_config.json", *LICENCE_FILES)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.*", "merges.txt")
_TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
_TYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}


def merge(session: Session) -> StageReport:
    """Merge and check, and push to the Hub where that is asked for.

    Raises:
        UserError: no adapter, an adapter of another base model or of a kind that is not merged here, a base that is
            damaged or quantised; a repository that cannot be pushed to.
        WorkFailed: no room on the disk, or the merged model does not answer as base + adapter does. Nothing is
            replaced then.
    """
    session.require("merge")
    session, elsewhere = _with_adapter(session)
    session = with_base(session)
    config = session.config
    if config.push:
        from gemma_tune.merge.push import check_push, push_folder

        check_push(config.push, private=config.private)
    into = {INPUT: session.base.origin} if session.base and session.base.origin else None
    report = run_stage(session, "merge", _merge, into, elsewhere=elsewhere)
    if config.push:
        if report.status == "up-to-date":  # made long ago, perhaps
            manifest = read_manifest(session.run.root) or session.manifest
            require_unharmed(session.run, manifest, "merge --push", "merge", "merged")
        address = push_folder(session.run.merged, config.push, session.listener, private=config.private)
        report = replace(report, summary=report.summary | {"pushed": address})
    return report


def _with_adapter(session: Session) -> tuple[Session, dict[str, Path]]:
    """The session with its adapter's path as the manifest keeps it, and the adapter if no training of the run made it.

    A run that was begun by ``merge --adapter`` keeps to that adapter.
    """
    stages, named = session.manifest.stages, session.config.adapter
    before = stages.get("merge", {"inputs": {}})["inputs"].get(f"{OUTSIDE}adapter")
    if not named and before and "train" not in stages:
        named = session.run.found(before["path"])
        session.listener.note(f"adapter: {named}, as before")
    if not named:
        if before:
            session.listener.warn(f"this run's own adapter is merged, in place of {session.run.found(before['path'])}; "
                                  f"--adapter names that one again")
        return session, {}
    path = Path(os.path.expanduser(named))
    require_folder(path)
    config = replace(session.config, adapter=session.run.relative(path))
    return replace(session, resolved=replace(session.resolved, config=config)), {"adapter": path}


def _merge(session: Session) -> Finished:
    session = replace(session, model=session.base or session.model)
    run, config, listener = session.run, session.config, session.listener
    base = session.model.path
    refuse_rotten(base, session.model.files)
    adapter = read_adapter(session.inputs["adapter"])
    if not session.base:  # which was compared already
        _compare_bases(session, adapter)
    dtype = _TYPES[config.dtype][0] if config.dtype else None
    tensors = open_tensors(base)
    plan = plan_merge(tensors, adapter, dtype)
    _compare_vocabularies(session, adapter, plan)
    layout = lay_out(plan, base, size_in_bytes(config.max_shard_size) if config.max_shard_size else None)
    require_space(plan.bytes, run.root)
    if len(plan.pieces) > len(tensors):
        listener.note("the adapter changes embedding and output layer apart from each other: they become two tensors")
    if config.dtype == "fp16" and session.model.config["model_type"].startswith("gemma"):
        listener.warn("Gemma's activations can be too large for fp16: where the merged model is loaded, give "
                      "dtype=bfloat16 or float32")
    with new_directory(run.merged) as folder:
        _copy_around(session, folder, plan)
        chat = _chat_format(session, folder) if config.check else None
        listener.note(f"adding the adapter to {counted(plan.changed, 'tensor')} of {session.model.name}, in fp32")
        write_files(layout, folder, listener.progress)
        summary = {"merged_tensors": plan.changed, "tensors": len(plan.pieces)}
        if chat:
            summary |= check(session, folder, chat, adapter, plan.vocabulary)
        (folder / "README.md").write_text(model_card(session, summary), encoding="utf-8")
        summary["bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return Finished({"merged": run.merged}, summary, {run.merged: folder})


def _compare_bases(session: Session, adapter: Adapter) -> None:
    """Whether an adapter was trained on the run's model, as far as names tell; shapes are compared later.

    Raises:
        UserError: this run's own adapter was trained on another model.
    """
    model, trained_on = session.model, adapter.base_id
    if model.source != "hub":
        if session.config.adapter and not _is_named(trained_on, model):
            session.listener.warn(f"the adapter {adapter.folder} was trained on {trained_on}; it is merged into "
                                  f"{model.id} in {session.model.path}")
        return
    if trained_on != model.id:
        says = f"the adapter {adapter.folder} was trained on {trained_on}"
        if not session.config.adapter:
            raise UserError(f"{says}, this run's model is {model.id}", "merge it in the run of its own base model")
        session.listener.warn(f"{says}; it is merged into {model.id}")
        return
    revision = adapter.config.get("revision")
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and revision != model.revision:
        session.listener.warn(f"the adapter was trained on commit {revision} of {model.id}, and is merged into "
                              f"{model.revision}; for the former: --revision {revision}")


def _is_named(trained_on: Any, model: BaseModel) -> bool:
    """Whether what an adapter says of its base can be this local one: it was called so, or lay elsewhere."""
    if not isinstance(trained_on, str) or trained_on in ("", model.id):
        return True
    there = os.path.expanduser(trained_on)
    return Path(there).name == model.id or os.path.isdir(there) and os.path.samefile(there, model.path)


def _compare_vocabularies(session: Session, adapter: Adapter, plan: MergePlan) -> None:
    """Whether each token of an adapter from elsewhere has an embedding; a vocabulary that changed is told of.

    Gemma's own tokenizers have entries that its text models do without, so a tokenizer may hold what the base's does.

    Raises:
        UserError: its tokenizer has tokens whose embeddings were not saved with it.
    """
    if not session.config.adapter:
        return
    base, own = session.model.path, _has_tokenizer(adapter.folder)
    if own and plan.entries and (tokens := len(load_tokenizer(adapter.folder))) > plan.entries and (
            _has_tokenizer(base)) and tokens > (known := len(load_tokenizer(base))):
        raise UserError(f"the tokenizer in {adapter.folder} has {tokens - known:,} tokens more than the base's, and "
                        "the adapter does not hold their embeddings",
                        "save it again where it was trained: save_pretrained(DIR, save_embedding_layers=True)")
    if plan.vocabulary:
        session.listener.note(f"the adapter was trained with a vocabulary of {plan.vocabulary:,} entries, where the "
                              f"base has {plan.base_entries:,}: the merged model has the adapter's")
        if not own:
            session.listener.warn(f"{adapter.folder} has no tokenizer, so the base's is used, which knows no token "
                                  "that was added; copy there the one that was saved with the trained model")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _chat_format(session: Session, folder: Path) -> ChatFormat:
    """What the check asks with; looked for before the weights are written, which can take long.

    Raises:
        UserError: there is no usable tokenizer, or no chat template.
    """
    try:
        return load_format(folder, session.model.config["model_type"])
    except UserError as e:
        raise UserError(f"the merged model could not be asked anything: {e.message}",
                        f"{e.hint}; or merge without the comparison: --no-check") from e


def _copy_around(session: Session, folder: Path, plan: MergePlan) -> None:
    """Configuration and licence of the base; tokenizer, chat template and generation settings of the training."""
    base, adapter = session.model.path, session.inputs["adapter"]
    trained_tokenizer = _has_tokenizer(adapter)
    # A tokenizer comes with its chat template, in its own file or in tokenizer_config.json: never two of them.
    own_template = trained_tokenizer or any(adapter.glob("chat_template*"))
    _copy(base, folder, (*_OF_BASE, "generation_config.json", *(() if trained_tokenizer else _TOKENIZER),
                         *(() if own_template else _TEMPLATES)))
    _copy(adapter, folder, ("generation_config.json", *_TEMPLATES, *(_TOKENIZER if trained_tokenizer else ())))
    names = session.settings_of("prepare").get("new_tokens", ())
    rows = {i for piece in plan.pieces if piece.rows for i in piece.rows[0]}
    if names or rows:
        from gemma_tune.gguf.vocabulary.sentencepiece import name_pieces

        name_pieces(folder, names, rows)
    if (notice := licence_notice(base_licence(session.model))) and not any(folder.glob("NOTICE*")):
        (folder / "NOTICE").write_text(notice, encoding="utf-8")
    config = read_config(base)
    changed = _configured(config, session.config.dtype, plan.untied, plan.vocabulary)
    if changed == config:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file():
            place = folder / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def _configured(config: Mapping[str, Any], dtype: str | None, untied: bool, vocabulary: int | None,
                ) -> dict[str, Any]:
    """config.json of the merged model: the base's, with what the merge has changed; of a text part's as well."""
    changed: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if vocabulary and ("vocab_size" in config or "text_config" not in config):
        changed["vocab_size"] = vocabulary
    if dtype:
        # Older versions of transformers call it torch_dtype.
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        changed |= dict.fromkeys(names, _TYPES[dtype][1])
    parts = {name: _configured(part, dtype if {"dtype", "torch_dtype"} & part.keys() else None,
                               untied and name == "text_config", vocabulary if name == "text_config" else None)
             for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)}
    return {**config, **parts, **changed}
