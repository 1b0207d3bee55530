"""``merge``: the adapter goes into the 16-bit base, tensor by tensor, and the result is checked against base + adapter.

LoRA: W' = W + s (B A) with s = alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1), or with
s = alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). DoRA gives each row of W' the length
m that was learned for it: m W' / ||W'|| (Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5). Computed in
fp32 and rounded once to the type of W on disk. Tensors without an adapter are copied as they are, under the names and
in the shards of the base.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import samples
from gemma_tune.chat_format import ChatFormat, FormatError
from gemma_tune.errors import UserError, WorkFailed
from gemma_tune.files import replacing_directory
from gemma_tune.generation import greedy_continuations
from gemma_tune.models import add_adapter, choose_placement, load_format, load_model
from gemma_tune.prompts import Prompt, read_prompts
from gemma_tune.stage import Finished, Session, StageReport, run_stage

if TYPE_CHECKING:
    import torch

# Copied from the base beside the weights; tokenizer and chat template come from the adapter, which trained with them.
_COPIED = ("config.json", "tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")
_PREFIX = "base_model.model."
# Settings of PEFT's LoRA that change what an adapter computes, none of which `train` has.
_OTHER_KINDS = ("lora_bias", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "target_parameters",
                "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
                "use_bdlora", "use_qalora")
# The merged weights are rounded to 16 bits once more than base + adapter. Measured on Gemma 3 270M that moves
# a token's distribution by about 1e-4 nats; a wrong merge moves it by whole nats.
MAX_DIVERGENCE = 0.02
LARGEST_FP32_CHECK = 3_000_000_000  # bytes of 16-bit weights up to which the check computes in fp32
CHECK_TOKENS = 64  # longest answer of the check
CHECK_ROWS = 100  # prepared rows of each side that are looked at for its prompt


def merge(session: Session) -> StageReport:
    """Merge and check.

    Raises:
        UserError: no adapter, an adapter of another base model or of a kind that is not merged here.
        WorkFailed: the merged model does not answer as base + adapter does; nothing is replaced then.
    """
    return run_stage(session, "merge", _merge)


@dataclass(frozen=True)
class Lora:
    """One layer's adapter: ``a`` (r, in), ``b`` (out, r), fp32, the scale s, and with DoRA ``magnitude`` (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """The change of the weight, (out, in), fp32."""
        return (self.b @ self.a) * self.scale

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) with the adapter in it, fp32."""
        import torch

        changed = weight.float() + self.delta()
        if self.magnitude is None:
            return changed
        return (self.magnitude / torch.linalg.norm(changed, dim=1)).view(-1, 1) * changed


def _merge(session: Session) -> Finished:
    adapter = session.inputs["adapter"]
    layers = read_adapter(adapter, session.model.id if session.model.source == "hub" else None)
    with replacing_directory(session.run.merged) as folder:
        session.listener.note(f"adding {len(layers)} adapted layers to {session.model.name}, in fp32")
        count = merge_weights(session.model.path, layers, folder, session.listener.progress)
        _copy_around(session, folder)
        summary = {"merged_tensors": len(layers), "tensors": count}
        if session.config.check:
            summary |= check(session, folder)
        summary["bytes"] = sum(p.stat().st_size for p in folder.iterdir())
    return Finished({"merged": session.run.merged}, summary)


def read_adapter(adapter: Path, hub_id: str | None = None) -> dict[str, Lora]:
    """Adapted layers by the base's module name.

    Raises:
        UserError: damaged, trained on another base model, or of a kind whose merge is not implemented.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"the adapter {adapter} cannot be read: {e}", "train again: gemma-tune train --force") from e
    if hub_id and config.get("base_model_name_or_path") != hub_id:
        raise UserError(f"the adapter {adapter} was trained on {config.get('base_model_name_or_path')}, "
                        f"this run's model is {hub_id}", "merge it in the run of its own base model")
    _refuse_other_kinds(adapter, config)
    layers, rest = {}, dict(tensors)
    parts = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else [])]
    for module in [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]:
        if lost := [part for part in parts if f"{module}.{part}" not in rest]:
            raise UserError(f"{adapter} lacks {module}.{lost[0]}", "train again: gemma-tune train --force")
        a, b, *magnitude = (rest.pop(f"{module}.{part}").float() for part in parts)
        name = module.removeprefix(_PREFIX)
        layers[name] = Lora(a, b, _scale(config, name, a.shape[0]), *magnitude)
    if rest or not layers:
        raise UserError(f"{adapter} holds tensors that merge does not know" if rest else f"{adapter} adapts no layer",
                        "train it again with gemma-tune", sorted(rest)[:20])
    return layers


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a layer; PEFT's ``alpha_pattern`` gives some layers an alpha of their own, by the ends of their names."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refuse_other_kinds(adapter: Path, config: Mapping[str, Any]) -> None:
    expected = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(_OTHER_KINDS)
    other = [f"{k}: {config[k]!r}" for k, v in expected.items() if config.get(k) and config[k] != v]
    if other:
        raise UserError(f"{adapter} is a kind of adapter that gemma-tune does not merge",
                        "merge it with PEFT's merge_and_unload", other)


def merge_weights(base: Path, layers: Mapping[str, Lora], out: Path, progress: Any) -> int:
    """Write the base's shards with the adapter added; returns the number of tensors.

    One shard is in memory at a time.

    Raises:
        UserError: an adapted layer that the base does not have or whose shape differs, all of them together.
        WorkFailed: a merged tensor that is not finite in its type.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = weight_files(base)
    todo = dict(layers)
    total = 0
    for n, shard in enumerate(shards):
        progress("merging", n, len(shards))
        tensors = {}
        with safe_open(shard, framework="pt") as f, torch.inference_mode():
            for name in f.keys():
                tensor = f.get_tensor(name)
                layer = todo.pop(module_name(name), None)
                tensors[name] = tensor if layer is None else _added(name, tensor, layer)
            save_file(tensors, out / shard.name, metadata={"format": "pt"})
        total += len(tensors)
    if todo:
        raise UserError(f"{len(todo)} adapted layers are not in {base}: the adapter belongs to another model",
                        "merge it in the run of its own base model", sorted(todo)[:20])
    if (index := base / "model.safetensors.index.json").exists():
        shutil.copyfile(index, out / index.name)
    progress("merging", len(shards), len(shards))
    return total


def module_name(tensor: str) -> str:
    """The module that a tensor on disk belongs to, as the running model calls it.

    Multimodal Gemma 3 repositories store ``language_model.model.layers…`` for ``model.language_model.layers…``.
    """
    module = tensor.removesuffix(".weight")
    stored = "language_model.model."
    return f"model.language_model.{module.removeprefix(stored)}" if module.startswith(stored) else module


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, by its index where there is one.

    Raises:
        UserError: a shard is missing, or there are no weights.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(p.name for p in checkpoint.glob("*.safetensors"))
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing or not names:
        raise UserError(f"{checkpoint} lacks weights: {', '.join(missing) or 'no *.safetensors file'}",
                        "download the model again")
    return [checkpoint / name for name in names]


def _added(name: str, weight: torch.Tensor, layer: Lora) -> torch.Tensor:
    import torch

    shape = (layer.b.shape[0], layer.a.shape[1])
    if shape != weight.shape:
        raise UserError(f"{name} has the shape {tuple(weight.shape)} in the base, {shape} in the adapter",
                        "the adapter belongs to another model: merge it in its own run")
    merged = layer.merged(weight).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise WorkFailed(f"{name} is not finite after merging", "train again with a lower --learning-rate")
    return merged


def _copy_around(session: Session, folder: Path) -> None:
    """Config, licence and tokenizer.model of the base; tokenizer, chat template and generation settings of training."""
    for pattern in _COPIED:
        for path in session.model.path.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    adapter = session.inputs["adapter"]
    for path in adapter.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)
    base = session.model
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\nbase_model: {base.id}\ntags: [sft, gemma-tune]\n---\n\n"
        f"# {base.name}, fine-tuned\n\nMerged by gemma-tune from {base.id} and a LoRA adapter.\n", encoding="utf-8")


def check(session: Session, merged: Path) -> dict[str, Any]:
    """Compare the merged model with base + adapter on a held-out prompt.

    The adapter's own greedy answer is the yardstick: both models read it, and their next-token distributions are
    compared at every position.

    Raises:
        WorkFailed: mean divergence above ``MAX_DIVERGENCE`` nats.
    """
    chat = load_format(session.inputs["adapter"], session.model.config["model_type"])
    # In fp32 what is left to differ is the rounding of the merged weights; a large model would not fit twice as wide.
    small = sum(p.stat().st_size for p in weight_files(merged)) < LARGEST_FP32_CHECK
    placement = choose_placement("fp32" if small else "auto")
    tuned = add_adapter(load_model(session.model.path, placement), session.inputs["adapter"])
    prompt = _prompt_ids(session, chat, tuned.config.get_text_config().max_position_embeddings - CHECK_TOKENS)
    [expected] = greedy_continuations(tuned, chat, [prompt], CHECK_TOKENS)
    ids = prompt + chat.tokenizer(expected.text, add_special_tokens=False).input_ids
    before = _log_probabilities(tuned, ids, expected.tokens)
    del tuned
    gc.collect()
    model = load_model(merged, placement)
    [answer] = greedy_continuations(model, chat, [prompt], CHECK_TOKENS)
    after = _log_probabilities(model, ids, expected.tokens)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    likeliest = before.argmax(1, keepdim=True)
    figures = {"check_same_answer": answer.text == expected.text, "check_answer_tokens": expected.tokens,
               "check_divergence": divergence,
               "check_max_logprob_difference": (before - after).gather(1, likeliest).abs().max().item()}
    if not divergence <= MAX_DIVERGENCE:
        raise WorkFailed(f"the merged model differs from base + adapter by {divergence:.3g} nats per token "
                         f"(at most {MAX_DIVERGENCE} expected); it was not kept",
                         "please report this; meanwhile use the adapter itself")
    if not figures["check_same_answer"]:
        session.listener.warn("the merged model's greedy answer differs in wording from base + adapter's, although "
                              f"the distributions agree ({divergence:.2g} nats per token)")
    return figures


def _prompt_ids(session: Session, chat: ChatFormat, room: int) -> list[int]:
    """Ids of the first prompt of the run's data, held-out rows first, that leaves room for an answer."""
    limit = min(room, session.settings_of("prepare").get("max_length", room))
    for prompt in itertools.chain(_first_prompts(session.run.valid_rows), _first_prompts(session.run.train_rows)):
        try:
            if fitted := prompt.fitted(chat, limit):
                return fitted.ids(chat)
        except FormatError:  # the data was prepared again, for another template
            continue
    return Prompt(samples.heldout_questions()[0]["messages"]).ids(chat)


def _first_prompts(path: Path) -> Iterator[Prompt]:
    return itertools.islice(read_prompts(path), CHECK_ROWS) if path.exists() else iter(())


def _log_probabilities(model: Any, ids: list[int], answer_tokens: int) -> torch.Tensor:
    """fp32 log-probabilities (answer_tokens + 1, vocabulary) from the prompt's last position on."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=answer_tokens + 1).logits[0]
    return torch.log_softmax(logits.float(), -1).cpu()
