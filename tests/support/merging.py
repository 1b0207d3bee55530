"""Merging as ours does it and as PEFT does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def remember(run: Path) -> None:
    """Record the adapter as it is now, as `train` would have."""
    from gemma_tune.base.fingerprints import fingerprint

    manifest = json.loads((run / "manifest.json").read_text())
    entry = manifest["stages"]["train"]["outputs"]["adapter"]
    entry |= fingerprint(run / entry["path"])
    (run / "manifest.json").write_text(json.dumps(manifest))


def merged_tensors(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in (run / "tiny-gemma_lora_merged").glob("*.safetensors") for k, v in load_file(shard).items()}


def peft_merge(tiny: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge in fp32, rounded to the base's type."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), str(adapter))
    return {k: v.to(torch.bfloat16) for k, v in model.merge_and_unload().state_dict().items()}


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    """Merge with our code; returns the plan."""
    from gemma_tune.base.tensors import open_tensors
    from gemma_tune.lora.files import read_adapter
    from gemma_tune.merge.plan import plan_merge
    from gemma_tune.merge.stage import _configured
    from gemma_tune.merge.weights import lay_out, write_files

    out.mkdir()
    plan = plan_merge(open_tensors(base), read_adapter(adapter), options.pop("dtype", None))
    write_files(lay_out(plan, base, **options), out, lambda *_: None)
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(_configured(config, None, plan.untied, plan.vocabulary)))
    return plan
