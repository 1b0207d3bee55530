"""Text as a part of a Go template: quoted where it has to be, and what Go's text/template has no function for.

Ollama adds one function that is needed here, ``json``: Go's `json.Marshal`, without spaces, and with <, > and & as
escapes. Hugging Face's templates write JSON as Python does, with spaces, so what Go made is written anew.
"""

from __future__ import annotations

# Exactly what Jinja's `trim` removes: the characters for which str.isspace() holds.
_EN_QUAD_TO_HAIR_SPACE = "".join(map(chr, range(0x2000, 0x200B)))
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680" + _EN_QUAD_TO_HAIR_SPACE + "\u2028\u2029\u202f\u205f\u3000"


def lossy_runes(text: str) -> list[str]:
    """Characters that Ollama's Modelfile parser drops in silence (the REST route keeps them): no-break space,
    zero-width joiner (so emoji families fall apart), U+3000. Go's strconv.IsPrint and str.isprintable agree on them."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


def go_string(text: str) -> str:
    """A Go string literal."""
    def escaped(char: str) -> str:
        if char in '\\"' or char in "\n\t":
            return {"\n": r"\n", "\t": r"\t"}.get(char, "\\" + char)
        return char if char.isprintable() else f"\\u{ord(char):04x}" if char <= "\uffff" else f"\\U{ord(char):08x}"

    return '"' + "".join(map(escaped, text)) + '"'


def go_text(text: str, last: bool = False) -> str:
    """Text as it is; as a quoted string where it could be misread, or, as the last one of a line or of the file, where
    what follows would take white space from it: the next line's `{{-`, or an editor that strips a file's end."""
    misread = "{{" in text or text.endswith("{") or '"""' in text or lossy_runes(text)
    plain = not misread and not (last and text != text.rstrip())
    return text if plain else f"{{{{ {go_string(text)} }}}}"


def go_trim(name: str = "trim", spaces: str = SPACES) -> str:
    """Two recursive templates that print their argument without the white space around it.

    Go's text/template has no trim function and Ollama adds none, but `slice` cuts strings by bytes and `eq` compares
    with many at once, so each step drops one space of 1, 2 or 3 bytes. (100,000 in a row are too many for Go.)
    """

    def define(name: str, edge: str, rest: str, otherwise: str) -> str:
        cases = "if"
        for n in sorted({len(c.encode()) for c in spaces}):
            some = " ".join(go_string(c) for c in spaces if len(c.encode()) == n)
            cases += f" and (ge (len .) {n}) (eq ({edge.replace('N', str(n))}) {some}) " + "}}"
            cases += '{{ template "' + name + '" (' + rest.replace("N", str(n)) + ") }}{{ else if"
        return '{{- define "' + name + '" }}{{ ' + cases.removesuffix(" if") + " }}" + otherwise + "{{ end }}{{ end }}"

    start = define(name, "slice . 0 N", "slice . N", '{{ template "' + name + 'End" . }}')
    end = define(f"{name}End", "slice . (len (slice . N))", "slice . 0 (len (slice . N))", "{{ . }}")
    return "\n".join(["{{- /* trims messages as the model's Hugging Face template does */ -}}", start, end])


# Go writes these as escapes in strings, and Python as they are.
_ESCAPED = ("<", ">", "&", "\u2028", "\u2029")
_RUN = 24  # bytes of a string that are looked at together: whole characters, if they have as many bytes each


def go_json(name: str, indent: int | None) -> str:
    """A template that prints JSON text of Go's as Python's `json.dumps` writes it, spaces and line breaks included.

    It takes a byte at a time, and runs of a string in which nothing is escaped at once. (Ranging over a number needs
    Go 1.24, with which Ollama has been built since early 2025.)

    Args:
        name: of the template.
        indent: spaces of each level, each item on a line of its own; None for one line.
    """
    comma, opened, closed = '{{ $c }} ', "{{ $c }}", "{{ $c }}"
    if indent is not None:
        comma = "{{ $c }}{{ $line }}"
        opened = (
            '{{ $c }}{{ if eq (slice $rest 1 2) "}" "]" }}{{ slice $rest 1 2 }}{{ $step = 2 }}{{ else }}'
            f'{{{{ $line = print $line "{" " * indent}" }}}}{{{{ $line }}}}{{{{ end }}}}')
        closed = f"{{{{ $line = slice $line 0 (len (slice $line {indent})) }}}}{{{{ $line }}}}{{{{ $c }}}}"
    return (
        '{{- define "' + name + '" }}{{ $rest := . }}{{ $text := false }}{{ $runs := false }}{{ $line := "\\n" }}'
        "{{ range len . }}{{ if not $rest }}{{ break }}{{ end }}{{ $c := slice $rest 0 1 }}{{ $step := 1 }}"
        "{{ if $text }}" + _in_text() + '{{ else if eq $c "\\"" }}{{ $c }}{{ $text = true }}{{ $runs = true }}'
        '{{ else if eq $c ":" }}{{ $c }} {{ else if eq $c "," }}' + comma + '{{ else if eq $c "{" "[" }}' + opened
        + '{{ else if eq $c "}" "]" }}' + closed + "{{ else }}{{ $c }}{{ end }}{{ $rest = slice $rest $step }}"
        "{{ end }}{{ end }}")


def _in_text() -> str:
    """A step inside a JSON string."""
    escape = "".join(
        f'{{{{ else if eq $c "\\\\u{ord(char):04x}" }}}}{{{{ {go_string(char)} }}}}{{{{ $step = 6 }}}}'
        for char in _ESCAPED)
    run = f"(slice $rest 0 {_RUN})"
    return (
        '{{ if eq $c "\\"" }}{{ $c }}{{ $text = false }}'
        '{{ else if eq $c "\\\\" }}{{ if ge (len $rest) 6 }}{{ $c = slice $rest 0 6 }}{{ end }}{{ $runs = true }}'
        + escape.replace("else if", "if", 1) + "{{ else }}{{ slice $rest 0 2 }}{{ $step = 2 }}{{ end }}"
        f'{{{{ else if and $runs (ge (len $rest) {_RUN}) (eq (json {run}) (print "\\"" {run} "\\"")) }}}}'
        f"{{{{ slice $rest 0 {_RUN} }}}}{{{{ $step = {_RUN} }}}}"
        '{{ else }}{{ $c }}{{ $runs = eq $c " " }}{{ end }}')
