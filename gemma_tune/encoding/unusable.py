"""What is said of a chat template that cannot be used, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted
from gemma_tune.encoding.rendering import line_of
from gemma_tune.encoding.templates import ENDING_WITH_EOS, FOR_TURNS


def fitting(tokenizer: Any) -> str:
    """What `--chat-template` can be for a tokenizer."""
    names = [name for name, end in FOR_TURNS.items() if (end or tokenizer.eos_token) in tokenizer.added_tokens_encoder]
    return ", ".join([*names, "or a Jinja file"]) if names else "FILE, with Jinja in it"


@dataclass(frozen=True)
class Refusals:
    """The errors about one template.

    Args:
        tokenizer: the model's.
        named: what the template is called that somebody named; None of the model's own.
        has_own: whether the model has a template beside it.
    """

    tokenizer: Any
    named: str | None
    has_own: bool

    @property
    def called(self) -> str:
        """The template, in a sentence."""
        return "the model's chat template" if self.named is None else f"the chat template {self.named}"

    def unusable(self, error: BaseException) -> UserError:
        """Of one that cannot be compiled or rendered."""
        line = line_of(error)
        mend = "mend its chat_template.jinja, or give it another" if self.named is None else "mend it, or use another"
        return UserError(f"{self.called} cannot be used: {f'line {line}: ' if line else ''}{error}",
                         f"{mend}: gemma-tune prepare … --chat-template {fitting(self.tokenizer)}")

    def endless(self, mark: str, tokens: int, following: int | None) -> UserError:
        """Of one that writes no special token behind an answer.

        Args:
            mark: what it writes there, which is so many ``tokens`` of text; empty for nothing.
            following: what the next turn begins with, which the model is not known to stop at.
        """
        eos = self.tokenizer.eos_token
        what = (f"ends an assistant's turn with {mark!r}, which is no special token of this model but "
                f"{counted(tokens, 'token')} of text" if mark
                else "does not end an assistant's turn with a special token")
        own = "leave --chat-template out, as this model has a template; or " if self.named and self.has_own else ""
        other = (f"use --chat-template {ENDING_WITH_EOS}, or a Jinja file that writes eos_token behind an answer: both "
                 f"end it with this tokenizer's {eos}; or " if eos else "")
        fit = f"vocabulary has {mark}" if mark and self.named else "template marks the end of a turn"
        if following is not None:
            begins = self.tokenizer.convert_ids_to_tokens(following)
            other = (f"if the model stops by writing {begins}, which begins the next turn, add its id {following} to "
                     f"eos_token_id of generation_config.json; {other}")
        return UserError(f"{self.called} {what}, so a model trained on it could never stop",
                         f"{own}{other}train another model, one whose {fit}")

    def refuse_misfit(self, head: str, behind: str, asks: bool) -> None:
        """Find out that a template that people brought along is made for such a model.

        Args:
            head, behind: what the answer to learn would begin with, and end with before its special token.
            asks: whether a prompt ends otherwise than a conversation.

        Raises:
            UserError: the answer would have marks in it that are meant to stand around it.
        """
        if head.strip() and not asks:
            raise UserError(f"{self.called} does not ask for an answer (add_generation_prompt), so that each would "
                            f"begin with {head!r}", "let it end with what stands before an answer where "
                                                    "add_generation_prompt is true")
        if behind.strip():
            raise UserError(f"{self.called} writes {behind.strip()!r} behind an answer, which is no special token "
                            "of this model: it would be a part of each answer",
                            f"use a template that is made for its vocabulary, or --chat-template {ENDING_WITH_EOS}")
