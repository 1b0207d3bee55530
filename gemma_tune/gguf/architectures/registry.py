"""Model architectures as GGUF knows them: which tensors there are, under which names, with which metadata.

An architecture is made from a checkpoint's ``config.json`` alone. What llama.cpp would load and then compute
differently is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.gguf.architectures.parts import Architecture, Maker, not_written_here


def architecture_of(config: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that ``config``, the content of the file ``path``, describes.

    Raises:
        UserError: one that cannot be written, or settings that llama.cpp cannot express, all together.
    """
    from gemma_tune.gguf.architectures import gemma, gemma3n, gemma4, gpt_oss, lfm2, llama, minicpm3, phi3, qwen35

    makers: dict[str, Maker] = {**gemma.MAKERS, **gemma3n.MAKERS, **gemma4.MAKERS, **llama.MAKERS, **phi3.MAKERS,
                                **qwen35.MAKERS, **lfm2.MAKERS, **minicpm3.MAKERS, **gpt_oss.MAKERS}
    maker = makers.get(config.get("model_type", ""))
    if maker is None:
        found = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "none"
        raise not_written_here(path, f"the architecture {found}")
    return maker(config, path)
