"""What each stage can be told: one frozen dataclass per stage, read from flags, a YAML file and family defaults.

They are declared in the files beside this one. A field's help text, its limits and its default stand there once;
``cli.options`` builds the command line from them, the YAML reader checks against them, and the manifest records each
value together with where it came from. How that works is in ``settings``.
No heavy import: ``gemma-tune --help`` loads this module.
"""

from __future__ import annotations

from gemma_tune.config.answering import ChatConfig, EvalConfig, SamplingConfig
from gemma_tune.config.preparation import PrepareConfig
from gemma_tune.config.results import QUANTS, ExportConfig, MergeConfig
from gemma_tune.config.settings import StageConfig
from gemma_tune.config.shared import MOST_TOKENS
from gemma_tune.config.training import AUTO, OF_ADAPTERS, TrainConfig, TuneConfig

__all__ = ["AUTO", "CONFIGS", "ChatConfig", "DEFAULT_MODEL", "EvalConfig", "ExportConfig", "MOST_TOKENS",
           "MergeConfig", "OF_ADAPTERS", "PrepareConfig", "QUANTS", "SamplingConfig", "TrainConfig", "TuneConfig"]

DEFAULT_MODEL = "google/gemma-3-270m-it"
CONFIGS: dict[str, type[StageConfig]] = {
    c.section: c for c in (PrepareConfig, TrainConfig, TuneConfig, ChatConfig, EvalConfig, MergeConfig, ExportConfig)
}
