"""Settings of what is made of an adapter: ``merge`` and ``export-ollama``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gemma_tune.base.words import shown, size_in_bytes
from gemma_tune.config.habits import number_format
from gemma_tune.config.settings import StageConfig, option
from gemma_tune.config.shared import MOST_TOKENS, private_option, push_option

MERGED_DTYPES = ("bf16", "fp16", "fp32")
# Number formats of GGUF files, the widest first; ``gguf.types`` says what they mean.
QUANTS = ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
          "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "mxfp4")


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
                                            "repeated.", auto="the base model's own sampling settings", prose=True,
                                     repeated=True)
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
