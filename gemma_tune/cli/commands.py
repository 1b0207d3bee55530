"""The command line: options become settings, a stage runs, its result is shown. Stages are imported when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_tune import __version__
from gemma_tune.base.errors import WORK_FAILED, UserError
from gemma_tune.cli import console, screen
from gemma_tune.cli import options as o
from gemma_tune.cli.invocation import Command, Commands
from gemma_tune.cli.request import Request, as_json, finish, in_processes, prepare_first, show_plan
from gemma_tune.run.directory import command

if TYPE_CHECKING:
    from gemma_tune.run.stage import StageReport

app = typer.Typer(
    name="gemma-tune", cls=Commands, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False, pretty_exceptions_short=True,
    help="From your own data to a fine-tuned Gemma (or another Hugging Face chat model) running in Ollama.",
    epilog="On your own data: gemma-tune run chats.jsonl --model google/gemma-3-270m-it\n\n"
           "Just to see it: gemma-tune run --model demo\n\n"
           "Does it work here: gemma-tune doctor --model google/gemma-3-270m-it")


def _version(wanted: bool) -> None:
    if wanted:
        screen.result(f"gemma-tune {__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Show the version.")] = False) -> None:
    pass


@app.command(cls=Command)
def prepare(ctx: typer.Context, data: o.Data = None, model: o.Model = None, revision: o.Revision = None,
            run: o.Run = None, format: o.Format = None, columns: o.Columns = None, roles: o.Roles = None,
            turn_keys: o.TurnKeys = None, delimiter: o.Delimiter = None, encoding: o.Encoding = None,
            take: o.Take = None, pictures: o.Pictures = None, train_on: o.TrainOn = None,
            chat_template: o.ChatTemplate = None, new_tokens: o.NewTokens = None, thinking: o.Thinking = None,
            valid: o.Valid = None, max_samples: o.MaxSamples = None, max_length: o.MaxLength = None,
            on_long: o.OnLong = None, on_uneven: o.OnUneven = None, seed: o.SplitSeed = None,
            duplicates: o.Duplicates = None, near_duplicates: o.NearDuplicates = None,
            near_threshold: o.NearThreshold = None, allow: o.Allow = None, on_bad_row: o.OnBadRow = None,
            max_rejected: o.MaxRejected = None, preview: o.Preview = 0, force: o.Force = False,
            quiet: o.Quiet = False, json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Check your conversations, label and tokenise them, and split them into training and validation.

    Reads JSONL, JSON, CSV, TSV, Parquet and Arrow: messages, Alpaca, ShareGPT, prompt/completion, plain text. Writes
    data/train.jsonl, data/valid.jsonl, data/rejected.jsonl (with file, line and reason), data/duplicates.jsonl and a
    report on lengths and findings. Begins the run.

    Example: gemma-tune prepare chats.jsonl --model google/gemma-3-270m-it --preview 3
    """
    from gemma_tune.prepare.stage import prepare as stage

    request = Request.of(ctx)
    report = request.run("prepare", lambda session: stage(session, preview))
    finish(request, report, (command("train", report.run),))


@app.command(cls=Command)
def train(ctx: typer.Context, data: o.TrainData = None, model: o.Model = None, revision: o.Revision = None,
          run: o.Run = None, method: o.Method = None, reward: o.Reward = None, answers: o.Answers = None,
          max_new_tokens: o.SampledTokens = None, temperature: o.SamplingTemperature = None,
          scale_rewards: o.ScaleRewards = None, beta: o.Beta = None, dpo_loss: o.DpoLoss = None,
          label_smoothing: o.LabelSmoothing = None, sft_weight: o.SftWeight = None, good_weight: o.GoodWeight = None,
          bad_weight: o.BadWeight = None, full: o.Full = None, rank: o.Rank = None, alpha: o.Alpha = None,
          dropout: o.Dropout = None, rslora: o.RsLora = None, dora: o.Dora = None,
          target_modules: o.TargetModules = None, modules_to_save: o.ModulesToSave = None,
          learning_rate: o.LearningRate = None, batch_size: o.BatchSize = None, accumulation: o.Accumulation = None,
          num_processes: o.NumProcesses = None, strategy: o.Strategy = None, epochs: o.Epochs = None,
          max_steps: o.MaxSteps = None, warmup: o.Warmup = None, schedule: o.Schedule = None,
          weight_decay: o.WeightDecay = None, clip: o.Clip = None, dtype: o.Dtype = None, qlora: o.QLora = None,
          micro_batch: o.MicroBatch = None, activation_checkpointing: o.Checkpointing = None,
          cuda_graphs: o.CudaGraphs = None, compile: o.Compile = None, eval_steps: o.EvalSteps = None,
          save_steps: o.SaveSteps = None, keep_checkpoints: o.KeepCheckpoints = None, keep: o.Keep = None,
          early_stopping: o.EarlyStopping = None, samples: o.Samples = None, report_to: o.ReportTo = None,
          from_adapter: o.FromAdapter = None, seed: o.TrainSeed = None, go_on: o.Continue = False,
          dry_run: o.DryRun = False, force: o.Force = False, quiet: o.Quiet = False, json: o.Json = False,
          config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Train a LoRA adapter, or with --full all weights, on the prepared conversations or pairs of answers.

    Reads what `prepare` wrote; with DATA it prepares that first. Only the assistant's turns are learned, each with its
    end; from pairs, to prefer the chosen answers to the rejected ones (--method), and with `grpo` from what the model
    answers itself, by its --reward. Writes the adapter in standard PEFT form, checkpoints in training_checkpoints/, and
    logs/. Interrupted, the same command goes on; a finished one does with --continue and more --epochs. With --dry-run
    it only shows steps, memory and time.

    Example: gemma-tune train --epochs 3 --learning-rate 1e-4
    """
    request = Request.of(ctx)
    if not dry_run:
        request = in_processes(request)
    from gemma_tune.merge.base import next_step
    from gemma_tune.train.stage import plan_training
    from gemma_tune.train.stage import train as stage

    if dry_run:
        return show_plan(request, lambda session: plan_training(session, go_on))
    request, prepared = prepare_first(request, go_on) if data else (request, {})
    report, following = request.run("train", lambda session: (stage(session, go_on), next_step(session)))
    finish(request, report, tuple(dict.fromkeys((command("chat", report.run), following))), **prepared)


@app.command(cls=Command)
def tune(ctx: typer.Context, model: o.RunsModel = None, run: o.Run = None, minutes: o.Minutes = None,
         learning_rates: o.LearningRates = None, ranks: o.Ranks = None, valid_sequences: o.ValidSequences = None,
         method: o.Method = None, full: o.Full = None, batch_size: o.BatchSize = None, epochs: o.Epochs = None,
         dtype: o.Dtype = None, qlora: o.QLora = None, seed: o.TrainSeed = None, force: o.Force = False,
         quiet: o.Quiet = False, json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Find the learning rate, and the rank, that suits the prepared data, before a long training.

    Reads what `prepare` wrote. Trains several candidates for a few steps, the better half of them for longer, and so
    on, within --minutes, and compares their validation losses. Writes tune.yaml, which `train --config` takes,
    tune.json and logs/tune.png. Interrupted, the same command goes on. The run's adapter stays as it is.

    Example: gemma-tune tune --minutes 20 --ranks 8,32
    """
    from gemma_tune.train.tune import tune as stage

    request = Request.of(ctx)
    settings = request.settings("tune")
    report = request.run("train", lambda session: stage(session, settings))
    finish(request, report, (command("train", report.run, "--config", report.artifacts["settings"]),))


@app.command(cls=Command)
def chat(ctx: typer.Context, model: o.RunsModel = None, run: o.Run = None, prompt: o.Prompt = None,
         image: o.Image = None, input: o.Input = None, system: o.System = None, use: o.Use = None,
         base: o.Base = None, merged: o.Merged = None, quant: o.Answering = None, compare: o.Compare = None,
         temperature: o.Temperature = None, top_p: o.TopP = None, top_k: o.TopK = None,
         repetition_penalty: o.RepetitionPenalty = None, max_new_tokens: o.MaxNewTokens = None,
         seed: o.SampleSeed = None, dtype: o.Dtype = None, quiet: o.Quiet = False, json: o.Json = False,
         config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Talk to the tuned model, or with --base to the untuned one, or with --compare to both.

    Reads the base model and the adapter, or what was made of them (--use). On a terminal it is a conversation, in which
    /help lists the commands; with --prompt it answers once; otherwise every line of --input or of standard input, a
    prompt or a JSON object with messages, gets its own answer on standard output.

    Example: gemma-tune chat --prompt "What is EBITDA?"
    """
    from gemma_tune.chat.conversation import open_conversation
    from gemma_tune.chat.pictures import require_picture
    from gemma_tune.cli.chat.loop import converse
    from gemma_tune.cli.chat.scripts import all_of, one_prompt

    request = Request.of(ctx)
    talking = _is_talk(prompt, input, json)
    if image and prompt is None and not talking:
        raise UserError("--image needs the question about it", 'add it: --prompt "What is this?"; rows of --input name '
                        'their own pictures: {"prompt": "…", "images": ["a.png"]}')
    pictures = [require_picture(name) for name in image or ()]
    session = request.open("chat")
    if talking:
        return converse(session, pictures)
    conversation = open_conversation(session)
    try:
        if prompt is None:
            all_of(conversation, input, json)
        else:
            one_prompt(conversation, prompt, json, pictures)
    finally:
        conversation.close()


def _is_talk(prompt: str | None, input: str | None, json: bool) -> bool:
    """Whether somebody talks on a terminal.

    Raises:
        UserError: what asks the questions is unclear, or cannot be read.
    """
    import sys

    from gemma_tune.chat.scripts import open_input

    if prompt is not None and not prompt.strip():
        raise UserError("--prompt has no text", 'write a question: gemma-tune chat --prompt "…"')
    if prompt is not None and input is not None:
        raise UserError("--prompt and --input exclude each other", "use one of them")
    if prompt is None and input in (None, "-") and sys.stdin is None:
        raise UserError("standard input is closed, so there are no prompts to read",
                        'name one: gemma-tune chat --prompt "…"')
    if input not in (None, "-"):
        open_input(input)[0].close()  # before a model is loaded
    return prompt is None and input is None and screen.stdin_is_terminal() and not json


@app.command("eval", cls=Command)
def evaluate(ctx: typer.Context, model: o.RunsModel = None, run: o.Run = None, data: o.EvalData = None,
             pictures: o.EvalPictures = None, limit: o.Limit = None, questions: o.Questions = None,
             max_new_tokens: o.EvalTokens = None, reward: o.EvalReward = None, tasks: o.Tasks = None,
             seed: o.EvalSeed = None, dtype: o.Dtype = None, force: o.Force = False, quiet: o.Quiet = False,
             json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Compare the base and the tuned model on held-out rows: losses, and answers side by side.

    Reads the adapter and data/valid.jsonl, or with --data other rows. Writes report.md, answers.json and report.html,
    which shows the whole run. Each figure has a 95 % interval. General text tells what the model lost.

    Example: gemma-tune eval --data held-out.jsonl --questions 50
    """
    from gemma_tune.evaluate.stage import evaluate as stage
    from gemma_tune.merge.base import next_step

    request = Request.of(ctx)
    report, following = request.run("eval", lambda session: (stage(session), next_step(session)))
    if not quiet:
        console.comparison(report.summary["answers"])
    finish(request, report, (following,))


@app.command(cls=Command)
def merge(ctx: typer.Context, model: o.MergeModel = None, revision: o.Revision = None, run: o.Run = None,
          adapter: o.Adapter = None, base: o.MergeBase = None, dtype: o.MergedDtype = None,
          max_shard_size: o.MaxShardSize = None, check: o.Check = None, check_prompts: o.CheckPrompts = None,
          push: o.Push = None, private: o.Private = None, force: o.Force = False, quiet: o.Quiet = False,
          json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Add the adapter to the 16-bit base model.

    Reads the adapter and the base model. Writes <model name>_lora_merged/, a checkpoint that plain transformers loads,
    and checks that it answers as base plus adapter does. With --adapter it takes a PEFT adapter that was trained
    elsewhere, and needs no training before.

    Example: gemma-tune merge --push my-account/my-model
    """
    from gemma_tune.merge.stage import merge as stage
    from gemma_tune.report.page import renew_report

    request = Request.of(ctx)
    report = request.run("merge", stage)
    renew_report(report.run)
    finish(request, report, (command("export-ollama", report.run),), **_pushed(report))


@app.command("export-ollama", cls=Command)
def export_ollama(ctx: typer.Context, model: o.RunsModel = None, run: o.Run = None, quant: o.Quant = None,
                  size: o.Size = None, name: o.Name = None, system: o.ExportSystem = None,
                  parameter: o.Parameter = None,
                  num_ctx: o.NumCtx = None, calibration: o.Calibration = None, no_calibration: o.NoCalibration = False,
                  vision: o.Vision = None, measure: o.Measure = None, verify: o.Verify = None,
                  converter: o.Converter = None, create: o.Create = None, host: o.Host = None,
                  allow_difference: o.AllowDifference = None, push: o.ExportPush = None,
                  private: o.ExportPrivate = None, force: o.Force = False, quiet: o.Quiet = False,
                  json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """Write GGUF files and a Modelfile, check them, and create the model in Ollama.

    Reads the merged model. Writes ollama/<model name>-<quant>.gguf, ollama/Modelfile and ollama/report.md with what
    each number format loses and how the token ids compare; of a model that takes pictures also what it sees with, as
    ollama/mmproj-<model name>-f16.gguf. Without an Ollama server all are made, and the command to
    type later is shown. The same file runs in llama.cpp, LM Studio and Jan.

    Example: gemma-tune export-ollama --quant q8_0,q4_k_m --name my-analyst
    """
    from gemma_tune.export.stage import export as stage
    from gemma_tune.report.page import renew_report

    request = Request.of(ctx)
    done = request.run("export-ollama", stage)
    renew_report(done.stage.run)
    finish(request, done.stage, done.next_steps, done.elsewhere, **done.as_json(), **_pushed(done.stage))


def _pushed(report: StageReport) -> dict[str, str]:
    """Where a stage's result was published, for ``--json``."""
    return {"pushed": report.summary["pushed"]} if "pushed" in report.summary else {}


@app.command("run", cls=Command)
def run_all(ctx: typer.Context, data: o.Data = None, model: o.Model = None, revision: o.Revision = None,
            run: o.Run = None, format: o.Format = None, columns: o.Columns = None, roles: o.Roles = None,
            turn_keys: o.TurnKeys = None, pictures: o.Pictures = None, chat_template: o.ChatTemplate = None,
            valid: o.Valid = None, max_samples: o.MaxSamples = None, max_length: o.MaxLength = None,
            on_long: o.OnLong = None, on_uneven: o.OnUneven = None, method: o.Method = None,
            reward: o.Reward = None, full: o.Full = None, rank: o.Rank = None,
            learning_rate: o.LearningRate = None, batch_size: o.BatchSize = None,
            accumulation: o.Accumulation = None, epochs: o.Epochs = None, max_steps: o.MaxSteps = None,
            qlora: o.QLora = None, micro_batch: o.MicroBatch = None,
            activation_checkpointing: o.Checkpointing = None, report_to: o.ReportTo = None,
            questions: o.Questions = None, quant: o.Quant = None, name: o.Name = None,
            create: o.Create = None, host: o.Host = None, force: o.Force = False, quiet: o.Quiet = False,
            json: o.Json = False, config: o.ConfigFile = None, debug: o.Debug = False) -> None:
    """All stages in order: prepare, train, eval, merge, export-ollama.

    Reads your data; writes everything the single commands write, and ends with base and tuned answers side by side.
    Stages that are up to date are skipped. Settings that are no option here come from a --config file.

    Example: gemma-tune run chats.jsonl --model google/gemma-3-270m-it
    """
    from gemma_tune.cli.pipeline import run_pipeline

    stages, exported = run_pipeline(Request.of(ctx))
    steps = (command("chat", exported.stage.run), *exported.next_steps)
    if not quiet:
        console.run_summary(stages, steps, exported.advice, exported.elsewhere)
    if json:
        done = any(report.status == "done" for report in stages.values())
        screen.result_json({"stage": "run", "status": "done" if done else "up-to-date",
                            "run": str(exported.stage.run), "next": list(steps), "warnings": list(screen.warnings),
                            **exported.as_json(), "stages": {n: as_json(r) for n, r in stages.items()}})


@app.command(cls=Command)
def status(ctx: typer.Context, model: o.RunsModel = None, run: o.Run = None, verify: o.VerifyFiles = False,
           json: o.Json = False, debug: o.Debug = False) -> None:
    """What a run has, with its figures and sizes, what is stale, and what to type next.

    Reads the manifest and the files it names; what is large is read with --verify alone. Writes nothing but the new
    time stamps of a run that was copied, and the record of what a killed command had finished. Exit code 1 if --verify
    finds damage.

    Example: gemma-tune status
    """
    from gemma_tune.cli.run_tables import show_status
    from gemma_tune.cli.status import describe_run

    found = describe_run(run, model, verify, console.ConsoleListener())
    show_status(found)
    if json:
        screen.result_json(found.as_json())
    if verify and found.damaged:
        raise typer.Exit(WORK_FAILED)


@app.command(cls=Command)
def doctor(ctx: typer.Context, model: o.DoctorModel = None, revision: o.Revision = None, json: o.Json = False,
           debug: o.Debug = False) -> None:
    """Try what a training needs on this machine, and say what is broken and what mends it.

    Reads a model's configuration and tokenizer, which are downloaded where it comes from the Hub; no weights. Computes
    a matrix product and training steps on each device, and asks the Hub, an Ollama server and llama.cpp. Writes nothing
    but to the caches. Exit code 1 if something that the model needs is broken.

    Example: gemma-tune doctor --model google/gemma-3-270m-it
    """
    from gemma_tune.cli.examination import show

    show(model, revision, json, debug)


@app.command(cls=Command)
def runs(ctx: typer.Context, folder: o.RunsFolder = None, json: o.Json = False, debug: o.Debug = False) -> None:
    """List the runs with their models, data, loss, size and age, the newest first.

    Reads the manifests of the runs. Writes nothing. A command that names neither --run nor --model works on the newest
    one under runs/.

    Example: gemma-tune runs
    """
    from pathlib import Path

    from gemma_tune.cli.run_tables import show_runs
    from gemma_tune.cli.runs import list_runs, to_start
    from gemma_tune.run.directory import RUNS

    place = Path(folder).expanduser() if folder else RUNS
    found = list_runs(place)
    if found:
        show_runs(found)
    else:
        screen.err.print(f"there is no run under {place}/ yet; start one: {to_start(place)}", markup=False)
    if json:
        screen.result_json({"runs": [run.as_json() for run in found]})
