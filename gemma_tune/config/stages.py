"""What each stage can be told: one frozen dataclass per stage, read from flags, a YAML file and family defaults.

A field's help text, its limits and its default are declared here once; ``options`` builds the command line from
them, the YAML reader checks against them, and the manifest records each value together with where it came from. How
that works is in ``settings``.
No heavy import: ``gemma-tune --help`` loads this module.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gemma_tune.base import shell
from gemma_tune.base.words import is_text_encoding, near, shown, size_in_bytes
from gemma_tune.config.habits import number_format
from gemma_tune.config.most_rows import Most, most_rows, problems_of
from gemma_tune.config.preference import MethodConfig
from gemma_tune.config.settings import StageConfig, option

DEFAULT_MODEL = "google/gemma-3-270m-it"
# Settings of an adapter, which a training of all weights has none of.
OF_ADAPTERS = ("rank", "alpha", "dropout", "rslora", "dora", "target_modules", "modules_to_save")
DTYPES = ("auto", "bf16", "fp32", "fp16")
MERGED_DTYPES = ("bf16", "fp16", "fp32")
# Limits of what is worked through one by one, or given memory for: far beyond what anybody needs.
MOST_ROWS, MOST_TOKENS, MOST_PROCESSES, MOST_EPOCHS = 1 << 16, 1 << 24, 4096, 100_000.0
LARGEST_SEED = 2**32 - 1  # what NumPy's generator takes, which a training seeds as well
USES = ("adapter", "merged", "gguf", "base", "ollama")
FORMATS = ("messages", "alpaca", "sharegpt", "gemini", "prompt-completion", "columns", "rendered", "text",
           "preference")
COLUMN_ROLES = ("user", "assistant", "system", "context", "reasoning", "chosen", "rejected", "turns", "tools",
                "images")
_NOT_OF_PAIRS = ("assistant", "turns", "context", "reasoning", "images")
ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = ("role", "content")
_TABS = {"tab": "\t", "\\t": "\t"}  # how people write what a command line hardly takes
ALLOWABLE = ("placeholder", "control_character", "foreign_marker", "undeclared_tool")
# Number formats of GGUF files, the widest first; ``gguf.types`` says what they mean.
QUANTS = ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
          "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "mxfp4")


def dtype_option() -> Any:
    """The compute type, which every stage that runs a model takes."""
    return option("auto", "Compute type of the base model; `auto` takes bf16 where the device has instructions for it, "
                          "else fp32, and never fp16.", choices=DTYPES, group="speed")


def push_option(what: str) -> Any:
    """The repository at the Hub, which every stage that publishes takes."""
    return option(None, f"Push {what} to the Hugging Face Hub, to this repository (account/name), with a model card.",
                  same_result=True, auto="stay here")


def private_option() -> Any:
    """Who sees it there."""
    return option(True, "Whether a repository that is created at the Hub is private.", same_result=True)


@dataclass(frozen=True)
class PrepareConfig(StageConfig):
    """Settings of ``prepare``."""

    section: ClassVar[str] = "prepare"
    group: ClassVar[str] = "data"
    data: tuple[str, ...] = option((), "What to learn from: files (.jsonl, .json, .csv, .tsv, .parquet, .arrow, also "
                                       ".gz and .zst; .txt and .md as plain text), directories, globs, `-` for "
                                       "standard input, or hf:org/name[/config][:split][@revision], or example:finance "
                                       "and example:pairs, which are built in, or an entry of LLaMA-Factory's "
                                       "dataset_info.json:NAME. Without any, what the run was prepared "
                                       "from before, else example:finance.",
                                   files=True)  # which are judged by what lies there
    format: str | None = option(None, "Format of the rows; `text` takes all of the data for plain text, also files "
                                      "of other names than .txt and .md.", choices=FORMATS, auto="detected, row by row")
    columns: tuple[str, ...] = option((), "Columns of question and answer rows, such as "
                                          "user=question,assistant=answer,system=persona,context=passage "
                                          "(put below the question), the column of a list of turns: "
                                          "turns=dialogue, or those of pairs: user=…,chosen=…,rejected=…. "
                                          "reasoning=… names what is thought before the answer, tools=… the "
                                          "declarations of tools, images=… the pictures.", auto="none")
    roles: tuple[str, ...] = option((), "Names that the data has for the roles of turns, such as "
                                        "customer=user,bot=assistant; the roles are system, user, assistant, tool.",
                                    auto="the usual names")
    turn_keys: tuple[str, ...] = option((), "Keys of turns under other names, such as "
                                            "role=speaker,content=utterance.", auto="the usual names")
    delimiter: str | None = option(None, "Sign between the columns of CSV and TSV files, such as `;`, or `tab`. Files "
                                         "whose names do not tell what they are (.txt) are then read as tables.",
                                   auto="found in each file", prose=True, group="advanced")
    encoding: str | None = option(None, "Encoding of text files, such as gb18030, big5, cp932 or windows-1252.",
                                  auto="UTF-8, or UTF-16 with its byte order mark", group="advanced")
    take: str | None = option(None, "What to take of rows with a better and a worse answer: `chosen` makes "
                                    "plain conversations of the better ones, `pairs` takes the pairs alone and leaves "
                                    "other rows out, `auto` learns from both answers.",
                              choices=("auto", "chosen", "pairs"),
                              auto="both answers of each, where all rows have them", group="advanced")
    pictures: str | None = option(None, "Folder in which the relative paths of pictures begin that rows name.",
                                  auto="that of each data file")
    train_on: str = option("all", "Which assistant turns are learned; a turn with `\"train\": false` never is.",
                           choices=("all", "last"))
    chat_template: str | None = option(None, "Chat template to train with in place of the model's own, as for a base "
                                             "model that has none: `alpaca`, `chatml`, `completion` (a prompt is "
                                             "continued as it stands), or a Jinja file. The run and the tuned model "
                                             "have it from then on; `own` takes it back.",
                                       auto="the model's own", group="advanced")
    thinking: str = option("auto", "Whether the prompts ask for reasoning: by the chat template's switch "
                                   "(`enable_thinking`), or, for models that always think, by a thought that each "
                                   "prompt begins, or an empty one; `auto` leaves it to the template. The tuned model "
                                   "keeps the choice.", choices=("auto", "on", "off"), group="advanced")
    valid: float | str = option(0.1, "Validation data: a share of the rows below 1, a number of rows, or a file.",
                                least=0.0, group="common")
    max_samples: int | str | None = option(None, "Most rows of each DATA (a directory or a quoted glob is one): of a "
                                                 "larger one so many are drawn from all over it, before anything is "
                                                 "checked. NAME=N is for one DATA, NAME=20% its share of all rows that "
                                                 "are taken. Files of --valid stay whole.", least=1, auto="all rows")
    max_length: int = option(2048, "Longest sequence in tokens.", least=16, most=MOST_TOKENS, group="common")
    on_long: str = option("drop", "What happens to a longer conversation: `drop` rejects it with its length, `split` "
                                  "divides it between turns, `truncate` cuts it (and the last answer may lose its "
                                  "end), `fail` stops.", choices=("drop", "split", "truncate", "fail"))
    on_uneven: str = option("reject", "What happens to a conversation whose turns do not alternate, as in logs: "
                                      "`reject`, or `mend`: neighbouring turns of one role become one, and what stands "
                                      "before the first question and after the last answer is left out.",
                            choices=("reject", "mend"))
    seed: int = option(42, "Seed of the split between training and validation, and of what --max-samples draws.",
                       least=0, most=LARGEST_SEED, group="advanced")
    duplicates: str = option("drop", "What happens to a conversation that was there before; what is dropped is listed "
                                     "in data/duplicates.jsonl.", choices=("drop", "keep"))
    near_duplicates: bool = option(False, "Also drop conversations that are nearly the same as an earlier one.")
    near_threshold: float = option(0.85, "From which similarity on (Jaccard, of word triples) conversations are "
                                         "nearly the same.", least=0.5, most=1.0, group="advanced")
    allow: tuple[str, ...] = option((), "Findings that do not reject a row: placeholder, control_character, "
                                        "foreign_marker, undeclared_tool.", auto="none", group="advanced")
    on_bad_row: str = option("reject", "What a bad row does: `reject` writes it to data/rejected.jsonl, `fail` stops.",
                             choices=("reject", "fail"), group="advanced")
    max_rejected: float = option(0.2, "Largest share of rejected rows before preparation fails.", least=0.0, most=1.0,
                                 group="advanced")

    @property
    def column_names(self) -> dict[str, str]:
        """``--columns`` as a mapping: ``{"user": "question", "assistant": "answer"}``."""
        return _pairs(self.columns)

    @property
    def role_names(self) -> dict[str, str]:
        """``--roles`` as a mapping: ``{"bot": "assistant"}``."""
        return _pairs(self.roles)

    @property
    def key_names(self) -> dict[str, str]:
        """``--turn-keys`` as a mapping: ``{"role": "speaker", "content": "utterance"}``."""
        return _pairs(self.turn_keys)

    @property
    def most_rows(self) -> dict[str | None, Most]:
        """``--max-samples`` as a mapping: ``{None: 1000, "general.jsonl": Fraction(1, 5)}``."""
        return most_rows(self.max_samples) or {}

    @property
    def delimiter_sign(self) -> str | None:
        """``--delimiter`` as the sign that it means."""
        return _TABS.get(self.delimiter.lower(), self.delimiter) if self.delimiter is not None else None

    def more_problems(self) -> list[str]:
        pairs = [part.partition("=") for part in self.columns]
        problems = [f"columns: {shown(''.join(pair))} is not of the form ROLE=COLUMN with the roles "
                    f"{', '.join(COLUMN_ROLES)}" for pair in pairs if pair[0] not in COLUMN_ROLES or not pair[2]]
        roles = {role for role, _, _ in pairs}
        if len(roles) < len(pairs) and not problems:
            problems.append("columns: each role can have one column")
        if "turns" in roles and (others := sorted(roles & {"user", "assistant", "context", "reasoning"})):
            problems.append(f"columns: `turns=…` excludes `{others[0]}=…`, as the turns hold it")
        elif roles & {"chosen", "rejected"} and not problems and (
                not {"chosen", "rejected"} <= roles or not roles.isdisjoint(_NOT_OF_PAIRS)):
            problems.append("columns: pairs need `user=…`, `chosen=…` and `rejected=…`, and no others but `system=…`")
        elif self.columns and not problems and "turns" not in roles and not (
                {"user", "assistant"} <= roles or {"chosen", "rejected"} <= roles):
            parted = "; a name with a space stands in quotes" if any("=" in name for name in self.data) else ""
            problems.append(f"columns: both `user=…` and `assistant=…` are needed, or `turns=…`{parted}{shell.COMMAS}")
        problems += self._name_problems()
        if isinstance(self.max_samples, str):
            problems += problems_of(most_rows(self.max_samples), shown(self.max_samples))
        if self.format == "columns" and not self.columns:
            problems.append("format: `columns` needs --columns user=…,assistant=…")
        if (sign := self.delimiter_sign) is not None and (len(sign) != 1 or sign.isalnum() or sign in '"\r\n\0'):
            problems.append(f"delimiter: {shown(self.delimiter)} is no sign between columns; write one, such as `;`, "
                            "or `tab`")
        if self.encoding is not None and not is_text_encoding(self.encoding):
            problems.append(f"encoding: {shown(self.encoding)} is no encoding of text; there are gb18030, big5, cp932, "
                            "cp949, windows-1252 and the others that Python knows")
        if self.columns and self.format not in (None, "columns"):
            problems.append(f"columns: they exclude --format {self.format}")
        if self.near_duplicates and self.duplicates == "keep":
            problems.append("near_duplicates: it drops rows that `duplicates: keep` would keep; use one of them")
        problems += [f"allow: {shown(code)} is not one of {', '.join(ALLOWABLE)}{near(code, ALLOWABLE)}"
                     for code in self.allow if code not in ALLOWABLE]
        if isinstance(self.valid, str) and self.valid.endswith("%"):
            problems.append(f"valid: write {self.valid} as a share below 1, such as 0.1")
        if isinstance(self.valid, float) and (0.9 < self.valid < 1 or self.valid >= 1 and self.valid % 1):
            problems.append(f"valid: {self.valid:g} is neither a share up to 0.9, nor a whole number of rows, nor a "
                            "file")
        return problems


    def _name_problems(self) -> list[str]:
        """What is wrong with the names of roles and keys."""
        roles = [part.partition("=") for part in self.roles]
        keys = [part.partition("=") for part in self.turn_keys]
        problems = [f"roles: {shown(''.join(pair))} is not of the form NAME=ROLE with the roles {', '.join(ROLES)}"
                    for pair in roles if not pair[0] or pair[2] not in ROLES]
        problems += [f"turn_keys: {shown(''.join(pair))} is not of the form KEY=NAME with the keys "
                     f"{', '.join(TURN_KEYS)}" for pair in keys if pair[0] not in TURN_KEYS or not pair[2]]
        for name, pairs, what in (("roles", roles, "name"), ("turn_keys", keys, "key")):
            if len({first for first, _, _ in pairs}) < len(pairs):
                problems.append(f"{name}: each {what} can be given once")
        return problems


def _pairs(parts: tuple[str, ...]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in parts)


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
    batch_size: int | str = option(4, "Conversations, or pairs, of a batch on one device, or `auto` for a number that "
                                      "suits the data and the device; --micro-batch says how many go through the model "
                                      "at once.",
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
    micro_batch: int | None = option(None, "Conversations that go through the model at once; a batch is worked on in "
                                           "such pieces, and learns the same.", least=1, same_result=True,
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
    keep: str = option("best", "Which weights stay: those whose validation loss was lowest, or those of the last "
                               "step; without validation rows it is the last.", choices=("best", "last"))
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
        if self.micro_batch and self.batch_size != AUTO and self.micro_batch > self.batch_size:
            return [f"micro_batch: {self.micro_batch} is more than the batch size, {self.batch_size}"]
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
        rate of one is ten times that of the other."""
        kinds = {"full", "qlora", *OF_ADAPTERS}
        asked = any(name in ("full", "target_modules") or getattr(self, name) for name in kinds.intersection(given))
        if not asked or self.full == before.get("full", {"value": False})["value"]:
            return set()
        return kinds | {"learning_rate"}

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
    questions: int = option(10, "How many held-out rows the base and the tuned model answer.", least=1,
                            most=1000)
    max_new_tokens: int = option(128, "Longest answer in tokens.", least=1, most=MOST_TOKENS)
    tasks: tuple[str, ...] = option((), "Benchmarks of lm-evaluation-harness (pip install lm-eval) to run on both "
                                        "models, separated by commas, such as arc_easy,hellaswag; or a task's own "
                                        "YAML file.", auto="none")
    seed: int = option(42, "Seed of the sample and of the intervals.", least=0, most=LARGEST_SEED)
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        if self.tasks == ("none",):
            object.__setattr__(self, "tasks", ())
        super().__post_init__()

    @property
    def data_file(self) -> str | None:
        """The file that ``data`` names, if it names one."""
        return None if self.data == "valid" else self.data


@dataclass(frozen=True)
class MergeConfig(StageConfig):
    """Settings of ``merge``."""

    section: ClassVar[str] = "merge"
    adapter: str | None = option(None, "A PEFT adapter that was trained elsewhere: its directory. The base model is "
                                       "the one that it names, or --base.", same_result=True,
                                 auto="the run's own")
    base: str | None = option(None, "The 16-bit model to merge into, where the run's own is quantised, or where "
                                    "--adapter names none that is here: as --model, or ID@REVISION.",
                              auto="the run's own model", kept_by_stage=True)
    dtype: str | None = option(None, "Number type of the merged weights.", choices=MERGED_DTYPES,
                               auto="each tensor's own in the base", group="advanced")
    max_shard_size: str | None = option(None, "Largest file of weights, such as 5GB or 500MB.", auto="the base's files",
                                        group="advanced")
    check: bool = option(True, "Compare the merged model with base plus adapter on held-out prompts.",
                         check=True)
    check_prompts: int = option(4, "Held-out prompts to compare with.", least=1, most=32, check=True, group="advanced")
    push: str | None = push_option("the merged model")
    private: bool = private_option()

    def more_problems(self) -> list[str]:
        if self.max_shard_size is not None and size_in_bytes(self.max_shard_size) is None:
            return [f"max_shard_size: {shown(self.max_shard_size)} is no size; write 5GB or 500MB"]
        return []


@dataclass(frozen=True)
class ExportConfig(StageConfig):
    """Settings of ``export-ollama``."""

    section: ClassVar[str] = "export-ollama"
    quant: tuple[str, ...] = option((), "Number format of the GGUF's matrices; several with commas, each a file of its "
                                        "own.", choices=QUANTS, auto="by the model's size", about="formats",
                                    habit=number_format)
    size: str | None = option(None, "Write the best mix of number formats whose file is no larger, such as 250MB.",
                              auto="none", about="formats")
    name: str | None = option(None, "Name of the model in Ollama.", auto="<model name>-tuned")
    system: str | None = option(None, "System prompt to put into the Modelfile; an empty one for none.",
                                auto="the data's, where every conversation has the same one", prose=True)
    parameter: tuple[str, ...] = option((), "Parameter of the model in Ollama, such as temperature=0.3; may be "
                                            "repeated.", auto="the base model's own sampling settings", prose=True)
    num_ctx: int | None = option(None, "Context length in Ollama.", least=16, most=MOST_TOKENS,
                                 auto="at least 4096 and the longest length in training", group="advanced")
    calibration: bool | str = option("rows", "Round to eight bits and fewer by what the matrices are multiplied with "
                                             "on the rows of this file, which is any that `prepare` reads or plain "
                                             "text (.txt, .md), or with `rows` on those of the training.",
                                     off="Round each weight by itself.", group="data")
    vision: bool = option(True, "Write what a multimodal model sees with, too, so that it takes pictures as its base "
                                "does.")
    measure: bool = option(True, "Measure on validation rows and general text what the formats lose.", check=True,
                           group="speed")
    verify: bool | None = option(None, "Compare token ids and answers of Hugging Face, the GGUF in llama.cpp, and "
                                       "Ollama's template or server.", auto="with what is installed and answers",
                                 check=True, group="speed")
    converter: str | None = option(None, "A llama.cpp checkout, whose converter writes the GGUF of an architecture "
                                         "that gemma-tune does not know.", auto="none", group="advanced")
    create: bool | None = option(None, "Create the model in Ollama; by default this is done when a server answers, "
                                       "with --create its absence is an error.", same_result=True)
    host: str | None = option(None, "Address of the Ollama server.", auto="OLLAMA_HOST, else 127.0.0.1:11434",
                              same_result=True, address=True)
    allow_difference: bool = option(False, "Take an Ollama server that reads prompts otherwise than they were trained; "
                                           "else that is an error.", same_result=True, group="advanced")
    push: str | None = push_option("the GGUF files and what Ollama is told of them")
    private: bool = private_option()

    def more_problems(self) -> list[str]:
        if self.size is None:
            return []
        if size_in_bytes(self.size) is None:
            return [f"size: {shown(self.size)} is no size; write 250MB or 1.5GB"]
        other = "a converter" if self.converter else "no calibration" if self.calibration is False else ""
        return [f"size: what it takes is measured on rows, so it does not go with {other}"] if other else []

    @property
    def labels(self) -> tuple[str, ...]:
        """What the files are called after: the formats, and the size."""
        size = () if self.size is None else ("".join(self.size.lower().split()),)
        return (*dict.fromkeys(self.quant), *size)

    @property
    def calibration_file(self) -> str | None:
        """The file that ``calibration`` names, if it names one."""
        return None if self.calibration in (True, False, "rows") else self.calibration


CONFIGS: dict[str, type[StageConfig]] = {
    c.section: c for c in (PrepareConfig, TrainConfig, TuneConfig, ChatConfig, EvalConfig, MergeConfig, ExportConfig)
}
