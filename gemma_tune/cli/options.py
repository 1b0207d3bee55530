"""Every command line option, declared once; help texts, defaults and limits come from ``config.stages``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from gemma_tune.base.errors import UserError
from gemma_tune.config import stages as c


def _of(cls: type, name: str, *flags: str, **extra: Any) -> Any:
    """The option of one configuration field."""
    field = _field(cls, name)
    return typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=_help(field), show_default=False,
                        rich_help_panel=field.metadata.get("group") or cls.group, **extra)


def _off(cls: type, name: str) -> Any:
    """The flag that refuses what a field names, of a field that takes false as well: see :func:`with_refusals`."""
    field = _field(cls, name)
    return typer.Option(f"--no-{name.replace('_', '-')}", help=escape(field.metadata["off"]),
                        rich_help_panel=field.metadata.get("group") or cls.group)


def with_refusals(params: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name: the flag ``no_NAME`` is the option ``NAME`` with the value false.

    Raises:
        UserError: both are given.
    """
    options = {name: value for name, value in params.items() if not name.startswith("no_")}
    for name in (name.removeprefix("no_") for name, given in params.items() if name.startswith("no_") and given):
        if options[name] is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} and --no-{flag} exclude each other", "leave one of them out")
        options[name] = False
    return options


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(f for f in dataclasses.fields(cls) if f.name == name)


def _joined(values: Optional[list[str]]) -> Optional[str]:
    """An option that may be repeated or hold several values with commas."""
    return ",".join(values) if values else None


def _columns(values: Optional[list[str]]) -> Optional[list[str]]:
    """ROLE=COLUMN, several times or with commas between; a column's own commas stay."""
    parts = [part.strip(" ,") for value in values or () for part in re.split(r",(?=\s*[A-Za-z_]+=)", value)]
    return parts or None


def _joined_lower(values: Optional[list[str]]) -> Optional[str]:
    """The same for names that people write in capitals as well, such as Q4_K_M."""
    return ",".join(values).lower() if values else None


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += f" One of {', '.join(field.metadata['choices'])}."
    default = field.metadata.get("auto")
    if default is None and isinstance(field.default, bool):
        default = "on" if field.default else "off"
    elif default is None and field.default not in (None, ()):
        default = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return escape(text if default is None else f"{text} (default: {default})")


# Shared by the commands
Model = Annotated[Optional[str], typer.Option(
    "--model", "-m", metavar="MODEL", show_default=False,
    help="Base model: a Hugging Face id, a directory, a GGUF file, or `demo` (needs no account). "
         f"(default: the run's own, else {c.DEFAULT_MODEL})")]
RunsModel = Annotated[Optional[str], typer.Option(  # of commands that begin no run
    "--model", "-m", metavar="MODEL", show_default=False,
    help="The run's model: a Hugging Face id, a directory, a GGUF file, or `demo`. (default: the run's own)")]
Revision = Annotated[Optional[str], typer.Option(
    "--revision", rich_help_panel="advanced", show_default=False,
    help="Branch, tag or commit of a hub model; the commit it means is recorded. (default: main)")]
Run = Annotated[Optional[str], typer.Option(
    "--run", "-r", envvar="GEMMA_TUNE_RUN", metavar="DIR", show_default=False,
    help="Run directory. (default: runs/<model name>, else the newest run)")]
DoctorModel = Annotated[Optional[str], typer.Option(
    "--model", "-m", metavar="MODEL", show_default=False,
    help="Base model to be trained: a Hugging Face id, a directory, a GGUF file, or `demo`. (default: none; only the "
         "machine is examined)")]
RunsFolder = Annotated[Optional[str], typer.Argument(
    metavar="[DIR]", help="Directory that holds the runs. (default: runs)", show_default=False)]
Force = Annotated[bool, typer.Option("--force", "-f", help="Run even if the result is up to date.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and the result.")]
VerifyFiles = Annotated[bool, typer.Option(
    "--verify", help="Read every file and compare its sha256; otherwise size and time stamp are compared first.")]
Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as one JSON object.")]
ConfigFile = Annotated[Optional[str], typer.Option(
    "--config", metavar="FILE", show_default=False,
    help="YAML file with settings (sections: prepare, train, …); flags win over it.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="advanced")]

Data = Annotated[Optional[list[str]], typer.Argument(
    metavar="[DATA]...", help=_help(_field(c.PrepareConfig, "data")), show_default=False)]
TrainData = Annotated[Optional[list[str]], typer.Argument(
    metavar="[DATA]...", show_default=False,
    help="Prepare this first, with the settings of --config; what it can be: see `gemma-tune prepare --help`. Without "
         "any, what was prepared before is learned.")]
Format = Annotated[Optional[str], _of(c.PrepareConfig, "format")]
Columns = Annotated[Optional[list[str]], _of(c.PrepareConfig, "columns", callback=_columns)]
Delimiter = Annotated[Optional[str], _of(c.PrepareConfig, "delimiter", metavar="SIGN")]
Encoding = Annotated[Optional[str], _of(c.PrepareConfig, "encoding", metavar="NAME")]
Roles = Annotated[Optional[list[str]], _of(c.PrepareConfig, "roles", callback=_joined)]
TurnKeys = Annotated[Optional[list[str]], _of(c.PrepareConfig, "turn_keys", callback=_joined)]
Take = Annotated[Optional[str], _of(c.PrepareConfig, "take")]
Pictures = Annotated[Optional[str], _of(c.PrepareConfig, "pictures", metavar="DIR")]
TrainOn = Annotated[Optional[str], _of(c.PrepareConfig, "train_on")]
ChatTemplate = Annotated[Optional[str], _of(c.PrepareConfig, "chat_template")]
NewTokens = Annotated[Optional[list[str]], _of(c.PrepareConfig, "new_tokens", metavar="TOKEN,…", callback=_joined)]
Thinking = Annotated[Optional[str], _of(c.PrepareConfig, "thinking")]
Valid = Annotated[Optional[str], _of(c.PrepareConfig, "valid")]
MaxSamples = Annotated[Optional[list[str]], _of(c.PrepareConfig, "max_samples", metavar="N|NAME=N|NAME=N%",
                                                callback=_joined)]
MaxLength = Annotated[Optional[int], _of(c.PrepareConfig, "max_length")]
OnLong = Annotated[Optional[str], _of(c.PrepareConfig, "on_long")]
Duplicates = Annotated[Optional[str], _of(c.PrepareConfig, "duplicates")]
NearDuplicates = Annotated[Optional[bool], _of(c.PrepareConfig, "near_duplicates",
                                               "--near-duplicates/--no-near-duplicates")]
NearThreshold = Annotated[Optional[float], _of(c.PrepareConfig, "near_threshold")]
Allow = Annotated[Optional[list[str]], _of(c.PrepareConfig, "allow", callback=_joined)]
OnUneven = Annotated[Optional[str], _of(c.PrepareConfig, "on_uneven")]
OnBadRow = Annotated[Optional[str], _of(c.PrepareConfig, "on_bad_row")]
MaxRejected = Annotated[Optional[float], _of(c.PrepareConfig, "max_rejected")]
Preview = Annotated[int, typer.Option("--preview", min=0, metavar="N", show_default=False,
                                      help="Show N prepared rows with what is learned and what is not.")]
SplitSeed = Annotated[Optional[int], _of(c.PrepareConfig, "seed")]

Method = Annotated[Optional[str], _of(c.TrainConfig, "method")]
Reward = Annotated[Optional[list[str]], _of(c.TrainConfig, "reward", metavar="REWARDS")]
Answers = Annotated[Optional[int], _of(c.TrainConfig, "answers", metavar="N")]
SampledTokens = Annotated[Optional[int], _of(c.TrainConfig, "max_new_tokens")]
SamplingTemperature = Annotated[Optional[float], _of(c.TrainConfig, "temperature")]
ScaleRewards = Annotated[Optional[str], _of(c.TrainConfig, "scale_rewards")]
Beta = Annotated[Optional[float], _of(c.TrainConfig, "beta")]
DpoLoss = Annotated[Optional[str], _of(c.TrainConfig, "dpo_loss")]
LabelSmoothing = Annotated[Optional[float], _of(c.TrainConfig, "label_smoothing")]
SftWeight = Annotated[Optional[float], _of(c.TrainConfig, "sft_weight")]
GoodWeight = Annotated[Optional[float], _of(c.TrainConfig, "good_weight")]
BadWeight = Annotated[Optional[float], _of(c.TrainConfig, "bad_weight")]
Full = Annotated[Optional[bool], _of(c.TrainConfig, "full", "--full/--no-full")]
Rank = Annotated[Optional[int], _of(c.TrainConfig, "rank")]
Alpha = Annotated[Optional[float], _of(c.TrainConfig, "alpha")]
Dropout = Annotated[Optional[float], _of(c.TrainConfig, "dropout")]
RsLora = Annotated[Optional[bool], _of(c.TrainConfig, "rslora", "--rslora/--no-rslora")]
Dora = Annotated[Optional[bool], _of(c.TrainConfig, "dora", "--dora/--no-dora")]
TargetModules = Annotated[Optional[list[str]], _of(c.TrainConfig, "target_modules", callback=_joined)]
ModulesToSave = Annotated[Optional[list[str]], _of(c.TrainConfig, "modules_to_save", metavar="NAMES",
                                                  callback=_joined)]
LearningRate = Annotated[Optional[float], _of(c.TrainConfig, "learning_rate", "--learning-rate", "--lr")]
BatchSize = Annotated[Optional[str], _of(c.TrainConfig, "batch_size", "--batch-size", "-b", metavar="N")]
Accumulation = Annotated[Optional[int], _of(c.TrainConfig, "accumulation")]
NumProcesses = Annotated[Optional[int], _of(c.TrainConfig, "num_processes")]
Strategy = Annotated[Optional[str], _of(c.TrainConfig, "strategy")]
Epochs = Annotated[Optional[float], _of(c.TrainConfig, "epochs", "--epochs", "-e")]
MaxSteps = Annotated[Optional[int], _of(c.TrainConfig, "max_steps")]
Warmup = Annotated[Optional[float], _of(c.TrainConfig, "warmup")]
Schedule = Annotated[Optional[str], _of(c.TrainConfig, "schedule")]
WeightDecay = Annotated[Optional[float], _of(c.TrainConfig, "weight_decay")]
Clip = Annotated[Optional[float], _of(c.TrainConfig, "clip")]
Dtype = Annotated[Optional[str], _of(c.TrainConfig, "dtype")]
QLora = Annotated[Optional[bool], _of(c.TrainConfig, "qlora", "--qlora/--no-qlora")]
MicroBatch = Annotated[Optional[int], _of(c.TrainConfig, "micro_batch")]
Checkpointing = Annotated[Optional[bool], _of(c.TrainConfig, "activation_checkpointing",
                                              "--activation-checkpointing/--no-activation-checkpointing")]
CudaGraphs = Annotated[Optional[bool], _of(c.TrainConfig, "cuda_graphs", "--cuda-graphs/--no-cuda-graphs")]
Compile = Annotated[Optional[bool], _of(c.TrainConfig, "compile", "--compile/--no-compile")]
EvalSteps = Annotated[Optional[int], _of(c.TrainConfig, "eval_steps")]
SaveSteps = Annotated[Optional[int], _of(c.TrainConfig, "save_steps")]
KeepCheckpoints = Annotated[Optional[int], _of(c.TrainConfig, "keep_checkpoints", metavar="N")]
Keep = Annotated[Optional[str], _of(c.TrainConfig, "keep")]
EarlyStopping = Annotated[Optional[int], _of(c.TrainConfig, "early_stopping")]
FromAdapter = Annotated[Optional[str], _of(c.TrainConfig, "from_adapter", metavar="ADAPTER")]
Continue = Annotated[bool, typer.Option("--continue", help="Go on from the end of the finished training, with more "
                                                           "--epochs or --max-steps, instead of starting anew.")]
Samples = Annotated[Optional[int], _of(c.TrainConfig, "samples")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what this would do, need and take; train nothing, write "
                                                        "nothing, and download no weights.")]
ReportTo = Annotated[Optional[list[str]], _of(c.TrainConfig, "report_to", metavar="NAMES", callback=_joined_lower)]
TrainSeed = Annotated[Optional[int], _of(c.TrainConfig, "seed")]

Minutes = Annotated[Optional[float], _of(c.TuneConfig, "minutes")]
LearningRates = Annotated[Optional[list[str]], _of(c.TuneConfig, "learning_rates", callback=_joined, metavar="RATES")]
Ranks = Annotated[Optional[list[str]], _of(c.TuneConfig, "ranks", callback=_joined, metavar="RANKS")]
ValidSequences = Annotated[Optional[int], _of(c.TuneConfig, "valid_sequences")]

Temperature = Annotated[Optional[float], _of(c.ChatConfig, "temperature", "--temperature", "-t")]
TopP = Annotated[Optional[float], _of(c.ChatConfig, "top_p")]
TopK = Annotated[Optional[int], _of(c.ChatConfig, "top_k")]
RepetitionPenalty = Annotated[Optional[float], _of(c.ChatConfig, "repetition_penalty")]
MaxNewTokens = Annotated[Optional[int], _of(c.ChatConfig, "max_new_tokens", "--max-new-tokens", "-n")]
System = Annotated[Optional[str], _of(c.ChatConfig, "system", "--system", "-s")]
Base = Annotated[Optional[bool], _of(c.ChatConfig, "base", "--base")]
Merged = Annotated[Optional[bool], _of(c.ChatConfig, "merged", "--merged")]
Use = Annotated[Optional[str], _of(c.ChatConfig, "use", "--use", "-u")]
Answering = Annotated[Optional[str], _of(c.ChatConfig, "quant", metavar="FORMAT")]
Compare = Annotated[Optional[bool], _of(c.ChatConfig, "compare", "--compare")]
Input = Annotated[Optional[str], typer.Option(
    "--input", "-i", metavar="FILE", show_default=False,
    help="Answer what this file asks, in batches: a prompt on each line, or an object with messages or a prompt (in "
         ".jsonl always); `-` is standard input.")]
SampleSeed = Annotated[Optional[int], _of(c.ChatConfig, "seed")]
Prompt = Annotated[Optional[str], typer.Option("--prompt", "-p", help="Answer this and leave.", show_default=False)]
Image = Annotated[Optional[list[str]], typer.Option(
    "--image", metavar="FILE", show_default=False,
    help="Show this picture with --prompt, or with the first question of a conversation. Can be given several times.")]

Questions = Annotated[Optional[int], _of(c.EvalConfig, "questions")]
EvalData = Annotated[Optional[str], _of(c.EvalConfig, "data", metavar="FILE")]
EvalPictures = Annotated[Optional[str], _of(c.EvalConfig, "pictures", metavar="DIR")]
Limit = Annotated[Optional[int], _of(c.EvalConfig, "limit", metavar="N")]
EvalReward = Annotated[Optional[list[str]], _of(c.EvalConfig, "reward", metavar="REWARDS")]
Tasks = Annotated[Optional[list[str]], _of(c.EvalConfig, "tasks", metavar="NAMES", callback=_joined)]
EvalSeed = Annotated[Optional[int], _of(c.EvalConfig, "seed")]
EvalTokens = Annotated[Optional[int], _of(c.EvalConfig, "max_new_tokens", "--max-new-tokens", "-n")]
MergeModel = Annotated[Optional[str], typer.Option(
    "--model", "-m", metavar="MODEL", show_default=False,
    help="The run's model: a Hugging Face id, a directory, a GGUF file, or `demo`. (default: the run's own, or the one "
         "that --adapter names)")]
MergeBase = Annotated[Optional[str], _of(c.MergeConfig, "base", metavar="MODEL")]
Adapter = Annotated[Optional[str], _of(c.MergeConfig, "adapter", metavar="DIR")]
MergedDtype = Annotated[Optional[str], _of(c.MergeConfig, "dtype")]
MaxShardSize = Annotated[Optional[str], _of(c.MergeConfig, "max_shard_size", metavar="SIZE")]
Check = Annotated[Optional[bool], _of(c.MergeConfig, "check", "--check/--no-check")]
CheckPrompts = Annotated[Optional[int], _of(c.MergeConfig, "check_prompts")]
Push = Annotated[Optional[str], _of(c.MergeConfig, "push", metavar="ACCOUNT/NAME")]
Private = Annotated[Optional[bool], _of(c.MergeConfig, "private", "--private/--public")]
Quant = Annotated[Optional[list[str]], _of(c.ExportConfig, "quant", "--quant", "-Q", callback=_joined_lower)]
Size = Annotated[Optional[str], _of(c.ExportConfig, "size", metavar="SIZE")]
Name = Annotated[Optional[str], _of(c.ExportConfig, "name")]
ExportSystem = Annotated[Optional[str], _of(c.ExportConfig, "system", "--system", "-s")]
NumCtx = Annotated[Optional[int], _of(c.ExportConfig, "num_ctx")]
Parameter = Annotated[Optional[list[str]], _of(c.ExportConfig, "parameter", metavar="NAME=VALUE")]
Calibration = Annotated[Optional[str], _of(c.ExportConfig, "calibration", metavar="FILE")]
NoCalibration = Annotated[bool, _off(c.ExportConfig, "calibration")]
Vision = Annotated[Optional[bool], _of(c.ExportConfig, "vision", "--vision/--no-vision")]
Measure = Annotated[Optional[bool], _of(c.ExportConfig, "measure", "--measure/--no-measure")]
Verify = Annotated[Optional[bool], _of(c.ExportConfig, "verify", "--verify/--no-verify")]
Converter = Annotated[Optional[str], _of(c.ExportConfig, "converter", metavar="PATH")]
Create = Annotated[Optional[bool], _of(c.ExportConfig, "create", "--create/--no-create")]
Host = Annotated[Optional[str], _of(c.ExportConfig, "host")]
AllowDifference = Annotated[Optional[bool], _of(c.ExportConfig, "allow_difference",
                                               "--allow-difference/--no-allow-difference")]
ExportPush = Annotated[Optional[str], _of(c.ExportConfig, "push", metavar="ACCOUNT/NAME")]
ExportPrivate = Annotated[Optional[bool], _of(c.ExportConfig, "private", "--private/--public")]
