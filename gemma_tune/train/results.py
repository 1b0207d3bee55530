"""What a training leaves behind: the adapter as others read it, and the picture of its losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.files import new_directory
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.lora.layers import TOWERS, saved_weights
from gemma_tune.lora.targets import named_layers
from gemma_tune.lora.whole import copies_in
from gemma_tune.run.session import Session

_PREFIX = "base_model.model."
_INNER = re.compile(r"\.(original_module|modules_to_save)\b.*")


def save_adapter(session: Session, model: Any, chat: ChatFormat, place: Path) -> Path:
    """Standard PEFT directory with tokenizer, chat template and generation settings, made beside ``place``.

    Returns:
        Where it lies until it is put in its place.

    Raises:
        WorkFailed: weights that are not finite.
    """
    import torch

    bad = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise WorkFailed(f"{len(bad)} tensors of the trained adapter are not finite ({bad[0]}, …); it was not saved",
                         "train again with a lower --learning-rate, or with --dtype fp32")
    _name_for_others(model, session)
    with new_directory(place) as folder:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False,
                              state_dict=_as_computed_with(model))
        chat.tokenizer.save_pretrained(folder)
        generation = model.get_base_model().generation_config
        generation.eos_token_id = chat.stop_ids
        # Not save_pretrained: it refuses settings that many published models have, such as top_p without do_sample.
        (folder / "generation_config.json").write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
        (folder / "README.md").write_text(_card(session), encoding="utf-8")
    return folder


def _as_computed_with(model: Any) -> dict[str, Any]:
    """What is trained; of modules as a whole the rounded weights, which is what was evaluated."""
    types = {f"{_PREFIX}{name}.": module.whole.dtype for name, (_, module) in copies_in(model).items()}
    return {name: value.to(types.get(name.partition("modules_to_save")[0], value.dtype))
            for name, value in saved_weights(model).items()}


def name_no_place(model: Any, name: str) -> None:
    """What PEFT writes into checkpoints of where the base model lies: its name in their card, else nothing."""
    base = model.get_base_model()
    base.config._name_or_path = base.name_or_path = name
    model.peft_config["default"].base_model_name_or_path = ""


def _card(session: Session) -> str:
    base = session.model
    full = session.config.full
    kind = "full" if full else "lora"
    return (f"---\nlibrary_name: peft\nbase_model: {base.id}\ntags: [{kind}, {session.config.method}, gemma-tune]\n"
            "---\n\n"
            f"# {base.name}: {'all weights, as a PEFT adapter' if full else 'LoRA adapter'}\n\n"
            f"Trained with gemma-tune on {base.id}"
            f"{f' at {base.revision}' if base.revision else ''}; the settings are in the run's manifest.json. "
            "The chat template in this directory is the one used in training.\n")


def _name_for_others(model: Any, session: Session) -> None:
    """adapter_config.json in the form that other programs expect: short layer names, the base model's public id.

    Only at the end: PEFT asks the hub about a base model with a hub id whenever it saves a checkpoint.
    """
    peft_config = model.peft_config["default"]
    names = [name for name, _ in model.get_base_model().named_modules()]
    # Not those of the configuration, which PEFT makes as short as the model here allows: of one with towers, which are
    # not loaded, others would adapt these too.
    chosen = model.base_model.targeted_module_names
    short = {name.rsplit(".", 1)[-1] for name in chosen}
    same = sum(name.rsplit(".", 1)[-1] in short for name in names) == len(chosen)
    # A sorted list: PEFT writes a set in another order each time, and the adapter's fingerprint would change.
    layers = sorted(short if same and not any(map(TOWERS.search, names)) else chosen)
    parameters = _named_parameters(model, peft_config.target_parameters or ())
    peft_config.target_modules, peft_config.target_parameters = named_layers(layers, parameters), parameters or None
    peft_config.modules_to_save = _named_modules(model, names)
    peft_config.base_model_name_or_path = session.model.id
    peft_config.revision = session.model.revision


def _named_modules(model: Any, names: Sequence[str]) -> list[str] | None:
    """Modules that are trained as a whole, by their last names where PEFT finds these alone by them."""
    whole = [*copies_in(model)]
    short = tuple(sorted({name.rsplit(".", 1)[-1] for name in whole}))
    plain = {_INNER.sub("", name) for name in names}
    same = {name for name in plain if name.endswith(short)} == {*whole} and not any(map(TOWERS.search, plain))
    return [*(short if same else sorted(whole))] or None


def _named_parameters(model: Any, adapted: Sequence[str]) -> list[str]:
    """Parameters of experts: ``experts.down_proj`` where those of every layer are adapted, else the whole names, by
    which the adapter is told apart from one on other layers."""
    short = {".".join(name.rsplit(".", 2)[1:]) for name in adapted}
    ends = tuple(f".{name}" for name in short)
    there = (name.replace(".base_layer", "") for name, _ in model.get_base_model().named_parameters())
    return sorted(short if sum(name.endswith(ends) for name in there) == len(adapted) else adapted)


def plot(records: Sequence[dict[str, Any]], path: Path, method: str = "sft") -> None:
    """Training and validation loss over the steps, as a PNG; of a training from rewards these.

    Args:
        method: the loss of preferences has no unit.
    """
    what = "reward" if method == "grpo" else "loss"
    draw(path, [(label, style, [(r["step"], r[name]) for r in records if name in r])
                for name, label, style in ((what, "training", "-"), (f"eval_{what}", "validation", "o--"))],
         "step", "loss (nats per trained token)" if method == "sft" else what)


def draw(path: Path, lines: Sequence[tuple[str, str, Sequence[tuple[Any, Any]]]], along: str, up: str, *,
         logarithmic: bool = False) -> None:
    """Lines as a PNG.

    Args:
        lines: name, matplotlib's style, and points of each; without points it is left out.
        along, up: what the axes are called.
        logarithmic: the axis along, with a tick at each point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))  # without a layout that is found by drawing everything twice
    axes = figure.subplots()
    for label, style, points in lines:
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.5)
    axes.set(xlabel=along, ylabel=up)
    if logarithmic:
        axes.set_xscale("log")
        ticks = sorted({x for _, _, points in lines for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    FigureCanvasAgg(figure).print_png(path)
