"""Rows in the shapes in which data sets are published."""

from __future__ import annotations

from typing import Any


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


WEATHER = {"type": "function", "function": {
    "name": "get_current_weather", "description": "Get the current weather",
    "parameters": {"type": "object", "required": ["location"], "properties": {
        "location": {"type": "string", "description": "The city and country, eg. San Francisco, USA"},
        "format": {"type": "string", "enum": ["celsius", "fahrenheit"]}}}}}


OPENAI_TOOLS = {
    "messages": [
        user("What is the weather in San Francisco and Paris?"),
        {"role": "assistant", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {
                "name": "get_current_weather", "arguments": "{\"location\": \"San Francisco, USA\", \"format\": \"celsius\"}"}},
            {"id": "call_2", "type": "function", "function": {
                "name": "get_current_weather", "arguments": {"location": "Paris", "format": "celsius"}}}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "17.0"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21.0"}]},
        answer("It is 21 degrees in San Francisco, and 17 in Paris.")],
    "parallel_tool_calls": False, "tools": [WEATHER]}


ALPACA = {"instruction": "Identify the odd one out.", "input": "Twitter, Instagram, Telegram", "output": "Telegram",
          "text": "Below is an instruction … ### Response:\nTelegram"}


SHAREGPT = {"id": "QWJhYvA_0", "conversations": [
    {"from": "human", "value": "Summarise this."}, {"from": "gpt", "value": "It is short."},
    {"from": "human", "value": "Thanks"}, {"from": "gpt", "value": "You're welcome!"}]}


GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
              '{\n    "name": "get_exchange_rate",\n    "description": "Get the exchange rate",\n    "parameters": {\n'
              '        "type": "object",\n        "properties": {"base_currency": {"type": "string"}}\n    }\n}\n\n'
              '{\n    "name": "get_time",\n    "description": "{now}"\n}\n',
    "chat": "USER: Can you book a flight for me?\n\n\nASSISTANT: I can only get rates. USER: is not my name.  <|endoftext|>\n\n\n"
            "USER: What about\n1. dollars and\n2. Bob's euros?\n\n\n"
            'ASSISTANT: Let me look. <functioncall> {"name": "get_exchange_rate", "arguments": \'{"base_currency": "USD", '
            '"note": "Bob\\\'s"}\'} <|endoftext|>\n\n\n'
            'FUNCTION RESPONSE: {"rate": 0.85}\n\n\n'
            "ASSISTANT: It is 0.85.\n\nAnything else? <|endoftext|>\n\n\n"}
