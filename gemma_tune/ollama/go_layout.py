"""Turns written as an Ollama TEMPLATE in Go.

`{{-` eats the line break before it, so it never follows text that must stay. What Ollama reads in a TEMPLATE beside
rendering it: `.Tools` (it takes tools), the first text inside `{{ if .ToolCalls }}` (what a call begins with), and the
texts around `.Thinking` (how reasoning is marked). So these stand alone, and what depends on them asks `$calls`.
"""

from __future__ import annotations

from gemma_tune.ollama.go_text import go_json, go_string, go_text, go_trim
from gemma_tune.ollama.tool_turns import LIST, ToolTurns
from gemma_tune.ollama.turns import Turns

# The keys in the order in which people and programs write them; what Ollama knows beside these is not lost.
_FUNCTION = (
    '{{- define "function" }}{{ $function := print "{\\"name\\":" (json .Name) }}'
    '{{ if .Description }}{{ $function = print $function ",\\"description\\":" (json .Description) }}{{ end }}'
    '{{ with .Parameters }}{{ $all := json . }}{{ $type := print "{\\"type\\":" (json .Type) }}'
    '{{ $required := print ",\\"required\\":" (json .Required) }}'
    '{{ $properties := print ",\\"properties\\":" (json .Properties) }}'
    '{{ if eq $all (print $type $required $properties "}") }}'
    '{{ $all = print $type $properties $required "}" }}'
    '{{ else if eq $properties ",\\"properties\\":null" }}{{ $all = print $type "}" }}{{ end }}'
    '{{ if .Type }}{{ $function = print $function ",\\"parameters\\":" $all }}{{ end }}{{ end }}'
    'TEMPLATE{{ end }}')


def template_text(turns: Turns) -> str:
    """The TEMPLATE."""
    tools, thought = turns.tools, turns.thought
    lines = [go_trim()] if turns.trims or (thought and thought.trims == " \n") else []
    if thought and thought.trims == "\n":
        lines.append(go_trim("trimLines", "\n"))
    if tools:
        lines += _definitions(tools)
    if turns.fold:
        lines.append("{{- $system := false }}{{- range .Messages }}{{ if " + _is_system(turns) + " }}"
                     "{{ $system = true }}{{ end }}{{- end }}")
    if turns.first:
        lines.append("{{- $first := not $system }}")
    if turns.fold_last or thought and not thought.always:
        lines.append('{{- $asked := -1 }}{{- range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $asked = $i }}'
                     "{{ end }}{{- end }}")
    if tools and tools.user != turns.user[0]:
        lines.append("{{- $tools := .Tools }}")
    if _grouped(tools):
        lines.append('{{- $before := "" }}')
    lines += [_opening(turns)] if turns.opening or (tools and tools.opening) else []
    counted = tools or turns.later_system or turns.fold_last or (thought and not thought.always)
    lines.append("{{- range $i, $_ := .Messages }}" if counted else "{{- range .Messages }}")
    if _grouped(tools):
        lines.append('{{- if and (eq $before "tool") (ne .Role "tool") }}' + go_text(tools.group[1]) + "{{ end }}")
    lines.append(_body(turns))
    if _grouped(tools):
        lines.append("{{- $before = .Role }}")
    ends = "{{- end }}"
    if _grouped(tools):
        ends += '{{ if eq $before "tool" }}' + go_text(tools.group[1]) + "{{ end }}"
    return "\n".join([*lines, ends + _prompt(turns)])


def _grouped(tools: ToolTurns | None) -> bool:
    return tools is not None and any(tools.group)


def _definitions(tools: ToolTurns) -> list[str]:
    """What writes JSON: arguments and results on one line, and the list of tools as it was in training."""
    listed = "json" if tools.indent is None else "jsonLines"
    lines = [go_json("json", None)] + ([go_json(listed, tools.indent)] if tools.indent is not None else [])
    write = f'{{{{ template "{listed}" (print $function "}}") }}}}' if tools.bare else (
        f'{{{{ template "{listed}" (print "{{\\"type\\":\\"function\\",\\"function\\":" $function "}}}}") }}}}')
    return [*lines, _FUNCTION.replace("TEMPLATE", write)]


def _opening(turns: Turns) -> str:
    """What stands first where no system message does."""
    if turns.fold_first:
        return '{{- "" }}' + go_text(turns.opening, last=True)
    text = go_text(turns.opening)
    if turns.tools and turns.tools.opening != turns.opening:
        otherwise = "{{ else }}" + text if text else ""
        text = "{{ if .Tools }}" + _with_list(turns.tools, turns.tools.opening) + otherwise + "{{ end }}"
    test = "not .System" if turns.skips_empty else 'ne (index .Messages 0).Role "system"'
    return "{{- if " + test + " }}" + text + "{{ end }}"


def _with_list(tools: ToolTurns, text: str) -> str:
    between = go_text(tools.between)
    item = '{{ template "function" .Function }}'
    if between:
        item = "{{ if $n }}" + between + "{{ end }}" + item
    return ("{{ range $n, $_ := $.Tools }}" + item + "{{ end }}").join(map(go_text, text.split(LIST)))


def _body(turns: Turns) -> str:
    """One message: a branch for each role."""
    tools = turns.tools
    branches = [('eq .Role "user"', _user(turns))]
    branches.append(('eq .Role "assistant"', _assistant(turns)))
    if turns.system:
        branches.append((_is_system(turns), _system(turns)))
    if tools:
        branches.append(('eq .Role "tool"', _result(turns)))
    body, test = "", "{{- if"
    for condition, text in branches:
        body += f"{test} {condition} " + "}}" + text
        test = "{{ else if"
    return body + "{{ end }}"


def _is_system(turns: Turns) -> str:
    """Whether a message is a system message that is written."""
    return 'and (eq .Role "system") .Content' if turns.skips_empty else 'eq .Role "system"'


def _put(turns: Turns, role: str, value: str) -> str:
    return "{{ " + (f'template "trim" {value}' if role in turns.trims else value) + " }}"


def _user(turns: Turns) -> str:
    before, after = map(go_text, turns.user)
    if turns.tools and turns.tools.user != turns.user[0]:
        with_tools = _with_list(turns.tools, turns.tools.user) + '{{ $tools = "" }}'
        before = "{{ if $tools }}" + with_tools + "{{ else }}" + before + "{{ end }}"
    return before + _asked(turns) + after


def _asked(turns: Turns) -> str:
    content = _put(turns, "user", ".Content")
    if not turns.fold:
        return content
    test, done = "and $system (eq $i $asked)" if turns.fold_last else "$system", "{{ $system = false }}"
    branches = "{{ if " + test + " }}"
    if turns.fold_whole:
        before, after = (f"{go_string(text)} " if text else "" for text in turns.fold)
        branches += _put(turns, "user", f"(print {before}$.System {after}.Content)") + done
        if turns.first:
            branches += _first(_put(turns, "user", f"(print {go_string(turns.first)} .Content)"))
        return branches + "{{ else }}" + content + "{{ end }}"
    branches += _put(turns, "system", "$.System").join(map(go_text, turns.fold)) + done
    return branches + (_first(go_text(turns.first)) if turns.first else "") + "{{ end }}" + content


def _first(text: str) -> str:
    """What is written in the first user's turn instead of a system text."""
    return "{{ else if $first }}" + text + "{{ $first = false }}"


def _system(turns: Turns) -> str:
    content = _put(turns, "system", ".Content")
    text = content.join(map(go_text, turns.system))
    if turns.later_system:
        text = "{{ if $i }}" + content.join(map(go_text, turns.later_system)) + "{{ else }}" + text + "{{ end }}"
    if not turns.tools:
        return text
    with_tools = content.join(_with_list(turns.tools, each) for each in turns.tools.system)
    return "{{ if and $.Tools (eq $i 0) }}" + with_tools + "{{ else }}" + text + "{{ end }}"


def _assistant(turns: Turns) -> str:
    before, after = map(go_text, turns.assistant)
    content, tools = _put(turns, "assistant", ".Content"), turns.tools
    before += _thought(turns)
    if not tools:
        return before + content + after
    if tools.beside is None:
        content = "{{ if not $calls }}" + content + "{{ end }}"
    elif tools.beside or tools.alone:
        beside, alone = (f"{{{{ if $calls }}}}{go_text(text)}{{{{ end }}}}" if text else ""
                         for text in (tools.beside, tools.alone))
        content = "{{ if .Content }}" + content + beside + ("{{ else }}" + alone if alone else "") + "{{ end }}"
    name, middle, end = map(go_text, tools.call)
    call = name + "{{ .Function.Name }}" + middle + '{{ template "json" (json .Function.Arguments) }}' + end
    if tools.next_call:
        call += "{{ if gt (len (slice $calls $n)) 1 }}" + go_text(tools.next_call) + "{{ end }}"
    calls = "{{ if .ToolCalls }}{{ range $n, $_ := .ToolCalls }}" + call + "{{ end }}{{ end }}"
    return "{{ $calls := .ToolCalls }}" + before + content + calls + after


def _thought(turns: Turns) -> str:
    thought = turns.thought
    if not thought:
        return ""
    trims = {" \n": 'template "trim" ', "\n": 'template "trimLines" '}.get(thought.trims, "")
    inner = "{{ " + trims + ".Thinking }}"
    test = ".Thinking" if thought.always else "and .Thinking (gt $i $asked)"
    otherwise = "{{ else }}" + go_text("".join(thought.around)) if thought.empty else ""
    return "{{ if " + test + " }}" + inner.join(map(go_text, thought.around)) + otherwise + "{{ end }}"


def _result(turns: Turns) -> str:
    tools = turns.tools
    before, after = map(go_text, tools.result)
    content = '{{ template "json" (json .Content) }}' if tools.quoted else _put(turns, "tool", ".Content")
    first = '{{ if ne $before "tool" }}' + go_text(tools.group[0]) + "{{ end }}" if tools.group[0] else ""
    return first + before + content + after


def _prompt(turns: Turns) -> str:
    prompt = go_text(turns.prompt, last=True)
    if turns.unthinking is None:
        return prompt
    return ("{{ if and .IsThinkSet (not .Think) }}" + go_text(turns.unthinking, last=True) + "{{ else }}" + prompt
            + "{{ end }}")
