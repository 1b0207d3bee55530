"""GPT-OSS's chats: channels, today's date, and tools as TypeScript, which no turns with fixed surroundings express.

So the TEMPLATE is written out here. What stands in front of a chat is read off the Jinja template, and that is held
against the same layout: one that differs gets none of this.

Sources: Ollama's `template/template.go` (`currentDate`, `.ThinkLevel`), `server/routes.go` (a model of the family
`gpt-oss` whose TEMPLATE has `<|start|>` and `<|end|>` gets the parser `harmony`), `harmony/harmonyparser.go` (the
answer that a chat ends with is continued, and its reasoning where it has no more than that).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gemma_tune.ollama.go_text import go_json, go_text
from gemma_tune.ollama.probe import FIRST, REPLY, SECOND, SYSTEM, Jinja, Unlike, message, split, talk

MARKS = ("<|start|>", "<|channel|>", "<|message|>")
STOPS = ("<|return|>", "<|call|>")
_DAY, _TODAY = re.compile(r"\d{4}-\d\d-\d\d"), re.compile(r"strftime_now\(['\"]%Y-%m-%d['\"]\)")
_EFFORT = re.compile(r"(?<=Reasoning: )\w+")
_USER, _DEVELOPER = "<|end|><|start|>user<|message|>", "<|end|><|start|>developer<|message|>"
_PARAMETERS = {"type": "object", "required": ["a"], "properties": {
    "a": {"type": "string", "description": "The a."}, "b": {"type": "array", "items": {"type": "integer"}},
    "c": {"type": "string", "enum": ["x", "y"]}}}
_TOOLS = [{"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
          for name, text, parameters in (("look", "Looks.", _PARAMETERS), ("now", "The time.", {"type": "object"}))]
_AS_TYPESCRIPT = """# Tools

## functions

namespace functions {

// Looks.
type look = (_: {
// The a.
a: string,
b?: number[],
c?: "x" | "y",
}) => any;

// The time.
type now = () => any;

} // namespace functions"""


@dataclass(frozen=True)
class _Front:
    """What a chat begins with: in every case, and where there are tools."""

    text: str
    with_tools: str


def template_of(jinja: Jinja, source: str) -> str | None:
    """The TEMPLATE, for a Jinja template that lays chats out as GPT-OSS's does; None for others.

    Args:
        source: of the template.
    """
    try:
        front = _front(jinja)
        _compare(jinja, front)
        high = jinja(talk(FIRST), reasoning_effort="high")
    except Unlike:
        return None
    text = go_text(front.text)
    if high == _EFFORT.sub("high", jinja(talk(FIRST)), count=1):
        text = _EFFORT.sub(lambda usual: f"{{{{ if .ThinkLevel }}}}{{{{ .ThinkLevel }}}}{{{{ else }}}}{usual[0]}"
                                         "{{ end }}", text, count=1)
    if _TODAY.search(source):
        text = _DAY.sub("{{ currentDate }}", text, count=1)
    front_text = '{{- "" }}' + text + "{{ if .Tools }}" + go_text(front.with_tools) + "{{ end }}" + _FRONT
    return "\n".join([go_json("json", None), _TYPE, _LAST, front_text, _TURNS])


def follows_the_day(template: str) -> bool:
    """Whether a TEMPLATE writes the day of the request, and not that of the export."""
    return "{{ currentDate }}" in template


def _front(jinja: Jinja) -> _Front:
    text, _ = split(jinja(talk(FIRST)), _USER)
    longer, _ = split(jinja(talk(FIRST), tools=_TOOLS), _DEVELOPER)
    if not longer.startswith(text):
        raise Unlike("tools change the beginning")
    return _Front(text, longer.removeprefix(text))


def _compare(jinja: Jinja, front: _Front) -> None:
    """Hold a Jinja template against the layout below.

    Raises:
        Unlike: it differs.
    """
    call = {"type": "function", "function": {"name": "look", "arguments": {"a": "é", "b": [1]}}}
    asked, thought = talk(FIRST), {"reasoning_content": "why", "thinking": "why"}
    called = [*asked, message("assistant", "", tool_calls=[call], **thought), message("tool", '1 "m"', name="look")]
    called_text = (f'{_AS_CALL}<|start|>functions.look to=assistant<|channel|>commentary<|message|>"1 \\"m\\""<|end|>')
    thinking = "<|start|>assistant<|channel|>analysis<|message|>why<|end|>"
    final, user = "<|start|>assistant<|channel|>final<|message|>{}<|end|>", "<|start|>user<|message|>{}<|end|>"
    developer = "<|start|>developer<|message|>{}<|end|>"
    instructions = f"# Instructions\n\n{SYSTEM}\n\n"
    told = user.format(FIRST) + final.format(REPLY) + user.format(SECOND)
    answered = talk(FIRST, REPLY, SECOND)
    for messages, tools, text in (
        (answered, None, told),
        (talk(FIRST, REPLY, SECOND, system=SYSTEM), None, developer.format(instructions) + told),
        (talk(FIRST, system=""), None, user.format(FIRST)),
        ([asked[0], answered[1] | thought, answered[2]], None, told),
        (talk(FIRST, system=SYSTEM), _TOOLS, developer.format(instructions + _AS_TYPESCRIPT) + user.format(FIRST)),
        (called, _TOOLS, developer.format(_AS_TYPESCRIPT) + user.format(FIRST) + thinking + called_text),
        ([*called, *answered[1:]], _TOOLS, developer.format(_AS_TYPESCRIPT) + user.format(FIRST) + called_text
         + final.format(REPLY) + user.format(SECOND)),
    ):
        beginning = front.text + (front.with_tools if tools else "") + "<|end|>"
        if jinja(messages, tools=tools) != f"{beginning}{text}<|start|>assistant":
            raise Unlike("it is laid out otherwise than GPT-OSS's")


_AS_CALL = ('<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{"a": "é", "b": [1]}<|call|>')

# A parameter's type. The white space within objects is the Jinja template's own. Of lists of objects it writes the
# parts as well where these are short, which is left out here.
_TYPE = (
    '{{- define "plain" }}{{ if eq . "number" "integer" }}number{{ else if eq . "string" "boolean" "object" }}{{ . }}'
    "{{ else }}any{{ end }}{{ end }}\n"
    '{{- define "list" }}{{ $of := "any" }}{{ with . }}{{ with index . "type" }}{{ $of = print . }}{{ end }}{{ end }}'
    '{{ if eq $of "array" }}{{ template "list" (index . "items") }}{{ else if and (eq $of "object") '
    '(index . "properties") }}any{{ else }}{{ template "plain" $of }}{{ end }}[]{{ end }}\n'
    '{{- define "type" }}{{ if ne (len .Type) 1 }}{{ range $n, $one := .Type }}{{ if $n }} | {{ end }}{{ $one }}'
    '{{ else }}any{{ end }}{{ else if eq (index .Type 0) "array" }}{{ template "list" .Items }}'
    '{{ else if and .Enum (eq (index .Type 0) "string") }}"{{ range $n, $one := .Enum }}{{ if $n }}" | "{{ end }}'
    '{{ $one }}{{ end }}"{{ else if ne (index .Type 0) "object" }}{{ template "plain" (index .Type 0) }}'
    '{{ else if .Properties }}{{ "{" }}\n{{ $comma := "" }}{{ range $name, $one := .Properties }}{{ $comma }}'
    '{{ $name }}?: \n                {{ template "type" . }}{{ $comma = ", " }}{{ end }}{{ "}" }}'
    "{{ else }}object{{ end }}{{ end }}")
# The last answer: reasoning before the calls that led to it is left out.
_LAST = ('{{- $answer := -1 }}{{- range $i, $_ := .Messages }}{{ if and (eq .Role "assistant") (not .ToolCalls) }}'
         "{{ $answer = $i }}{{ end }}{{- end }}")
_FRONT = """<|end|>
{{- if or .System .Tools }}<|start|>developer<|message|>
{{- if .System }}# Instructions

{{ .System }}

{{ end }}
{{- if .Tools }}# Tools

## functions

namespace functions {

{{ range .Tools }}// {{ .Function.Description }}
type {{ .Function.Name }} = {{ if .Function.Parameters.Properties }}(_: {
{{ $required := .Function.Parameters.Required }}
{{- range $name, $one := .Function.Parameters.Properties }}
{{- if .Description }}// {{ .Description }}
{{ end }}
{{- $name }}{{ $may := "?" }}{{ range $required }}{{ if eq . $name }}{{ $may = "" }}{{ end }}{{ end }}
{{- $may }}: {{ template "type" . }},
{{ end }}})
{{- else }}()
{{- end }} => any;

{{ end }}} // namespace functions
{{- end }}<|end|>
{{- end }}"""
_TURNS = """{{- $called := "" }}{{ $open := false }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|start|>user<|message|>{{ .Content }}<|end|>
{{- else if eq .Role "tool" }}<|start|>functions.{{ $called }} to=assistant<|channel|>commentary<|message|>
{{- template "json" (json .Content) }}<|end|>
{{- else if and (eq .Role "assistant") .ToolCalls }}
{{- if gt $i $answer }}
{{- if .Thinking }}<|start|>assistant<|channel|>analysis<|message|>{{ .Thinking }}<|end|>{{ end }}
{{- if .Content }}<|start|>assistant<|channel|>analysis<|message|>{{ .Content }}<|end|>{{ end }}
{{- end }}
{{- range .ToolCalls }}{{ $called = .Function.Name }}<|start|>assistant to=functions.{{ $called }}
{{- ""}}<|channel|>commentary json<|message|>{{ template "json" (json .Function.Arguments) }}<|call|>
{{- end }}
{{- else if eq .Role "assistant" }}
{{- if $last }}{{ if or .Content .Thinking }}{{ $open = true }}{{ end }}
{{- if .Thinking }}<|start|>assistant<|channel|>analysis<|message|>{{ .Thinking }}{{ if .Content }}<|end|>{{ end }}
{{- end }}
{{- if .Content }}<|start|>assistant<|channel|>final<|message|>{{ .Content }}{{ end }}
{{- else }}<|start|>assistant<|channel|>final<|message|>{{ .Content }}<|end|>
{{- end }}
{{- end }}
{{- end }}
{{- if not $open }}<|start|>assistant{{ end }}"""
