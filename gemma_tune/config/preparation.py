"""Settings of ``prepare``: how data are read, and what of them is learned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from gemma_tune.base import shell
from gemma_tune.base.words import is_text_encoding, near, shown
from gemma_tune.config.most_rows import Most, most_rows, problems_of
from gemma_tune.config.settings import StageConfig, option
from gemma_tune.config.shared import LARGEST_SEED, MOST_TOKENS

FORMATS = ("messages", "alpaca", "sharegpt", "gemini", "prompt-completion", "columns", "rendered", "text",
           "preference")
COLUMN_ROLES = ("user", "assistant", "system", "context", "reasoning", "chosen", "rejected", "turns", "tools",
                "images")
_NOT_OF_PAIRS = ("assistant", "turns", "context", "reasoning", "images")
ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = ("role", "content")
_TABS = {"tab": "\t", "\\t": "\t"}  # how people write what a command line hardly takes
NO_TOKENS = "none"  # takes back new tokens that the run has
ALLOWABLE = ("placeholder", "control_character", "foreign_marker", "undeclared_tool")


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
    new_tokens: tuple[str, ...] = option((), "Words of one's own, such as <plan>,<act>, that the model is to read and "
                                             "write as single tokens. They take entries of its vocabulary that are "
                                             "unused, such as Gemma's <unused0>, and are learned by `train`; `none` "
                                             "is without.",
                                         auto="none", group="advanced")
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
        problems += self._new_token_problems()
        if isinstance(self.valid, str) and self.valid.endswith("%"):
            problems.append(f"valid: write {self.valid} as a share below 1, such as 0.1")
        if isinstance(self.valid, float) and (0.9 < self.valid < 1 or self.valid >= 1 and self.valid % 1):
            problems.append(f"valid: {self.valid:g} is neither a share up to 0.9, nor a whole number of rows, nor a "
                            "file")
        return problems

    def _new_token_problems(self) -> list[str]:
        """What is wrong with names of new tokens, whatever the model."""
        names = self.new_tokens
        problems = [f"new_tokens: {shown(name)} has white space in it" for name in names if any(map(str.isspace, name))]
        problems += [f"new_tokens: {shown(name)} is named {count} times" for name, count in Counter(names).items()
                     if count > 1]
        if NO_TOKENS in names and len(names) > 1:
            problems.append(f"new_tokens: `{NO_TOKENS}` stands alone, or tokens are named")
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
