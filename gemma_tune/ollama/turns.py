"""The turns of a chat: what stands around each kind of message, and that written as an Ollama TEMPLATE in Go.

Sources: Ollama's `template/template.go` (`.System` joins all system messages, `.Messages` holds them as well,
neighbours of one role are merged, and a template that uses `.Messages` needs no `.Response`) and Go's text/template. A
TEMPLATE never holds the BOS token: the tokenizer adds it.
"""

from __future__ import annotations

from dataclasses import dataclass

Messages = list[dict[str, str]]

# Exactly what Jinja's `trim` removes: the characters for which str.isspace() holds.
_EN_QUAD_TO_HAIR_SPACE = "".join(map(chr, range(0x2000, 0x200B)))
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680" + _EN_QUAD_TO_HAIR_SPACE + "\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True)
class Turns:
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
            messages = [{"role": "system", "content": system}, *messages]
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


# --- Go template text -----------------------------------------------------------------------------------------------


def lossy_runes(text: str) -> list[str]:
    """Characters that Ollama's Modelfile parser drops in silence (the REST route keeps them): no-break space,
    zero-width joiner (so emoji families fall apart), U+3000. Go's strconv.IsPrint and str.isprintable agree on them."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


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
