"""The README.md of the merged model: where it comes from, how it was made, how to use it, and under which licence.

It tells what the manifest and the adapter tell, and nothing of the data but counts. Where the adapter was trained
elsewhere, it is silent about the training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.base.errors import UserError
from gemma_tune.base.versions import library_versions
from gemma_tune.base.words import counted, last_name
from gemma_tune.lora.config import usable_config
from gemma_tune.lora.targets import NO_LAYER
from gemma_tune.models.licence import base_licence, licence_note
from gemma_tune.models.towers import auto_class
from gemma_tune.run.manifest import JUDGED, PAIRS
from gemma_tune.run.prepared import rows_with_pictures
from gemma_tune.run.session import Session
from gemma_tune.run.state import prepared_since

_WHERE = "  # the repository, or the folder with these files"
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


def model_card(session: Session, summary: Mapping[str, Any]) -> str:
    """A model card for the Hugging Face Hub, in Markdown with a YAML header.

    Args:
        session: of the merge; ``session.inputs["adapter"]`` is the folder of the adapter that was merged.
        summary: the merge's figures, as the manifest keeps them.
    """
    import yaml

    model, adapter = session.model, _adapter_config(session)
    licence = base_licence(model)
    task = "image-text-to-text" if _learned_pictures(session) else "text-generation"
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if model.source == "hub":
        header |= {"base_model": model.id, "base_model_relation": "finetune"}
    header |= licence | {"tags": ["gemma-tune", _method(session), *_kinds(adapter)]}
    rows = [("Base model", _base(session)), *_training(session, adapter), ("Merge", _merge(summary)),
            ("Versions", _versions())]
    return "\n".join([
        "---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
        f"# {model.name}, fine-tuned", "",
        f"{_code(model.id)} {_changed(adapter)}, for conversations in the chat template that comes with the "
        "tokenizer.", "",
        "## How it was made", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        "## Use", "", _usage(session), "",
        "## Licence", "", licence_note(licence), "",
    ])


def _is_full(adapter: Mapping[str, Any]) -> bool:
    """Whether weights themselves were trained, all of them or some, and no LoRA."""
    return adapter.get("target_modules") == NO_LAYER


def _kinds(adapter: Mapping[str, Any]) -> list[str]:
    return ["full"] if _is_full(adapter) else ["lora"] + ["dora"] * bool(adapter.get("use_dora"))


def _changed(adapter: Mapping[str, Any]) -> str:
    return "with its own weights trained" if _is_full(adapter) else "with a LoRA adapter merged into its weights"


# How each method learns, and what it learns from in a step.
_METHODS = {"sft": ("supervised, on the assistant's turns", "conversation"),
            "dpo": ("preferences, by pairs of a better and a worse answer (DPO)", "pair"),
            "orpo": ("preferences, by pairs of a better and a worse answer (ORPO)", "pair"),
            "kto": ("preferences, by answers that are good or bad (KTO)", "answer"),
            "grpo": ("from rewards of its own answers (GRPO)", "prompt")}


# ---- how it was made -------------------------------------------------------------------------------------------------

def _base(session: Session) -> str:
    model = session.model
    if model.source == "hub":
        return f"[{model.id}](https://huggingface.co/{model.id}/tree/{model.revision}), commit `{model.revision}`"
    kinds = {"local": "a local checkpoint", "gguf": "a GGUF file, dequantised",
             "demo": "Gemma 3 270M, dequantised from Q4_K_M"}
    return f"{_code(model.id)}, {kinds[model.source]}, fingerprint `{model.fingerprint}`"


def _adapter_config(session: Session) -> dict[str, Any]:
    """PEFT's description of the adapter; nothing where it cannot be read, which is the merge's to complain about."""
    try:
        return usable_config(session.inputs["adapter"])
    except (KeyError, UserError):
        return {}


def _training(session: Session, adapter: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of the table that the adapter and, if it was trained in this run, the manifest have something for."""
    record = _record_of_training(session)
    settings = session.settings_of("train") if record else {}
    if adapter.get("r"):
        yield "Adapter", _adapter(adapter, settings, session.manifest.model["id"] if session.base else None)
    if not record:
        yield "Training", "not in this run: the adapter came from elsewhere"
        return
    if rows := _rows(session):
        yield "Data", rows
    if start := settings.get("from_adapter"):
        yield "Began with", f"the adapter {_code(last_name(start))}; what it had learned is in this model, too"
    figures = record["summary"]
    yield "Training", _schedule(settings, figures)
    if _method(session) != "sft":
        if figures.get("eval_accuracy_after") is not None:
            yield "Held-out pairs", f"{figures['eval_accuracy_after']:.0%} won by the chosen answer"
        if None not in (figures.get("eval_reward_before"), figures.get("eval_reward_after")):
            yield ("Reward on held-out prompts", f"{figures['eval_reward_before']:.3f} before training, "
                   f"{figures['eval_reward_after']:.3f} after ({', '.join(map(_code, settings.get('reward') or ()))})")
    elif figures.get("eval_loss_before") is not None and figures.get("eval_loss_after") is not None:
        yield (f"Loss on held-out {_unit(session)}s", f"{figures['eval_loss_before']:.3f} before training, "
               f"{figures['eval_loss_after']:.3f} after (nats per token that is learned)")


def _method(session: Session) -> str:
    """What the adapter was trained by; ``sft`` also of one from elsewhere."""
    return session.settings_of("train").get("method", "sft") if _record_of_training(session) else "sft"


def _record_of_training(session: Session) -> Mapping[str, Any] | None:
    """The manifest's record of the training that made this adapter."""
    record = session.manifest.stages.get("train")
    merged = session.inputs.get("adapter")
    if record is None or merged is None:
        return None
    own = session.run.root / record["outputs"]["adapter"]["path"]
    return record if Path(merged).resolve() == own.resolve() else None


def _adapter(config: Mapping[str, Any], settings: Mapping[str, Any], trained_on: str | None) -> str:
    if _is_full(config):
        words = ["none: full fine-tuning" if settings.get("full") else f"none, but {_whole(config)}"]
    else:
        words = _of_lora(config)
    if settings.get("qlora"):
        words.append("trained on the base in 4 bits (QLoRA)")
    if trained_on:
        words.append(f"trained on {_code(trained_on)}, which is that base, quantised")
    return ", ".join(words)


def _of_lora(config: Mapping[str, Any]) -> list[str]:
    kind = ("rank-stabilised " if config.get("use_rslora") else "") + ("DoRA" if config.get("use_dora") else "LoRA")
    words = [f"{kind} of rank {config['r']}", f"alpha {_number(config['lora_alpha'])}"]
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        words.append("others for some layers")
    if config.get("lora_dropout"):
        words.append(f"dropout {_number(config['lora_dropout'])}")
    if isinstance(config.get("target_modules"), list):
        short = {name.rsplit(".", 1)[-1] for name in config["target_modules"]}
        experts = ["the experts"] if config.get("target_parameters") else []
        words.append("on " + ", ".join([*map(_code, sorted(short)), *experts]))
    if config.get("modules_to_save"):
        words.append(_whole(config))
    return words


def _whole(config: Mapping[str, Any]) -> str:
    return "whole " + ", ".join(map(_code, sorted(config.get("modules_to_save") or ())))


def _rows(session: Session) -> str | None:
    """Counts of the data, unless it was prepared again after the training."""
    prepared = session.manifest.stages.get("prepare")
    if prepared is None or prepared_since(session.manifest):
        return None
    figures = prepared["summary"]
    if not {"train_rows", "valid_rows"} <= figures.keys():
        return None
    what = {PAIRS: "pair of answers", JUDGED: "judged answer"}.get(figures.get("kind"), _unit(session))
    several = "pairs of answers" if what.startswith("pair") else None
    counts = f"{counted(figures['train_rows'], what, several)}, {figures['valid_rows']:,} more held out"
    if seen := _learned_pictures(session):
        counts += f"; {seen:,} of the former with pictures"
    return f"{counts}; {figures['trained_tokens']:,} tokens learned" if "trained_tokens" in figures else counts


def _learned_pictures(session: Session) -> int:
    """How many of the rows that were learned have pictures; 0 where that is not known any more."""
    return rows_with_pictures(session, "train") if (
        _record_of_training(session) and not prepared_since(session.manifest)) else 0


def _unit(session: Session) -> str:
    """What a row of data that is no preference is called."""
    prepared = session.manifest.stages.get("prepare", {"summary": {}})
    return "row" if prepared["summary"].get("text_rows") else "conversation"


def _schedule(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    how, unit = _METHODS.get(settings.get("method", "sft"), _METHODS["sft"])
    words = []
    if figures.get("steps") is not None:
        words.append(counted(figures['steps'], 'step'))
    if figures.get("effective_batch"):
        words.append(f"{counted(figures['effective_batch'], unit)} each")
    if settings.get("epochs") and not settings.get("max_steps"):
        words.append(f"{settings['epochs']:g} epoch{'s' if settings['epochs'] != 1 else ''}")
    if settings.get("learning_rate"):
        words.append(f"learning rate {settings['learning_rate']:g}, {settings.get('schedule', 'constant')}")
    words += [f"{name} {settings[key]:g}" for key, name in (("warmup", "warm-up"), ("weight_decay", "weight decay"))
              if settings.get(key)]
    if figures.get("dtype"):
        words.append(f"in {figures['dtype']}")
    if settings.get("seed") is not None:
        words.append(f"seed {settings['seed']}")
    return f"{how}: {', '.join(words)}"


def _merge(summary: Mapping[str, Any]) -> str:
    tensors = f"{counted(summary['merged_tensors'], 'tensor')}, " if "merged_tensors" in summary else ""
    how = f"{tensors}in fp32, rounded once"
    if "check_divergence" not in summary:
        return f"{how}; not compared with base and adapter"
    found = [f"greedy answers {'' if summary.get('check_same_answer') else 'not '}all the same"]
    if "check_same_tokens" in summary:
        found.append(f"{summary['check_same_tokens']:.2%} of the likeliest tokens the same")
    found.append(f"divergence {summary['check_divergence']:.2g} nats per token")
    if "check_max_logprob_difference" in summary:
        found.append(f"largest difference of a log-probability {summary['check_max_logprob_difference']:.2g}")
    prompts = f" on {counted(summary['check_prompts'], 'prompt')}" if "check_prompts" in summary else ""
    return f"{how}; compared with base and adapter{prompts}: {', '.join(found)}"


def _number(value: Any) -> str:
    """A number as people read it; another file's value may be anything."""
    return f"{value:g}" if isinstance(value, (int, float)) else _code(str(value))


def _versions() -> str:
    installed = library_versions()
    return ", ".join([f"gemma-tune {__version__}", *(f"{name} {installed[name]}" for name in _LIBRARIES
                                                     if name in installed)])


# ---- use -------------------------------------------------------------------------------------------------------------

def card_in_repository(card: str, repo_id: str) -> str:
    """A card whose example loads the model from a repository, wherever it did before."""
    return re.sub(rf'^name = ".*"(?={_WHERE}$)', lambda _: f"name = {json.dumps(repo_id)}", card, count=1, flags=re.M)


def _usage(session: Session) -> str:
    where = getattr(session.config, "push", None) or session.run.merged.name
    kind = auto_class(session.model.config.get("model_type", "")).__name__
    return f"""```python
from transformers import {kind}, AutoTokenizer

name = {json.dumps(where)}{_WHERE}
tokenizer = AutoTokenizer.from_pretrained(name)
model = {kind}.from_pretrained(name, dtype="auto")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

{_sees(session)}\
For Ollama, llama.cpp and LM Studio: `gemma-tune export-ollama`, where this model was made, writes it as GGUF with the
same chat template."""


def _sees(session: Session) -> str:
    return ("It was tuned on pictures as well: `AutoModelForImageTextToText` with `AutoProcessor` takes these.\n\n"
            if _learned_pictures(session) else "")


def _code(text: str) -> str:
    """A name as code within a table's cell; what would end either is left out."""
    return "`" + "".join(c for c in text if c.isprintable() and c not in "`|") + "`"
