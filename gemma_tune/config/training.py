"""Settings of ``train``, and of ``tune``, which looks for some of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gemma_tune.base.words import shown
from gemma_tune.config.preference import MethodConfig
from gemma_tune.config.settings import StageConfig, option
from gemma_tune.config.shared import LARGEST_SEED, MOST_EPOCHS, MOST_PROCESSES, MOST_ROWS, dtype_option

# Settings of an adapter, which a training of all weights has none of.
OF_ADAPTERS = ("rank", "alpha", "dropout", "rslora", "dora", "target_modules", "modules_to_save")
AUTO = "auto"


@dataclass(frozen=True)
class TrainConfig(MethodConfig, StageConfig):
    """Settings of ``train``."""

    section: ClassVar[str] = "train"
    group: ClassVar[str] = "advanced"
    full: bool = option(False, "Train every weight of the text model instead of a LoRA adapter: it can learn more, and "
                               "takes about 20 bytes of memory for each weight. For small models, or much data.",
                        group="common")
    rank: int = option(16, "LoRA rank r: the width of the adapter.", least=1, most=1024, group="common")
    alpha: float = option(32.0, "LoRA alpha; the adapter is scaled by alpha / r, with --rslora by alpha / sqrt(r).",
                          least=1e-6, most=1e6)
    dropout: float = option(0.0, "Dropout on the adapter's input.", least=0.0, most=0.95)
    rslora: bool = option(False, "Rank-stabilised LoRA: scale the adapter by alpha / sqrt(r), so that a high rank is "
                                 "not scaled away. It costs nothing; at rank 16 the default alpha gives 8 instead of "
                                 "2.")
    dora: bool = option(False, "DoRA: learn the length of each row of a weight apart from its direction. Closer to "
                               "full fine-tuning at low ranks; it takes more memory while training, and none after "
                               "merging.")
    target_modules: tuple[str, ...] = option((), "Layer names to adapt, separated by commas; `all` for every linear "
                                                 "layer. `experts`, beside them or alone, for those of a mixture.",
                                             auto="every linear layer of the text model")
    modules_to_save: tuple[str, ...] = option((), "Modules whose weights are trained as a whole beside the adapter, "
                                                  "separated by commas, such as `embed_tokens` for a language that the "
                                                  "model hardly knows.", auto="none")
    learning_rate: float | None = option(None, "Peak learning rate.", least=0.0, most=1.0,
                                         auto="by model family and size", group="common")
    batch_size: int | str = option(4, "Conversations, pairs, or prompts of GRPO, of a batch on one device, or `auto` "
                                      "for a number that suits the data and the device; --micro-batch says how many "
                                      "go through the model at once.",
                                   least=1, most=MOST_ROWS, group="common")
    accumulation: int = option(1, "Batches per optimiser step; effective batch = batch size x accumulation x "
                                  "processes.", least=1, most=MOST_ROWS, group="speed")
    num_processes: int = option(1, "Processes that train together, each on a GPU of its own, or on a part of the CPU.",
                                least=1, most=MOST_PROCESSES, group="speed")
    strategy: str = option("ddp", "How several processes share the work: with `ddp` each holds the whole model, with "
                                  "`fsdp` each holds a part of it.", choices=("ddp", "fsdp"), group="speed")
    epochs: float = option(4.0, "Passes over the training data.", least=0.001, most=MOST_EPOCHS, group="common",
                           about="length")
    max_steps: int = option(0, "Train for so many optimiser steps, whatever --epochs says; 0 means by epochs.", least=0,
                            group="common", about="length")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises to its peak; the first one "
                                 "learns already.", least=0.0, most=0.9, counts="a share of the steps")
    schedule: str = option("cosine", "How the learning rate falls after the warm-up; it would be zero after the last "
                                     "step.",
                           choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.0, "Weight decay of AdamW on what is trained.", least=0.0)
    clip: float = option(1.0, "Largest gradient norm; larger gradients are scaled down.", least=0.0)
    dtype: str = dtype_option()
    qlora: bool = option(False, "Keep the base model in 4 bits (NF4) while training, to save memory.", group="speed")
    micro_batch: int | None = option(None, "Conversations, or answers of GRPO, that go through the model at once; a "
                                           "batch is worked on in such pieces, and learns the same.", least=1,
                                     same_result=True,
                                     auto="as many of the batch as fit the memory", group="speed")
    activation_checkpointing: bool | None = option(None, "Recompute activations in the backward pass: less memory, "
                                                         "slower.", same_result=True,
                                                   auto="only if the memory asks for it", group="speed")
    cuda_graphs: bool | None = option(None, "Capture steps once as CUDA graphs and replay them: many times as fast for "
                                            "small models. Where that fails, training goes on without by itself.",
                                      same_result=True, auto="on a CUDA GPU, where it pays", group="speed")
    compile: bool = option(False, "Compile the model's layers first (torch.compile), which takes minutes and a C++ "
                                  "compiler: for long trainings. It is given up after ten minutes, or a quarter of the "
                                  "training's time; the point where it breaks even is shown. On a CUDA "
                                  "GPU captured steps are faster, and take its place.",
                           same_result=True, group="speed")
    eval_steps: int = option(0, "Evaluate every so many steps; 0 means once per epoch.", least=0)
    keep: str = option("best", "Which weights stay: those whose validation loss was lowest (of GRPO, whose reward was "
                               "highest), or those of the last step; without validation rows it is the last.",
                       choices=("best", "last"))
    early_stopping: int = option(0, "End after so many evaluations in a row without a lower validation loss; 0 trains "
                                    "to the end.", least=0)
    save_steps: int = option(0, "Save a checkpoint every so many steps; 0 means once per epoch.", least=0)
    keep_checkpoints: int = option(2, "How many checkpoints stay on the disk: the latest ones, among them that of the "
                                      "lowest validation loss (with 1 its weights alone).", least=1,
                                   same_result=True)
    from_adapter: str | None = option(None, "Start from this PEFT adapter, a directory or an id at the Hub, with its "
                                            "rank, scale, kind and layers; `none` starts from zero again.",
                                      same_result=True, auto="start from zero", group="common")
    samples: int = option(2, "Prompts, held-out ones first, that the base model answers, and the trained one at each "
                             "evaluation, into logs/samples.jsonl, as far as that takes a few percent of the time at "
                             "the most; 0 asks nothing.", least=0, most=20, same_result=True)
    report_to: tuple[str, ...] = option((), "Programs that show the training as it goes, separated by commas: "
                                            "tensorboard, wandb, trackio, mlflow, and all others that transformers "
                                            "reports to, each a package to install.", auto="none", same_result=True)
    seed: int = option(42, "Seed of the adapter's start values and the data order.", least=0, most=LARGEST_SEED)

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / r (Hu et al. 2021), or alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def effective_batch(self) -> int:
        """Conversations per optimiser step of all processes together."""
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def learned_at_once(self) -> int:
        """Rows of a batch that could go through the model at once: of GRPO all answers to its prompts."""
        return self.batch_size * (self.answers if self.method == "grpo" else 1)

    @property
    def whole(self) -> bool:
        """Whether weights are trained themselves, and not LoRA's alone."""
        return self.full or bool(self.modules_to_save)

    @property
    def shards(self) -> int:
        """Parts that the base model is divided into, each with a process of its own."""
        return self.num_processes if self.strategy == "fsdp" else 1

    def __post_init__(self) -> None:
        if self.target_modules == ("all",):
            object.__setattr__(self, "target_modules", ())
        for name in ("report_to", "modules_to_save"):
            if getattr(self, name) == ("none",):
                object.__setattr__(self, name, ())
        super().__post_init__()

    def more_problems(self) -> list[str]:
        if problems := self.method_problems():
            return problems
        if "all-linear" in self.target_modules:
            return ["target_modules: `all-linear` of PEFT is `all` here, as it is where nothing is said"]
        if "all" in self.target_modules and {*self.target_modules} - {"all", "experts"}:
            return ["target_modules: `all` stands alone, or with `experts`, or names are given"]
        for name, what in (("report_to", "programs"), ("modules_to_save", "modules")):
            if "none" in getattr(self, name):
                return [f"{name}: `none` stands alone, or {what} are named"]
        if isinstance(self.batch_size, str) and self.batch_size != AUTO:
            return [f"batch_size: expected a whole number or {AUTO}, found {shown(self.batch_size)}"]
        if self.micro_batch and self.batch_size != AUTO and self.micro_batch > self.learned_at_once:
            what = f" x {self.answers} answers" if self.method == "grpo" else ""
            return [f"micro_batch: {self.micro_batch} is more than the batch size, {self.batch_size}{what}"]
        if self.method == "grpo":
            others = ["compile"] * self.compile + ["strategy fsdp"] * (self.strategy == "fsdp")
            if others:
                return [f"method: grpo does not go together with {other}; leave one of them out" for other in others]
            if self.strength and self.whole:  # the weights before would be in memory a second time
                return [f"beta: of grpo does not go together with {'full' if self.full else 'modules_to_save'}; leave "
                        "that out, or set beta to 0"]
        if problems := self._whole_problems():
            return problems
        if "experts" in self.target_modules:
            given = [name for name in ("dora", "dropout", "compile") if getattr(self, name)]
            if given := given + ["strategy fsdp"] * (self.strategy == "fsdp"):
                return [f"target_modules: experts does not go together with {name}; leave one of them out"
                        for name in given]
        if self.strategy == "fsdp":
            return [f"strategy: fsdp does not go together with {name}; leave one of them out"
                    for name in ("qlora", "dora", "compile") if getattr(self, name)]
        return []

    def outdone(self, given: Collection[str], before: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Whoever asks for an adapter's rank wants an adapter, and whoever wants all weights trained none; the learning
        rate of one is ten times that of the other. With another method go settings that are not its own."""
        gone = self.outdone_by_method(given, before.get("method", {"value": AUTO})["value"])
        kinds = {"full", "qlora", *OF_ADAPTERS}
        asked = any(name in ("full", "target_modules") or getattr(self, name) for name in kinds.intersection(given))
        if not asked or self.full == before.get("full", {"value": False})["value"]:
            return gone
        return gone | kinds | {"learning_rate"}

    def _whole_problems(self) -> list[str]:
        """Settings that do not go with weights that are trained as a whole."""
        if self.full:
            own = {field.name: field.default for field in fields(self)}
            problems = [f"{name}: belongs to an adapter, and --full trains none; leave one of them out"
                        for name in OF_ADAPTERS if getattr(self, name) != own[name]]
        else:
            problems = [f"modules_to_save: {name} is in --target-modules, too; leave it out of one of them"
                        for name in self.modules_to_save if name in self.target_modules]
        if not self.whole:
            return problems
        name = "full" if self.full else "modules_to_save"
        others = [word for word in ("qlora", "compile") if getattr(self, word) and (self.full or word != "qlora")]
        return problems + [f"{name}: does not go together with {other}; leave one of them out"
                           for other in others + ["strategy fsdp"] * (self.strategy == "fsdp")]


@dataclass(frozen=True)
class TuneConfig(StageConfig):
    """Settings of ``tune``; those of its trainings are :class:`TrainConfig`'s."""

    section: ClassVar[str] = "tune"
    minutes: float = option(10.0, "Time for everything; fewer minutes try less.", least=0.01, most=100_000.0)
    learning_rates: tuple[float, ...] = option((), "Learning rates to try, separated by commas.", least=1e-9, most=1.0,
                                               auto="a quarter of that of train, a half, once, twice, four times")
    ranks: tuple[int, ...] = option((), "LoRA ranks to try, separated by commas, each with every learning rate.",
                                    least=1, most=1024, auto="the rank of train")
    valid_sequences: int = option(200, "Validation sequences that candidates are compared by, at most.", least=1,
                                  most=1_000_000, group="advanced")
