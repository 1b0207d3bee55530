"""Settings of ``train`` about what it learns: conversations, which of two answers is better, or what is rewarded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from gemma_tune.config import rewards
from gemma_tune.config.settings import option

METHODS = ("auto", "sft", "dpo", "orpo", "kto", "grpo")
BETA = 0.1  # what the papers of all three, and TRL, begin with
# What belongs to some methods alone.
OF_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dpo_loss", "label_smoothing", "sft_weight"), ("dpo",)),
    **dict.fromkeys(("good_weight", "bad_weight"), ("kto",)), "beta": ("dpo", "orpo", "kto", "grpo"),
    **dict.fromkeys(("reward", "answers", "max_new_tokens", "temperature", "scale_rewards"), ("grpo",))}
LEAST_BETA = 1e-4  # of these


@dataclass(frozen=True)
class MethodConfig:
    """How ``train`` learns. What stands here beside ``method`` is for preferences, or for rewards, alone."""

    method: str = option("auto", "What is learned: with `sft` to answer as the conversations do, with `dpo`, `orpo` or "
                                 "`kto` to prefer some answers to others, with `grpo` from rewards (--reward) of "
                                 "answers that the model samples itself. `auto` goes by the data: conversations sft, "
                                 "pairs dpo, answers that are good or bad kto.", choices=METHODS, group="common")
    reward: tuple[str, ...] = option((), "What GRPO scores answers by, with commas between or given several times, "
                                         "each perhaps with a weight, such as exact=1,json=0.5. Against the row's own "
                                         "answer: `exact`, `contains`, `number` (the last one in it), `chrf`; of the "
                                         "answer alone: `json`, `ended`, `regex:PATTERN`. `command:PROGRAM ARGS` asks "
                                         "a program of yours. A pattern or program goes on to the end of what the "
                                         "option is given, its weight stands before it, as in regex=0.5:PATTERN.",
                                     auto="none", apart=rewards.apart, repeated=True)
    answers: int = option(8, "Answers that GRPO samples for each prompt; they are compared with each other.", least=2,
                          most=64)
    max_new_tokens: int = option(256, "Longest answer in tokens that GRPO samples.", least=1, most=1 << 24)
    temperature: float = option(1.0, "Temperature that GRPO samples answers at; what they are learned by is divided by "
                                     "it as well.", least=0.01, most=100.0)
    scale_rewards: str = option("group", "What GRPO divides an answer's advantage by: with `group` by the standard "
                                         "deviation of the rewards of the answers to its prompt, with `none` by "
                                         "nothing, so that groups that differ little count little.",
                                choices=("group", "none"))
    beta: float | None = option(None, "How close DPO, KTO and GRPO stay to the model before (larger is closer); of "
                                      "ORPO the weight of the comparison. With 0 GRPO does not look at that model.",
                                least=0.0, most=100.0, auto=f"{BETA}, of GRPO 0")
    dpo_loss: str = option("sigmoid", "DPO's loss: `sigmoid` is the usual one, `ipo` stops pushing where the answers "
                                      "are far enough apart.", choices=("sigmoid", "ipo"))
    label_smoothing: float = option(0.0, "Share of the pairs that may be the wrong way round, for DPO's sigmoid loss.",
                                    least=0.0, most=0.49)
    sft_weight: float = option(0.0, "Weight of the plain loss of the chosen answers beside DPO's (RPO), which keeps "
                                    "them likely; ORPO has it anyway.", least=0.0, most=100.0)
    good_weight: float = option(1.0, "Weight of good answers in KTO.", least=0.0, most=100.0)
    bad_weight: float = option(1.0, "Weight of bad answers in KTO.", least=0.0, most=100.0)

    @property
    def strength(self) -> float:
        """``beta``, or its default."""
        usual = 0.0 if self.method == "grpo" else BETA
        return usual if self.beta is None else self.beta

    @property
    def prefers(self) -> bool:
        """Whether answers are compared, instead of learned."""
        return self.method in ("dpo", "orpo", "kto")

    def method_problems(self) -> list[str]:
        """Settings that the method does not have."""
        given = self.not_of(self.method)
        problems = [f"{name}: belongs to --method {' or '.join(OF_METHODS[name])}, and not to {self.method}"
                    for name in OF_METHODS if name in given]
        if self.beta is not None and self.beta < LEAST_BETA and self.prefers:
            problems.append(f"beta: {self.beta:g} is below the least possible {LEAST_BETA:g} of {self.method}")
        if self.dpo_loss == "ipo" and self.label_smoothing:
            problems.append("label_smoothing: the loss `ipo` has none")
        return problems + rewards.problems_of(self.reward)

    def not_of(self, method: str) -> dict[str, Any]:
        """Settings that are not at their defaults and that another method does not have: their defaults by name."""
        usual = {field.name: field.default for field in fields(MethodConfig)}
        return {name: usual[name] for name, methods in OF_METHODS.items()
                if method not in ("auto", *methods) and getattr(self, name) != usual[name]}

    def outdone_by_method(self, given: Collection[str], earlier: str) -> set[str]:
        """Settings of before that are not kept, as another method is asked for: those that it does not have, and
        ``beta`` where one of both learns from rewards, of which it is no usual part.

        Args:
            given: names of the settings that are given now.
            earlier: the method of before.
        """
        if "method" not in given or self.method == earlier:
            return set()
        of_rewards = {name for name, methods in OF_METHODS.items() if methods == ("grpo",)} | {"beta"}
        if self.method == "auto":  # what it comes to is seen later, and never are it rewards
            return of_rewards if earlier == "grpo" else set()
        return {name for name, methods in OF_METHODS.items() if self.method not in methods} | (
            {"beta"} if "grpo" in (self.method, earlier) else set())
