"""Tool declarations and tool calls as OpenAI writes them, from the other ways in which they are found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.data.conversations.problems import Problem, damaged, kind, python_list, quoted

_ARGUMENTS = ("arguments", "parameters", "args")  # OpenAI's name, other programs', LangChain's and Gemini's


def identifier(value: Any) -> str | None:
    """The id of a call, which some programs number."""
    return str(value) if isinstance(value, (str, int)) and value != "" and not isinstance(value, bool) else None


def given(value: Any) -> Any:
    """A value that a table may hold as text, or None where that says that there is nothing."""
    return None if isinstance(value, str) and value.strip() in ("null", "[]") else value


def declarations(value: Any, problems: list[Problem]) -> list[dict[str, Any]] | None:
    """``tools`` of a row as a list of ``{"type": "function", "function": {"name", …}}``; None where there are none.

    Taken are also bare functions, a single one, and either as a JSON text.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = strict_json.loads(value)
        except ValueError as e:
            problems.append(python_list("`tools`", value)
                            or _bad_tools(f"`tools` is text that is not JSON: {strict_json.reason(e)}"))
            return None
    if value is None or value in ("", [], {}) or isinstance(value, str) and not value.strip():
        return None
    if not isinstance(value, (list, dict)):
        problems.append(_bad_tools(f"`tools` is {kind(value)}, not a list of functions"))
        return None
    found = [_declaration(number, tool, problems)
             for number, tool in enumerate(value if isinstance(value, list) else [value], start=1)]
    return [tool for tool in found if tool is not None]


def _declaration(number: int, tool: Any, problems: list[Problem]) -> dict[str, Any] | None:
    found = _with_its_function(f"tool {number}", tool, _bad_tools, problems)
    if found is None:
        return None
    tool, function = found
    function = _with_parameters(function)
    if isinstance(function.get("parameters"), str):
        try:
            function = function | {"parameters": strict_json.loads(function["parameters"])}
        except ValueError as e:
            problems.append(_bad_tools(f"the parameters of tool {number} are text that is not JSON: "
                                       f"{strict_json.reason(e)}"))
            return None
    if not isinstance(function.get("parameters"), (dict, type(None))):
        problems.append(_bad_tools(f"the parameters of tool {number} are {kind(function['parameters'])}, not an "
                                   "object"))
        return None
    if not isinstance(tool.get("function"), dict):  # a bare one may carry the `type` that belongs around it
        function = {key: value for key, value in function.items() if key != "type"}
    if (fault := _unwritable(function)) is not None:
        problems.append(_bad_tools(f"tool {number} contains {fault}"))
        return None
    if isinstance(function.get("parameters"), dict):
        function = function | {"parameters": _schema(_object_of(function["parameters"]))}
    return {"type": "function", "function": function}


def _with_parameters(function: dict[str, Any]) -> dict[str, Any]:
    """With the schema of its parameters under OpenAI's name, where it has but Anthropic's, or MCP's."""
    schema = next((name for name in ("input_schema", "inputSchema") if function.get(name) is not None), None)
    if schema is None or function.get("parameters") is not None:
        return function
    return {"parameters" if key == schema else key: value for key, value in function.items() if key != "parameters"}


# As Gemini writes JSON Schema's types, and as Python calls them in xLAM and BFCL.
_JSON = ("string", "number", "integer", "boolean", "array", "object", "null")
_TYPES = {**{name.upper(): name for name in _JSON}, **dict(zip(_JSON, _JSON, strict=True)),
          "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
          "set": "array", "dict": "object"}
_PYTHON = re.compile(r"(?P<name>\w+)(?:\[(?P<of>.{0,200})\])?(?P<optional>,\s*optional)?")  # List[str], optional


def _object_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of parameters that are but listed by their names, as xLAM has them; what is a schema as it is."""
    if not parameters or not all(isinstance(one, dict) and isinstance(one.get("type"), str)
                                 for one in parameters.values()):
        return parameters
    required = [name for name, one in parameters.items() if not _may_be_missing(one)]
    return {"type": "object", "properties": {name: _typed(one) for name, one in parameters.items()}} | (
        {"required": required} if required else {})


def _may_be_missing(parameter: dict[str, Any]) -> bool:
    """Whether a parameter says in one of the usual ways that it need not be given."""
    python = _PYTHON.fullmatch(parameter["type"])
    return ("default" in parameter or parameter.get("required") is False or parameter.get("optional") is True
            or python is not None and python["optional"] is not None)


def _typed(parameter: dict[str, Any]) -> dict[str, Any]:
    """A parameter with its type as JSON Schema has it, where that is known, also of what a list or a set holds."""
    python = _PYTHON.fullmatch(parameter["type"])
    if python is None or (name := _TYPES.get(python["name"].lower())) is None:
        return parameter
    holds = python["of"] if python["name"].lower() in ("list", "set") else None
    items = {"items": _typed({"type": holds})} if holds and "items" not in parameter else {}
    return parameter | {"type": name} | items


def _schema(schema: Any) -> Any:
    """A JSON schema with its types under JSON Schema's own names; names and examples that look like a type stay."""
    if isinstance(schema, list):
        return [_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key, value in schema.items():
        if key == "type" and isinstance(value, str) and value in _TYPES:
            found[key] = _TYPES[value]
        elif key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found[key] = {name: _schema(part) for name, part in value.items()}
        elif key in ("items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties"):
            found[key] = _schema(value)
    return found


def _bad_tools(reason: str) -> Problem:
    return Problem("tools", reason, 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}, …]')


def calls(where: str, value: Any, problems: list[Problem]) -> list[dict[str, Any]]:
    """``tool_calls`` of a turn as ``[{"id"?, "type": "function", "function": {"name", "arguments": {…}}}]``.

    Taken are also bare calls, a single one, and each as a JSON text.
    """
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except ValueError as e:
            problems.append(python_list(f"the tool call of {where}", value) or Problem(
                "tool_arguments", f"{where} calls a tool in text that is not JSON: {strict_json.reason(e)}",
                'write {"name": "…", "arguments": {…}}'))
            return []
    if not isinstance(value, (list, dict)):
        problems.append(_bad_call(f"the tool calls of {where} are {kind(value)}, not a list"))
        return []
    found = [_call(f"tool call {number} of {where}", call, problems)
             for number, call in enumerate(value if isinstance(value, list) else [value], start=1)]
    return [call for call in found if call is not None]


def _with_its_function(what: str, value: Any, bad: Callable[[str], Problem], problems: list[Problem]
                       ) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A declaration or a call, each perhaps as a JSON text, and what it says of its function; None if that has no name.
    """
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except ValueError as e:
            problems.append(bad(f"{what} is text that is not JSON: {strict_json.reason(e)}"))
            return None
    function = value.get("function") if isinstance(value, dict) and value.get("function") is not None else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        problems.append(bad(f"{what} has no function name: {quoted(value)}"))
        return None
    return value, function


def _call(where: str, call: Any, problems: list[Problem]) -> dict[str, Any] | None:
    found = _with_its_function(where, call, _bad_call, problems)
    if found is None:
        return None
    call, function = found
    arguments = _arguments(where, function, problems)
    if arguments is None:
        return None
    fault = _DAMAGE if damaged(function["name"]) else _unwritable(arguments)
    if fault == _DAMAGE:
        problems.append(Problem("broken_text", f"{where} contains {fault}", "export the text as UTF-8 again"))
        return None
    if fault is not None:
        problems.append(_bad_arguments(f"the arguments of {where} contain {fault}"))
        return None
    number = identifier(call.get("id"))
    return ({} if number is None else {"id": number}) | {
        "type": "function", "function": {"name": function["name"].strip(), "arguments": arguments}}


def _arguments(where: str, function: dict[str, Any], problems: list[Problem]) -> dict[str, Any] | None:
    arguments = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)
    if isinstance(arguments, str):
        try:
            # A function without parameters is called with nothing at all by some programs.
            arguments = strict_json.loads(arguments) if arguments.strip() else {}
        except ValueError as e:
            problems.append(_bad_arguments(f"the arguments of {where} are not JSON: {strict_json.reason(e)}"))
            return None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        problems.append(_bad_arguments(f"the arguments of {where} are {kind(arguments)}, not an object"))
        return None
    return arguments


def _bad_arguments(reason: str) -> Problem:
    return Problem("tool_arguments", reason, 'write them as a JSON object, such as {"city": "Paris"}')


def _bad_call(reason: str) -> Problem:
    return Problem("tool_calls", reason,
                   'write [{"type": "function", "function": {"name": "…", "arguments": {…}}}]')


_DAMAGE = "damaged characters"


def _unwritable(value: Any) -> str | None:
    """What keeps a value from being written as JSON in UTF-8; values from other files than JSON can hold anything."""
    try:
        return _DAMAGE if damaged(json.dumps(value, ensure_ascii=False, allow_nan=False)) else None
    except (TypeError, ValueError, RecursionError):
        return "a value that JSON does not have"
