"""What several stages are told alike: limits of numbers, the type to compute in, where a result is pushed."""

from __future__ import annotations

from typing import Any

from gemma_tune.config.settings import option

DTYPES = ("auto", "bf16", "fp32", "fp16")
# Limits of what is worked through one by one, or given memory for: far beyond what anybody needs.
MOST_ROWS, MOST_TOKENS, MOST_PROCESSES, MOST_EPOCHS = 1 << 16, 1 << 24, 4096, 100_000.0
LARGEST_SEED = 2**32 - 1  # what NumPy's generator takes, which a training seeds as well


def dtype_option() -> Any:
    """The compute type, which every stage that runs a model takes."""
    return option("auto", "Compute type of the base model; `auto` takes bf16 where the device has instructions for it, "
                          "else fp32, and never fp16. On a CPU without them bf16 is the type of the weights "
                          "alone, which `auto` takes where fp32 does not fit.", choices=DTYPES, group="speed")


def push_option(what: str) -> Any:
    """The repository at the Hub, which every stage that publishes takes."""
    return option(None, f"Push {what} to the Hugging Face Hub, to this repository (account/name), with a model card.",
                  same_result=True, auto="stay here")


def private_option() -> Any:
    """Who sees it there."""
    return option(True, "Whether a repository that is created at the Hub is private.", same_result=True)
