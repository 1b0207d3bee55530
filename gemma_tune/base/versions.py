"""Installed versions of the libraries that decide what a stage computes."""

from __future__ import annotations

import functools
import importlib.metadata

# The libraries that decide what a stage computes.
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "jinja2", "safetensors",
             "gguf")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a stage computes."""
    return dict(_installed())


@functools.cache  # each is looked for in all directories that Python imports from
def _installed() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
