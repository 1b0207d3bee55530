"""Settings of what has a model answer: ``chat`` and ``eval``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gemma_tune.config import rewards
from gemma_tune.config.settings import StageConfig, option
from gemma_tune.config.shared import LARGEST_SEED, MOST_TOKENS, dtype_option

USES = ("adapter", "merged", "gguf", "base", "ollama")
NO_REWARD = ("none",)  # of answers that are not scored


@dataclass(frozen=True)
class SamplingConfig:
    """How an answer is drawn; fields that are None follow the base model's own generation settings."""

    temperature: float | None = option(None, "Sampling temperature; 0 always takes the likeliest token.", least=0.0,
                                       auto="the model's own")
    top_p: float | None = option(None, "Nucleus sampling: smallest set of tokens with this probability.",
                                 least=0.0, most=1.0, auto="the model's own")
    top_k: int | None = option(None, "Sample among this many likeliest tokens; 0 turns it off.", least=0,
                               auto="the model's own")
    repetition_penalty: float | None = option(None, "Above 1, tokens that were already used become less likely.",
                                              least=0.1, auto="the model's own")
    max_new_tokens: int = option(512, "Longest answer in tokens.", least=1, most=MOST_TOKENS)


@dataclass(frozen=True)
class ChatConfig(SamplingConfig, StageConfig):
    """Settings of ``chat``."""

    section: ClassVar[str] = "chat"
    system: str | None = option(None, "System prompt to start with.", auto="none", prose=True)
    use: str | None = option(None, "Who answers: base model plus `adapter`, the `merged` model, its `gguf` in "
                                   "llama.cpp, the untuned `base` model, or the model in `ollama`.", choices=USES,
                             auto="on a CPU the GGUF, where it is up to date and a llama.cpp engine is installed, else "
                                  "the adapter, else the merged model")
    base: bool = option(False, "The same as --use base.")
    merged: bool = option(False, "The same as --use merged.")
    quant: str | None = option(None, "Which exported number format answers, such as q4_k_m: its GGUF, or with --use "
                                     "ollama its model there.", auto="the one that the export recommends")
    compare: bool = option(False, "Answer with the base and the tuned model, side by side, from one loaded model.")
    seed: int | None = option(None, "Seed of the sampling, for answers that can be repeated.", least=0,
                              most=LARGEST_SEED, auto="random")
    dtype: str = dtype_option()

    def more_problems(self) -> list[str]:
        """More than one model that is to answer."""
        named = [f"--use {self.use}"] if self.use else []
        named += [f"--{name}" for name in ("base", "merged") if getattr(self, name) and self.use != name]
        if len(named) > 1:
            return [f"{' and '.join(named)} exclude each other; leave all but one out"]
        if self.quant and named and self.use not in ("gguf", "ollama"):
            return [f"--quant and {named[0]} exclude each other: the number formats are those of GGUF files"]
        if self.compare and self.quant:
            return ["--compare and --quant exclude each other: both base and adapter answer"]
        if self.compare and named and self.use != "adapter":
            return [f"--compare and {named[0]} exclude each other: both base and adapter answer"]
        return []

    @property
    def wanted(self) -> str | None:
        """Who is asked for by name; None leaves it to what is there."""
        named = {"base": self.base, "merged": self.merged, "adapter": self.compare, "gguf": self.quant}
        return self.use or next((name for name, asked in named.items() if asked), None)


@dataclass(frozen=True)
class EvalConfig(StageConfig):
    """Settings of ``eval``."""

    section: ClassVar[str] = "eval"
    data: str = option("valid", "Rows to compare base and tuned model on: a file that `prepare` reads, or `valid` for "
                                "the run's validation rows.")
    pictures: str | None = option(None, "Folder in which the relative paths of pictures begin that rows of --data "
                                        "name.", auto="as `prepare` was told, else that of each file")
    limit: int = option(200, "Rows whose loss is measured, a sample by --seed where there are more, and examples of "
                             "each of --tasks; 0 takes all.", least=0)
    questions: int = option(10, "How many held-out rows the base and the tuned model answer. Where the training "
                                f"learned from rewards, it is up to {rewards.VALIDATED}, as there.", least=1, most=1000)
    max_new_tokens: int = option(128, "Longest answer in tokens. Where the training learned from rewards, it is as "
                                      "there.", least=1, most=MOST_TOKENS)
    reward: tuple[str, ...] = option((), "What answers are scored by as well, written as for `train --reward`; `train` "
                                         "for what the training learned from, `none` for nothing.",
                                     auto="what the training learned from, where that is rewards", apart=rewards.apart,
                                     repeated=True)
    tasks: tuple[str, ...] = option((), "Benchmarks of lm-evaluation-harness (pip install lm-eval) to run on both "
                                        "models, separated by commas, such as arc_easy,hellaswag; or a task's own "
                                        "YAML file.", auto="none")
    seed: int = option(42, "Seed of the sample and of the intervals.", least=0, most=LARGEST_SEED)
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        if self.tasks == ("none",):
            object.__setattr__(self, "tasks", ())
        if self.reward == ("train",):
            object.__setattr__(self, "reward", ())
        super().__post_init__()

    def more_problems(self) -> list[str]:
        if self.reward == NO_REWARD:
            return []
        if alone := [name for name in ("train", *NO_REWARD) if name in self.reward]:
            return [f"reward: `{alone[0]}` stands alone, or rewards are named"]
        return rewards.problems_of(self.reward)

    @property
    def data_file(self) -> str | None:
        """The file that ``data`` names, if it names one."""
        return None if self.data == "valid" else self.data
