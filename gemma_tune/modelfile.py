"""Ollama's side of a chat template, and the text of a Modelfile.

A model answers well only to prompts laid out as in its training. Hugging Face lays them out with a Jinja template and
Ollama with a Go one, so the second is derived from the first: the Jinja template is rendered on short conversations of
marker words, what stands around each turn is read off and written as a Go TEMPLATE, and the two are compared on further
conversations. A template that cannot be matched is refused, instead of exporting a model that answers oddly.

Sources: Ollama's `template/template.go` (`.System` joins all system messages, `.Messages` holds them as well,
neighbours of one role are merged, and a template that uses `.Messages` needs no `.Response`), `parser/parser.go` (the
grammar), `api/types.go` (parameters). A TEMPLATE never holds the BOS token: the tokenizer adds it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_tune.errors import UserError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class OllamaChat:
    """How Ollama lays out a conversation for one model.

    Args:
        template: the Go TEMPLATE; None where a renderer built into Ollama does the work.
        stops: texts that end an answer.
        renderer: name of Ollama's built-in renderer, or None.
        parser: name of Ollama's built-in parser of answers, or None.
        default_system: what the Jinja template says where a conversation has no system message; belongs in SYSTEM.
        family: "gemma", "gemma4", "chatml", "llama3", or "other" (derived, no marker known).
        notes: differences between the two templates that could not be closed, one sentence each.
    """

    template: str | None
    stops: tuple[str, ...]
    renderer: str | None = None
    parser: str | None = None
    default_system: str | None = None
    family: str = "other"
    notes: tuple[str, ...] = ()


# What opens a turn, the family it belongs to, and what ends an answer there. Looked for in this order.
FAMILIES = (
    ("<|turn>", "gemma4", "<turn|>"),
    ("<start_of_turn>", "gemma", "<end_of_turn>"),
    ("<|im_start|>", "chatml", "<|im_end|>"),
    ("<|start_header_id|>", "llama3", "<|eot_id|>"),
)


def chat_for(chat_template_jinja: str, family_hint: str | None = None, *, eos_token: str | None = None) -> OllamaChat:
    """Ollama's settings for the model that was saved with this Jinja template.

    Args:
        chat_template_jinja: the template as it was saved with the model.
        family_hint: a name for the messages; it never decides anything.
        eos_token: needed by the few templates that print `eos_token`.

    Raises:
        UserError: the template cannot be reproduced in Ollama.
    """
    family, stop = next(((f, s) for mark, f, s in FAMILIES if mark in chat_template_jinja), ("other", ""))
    if family == "gemma4":  # Ollama ignores TEMPLATE there; "gemma4" picks the small or large layout by itself
        return OllamaChat(None, (stop,), renderer="gemma4", parser="gemma4", family=family)
    try:
        jinja = _Jinja(chat_template_jinja, eos_token or _EOS)
        turns = _read_turns(jinja)
        notes = _compare(jinja, turns)
        ending = turns.assistant[1].strip()
        if not ending:
            raise _Unlike("nothing marks the end of an answer")
    except (_Unlike, TemplateError) as error:
        raise UserError(
            f"the chat template of {family_hint or 'this model'} cannot be turned into an Ollama TEMPLATE: {error}",
            "Write a TEMPLATE by hand (https://docs.ollama.com/template), then run `ollama create NAME -f Modelfile`.",
        ) from error
    if "strftime_now(" in chat_template_jinja:
        notes += ("The template prints the date; Ollama has no dates, so the day of the export stays in the prompt.",)
    stop = stop if stop and stop in ending else ending
    return OllamaChat(turns.go(), (stop,), default_system=turns.default_system, family=family, notes=notes)


# --- the Jinja side -------------------------------------------------------------------------------------------------

_BOS, _EOS = "[[bos]]", "[[eos]]"  # stand in for the tokens' texts, so that they can be told from the rest
_LITERAL_BOS = ("<bos>", "<|begin_of_text|>", "<s>")  # templates that spell BOS out
_SYSTEM, _FIRST, _REPLY, _SECOND = "Zsystem", "Zfirst", "Zreply", "Zsecond"
# Exactly what Jinja's `trim` removes: the characters for which str.isspace() holds.
_EN_QUAD_TO_HAIR_SPACE = "".join(map(chr, range(0x2000, 0x200B)))
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680" + _EN_QUAD_TO_HAIR_SPACE + "\u2028\u2029\u202f\u205f\u3000"


class _Unlike(Exception):
    """The Jinja template does something that turns with fixed surroundings cannot express."""


class _Generation(Extension):
    """TRL's training templates mark what is trained with {% generation %}; rendered, it is no more than its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Jinja:
    """Renders as Transformers' apply_chat_template does, less the BOS token. Sandboxed: templates come from the Hub."""

    def __init__(self, source: str, eos_token: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
        self.template, self.eos_token = environment.from_string(source), eos_token
        self.knows_system = self._knows_system()

    def __call__(self, messages: Messages, generation: bool = True) -> str:
        names = {"add_generation_prompt": generation, "bos_token": _BOS, "eos_token": self.eos_token}
        try:
            text = self.template.render(messages=messages, **names)
        except TemplateError:
            raise
        except Exception as error:  # whatever a template from the Hub does with a plain conversation
            raise _Unlike(f"it fails on a plain conversation ({error})") from error
        for bos in (_BOS, *_LITERAL_BOS):
            text = text.removeprefix(bos)
        return text

    def _knows_system(self) -> bool:
        try:
            self(_talk(_FIRST, system=_SYSTEM))
        except TemplateError:  # Gemma 1 and 2: "System role not supported"
            return False
        return True


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(*contents: str, system: str | None = None) -> Messages:
    turns = [_message("assistant" if number % 2 else "user", text) for number, text in enumerate(contents)]
    return turns if system is None else [_message("system", system), *turns]


# --- what stands around the turns -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turns:
    """The surroundings (before, after) of each kind of turn.

    Args:
        user, assistant, system: around a message; system is None where the template has no such turn.
        fold: around the system text inside the first user turn, where that is its place.
        fold_first: the project joins `system`, a blank line and the user's text *before* the template sees (and trims)
            them, since the template refuses system messages.
        opening: what stands first if there is no system message.
        prompt: what asks for the answer.
        trims: roles whose content loses the white space around it.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None = None
    fold: tuple[str, str] | None = None
    fold_first: bool = False
    opening: str = ""
    default_system: str | None = None
    trims: frozenset[str] = frozenset()

    def render(self, messages: Messages) -> str:
        """What Ollama makes of the messages with the template that `go` writes; tests hold the two together."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system") or self.default_system or ""
        if system and messages[0]["role"] != "system":  # Ollama puts the model's SYSTEM in front
            messages = [_message("system", system), *messages]
        parts = [] if system else [self.opening]
        for message in messages:
            around = getattr(self, message["role"])
            content = self._trimmed(message["role"], message["content"])
            if message["role"] == "user" and system and self.fold:
                if self.fold_first:
                    content = self._trimmed("user", system + self.fold[1] + message["content"])
                else:
                    content = self._trimmed("system", system).join(self.fold) + content
                system = ""
            if around:
                parts.append(content.join(around))
        return "".join([*parts, self.prompt])

    def _trimmed(self, role: str, text: str) -> str:
        return text.strip() if role in self.trims else text

    def go(self) -> str:
        """The Go TEMPLATE. `{{-` eats the line break before it, so it never follows text that must stay."""
        branches = [("user", self.user, self._go_user())]
        for role in ("assistant", "system"):
            if around := getattr(self, role):
                branches.append((role, around, self._go_put(role, ".Content")))
        body, test = "", "{{- if"
        for role, (before, after), content in branches:
            before, after = _go_text(before), _go_text(after)
            body += f'{test} eq .Role "{role}" ' + "}}" + before + content + after
            test = "{{ else if"
        lines = [_go_trim()] if self.trims else []
        lines += ["{{- $system := .System }}"] if self.fold else []
        lines += ["{{- if not .System }}" + _go_text(self.opening) + "{{ end }}"] if self.opening else []
        lines += ["{{- range .Messages }}", body + "{{ end }}", "{{- end }}" + _go_text(self.prompt, last=True)]
        return "\n".join(lines)

    def _go_put(self, role: str, value: str) -> str:
        return "{{ " + (f'template "trim" {value}' if role in self.trims else value) + " }}"

    def _go_user(self) -> str:
        content = self._go_put("user", ".Content")
        if not self.fold:
            return content
        done = '{{ $system = "" }}'
        if self.fold_first:
            joined = self._go_put("user", f"(print $system {_go_string(self.fold[1])} .Content)")
            return "{{ if $system }}" + joined + done + "{{ else }}" + content + "{{ end }}"
        before, after = map(_go_text, self.fold)
        return "{{ if $system }}" + before + self._go_put("system", "$system") + after + done + "{{ end }}" + content


def _read_turns(jinja: _Jinja) -> _Turns:
    """Takes the surroundings from renderings of marker words.

    Raises:
        _Unlike: a marker is missing, or what stands around it changes with its place.
    """
    lead, first_end = _split(jinja(_talk(_FIRST)), _FIRST)
    _, to_reply, to_second, _ = _split(jinja(_talk(_FIRST, _REPLY, _SECOND)), _FIRST, _REPLY, _SECOND)
    user_after = _turn_end(jinja, _talk(_FIRST), first_end)
    reply_after = _turn_end(jinja, _talk(_FIRST, _REPLY), to_second)
    user_before = _without(to_second, reply_after)
    if not lead.endswith(user_before) or not user_before:
        raise _Unlike("later user turns are not written like the first")
    turns = _Turns(
        user=(user_before, user_after),
        assistant=(_without(to_reply, user_after), reply_after),
        prompt=_without(first_end, user_after),
        opening=lead.removesuffix(user_before),
        trims=frozenset(role for role in ("user", "assistant", "system") if _trims(jinja, role)),
        **_system_place(jinja, user_before),
    )
    text = repr(turns)
    if any(bos in text for bos in (_BOS, *_LITERAL_BOS)):
        raise _Unlike("it prints BOS between turns, while Ollama has one at the start")
    if jinja.eos_token == _EOS and _EOS in text:
        raise _Unlike("it prints eos_token, which was not given")
    return _with_default_system(turns)


def _split(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise _Unlike("a message is missing from what it renders")
        parts.append(before)
    return [*parts, text]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Unlike(f"a turn does not always end in {start!r}")
    return text.removeprefix(start)


def _turn_end(jinja: _Jinja, messages: Messages, followed: str) -> str:
    """What ends the last message; some templates add EOS where no answer is asked for, which is no part of the turn."""
    end = _split(jinja(messages, generation=False), messages[-1]["content"])[1]
    return end if followed.startswith(end) else end.removesuffix(jinja.eos_token)


def _system_place(jinja: _Jinja, user_before: str) -> dict:
    if not jinja.knows_system:
        return {"fold": ("", "\n\n"), "fold_first": True}
    before, after, _ = _split(jinja(_talk(_FIRST, system=_SYSTEM)), _SYSTEM, _FIRST)
    if after.endswith(user_before):
        return {"system": (before, after.removesuffix(user_before))}
    return {"fold": (_without(before, user_before), after)}


def _trims(jinja: _Jinja, role: str) -> bool:
    """Whether white space around a message of this role is dropped; partly dropped counts as kept (see `_compare`)."""
    if role == "system" and not jinja.knows_system:
        return False
    plain = _talk(_FIRST, _REPLY, _SECOND, system=_SYSTEM if role == "system" else None)
    padded = [{**m, "content": f" \n{m['content']}\u3000\n"} if m["role"] == role else m for m in plain]
    return jinja(padded) == jinja(plain)


def _with_default_system(turns: _Turns) -> _Turns:
    """An opening that is a system turn with words in it is a default system prompt, which Ollama keeps in SYSTEM."""
    opening, (before, after) = turns.opening, turns.system or ("", "")
    inner = opening[len(before) : len(opening) - len(after)]
    if turns.system and inner and opening == inner.join(turns.system):
        return replace(turns, opening="", default_system=inner)
    return turns


def _compare(jinja: _Jinja, turns: _Turns) -> tuple[str, ...]:
    """Holds the two against each other on conversations that `_read_turns` did not use.

    Raises:
        _Unlike: they differ in more than the white space around a message.
    """

    def same(*contents: str, system: str | None = None) -> bool:
        folded = turns.fold_first and system is not None
        asked = _talk(f"{system}\n\n{contents[0]}", *contents[1:]) if folded else _talk(*contents, system=system)
        return jinja(asked) == turns.render(_talk(*contents, system=system))

    for contents in (("Hi",), ("Hi 👩‍👩‍👧", "你好。", "{{ a }}\n\n<b>"), ("a", "b", "c", "d", "e")):
        for system in (None, "Be brief.\n\nAnswer in 中文."):
            if not same(*contents, system=system):
                raise _Unlike(f"a conversation with{'' if system else 'out'} a system message comes out differently")
    padded = (" \n hi\t", "\n yes \n", "\u3000so?\n")
    if same(*padded) and same(*padded, system="\n be brief "):
        return ()
    return ("White space at the start or end of a message is not treated as in training.",)


# --- Go template text -----------------------------------------------------------------------------------------------


def _go_string(text: str) -> str:
    def escaped(char: str) -> str:
        if char in '\\"' or char in "\n\t":
            return {"\n": r"\n", "\t": r"\t"}.get(char, "\\" + char)
        return char if char.isprintable() else f"\\u{ord(char):04x}" if char <= "\uffff" else f"\\U{ord(char):08x}"

    return '"' + "".join(map(escaped, text)) + '"'


def _go_text(text: str, last: bool = False) -> str:
    """Text as it is; as a quoted string where it could be misread, or lost to an editor that strips a file's end."""
    plain = "{{" not in text and '"""' not in text and not lossy_runes(text) and not (last and text != text.rstrip())
    return text if plain else f"{{{{ {_go_string(text)} }}}}"


def _go_trim() -> str:
    """Two recursive templates that print their argument without the white space around it.

    Go's text/template has no trim function and Ollama adds none, but `slice` cuts strings by bytes and `eq` compares
    with many at once, so each step drops one space of 1, 2 or 3 bytes. (100,000 in a row are too many for Go.)
    """

    def define(name: str, edge: str, rest: str, otherwise: str) -> str:
        cases = "if"
        for n in "123":
            spaces = " ".join(_go_string(c) for c in SPACES if len(c.encode()) == int(n))
            cases += f" and (ge (len .) {n}) (eq ({edge.replace('N', n)}) {spaces}) " + "}}"
            cases += '{{ template "' + name + '" (' + rest.replace("N", n) + ") }}{{ else if"
        return '{{- define "' + name + '" }}{{ ' + cases.removesuffix(" if") + " }}" + otherwise + "{{ end }}{{ end }}"

    start = define("trim", "slice . 0 N", "slice . N", '{{ template "trimEnd" . }}')
    end = define("trimEnd", "slice . (len (slice . N))", "slice . 0 (len (slice . N))", "{{ . }}")
    return "\n".join(["{{- /* trims messages as the model's Hugging Face template does */ -}}", start, end])


# --- the Modelfile --------------------------------------------------------------------------------------------------

# In the order in which they are written. Ollama: "unknown parameter 'x'" for any other.
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repeat_penalty": float,
    "seed": int, "num_predict": int, "repeat_last_n": int, "presence_penalty": float, "frequency_penalty": float,
    "num_keep": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "num_thread": int, "use_mmap": bool,
    "stop": list,
}  # fmt: skip


def merged_parameters(chat: OllamaChat, parameters: Mapping[str, object]) -> dict[str, object]:
    """The parameters to store: the caller's and the template's stops, in the fixed order.

    Raises:
        UserError: unknown names and wrong types, all of them together.
    """
    problems = []
    for name, value in parameters.items():
        if name not in PARAMETERS:
            problems.append(f"{name}: Ollama has no such model parameter")
        elif not _fits(PARAMETERS[name], value):
            problems.append(f"{name}: {value!r} is not {_TYPE_NAMES[PARAMETERS[name]]}")
    if problems:
        raise UserError("these parameters cannot be given to Ollama", f"Known: {', '.join(PARAMETERS)}.", problems)
    stops = parameters.get("stop", [])
    stops = dict.fromkeys([*chat.stops, *([stops] if isinstance(stops, str) else stops)])  # once each, in order
    values = {name: parameters[name] for name in PARAMETERS if name in parameters and name != "stop"}
    return values | ({"stop": list(stops)} if stops else {})


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", list: "a text or a list of texts"}


def _fits(kind: type, value: object) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, (int, float)) and math.isfinite(value)


def system_text(chat: OllamaChat, system: str | None) -> str | None:
    """What belongs in SYSTEM: the caller's text, else the template's own; line breaks as `\\n` on every route."""
    return unix_lines(system if system is not None else chat.default_system or "") or None


def unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lossy_runes(text: str) -> list[str]:
    """Characters that Ollama's Modelfile parser drops in silence (the REST route keeps them): no-break space,
    zero-width joiner (so emoji families fall apart), U+3000. Go's strconv.IsPrint and str.isprintable agree on them."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


def render_modelfile(
    gguf_name: str,
    chat: OllamaChat,
    *,
    parameters: Mapping[str, object],
    system: str | None,
    license_text: str | None,
    comment_lines: Sequence[str] = (),
) -> str:
    """The text of a Modelfile that stands beside its GGUF file.

    Ask `lossy_runes` about `system` and `license_text` first: what it lists is lost on this route.

    Raises:
        UserError: a parameter, the file name or a text that a Modelfile cannot hold.
    """
    if not re.fullmatch(r"[^/\\:\s]([^/\\:\r\n]*[^/\\:\s])?", gguf_name) or lossy_runes(gguf_name):
        raise UserError(f"{gguf_name!r} cannot stand in FROM", "Use a plain file name without / \\ : or line breaks.")
    lines = [f"# {line}".rstrip() for text in comment_lines for line in re.split(r"[\r\n]+", text)]
    lines.append(f"FROM ./{gguf_name}")
    texts = {"TEMPLATE": chat.template, "SYSTEM": system_text(chat, system), "LICENSE": unix_lines(license_text or "")}
    if chat.template is not None:
        lines.append(f"TEMPLATE {_quoted('TEMPLATE', chat.template)}")
    lines += [f"{name} {value}" for name, value in (("RENDERER", chat.renderer), ("PARSER", chat.parser)) if value]
    for name, value in merged_parameters(chat, parameters).items():
        for single in value if isinstance(value, list) else [value]:
            text = _quoted("a stop", single) if isinstance(single, str) else str(single).lower()
            lines.append(f"PARAMETER {name} {text}")
    lines += [f"{name} {_quoted(name, text)}" for name in ("SYSTEM", "LICENSE") if (text := texts[name])]
    return "\n".join(lines) + "\n"


def _quoted(what: str, text: str) -> str:
    """In three quotes. There are no escapes, so the first line that ends in three quotes ends the value."""
    if re.search(r'"""[^\S\n]*\n', "".join(c for c in text if c not in lossy_runes(text))):
        raise UserError(
            f'{what} has a line that ends in """, where a Modelfile would cut it off',
            "Write the three quotes differently, or put a character after them.",
        )
    return f'"""{text}"""'


def parse_modelfile(text: str) -> dict:
    """Reads a Modelfile as Ollama does, to check that what was written comes back.

    Returns:
        `from`, `template`, `system`, `renderer`, `parser`, ... (the last one wins); `license` and `message` (lists);
        `parameters` (numbers converted; `stop` is a list).

    Raises:
        UserError: Ollama would refuse it, with the line.
    """
    found: dict = {"parameters": {}}
    lines = list(enumerate(unix_lines(text).split("\n"), start=1))[::-1]
    while lines:
        number, line = lines.pop()
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        key, word, value = _instruction(line.lstrip(" \t"), number)
        while (whole := _unquoted(value)) is None:
            if not lines:
                raise UserError(f"line {number} of the Modelfile opens a quotation that never ends")
            value += "\n" + lines.pop()[1]
        _store(found, key, word, whole)
    if "from" not in found:
        raise UserError("the Modelfile has no FROM line")
    return found


def _instruction(line: str, number: int) -> tuple[str, str, str]:
    """(instruction, name of a parameter or role of a message, start of the value)."""
    match = re.fullmatch(r"([A-Za-z]+)[ \t](.*)", line)
    if not match or match[1].lower() not in _INSTRUCTIONS:
        raise UserError(f"line {number} of the Modelfile has no instruction that Ollama knows: {line[:40]!r}")
    key, value = match[1].lower(), match[2]
    if key not in ("parameter", "message"):
        return key, "", value
    match = re.fullmatch(r"([A-Za-z0-9_]+)[ \t](.*)", value)
    if not match or (key == "parameter" and match[1] not in PARAMETERS):
        raise UserError(f"line {number} of the Modelfile is incomplete, or Ollama has no such parameter: {line[:40]!r}")
    return key, match[1], match[2]


_INSTRUCTIONS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
)  # fmt: skip


def _unquoted(value: str) -> str | None:
    """The value without its quotes, or None while it is not complete."""
    value = "".join(c for c in value if c not in lossy_runes(value)).strip()
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def _store(found: dict, key: str, word: str, value: str) -> None:
    if key == "parameter":
        kind = PARAMETERS[word]
        if kind is list:
            found["parameters"].setdefault(word, []).append(value)
        else:
            found["parameters"][word] = value == "true" if kind is bool else kind(value)
    elif key in ("license", "message"):
        found.setdefault(key, []).append(value if key == "license" else {"role": word, "content": value})
    else:
        found[key] = value
